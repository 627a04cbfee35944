"""COCO average precision by pycocotools, and the files predictions are kept in.

Everything is in pixels of the original image. A prediction of a whole image is one line of a JSONL file,
`{"id", "image_id", "width", "height", "text", "items": [{"label", "bbox": [x1, y1, x2, y2], "score"}]}`; pycocotools is
given COCO results, `{"image_id", "category_id", "bbox": [x, y, width, height], "score"}`, one for each box.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pr1.records import ImageRecord

# Names of the entries of COCOeval.stats that we report.
STATS = {"ap": 0, "ap50": 1, "ap75": 2, "ap_s": 3, "ap_m": 4, "ap_l": 5, "ar100": 8}

Categories = Mapping[str, int] | Sequence[str]


def category_ids(categories: Categories) -> dict[str, int]:
    """Name -> category id. A plain sequence of names is numbered from 1, as `coco_ground_truth` numbers it."""
    if isinstance(categories, Mapping):
        return dict(categories)
    return {name: i for i, name in enumerate(categories, 1)}


def coco_ground_truth(records: Iterable[ImageRecord]) -> dict:
    """Records -> COCO instances (images, annotations, categories). Reads the targets only; no image is loaded.

    Categories are numbered from 1 in the order of `record.categories`; ignore regions become `iscrowd`.
    Raises ValueError for no records, unequal category lists, or an image id that occurs twice.
    """
    records = list(records)
    if not records:
        raise ValueError("there is nothing to evaluate on: no image records")
    names = records[0].categories
    ids = category_ids(names)
    images, annotations, seen = [], [], set()
    for record in records:
        target = record.target
        if record.categories != names:
            raise ValueError(
                f"{record.source}: its categories differ from those of {records[0].source}; evaluate apart"
            )
        if target.image_id in seen:
            raise ValueError(f"{record.source}: image id {target.image_id} occurs twice; evaluation needs unique ids")
        seen.add(target.image_id)
        images.append({"id": target.image_id, "width": record.width, "height": record.height})
        for i, label in enumerate(target.labels):
            x1, y1, x2, y2 = (float(v) for v in target.boxes[i])
            area = (x2 - x1) * (y2 - y1) if target.areas is None else float(target.areas[i])
            annotations.append({
                "id": len(annotations) + 1, "image_id": target.image_id, "category_id": ids[label],
                "bbox": [x1, y1, x2 - x1, y2 - y1], "area": area, "iscrowd": int(target.ignore[i]),
            })  # fmt: skip
    categories = [{"id": i, "name": name} for name, i in ids.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def coco_ap(predictions: Sequence[Mapping], gt: Mapping | Sequence[ImageRecord]) -> dict[str, float | None]:
    """COCO's AP and AR of boxes.

    predictions: COCO results. gt: image records or a COCO instances dict; neither is changed. Returns ap (IoU .5:.95),
    ap50, ap75, ap_s, ap_m, ap_l (area below 32^2, to 96^2, above) and ar100, each 0..1, or None where no object of that
    kind exists (pycocotools says -1). Raises ValueError for a result on an image that is not in `gt`.
    """
    truth = _index(gt if isinstance(gt, Mapping) else coco_ground_truth(gt))
    unknown = {p["image_id"] for p in predictions} - set(truth.imgs)
    if unknown:
        raise ValueError(
            f"predictions name image id {sorted(unknown, key=str)[0]!r} ({len(unknown)} such ids), which the "
            "annotations do not hold; evaluate on the annotation file the predictions were made for"
        )
    boxes = [{key: p[key] for key in ("image_id", "category_id", "bbox", "score")} for p in predictions]
    # An own index rather than COCO.loadRes, which fails on an empty list.
    found = _index({**truth.dataset, "annotations": boxes})
    with contextlib.redirect_stdout(io.StringIO()):
        run = COCOeval(truth, found, "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return {name: None if run.stats[i] < 0 else float(run.stats[i]) for name, i in STATS.items()}


def det_metrics(predictions: Sequence[Mapping], gt: Mapping | Sequence[ImageRecord]) -> dict[str, float | None]:
    """`coco_ap` with every box scored 1.0, as papers on language models do, and `ap_scored` with the scores given."""
    gt = gt if isinstance(gt, Mapping) else coco_ground_truth(gt)
    metrics = coco_ap([{**p, "score": 1.0} for p in predictions], gt)
    return {**metrics, "ap_scored": coco_ap(predictions, gt)["ap"]}


def coco_results(predictions: Iterable[Mapping], categories: Categories) -> list[dict]:
    """Predictions of whole images -> COCO results. A label that is no category has no place in AP and is left out."""
    ids = category_ids(categories)
    results = []
    for prediction in predictions:
        for item in prediction["items"]:
            if item["label"] in ids:
                x1, y1, x2, y2 = (float(v) for v in item["bbox"])
                results.append({"image_id": prediction["image_id"], "category_id": ids[item["label"]],
                                "bbox": [x1, y1, x2 - x1, y2 - y1], "score": float(item["score"])})  # fmt: skip
    return results


def _index(dataset: Mapping) -> COCO:
    coco = COCO()
    # Copies, because COCOeval writes into annotations; ids from 1, because it takes an id of 0 for "not matched".
    annotations = [
        {"iscrowd": 0, "area": a["bbox"][2] * a["bbox"][3], **a, "id": i}
        for i, a in enumerate(dataset["annotations"], 1)
    ]
    coco.dataset = {"images": dataset["images"], "categories": dataset["categories"], "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def read_predictions(file: str | Path, categories: Categories) -> list[dict]:
    """Predictions of whole images, from JSONL as `pr1.predictions` writes it or from a COCO results list.

    categories: those of the annotations to compare with; a results list names classes by their ids. From such a list
    `id`, `width`, `height` and `text` are None, and images without a box are absent. A score that is absent is 1.0.
    Raises ValueError naming the file, the line or entry, and the remedy.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot read the predictions ({error}); give the file that eval.py wrote") from error
    if text.lstrip().startswith("["):
        return _read_results(file, text, category_ids(categories))
    lines, seen = [], {}
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            prediction = _read_line(f"{file}, line {number}", line)
            first = seen.setdefault(prediction["image_id"], number)
            if first != number:
                raise ValueError(
                    f"{file}, line {number}: image id {prediction['image_id']} was on line {first} already; "
                    "keep one line for each image"
                )
            lines.append(prediction)
    return lines


