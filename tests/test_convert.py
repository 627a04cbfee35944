"""Converters: VOC and page folders into what the loaders read, against hand-written files and real ones."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pr1.data.coco import load_coco
from pr1.data.convert import main
from pr1.data.pages import load_pages

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
OBJECT = """<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>
<ymax>{}</ymax></bndbox></object>"""


def voc(folder: Path, stem: str, *objects, size=(40, 30), image=True) -> None:
    (folder / "Annotations").mkdir(parents=True, exist_ok=True)
    (folder / "JPEGImages").mkdir(exist_ok=True)
    (folder / "Annotations" / f"{stem}.xml").write_text(
        f"<annotation><filename>{stem}.jpg</filename><size><width>{size[0]}</width><height>{size[1]}</height></size>"
        + "".join(OBJECT.format(*o) for o in objects) + "</annotation>"
    )  # fmt: skip
    if image:
        Image.new("RGB", size).save(folder / "JPEGImages" / f"{stem}.jpg")


def test_voc_boxes_and_sets(tmp_path):
    """VOC's first pixel is 1 and its boxes hold their last pixel; difficult objects are ignored; lists make sets."""
    voc(tmp_path / "voc", "b", ("dog", 0, 1, 1, 40, 30), ("cat", 1, 11, 6, 20, 15))
    voc(tmp_path / "voc", "a", ("cat", 0, 5, 5, 5, 5))
    lists = tmp_path / "voc" / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("b\na\n")
    (lists / "val.txt").write_text("a\n\n")
    assert main(["voc", str(tmp_path / "voc"), str(tmp_path / "out")]) == 0
    train = load_coco(tmp_path / "out" / "instances_train.json", tmp_path / "voc" / "JPEGImages", log=print)
    assert train.categories == ("cat", "dog") and train.counts["no_area"] == 1
    first = train[0].target
    assert np.array_equal(first.boxes, [[0, 0, 40, 30], [10, 5, 20, 15]])
    assert first.labels == ("dog", "cat") and list(first.ignore) == [False, True]
    val = load_coco(tmp_path / "out" / "instances_val.json", tmp_path / "voc" / "JPEGImages", log=print)
    assert len(val) == 1 and val.categories == ("cat", "dog") and not val[0].target.labels


def test_voc_without_lists(tmp_path):
    voc(tmp_path / "voc", "x", ("dog", 0, 2, 3, 4, 9))
    assert main(["voc", str(tmp_path / "voc"), str(tmp_path / "out")]) == 0
    data = json.loads((tmp_path / "out" / "instances_all.json").read_text())
    assert data["annotations"][0]["bbox"] == [1, 2, 3, 7] and data["annotations"][0]["area"] == 21


def test_pages(tmp_path):
    folder = tmp_path / "pages"
    (folder / "scans").mkdir(parents=True)
    (folder / "text").mkdir()
    Image.new("1", (20, 20)).save(folder / "scans" / "p1.png")
    Image.new("L", (20, 20)).save(folder / "p2.tif")
    (folder / "text" / "p1.txt").write_text("\ufeffone\ntwo\n", encoding="utf-8")
    (folder / "p2.gold.txt").write_text("three", encoding="utf-8")
    assert main(["pages", str(folder), str(tmp_path / "deep" / "out")]) == 0
    data = load_pages(tmp_path / "deep" / "out" / "pages.jsonl", tmp_path / "deep" / "out", log=print)
    assert {r.id: r.target.text for r in data} == {"p1": "one\ntwo", "p2": "three"}


def test_bad_folders_are_named(tmp_path, capsys):
    folder = tmp_path / "in"

    def fails(kind, says):
        assert main([kind, str(folder), str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and says in error, error

    fails("voc", "no such folder")
    folder.mkdir()
    fails("voc", "no Annotations/*.xml")
    fails("pages", "no page images")
    Image.new("1", (20, 20)).save(folder / "p.png")
    fails("pages", "no text file")
    (folder / "p.txt").write_bytes(b"\xff\xfe\xfa")
    fails("pages", "not UTF-8")
    (folder / "p.gold.txt").write_text("x")
    fails("pages", "2 text files")
    voc(folder, "x", ("dog", 0, 2, 3, "four", 9))
    fails("voc", "x.xml, object 1: <bndbox/xmax> is 'four'")
    voc(folder, "x", ("", 0, 2, 3, 4, 9))
    fails("voc", "x.xml, object 1: <name> is missing")
    (folder / "Annotations" / "x.xml").write_text("<annotation>")
    fails("voc", "x.xml: not a VOC file")


def test_real_voc(tmp_path):
    if not (REAL / "bccd").is_dir():
        pytest.skip(f"{REAL / 'bccd'} is absent")
    assert main(["voc", str(REAL / "bccd"), str(tmp_path)]) == 0
    sets = [
        load_coco(tmp_path / f"instances_{n}.json", REAL / "bccd" / "JPEGImages", log=print) for n in ("train", "val")
    ]
    assert [len(s) for s in sets] == [205, 87] and sets[0].categories == ("Platelets", "RBC", "WBC")
    assert sum(s.counts["no_area"] for s in sets) == 2
    first = next(r for s in sets for r in s if r.source == "BloodImage_00000.jpg")
    assert first.target.boxes[0].tolist() == [259, 176, 491, 376] and first.target.labels[0] == "WBC"
