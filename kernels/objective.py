"""The GRPO objective of one token, its exact derivatives, and the rows it is applied to.

With log-probs and entropy H of the current policy, and every weight, normaliser and mask inside `weight`:

    loss_i = weight_i * ( -corr_i * gain_i + kl_coef * KL_i - entropy_coef * H_i )        loss = sum over i of loss_i
    r_i    = exp(logp - logp_start)                                  PPO's ratio (Schulman et al. 2017, eq. 6 and 7)
    corr_i = min(exp(logp_start - logp_rollout + log_kept), rollout_cap)    truncated importance weight, no gradient
    KL_i   = exp(d) - d - 1 (k3) or d^2 / 2 (k2), d = logp_ref - logp   (Schulman 2020, "Approximating KL divergence")

gain_i is, with clip(r) = r held within [1 - clip_low, 1 + clip_high]:

    clip    min(r_i A_i, clip(r_i) A_i)          the bounds apart: DAPO's (Yu et al. 2025, arXiv 2503.14476, eq. 10)
            max(that, dual_clip A_i) for A_i < 0                  dual-clip PPO (Ye et al. 2020, arXiv 1912.09729)
    cispo   stop_gradient(clip(r_i)) A_i logp_i                         (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5)
    sapo    4/tau sigmoid(tau (r_i - 1)) A_i, tau = sapo_tau_pos where A_i > 0, else sapo_tau_neg
                                                        (Gao et al. 2025, arXiv 2511.20347, the gate f_{i,t} of SAPO)

With ratio="sequence", every r_i above is the sequence's: exp(mean over its live rows of logp - logp_start), GSPO (Zheng
et al. 2025, arXiv 2507.18071, eq. 5 and 7). Each row still has its own weight, corr and advantage; its ratio moves with
every token of the sequence, so that all rows of a sequence must be given together, in any order.

The group advantage and the KL inside the loss are GRPO's (Shao et al. 2024, eq. 3 and 4). Every difference of log-probs
is clamped to +-20 before it is exponentiated, and has no gradient beyond. The sampler drew from p / kept, hence
`+ log_kept`.
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

    loss: str = "clip"  # clip, cispo or sapo
    ratio: str = "token"  # token, or sequence (GSPO; with clip only)
    clip_low: float = 0.2  # ratio below 1 - clip_low is clipped; inf: no clipping on that side; sapo has no bounds
    clip_high: float = 0.28  # ratio above 1 + clip_high is clipped; inf: no clipping on that side
    dual_clip: float = math.inf  # with clip: for A < 0, ratio above this is clipped; > 1, inf: not
    sapo_tau_pos: float = 1.0  # temperatures of SAPO's gates for A > 0 and A <= 0; > 0
    sapo_tau_neg: float = 1.05
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
        if self.loss not in ("clip", "cispo", "sapo"):
            raise ValueError(f'Objective.loss must be "clip", "cispo" or "sapo", got {self.loss!r}')
        if self.ratio not in ("token", "sequence"):
            raise ValueError(f'Objective.ratio must be "token" or "sequence", got {self.ratio!r}')
        if self.loss != "clip" and self.ratio == "sequence":
            raise ValueError(f'Objective.ratio="sequence" (GSPO) needs loss="clip"; {self.loss} is of single tokens')
        if not self.dual_clip > 1:
            raise ValueError(f"Objective.dual_clip must be above 1, got {self.dual_clip}")
        if self.loss != "clip" and self.dual_clip != math.inf:
            raise ValueError(f'Objective.dual_clip={self.dual_clip} needs loss="clip", not {self.loss!r}')
        for name in ("clip_low", "clip_high", "kl_coef", "rollout_cap"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"Objective.{name} must be at least 0, got {getattr(self, name)}")
        for name in ("temperature", "sapo_tau_pos", "sapo_tau_neg"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"Objective.{name} must be positive and finite, got {getattr(self, name)}")
        if not (math.isfinite(self.kl_coef) and math.isfinite(self.entropy_coef)):
            raise ValueError(f"Objective: kl_coef={self.kl_coef}, entropy_coef={self.entropy_coef} must be finite")

    @property
    def sequence_level(self) -> bool:
        """Whether a row's loss depends on the other rows of its sequence, so that they must be given together."""
        return self.ratio == "sequence"


