"""What a detection answer is worth: the default `set`, Perception-R1's reward, and those of its relatives.

A preset is a function of the matched boxes, the matching cost it asks for and the default weight of each of its parts;
its reward is their weighted sum. Three rules hold for all presets, whatever their originals do: every item of an answer
counts as a prediction, malformed ones and those of unknown classes too, unless the preset says otherwise; regions to be
ignored are no targets, and a prediction of their class more than half inside one counts neither way; nothing found
where there is nothing to find, said in form, earns the full reward, and text without any answer nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from pr1.matcher import Boxes, Match, MatchCost, linear_sum_assignment_batch, match_boxes
from pr1.rewards.tables import (
    aligned_giou,
    all_pairs,
    counts,
    problems,
    quality,
    select,
    weigh,
)  # fmt: skip

# Classes are a wall, not a price: under any finite price a box of another class can take a target, and so decide which
# box of the right class goes without. Likewise a pair below IoU .5 is worth nothing and must not cost another its
# partner. The weights of L1 and GIoU are DETR's.
SET_COST = MatchCost(l1=5.0, giou=2.0, cls=0.0, forbid_other_class=True, min_iou=0.5)
PAPER_COST = MatchCost(l1=5.0, giou=2.0, cls=1.0)
VISION_R1_COST = MatchCost(l1=1.0, giou=1.0, cls=1.0)
MAX_OBJECTS = 120  # of an answer and of an image, VisionReasoner's


@dataclass(frozen=True)
class Answers:
    """B answers beside their targets, no ignore regions left."""

    pred: Boxes
    gt: Boxes
    sizes: np.ndarray  # (B, 2) image width, height
    n_pred: np.ndarray  # (B,) items, those without a usable box included
    n_known: np.ndarray  # (B,) items with a usable box and a class of the data set
    format_ok: np.ndarray  # (B,) bool
    said: np.ndarray  # (B,) bool: there is an answer, if an empty one
    progress: float
    match: Match

    @cached_property
    def n_gt(self) -> np.ndarray:
        return counts(self.gt.offsets)

    @cached_property
    def nothing(self) -> np.ndarray:
        """(B,) bool: nothing to find and nothing predicted."""
        return (self.n_pred == 0) & (self.n_gt == 0)

    def settle(self, values: np.ndarray) -> np.ndarray:
        """The values, but 1 (0 if not said in form) where there is nothing to find and nothing predicted."""
        return np.where(self.nothing, self.said, values)

    @property
    def classified_table(self) -> tuple:
        """The pairwise table with its labels, as `pr1.rewards.compiled` takes it."""
        return (self.match.table, self.match.table_offsets, self.pred.labels, self.pred.offsets, self.gt.labels,
                self.gt.offsets)  # fmt: skip


def safe(divisor: np.ndarray) -> np.ndarray:
    return np.maximum(divisor, 1)


def set_parts(a: Answers) -> dict[str, np.ndarray]:
    """Soft F1, class-aware: q = clip((IoU - .5) / .5, 0, 1) of the optimal one-to-one pairs.

    f1 = 2 sum(q) / (n_pred + n_gt), the harmonic mean of precision sum(q) / n_pred and recall sum(q) / n_gt; iou, the
    mean IoU of the pairs worth more than 0, else 0; count_ratio, min / max of n_pred and n_gt; format, 1 if the whole
    text is one well-formed answer, else 0.
    """
    q = quality(a.match.iou)
    problem = problems(a.match.offsets)
    sum_q = np.bincount(problem, q, len(a.n_gt))
    paid = q > 0
    n_paid = np.bincount(problem, paid, len(a.n_gt))
    sum_iou = np.bincount(problem, np.where(paid, a.match.iou, 0.0), len(a.n_gt))
    return {
        "f1": a.settle(2 * sum_q / safe(a.n_pred + a.n_gt)),
        "precision": a.settle(sum_q / safe(a.n_pred)),
        "recall": a.settle(sum_q / safe(a.n_gt)),
        "iou": sum_iou / safe(n_paid),
        "count_ratio": a.settle(np.minimum(a.n_pred, a.n_gt) / safe(np.maximum(a.n_pred, a.n_gt))),
        "format": a.format_ok.astype(np.float64),
    }


def paper_parts(a: Answers) -> dict[str, np.ndarray]:
    """Perception-R1 (arXiv 2504.07954 and its released detection reward): 0.25 format + 0.75 F1 + class + IoU, 0..3.

    format: share of the items with a usable box and a known class. Those n boxes are matched to the targets; pairs with
    IoU <= .5 are dropped afterwards. F1 of the numbers of pairs, n and n_gt, whatever their classes; class: share of
    the pairs whose labels agree; iou: their mean IoU; penalty: -(FP / n + FN / n_gt), of weight 0 as in the released
    script, .5 where it is on. Without a pair only format is paid.

    Mended: (1) L1 of the matching cost is taken on normalised boxes (the release takes pixels, which drowns all else);
    (2) its class term is [labels differ] (was a difference of softmaxed one-hots, indexed one class off); (3) a
    malformed or inverted box costs its own item, not the whole answer; (4) an answer that breaks off is paid for its
    whole items, not 0, the broken one lowering the format; (5) nothing found where there is nothing earns 3 (was 0,
    through an exception). Kept, though they invite hacking: class and IoU are means over the pairs, the F1 is blind to
    classes, and items of unknown classes cost format alone.
    """
    kept = a.match.iou > 0.5
    problem, iou = problems(a.match.offsets)[kept], a.match.iou[kept]
    rows, cols = a.match.rows[kept] + a.pred.offsets[problem], a.match.cols[kept] + a.gt.offsets[problem]
    agree = a.pred.labels[rows] == a.gt.labels[cols]
    size = len(a.n_gt)
    pairs = np.bincount(problem, minlength=size)
    missed = (a.n_known - pairs) / safe(a.n_known) + (a.n_gt - pairs) / safe(a.n_gt)
    return {
        "format": a.settle(a.n_known / safe(a.n_pred)),
        "f1": a.settle(2 * pairs / safe(a.n_known + a.n_gt)),
        "class": a.settle(np.bincount(problem, agree, size) / safe(pairs)),
        "iou": a.settle(np.bincount(problem, iou, size) / safe(pairs)),
        "penalty": np.where(pairs > 0, -missed, 0.0),
    }


def vlm_r1_parts(a: Answers) -> dict[str, np.ndarray]:
    """VLM-R1 (om-ai-lab/VLM-R1, open-vocabulary detection): map, the COCO AP of the one image with every score 1; both
    empty 1, one empty 0. odlength = map x min(1, n_gt / n_pred). format is logged; their runs add it with weight 1."""
    from pr1.rewards.compiled import average_precision  # numba takes its time to load, and only some presets need it

    ap = a.settle(average_precision(*a.classified_table))
    length = np.where(a.n_gt > 0, np.minimum(1.0, a.n_gt / safe(a.n_pred)), a.nothing)
    return {"map": ap, "odlength": ap * length, "length": length, "format": a.format_ok.astype(np.float64)}


def rex_omni_parts(a: Answers) -> dict[str, np.ndarray]:
    """Rex-Omni (arXiv 2510.12798): F1 of precision, the mean over predictions of the best IoU with a target of the
    class, and recall, the mean over targets; nothing is matched one to one. Both empty 1, one empty 0."""
    from pr1.rewards.compiled import best_sums

    by_pred, by_gt = best_sums(*a.classified_table)
    precision, recall = by_pred / safe(a.n_pred), by_gt / safe(a.n_gt)
    f1 = 2 * precision * recall / np.where(precision + recall > 0, precision + recall, 1.0)
    return {"f1": a.settle(f1), "precision": a.settle(precision), "recall": a.settle(recall)}


def visual_rft_parts(a: Answers) -> dict[str, np.ndarray]:
    """Visual-RFT (arXiv 2503.01785): iou, the sum of IoU over greedy pairs with IoU > .5 by max(n_pred, n_gt);
    confidence, the mean of the confidence of paired and of 1 - confidence of other predictions; format, 0 or 1.

    Adapted: it asks for one class at a time, here pairs are kept within a class; our answers have no confidences, so
    all are 1, which leaves the share of the predictions that are paired.
    """
    from pr1.rewards.compiled import greedy_sums

    total, pairs = greedy_sums(*a.classified_table, np.nextafter(0.5, 1.0), False)
    return {
        "iou": a.settle(total / safe(np.maximum(a.n_pred, a.n_gt))),
        "confidence": a.settle(pairs / safe(a.n_pred)),
        "format": a.format_ok.astype(np.float64),
    }


def stepped(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below `low`, 1 above `high`, the value itself between."""
    return np.where(values < low, 0.0, np.where(values > high, 1.0, values))


