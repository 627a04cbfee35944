"""The Triton kernel of sample.py: one program a row, two passes over its logits, the second from the L2 cache.

Pass 1 takes the masses of all tokens and of those that are kept, and the entropy; pass 2 walks the CDF of the kept ones
until it exceeds the row's uniform. Sums inside a block are float32, over blocks float64.
"""

from __future__ import annotations

import weakref

import torch
import triton
import triton.language as tl

BLOCK = 4096
FLOOR = tl.constexpr(-1e30)  # below every logit; finite, so that rescaling an empty sum gives 0
_classes: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # Sampling -> (V,) int8, 1: banned, 2: stop


@triton.jit
def _mix(x):  # sample.py says whose hash
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _load(x_ptr, class_ptr, at, vocab, forbid):
    """Logits, and the same with what may not be drawn at -inf."""
    inside = at < vocab
    z = tl.load(x_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
    kind = tl.load(class_ptr + at, mask=inside, other=1)
    out = (kind == 1) | ((kind == 2) & (forbid != 0))
    return z, tl.where(out, float("-inf"), z)


@triton.jit
def _sample(x_ptr, key_ptr, class_ptr, forbid_ptr, token_ptr, logp_ptr, entropy_ptr, kept_ptr, vocab, stride, inverse,
            GREEDY: tl.constexpr, FORBID: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride
    forbid = 0
    if FORBID:
        forbid = tl.load(forbid_ptr + row).to(tl.int32)
    lane = tl.arange(0, BLOCK)
    mass, weighted, mass_kept = (
        tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    )  # fmt: skip
    top, top_kept = tl.full((), FLOOR, tl.float32), tl.full((), FLOOR, tl.float32)
    token = tl.full((), 0, tl.int32)
    for start in range(0, vocab, BLOCK):
        z, kept = _load(x_ptr, class_ptr, start + lane, vocab, forbid)
        new_top = tl.maximum(top, tl.max(z, 0))
        shifted = (z - new_top) * inverse
        e = tl.exp(shifted)
        fall = (top - new_top) * inverse
        shrink = tl.exp(fall).to(tl.float64)
        weighted = (weighted + fall.to(tl.float64) * mass) * shrink
        weighted += tl.sum(tl.where(e > 0, e * shifted, 0.0), 0).to(tl.float64)
        mass = mass * shrink + tl.sum(e, 0).to(tl.float64)
        top = new_top
        best = tl.max(kept, 0)
        if GREEDY:
            token = tl.where(best > top_kept, start + tl.argmax(kept, 0), token).to(tl.int32)
        new_top = tl.maximum(top_kept, best)
        mass_kept = mass_kept * tl.exp((top_kept - new_top) * inverse).to(tl.float64)
        mass_kept += tl.sum(tl.exp((kept - new_top) * inverse), 0).to(tl.float64)
        top_kept = new_top
    log_mass = tl.log(mass.to(tl.float32))
    entropy = log_mass - (weighted / mass).to(tl.float32)
    log_kept = tl.minimum(tl.log((mass_kept / mass).to(tl.float32)) + (top_kept - top) * inverse, 0.0)
    if not GREEDY:
        word = (tl.load(key_ptr + row) + (-7046029254386353131)).to(tl.uint64, bitcast=True)  # GAMMA, signed
        u = (_mix(word) >> 11).to(tl.float64) * (1.0 / 9007199254740992.0)
        wanted, below, found = u * mass_kept, tl.full((), 0.0, tl.float64), tl.full((), 0, tl.int32)
        for start in range(0, vocab, BLOCK):
            if found == 0:
                z, kept = _load(x_ptr, class_ptr, start + lane, vocab, forbid)
                p = tl.exp((kept - top_kept) * inverse)
                total = tl.sum(p, 0).to(tl.float64)
                if total > 0:  # should rounding leave the whole CDF short of `wanted`, the last token that may be drawn
                    cdf = below + tl.cumsum(p, 0).to(tl.float64)
                    over = (cdf > wanted) & (p > 0)
                    first = tl.min(tl.where(over, lane, BLOCK), 0)
                    last = tl.max(tl.where(p > 0, lane, 0), 0)
                    found = (first < BLOCK).to(tl.int32)
                    token = (start + tl.where(first < BLOCK, first, last)).to(tl.int32)
                below += total
    logp = (tl.load(x_ptr + token).to(tl.float32) - top) * inverse - log_mass
    if GREEDY:
        log_kept = logp
    drawable = (mass_kept > 0) & (tl.abs(top) < float("inf")) & (mass == mass)
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(logp_ptr + row, tl.where(drawable, logp, float("nan")))
    tl.store(entropy_ptr + row, tl.where(drawable, entropy, float("nan")))
    tl.store(kept_ptr + row, tl.where(drawable, log_kept, float("nan")))


def classes(sampling, vocab: int, device) -> torch.Tensor:
    """(V,) int8: 0 may be drawn, 1 may not, 2 stops. Kept with the Sampling: a captured graph reads it."""
    table = _classes.get(sampling)
    if table is None or table.shape[0] != vocab or table.device != device:
        table = torch.zeros(vocab, dtype=torch.int8)
        table[list(sampling.stop_ids)] = 2
        if sampling.banned is not None:
            table[sampling.banned.cpu()] = 1
        table = _classes[sampling] = table.to(device)
    return table


def launch(logits, keys, sampling, forbid_stop):
    """`sample_tokens` without top-p and top-k; a row from which nothing can be drawn gets NaN."""
    n, v = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    table = classes(sampling, v, logits.device)
    token = torch.empty(n, dtype=torch.int64, device=logits.device)
    logp, entropy, log_kept = torch.empty(3, n, dtype=torch.float32, device=logits.device)
    _sample[(n,)](
        logits, keys.contiguous(), table, table if forbid_stop is None else forbid_stop.contiguous(), token, logp, entropy,
        log_kept, v, logits.stride(0), 1.0 / (sampling.temperature or 1.0), GREEDY=sampling.temperature == 0,
        FORBID=forbid_stop is not None, BLOCK=min(BLOCK, max(16, triton.next_power_of_2(v))), num_warps=8,
    )  # fmt: skip
    return token, logp, entropy, log_kept
