"""The Triton kernels of decode_attention.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .decode_attention import SPLIT_TOKENS

LOG2E = tl.constexpr(1.4426950408889634)
TILE = 64  # query rows of a program at most
KEYS = 64  # keys per turn of the loop


@triton.jit
def _prefix_kernel(q_ptr, k_ptr, v_ptr, length_ptr, members_ptr, part_ptr, lse_ptr, width, tiles, slot_tokens,
                   split_tokens, splits, scale, HEADS: tl.constexpr, REPEAT: tl.constexpr, DIM: tl.constexpr,
                   TILE: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """Program (prompt * tile, KV head, split): the tile's queries against a stretch of the prompt."""
    slot, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    head, split = tl.program_id(1), tl.program_id(2)
    line = tile * TILE + tl.arange(0, TILE)  # of (member, query head of the KV head)
    member, repeat = line // REPEAT, line % REPEAT
    row = tl.load(members_ptr + slot * width + member, mask=member < width, other=-1)
    if tl.max(row) < 0:
        return
    row = row.to(tl.int64)
    live = row >= 0
    place = row * (HEADS * REPEAT) + head * REPEAT + repeat  # (row, query head)
    dim = tl.arange(0, DIM)
    q = tl.load(q_ptr + place[:, None] * DIM + dim[None, :], mask=live[:, None], other=0.0)
    begin, end = split * split_tokens, tl.load(length_ptr + slot)
    end = tl.minimum(end, begin + split_tokens)
    base = (slot.to(tl.int64) * HEADS + head) * slot_tokens * DIM
    top = tl.full((TILE,), float("-inf"), tl.float32)
    mass = tl.zeros((TILE,), tl.float32)
    acc = tl.zeros((TILE, DIM), tl.float32)
    for start in range(begin, end, KEYS):
        at = start + tl.arange(0, KEYS)
        inside = at < end
        k = tl.load(k_ptr + base + at[:, None] * DIM + dim[None, :], mask=inside[:, None], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        s = tl.where(inside[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))  # finite: every turn has a key
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        v = tl.load(v_ptr + base + at[:, None] * DIM + dim[None, :], mask=inside[:, None], other=0.0)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        mass = mass * shrink + tl.sum(p, 1)
        top = new_top
    out = place * splits + split
    lse = tl.where(mass > 0, top + tl.log2(mass), float("-inf"))  # -inf: this stretch lies beyond the prompt
    tl.store(lse_ptr + out, lse, mask=live)
    tl.store(part_ptr + out[:, None] * DIM + dim[None, :], acc / tl.maximum(mass, 1e-30)[:, None], mask=live[:, None])


@triton.jit
def _suffix_kernel(q_ptr, new_k_ptr, new_v_ptr, k_ptr, v_ptr, length_ptr, part_ptr, lse_ptr, out_ptr, slot_tokens,
                   splits, new_k_stride, new_v_stride, scale, HEADS: tl.constexpr, REPEAT: tl.constexpr,
                   DIM: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """Program (row, KV head): stores the new key and value, adds the completion's own keys, joins all parts."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    repeat, dim = tl.arange(0, TILE), tl.arange(0, DIM)
    live = repeat < REPEAT
    place = (row * HEADS + head) * REPEAT + repeat
    q = tl.load(q_ptr + place[:, None] * DIM + dim[None, :], mask=live[:, None], other=0.0)
    new_k = tl.load(new_k_ptr + row * new_k_stride + head * DIM + dim)
    new_v = tl.load(new_v_ptr + row * new_v_stride + head * DIM + dim)
    past = (tl.load(length_ptr + row) - 1).to(tl.int32)
    base = (row * HEADS + head) * slot_tokens * DIM
    tl.store(k_ptr + base + past * DIM + dim, new_k)
    tl.store(v_ptr + base + past * DIM + dim, new_v)
    # the new token first: from here on every row has a finite maximum
    top = tl.sum(q.to(tl.float32) * new_k.to(tl.float32)[None, :], 1) * (scale * LOG2E)
    mass = tl.full((TILE,), 1.0, tl.float32)
    acc = tl.zeros((TILE, DIM), tl.float32) + new_v.to(tl.float32)[None, :]
    for start in range(0, past, KEYS):
        at = start + tl.arange(0, KEYS)
        inside = at < past
        k = tl.load(k_ptr + base + at[:, None] * DIM + dim[None, :], mask=inside[:, None], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        s = tl.where(inside[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        v = tl.load(v_ptr + base + at[:, None] * DIM + dim[None, :], mask=inside[:, None], other=0.0)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        mass = mass * shrink + tl.sum(p, 1)
        top = new_top
    for split in range(0, splits):
        part = place * splits + split
        lse = tl.load(lse_ptr + part, mask=live, other=float("-inf"))
        o = tl.load(part_ptr + part[:, None] * DIM + dim[None, :], mask=live[:, None], other=0.0)
        new_top = tl.maximum(top, lse)
        shrink, share = tl.exp2(top - new_top), tl.exp2(lse - new_top)
        acc = acc * shrink[:, None] + o * share[:, None]
        mass = mass * shrink + share
        top = new_top
    o = (acc / mass[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place[:, None] * DIM + dim[None, :], o, mask=live[:, None])


def launch(query, key, value, prefix_k, prefix_v, prefix_lengths, members, suffix_k, suffix_v, lengths, scaling):
    """Shapes as `decode_attention`."""
    query = query.contiguous()
    batch, q_heads, dim = query.shape
    prompts, heads, slot_tokens, _ = prefix_k.shape
    repeat, width = q_heads // heads, members.shape[1]
    key, value = (x if x.stride()[1:] == (dim, 1) else x.contiguous() for x in (key, value))
    for name, pool in (("prefix", prefix_k), ("prefix", prefix_v), ("suffix", suffix_k), ("suffix", suffix_v)):
        if not pool.is_contiguous():
            raise ValueError(f"decode_attention: the {name} pool of a layer must be contiguous, got {pool.stride()}")
    if dim & (dim - 1) or dim < 16:
        raise ValueError(f"decode_attention: the head dimension must be a power of two of at least 16, got {dim}")
    splits = -(-slot_tokens // SPLIT_TOKENS)
    tile = max(16, min(TILE, triton.next_power_of_2(width * repeat)))
    tiles = -(-width * repeat // tile)
    parts = torch.empty(batch * q_heads * splits, dim, dtype=torch.float32, device=query.device)
    lse = torch.empty(batch * q_heads * splits, dtype=torch.float32, device=query.device)
    out = torch.empty_like(query)
    shape = dict(HEADS=heads, REPEAT=repeat, DIM=dim, KEYS=KEYS)
    _prefix_kernel[(prompts * tiles, heads, splits)](
        query, prefix_k, prefix_v, prefix_lengths, members, parts, lse, width, tiles, slot_tokens, SPLIT_TOKENS, splits,
        scaling, TILE=tile, num_warps=4 if tile < 64 else 8, **shape,
    )  # fmt: skip
    _suffix_kernel[(batch, heads)](
        query, key, value, suffix_k, suffix_v, lengths, parts, lse, out, suffix_k.shape[2], splits, key.stride(0),
        value.stride(0), scaling, TILE=max(16, triton.next_power_of_2(repeat)), num_warps=4, **shape,
    )  # fmt: skip
    return out