def _read_line(where: str, line: str) -> dict:
    remedy = "write one JSON object a line, as eval.py --predictions does"
    try:
        prediction = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}); {remedy}") from error
    if not isinstance(prediction, dict):
        raise ValueError(f"{where}: not a JSON object; {remedy}")
    for key in ("image_id", "items"):
        if key not in prediction:
            raise ValueError(f"{where}: the key {key!r} is missing; {remedy}")
    if not isinstance(prediction["items"], list):
        raise ValueError(f"{where}: 'items' is not a list; {remedy}")
    _check_id(where, prediction["image_id"])
    items = []
    for i, item in enumerate(prediction["items"]):
        place = f"{where}, item {i}"
        if not isinstance(item, dict) or not isinstance(item.get("label"), str):
            raise ValueError(f"{place}: has no label; an item is {{label, bbox, score}}")
        x1, y1, x2, y2 = _numbers(place, item.get("bbox"), 4, "bbox")
        if x2 < x1 or y2 < y1:
            raise ValueError(f"{place}: bbox {item['bbox']} is inverted; it is [x1, y1, x2, y2] in pixels of the image")
        items.append({**item, "bbox": [x1, y1, x2, y2], "score": _score(place, item)})
    defaults = {"id": None, "width": None, "height": None, "text": None}
    return {**defaults, **prediction, "items": items}


def _read_results(file, text: str, ids: dict[str, int]) -> list[dict]:
    names = {i: name for name, i in ids.items()}
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error}); give COCO results or the JSONL that eval.py wrote") from error
    images: dict[int, dict] = {}
    for number, entry in enumerate(entries):
        place = f"{file}, entry {number}"
        if not isinstance(entry, dict) or not {"image_id", "category_id", "bbox"} <= entry.keys():
            raise ValueError(f"{place}: not a COCO result, which is {{image_id, category_id, bbox, score}}")
        _check_id(place, entry["image_id"])
        category = entry["category_id"]
        if not isinstance(category, int) or category not in names:
            known = ", ".join(map(str, sorted(names)[:10]))
            raise ValueError(f"{place}: category id {category!r} is not among those of the annotations ({known} ...)")
        x, y, w, h = _numbers(place, entry["bbox"], 4, "bbox")
        if w < 0 or h < 0:
            raise ValueError(f"{place}: bbox {entry['bbox']} has a negative size; results hold [x, y, width, height]")
        image = images.setdefault(entry["image_id"], {"id": None, "image_id": entry["image_id"], "width": None,
                                                      "height": None, "text": None, "items": []})  # fmt: skip
        image["items"].append({"label": names[category], "bbox": [x, y, x + w, y + h],
                               "score": _score(place, entry), "category_id": category})  # fmt: skip
    return list(images.values())


def _check_id(where: str, image_id) -> None:
    if not isinstance(image_id, int) or isinstance(image_id, bool):
        raise ValueError(f"{where}: image_id {image_id!r} is not a whole number; use the ids of the annotation file")


def _score(where: str, item: Mapping) -> float:
    return _numbers(where, [item.get("score", 1.0)], 1, "score")[0]


def _numbers(where: str, values, count: int, key: str) -> list[float]:
    """`values` as floats, if they are `count` finite numbers."""
    ok = isinstance(values, (list, tuple)) and len(values) == count
    ok = ok and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    if not ok or not all(abs(v) < math.inf for v in values):  # NaN compares false; a whole number may exceed float64
        raise ValueError(f"{where}: {key} {values!r} is not {count} finite number{'s' if count > 1 else ''}")
    try:
        return [float(v) for v in values]
    except OverflowError as error:
        raise ValueError(f"{where}: {key} is beyond float64") from error
