"""Detection: every object of the image, as boxes with class names.

Reward `set`: predictions are assigned to targets one to one, only within a class and above IoU .5: as many pairs as
there are, and of those assignments the one with the least normalised L1 + GIoU. A pair is worth
q = clip((IoU - .5) / .5, 0, 1), the continuous form of COCO's average over IoU .5:.95; the reward is the harmonic mean
of precision sum(q) / n_pred and recall sum(q) / n_gt (soft F1). So neither leaving objects out, nor repeating boxes,
nor a box of the wrong class pays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pr1.coco_metric import coco_results, det_metrics
from pr1.data.coco import CocoDataset, load_coco
from pr1.families import FAMILIES
from pr1.matcher import Boxes, MatchCost, match_boxes
from pr1.records import Answer, BoxTarget, ImageRecord, Sample

# Classes are a wall, not a price: under any finite price a box of another class can take a target, and so decide which
# box of the right class goes without. Likewise a pair below IoU .5 is worth nothing and must not cost another its
# partner. The weights of L1 and GIoU are DETR's.
COST = MatchCost(l1=5.0, giou=2.0, cls=0.0, forbid_other_class=True, min_iou=0.5)
# Of one answer at most this many boxes (or twice the targets, if more) are matched; the others count as wrong. It
# limits the time an answer of thousands of boxes can take; the precision of such an answer is near 0 anyway.
MAX_MATCHED = 300
MAX_COORDINATE = 1e6  # pixels; a box beyond is no box, and its area would overflow


class FoundBox(NamedTuple):
    """One item of an answer, in the frame of the original image."""

    label: str
    xyxy: np.ndarray | None  # (4,) float64 pixels of the original image; None: not valid
    valid: bool  # False: malformed, inverted, without area or absurd; a wrong prediction
    start: int  # character span in the text
    end: int


class DetTask:
    """See `pr1.tasks.Task`."""

    name = "det"

    def load(self, data: str, images: str | None, **options) -> CocoDataset:
        """COCO instances file and image folder (None: annotations alone) -> records; `options`: see `load_coco`."""
        return load_coco(data, images, **options)

    def messages(self, record: ImageRecord) -> list[dict]:
        """The prompt of Perception-R1's training (arXiv 2504.07954), used for training and evaluation alike."""
        text = f"Please output bbox coordinates and names of {', '.join(record.categories)}."
        return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]

    def build(self, record: ImageRecord, family) -> Sample:
        """Record -> sample; decodes the image. Raises ValueError naming the source if it cannot be decoded."""
        return Sample(id=record.id, task=self.name, messages=self.messages(record), images=(record.load(),),
                      frames=(family.frame(record.width, record.height),), target=record.target)  # fmt: skip

    def answer(self, sample: Sample) -> str:
        """The target as the family writes it: boxes to be found, sorted by x1, then y1 (then as annotated)."""
        target, frame = sample.target, sample.frames[0]
        rows = [i for i in np.lexsort((target.boxes[:, 1], target.boxes[:, 0])) if not target.ignore[i]]
        boxes = _with_area(frame.to_text(target.boxes), frame.text_size)
        items = [(target.labels[i], tuple(int(v) for v in boxes[i])) for i in rows]
        return FAMILIES[frame.family].format_boxes(items)

    def parse(self, text: str, sample: Sample) -> Answer:
        """Reads an answer, in text units. Raises on no text."""
        return FAMILIES[sample.frames[0].family].parse_boxes(text)

    def boxes(self, text: str, sample: Sample) -> list[FoundBox]:
        """Every item of an answer, in its order."""
        items = self.parse(text, sample).items
        xyxy, valid = _original(items, sample.frames[0])
        return [
            FoundBox(item.label, xyxy[i] if valid[i] else None, bool(valid[i]), item.start, item.end)
            for i, item in enumerate(items)
        ]

    def reward(
        self, texts: Sequence[Sequence[str]], samples: Sequence[Sample]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Reward `set`.

        texts: P lists of G answers. Returns (P, G) float32 in 0..1 and its parts, each (P, G) float32: precision and
        recall; iou, the mean IoU of the pairs worth more than 0, else 0; count_ratio, min / max of n_pred and n_gt;
        format, 1 if the whole text is one well-formed answer, else 0. Raises on no text.

        Malformed items count as wrong predictions, and so does what an answer breaks off in. Nothing predicted where
        there is nothing to find is worth 1, if it was said in form; text without an answer is worth 0. An ignore region
        is never a target; a prediction of its class with more than half of its own area inside counts neither way,
        unless its pair is worth more than 0.
        """
        group = {len(answers) for answers in texts}
        if len(texts) != len(samples) or len(group) > 1:
            raise ValueError(
                f"{len(texts)} groups of {sorted(group)} texts for {len(samples)} samples: need one equal group each"
            )
        shape = (len(samples), group.pop() if group else 0)
        if 0 in shape:
            empty = np.zeros(shape, np.float32)
            return empty, {name: empty.copy() for name in ("precision", "recall", "iou", "count_ratio", "format")}
        found = [
            _Found.read(self.parse(text, s), s) for answers, s in zip(texts, samples, strict=True) for text in answers
        ]
        targets = [s.target for s in samples for _ in range(shape[1])]
        scores = _score(found, targets, np.array([(s.frames[0].width, s.frames[0].height) for s in samples]))
        scores = {name: values.reshape(shape).astype(np.float32) for name, values in scores.items()}
        return scores.pop("reward"), scores

    def evaluate(self, predictions: Sequence[Mapping], records: Sequence[ImageRecord]) -> dict[str, float | None]:
        """COCO metrics of predictions in the original frame; a record without a line counts as an empty answer."""
        if not len(records):
            raise ValueError("there is nothing to evaluate on: no image records")
        return det_metrics(coco_results(predictions, records[0].categories), records)


class _Found(NamedTuple):
    """What is matched of one answer."""

    boxes: np.ndarray  # (k, 4) float64 original pixels, k <= n_pred
    labels: list[str]  # k
    n_pred: int  # items, the wrong ones and those beyond the cap included
    format_ok: bool

    @classmethod
    def read(cls, answer: Answer, sample: Sample) -> _Found:
        n_targets = int((~sample.target.ignore).sum())
        xyxy, valid = _original(answer.items, sample.frames[0])
        rows = np.flatnonzero(valid)[: max(MAX_MATCHED, 2 * n_targets)]
        n_pred = len(answer.items) + answer.truncated  # or a policy learns to stop inside a box it is not sure of
        return cls(xyxy[rows], [answer.items[i].label for i in rows], n_pred, answer.format_ok)


def _score(found: list[_Found], targets: list[BoxTarget], sizes: np.ndarray) -> dict[str, np.ndarray]:
    """B answers and the target of each -> {"reward" and every part: (B,) float64}. sizes: (P, 2), P divides B."""
    names: dict[str, int] = {}
    for target in targets:
        for label in target.labels:
            names.setdefault(label, len(names))
    unknown = len(names)  # one class more, which no target has
    wanted = [np.flatnonzero(~t.ignore) for t in targets]
    pred = Boxes.pack([f.boxes for f in found], [[names.get(label, unknown) for label in f.labels] for f in found])
    gt = Boxes.pack(
        [t.boxes[w] for t, w in zip(targets, wanted, strict=True)],
        [[names[t.labels[i]] for i in w] for t, w in zip(targets, wanted, strict=True)],
    )
    match = match_boxes(pred, gt, np.repeat(sizes, len(targets) // len(sizes), axis=0), COST)

    quality = np.clip((match.iou - 0.5) / 0.5, 0.0, 1.0)
    paired = quality > 0
    problem = np.repeat(np.arange(len(found)), np.diff(match.offsets))
    sum_q = np.bincount(problem, quality, len(found))
    n_paired = np.bincount(problem[paired], minlength=len(found))
    sum_iou = np.bincount(problem[paired], match.iou[paired], len(found))

    n_gt = np.array([len(w) for w in wanted])
    n_pred = np.array([f.n_pred for f in found])
    n_ignored = np.zeros_like(n_pred)
    for b in np.flatnonzero([t.ignore.any() and len(f.labels) > 0 for f, t in zip(found, targets, strict=True)]):
        inside = _inside_ignored(found[b], targets[b])
        inside[match.rows[(problem == b) & paired]] = False
        n_ignored[b] = inside.sum()
    n_pred = n_pred - n_ignored

    said = np.array([f.format_ok for f in found]) | (n_ignored > 0)
    empty = (n_pred == 0) & (n_gt == 0)
    alone = np.where(empty & said, 1.0, 0.0)  # nothing to find and nothing found
    most = np.maximum(np.maximum(n_pred, n_gt), 1)
    return {
        "reward": np.where(empty, alone, 2 * sum_q / np.maximum(n_pred + n_gt, 1)),  # = 2 p r / (p + r)
        "precision": np.where(empty, alone, sum_q / np.maximum(n_pred, 1)),
        "recall": np.where(empty, alone, sum_q / np.maximum(n_gt, 1)),
        "iou": sum_iou / np.maximum(n_paired, 1),
        "count_ratio": np.where(empty, alone, np.minimum(n_pred, n_gt) / most),
        "format": np.array([f.format_ok for f in found], np.float64),
    }


def _original(items, frame) -> tuple[np.ndarray, np.ndarray]:
    """Items -> boxes (n, 4) float64 original pixels and (n,) bool whether each is one."""
    nothing = (np.nan,) * 4
    boxes = [item.box if item.valid and item.box is not None else nothing for item in items]
    with np.errstate(all="ignore"):
        xyxy = frame.to_original(np.array(boxes, np.float64).reshape(-1, 4))
        valid = (np.abs(xyxy) <= MAX_COORDINATE).all(1) & (xyxy[:, 2] > xyxy[:, 0]) & (xyxy[:, 3] > xyxy[:, 1])
    return xyxy, valid


def _with_area(boxes: np.ndarray, text_size: tuple[int, int]) -> np.ndarray:
    """(n, 4) text units; a box that rounding made flat becomes one unit wide, inside the image."""
    boxes = boxes.copy()
    for low, high, end in ((0, 2, text_size[0]), (1, 3, text_size[1])):
        flat = boxes[:, low] == boxes[:, high]
        boxes[:, high] += flat & (boxes[:, high] < end)
        boxes[:, low] -= boxes[:, low] == boxes[:, high]
    return boxes


def _inside_ignored(found: _Found, target: BoxTarget) -> np.ndarray:
    """(k,) bool: more than half of the prediction's area lies inside one ignore region of its class."""
    regions = target.boxes[target.ignore]
    labels = np.array(target.labels)[target.ignore]
    a, b = found.boxes[:, None], regions[None]
    shared = np.prod(np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None), axis=-1)
    area = np.prod(found.boxes[:, 2:] - found.boxes[:, :2], axis=1)
    same = np.array(found.labels)[:, None] == labels[None]
    return ((shared > 0.5 * area[:, None]) & same).any(1)
