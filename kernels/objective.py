"""The GRPO objective of one token, its exact derivatives, and the rows it is applied to.

With log-probs and entropy H of the current policy, and every weight, normaliser and mask inside `weight`:

    loss_i = weight_i * ( -corr_i * min(r_i A_i, clip(r_i, 1 - clip_low, 1 + clip_high) A_i)
                          + kl_coef * KL_i - entropy_coef * H_i )                      loss = sum over i of loss_i
    r_i    = exp(logp - logp_start)                                  PPO's ratio (Schulman et al. 2017, eq. 6 and 7)
    corr_i = min(exp(logp_start - logp_rollout + log_kept), rollout_cap)    truncated importance weight, no gradient
    KL_i   = exp(d) - d - 1 (k3) or d^2 / 2 (k2), d = logp_ref - logp   (Schulman 2020, "Approximating KL divergence")

The asymmetric clip range is DAPO's (Yu et al. 2025, eq. 10), the group advantage and the KL inside the loss are GRPO's
(Shao et al. 2024, eq. 3 and 4). Every difference of log-probs is clamped to +-20 before it is exponentiated, and has no
gradient beyond. The sampler drew from p / kept, hence `+ log_kept`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch

MAX_LOG_RATIO = 20.0  # e^20 = 5e8: far beyond any use of a ratio, far below float32's overflow at e^88


@dataclass(frozen=True)
class Rows:
    """N tokens to be learnt from, one loss row each. Rows of weight 0 are masked: whatever else they hold is ignored.

    Wrong shapes, dtypes or devices raise ValueError naming the field. Values are not looked at (no device sync).
    """

    tokens: torch.Tensor  # (N,) int64, the token that was drawn
    advantage: torch.Tensor  # (N,) float32 like all below (float64 is taken too)
    weight: torch.Tensor  # (N,) aggregation and global normaliser; 0 masks the row
    logp_rollout: torch.Tensor  # (N,) the sampler's log-prob, full softmax at the sampling temperature
    sequence: torch.Tensor  # (N,) int64, which completion the token belongs to
    logp_start: torch.Tensor | None = None  # (N,) trainer's, before the batch's first update; None: the current logp
    logp_ref: torch.Tensor | None = None  # (N,) reference policy's; None: no KL
    log_kept: torch.Tensor | None = None  # (N,) log of the mass the sampler drew from; None: all of it, 0

    def __post_init__(self):
        if not isinstance(self.tokens, torch.Tensor) or self.tokens.ndim != 1:
            raise ValueError(f"Rows.tokens must be a one-dimensional tensor, got {describe(self.tokens)}")
        for f in fields(self):
            value, ints = getattr(self, f.name), f.name in ("tokens", "sequence")
            if value is None and f.default is None:
                continue
            wanted = (torch.int64,) if ints else (torch.float32, torch.float64)
            if not isinstance(value, torch.Tensor) or value.shape != self.tokens.shape or value.dtype not in wanted:
                kind = "int64" if ints else "float32"
                raise ValueError(f"Rows.{f.name} must be ({len(self)},) {kind} like tokens, got {describe(value)}")
            if value.device != self.tokens.device:
                raise ValueError(f"Rows.{f.name} is on {value.device}, tokens on {self.tokens.device}")

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def _map(self, change) -> Rows:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Rows(**{k: None if v is None else change(v) for k, v in values.items()})

    def to(self, device) -> Rows:
        """The same rows on `device`; copies from pinned memory do not wait."""
        return self._map(lambda v: v.to(device, non_blocking=True))

    def take(self, index: torch.Tensor) -> Rows:
        """The rows of an index: (M,) int64 or (N,) bool."""
        return self._map(lambda v: v[index])


@dataclass(frozen=True)
class Objective:
    """Coefficients of the loss. Bad values raise ValueError."""

    clip_low: float = 0.2  # ratio below 1 - clip_low is clipped; inf: no clipping on that side
    clip_high: float = 0.28  # ratio above 1 + clip_high is clipped; inf: no clipping on that side
    kl_coef: float = 0.0  # 0: no KL term, and no need of logp_ref
    kl: str = "k3"  # estimator in the loss: k3 or k2 (the reported kl is always k3)
    entropy_coef: float = 0.0  # positive favours entropy
    rollout_cap: float = 2.0  # cap of the rollout correction; inf: no cap; 0: no correction, weight 1
    temperature: float = 1.0  # logits / temperature, the sampler's; > 0

    def __post_init__(self):
        if self.kl == "k1":
            raise ValueError(
                'Objective.kl="k1" is no loss term: the gradient of logp - logp_ref is that of logp, which is zero in '
                "expectation, so it would add noise and no pull. Use k3 or k2 here, or subtract k1 from the reward."
            )
        if self.kl not in ("k2", "k3"):
            raise ValueError(f'Objective.kl must be "k3" or "k2", got {self.kl!r}')
        for name in ("clip_low", "clip_high", "kl_coef", "rollout_cap"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"Objective.{name} must be at least 0, got {getattr(self, name)}")
        if not (0 < self.temperature < math.inf):
            raise ValueError(f"Objective.temperature must be positive and finite, got {self.temperature}")
        if not (math.isfinite(self.kl_coef) and math.isfinite(self.entropy_coef)):
            raise ValueError(f"Objective: kl_coef={self.kl_coef}, entropy_coef={self.entropy_coef} must be finite")


@dataclass(frozen=True)
class RowStats:
    """What happened in each row, for the log: detached float32 (N,). Rows of weight 0 hold 0 in every field."""

    logp: torch.Tensor  # nats, at the objective's temperature
    entropy: torch.Tensor  # nats
    kl: torch.Tensor  # k3 estimate of KL(policy || reference), nats; 0 without a reference
    ratio: torch.Tensor
    clipped: torch.Tensor  # 1 where clipping took the policy gradient away, else 0


def describe(value) -> str:
    """Shape and dtype of a tensor for an error message; of anything else its type."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def _log_ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a - b, before clamping. Two impossible tokens (-inf, -inf) agree: 0. NaN stays, so that a broken step shows."""
    return torch.where(torch.isinf(a) & (a == b), torch.zeros_like(a), a - b)


