"""Draw one token per row, reproducibly, and say with what probability.

    z = logits / temperature        logp, entropy: of softmax(z), all V tokens
    kept: tokens that are not banned, nor a forbidden stop; of those the top_k most probable; of those, with their
          probabilities renormalised, the fewest most probable whose mass reaches top_p (ties: lower ids first)
    token ~ softmax(z) restricted to kept, by inverting the CDF over token ids at uniform(key)
    log_kept = log of the mass softmax(z) gives to kept, so that the token was drawn with probability
               exp(logp - log_kept); exactly 0 when nothing of positive probability is left out

temperature 0 is greedy: the most probable allowed token (lowest id on ties), logp and entropy at temperature 1, and as
kept is that one token, log_kept = logp.

The random number of a token is a hash of (seed, step, prompt, completion, position) and nothing else: not of rank,
batch or slot. The hash is splitmix64's finaliser (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
generators", fig. 5, with Stafford's constants "Mix13"), chained over the fields, in wrapping int64 arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .logprobs import check_matrix, widened
from .objective import describe

GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, odd, as a signed word
MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX_2 = 0x94D049BB133111EB - (1 << 64)
BLOCK = 64  # tokens per block of the two-level CDF
NEAR = 10.0  # exp(-10) still leaves probabilities relative to the banned maximum their float32 digits


@dataclass(frozen=True, eq=False)
class Sampling:
    """How completions are drawn. Bad values raise ValueError."""

    temperature: float = 1.0  # logits / temperature; 0: greedy
    top_p: float = 1.0  # mass of the nucleus, in (0, 1]; 1: off
    top_k: int = 0  # tokens kept; 0: off
    min_new_tokens: int = 0  # no stop token before so many tokens; the caller says for which rows (forbid_stop)
    max_new_tokens: int = 1024  # the caller stops there
    stop_ids: tuple[int, ...] = ()  # tokens that end a completion
    banned: torch.Tensor | None = None  # (V,) bool, True: never drawn; None: no bans

    def __post_init__(self):
        if not (0 <= self.temperature < math.inf):
            raise ValueError(f"Sampling.temperature must be finite and at least 0 (0: greedy), got {self.temperature}")
        if not (0 < self.top_p <= 1):
            raise ValueError(f"Sampling.top_p must be in (0, 1] (1: off), got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"Sampling.top_k must be at least 0 (0: off), got {self.top_k}")
        if not (0 <= self.min_new_tokens <= self.max_new_tokens and self.max_new_tokens >= 1):
            raise ValueError(
                f"Sampling needs 0 <= min_new_tokens <= max_new_tokens and max_new_tokens >= 1, "
                f"got {self.min_new_tokens} and {self.max_new_tokens}"
            )
        if self.banned is not None and (self.banned.ndim != 1 or self.banned.dtype != torch.bool):
            raise ValueError(f"Sampling.banned must be (V,) bool, got {describe(self.banned)}")


def _signed(word: int) -> int:
    """A Python integer modulo 2^64, as the signed word int64 tensors take."""
    return (word + 2**63) % 2**64 - 2**63


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64 (`>>` alone copies the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift(x, 30)) * MIX_1
    x = (x ^ _shift(x, 27)) * MIX_2
    return x ^ _shift(x, 31)


def token_keys(seed: int, step: int, prompt, completion, position) -> torch.Tensor:
    """(N,) int64 keys of N tokens.

    seed, step: integers. prompt (index in the global step), completion (0..G-1), position (0 for the first new token):
    int64 tensors that broadcast to (N,). Each field is mixed in by a bijection of 64-bit words: keys that differ in one
    field only never coincide.
    """
    return position_keys(sequence_keys(seed, step, prompt, completion), position)


def sequence_keys(seed: int, step: int, prompt, completion) -> torch.Tensor:
    """(N,) int64 keys of N completions, from which `position_keys` makes those of their tokens."""
    key = torch.zeros((), dtype=torch.int64)  # a CPU scalar enters operations on any device without a copy
    for field in (_signed(seed), _signed(step), prompt, completion):
        key = _mix((key ^ field) + GAMMA)
    return key


def position_keys(sequences: torch.Tensor, position) -> torch.Tensor:
    """(N,) int64 of `sequence_keys`, positions (N,) int64 -> (N,) int64, the `token_keys` of these tokens."""
    return _mix((sequences ^ position) + GAMMA)


def uniform(keys: torch.Tensor) -> torch.Tensor:
    """(N,) int64 keys -> (N,) float64 in [0, 1): multiples of 2^-53."""
    return _shift(_mix(keys + GAMMA), 11).double() * 2.0**-53


def _filtered(x: torch.Tensor, sampling: Sampling, forbid_stop: torch.Tensor | None) -> torch.Tensor:
    """(N,V) logits -> a copy with every token that may not be drawn at -inf; x itself when all may."""
    v = x.shape[1]
    kept = x
    if sampling.banned is not None:  # adding a row of 0 and -inf is 8x faster than masked_fill on the CPU
        kept = kept + torch.zeros(v, dtype=x.dtype, device=x.device).masked_fill_(sampling.banned, -math.inf)
    if forbid_stop is not None and sampling.stop_ids:
        kept = kept.clone() if kept is x else kept
        for stop in sampling.stop_ids:  # a tensor of them would be a copy to the device
            kept[:, stop].masked_fill_(forbid_stop, -math.inf)
    top_k = sampling.top_k if sampling.top_k < v else 0
    if sampling.temperature == 0 or (top_k == 0 and sampling.top_p == 1):
        return kept
    ranked, order = kept.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ranked[:, top_k:] = -math.inf
    if sampling.top_p < 1:
        mass = torch.softmax(ranked.double() / sampling.temperature, -1)
        ranked.masked_fill_(mass.cumsum(-1) - mass >= sampling.top_p, -math.inf)
    return torch.empty_like(ranked).scatter_(1, order, ranked)


def _block_sums(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,V) -> its blocks (N,B,BLOCK), padded with zeros, and their sums (N,B): inside a block in the dtype of x, which
    is good to 1e-7 of the mass in float32, handed on in float64."""
    n, v = x.shape
    if v % BLOCK:
        x = torch.nn.functional.pad(x, (0, -v % BLOCK))
    blocks = x.reshape(n, (v + BLOCK - 1) // BLOCK, BLOCK)
    return blocks, blocks.sum(-1).double()


def _invert_cdf(blocks: torch.Tensor, mass: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The `_block_sums` of (N,V) unnormalised probabilities, (N,) uniforms in [0, 1) -> (N,1) first index whose CDF
    exceeds u.

    First the block, then the token in it: one float64 cumsum over all of V is the slowest thing a sampler can do on a
    CPU (0.87 ms for 128 x 1024, block sums 0.02 ms; one core of a Zen 4, torch 2.13). As u <= 1 - 2^-53 gives
    u * total < total, and the first entry above a threshold is above its predecessor, neither step can return an index
    of probability 0.
    """
    cdf = mass.cumsum(-1)
    threshold = u[:, None] * cdf[:, -1:]
    block = torch.searchsorted(cdf, threshold, right=True).clamp_max_(cdf.shape[1] - 1)  # beyond: broken logits
    width = mass.gather(1, block)
    # where u stands inside its block, in [0, 1); rounding of the two cdf values may leave it an ulp outside
    inside = ((threshold - cdf.gather(1, block) + width) / width).clamp(0, 1 - 2.0**-53)
    rows = torch.arange(len(u), device=u.device)
    cdf = blocks[rows, block[:, 0]].double().cumsum(-1)
    return block * BLOCK + torch.searchsorted(cdf, inside * cdf[:, -1:], right=True).clamp_max_(BLOCK - 1)


def _check_drawable(top: torch.Tensor, top_kept: torch.Tensor) -> None:
    if top.is_cuda:  # would wait for the device at every token; such rows get NaN, see `sample_tokens`
        return
    good = torch.isfinite(top) & torch.isfinite(top_kept)
    if bool(good.all()):  # sync
        return
    row = int((~good).nonzero()[0])
    if torch.isfinite(top[row]) or top[row] == -math.inf:
        raise ValueError(f"row {row}: no token is left to draw; every one is banned, a forbidden stop, or at -inf")
    raise ValueError(f"row {row}: the logits hold NaN or +inf")


@torch.no_grad()
def sample_tokens_ref(logits, keys, sampling: Sampling, *, forbid_stop=None):
    """`sample_tokens` in plain PyTorch."""
    x, temperature = widened(logits), sampling.temperature or 1.0
    kept = _filtered(x, sampling, forbid_stop)
    top = x.amax(-1, keepdim=True)
    top_kept = top if kept is x else kept.amax(-1, keepdim=True)
    _check_drawable(top.squeeze(1), top_kept.squeeze(1))
    # in place wherever it can be: on the CPU fresh pages for a temporary cost more than the arithmetic in it
    shifted = (x - top).div_(temperature)
    p = shifted.exp()
    blocks, block_mass = _block_sums(p)
    mass = block_mass.sum(-1, keepdim=True)
    # exp is 0 below -104 in float32 and below -746 in float64: the clamp changes no product and avoids 0 * -inf
    weighted = _block_sums(shifted.clamp_min_(-1e4).mul_(p))[1].sum(-1, keepdim=True)
    entropy = mass.log() - weighted / mass
    log_kept = torch.zeros_like(mass)
    if sampling.temperature == 0:
        token = kept.argmax(-1, keepdim=True)
    else:
        if kept is not x:
            if not x.is_cuda and bool((top - top_kept <= NEAR * temperature).all()):  # spares the second exp
                # a comparison written as a number and a product: an eighth of the time of masked_fill_ on the CPU
                kept, top_kept = p.mul_(torch.gt(kept, -math.inf, out=torch.empty_like(p))), top
            else:
                kept = kept.sub_(top_kept).div_(temperature).exp_()
            blocks, block_mass = _block_sums(kept)
            # both masses are summed in the same order: with nothing left out they are the same number
            log_kept = ((block_mass.sum(-1, keepdim=True) / mass).log() + (top_kept - top) / temperature).clamp_max_(0)
        token = _invert_cdf(blocks, block_mass, uniform(keys)).clamp_max_(x.shape[1] - 1)
    logp = (x.gather(1, token) - top) / temperature - mass.log()
    if sampling.temperature == 0:
        log_kept = logp
    return token.squeeze(1), *(v.squeeze(1).to(x.dtype) for v in (logp, entropy, log_kept))


def sample_tokens_triton(logits, keys, sampling: Sampling, *, forbid_stop=None):
    """`sample_tokens` without top-p and top-k through the kernel, also on CPU tensors under Triton's interpreter."""
    from . import sample_triton

    return sample_triton.launch(logits, keys, sampling, forbid_stop)


def sample_tokens(logits, keys, sampling: Sampling, *, forbid_stop=None):
    """Draw one token per row.

    logits (N, V) floating point; keys (N,) int64 from `token_keys`; forbid_stop (N,) bool, True for rows that have not
    reached sampling.min_new_tokens, or None for no row. Returns tokens (N,) int64 and logp, entropy, log_kept (N,) in
    nats, float32 (float64 for float64 logits). Raises ValueError for wrong shapes or dtypes, and on the CPU for NaN or
    +inf logits and when a row has no token left to draw; on a GPU, where looking would stall every token, such a row
    gets NaN, for the caller to find when it reads results back.
    """
    check_matrix("logits", logits)
    n, v = logits.shape
    if not isinstance(keys, torch.Tensor) or keys.shape != (n,) or keys.dtype != torch.int64:
        raise ValueError(f"keys must be ({n},) int64, one per row, got {describe(keys)}")
    if sampling.banned is not None and sampling.banned.shape != (v,):
        raise ValueError(f"Sampling.banned must be ({v},) bool for {v} logits, got {tuple(sampling.banned.shape)}")
    if any(not 0 <= i < v for i in sampling.stop_ids):
        raise ValueError(f"Sampling.stop_ids must be in [0, {v}), got {sampling.stop_ids}")
    if forbid_stop is not None and (forbid_stop.shape != (n,) or forbid_stop.dtype != torch.bool):
        raise ValueError(f"forbid_stop must be ({n},) bool, got {describe(forbid_stop)}")
    plain = sampling.top_p == 1 and not 0 < sampling.top_k < v and logits.dtype != torch.float64
    fn = sample_tokens_triton if logits.is_cuda and plain else sample_tokens_ref
    return fn(logits, keys, sampling, forbid_stop=forbid_stop)
