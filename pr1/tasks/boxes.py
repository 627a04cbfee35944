"""What tasks that are answered with boxes share: boxes read from text, boxes as text can write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pr1.records import Answer, Frame, Item

MAX_COORDINATE = 1e6  # pixels; a box beyond is no box, and its area would overflow
# Texts that hold no answer, with what is wrong with them.
GARBAGE = {"nothing": "", "white space": " \n", "prose": "There are some objects in the image.", "open list": "[",
           "open object": '{"bbox_2d": [', "other JSON": '{"answer": 3}', "number": "3", "lone token": "<|box_end|>"}  # fmt: skip


class FoundBox(NamedTuple):
    """One item of an answer, in the frame of the original image."""

    label: str
    xyxy: np.ndarray | None  # (4,) float64 pixels of the original image; None: not valid
    valid: bool  # False: malformed, inverted, without area or absurd; a wrong prediction
    start: int  # character span in the text
    end: int


def original_boxes(items: Sequence[Item], frame: Frame) -> tuple[np.ndarray, np.ndarray]:
    """Items -> boxes (n, 4) float64 original pixels and (n,) bool whether each is one. Labels do not matter here."""
    nothing = (np.nan,) * 4
    boxes = [nothing if item.box is None else item.box for item in items]
    with np.errstate(all="ignore"):
        xyxy = frame.to_original(np.array(boxes, np.float64).reshape(-1, 4))
        valid = (np.abs(xyxy) <= MAX_COORDINATE).all(1) & (xyxy[:, 2] > xyxy[:, 0]) & (xyxy[:, 3] > xyxy[:, 1])
    return xyxy, valid


def found_boxes(answer: Answer, frame: Frame) -> list[FoundBox]:
    """Every item of an answer, in its order."""
    xyxy, valid = original_boxes(answer.items, frame)
    return [
        FoundBox(item.label, xyxy[i] if valid[i] else None, bool(valid[i]), item.start, item.end)
        for i, item in enumerate(answer.items)
    ]


def shifted(answer: Answer, start: int) -> Answer:
    """An answer read from text[start:], with the spans of the whole text."""
    items = (Item(i.label, i.box, i.start + start, i.end + start, i.valid) for i in answer.items)
    return Answer(tuple(items), answer.format_ok, answer.truncated)


def text_boxes(boxes, frame: Frame) -> np.ndarray:
    """(n, 4) original pixels -> (n, 4) int64 text units. A box that rounding made flat becomes one unit wide, inside
    the image; one without area, which stands for a point, a box around it of up to a fiftieth of the image, its centre
    the nearest whole unit that has room on both sides."""
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    text, ends = frame.to_text(boxes), np.array(frame.text_size)
    point = (boxes[:, 2:] <= boxes[:, :2]).all(1)
    centre = np.clip(text[point, :2], 1, ends - 1)
    half = np.minimum(np.maximum(ends // 100, 1), np.minimum(centre, ends - centre))
    text[point] = np.concatenate([centre - half, centre + half], 1)
    for low, high, end in ((0, 2, frame.text_size[0]), (1, 3, frame.text_size[1])):
        flat = text[:, low] == text[:, high]
        text[:, high] += flat & (text[:, high] < end)
        text[:, low] -= text[:, low] == text[:, high]
    return text
