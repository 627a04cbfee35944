"""What a row of logits is needed for, in PyTorch: the row operations of CPU tensors and of float64.

`softmax_triton` holds the same three functions for CUDA tensors; the formulas stand in `logprobs.py`. Rows are worked on
a tile at a time, so that the temporaries stay in a core's cache whatever V is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

TILE = 2**16  # logits: temporaries of 256 KiB in float32
FLOOR = -1e4  # exp of it is 0 in float32 and float64; the clamp changes no product and avoids 0 * -inf


class RowSoftmax(NamedTuple):
    """Statistics of N rows at a temperature, each (N,), float32 (float64 of float64 logits)."""

    logp: torch.Tensor  # of the row's token, nats
    entropy: torch.Tensor  # nats
    top: torch.Tensor  # largest logit, before the temperature. logsumexp = top / temperature + log_sum, kept in two
    log_sum: torch.Tensor  # parts: their sum would lose a row of large logits its small differences


def widened(x: torch.Tensor) -> torch.Tensor:
    """x in float32, or in float64 if it is that."""
    return x if x.dtype == torch.float64 else x.float()


def _tiles(n: int, v: int):
    step = max(1, TILE // v)
    return (slice(start, start + step) for start in range(0, n, step))


def _shifted(x, part, index, top, temperature, dtype):
    """(logits - top) / temperature of the rows of a tile, in a tensor of its own."""
    z = (x[part] if index is None else x[index[part]]).to(dtype) - top[part, None]
    return z if temperature == 1 else z.div_(temperature)


def forward(logits, tokens, temperature: float, *, index=None, weight=None) -> RowSoftmax:
    """Statistics of logits (T, V) at tokens (N,); row i of the result is row index[i] of the logits (index None: i).

    Rows of weight 0 (None: no such rows) are not read and get zeros.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    n, v = len(tokens), logits.shape[1]
    if weight is not None and not bool(weight.all()):
        live = weight.nonzero().squeeze(1)
        some = forward(logits, tokens[live], temperature, index=live if index is None else index[live])
        return RowSoftmax(*(x.new_zeros(n).index_copy_(0, live, x) for x in some))
    logp, entropy, top, log_sum = torch.empty(4, n, dtype=dtype, device=logits.device)
    for part in _tiles(n, v):
        top[part] = (logits[part] if index is None else logits[index[part]]).amax(1)
        z = _shifted(logits, part, index, top, temperature, dtype)
        logp[part] = z.gather(1, tokens[part, None]).squeeze(1)
        e = z.exp()
        total = e.sum(1)
        log_sum[part] = total.log()
        entropy[part] = z.clamp_min_(FLOOR).mul_(e).sum(1).div_(total)
    return RowSoftmax(logp.sub_(log_sum), torch.sub(log_sum, entropy, out=entropy), top, log_sum)


def backward(logits, out, tokens, rows: RowSoftmax, dlogp, dentropy, temperature: float, *, index=None) -> None:
    """Writes the gradient of logits for gradients dlogp, dentropy (N,) into the same rows of `out`, which may be logits.

    Rows whose two coefficients are 0 get zeros and are not read.
    """
    active = (dlogp != 0) | (dentropy != 0)
    if not bool(active.all()):
        idle = (~active).nonzero().squeeze(1)
        out.index_fill_(0, idle if index is None else index[idle], 0)
        active = active.nonzero().squeeze(1)
        rows, index = RowSoftmax(*(x[active] for x in rows)), active if index is None else index[active]
        tokens, dlogp, dentropy = tokens[active], dlogp[active], dentropy[active]
    a, b = dlogp / temperature, dentropy / temperature
    curved = bool(b.any())
    for part in _tiles(len(tokens), logits.shape[1]):
        z = _shifted(logits, part, index, rows.top, temperature, rows.top.dtype).sub_(rows.log_sum[part, None])
        straight = index is None and out.dtype == z.dtype
        p = torch.exp(z, out=out[part] if straight else None)
        if curved:
            z.clamp_min_(FLOOR).add_(rows.entropy[part, None]).mul_(-b[part, None]).sub_(a[part, None])
        p.mul_(z if curved else -a[part, None])
        p.scatter_add_(1, tokens[part, None], a[part, None])
        if not straight and index is None:
            out[part] = p
        elif not straight:
            out[index[part]] = p.to(out.dtype)


def scale_(x, factor) -> None:
    """x *= factor (a scalar tensor); free when it is 1."""
    if factor != 1:
        x.mul_(factor)
