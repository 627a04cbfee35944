"""What the rewards share: weights, qualities, and packed boxes taken apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pr1.matcher import Boxes


def check_weights(defaults: Mapping[str, float], weights: Sequence[tuple[str, float]], preset: str) -> None:
    """Raises ValueError for a weight that is no finite number or of a part that the preset does not have."""
    for part, weight in weights:
        if part not in defaults:
            raise ValueError(f"--reward-weights names {part!r}: reward {preset} has the parts {', '.join(defaults)}")
        if not np.isfinite(weight):
            raise ValueError(f"--reward-weights gives {part} the weight {weight}: must be a finite number")


def weigh(
    parts: Mapping[str, np.ndarray], defaults: Mapping[str, float], weights: Sequence[tuple[str, float]] = ()
) -> np.ndarray:
    """The weighted sum of the parts, (B,) float64 each, not below 0. `weights` overrule the defaults."""
    used = {part: weight for part, weight in ({**defaults, **dict(weights)}).items() if weight}
    total = sum((weight * parts[part] for part, weight in used.items()), np.zeros_like(next(iter(parts.values()))))
    return np.maximum(total, 0.0)


def quality(iou) -> np.ndarray:
    """IoU -> clip((IoU - .5) / .5, 0, 1), the continuous form of COCO's average over the thresholds .5:.95."""
    return np.clip((np.asarray(iou) - 0.5) / 0.5, 0.0, 1.0)


def area(boxes: np.ndarray) -> np.ndarray:
    """(n, 4) xyxy -> (n,)."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def intersection(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The area that two lists of boxes, (n, 4) xyxy, share row by row: (n,)."""
    width = np.minimum(a[:, 2], b[:, 2]) - np.maximum(a[:, 0], b[:, 0])
    height = np.minimum(a[:, 3], b[:, 3]) - np.maximum(a[:, 1], b[:, 1])
    return np.maximum(width, 0.0) * np.maximum(height, 0.0)


def aligned_iou(pred, gt) -> np.ndarray:
    """IoU of two lists of boxes, (n, 4) xyxy each, row by row: (n,) float64. What is no box (NaN, infinite, inverted or
    without area) has IoU 0 with everything."""
    a, b = np.asarray(pred, np.float64).reshape(-1, 4), np.asarray(gt, np.float64).reshape(-1, 4)
    with np.errstate(all="ignore"):
        usable = [np.isfinite(x).all(1) & (x[:, 2] > x[:, 0]) & (x[:, 3] > x[:, 1]) for x in (a, b)]
        shared = intersection(a, b)
        return np.where(usable[0] & usable[1], shared / (area(a) + area(b) - shared), 0.0)


def aligned_giou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Generalised IoU (Rezatofighi et al., arXiv 1902.09630) of proper boxes, (n, 4) xyxy each, row by row: (n,)."""
    shared = intersection(a, b)
    union = area(a) + area(b) - shared
    hull = area(np.concatenate([np.minimum(a[:, :2], b[:, :2]), np.maximum(a[:, 2:], b[:, 2:])], axis=1))
    return shared / union - (hull - union) / hull


def counts(offsets: np.ndarray) -> np.ndarray:
    """(B + 1,) offsets -> (B,) rows of each problem."""
    return np.diff(offsets)


def problems(offsets: np.ndarray) -> np.ndarray:
    """(B + 1,) offsets -> (M,) the problem of each row."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def select(boxes: Boxes, keep: np.ndarray) -> Boxes:
    """The rows of packed boxes where `keep`, (M,) bool; no ignore flags."""
    ends = np.concatenate([[0], np.cumsum(keep)])
    return Boxes(boxes.boxes[keep], boxes.labels[keep], ends[boxes.offsets].astype(np.int64))


def all_pairs(pred_offsets: np.ndarray, gt_offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every pair of a prediction and a target of the same problem, in the order of `Match.table`: the packed rows of
    both, (sum m_i * n_i,) int64."""
    m, n = np.diff(pred_offsets), np.diff(gt_offsets)
    per_row = np.repeat(n, m)  # targets of each prediction's problem
    rows = np.repeat(np.arange(pred_offsets[-1]), per_row)
    first = np.repeat(np.cumsum(per_row) - per_row, per_row)  # where a prediction's row of the table begins
    cols = np.arange(len(rows)) - first + np.repeat(np.repeat(gt_offsets[:-1], m), per_row)
    return rows, cols
