"""Counting by detecting: one box for each object of a name; the answer's count is the number of its boxes.

Targets are boxes, points, or a number alone; a box and a point are compared by their centres, and where only a number
is known any box will do. What boxes are labelled does not matter.

Reward `set`: half for the exact count, with each box on an object of its own, half for the soft F1 of the boxes: so a
wrong count is worth less than .5, a right one at least that. `paper` is Perception-R1's: min / max of the counts times
1 - the mean distance of matched centres, 0 without form. Mended: both families' syntax is read, `[]` (Qwen2-VL: the
phrase without a box) is an answer and right where there is nothing to count; nothing is `eval`ed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pr1.data.counts import load_counts
from pr1.data.scene_tasks import CountScenes, count_scenes
from pr1.matcher import Boxes
from pr1.records import ImageRecord, Sample
from pr1.rewards import COUNT_PAPER, COUNT_SET, check_weights, count_paper, count_set, weigh
from pr1.tasks.boxes import original_boxes
from pr1.tasks.common import by_record, group_size
from pr1.tasks.named import NamedTask

PRESETS = {"set": COUNT_SET, "paper": COUNT_PAPER}
# Of one answer at most this many boxes (or twice the targets, if more) are matched; the others count as wrong.
MAX_MATCHED = 300


@dataclass(frozen=True)
class CountTask(NamedTask):
    """See `pr1.tasks.Task`. Targets are NamedTargets."""

    name: ClassVar[str] = "count"
    presets: ClassVar[tuple[str, ...]] = tuple(PRESETS)
    warm_start: ClassVar[str] = "tiny-qwen2.5-vl-count"

    def __post_init__(self):
        super().__post_init__()
        check_weights(PRESETS[self.preset], self.weights, self.preset)

    def load(self, data: str, images: str | None, **options) -> tuple[ImageRecord, ...]:
        """COCO instances or JSON Lines of points or counts; see `load_counts`."""
        return load_counts(data, images, **options)

    def rendered(self, split: str, n: int, difficulty: float, *, duplicates: float = 0.0) -> CountScenes:
        """n rendered scenes of a split ("train" or "val")."""
        return count_scenes(split, n, difficulty, duplicates)

    def messages(self, record: ImageRecord) -> list[dict]:
        """The prompt of Perception-R1 (arXiv 2504.07954); {label} stands for what is counted."""
        text = self.request("Output all the bounding boxes of the {label}", label=record.target.name)
        return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]

    def answer(self, sample: Sample) -> str:
        """The target as the family writes it, sorted by x1, then y1; points as small boxes around them. Raises
        ValueError where only a number is known: there is nothing to point at."""
        if len(sample.target.boxes) < sample.target.count:
            raise ValueError(f"sample {sample.id}: only the count is known ({sample.target.count}), not where the objects "
                             "are; train.py can learn from that, sft.py cannot: give points or boxes")  # fmt: skip
        return self.write(sample, self.exact(sample))

    def reward(
        self, texts: Sequence[Sequence[str]], samples: Sequence[Sample], *, progress: float = 1.0
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """texts: P lists of G answers -> (P, G) float32 and its parts, each (P, G) float32. Raises on no text.

        Parts: those of `pr1.rewards.count_set` or `count_paper`; error, |boxes - count|; format, 1 for one well-formed
        answer and nothing else; with `thinking` also think. Malformed and broken off boxes count as wrong ones, text
        without an answer is worth 0 also where there is nothing to count. What is to be found is rounded to text units
        first, so that the exact answer is worth 1 however small things are. progress is not used.
        """
        shape = (len(samples), group_size(texts, samples))
        pred, gt, sizes, facts = [], [], [], []
        for answers, sample in zip(texts, map(self.expressible, samples), strict=True):
            frame, target = sample.frames[0], sample.target
            bare = len(target.boxes) < target.count
            for text in answers:
                answer = self.parse(text, sample)
                xyxy, valid = original_boxes(answer.items, frame)
                xyxy = xyxy[valid][: max(MAX_MATCHED, 2 * target.count)]
                # Any place will do where none is known: all are made the same point.
                pred.append(np.zeros_like(xyxy) if bare else xyxy)
                gt.append(np.zeros((target.count, 4)) if bare else target.boxes)
                sizes.append((frame.width, frame.height))
                n_pred = len(answer.items) + answer.truncated
                facts.append((n_pred, answer.format_ok, self.final(text)[2], abs(n_pred - target.count)))
        facts = np.array(facts, np.float64).reshape(-1, 4)
        parts = self._score(pred, gt, np.array(sizes, np.float64).reshape(-1, 2), facts)
        total = weigh(parts, PRESETS[self.preset], self.weights)
        if self.thinking:
            parts["think"] = facts[:, 2]
            total = total * (0.5 + 0.5 * facts[:, 2])
        parts |= {"error": facts[:, 3], "format": facts[:, 1]}
        parts = {name: values.reshape(shape).astype(np.float32) for name, values in parts.items()}
        return total.reshape(shape).astype(np.float32), parts

    def _score(self, pred: list, gt: list, sizes: np.ndarray, facts: np.ndarray) -> dict[str, np.ndarray]:
        """Boxes of B answers and of their targets -> parts, (B,) float64 each."""
        n_pred, format_ok = facts[:, 0], facts[:, 1] > 0
        rule = count_set if self.preset == "set" else count_paper
        parts = rule(*(Boxes.pack(b, [[0] * len(x) for x in b]) for b in (pred, gt)), sizes, n_pred)
        unsaid = ~format_ok & ((n_pred == 0) | (self.preset == "paper"))
        return {name: np.where(unsaid, 0.0, values) for name, values in parts.items()}

    def evaluate(self, predictions: Sequence[Mapping], records: Sequence[ImageRecord]) -> dict[str, float | None]:
        """acc, the share of records with as many boxes as there are objects, and mae, the mean error of that number. A
        record without a prediction counts as answered without a box."""
        lines = by_record(predictions, records)
        found = np.array([len(line["items"]) if line else 0 for line in lines])
        error = np.abs(found - np.array([record.target.count for record in records]))
        return {"acc": float((error == 0).mean()), "mae": float(error.mean())}
