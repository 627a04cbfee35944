"""Referring expressions and counts: every layout that is read, what is left out, and what each kind of bad input says."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pr1.data.counts import load_counts
from pr1.data.refcoco import load_refcoco

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
BOX = [10.0, 5.5, 30.0, 20.0]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train2014").mkdir()
    for name, size in (("a.jpg", (40, 30)), ("train2014/b.png", (64, 48))):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8)).save(tmp_path / name)
    return tmp_path


def load(loader, folder, entries, images=True, **options):
    file, lines = folder / "data.json", []
    listed = isinstance(entries, str)
    file.write_text(entries if listed else "\n".join(json.dumps(e) for e in entries))
    return loader(file, folder if images else None, log=lines.append, **options), lines


def ground(folder, entries, **options):
    return load(load_refcoco, folder, entries, **options)[0]


def count(folder, entries, **options):
    return load(load_counts, folder, entries, **options)[0]


# ---- referring expressions ----------------------------------------------------------------------------------------

LAYOUTS = {
    "ours": {"image": "a.jpg", "expression": "red cat", "bbox_xyxy": BOX},
    "ours, box": {"image": "a.jpg", "expression": " red cat. ", "box": BOX},
    "VLM-R1": {
        "image": "a.jpg", "height": 30, "width": 40, "id": 5, "bbox_list": [BOX], "normal_caption": "red cat",
        "problem": "Please provide the bounding box coordinate of the region this sentence describes: red cat.",
        "solution": BOX, "normalized_solution": [250, 183, 750, 667],
    },
    "VLM-R1, sentence": {
        "image": "a.jpg", "solution": BOX,
        "problem": "Please provide the bounding box coordinate of the region this sentence describes: red cat.",
    },
    "Perception-R1, evaluation": {"image": "a.jpg", "problem": "red cat", "solution": BOX, "normalized_solution": []},
    "Perception-R1, training": {"image": "a.jpg", "problem": "red cat", "solution": "[250, 183.333333333, 750, 666.6666666666]"},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(folder, layout):
    (record,) = ground(folder, [LAYOUTS[layout]])
    target = record.target
    assert (record.id, record.width, record.height, record.categories) == ("0", 40, 30, ("red cat",))
    assert target.boxes.shape == (1, 4) and target.boxes.dtype == np.float64
    assert target.boxes[0].tolist() == pytest.approx(BOX, abs=1e-6)
    assert (target.name, target.labels, target.count, target.ignore.tolist()) == ("red cat", ("red cat",), 1, [False])
    assert record.load().size == (40, 30) and "line 1 (a.jpg)" in record.source


def test_a_list_no_object_and_clipping(folder):
    entries = [
        {"image": "train2014/b.png", "expression": "none", "bbox_xyxy": None},
        {"image": "a.jpg", "expression": "x", "solution": [-1, 0, 41, 29]},
    ]
    (none, clipped), lines = load(load_refcoco, folder, json.dumps(entries))
    assert none.target.boxes.shape == (0, 4) and none.target.count == 0 and none.target.name == "none"
    assert clipped.target.boxes.tolist() == [[0, 0, 40, 29]] and "entry 1 (a.jpg)" in clipped.source
    assert (none.target.image_id, clipped.target.image_id, clipped.id) == (0, 1, "1")
    assert lines == [f"{folder / 'data.json'}: 2 expressions, 1 of them of no object; 1 boxes reached beyond their image "
                     "and were clipped"]  # fmt: skip


def test_annotations_alone(folder):
    entries = [{"image": "gone.jpg", "expression": "x", "box": BOX}, {**LAYOUTS["VLM-R1"], "image": "gone.jpg"}]
    plain, sized = ground(folder, entries, images=False)
    assert (plain.width, sized.width) == (0, 40) and plain.target.boxes.tolist() == [BOX]
    with pytest.raises(ValueError, match="without their images"):
        sized.load()
    with pytest.raises(ValueError, match="thousandths of an image of unknown size; give --images"):
        ground(folder, [LAYOUTS["Perception-R1, training"]], images=False)


GOOD = LAYOUTS["ours"]
BAD_GROUND = {
    "no image": ({**GOOD, "image": None}, "line 1: no image.*from --images"),
    "missing": ({**GOOD, "image": "c.jpg"}, r"line 1: the image .*c.jpg does not exist.*--images"),
    "no expression": ({**GOOD, "expression": " . "}, "line 1: no expression; .*bbox_xyxy"),
    "no box": ({"image": "a.jpg", "expression": "x"}, "line 1: no box; .*null where there is no such object"),
    "COCO bbox": ({"image": "a.jpg", "expression": "x", "bbox": BOX}, r"as \[x1, y1, x2, y2\]"),
    "three numbers": ({**GOOD, "bbox_xyxy": [1, 2, 3]}, r"bbox_xyxy is \[1, 2, 3\]; it must be .*4 finite numbers"),
    "text": ({**GOOD, "bbox_xyxy": [1, 2, "3", 4]}, "4 finite numbers"),
    "nan": ({**GOOD, "bbox_xyxy": [1, 2, float("nan"), 4]}, "4 finite numbers"),
    "huge": ({**GOOD, "bbox_xyxy": [1, 2, 10**400, 4]}, "4 finite numbers"),
    "code": ({**GOOD, "bbox_xyxy": "__import__('os')"}, "4 finite numbers"),
    "xywh": ({**GOOD, "bbox_xyxy": [20, 20, 15, 5]}, r"has no area; it is \[x1, y1, x2, y2\], not \[x, y, width"),
    "outside": ({**GOOD, "bbox_xyxy": [30, 0, 100, 30]}, "lies half or more outside the image of 40x30"),
    "size": (
        {**GOOD, "width": 41, "height": 30},
        "1 of 1 image files.*a.jpg: the image is 40x30, but annotated as 41x30",
    ),
    "list": (["x"], r"line 2: \{.*is expected"),
}


@pytest.mark.parametrize("kind", BAD_GROUND)
def test_bad_expressions(folder, kind):
    entry, message = BAD_GROUND[kind]
    with pytest.raises(ValueError, match=f"(?s)data.json.*{message}"):
        ground(folder, [GOOD, entry] if kind == "list" else [entry])


def test_bad_files(folder):
    for text, message in (("", "no entries"), ("[]", "no entries"), ('{"image": ', "line 1: not JSON"), ("[{", "not JSON"),
                          (json.dumps(GOOD) + "\n[[", "line 2: not JSON"), ("[3]", "entry 0: .*is expected")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ground(folder, text)
    with pytest.raises(ValueError, match="nowhere.json: cannot be read.*--data"):
        load_refcoco(folder / "nowhere.json", folder)
    with pytest.raises(ValueError, match="gone: there is no such folder of images"):
        (folder / "data.json").write_text(json.dumps(GOOD))
        load_refcoco(folder / "data.json", folder / "gone")
    whole = (folder / "a.jpg").read_bytes()
    (folder / "a.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="a.jpg: the image is broken or truncated"):
        ground(folder, [GOOD])
    assert len(ground(folder, [GOOD], verify=False)) == 1


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data is not here")
def test_real_expressions():
    lines = []
    records = load_refcoco(DATA / "refcocos" / "refcocos_train.jsonl", DATA / "refcocos", log=lines.append)
    assert len(records) == 108 and "3 of them of no object; 0 boxes reached" in lines[0]
    raw = [json.loads(line) for line in (DATA / "refcocos" / "refcocos_train.jsonl").read_text().splitlines()]
    for record, entry in zip(records, raw, strict=True):
        assert record.target.name == entry["expression"].strip().rstrip(".").strip()
        assert record.target.boxes.tolist() == ([entry["bbox_xyxy"]] if entry["bbox_xyxy"] else [])


# ---- counts -------------------------------------------------------------------------------------------------------

COUNTS = {
    "pixels": ({"image": "a.jpg", "label": "cats", "points": [[10, 3], [20, 6]]}, [[10, 3], [20, 6]], 2),
    "PixMo": ({"image": "a.jpg", "label": "cats", "count": 1, "points": [{"x": 10.5, "y": 3}]}, [[10.5, 3]], 1),
    "clicks": ({"image": "a.jpg", "problem": "cats", "clicks": [[250, 100], [1000, 1000]]}, [[10, 3], [40, 30]], 2),
    "bare": ({"image": "a.jpg", "label": "cats", "count": 7}, [], 7),
    "evaluation": ({"image_path": "a.jpg", "question": "cats", "ground_truth": 3}, [], 3),
    "nothing": ({"image": "a.jpg", "label": "cats", "points": []}, [], 0),
    "zero": ({"image": "a.jpg", "label": "cats", "count": 0}, [], 0),
    "no points": ({"image": "a.jpg", "label": "cats", "count": 4, "points": None}, [], 4),
}


@pytest.mark.parametrize("layout", COUNTS)
def test_count_layouts(folder, layout):
    entry, points, n = COUNTS[layout]
    for text in ([entry], json.dumps([entry])):
        (record,) = count(folder, text)
        assert record.target.boxes.tolist() == [[*p, *p] for p in points] and record.target.count == n
        assert (record.target.name, record.categories, record.width, record.id) == ("cats", ("cats",), 40, "0")
        assert record.load().size == (40, 30)


BAD_COUNTS = {
    "no label": ({"image": "a.jpg", "label": " ", "count": 1}, "no label"),
    "nothing": ({"image": "a.jpg", "label": "x"}, "neither points nor a count"),
    "negative": ({"image": "a.jpg", "label": "x", "count": -1}, "the count is -1; it must be a whole number from 0"),
    "part": ({"image": "a.jpg", "label": "x", "count": 1.5}, "the count is 1.5; it must be a whole number"),
    "flag": ({"image": "a.jpg", "label": "x", "count": True}, "the count is True"),
    "unequal": ({"image": "a.jpg", "label": "x", "count": 3, "points": [[1, 1]]}, "is 3 but there are 1 points"),
    "no list": ({"image": "a.jpg", "label": "x", "points": 3}, r"points is 3; it must be a list of \[x, y\]"),
    "one number": ({"image": "a.jpg", "label": "x", "points": [[1]]}, r"list of \[x, y\], finite"),
    "half": ({"image": "a.jpg", "label": "x", "points": [{"x": 1}]}, r"list of \[x, y\], finite"),
    "outside": ({"image": "a.jpg", "label": "x", "points": [[41, 1]]}, r"\(41, 1\) lies outside the image of 40x30"),
    "clicks": ({"image": "a.jpg", "label": "x", "clicks": [[1, 1001]]}, "clicks are .* in thousandths"),
    "missing": ({"image": "c.jpg", "label": "x", "count": 1}, "c.jpg does not exist"),
}


@pytest.mark.parametrize("kind", BAD_COUNTS)
def test_bad_counts(folder, kind):
    entry, message = BAD_COUNTS[kind]
    with pytest.raises(ValueError, match=f"data.json, line 1.*{message}"):
        count(folder, [entry])
    with pytest.raises(ValueError, match="nowhere.*there is no such file; give COCO instances or lines"):
        load_counts(folder / "nowhere", folder)


def coco(folder):
    rows = [(1, 1, [1, 1, 9, 9], 0), (1, 1, [20, 5, 9, 9], 0), (1, 2, [3, 3, 8, 8], 0), (1, 3, [0, 0, 30, 20], 1),
            (1, 3, [5, 5, 5, 5], 0), (2, 2, [3, 3, 8, 8], 0)]  # fmt: skip
    return {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 30},
                   {"id": 2, "file_name": "train2014/b.png", "width": 64, "height": 48},
                   {"id": 3, "file_name": "train2014/b.png", "width": 64, "height": 48}],
        "annotations": [{"image_id": i, "category_id": c, "bbox": b, "iscrowd": crowd} for i, c, b, crowd in rows],
        "categories": [{"id": 4, "name": "cow"}, {"id": 1, "name": "cat"}, {"id": 2, "name": "dog"},
                       {"id": 3, "name": "sheep"}],
    }  # fmt: skip


@pytest.mark.parametrize("indent", [None, 1])
def test_coco_counts(folder, indent):
    records, lines = load(load_counts, folder, json.dumps(coco(folder), indent=indent))
    seen = [(r.id, r.target.name, r.target.count, r.target.boxes.tolist()) for r in records]
    assert seen[:3] == [
        ("1-cat", "cat", 2, [[1, 1, 10, 10], [20, 5, 29, 14]]),
        ("1-dog", "dog", 1, [[3, 3, 11, 11]]),  # sheep has a crowd region: how many there are is not known
        ("1-cow", "cow", 0, []),  # every third image is asked about one absent category: images 0, 3, ...
    ]
    assert seen[3][:3] == ("2-dog", "dog", 1) and seen[4][0].startswith("3-") and seen[4][2] == 0 and len(seen) == 5
    assert records[0].categories == ("cat",) and records[0].target.image_id == 1 and records[3].load().size == (64, 48)
    assert "5 counts, 2 of nothing; left out 1 with crowd regions" in lines[-1]


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data is not here")
def test_real_coco_counts():
    file = DATA / "coco" / "annotations" / "instances_train2017.json"
    records = load_counts(file, None, log=lambda _: None)
    raw = json.loads(file.read_text())
    names = {c["id"]: c["name"] for c in raw["categories"]}
    rows = [(str(a["image_id"]), names[a["category_id"]], a["iscrowd"]) for a in raw["annotations"]]
    crowds = {(i, name) for i, name, crowd in rows if crowd}
    plain = [(i, name) for i, name, crowd in rows if not crowd and (i, name) not in crowds]
    found = {tuple(r.id.split("-", 1)): r.target.count for r in records}
    assert {key: n for key, n in found.items() if n} == {key: plain.count(key) for key in set(plain)}
    zero = [key for key, n in found.items() if not n]
    assert not set(zero) & {(i, name) for i, name, _ in rows} and 0.08 < len(zero) / len(found) < 0.15
