"""What the tasks share that name one thing in the prompt and are answered with boxes: `ground` and `count`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pr1.families import FAMILIES
from pr1.records import Answer, Frame, Sample
from pr1.tasks.boxes import GARBAGE, FoundBox, found_boxes, shifted, text_boxes
from pr1.tasks.common import TaskOptions


class NamedTask(TaskOptions):
    """A task whose targets are NamedTargets. What boxes are labelled does not matter: the prompt names one thing."""

    def parse(self, text: str, sample: Sample) -> Answer:
        """Reads an answer, in text units. Raises on no text."""
        start, end, _ = self.final(text)
        return shifted(FAMILIES[sample.frames[0].family].parse_boxes(text[start:end]), start)

    def boxes(self, text: str, sample: Sample) -> list[FoundBox]:
        """Every item of an answer, in its order."""
        return found_boxes(self.parse(text, sample), sample.frames[0])

    def write(self, sample: Sample, boxes: Sequence) -> str:
        """Boxes (n, 4) in text units, all of the target's name, as the sample's family writes them; none of them: `[]`,
        or the name as a phrase without a box."""
        name = sample.target.name
        items = [(name, tuple(int(v) for v in box)) for box in boxes] or [(name, None)]
        return self.spoken(FAMILIES[sample.frames[0].family].format_boxes(items))

    def exact(self, sample: Sample) -> np.ndarray:
        """The boxes of the right answer, (n, 4) int64 text units, sorted by x1, then y1; points as boxes around them,
        and where only a number is known so many boxes of one unit."""
        target = sample.target
        if len(target.boxes) < target.count:
            return np.tile([[0, 0, 1, 1]], (target.count, 1))
        rows = np.lexsort((target.boxes[:, 1], target.boxes[:, 0]))
        return text_boxes(target.boxes[rows], sample.frames[0])

    def expressible(self, sample: Sample) -> Sample:
        """The sample with its boxes, or the points, rounded to what the family can write."""
        frame, target = sample.frames[0], sample.target
        boxes = frame.to_original(text_boxes(target.boxes, frame))
        point = (target.boxes[:, 2:] <= target.boxes[:, :2]).all(1)
        boxes[point] = np.tile((boxes[point, :2] + boxes[point, 2:]) / 2, 2)
        return replace(sample, target=replace(target, boxes=boxes))

    def ladders(self, sample: Sample) -> dict[str, list[str]]:
        """Precision, recall, duplicates, tenfold (n >= 3: less than one missed, less than one spurious) and, where places
        are known, location (of the largest box), the whole image and the units of the other family."""
        exact, frame = self.exact(sample), sample.frames[0]
        n, placed = len(exact), len(sample.target.boxes) > 0
        spurious = np.array([[0, 0, *(max(1, side // 50) for side in frame.text_size)]])
        rungs = {"precision": [np.concatenate([exact, *([spurious] * k)]) for k in sorted({0, 1, n})]}
        if n:
            rungs["recall"] = [exact[k:] for k in sorted({0, 1, n // 2, n})]
            rungs["duplicates"] = [np.tile(exact, (k, 1)) for k in (1, 2, 10)]
        if n >= 3:
            rungs["tenfold, one missed"] = [exact, exact[1:], np.tile(exact, (10, 1))]
            rungs["tenfold, one spurious"] = [exact, np.concatenate([exact, spurious]), np.tile(exact, (10, 1))]
        if placed:
            rungs |= location_ladders(exact)
            if (sample.target.boxes[:, 2:] > sample.target.boxes[:, :2]).any():  # of points the extent is not known
                rungs["whole image"] = [exact, [[0, 0, *frame.text_size]]]
            rungs["wrong frame"] = [exact, other_units(exact, frame)]
        texts = {name: [self.write(sample, boxes) for boxes in steps] for name, steps in rungs.items()}
        if n:
            whole = self.write(sample, exact)
            texts["truncated"] = [whole, whole[: whole.rindex(",")]]  # inside the last box
        return {name: list(dict.fromkeys(steps)) for name, steps in texts.items()}

    def zeros(self, sample: Sample) -> dict[str, str]:
        """Texts without an answer; nothing where there is something, a box where there is nothing."""
        wrong = [] if sample.target.count else [(0, 0, *sample.frames[0].text_size)]
        return {**GARBAGE, "the opposite": self.write(sample, wrong)}


def location_ladders(boxes: np.ndarray) -> dict[str, list[np.ndarray]]:
    """(n, 4) text units -> {axis: rungs}: the largest box moved by 2, 10 and 30 % of its side, whole units.

    One box only: were all moved, one of a row of equal neighbours could come to lie on the next one's target. Small
    boxes cannot be moved by so little; their rungs are equal.
    """
    largest = int(np.argmax(np.prod((boxes[:, 2:] - boxes[:, :2]).astype(float), 1)))
    ladders = {}
    for name, axis in (("location x", 0), ("location y", 1)):
        side = boxes[largest, 2 + axis] - boxes[largest, axis]
        ladders[name] = [boxes]
        for share in (0.02, 0.1, 0.3):
            moved = boxes.copy()
            moved[largest, [axis, 2 + axis]] += int(np.rint(share * side))
            ladders[name].append(moved)
    return ladders


def other_units(boxes: np.ndarray, frame: Frame) -> np.ndarray:
    """(n, 4) text units -> the same places in thousandths; where those are the frame's own, in the model's pixels."""
    own = np.array(frame.text_size * 2)
    other = np.array((1000, 1000) * 2)
    if (own == other).all():
        other = np.array((frame.model_width, frame.model_height) * 2)
    return np.rint(boxes * other / own).astype(np.int64)
