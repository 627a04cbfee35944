"""Attention of one new token per completion over (prompt shared by the group, own completion so far).

The prompt of a group is read once for all its completions: one program per (group, tile of its query rows, KV head,
split of the prompt) keeps a tile of G x heads queries on chip. A second kernel adds the completion's own keys and joins
the parts by their log-sum-exp:

    o = sum_s exp(lse_s - lse) o_s,  lse = log sum_s exp(lse_s)      (Juravsky et al. 2024, "Hydragen", section 3.1;
                                                                      the splits are flash-decoding's)
"""

from __future__ import annotations

import torch

SPLIT_TOKENS = 256  # of a prompt of the longest length the pool takes, per program


def decode_attention_ref(query, key, value, prefix_k, prefix_v, prefix_lengths, members, suffix_k, suffix_v, lengths,
                         scaling):  # fmt: skip
    """`decode_attention` in plain PyTorch, one row at a time, in float32 (float64 for float64)."""
    repeat = query.shape[1] // key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    out = torch.zeros_like(query)
    for slot, rows in enumerate(members.tolist()):
        for row in (row for row in rows if row >= 0):
            n, t = int(prefix_lengths[slot]), int(lengths[row]) - 1
            suffix_k[row, :, t], suffix_v[row, :, t] = key[row], value[row]
            k = torch.cat([prefix_k[slot, :, :n], suffix_k[row, :, : t + 1]], 1).to(wide).repeat_interleave(repeat, 0)
            v = torch.cat([prefix_v[slot, :, :n], suffix_v[row, :, : t + 1]], 1).to(wide).repeat_interleave(repeat, 0)
            weights = torch.softmax((k @ query[row].to(wide)[..., None])[..., 0] * scaling, -1)  # (Hq, n + t + 1)
            out[row] = (weights[:, None] @ v)[:, 0].to(out.dtype)
    return out


def decode_attention_triton(query, key, value, prefix_k, prefix_v, prefix_lengths, members, suffix_k, suffix_v,
                            lengths, scaling):  # fmt: skip
    """`decode_attention` through the kernels, also on CPU tensors under Triton's interpreter."""
    from . import decode_attention_triton as kernels

    return kernels.launch(query, key, value, prefix_k, prefix_v, prefix_lengths, members, suffix_k, suffix_v, lengths,
                          scaling)  # fmt: skip


def decode_attention(query, key, value, prefix_k, prefix_v, prefix_lengths, members, suffix_k, suffix_v, lengths,
                     scaling):  # fmt: skip
    """Attention of B new tokens, whose keys and values are also stored.

    query (B, Hq, D), key and value (B, Hk, D) of the new tokens, Hq a multiple of Hk, D a power of two;
    prefix_k, prefix_v (P, Hk, L, D) with prefix_lengths (P,) int32 tokens in use; members (P, W) int32, the rows that
    continue each prompt, -1 elsewhere; suffix_k, suffix_v (S >= B, Hk, C, D), row b in slot b; lengths (B,) int64
    tokens of each completion, the new one included, which is written to place lengths - 1. Returns (B, Hq, D) in the
    dtype of query; rows that are in no group get what they got last or anything else, but disturb no other.
    """
    fn = decode_attention_triton if query.is_cuda else decode_attention_ref
    return fn(query, key, value, prefix_k, prefix_v, prefix_lengths, members, suffix_k, suffix_v, lengths, scaling)
