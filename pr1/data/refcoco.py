"""Referring expressions, RefCOCO/+/g and your own: one expression, one box in its image or none."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from pr1.data.entries import ImageFiles, first, numbers, read_entries, short
from pr1.data.images import load_image, verify_images
from pr1.records import ImageRecord, NamedTarget

EXPECTED = '{"image": path, "expression": str, "bbox_xyxy": [x1, y1, x2, y2] or null}'
BOX_KEYS = ("bbox_xyxy", "box", "solution")
# What VLM-R1's `problem` puts before the expression.
SENTENCE = "Please provide the bounding box coordinate of the region this sentence describes:"


def load_refcoco(
    file: str | Path, images_dir: str | Path | None, *, verify: bool = True, log: Callable[[str], None] = print
) -> tuple[ImageRecord, ...]:
    """Reads JSON Lines or a JSON list in one of these layouts, entry by entry:

    - ours: {image, expression, bbox_xyxy (or box): [x1, y1, x2, y2] in pixels, or null: there is no such object};
    - VLM-R1: {image, normal_caption or problem (a sentence that ends in the expression), solution: [x1, y1, x2, y2]};
    - Perception-R1: {image, problem (the bare expression), solution}; a list is in pixels (its evaluation files), a text
      "[x1, y1, x2, y2]" in thousandths of the image (its training set).

    Records: `categories` is the expression alone, `target` a NamedTarget with its box or none, `id` is the position in the file, from
    0. Boxes become xyxy float64 pixels, clipped to the image. A box that lies half outside is an error: those are other
    units. images_dir=None reads the annotations alone, to score predictions. verify=False skips decoding the images.
    Raises ValueError naming file, entry and remedy.
    """
    images, records, counts = ImageFiles(images_dir), [], Counter()
    for number, (where, entry) in enumerate(read_entries(file, EXPECTED)):
        name, path, size = images.find(where, entry)
        expression = _expression(where, entry)
        box = _box(where, entry, size, counts)
        boxes = np.zeros((0, 4)) if box is None else box[None]
        target = NamedTarget(boxes, (expression,) * len(boxes), np.zeros(len(boxes), bool), image_id=number,
                             name=expression, count=len(boxes))  # fmt: skip
        records.append(ImageRecord(id=str(number), source=f"{where} ({name})", width=size[0], height=size[1],
                                   target=target, categories=(expression,), load=partial(load_image, path, size)))  # fmt: skip
        counts["none"] += box is None
    if verify:
        verify_images(str(file), images.sizes)
    log(f"{file}: {len(records)} expressions, {counts['none']} of them of no object; {counts['clipped']} boxes reached "
        "beyond their image and were clipped")  # fmt: skip
    return tuple(records)


def _expression(where: str, entry: dict) -> str:
    text = first(entry, "expression", "normal_caption", "problem")
    text = text.strip().removeprefix(SENTENCE).strip().rstrip(".").strip() if isinstance(text, str) else ""
    if not text:
        raise ValueError(f"{where}: no expression; {EXPECTED} is expected")
    return text


def _box(where: str, entry: dict, size: tuple[int, int], counts: Counter) -> np.ndarray | None:
    """(4,) float64 pixels inside the image, or None for no such object."""
    key = next((key for key in BOX_KEYS if key in entry), None)
    if key is None:
        hint = "; write a COCO bbox [x, y, width, height] as [x1, y1, x2, y2]" if "bbox" in entry else ""
        raise ValueError(f"{where}: no box; {EXPECTED} is expected, null where there is no such object{hint}")
    value = entry[key]
    if value is None:
        return None
    thousandths = isinstance(value, str)
    if thousandths:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    box = numbers(value, 4)
    if box is None:
        raise ValueError(
            f"{where}: {key} is {short(entry[key])}; it must be [x1, y1, x2, y2], 4 finite numbers, or null"
        )
    if thousandths:
        if size == (0, 0):
            raise ValueError(f"{where}: {key} is in thousandths of an image of unknown size; give --images")
        box = box * np.array(size * 2) / 1000
    if box[2] <= box[0] or box[3] <= box[1]:
        raise ValueError(f"{where}: {key} {short(entry[key])} has no area; it is [x1, y1, x2, y2], "
                         "not [x, y, width, height], or null where there is no such object")  # fmt: skip
    if size == (0, 0):
        return box
    inside = np.clip(box, 0, np.array(size * 2))
    if 2 * np.prod(inside[2:] - inside[:2]) < np.prod(box[2:] - box[:2]):
        raise ValueError(f"{where}: {key} {short(entry[key])} lies half or more outside the image of "
                         f"{size[0]}x{size[1]}; boxes are [x1, y1, x2, y2] in pixels of the stored image")  # fmt: skip
    counts["clipped"] += bool((inside != box).any())
    return inside