def vision_r1_parts(a: Answers) -> dict[str, np.ndarray]:
    """Vision-R1 (arXiv 2503.18013 and its released reward): format + recall + precision, 0..3.

    GIoU of the optimal pairs, whatever their classes. recall: share of the targets whose pair reaches .5, then stepped
    at (.5, .75); precision: sum of the GIoUs stepped at (.5, .75) by n_pred. In the second half of the training (their
    step 1,500) a pair must reach .75 and the steps of precision are (.75, .9).

    Mended: L1 of the matching cost on normalised boxes; the format of an empty answer to an empty image is 1 (was 0).
    Adapted: half of the training for their fixed step; items of unknown classes are not matched.
    """
    problem = problems(a.match.offsets)
    rows, cols = a.match.rows + a.pred.offsets[problem], a.match.cols + a.gt.offsets[problem]
    giou = aligned_giou(a.pred.boxes[rows], a.gt.boxes[cols])
    reach, low, high = (0.5, 0.5, 0.75) if a.progress < 0.5 else (0.75, 0.75, 0.9)
    hits = np.bincount(problem, stepped(giou, reach, reach), len(a.n_gt))
    found = np.bincount(problem, stepped(giou, low, high), len(a.n_gt))
    return {
        "format": a.format_ok.astype(np.float64),
        "recall": a.settle(stepped(hits / safe(a.n_gt), 0.5, 0.75)),
        "precision": a.settle(found / safe(a.n_pred)),
    }