@dataclass(frozen=True)
class RowStats:
    """What happened in each row, for the log: detached float32 (N,). Rows of weight 0 hold 0 in every field."""

    logp: torch.Tensor  # nats, at the objective's temperature
    entropy: torch.Tensor  # nats
    kl: torch.Tensor  # k3 estimate of KL(policy || reference), nats; 0 without a reference
    ratio: torch.Tensor  # with ratio="sequence" the sequence's
    clipped: torch.Tensor  # 1 where clipping took the policy gradient away (cispo: made it smaller or larger), else 0


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


def _segments(sequence: torch.Tensor) -> torch.Tensor:
    """(N,) int64, any values -> (N,) numbers from 0 below N, one for each value. Knows no sizes: no device sync."""
    ordered, order = sequence.sort(stable=True)
    number = (ordered[1:] != ordered[:-1]).cumsum(0)
    return torch.zeros_like(sequence).index_copy(0, order[1:], number)  # the first in order keeps 0


def _sequence_sum(x: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """(N,) -> (N,): each row's value summed over the rows of its sequence."""
    return torch.zeros_like(x).index_add(0, segments, x)[segments]


def _tau(advantage: torch.Tensor, objective: Objective) -> torch.Tensor:
    return torch.where(advantage > 0, torch.full_like(advantage, objective.sapo_tau_pos), objective.sapo_tau_neg)


def _gain(ratio: torch.Tensor, logp: torch.Tensor, advantage: torch.Tensor, objective: Objective):
    """What a row's policy term wants more of, (N,), and where clipping changed its gradient, (N,) bool."""
    if objective.loss == "sapo":
        tau = _tau(advantage, objective)
        return torch.sigmoid(tau * (ratio - 1)) * (4 / tau) * advantage, torch.zeros_like(ratio, dtype=torch.bool)
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    held = ratio.clamp(low, high)
    if objective.loss == "cispo":
        possible = torch.where(torch.isinf(logp), 0.0, logp)
        return held.detach() * advantage * possible, (ratio < low) | (ratio > high)
    gain = torch.minimum(ratio * advantage, held * advantage)
    clipped = ((advantage > 0) & (ratio > high)) | ((advantage < 0) & (ratio < low))
    if objective.dual_clip != math.inf:
        beyond = (advantage < 0) & (ratio > objective.dual_clip)
        gain, clipped = torch.where(beyond, objective.dual_clip * advantage, gain), clipped | beyond
    return gain, clipped


def _slope(ratio: torch.Tensor, advantage: torch.Tensor, objective: Objective) -> torch.Tensor:
    """Derivative of the gain with respect to the log-ratio (cispo: to logp) where nothing is clipped, (N,)."""
    if objective.loss == "cispo":
        return ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high) * advantage
    if objective.loss == "sapo":
        x = _tau(advantage, objective) * (ratio - 1)
        return 4 * torch.sigmoid(x) * torch.sigmoid(-x) * ratio * advantage
    return ratio * advantage


def _clean(logp: torch.Tensor, entropy: torch.Tensor, rows: Rows):
    """(logp, entropy, rows) in the dtype of logp, with 0 in whatever a masked row holds: it may be NaN, and a zero keeps
    it out of values and gradients alike."""
    live = rows.weight != 0

    def clean(x):
        return None if x is None else torch.where(live, x.to(logp.dtype), 0.0)

    floats = ("advantage", "weight", "logp_rollout", "logp_start", "logp_ref", "log_kept")
    return clean(logp), clean(entropy), replace(rows, **{name: clean(getattr(rows, name)) for name in floats})


