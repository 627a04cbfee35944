"""What a row of logits is needed for, in Triton: the row operations of CUDA tensors, in float32.

The functions of `softmax_torch`, same arguments and results. One read gives log-prob, entropy and log-sum-exp; one more
read and one write give the gradient. Import this module late: triton is not there on every platform.

Strides and V arrive divided by UNIT, a constant: an integer that is not specialised has no known divisors, and without
them loads and masks would be element by element. Everything else is a runtime value, so a dtype has one binary.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from . import blocks
from .softmax_torch import RowSoftmax

FLOOR = tl.constexpr(-1e4)  # exp2 of it is 0: the clamp changes no product and avoids 0 * -inf
LN2 = tl.constexpr(math.log(2))
LOG2E = tl.constexpr(1 / math.log(2))

launches = 0  # kernels launched so far; the *_triton entry points look whether it moved


@triton.jit
def _merge(top, total, moment, x, scale):
    """A block (LANES, WIDTH) into each lane's largest logit, sum of e and sum of z e, z = (x - top) scale, e = 2^z.

    The online softmax of Milakov and Gimelshein 2018 with one more moment; lanes never wait for each other.
    """
    new = tl.maximum(top, tl.max(x, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)  # a lane that has seen nothing but -inf
    back = (top - safe) * scale
    keep = tl.exp2(back)
    z = (x - safe[:, None]) * scale
    e = tl.exp2(z)
    moment = keep * (moment + tl.maximum(back, FLOOR) * total) + tl.sum(tl.maximum(z, FLOOR) * e, 1)
    return new, keep * total + tl.sum(e, 1), moment


@triton.jit(do_not_specialize=["tokens", "index", "weight", "out", "n", "row_units", "v_units", "scale", "inverse"])
def forward_kernel(
    logits, tokens, index, weight, out, n, row_units, v_units, scale, inverse,
    UNIT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, INDEXED: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """One program, one row. out (4, n) float32: logp, entropy, top, log_sum. scale = log2(e) / T, inverse = 1 / T."""
    i = tl.program_id(0)
    out += i
    if WEIGHTED:
        if tl.load(weight + i) == 0:
            for k in tl.static_range(4):
                tl.store(out + k * n, 0.0)
            return
    row = i.to(tl.int64)
    if INDEXED:
        row = tl.load(index + i)
    logits += row * row_units * UNIT  # 64 bits: N V passes 2^31 at 14,134 rows
    v = v_units * UNIT
    columns = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    top = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    moment = tl.zeros((LANES,), tl.float32)
    whole = v // (LANES * WIDTH)
    for _ in range(whole):
        x = tl.load(logits + columns).to(tl.float32)
        top, total, moment = _merge(top, total, moment, x, scale)
        logits += LANES * WIDTH
    logits -= whole * (LANES * WIDTH)
    columns += whole * (LANES * WIDTH)
    x = tl.load(logits + columns, mask=columns < v, other=float("-inf")).to(tl.float32)
    top, total, moment = _merge(top, total, moment, x, scale)
    highest = tl.max(top, 0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    back = (top - highest) * scale
    keep = tl.exp2(back)
    moment = tl.sum(keep * (moment + tl.maximum(back, FLOOR) * total), 0)
    total = tl.sum(keep * total, 0)
    token = tl.load(tokens + i)
    inside = (token >= 0) & (token < v)  # another id gives NaN, which the caller's checks see, and no wild read
    picked = tl.load(logits + token, mask=inside, other=float("nan")).to(tl.float32)
    log_sum = tl.log(total)
    tl.store(out, (picked - highest) * inverse - log_sum)
    tl.store(out + n, log_sum - moment * LN2 / total)
    tl.store(out + 2 * n, highest)
    tl.store(out + 3 * n, log_sum)


@triton.jit(
    do_not_specialize=["tokens", "index", "rows", "dlogp", "dentropy", "n", "row_units", "out_units", "v_units",
                       "blocks_per_row", "scale", "inverse"]
)  # fmt: skip
def backward_kernel(
    logits, out, tokens, index, rows, dlogp, dentropy, n, row_units, out_units, v_units, blocks_per_row, scale, inverse,
    UNIT: tl.constexpr, BLOCK: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """One program, BLOCK logits of one row, on a flat grid. rows: what forward_kernel wrote."""
    pid = tl.program_id(0)
    i = pid // blocks_per_row
    row = i.to(tl.int64)
    if INDEXED:
        row = tl.load(index + i)
    columns = (pid % blocks_per_row) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < v_units * UNIT
    out += row * out_units * UNIT
    a = tl.load(dlogp + i) * inverse
    b = tl.load(dentropy + i) * inverse
    if (a == 0) & (b == 0):  # written, not read
        tl.store(out + columns, tl.zeros((BLOCK,), out.dtype.element_ty), mask=inside)
    else:
        x = tl.load(logits + row * row_units * UNIT + columns, mask=inside, other=float("-inf")).to(tl.float32)
        entropy = tl.load(rows + n + i)
        z = (x - tl.load(rows + 2 * n + i)) * scale - tl.load(rows + 3 * n + i) * LOG2E
        p = tl.exp2(z)
        gradient = -p * (a + b * (tl.maximum(z, FLOOR) * LN2 + entropy))
        gradient = tl.where(columns == tl.load(tokens + i), gradient + a, gradient)
        tl.store(out + columns, gradient.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["factor", "units"])
def scale_kernel(x, factor, units, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """x *= factor; reads and writes nothing when it is 1."""
    f = tl.load(factor)
    if f != 1:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < units.to(tl.int64) * UNIT
        tl.store(x + at, (tl.load(x + at, mask=inside, other=0.0) * f).to(x.dtype.element_ty), mask=inside)


def _launch(kernel, programs: int, *arguments, **constants) -> None:
    global launches
    if programs:
        kernel[(programs,)](*arguments, **constants, num_warps=blocks.WARPS)
        launches += 1


def _unit(*sizes: int) -> int:
    """What all sizes are multiples of: 16 elements, at least 32 bytes, or 1."""
    return 16 if all(size % 16 == 0 for size in sizes) else 1


def _row_major(logits):
    return logits if logits.stride(1) == 1 else logits.contiguous()


def forward(logits, tokens, temperature: float, *, index=None, weight=None) -> RowSoftmax:
    n, v = len(tokens), logits.shape[1]
    logits = _row_major(logits)
    out = torch.empty(4, n, dtype=torch.float32, device=logits.device)
    unit = _unit(v, logits.stride(0))
    _launch(
        forward_kernel, n, logits, tokens.contiguous(), tokens if index is None else index.contiguous(),
        out if weight is None else weight.contiguous(), out, n, logits.stride(0) // unit, v // unit,
        LOG2E.value / temperature, 1 / temperature, UNIT=unit, LANES=blocks.LANES, WIDTH=16 // logits.element_size(),
        INDEXED=index is not None, WEIGHTED=weight is not None,
    )  # fmt: skip
    return RowSoftmax(*out)


def backward(logits, out, tokens, rows: RowSoftmax, dlogp, dentropy, temperature: float, *, index=None) -> None:
    n, v = len(tokens), logits.shape[1]
    logits = _row_major(logits)
    unit = _unit(v, logits.stride(0), out.stride(0))
    per_row = -(-v // blocks.BLOCK)
    _launch(
        backward_kernel, n * per_row, logits, out, tokens.contiguous(), tokens if index is None else index.contiguous(),
        torch.stack(rows), dlogp.contiguous(), dentropy.contiguous(), n, logits.stride(0) // unit,
        out.stride(0) // unit, v // unit, per_row, LOG2E.value / temperature, 1 / temperature, UNIT=unit,
        BLOCK=blocks.BLOCK, INDEXED=index is not None,
    )  # fmt: skip


def scale_(x, factor) -> None:
    unit = _unit(x.numel())
    _launch(scale_kernel, -(-x.numel() // blocks.SCALE_BLOCK), x, factor, x.numel() // unit, UNIT=unit,
            BLOCK=blocks.SCALE_BLOCK)  # fmt: skip
