"""COCO instances JSON and a folder of images -> image records, everything checked before any long work begins."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from pr1.data.images import load_image, verify_images
from pr1.records import BoxTarget, ImageRecord


@dataclass(frozen=True)
class CocoDataset(Sequence):
    """Image records in order of image id. `category_ids`: name -> COCO id; `counts`: what was read and dropped."""

    records: tuple[ImageRecord, ...]
    categories: tuple[str, ...]
    category_ids: dict[str, int]
    counts: dict[str, int]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index):
        """A record; of a slice the data set of those records."""
        if isinstance(index, slice):
            return replace(self, records=self.records[index])
        return self.records[index]


def load_coco(
    annotation_file: str | Path,
    images_dir: str | Path | None,
    *,
    verify: bool = True,
    log: Callable[[str], None] = print,
) -> CocoDataset:
    """Reads and checks a COCO detection set.

    Boxes become xyxy float64 pixels of the stored image (EXIF orientation is not applied: COCO annotates what is
    stored), clipped to it; `iscrowd` becomes `ignore`; an image without annotations stays, as a true negative. Boxes
    without area or wholly outside are dropped; all of that is counted and logged. `verify=False` skips opening the
    image files, not the check that they exist. `images_dir=None` reads annotations alone, to score predictions: such records do not load.
    Raises ValueError naming file, record and remedy.
    """
    data = _read_instances(annotation_file)
    where = f"{annotation_file}"
    names = _read_categories(where, data["categories"])
    images = _read_images(where, data["images"])
    paths = _find_files(where, images, images_dir) if images_dir is not None else dict.fromkeys(images)
    counts: Counter = Counter(images=len(images), boxes=0, crowd=0, clipped=0, no_area=0, outside=0)
    boxes = _read_boxes(where, data["annotations"], images, names, counts)
    if verify and images_dir is not None:
        verify_images(where, {paths[i]: (image["width"], image["height"]) for i, image in images.items()})
    categories = tuple(names.values())
    records = []
    for image_id in sorted(images):
        image, rows = images[image_id], boxes[image_id]
        target = BoxTarget(
            boxes=np.array([row[0] for row in rows], np.float64).reshape(-1, 4), labels=tuple(row[1] for row in rows),
            ignore=np.array([row[2] for row in rows], bool), image_id=image_id,
            areas=np.array([row[3] for row in rows], np.float64),
        )  # fmt: skip
        size = (image["width"], image["height"])
        records.append(ImageRecord(id=str(image_id), source=image["file_name"], width=size[0], height=size[1],
                                   target=target, categories=categories,
                                   load=partial(load_image, paths[image_id], size)))  # fmt: skip
    counts["empty_images"] = sum(not r.target.labels for r in records)
    _report(log, where, counts, len(categories))
    return CocoDataset(tuple(records), categories, {name: i for i, name in names.items()}, dict(counts))


def _read_instances(file: str | Path) -> dict:
    instances = "give a COCO instances file: {images, annotations with bbox, categories}"
    if not os.path.isfile(file):
        raise ValueError(f"{file}: there is no such annotation file; {instances} (--data)")
    try:
        with open(file, encoding="utf-8") as handle:
            data = json.load(handle)
    except OSError as error:
        raise ValueError(f"{file}: the file cannot be read ({error.strerror}); check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error}); was it downloaded whole? {instances}") from error
    if isinstance(data, list):
        kind = "a list, such as COCO results are"
        raise ValueError(f"{file}: not COCO instances but {kind}; {instances}. Predictions go to --predictions")
    data = data if isinstance(data, dict) else {}
    for key in ("images", "annotations", "categories"):
        if not isinstance(data.get(key), list):
            rows = data.get("annotations")
            captions = isinstance(rows, list) and rows and isinstance(rows[0], dict) and "caption" in rows[0]
            kind = "COCO captions" if captions else f"a file without a list {key!r}"
            raise ValueError(f"{file}: not COCO instances but {kind}; {instances}")
    return data


def _read_categories(where: str, entries: list) -> dict[int, str]:
    names: dict[int, str] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not _is_int(entry.get("id")) or not isinstance(entry.get("name"), str):
            raise ValueError(f'{where}: category {entry!r} has no id and name; write {{"id": 1, "name": "person"}}')
        name = entry["name"].strip()
        if not name:
            raise ValueError(f"{where}: the name of category {entry['id']} is empty; answers name classes, so name it")
        if entry["id"] in names:
            raise ValueError(f"{where}: duplicate category id {entry['id']}; give each category its own")
        if name in names.values():
            raise ValueError(f"{where}: duplicate category name {name!r}; answers name classes, so names must differ")
        names[entry["id"]] = name
    if not names:
        raise ValueError(f"{where}: no categories; a COCO instances file lists them under 'categories'")
    return names


def _read_images(where: str, entries: list) -> dict[int, dict]:
    images: dict[int, dict] = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not _is_int(entry.get("id")) or not isinstance(entry.get("file_name"), str):
            raise ValueError(f"{where}: image entry {number} has no whole-number id and file_name: {_short(entry)}")
        if not all(_is_int(entry.get(key)) and entry[key] > 0 for key in ("width", "height")):
            raise ValueError(f"{where}: image {entry['id']} ({entry['file_name']}) has no width and height in pixels; "
                             "boxes cannot be placed without them: write the size of the stored image")  # fmt: skip
        if entry["id"] in images:
            raise ValueError(f"{where}: duplicate image id {entry['id']} ({images[entry['id']]['file_name']} and "
                             f"{entry['file_name']}); give each image its own id")  # fmt: skip
        images[entry["id"]] = entry
    if not images:
        raise ValueError(f"{where}: no images; the list 'images' is empty, so there is nothing to train or evaluate on")
    return images


def _find_files(where: str, images: dict[int, dict], folder: str | Path) -> dict[int, str]:
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder of images; give the one of {where} (--images)")
    present = set(os.listdir(folder))  # one listing instead of a system call for each of 100,000 files
    paths, missing = {}, []
    for image_id, image in images.items():
        name = image["file_name"]
        paths[image_id] = os.path.join(folder, name)
        if name not in present and not os.path.isfile(paths[image_id]):
            missing.append(name)
    if missing:
        raise ValueError(f"{folder}: {len(missing)} of {len(images)} image files that {where} names are missing, first "
                         f"{', '.join(missing[:3])}; give their folder (--images)")  # fmt: skip
    return paths


def _read_boxes(
    where: str, entries: list, images: dict[int, dict], names: dict[int, str], counts: Counter
) -> dict[int, list[tuple]]:
    """Image id -> [(xyxy, label, ignore, area)], in the order of the file."""
    rows: dict[int, list[tuple]] = {image_id: [] for image_id in images}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: annotation entry {number} is not an object; it is {_short(entry)}")
        if "bbox" not in entry and "caption" in entry:
            raise ValueError(f"{where}: not COCO instances but COCO captions; give the instances file")
        what = f"{where}: annotation {entry.get('id', f'entry {number}')}"
        image = images.get(entry.get("image_id")) if _is_int(entry.get("image_id")) else None
        if image is None:
            raise ValueError(f"{what} is of image id {entry.get('image_id')!r}, which 'images' does not list; "
                             "add the image or remove the annotation")  # fmt: skip
        what += f" (image {image['id']}, {image['file_name']})"
        if not _is_int(entry.get("category_id")) or entry["category_id"] not in names:
            raise ValueError(f"{what} has the unknown category_id {entry.get('category_id')!r}; "
                             "add it to 'categories' or correct the annotation")  # fmt: skip
        x, y, w, h = _bbox(what, entry.get("bbox"))
        box = (x, y, x + w, y + h)
        ends = (float(image["width"]), float(image["height"])) * 2
        clipped = tuple(min(max(v, 0.0), end) for v, end in zip(box, ends, strict=True))
        if w <= 0 or h <= 0:
            counts["no_area"] += 1
        elif clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
            counts["outside"] += 1
        else:
            crowd = bool(entry.get("iscrowd", 0))
            counts["boxes"] += 1
            counts["crowd"] += crowd
            counts["clipped"] += any(abs(a - b) > 1e-6 for a, b in zip(clipped, box, strict=True))  # x + w rounds
            rows[image["id"]].append((clipped, names[entry["category_id"]], crowd, _area(entry, clipped)))
    return rows


def _bbox(what: str, bbox) -> list[float]:
    ok = isinstance(bbox, list) and len(bbox) == 4
    if not ok or not all(_is_number(v) for v in bbox):
        raise ValueError(f"{what} has the bbox {_short(bbox)}; it must be 4 finite numbers, [x, y, width, height]")
    return [float(v) for v in bbox]


def _area(entry: dict, box: tuple) -> float:
    """The annotated area (of the mask, in COCO), which sorts objects into small, medium and large; else the box's."""
    area = entry.get("area")
    if _is_number(area) and area > 0:
        return float(area)
    return float((box[2] - box[0]) * (box[3] - box[1]))


def _report(log: Callable[[str], None], where: str, counts: Counter, n_categories: int) -> None:
    log(f"{where}: {counts['images']} images ({counts['empty_images']} without objects), {counts['boxes']} boxes "
        f"({counts['crowd']} crowd regions), {n_categories} categories")  # fmt: skip
    dropped = counts["no_area"] + counts["outside"]
    if dropped or counts["clipped"]:
        log(f"{where}: dropped {counts['no_area']} boxes without area and {counts['outside']} outside their image, "
            f"clipped {counts['clipped']} that reach beyond it")  # fmt: skip
    if 2 * (dropped + counts["clipped"]) > counts["boxes"] + dropped:
        log(f"{where}: WARNING: that is more than half of the boxes; COCO's bbox is [x, y, width, height], "
            "not [x1, y1, x2, y2], in pixels of the stored image")  # fmt: skip


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    """A finite number that float64 can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1.7e308


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
