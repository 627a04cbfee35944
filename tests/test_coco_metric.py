"""COCO metrics against COCO's own published figures and plain pycocotools, and the files predictions are kept in."""

import contextlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pr1.coco_metric import coco_ap, coco_ground_truth, coco_results, det_metrics, read_predictions
from pr1.predictions import write_predictions
from pr1.records import BoxTarget, ImageRecord
from pr1.tasks import TASKS

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
REFERENCE = DATA / "coco_eval_reference"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"no {REFERENCE}")
needs_coco = pytest.mark.skipif(not (DATA / "coco").is_dir(), reason=f"no {DATA / 'coco'}")


def no_pixels():
    raise AssertionError("metrics need no pixels")


def record(image_id, objects, crowds=(), areas=None, categories=("cat", "dog", "cow"), size=(640, 480)):
    rows = [(*o, False) for o in objects] + [(*c, True) for c in crowds]
    target = BoxTarget(
        np.array([box for _, box, _ in rows], np.float64).reshape(-1, 4), tuple(label for label, _, _ in rows),
        np.array([ignore for _, _, ignore in rows], bool), image_id=image_id,
        areas=None if areas is None else np.array(areas, np.float64),
    )  # fmt: skip
    return ImageRecord(str(image_id), f"{image_id}.jpg", *size, target, tuple(categories), no_pixels)


def line(image_id, *items):
    items = [{"label": label, "bbox": list(map(float, box)), "score": score} for label, box, score in items]
    return {"id": str(image_id), "image_id": image_id, "width": 640, "height": 480, "text": "…", "items": items}


