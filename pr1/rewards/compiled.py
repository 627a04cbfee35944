"""Rewards that are loops by nature, compiled by numba. All take the pairwise IoU table of `match_boxes`.

Arrays: table (sum m_i * n_i,) float64 with its offsets (B + 1,) int64; labels (M,) and (N,) int64 with theirs.
"""

from __future__ import annotations

import numpy as np
from numba import njit

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # as pycocotools has them
RECALLS = np.linspace(0.0, 1.0, 101)


def average_precision(table, starts, pred_labels, pred_offsets, gt_labels, gt_offsets, scores=None, max_per_class=100):
    """COCO's AP of each image for itself, averaged over IoU .5:.95 and the classes with a target: (B,) float64.

    scores: (M,) float64; None: all equal. Equal to pycocotools' `stats[0]` on the one image (101-point interpolation,
    the best-scored `max_per_class` predictions of a class, ties in the order given); 0 for an image without targets.
    """
    order = np.arange(len(pred_labels))
    if scores is not None:
        order = np.lexsort((-np.asarray(scores), np.repeat(np.arange(len(starts) - 1), np.diff(pred_offsets))))
    return _average_precision(table, starts, pred_labels, pred_offsets, gt_labels, gt_offsets, order, max_per_class)


@njit(cache=True)
def _average_precision(table, starts, pred_labels, pred_offsets, gt_labels, gt_offsets, order, max_per_class):
    """order: (M,) int64 packed predictions of each problem, best first."""
    result = np.zeros(len(starts) - 1)
    for b in range(len(result)):
        p0, p1, g0, g1 = pred_offsets[b], pred_offsets[b + 1], gt_offsets[b], gt_offsets[b + 1]
        taken, hits, n_classes = np.zeros(g1 - g0, np.bool_), np.zeros(p1 - p0, np.bool_), 0
        for first in range(g0, g1):
            label, n_targets, seen = gt_labels[first], 0, False
            for g in range(g0, g1):
                n_targets += gt_labels[g] == label
                seen = seen or (g < first and gt_labels[g] == label)
            if seen:
                continue
            n_classes += 1
            for threshold in THRESHOLDS:
                taken[:], ranked = False, 0
                for r in range(p0, p1):
                    if pred_labels[order[r]] != label or ranked == max_per_class:
                        continue
                    # Each takes the free target of most IoU; of equal ones the last, as in pycocotools.
                    best, at, row = threshold, -1, starts[b] + (order[r] - p0) * (g1 - g0) - g0
                    for g in range(g0, g1):
                        if gt_labels[g] == label and not taken[g - g0] and table[row + g] >= best:
                            best, at = table[row + g], g - g0
                    hits[ranked] = at >= 0
                    ranked += 1
                    if at >= 0:
                        taken[at] = True
                result[b] += _interpolated(hits, ranked, n_targets)
        result[b] /= max(1, len(THRESHOLDS) * n_classes)
    return result


@njit(cache=True)
def _interpolated(hits, ranked, n_targets):
    """Precision, made falling, averaged over the 101 recalls; 0 beyond the recall reached."""
    precision, recall, true = np.zeros(ranked), np.zeros(ranked), 0
    for i in range(ranked):
        true += hits[i]
        precision[i], recall[i] = true / (i + 1), true / n_targets
    for i in range(ranked - 1, 0, -1):
        precision[i - 1] = max(precision[i - 1], precision[i])
    total, i = 0.0, 0
    for at in RECALLS:
        while i < ranked and recall[i] < at:
            i += 1
        if i == ranked:
            break
        total += precision[i]
    return total / len(RECALLS)


@njit(cache=True)
def greedy_sums(table, starts, pred_labels, pred_offsets, gt_labels, gt_offsets, threshold, by_target):
    """One-to-one greedy matching within a class: (B,) sum of the pairs' IoU and (B,) number of pairs.

    Predictions (or, `by_target`, targets) are served in their order, each with the free partner of most IoU, the first
    of equal ones, if that is at least `threshold`.
    """
    total, pairs = np.zeros(len(starts) - 1), np.zeros(len(starts) - 1, np.int64)
    for b in range(len(total)):
        p0, g0 = pred_offsets[b], gt_offsets[b]
        m, n = pred_offsets[b + 1] - p0, gt_offsets[b + 1] - g0
        taken = np.zeros(m if by_target else n, np.bool_)
        for i in range(n if by_target else m):
            best, at = -1.0, -1
            for j in range(len(taken)):
                p, g = (j, i) if by_target else (i, j)
                iou = table[starts[b] + p * n + g]
                if not taken[j] and pred_labels[p0 + p] == gt_labels[g0 + g] and iou > best:
                    best, at = iou, j
            if at >= 0 and best >= threshold:
                taken[at] = True
                total[b] += best
                pairs[b] += 1
    return total, pairs


@njit(cache=True)
def best_sums(table, starts, pred_labels, pred_offsets, gt_labels, gt_offsets):
    """Without matching: (B,) sum over predictions, and (B,) over targets, of the best IoU within the class."""
    by_pred, by_gt = np.zeros(len(starts) - 1), np.zeros(len(starts) - 1)
    for b in range(len(by_pred)):
        p0, g0 = pred_offsets[b], gt_offsets[b]
        m, n = pred_offsets[b + 1] - p0, gt_offsets[b + 1] - g0
        of_gt = np.zeros(n)
        for p in range(m):
            best = 0.0
            for g in range(n):
                if pred_labels[p0 + p] == gt_labels[g0 + g]:
                    iou = table[starts[b] + p * n + g]
                    best, of_gt[g] = max(best, iou), max(of_gt[g], iou)
            by_pred[b] += best
        by_gt[b] = of_gt.sum()
    return by_pred, by_gt