def v_triune_parts(a: Answers) -> dict[str, np.ndarray]:
    """V-Triune (arXiv 2505.18129 and its released reward): .9 accuracy + .1 format.

    Greedy pairs within a class, target by target, with IoU of at least a threshold that rises with the training: .85
    (its first tenth), .95 (until a quarter), .99. accuracy = (.7 iou + .3 completeness) x length with iou =
    sum of IoU / n_gt, completeness = 1 - (share missed + share of false alarms) / 2, length = .6^|n_pred - n_gt|;
    an answer without boxes has accuracy 0. format: the answer has a box. Adapted: an empty image, which it does not
    have, as here everywhere.
    """
    from pr1.rewards.compiled import greedy_sums

    threshold = 0.85 if a.progress <= 0.1 else 0.95 if a.progress <= 0.25 else 0.99
    total, pairs = greedy_sums(*a.classified_table, threshold, True)
    complete = 1 - ((a.n_gt - pairs) / safe(a.n_gt) + (a.n_pred - pairs) / safe(a.n_pred)) / 2
    iou, length = total / safe(a.n_gt), 0.6 ** np.abs(a.n_pred - a.n_gt)
    accuracy = np.where((a.n_known > 0) & (a.n_gt > 0), (0.7 * iou + 0.3 * complete) * length, 0.0)
    return {"accuracy": a.settle(accuracy), "format": a.settle(a.n_known > 0), "iou": a.settle(iou),
            "completeness": a.settle(complete), "length": a.settle(length)}  # fmt: skip


def visionreasoner_parts(a: Answers) -> dict[str, np.ndarray]:
    """VisionReasoner (arXiv 2505.12081): accuracy, 0..3, is the largest one-to-one sum of three hard tests of a pair
    (IoU > .5; mean L1 of the corners < 10; points < 30 apart and in the box) by max(n_pred, n_gt), of at most 120 boxes
    each; format, the share of items with a usable box.

    Adapted: distances in pixels of an 840 x 840 image, to which it resizes; our answers have no points, so the boxes'
    centres stand for them; its rewards of the thinking form and for not repeating sentences are left to --thinking.
    It asks for one kind of object at a time, so the tests know no classes.
    """
    rows, cols = all_pairs(a.pred.offsets, a.gt.offsets)
    scale = np.tile(840.0 / a.sizes, 2)[problems(a.pred.offsets)][rows]
    off = (a.pred.boxes[rows] - a.gt.boxes[cols]) * scale
    centre = (off[:, :2] + off[:, 2:]) / 2
    tests = (a.match.table > 0.5, np.abs(off).mean(1) < 10.0, np.hypot(*centre.T) < 30.0)
    passed = np.sum(tests, axis=0, dtype=np.float64)
    starts, m, n = a.match.table_offsets, counts(a.pred.offsets), a.n_gt
    tables = [passed[starts[b] : starts[b + 1]].reshape(m[b], n[b])[:MAX_OBJECTS, :MAX_OBJECTS] for b in range(len(n))]
    i, j, offsets = linear_sum_assignment_batch([3.0 - t for t in tables])
    width = np.array([t.shape[1] for t in tables], np.int64)
    flat = np.concatenate([np.zeros(0), *(t.ravel() for t in tables)])
    first = np.cumsum([0, *(t.size for t in tables)])
    problem = problems(offsets)
    total = np.bincount(problem, flat[first[problem] + i * width[problem] + j], len(n))
    most = np.minimum(np.maximum(a.n_pred, n), MAX_OBJECTS)
    return {
        "accuracy": np.where(a.nothing, 3.0 * a.said, total / safe(most)),
        "format": a.settle(a.n_known / safe(a.n_pred)),
    }


