"""Grounding: one expression, the box of what it names, or that there is no such object.

Reward `set`: q = clip((IoU - .5) / .5, 0, 1) of the best box of the answer, times 2 / (n_pred + 1): the soft F1 of
detection with one target, so that listing more boxes than one does not pay. "No such object" is worth 1 where it is
true and 0 where it is not, and so is any box the other way round.

`paper` is Perception-R1's as its paper states it, IoU of the first box + 1 for the format, and `paper-code` what its
code pays, IoU^2 + format. Mended: the format is checked (its regular expression leaves `|` unescaped and accepts
whatever begins with `<`); both families' boxes are read, in their own frame; a union without area is no error; nothing
is `eval`ed; "no such object" is an answer, and where it is right worth as much as an exact box.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pr1.data.refcoco import load_refcoco
from pr1.data.scene_tasks import GroundScenes, ground_scenes
from pr1.records import ImageRecord, Sample
from pr1.rewards import aligned_iou, check_weights, quality, weigh
from pr1.tasks.boxes import original_boxes
from pr1.tasks.common import by_record, group_size
from pr1.tasks.named import NamedTask

# The parts, with what each preset pays for them.
PARTS = {"set": 0.0, "iou": 0.0, "iou2": 0.0, "boxes": 0.0, "format": 0.0}
PRESETS = {
    "set": {**PARTS, "set": 1.0},
    "paper": {**PARTS, "iou": 1.0, "format": 1.0},
    "paper-code": {**PARTS, "iou2": 1.0, "format": 1.0},
}


@dataclass(frozen=True)
class GroundTask(NamedTask):
    """See `pr1.tasks.Task`. Targets are NamedTargets: an expression, and its box or none."""

    name: ClassVar[str] = "ground"
    presets: ClassVar[tuple[str, ...]] = tuple(PRESETS)
    warm_start: ClassVar[str] = "tiny-qwen2.5-vl-ground"

    def __post_init__(self):
        super().__post_init__()
        check_weights(PRESETS[self.preset], self.weights, self.preset)

    def load(self, data: str, images: str | None, **options) -> tuple[ImageRecord, ...]:
        """RefCOCO or JSON Lines; see `load_refcoco`."""
        return load_refcoco(data, images, **options)

    def rendered(self, split: str, n: int, difficulty: float, *, duplicates: float = 0.0) -> GroundScenes:
        """n rendered scenes of a split ("train" or "val")."""
        return ground_scenes(split, n, difficulty, duplicates)

    def messages(self, record: ImageRecord) -> list[dict]:
        """The prompt of Perception-R1 (arXiv 2504.07954); {question} stands for the expression, without a leading
        article, for the prompt has one."""
        name = record.target.name
        question = name[4:] if name.lower().startswith("the ") else name
        text = self.request("Output the bounding box of the {question} in the image.", question=question)
        return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]

    def answer(self, sample: Sample) -> str:
        """The target as the family writes it. No such object: `[]`, or the phrase without a box."""
        return self.write(sample, self.exact(sample))

    def reward(
        self, texts: Sequence[Sequence[str]], samples: Sequence[Sample], *, progress: float = 1.0
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """texts: P lists of G answers -> (P, G) float32 and its parts, each (P, G) float32. Raises on no text.

        Parts: set (the reward `set`); iou and iou2, of the first box (1 where "no such object" is right); boxes, how
        many the answer holds, malformed and broken off ones included; format, 1 for one well-formed answer of at most
        one box and nothing else; with `thinking` also think. The box to be found is rounded to text units first, so
        that the exact answer is worth 1 however small the box is. progress is not used.
        """
        shape = (len(samples), group_size(texts, samples))
        pred, owner, gt, facts = [np.zeros((0, 4))], [], [], []
        for answers, sample in zip(texts, map(self.expressible, samples), strict=True):
            box = sample.target.boxes[0] if len(sample.target.boxes) else (np.nan,) * 4
            for text in answers:
                answer = self.parse(text, sample)
                xyxy, _ = original_boxes(answer.items, sample.frames[0])
                pred.append(xyxy)
                owner += [len(gt)] * len(xyxy)
                gt.append(box)
                facts.append((len(xyxy) + answer.truncated, answer.format_ok, self.final(text)[2]))
        facts = np.array(facts, np.float64).reshape(-1, 3)
        parts = _parts(np.concatenate(pred), np.array(owner, np.int64), np.reshape(gt, (-1, 4)), facts)
        total = weigh(parts, PRESETS[self.preset], self.weights)
        if self.thinking:
            parts["think"] = facts[:, 2]
            total = total * (0.5 + 0.5 * facts[:, 2])
        parts = {name: values.reshape(shape).astype(np.float32) for name, values in parts.items()}
        return total.reshape(shape).astype(np.float32), parts

    def evaluate(self, predictions: Sequence[Mapping], records: Sequence[ImageRecord]) -> dict[str, float | None]:
        """Over the records with a box: acc50, acc75 and acc95, the shares answered with one box of at least that IoU,
        and iou, its mean. No box, and more than one, have IoU 0 (the released evaluation takes the first of several).
        acc_none: of the records without a box, the share answered without one. A record without a prediction counts as
        answered without a box."""
        lines = by_record(predictions, records)
        said = [line["items"] if line else [] for line in lines]
        there = np.array([len(record.target.boxes) > 0 for record in records])
        boxes = [items[0]["bbox"] if len(items) == 1 else (np.nan,) * 4 for items in said]
        gt = [record.target.boxes[0] if has else (np.nan,) * 4 for record, has in zip(records, there, strict=True)]
        iou = aligned_iou(boxes, gt)[there]
        some, none = bool(there.any()), not there.all()
        return {
            **{f"acc{t}": float((iou >= t / 100).mean()) if some else None for t in (50, 75, 95)},
            "iou": float(iou.mean()) if some else None,
            "acc_none": float(np.array([not items for items in said])[~there].mean()) if none else None,
        }


def _parts(pred: np.ndarray, owner: np.ndarray, gt: np.ndarray, facts: np.ndarray) -> dict[str, np.ndarray]:
    """pred (K, 4) boxes of the answers owner (K,), ascending; gt (B, 4), NaN for no such object; facts (B, 3): number of
    boxes, whether the text is well-formed, whether the thinking is -> parts, (B,) float64 each."""
    n_pred, format_ok, none = facts[:, 0], facts[:, 1] > 0, np.isnan(gt[:, 0])
    iou = aligned_iou(pred, gt[owner])
    best, head = np.zeros(len(gt)), np.zeros(len(gt))
    np.maximum.at(best, owner, iou)
    first = np.flatnonzero(np.diff(owner, prepend=-1))
    head[owner[first]] = iou[first]
    right = none & (n_pred == 0) & format_ok  # said that there is none, and there is none
    head[right] = 1.0
    return {
        "set": np.where(none, right, 2 * quality(best) / (n_pred + 1)),
        "iou": head,
        "iou2": head**2,
        "boxes": n_pred,
        "format": (format_ok & (n_pred <= 1)).astype(np.float64),
    }
