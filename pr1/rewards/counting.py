"""What a counting answer is worth: boxes (or points) against the objects to be counted, all of one kind.

A target is a box, or a point: a box without area, x1 = x2 and y1 = y2. Distances are between centres, in thousandths of
the image's sides, Euclidean.
"""

from __future__ import annotations

import numpy as np

from pr1.matcher import Boxes, linear_sum_assignment_batch
from pr1.rewards.tables import aligned_iou, all_pairs, counts, problems, quality

NEAR = 100.0  # a prediction this far from a point is worth nothing for it
TOUCH = 0.1  # IoU from which a prediction lies on a box
FARTHEST = 1000.0 * np.sqrt(2.0)  # the image's diagonal

COUNT_PAPER = {"count": 1.0, "ratio": 0.0, "location": 0.0}
COUNT_SET = {"exact": 0.5, "f1": 0.5, "precision": 0.0, "recall": 0.0}


def count_paper(pred: Boxes, gt: Boxes, sizes, n_pred=None) -> dict[str, np.ndarray]:
    """Perception-R1's counting reward (arXiv 2504.07954 and its release): count = ratio x location, each (B,) float64.

    ratio = min / max of n_pred and n_gt; location = 1 - (mean distance of the closest complete one-to-one pairs) /
    (1000 sqrt 2). Mended: nothing counted where there is nothing earns 1 (could not be answered). `sizes` (B, 2) image
    width and height; `n_pred` (B,) all items, those without a usable box included (default: the boxes in `pred`).
    """
    n_boxes, n_gt = counts(pred.offsets), counts(gt.offsets)
    n_pred = n_boxes if n_pred is None else np.asarray(n_pred)
    rows, cols = all_pairs(pred.offsets, gt.offsets)
    distances = distance(pred.boxes[rows], gt.boxes[cols], _sizes(sizes, pred)[rows])
    problem, entries = _assign(distances, n_boxes, n_gt)
    mean = np.bincount(problem, distances[entries], len(n_gt)) / np.maximum(np.minimum(n_boxes, n_gt), 1)
    nothing = (n_pred == 0) & (n_gt == 0)
    ratio = np.where(nothing, 1.0, np.minimum(n_pred, n_gt) / np.maximum(np.maximum(n_pred, n_gt), 1))
    location = np.where(nothing, 1.0, np.where((n_boxes > 0) & (n_gt > 0), np.maximum(1 - mean / FARTHEST, 0.0), 0.0))
    return {"count": ratio * location, "ratio": ratio, "location": location}


def count_set(pred: Boxes, gt: Boxes, sizes, n_pred=None) -> dict[str, np.ndarray]:
    """The exact count with a bounded location term: .5 exact + .5 f1, each part (B,) float64 in 0..1.

    f1 = 2 sum(q) / (n_pred + n_gt), q of the one-to-one pairs: clip((IoU - .5) / .5, 0, 1) with a box,
    clip(1 - distance / 100, 0, 1) with a point. exact: as many predictions as objects, and each on an object of its own
    (IoU of at least .1; distance of at most 100). So a wrong count is worth less than .5, a right one .5 at least, and
    the right number of copies of one box is not a right count. Nothing counted where there is nothing: all parts 1.
    Arguments as in `count_paper`.
    """
    n_boxes, n_gt = counts(pred.offsets), counts(gt.offsets)
    n_pred = n_boxes if n_pred is None else np.asarray(n_pred)
    rows, cols = all_pairs(pred.offsets, gt.offsets)
    a, b = pred.boxes[rows], gt.boxes[cols]
    point = (b[:, 0] == b[:, 2]) & (b[:, 1] == b[:, 3])
    iou, away = aligned_iou(a, b), distance(a, b, _sizes(sizes, pred)[rows])
    worth = np.where(point, np.clip(1 - away / NEAR, 0.0, 1.0), quality(iou))
    on = np.where(point, away <= NEAR, iou >= TOUCH)
    # as many pairs on an object as there can be, of those the assignment worth most
    most = 1.0 + np.minimum(n_boxes, n_gt)[problems(pred.offsets)][rows]
    problem, entries = _assign(-(on * most + worth), n_boxes, n_gt)
    size = len(n_gt)
    sum_q, n_on = (np.bincount(problem, values[entries], size) for values in (worth, on))
    nothing = (n_pred == 0) & (n_gt == 0)
    return {
        "exact": np.where(nothing, 1.0, (n_pred == n_gt) & (n_on == n_gt)),
        "f1": np.where(nothing, 1.0, 2 * sum_q / np.maximum(n_pred + n_gt, 1)),
        "precision": np.where(nothing, 1.0, sum_q / np.maximum(n_pred, 1)),
        "recall": np.where(nothing, 1.0, sum_q / np.maximum(n_gt, 1)),
    }


def distance(a: np.ndarray, b: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Between the centres of boxes (n, 4), row by row, in thousandths of the image's sides `sizes` (n, 2): (n,)."""
    off = (a[:, :2] + a[:, 2:] - b[:, :2] - b[:, 2:]) / 2 / sizes * 1000.0
    return np.hypot(off[:, 0], off[:, 1])


def _sizes(sizes, pred: Boxes) -> np.ndarray:
    return np.asarray(sizes, np.float64)[problems(pred.offsets)]


def _assign(costs: np.ndarray, m: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest assignments of ragged (m_i, n_i) tables: the problem of each pair, and its entry of the tables."""
    first = np.concatenate([[0], np.cumsum(m * n)])
    tables = [costs[first[b] : first[b + 1]].reshape(m[b], n[b]) for b in range(len(m))]
    rows, cols, offsets = linear_sum_assignment_batch(tables)
    problem = problems(offsets)
    return problem, first[problem] + rows * n[problem] + cols