class Preset(NamedTuple):
    parts: Callable[[Answers], dict[str, np.ndarray]]
    weights: dict[str, float]  # of every part; 0: logged only
    cost: MatchCost = SET_COST


PRESETS: dict[str, Preset] = {
    "set": Preset(
        set_parts, {"f1": 1.0, "precision": 0.0, "recall": 0.0, "iou": 0.0, "count_ratio": 0.0, "format": 0.0}
    ),
    "paper": Preset(paper_parts, {"format": 0.25, "f1": 0.75, "class": 1.0, "iou": 1.0, "penalty": 0.0}, PAPER_COST),
    "vlm-r1-map": Preset(vlm_r1_parts, {"map": 1.0, "odlength": 0.0, "length": 0.0, "format": 0.0}),
    "vlm-r1-odlength": Preset(vlm_r1_parts, {"map": 0.0, "odlength": 1.0, "length": 0.0, "format": 0.0}),
    "rex-omni": Preset(rex_omni_parts, {"f1": 1.0, "precision": 0.0, "recall": 0.0}),
    "visual-rft": Preset(visual_rft_parts, {"iou": 1.0, "confidence": 1.0, "format": 1.0}),
    "vision-r1": Preset(vision_r1_parts, {"format": 1.0, "recall": 1.0, "precision": 1.0}, VISION_R1_COST),
    "v-triune": Preset(
        v_triune_parts, {"accuracy": 0.9, "format": 0.1, "iou": 0.0, "completeness": 0.0, "length": 0.0}
    ),
    "visionreasoner": Preset(visionreasoner_parts, {"accuracy": 1.0, "format": 1.0}),
}


def score(
    pred: Boxes, gt: Boxes, sizes: np.ndarray, *, n_pred=None, n_known=None, format_ok=None, preset: str = "set",
    weights: Sequence[tuple[str, float]] = (), progress: float = 0.0,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:  # fmt: skip
    """What B answers are worth under a preset: reward (B,) and its parts {name: (B,)}, float64.

    pred: the usable boxes of each answer, of known classes; gt: targets and, flagged, regions to be ignored; boxes
    xyxy in original pixels; sizes (B, 2) image width and height. n_pred (B,): all items of an answer; n_known (B,):
    those with a usable box and known class; both default to the boxes in `pred`. format_ok (B,) bool: the whole text is
    one answer (default). weights: (part, weight) in place of the preset's. progress: how much of the training is done,
    0..1, for the presets with a schedule (vision-r1, v-triune).
    """
    chosen = PRESETS[preset]
    size = len(sizes)
    n_boxes = counts(pred.offsets)
    n_pred, n_known = (n_boxes if n is None else np.asarray(n) for n in (n_pred, n_known))
    said = format_ok = np.ones(size, bool) if format_ok is None else np.asarray(format_ok, bool)
    if gt.ignore is not None and gt.ignore.any():
        ignored = ignored_predictions(pred, gt, sizes)
        said = said | (np.bincount(problems(pred.offsets), ignored, size) > 0)
        pred, gt = select(pred, ~ignored), select(gt, ~gt.ignore)
        removed = n_boxes - counts(pred.offsets)
        n_pred, n_known = n_pred - removed, n_known - removed
    match = match_boxes(pred, gt, sizes, chosen.cost)
    answers = Answers(pred, gt, sizes, n_pred, n_known, format_ok, said, progress, match)
    parts = chosen.parts(answers)
    return weigh(parts, chosen.weights, weights), parts


def ignored_predictions(pred: Boxes, gt: Boxes, sizes: np.ndarray) -> np.ndarray:
    """(M,) bool: predictions more than half inside an ignore region of their class, but for those whose pair in the
    matching of `set` is worth more than 0."""
    match = match_boxes(pred, gt, sizes, SET_COST)
    ignored = match.ignored
    rows = match.rows + pred.offsets[problems(match.offsets)]
    ignored[rows[match.iou > 0.5]] = False
    return ignored