def _evaluate(logp: torch.Tensor, entropy: torch.Tensor, rows: Rows, objective: Objective):
    """Cleaned rows -> (loss, RowStats, parts): the parts of a row that `row_loss` needs for the derivatives."""
    if objective.kl_coef and rows.logp_ref is None:
        raise ValueError(f"Objective.kl_coef={objective.kl_coef} needs Rows.logp_ref, which is None")
    live = rows.weight != 0
    start = logp.detach() if rows.logp_start is None else rows.logp_start
    t, segments, length = _log_ratio(logp, start), None, None
    if objective.sequence_level:
        segments = _segments(rows.sequence)
        length = _sequence_sum(live.to(t.dtype), segments).clamp(min=1)
        t = _sequence_sum(t, segments) / length
    ratio, corr = _clamped(t).exp(), _correction(start, rows, objective.rollout_cap)
    gain, clipped = _gain(ratio, logp, rows.advantage, objective)
    loss, k3, d = -corr * gain - objective.entropy_coef * entropy, torch.zeros_like(logp), None
    if rows.logp_ref is not None:
        d = _log_ratio(rows.logp_ref, logp)
        near = _clamped(d)
        k3 = torch.expm1(near) - near
        loss = loss + objective.kl_coef * (k3 if objective.kl == "k3" else near * near / 2)
    ratio_of_row = torch.where(live, ratio, 0.0)
    stats = RowStats(*(x.detach().float() for x in (logp, entropy, k3, ratio_of_row, clipped & live)))
    return rows.weight * loss, stats, (t, ratio, clipped, corr, d, segments, length)


def row_terms(logp: torch.Tensor, entropy: torch.Tensor, rows: Rows, objective: Objective):
    """The loss of each row as autograd can differentiate it.

    logp, entropy: (N,) of the current policy at the objective's temperature, float32 or float64, with or without
    gradient. Returns (loss (N,) in their dtype, RowStats). Raises ValueError when a KL coefficient meets no logp_ref.
    """
    return _evaluate(*_clean(logp, entropy, rows), objective)[:2]


@torch.no_grad()
def row_loss(logp: torch.Tensor, entropy: torch.Tensor, rows: Rows, objective: Objective):
    """The loss of each row and its derivatives: all a heavy kernel needs to know of the objective.

    logp, entropy: (N,) float32 or float64. Returns (loss, dloss/dlogp, dloss/dentropy, RowStats), the first three (N,)
    in that dtype; never waits for a device. With t = logp - logp_start and d = logp_ref - logp:

        g        = -weight corr A (r | clip(r) | 4 sigmoid(x) sigmoid(-x) r, x = tau (r - 1))    clip | cispo | sapo
                   clip and sapo: 0 where clipped and where |t| > 20
        dlogp    = g - weight kl_coef (e^d - 1 or d) [|d| <= 20]
        dentropy = -weight * entropy_coef

    With ratio="sequence", t and r are the sequence's and g is its mean over the sequence's live rows: every token moves
    the ratio by 1/|o|, and all rows with it. A ratio exactly on a clip bound is not clipped; an impossible token
    (logp = -inf) has no policy gradient; rows of weight 0 give zeros. Raises ValueError like `row_terms`.
    """
    logp, entropy, rows = _clean(logp, entropy, rows)
    loss, stats, (t, ratio, clipped, corr, d, segments, length) = _evaluate(logp, entropy, rows, objective)
    weight = rows.weight
    dlogp = -weight * corr * _slope(ratio, rows.advantage, objective)
    if objective.loss != "cispo":  # whose factor is a constant, clipped or not
        dlogp = torch.where(clipped | (t.abs() > MAX_LOG_RATIO), 0.0, dlogp)  # NaN passes, so that a broken step shows
    if segments is not None:
        dlogp = torch.where(weight != 0, _sequence_sum(dlogp, segments) / length, 0.0)
    dlogp = torch.where(torch.isinf(logp), 0.0, dlogp)
    if d is not None:
        slope = torch.expm1(d) if objective.kl == "k3" else d
        dlogp = dlogp - weight * objective.kl_coef * torch.where(d.abs() > MAX_LOG_RATIO, 0.0, slope)
    return loss, dlogp, -objective.entropy_coef * weight, stats
