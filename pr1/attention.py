"""Attention of the language model and of the vision tower, registered with transformers: no model code is patched.

transformers hands our keyword arguments to the registered function in every layer. The language model is always run on
one stream of shape (1, T, H); the keyword `attend` says who sees whom:

    PackedAttention   a pack: several groups, completions see their prompt and themselves (training, reference)
    PrefillAttention  the same over prompts alone, keeping their keys and values for decoding
    DecodeAttention   one new token per sequence against (shared prompt, own completion so far)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from pr1.records import Segments

TEXT = "pr1_packed"
VISION = "pr1_flash_windows"  # "flash" in the name makes transformers pass cu_seqlens instead of looping over windows


def _packed(module, query, key, value, attention_mask, *, scaling, attend, **_):
    """query (1, Hq, T, D), key and value (1, Hk, T, D) -> (1, T, Hq, D), None."""
    return attend(module.layer_idx, query[0], key[0], value[0], scaling).transpose(0, 1).unsqueeze(0), None


def _windows(module, query, key, value, attention_mask, *, scaling, cu_seq_lens_q, **_):
    """Full attention inside each window; windows of one length run as one batch. Shapes as above, Hq = Hk."""
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


class PackedAttention:
    """Segment by segment, bottom-right causal. Never a T x T mask."""

    def __init__(self, segments: Segments):
        self.cu_q, self.cu_k = segments.cu_q.tolist(), segments.cu_k.tolist()
        self.kv_index = segments.kv_index
        self.masks = {}

    def mask(self, n_q: int, n_k: int, device) -> torch.Tensor:
        if (n_q, n_k) not in self.masks:
            ones = torch.ones(n_q, n_k, dtype=torch.bool, device=device)
            self.masks[n_q, n_k] = ones.tril(n_k - n_q)  # query i of n_q sees keys 0 .. n_k - n_q + i
        return self.masks[n_q, n_k]

    def __call__(self, layer: int, query, key, value, scaling) -> torch.Tensor:
        """query (Hq, T, D), key and value (Hk, T, D) -> (Hq, T, D)."""
        key, value = key[:, self.kv_index], value[:, self.kv_index]  # (Hk, K, D)
        out = []
        for q0, q1, k0, k1 in zip(self.cu_q, self.cu_q[1:], self.cu_k, self.cu_k[1:]):
            square = q1 - q0 == k1 - k0
            out.append(F.scaled_dot_product_attention(
                query[None, :, q0:q1], key[None, :, k0:k1], value[None, :, k0:k1], scale=scaling, enable_gqa=True,
                is_causal=square, attn_mask=None if square else self.mask(q1 - q0, k1 - k0, query.device),
            )[0])  # fmt: skip
        return torch.cat(out, 1)


class PrefillAttention(PackedAttention):
    """Prompts side by side; keys and values of every layer are kept."""

    def __init__(self, segments: Segments):
        super().__init__(segments)
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # layer -> keys, values (Hk, T, D)

    def __call__(self, layer, query, key, value, scaling):
        self.kept[layer] = key, value
        return super().__call__(layer, query, key, value, scaling)


class DecodeAttention:
    """One query per sequence; the prompt of a group is stored and read once for its G sequences.

    Prompts are padded to the longest of the batch; completions grow together, their storage by GROW tokens at a time.
    """

    GROW = 64

    def __init__(self, prefill: PrefillAttention, group_size: int):
        self.group_size, self.length, self.room = group_size, 0, 0
        starts = prefill.cu_q
        lengths = [b - a for a, b in zip(starts, starts[1:])]
        n, longest = len(lengths), max(lengths)
        self.prefix, self.suffix = {}, {}
        for layer, kept in prefill.kept.items():
            heads, _, dim = kept[0].shape
            padded = [x.new_zeros(n, heads, longest, dim) for x in kept]  # keys, values (P, Hk, Lmax, D)
            for p, (start, length) in enumerate(zip(starts, lengths)):
                for to, x in zip(padded, kept):
                    to[p, :, :length] = x[:, start : start + length]
            self.prefix[layer] = padded
            self.suffix[layer] = [x.new_empty(n * group_size, heads, 0, dim) for x in kept]
        columns = torch.arange(longest, device=prefill.kv_index.device)
        padding = columns >= torch.tensor(lengths, device=columns.device)[:, None]  # (P, Lmax)
        self.padding = padding[:, None, None]

    def keep(self, prompts: torch.Tensor) -> None:
        """Drops every group but these; prompts: (P',) int64 indices into the present batch."""
        sequences = (prompts[:, None] * self.group_size + torch.arange(self.group_size, device=prompts.device)).view(-1)
        self.padding = self.padding[prompts]
        for layer in self.prefix:
            self.prefix[layer] = [x[prompts] for x in self.prefix[layer]]
            self.suffix[layer] = [x[sequences] for x in self.suffix[layer]]

    def __call__(self, layer, query, key, value, scaling):
        """query (Hq, B, D), key and value (Hk, B, D) with B = P*G, group-major -> (Hq, B, D)."""
        t = self.length
        (pk, pv), (sk, sv) = self.prefix[layer], self.suffix[layer]
        sk[:, :, t - 1], sv[:, :, t - 1] = key.transpose(0, 1), value.transpose(0, 1)
        q_heads, batch, dim = query.shape
        heads, n = key.shape[0], len(pk)
        repeat = q_heads // heads
        query = (query * scaling).view(heads, repeat, n, self.group_size, dim)
        grouped = query.permute(2, 0, 3, 1, 4).reshape(n, heads, self.group_size * repeat, dim)  # (P, Hk, G*rep, D)
        single = query.permute(2, 3, 0, 1, 4).reshape(batch, heads, repeat, dim)  # (B, Hk, rep, D)
        on_prefix = (grouped @ pk.transpose(2, 3)).masked_fill(self.padding, float("-inf"))  # (P, Hk, G*rep, Lmax)
        longest = on_prefix.shape[-1]
        on_prefix = on_prefix.view(n, heads, self.group_size, repeat, longest).transpose(1, 2)
        on_suffix = single @ sk[:, :, :t].transpose(2, 3)  # (B, Hk, rep, t)
        scores = torch.cat([on_prefix.reshape(batch, heads, repeat, longest), on_suffix], -1)
        weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
        on_prefix = weights[..., :longest].view(n, self.group_size, heads, repeat, longest).transpose(1, 2)
        out = on_prefix.reshape(n, heads, self.group_size * repeat, longest) @ pv  # (P, Hk, G*rep, D)
        out = out.view(n, heads, self.group_size, repeat, dim).transpose(1, 2).reshape(batch, heads, repeat, dim)
        out = out + weights[..., longest:] @ sv[:, :, :t]
        return out.permute(1, 2, 0, 3).reshape(q_heads, batch, dim)

    def advance(self) -> None:
        """To be called before the layers of each new token."""
        self.length += 1
        if self.length > self.room:
            self.room += self.GROW
            for layer, kept in self.suffix.items():
                self.suffix[layer] = [F.pad(x, (0, 0, 0, self.GROW)) for x in kept]