def plain(gt_file, results):
    """The twelve figures of pycocotools used as its documentation says."""
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(str(gt_file))
        run = COCOeval(gt, gt.loadRes([dict(r) for r in results]), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run.stats


# ---- AP -----------------------------------------------------------------------------------------------------------


@needs_reference
def test_published_figures(capsys):
    gt = json.loads((REFERENCE / "instances_val2014_100.json").read_text())
    results = json.loads((REFERENCE / "instances_val2014_fakebbox100_results.json").read_text())
    before = json.dumps([gt, results])
    metrics = det_metrics(results, gt)
    assert abs(metrics["ap_scored"] - 0.504580698724963) < 1e-12
    section = (REFERENCE / "val2014_fake_eval_res.txt").read_text().split("type=bbox")[1].split("---")[0]
    figures = [float(v) for v in re.findall(r"\] = (\d\.\d+)", section)]
    scored = coco_ap(results, gt)
    names = ["ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l", None, None, "ar100"]
    assert len(figures) == 12
    for name, figure in zip(names, figures, strict=False):
        assert name is None or round(scored[name], 3) == figure, name
    ones = plain(REFERENCE / "instances_val2014_100.json", [{**r, "score": 1.0} for r in results])
    assert [metrics[name] for name in names if name] == [ones[i] for i in (0, 1, 2, 3, 4, 5, 8)]
    assert metrics["ap"] != metrics["ap_scored"]
    assert json.dumps([gt, results]) == before  # nothing was written into what was given
    assert capsys.readouterr() == ("", "")


@needs_coco
def test_records_agree_with_the_annotation_file():
    """The whole way, records and labels included, against pycocotools on the file itself."""
    file = DATA / "coco" / "annotations" / "instances_val2017.json"
    data = TASKS["det"].load(str(file), str(DATA / "coco" / "val2017"), log=lambda text: None)
    rng, lines = np.random.default_rng(3), []
    for entry in data:
        items = [(label, box, 1.0) for label, box in zip(entry.target.labels, entry.target.boxes, strict=True)]
        items = [
            (label, box + rng.normal(0, 3, 4), float(rng.uniform())) for label, box, _ in items if rng.random() < 0.8
        ]
        items += [("person", (10, 10, 60, 90), 0.3), ("unicorn", (0, 0, 9, 9), 0.9)]
        lines.append(line(entry.target.image_id, *items))
    metrics = TASKS["det"].evaluate(lines, data)
    results = coco_results(lines, data.category_ids)
    assert len(results) == sum(len(entry["items"]) for entry in lines) - len(data)  # no unicorns
    scored, ones = plain(file, results), plain(file, [{**r, "score": 1.0} for r in results])
    assert 0.2 < scored[0] < 0.9
    assert metrics["ap_scored"] == pytest.approx(scored[0], abs=1e-9)
    for name, i in {"ap": 0, "ap50": 1, "ap75": 2, "ap_s": 3, "ap_m": 4, "ap_l": 5, "ar100": 8}.items():
        assert metrics[name] == pytest.approx(ones[i], abs=1e-9), name


def test_hand_worked():
    records = [record(5, [("cat", (10, 10, 110, 110)), ("cat", (200, 200, 220, 220))])]
    exact = [("cat", (10, 10, 110, 110), 0.9), ("cat", (200, 200, 220, 220), 0.8)]
    metrics = TASKS["det"].evaluate([line(5, *exact)], records)
    assert metrics.pop("ap_m") is None
    assert metrics == pytest.approx(dict.fromkeys(("ap", "ap50", "ap75", "ap_s", "ap_l", "ar100", "ap_scored"), 1.0))
    # A false alarm first: precision is 1/2, 2/3 at recall 1/2, 1; interpolated 2/3 at all 101 points. Its own score,
    # the lowest, moves it behind both.
    metrics = TASKS["det"].evaluate([line(5, ("cat", (400, 400, 500, 470), 0.1), *exact)], records)
    assert (metrics["ap"], metrics["ap_scored"]) == pytest.approx((2 / 3, 1.0))
    # IoU .8 counts at .5, .55 ... .8: seven of ten thresholds.
    half = [("cat", (10, 10, 110, 90), 1.0), ("cat", (200, 200, 220, 220), 1.0)]
    metrics = TASKS["det"].evaluate([line(5, *half)], records)
    assert (metrics["ap_l"], metrics["ap_s"], metrics["ap75"]) == pytest.approx((0.7, 1.0, 1.0))


def test_annotated_areas_sort_the_sizes():
    box = ("cat", (0, 0, 200, 200))
    small = TASKS["det"].evaluate([line(1, (*box, 1.0))], [record(1, [box], areas=[100.0])])
    assert small["ap_s"] == pytest.approx(1.0) and small["ap_l"] is None


def test_crowds_cost_nothing_and_earn_nothing():
    records = [record(1, [("cat", (0, 0, 100, 100))], crowds=[("cat", (200, 200, 400, 400))])]
    inside = ("cat", (210, 210, 260, 260), 1.0)
    assert TASKS["det"].evaluate([line(1, inside, ("cat", (0, 0, 100, 100), 1.0))], records)["ap"] > 0.999
    assert TASKS["det"].evaluate([line(1, inside)], records)["ap"] == 0.0
    dog = ("dog", (210, 210, 260, 260), 1.0)
    assert TASKS["det"].evaluate([line(1, dog)], [record(1, [], crowds=[("cat", (0, 0, 9, 9))])])["ap"] is None


def test_no_predictions_and_no_objects():
    records = [record(1, [("cat", (0, 0, 100, 100))]), record(2, [])]
    assert TASKS["det"].evaluate([], records)["ap"] == 0.0
    assert TASKS["det"].evaluate([line(1), line(2)], records)["ar100"] == 0.0
    assert set(TASKS["det"].evaluate([line(2, ("cat", (0, 0, 9, 9), 1.0))], [record(2, [])]).values()) == {None}


def test_annotation_id_zero_is_an_annotation():
    """pycocotools alone takes a match with annotation 0 for no match."""
    gt = {"images": [{"id": 1, "width": 9, "height": 9}], "categories": [{"id": 0, "name": "cat"}],
          "annotations": [{"id": 0, "image_id": 1, "category_id": 0, "bbox": [0, 0, 5, 5]}]}  # fmt: skip
    result = {"image_id": 1, "category_id": 0, "bbox": [0, 0, 5, 5], "score": 0.5}
    assert coco_ap([result], gt)["ap"] == pytest.approx(1.0)


def test_ground_truth_of_records():
    gt = coco_ground_truth([record(3, [("dog", (1, 2, 11, 22))], [("cat", (0, 0, 5, 6))], areas=[150, 30])])
    assert [c["name"] for c in gt["categories"]] == ["cat", "dog", "cow"]
    first, second = gt["annotations"]
    assert (first["bbox"], first["area"], first["iscrowd"], first["category_id"]) == ([1, 2, 10, 20], 150, 0, 2)
    assert (second["bbox"], second["area"], second["iscrowd"], second["image_id"]) == ([0, 0, 5, 6], 30, 1, 3)


def test_bad_ground_truth_and_foreign_images():
    with pytest.raises(ValueError, match="image id 99 .*annotations do not hold"):
        TASKS["det"].evaluate([line(99, ("cat", (0, 0, 9, 9), 1.0))], [record(1, [])])
    with pytest.raises(ValueError, match=r"1\.jpg: image id 1 occurs twice"):
        coco_ground_truth([record(1, []), record(1, [])])
    with pytest.raises(ValueError, match=r"2\.jpg: its categories differ"):
        coco_ground_truth([record(1, []), record(2, [], categories=("cat",))])
    for call in (lambda: TASKS["det"].evaluate([], []), lambda: coco_ground_truth([])):
        with pytest.raises(ValueError, match="nothing to evaluate on"):
            call()


# ---- files --------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    file = tmp_path / "predictions.jsonl"
    lines = [line(1, ("cat", (0.1, 1 / 3, 9.7, 1e-3 + 5), 0.123456789012345)), line(2)]
    lines[1]["text"] = 'two\nlines, "quotes", é, \u2028, \u0085'
    write_predictions(file, lines)
    assert read_predictions(file, ("cat", "dog")) == lines
    write_predictions(file, lines, {"cat": 17})
    assert json.loads(file.read_text(encoding="utf-8").split("\n")[0])["items"][0]["category_id"] == 17
    again = read_predictions(file, {"cat": 17})
    assert coco_results(again, {"cat": 17})[0]["category_id"] == 17
    assert coco_results(again, ("dog", "cat"))[0]["category_id"] == 2
    assert coco_results(again, ("dog",)) == []
    write_predictions(file, [])
    assert read_predictions(file, ("cat",)) == []


@needs_reference
def test_reads_coco_results():
    gt = json.loads((REFERENCE / "instances_val2014_100.json").read_text())
    ids = {category["name"]: category["id"] for category in gt["categories"]}
    lines = read_predictions(REFERENCE / "instances_val2014_fakebbox100_results.json", ids)
    assert sum(len(entry["items"]) for entry in lines) == 734
    assert len({entry["image_id"] for entry in lines}) == len(lines)
    assert abs(coco_ap(coco_results(lines, ids), gt)["ap"] - 0.504580698724963) < 1e-12


def test_scores_default_to_one(tmp_path):
    file = tmp_path / "results.json"
    file.write_text('[{"image_id": 4, "category_id": 2, "bbox": [1, 2, 3, 4]}]')
    (only,) = read_predictions(file, {"cat": 2})
    assert only["items"] == [{"label": "cat", "bbox": [1, 2, 4, 6], "score": 1.0, "category_id": 2}]
    file.write_text('{"image_id": 4, "items": [{"label": "cat", "bbox": [1, 2, 4, 6]}]}')
    (only,) = read_predictions(file, {"cat": 2})
    assert only["items"] == [{"label": "cat", "bbox": [1, 2, 4, 6], "score": 1.0}] and only["text"] is None


GOOD = '{"image_id": 4, "items": []}'


@pytest.mark.parametrize(
    "text, message",
    [
        (GOOD + "\n{", "line 2: not JSON .*one JSON object a line"),
        (GOOD + "\n\n3", "line 3: not a JSON object"),
        ('{"items": []}', "line 1: the key 'image_id' is missing"),
        ('{"image_id": 4}', "line 1: the key 'items' is missing"),
        ('{"image_id": "4", "items": []}', "image_id '4' is not a whole number"),
        ('{"image_id": 4, "items": 3}', "'items' is not a list"),
        ('{"image_id": 4, "items": [{"bbox": [1, 2, 3, 4]}]}', "line 1, item 0: has no label"),
        ('{"image_id": 4, "items": [{"label": "cat"}]}', "item 0: bbox None is not 4 finite numbers"),
        ('{"image_id": 4, "items": [{"label": "cat", "bbox": [1, 2, 3]}]}', "is not 4 finite numbers"),
        ('{"image_id": 4, "items": [{"label": "cat", "bbox": [1, 2, 3, NaN]}]}', "is not 4 finite numbers"),
        ('{"image_id": 4, "items": [{"label": "cat", "bbox": [1, 2, 3, 1%s]}]}' % ("0" * 400), "beyond float64"),
        ('{"image_id": 4, "items": [{"label": "cat", "bbox": [10, 20, 5, 30]}]}', r"inverted.*\[x1, y1, x2, y2\]"),
        ('{"image_id": 4, "items": [{"label": "cat", "bbox": [1, 2, 3, 4], "score": "x"}]}', "score .* finite number"),
        (GOOD + "\n" + GOOD, "line 2: image id 4 was on line 1"),
        ('[{"image_id": 4}]', "entry 0: not a COCO result"),
        ('[{"image_id": 4, "category_id": 9, "bbox": [1, 2, 3, 4]}]', "category id 9 is not among"),
        ('[{"image_id": 4, "category_id": 1, "bbox": [1, 2, -3, 4]}]', "negative size"),
        ('[{"image_id": 4', "not JSON"),
    ],
)
def test_bad_prediction_files(tmp_path, text, message):
    file = tmp_path / "predictions.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"(?s){re.escape(str(file))}.*{message}"):
        read_predictions(file, ("cat", "dog"))


def test_missing_prediction_file(tmp_path):
    with pytest.raises(ValueError, match="none.jsonl: cannot read the predictions"):
        read_predictions(tmp_path / "none.jsonl", ("cat",))
