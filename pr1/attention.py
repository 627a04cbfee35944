"""Attention of the language model and of the vision tower, registered with transformers: no model code is patched.

transformers hands our keyword arguments to the registered function in every layer. The language model is always run on
one stream of shape (1, T, H); the keyword `attend` says who sees whom:

    PackedAttention   a pack: several groups, completions see their prompt and themselves (training, reference)
    PrefillAttention  the same over prompts alone, keeping their keys and values (pr1/decode.py)
    DecodeAttention   one new token per sequence against (shared prompt, own completion so far) (pr1/decode.py)
"""

from __future__ import annotations

import inspect
from functools import cached_property

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from pr1.records import Segments

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:  # not installed, or built for another torch
    flash_attn_varlen_func = None

TEXT = "pr1_packed"
VISION = "pr1_flash_windows"  # "flash" in the name makes transformers pass cu_seqlens instead of looping over windows


GROUPED = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.12 and later


def varlen(query, key, value, cu_q, cu_k, max_q: int, max_k: int, *, causal: bool, scale: float) -> torch.Tensor:
    """FlashAttention over segments of unequal lengths, half precision on a GPU only; differentiable, no host sync.

    query (Tq, Hq, D), key and value (Tk, Hk, D), Hk a divisor of Hq; cu_q, cu_k (S+1,) int32 on the device. causal is
    aligned at the bottom right: the last query of a segment sees every key of it. Returns (Tq, Hq, D).
    """
    if flash_attn_varlen_func is not None:
        return flash_attn_varlen_func(query, key, value, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=causal,
                                      deterministic=torch.are_deterministic_algorithms_enabled())  # fmt: skip
    grouped = {}
    if key.shape[1] != query.shape[1]:
        if GROUPED:
            grouped = {"enable_gqa": True}
        else:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    window = (-1, 0) if causal else (-1, -1)
    return varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window, **grouped)


def _flash(query: torch.Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


def _packed(module, query, key, value, attention_mask, *, scaling, attend, **_):
    """query (1, Hq, T, D), key and value (1, Hk, T, D) -> (1, T, Hq, D), None."""
    return attend(module.layer_idx, query[0], key[0], value[0], scaling).transpose(0, 1).unsqueeze(0), None


def _windows(module, query, key, value, attention_mask, *, scaling, cu_seq_lens_q, max_length_q=None, **_):
    """Full attention inside each window; one call, or without FlashAttention one for each length that windows have.
    Shapes as above, Hq = Hk."""
    if _flash(query):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        out = varlen(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, causal=False, scale=scaling)
        return out.unsqueeze(0), None
    lengths = (cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).tolist()
    if len(set(lengths)) == 1:
        return _equal_windows(query, key, value, lengths[0], scaling), None
    starts = cu_seq_lens_q[:-1].tolist()
    out = query.new_empty(query.shape[2], query.shape[1], query.shape[3])  # (T, H, D)
    for length in sorted(set(lengths)):
        rows = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths) if n == length]).to(query.device)
        q, k, v = (x.index_select(2, rows) for x in (query, key, value))
        out = out.index_copy(0, rows, _equal_windows(q, k, v, length, scaling)[0])
    return out.unsqueeze(0), None


def _equal_windows(query, key, value, length, scaling):
    heads, total, dim = query.shape[1:]
    q, k, v = (x[0].view(heads, total // length, length, dim).transpose(0, 1) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, scale=scaling)  # (W, H, length, D)
    return out.transpose(1, 2).reshape(1, total, heads, dim)


def _no_mask(*_, **__):
    return None


AttentionInterface.register(TEXT, _packed)
AttentionInterface.register(VISION, _windows)
AttentionMaskInterface.register(TEXT, _no_mask)


class _Gather(torch.autograd.Function):
    """Rows of x (T, H, D) at index (K,). The gradients of a row used several times are added up in float32 or wider:
    a prompt's keys take part once for each completion, too often for sums in bfloat16."""

    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = grad.new_zeros(ctx.rows, *grad.shape[1:], dtype=wide)
        return total.index_add_(0, index, grad.to(wide)).to(grad.dtype), None


class PackedAttention:
    """Bottom-right causal attention inside each segment: one FlashAttention call, or SDPA segment by segment. Never a
    T x T mask."""

    def __init__(self, segments: Segments):
        self.segments, self.kv_index = segments, segments.kv_index
        self.masks = {}

    gather = staticmethod(_Gather.apply)

    @cached_property
    def cu_q(self) -> list[int]:
        return self.segments.cu_q.tolist()

    @cached_property
    def cu_k(self) -> list[int]:
        return self.segments.cu_k.tolist()

    def mask(self, n_q: int, n_k: int, device) -> torch.Tensor:
        if (n_q, n_k) not in self.masks:
            ones = torch.ones(n_q, n_k, dtype=torch.bool, device=device)
            self.masks[n_q, n_k] = ones.tril(n_k - n_q)  # query i of n_q sees keys 0 .. n_k - n_q + i
        return self.masks[n_q, n_k]

    def __call__(self, layer: int, query, key, value, scaling) -> torch.Tensor:
        """query (Hq, T, D), key and value (Hk, T, D) -> (Hq, T, D)."""
        key, value = (self.gather(x.transpose(0, 1), self.kv_index) for x in (key, value))  # (K, Hk, D)
        if _flash(query):
            seg = self.segments
            return varlen(query.transpose(0, 1), key, value, seg.cu_q, seg.cu_k, seg.max_q, seg.max_k, causal=True,
                          scale=scaling).transpose(0, 1)  # fmt: skip
        key, value = key.transpose(0, 1)[None], value.transpose(0, 1)[None]  # (1, Hk, K, D)
        out = []
        for q0, q1, k0, k1 in zip(self.cu_q, self.cu_q[1:], self.cu_k, self.cu_k[1:]):
            square = q1 - q0 == k1 - k0
            out.append(F.scaled_dot_product_attention(
                query[None, :, q0:q1], key[:, :, k0:k1], value[:, :, k0:k1], scale=scaling, enable_gqa=True,
                is_causal=square, attn_mask=None if square else self.mask(q1 - q0, k1 - k0, query.device),
            )[0])  # fmt: skip
        return torch.cat(out, 1)