def _clamped(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _correction(start: torch.Tensor, rows: Rows, cap: float) -> torch.Tensor:
    """(N,) truncated importance weight of the trainer's starting policy against what the sampler drew from."""
    if cap == 0:
        return torch.ones_like(start)
    log_weight = _log_ratio(start, rows.logp_rollout.to(start.dtype))
    if rows.log_kept is not None:
        log_weight = log_weight + rows.log_kept.to(start.dtype)
    return _clamped(log_weight).exp().clamp(max=cap).detach()


def row_terms(logp: torch.Tensor, entropy: torch.Tensor, rows: Rows, objective: Objective):
    """The loss of each row as autograd can differentiate it.

    logp, entropy: (N,) of the current policy at the objective's temperature, float32 or float64, with or without
    gradient. Returns (loss (N,) in their dtype, RowStats). Raises ValueError when a KL coefficient meets no logp_ref.
    """
    if objective.kl_coef and rows.logp_ref is None:
        raise ValueError(f"Objective.kl_coef={objective.kl_coef} needs Rows.logp_ref, which is None")
    live = rows.weight != 0

    def clean(x):  # a masked row may hold anything, NaN too; zeros keep it out of values and gradients alike
        return None if x is None else torch.where(live, x.to(logp.dtype), 0.0)

    floats = ("advantage", "weight", "logp_rollout", "logp_start", "logp_ref", "log_kept")
    rows = replace(rows, **{name: clean(getattr(rows, name)) for name in floats})
    logp, entropy, advantage = clean(logp), clean(entropy), rows.advantage
    start = logp.detach() if rows.logp_start is None else rows.logp_start
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    ratio = _clamped(_log_ratio(logp, start)).exp()
    policy = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    loss = -_correction(start, rows, objective.rollout_cap) * policy - objective.entropy_coef * entropy
    k3 = torch.zeros_like(logp)
    if rows.logp_ref is not None:
        d = _clamped(_log_ratio(rows.logp_ref, logp))
        k3 = torch.expm1(d) - d
        loss = loss + objective.kl_coef * (k3 if objective.kl == "k3" else d * d / 2)
    clipped = ((advantage > 0) & (ratio > high)) | ((advantage < 0) & (ratio < low))
    stats = RowStats(*(x.detach().float() for x in (logp, entropy, k3, clean(ratio), clipped)))
    return rows.weight * loss, stats


@torch.no_grad()
def row_loss(logp: torch.Tensor, entropy: torch.Tensor, rows: Rows, objective: Objective):
    """The loss of each row and its derivatives: all a heavy kernel needs to know of the objective.

    logp, entropy: (N,) float32 or float64. Returns (loss, dloss/dlogp, dloss/dentropy, RowStats), the first three (N,)
    in that dtype. With t = logp - logp_start and d = logp_ref - logp:

        dlogp    = weight * ( -corr A r [|t| <= 20 and not clipped] - kl_coef * (e^d - 1 or d) [|d| <= 20] )
        dentropy = -weight * entropy_coef

    A ratio exactly on the clip bound is not clipped; an impossible token (logp = -inf) has no policy gradient; rows of
    weight 0 give zeros. Raises ValueError like `row_terms`.
    """
    loss, stats = row_terms(logp, entropy, rows, objective)
    weight = rows.weight.to(logp.dtype)
    t = torch.zeros_like(logp)
    start = logp
    if rows.logp_start is not None:
        start = rows.logp_start.to(logp.dtype)
        t = _log_ratio(logp, start)
    # NaN is not still, so that a broken step shows
    still = (t.abs() > MAX_LOG_RATIO) | torch.isinf(logp) | (stats.clipped != 0)
    corr = _correction(start, rows, objective.rollout_cap)
    dlogp = torch.where(still, 0.0, -corr * rows.advantage.to(logp.dtype) * _clamped(t).exp())
    if rows.logp_ref is not None:
        d = _log_ratio(rows.logp_ref.to(logp.dtype), logp)
        slope = torch.expm1(d) if objective.kl == "k3" else d
        dlogp = dlogp - objective.kl_coef * torch.where(d.abs() > MAX_LOG_RATIO, 0.0, slope)
    live = weight != 0
    dlogp = torch.where(live, weight * dlogp, 0.0)
    dentropy = torch.where(live, -objective.entropy_coef * weight, 0.0)
    return loss, dlogp, dentropy, stats
