"""Group-relative advantages: the "GR" in GRPO (DeepSeekMath, arXiv 2402.03300, §4.1)."""

from __future__ import annotations

import numpy as np

FLAT = 1e-6  # a group whose rewards span no more than this carries no signal
EPS = 1e-4


def flat_groups(rewards: np.ndarray) -> np.ndarray:
    """(P, G) -> (P,) bool: groups whose rewards are all equal (max - min <= 1e-6)."""
    rewards = np.asarray(rewards, np.float64)
    return rewards.max(1, initial=-np.inf) - rewards.min(1, initial=np.inf) <= FLAT


def group_advantages(rewards: np.ndarray, scale: str = "group") -> np.ndarray:
    """A = (r - mean) / (std + 1e-4) within each group, std with n-1, in float64; a flat group gives exactly 0.

    rewards: (P, G). scale "group" divides by the group's std (GRPO); "none" only centres (Dr.GRPO, arXiv 2503.20783).
    Returns (P, G) float64. Raises ValueError when G is 1 (nothing to compare with) or a reward is not finite.
    """
    rewards = np.asarray(rewards, np.float64)
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards have shape {rewards.shape}: a group needs at least 2 completions (--group-size)")
    if not np.isfinite(rewards).all():
        raise ValueError(f"the rewards of prompt {int(np.argwhere(~np.isfinite(rewards))[0, 0])} are not all finite")
    if scale not in ("group", "none"):
        raise ValueError(f"advantage scale is {scale!r}: group or none")
    centred = rewards - rewards.mean(1, keepdims=True)
    if scale == "group" and len(rewards):
        centred = centred / (rewards.std(1, ddof=1, keepdims=True) + EPS)
    return np.where(flat_groups(rewards)[:, None], 0.0, centred)
