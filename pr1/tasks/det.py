"""Detection: every object of the image, as boxes with class names.

Reward `set`: predictions are assigned to targets one to one, only within a class and above IoU .5: as many pairs as
there are, and of those assignments the one with the least normalised L1 + GIoU. A pair is worth
q = clip((IoU - .5) / .5, 0, 1), the continuous form of COCO's average over IoU .5:.95; the reward is the harmonic mean
of precision sum(q) / n_pred and recall sum(q) / n_gt (soft F1). So neither leaving objects out, nor repeating boxes,
nor a box of the wrong class pays. `paper` and the relatives' rewards: `pr1.rewards.detection`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from pr1.coco_metric import coco_results, det_metrics, read_predictions
from pr1.data.coco import CocoDataset, load_coco
from pr1.data.scenes import SceneDataset, SceneOptions
from pr1.families import FAMILIES
from pr1.matcher import Boxes
from pr1.records import Answer, ImageRecord, Sample
from pr1.rewards import PRESETS, check_weights, score
from pr1.tasks.boxes import GARBAGE, FoundBox, found_boxes, original_boxes, shifted, text_boxes
from pr1.tasks.common import TaskOptions, group_size
from pr1.tasks.rungs import box_ladders

# Of one answer at most this many boxes (or twice the targets, if more) are matched; the others count as wrong. It
# limits the time an answer of thousands of boxes can take; the precision of such an answer is near 0 anyway.
MAX_MATCHED = 300


@dataclass(frozen=True)
class DetTask(TaskOptions):
    """See `pr1.tasks.Task`."""

    name: ClassVar[str] = "det"
    presets: ClassVar[tuple[str, ...]] = tuple(PRESETS)
    warm_start: ClassVar[str] = "tiny-qwen2.5-vl"
    paths_from_data: ClassVar[bool] = False  # COCO keeps images elsewhere

    def __post_init__(self):
        super().__post_init__()
        check_weights(PRESETS[self.preset].weights, self.weights, self.preset)

    def load(self, data: str, images: str | None, **options) -> CocoDataset:
        """COCO instances file and image folder (None: annotations alone) -> records; `options`: see `load_coco`."""
        return load_coco(data, images, **options)

    def rendered(self, split: str, n: int, difficulty: float, *, duplicates: float = 0.0) -> SceneDataset:
        """n rendered scenes of a split ("train" or "val")."""
        return SceneDataset(split, n, SceneOptions.at(difficulty, duplicates=duplicates))

    def messages(self, record: ImageRecord) -> list[dict]:
        """The prompt of Perception-R1's training (arXiv 2504.07954), used for training and evaluation alike; {names}
        in a prompt of the user's own stands for the class names."""
        names = ", ".join(record.categories)
        text = self.request("Please output bbox coordinates and names of {names}.", names=names)
        return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]

    def build(self, record: ImageRecord, family) -> Sample:
        """Record -> sample; decodes the image. Raises ValueError naming the source if it cannot be decoded."""
        sample = super().build(record, family)
        return replace(sample, target=replace(sample.target, categories=record.categories))

    def answer(self, sample: Sample) -> str:
        """The target as the family writes it: boxes to be found, sorted by x1, then y1 (then as annotated)."""
        return self._write(sample, self._items(sample))

    def _items(self, sample: Sample) -> list[tuple[str, tuple[int, ...]]]:
        """(label, box in text units) of the boxes to be found, in the order of the answer."""
        target, frame = sample.target, sample.frames[0]
        rows = [i for i in np.lexsort((target.boxes[:, 1], target.boxes[:, 0])) if not target.ignore[i]]
        return [(target.labels[i], tuple(box)) for i, box in zip(rows, text_boxes(target.boxes[rows], frame).tolist())]

    def _write(self, sample: Sample, items) -> str:
        return self.spoken(FAMILIES[sample.frames[0].family].format_boxes(items))

    def parse(self, text: str, sample: Sample) -> Answer:
        """Reads an answer, in text units. Raises on no text."""
        start, end, _ = self.final(text)
        answer = FAMILIES[sample.frames[0].family].parse_boxes(text[start:end])
        return shifted(answer, start) if start else answer

    def boxes(self, text: str, sample: Sample) -> list[FoundBox]:
        """Every item of an answer, in its order. One without a label is not valid."""
        answer = self.parse(text, sample)
        found = found_boxes(answer, sample.frames[0])
        return [
            box if item.valid else box._replace(xyxy=None, valid=False)
            for box, item in zip(found, answer.items, strict=True)
        ]

    def reward(
        self, texts: Sequence[Sequence[str]], samples: Sequence[Sample], *, progress: float = 1.0
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """texts: P lists of G answers -> (P, G) float32 and its parts, each (P, G) float32. Raises on no text.

        Parts are those of the preset (`pr1.rewards.detection`), with `thinking` also think: 1 if the form is right,
        without it an answer is worth half. progress: share of the training done, for presets with a schedule.

        Malformed items count as wrong predictions, and so does what an answer breaks off in. Nothing predicted where
        there is nothing to find is worth 1, if it was said in form; text without an answer is worth 0. An ignore region
        is never a target; a prediction of its class with more than half of its own area inside counts neither way,
        unless its pair is worth more than 0.
        """
        shape = (len(samples), group_size(texts, samples))
        if 0 in shape:
            empty = np.zeros(shape, np.float32)
            thought = ["think"] if self.thinking else []
            return empty, {name: empty.copy() for name in [*PRESETS[self.preset].weights, *thought]}
        pred, gt, facts = self._read(texts, samples)
        sizes = np.repeat([(s.frames[0].width, s.frames[0].height) for s in samples], shape[1], axis=0)
        rewards, parts = score(pred, gt, sizes, n_pred=facts[:, 0], n_known=facts[:, 1], format_ok=facts[:, 2] > 0,
                               preset=self.preset, weights=self.weights, progress=progress)  # fmt: skip
        if self.thinking:
            think = np.array([[self.final(text)[2] for text in answers] for answers in texts], np.float64).ravel()
            rewards, parts = rewards * (0.5 + 0.5 * think), {**parts, "think": think}
        return rewards.reshape(shape).astype(np.float32), {
            name: np.asarray(values).reshape(shape).astype(np.float32) for name, values in parts.items()
        }

    def _read(self, texts, samples) -> tuple[Boxes, Boxes, np.ndarray]:
        """The boxes of the answers and, beside each, its targets; facts (P * G, 3) int64: items, those with a usable
        box of a known class, whether the whole text is one well-formed answer."""
        xyxy, labels, facts, codes = [], [], [], {}  # codes: one number for each class that has a target
        gt_boxes, gt_labels, gt_ignore = [], [], []
        for answers, sample in zip(texts, samples, strict=True):
            target = sample.target
            known = {*target.categories, *target.labels} if target.categories else None
            wanted = np.array([codes.setdefault(label, len(codes)) for label in target.labels], np.int64)
            most = max(MAX_MATCHED, 2 * int((~target.ignore).sum()))
            read = [self.parse(text, sample) for text in answers]
            found, usable = original_boxes([item for answer in read for item in answer.items], sample.frames[0])
            first = 0
            for answer in read:
                items, last = answer.items, first + len(answer.items)
                rows = [
                    i for i, item in enumerate(items, first)
                    if usable[i] and items[i - first].valid and (known is None or item.label in known)
                ]  # fmt: skip
                # An answer that breaks off counts one more, or a policy learns to stop inside a box it is not sure of.
                facts.append((len(items) + answer.truncated, len(rows), answer.format_ok))
                rows = rows[:most]
                xyxy.append(found[rows])
                labels.append([items[i - first].label for i in rows])
                first = last
            gt_boxes += [target.boxes] * len(answers)
            gt_labels += [wanted] * len(answers)
            gt_ignore += [target.ignore] * len(answers)
        other = len(codes)  # every class without a target
        pred = Boxes.pack(xyxy, [[codes.get(label, other) for label in row] for row in labels])
        return pred, Boxes.pack(gt_boxes, gt_labels, gt_ignore), np.array(facts, np.int64)

    def expressible(self, sample: Sample) -> Sample:
        """The sample with its boxes rounded to what the family can write; what is rounded without area, one unit."""
        frame, target = sample.frames[0], sample.target
        return replace(sample, target=replace(target, boxes=frame.to_original(text_boxes(target.boxes, frame))))

    def ladders(self, sample: Sample) -> dict[str, list[str]]:
        """See `pr1.tasks.rungs.box_ladders`."""
        rungs = box_ladders(self._items(sample), sample)
        exact = self.answer(sample)
        rungs = {name: [self._write(sample, items) for items in steps] for name, steps in rungs.items()}
        cut = exact.rfind(",")  # inside the last box; of an empty answer nothing is left to cut
        if cut > 0:
            rungs["truncated"] = [exact, exact[:cut]]
        return {name: list(dict.fromkeys(steps)) for name, steps in rungs.items()}

    def zeros(self, sample: Sample) -> dict[str, str]:
        """Texts without an answer; an empty answer where there is something to find, a box where there is nothing."""
        box = (0, 0, *sample.frames[0].text_size)
        name = [*sample.target.categories, "object"][0]
        wrong = ("empty for non-empty", []) if self._items(sample) else ("a box for nothing", [(name, box)])
        return {**GARBAGE, wrong[0]: self._write(sample, wrong[1])}

    def read_predictions(self, file: str, records) -> list[dict]:
        """Lines as eval.py writes them, or a COCO results list; see `pr1.coco_metric.read_predictions`."""
        return read_predictions(file, records.category_ids)

    def evaluate(self, predictions: Sequence[Mapping], records: Sequence[ImageRecord]) -> dict[str, float | None]:
        """COCO metrics of predictions in the original frame; a record without a line counts as an empty answer."""
        if not len(records):
            raise ValueError("there is nothing to evaluate on: no image records")
        return det_metrics(coco_results(predictions, records[0].categories), records)
