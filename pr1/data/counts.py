"""Things to be counted: COCO instances by image and category, and JSON Lines of points or bare counts (PixMo-Count)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from pr1.data.coco import CocoDataset, load_coco
from pr1.data.entries import ImageFiles, first, numbers, read_entries, short
from pr1.data.images import load_image, verify_images
from pr1.records import ImageRecord, NamedTarget

EXPECTED = '{"image": path, "label": str, "points": [[x, y], ...] or "count": n}'
ABSENT_EVERY = 3  # of so many images of a COCO set one is also asked about a category that it does not show


def load_counts(
    file: str | Path, images_dir: str | Path | None, *, verify: bool = True, log: Callable[[str], None] = print
) -> tuple[ImageRecord, ...]:
    """Reads COCO instances (see `count_categories`) or JSON Lines / a JSON list in one of these layouts:

    - ours and PixMo-Count's: {image, label, points: [[x, y], ...] or [{x, y}, ...] in pixels}, or count: n alone;
    - Perception-R1: {image, problem, clicks: [[x, y], ...] in thousandths of the image}, and for evaluation
      {image_path, question, ground_truth: n}.

    Records: `categories` is the label alone, `target` a NamedTarget, `id` the position in the file from 0 (COCO: image
    id and category). images_dir=None reads the annotations alone, to score predictions; verify=False skips decoding the
    images. Raises ValueError naming file, entry and remedy.
    """
    if not Path(file).is_file():
        raise ValueError(f"{file}: there is no such file; give COCO instances or lines of {EXPECTED} (--data)")
    if _is_coco(file):
        return count_categories(load_coco(file, images_dir, verify=verify, log=log), str(file), log)
    images, records = ImageFiles(images_dir), []
    for number, (where, entry) in enumerate(read_entries(file, EXPECTED)):
        name, path, size = images.find(where, entry)
        label = first(entry, "label", "question", "problem")
        if not isinstance(label, str) or not label.strip():
            raise ValueError(f"{where}: no label; {EXPECTED} is expected")
        target = _target(where, entry, label.strip(), size, number)
        records.append(ImageRecord(id=str(number), source=f"{where} ({name})", width=size[0], height=size[1],
                                   target=target, categories=(label.strip(),), load=partial(load_image, path, size)))  # fmt: skip
    if verify:
        verify_images(str(file), images.sizes)
    places = sum(len(r.target.boxes) > 0 for r in records)
    zero = sum(r.target.count == 0 for r in records)
    log(f"{file}: {len(records)} counts, {places} with points, {zero} of nothing")
    return tuple(records)


def count_categories(dataset: CocoDataset, where: str, log: Callable[[str], None]) -> tuple[ImageRecord, ...]:
    """One record for each category an image shows, and of every third image, and of those without objects, one for a
    category it does not show (picked by the image's id). A category with a crowd region is left out: its number is
    not known."""
    records, counts = [], Counter()
    for number, image in enumerate(dataset):
        target, shown = image.target, set(image.target.labels)
        crowds = {label for label, ignore in zip(target.labels, target.ignore, strict=True) if ignore}
        asked = [name for name in dataset.categories if name in shown - crowds]
        absent = [name for name in dataset.categories if name not in shown]
        if absent and (number % ABSENT_EVERY == 0 or not shown):
            asked.append(absent[target.image_id * 7919 % len(absent)])
        counts["crowds"] += len(crowds)
        for name in asked:
            rows = [i for i, label in enumerate(target.labels) if label == name]
            wanted = NamedTarget(target.boxes[rows], (name,) * len(rows), np.zeros(len(rows), bool),
                                 image_id=target.image_id, name=name, count=len(rows))  # fmt: skip
            records.append(replace(image, id=f"{image.id}-{name}", source=f"{image.source} ({name})", target=wanted,
                                   categories=(name,)))  # fmt: skip
            counts["zero"] += not rows
    if not records:
        raise ValueError(f"{where}: nothing to count; every category of every image has a crowd region")
    log(f"{where}: {len(records)} counts, {counts['zero']} of nothing; left out {counts['crowds']} with crowd regions")
    return tuple(records)


def _is_coco(file: str | Path) -> bool:
    """Whether the file is one JSON object, told from its first line: not a list, nor an object that is an entry."""
    with open(file, encoding="utf-8", errors="replace") as handle:
        line = handle.readline(1 << 20).strip()
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return line.startswith("{")
    return isinstance(value, dict) and "annotations" in value


def _target(where: str, entry: dict, label: str, size: tuple[int, int], number: int) -> NamedTarget:
    key = next((key for key in ("points", "clicks", "count", "ground_truth") if entry.get(key) is not None), None)
    if key is None:
        raise ValueError(f"{where}: neither points nor a count; {EXPECTED} is expected")
    stated = first(entry, "count", "ground_truth")
    if stated is not None and (type(stated) is not int or stated < 0):
        raise ValueError(f"{where}: the count is {short(stated)}; it must be a whole number from 0 on")
    points = np.zeros((0, 2)) if key in ("count", "ground_truth") else _points(where, entry[key], key, size)
    if len(points) and stated is not None and stated != len(points):
        raise ValueError(f"{where}: the count is {stated} but there are {len(points)} {key}; correct one of them")
    boxes = np.concatenate([points, points], 1)
    count = len(points) if stated is None else stated
    return NamedTarget(boxes, (label,) * len(boxes), np.zeros(len(boxes), bool), image_id=number, name=label,
                       count=count)  # fmt: skip


def _points(where: str, values, key: str, size: tuple[int, int]) -> np.ndarray:
    """(n, 2) float64 pixels."""
    if isinstance(values, list):
        rows = [numbers([v.get("x"), v.get("y")] if isinstance(v, dict) else v, 2) for v in values]
    if not isinstance(values, list) or any(row is None for row in rows):
        raise ValueError(f"{where}: {key} is {short(values)}; it must be a list of [x, y], finite numbers")
    points = np.array(rows).reshape(-1, 2)
    if size == (0, 0):
        return points  # only their number counts when predictions are scored
    if key == "clicks":
        points = points * np.array(size) / 1000
    outside = np.flatnonzero((points < 0).any(1) | (points > np.array(size)).any(1))
    if len(outside):
        x, y = points[outside[0]]
        units = "thousandths of the image" if key == "clicks" else "pixels of the stored image"
        raise ValueError(f"{where}: the point ({x:g}, {y:g}) lies outside the image of {size[0]}x{size[1]} pixels; {key} "
                         f"are [x, y] in {units}")  # fmt: skip
    return points
