"""COCO annotations and images: what records hold, what is dropped and counted, and what each kind of bad input says."""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pr1.data import images as image_files
from pr1.data.coco import load_coco
from pr1.tasks import TASKS

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco"


@pytest.fixture
def good(tmp_path):
    """Three images (two JPEG, one PNG) and four objects of two categories."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("b.jpg", (40, 30)), ("a.jpg", (64, 48)), ("c.png", (20, 50))):
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(folder / name)
    data = {
        "images": [
            {"id": 5, "file_name": "b.jpg", "width": 40, "height": 30},
            {"id": 2, "file_name": "a.jpg", "width": 64, "height": 48},
            {"id": 9, "file_name": "c.png", "width": 20, "height": 50},
        ],
        "annotations": [
            {"id": 1, "image_id": 2, "category_id": 7, "bbox": [1, 2, 30.5, 20], "area": 300.5, "iscrowd": 0},
            {"id": 2, "image_id": 5, "category_id": 3, "bbox": [0, 0, 40, 30], "area": 100, "iscrowd": 1},
            {"id": 3, "image_id": 2, "category_id": 3, "bbox": [10, 10, 5, 6]},
            {"id": 4, "image_id": 5, "category_id": 7, "bbox": [30, 20, 10, 10], "area": 0, "iscrowd": 0},
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "hot dog"}],
    }
    return data, folder


def load(data, folder, **options):
    file = folder.parent / "instances.json"
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    lines = []
    loaded = load_coco(file, folder, log=lines.append, **options)
    return loaded, lines


def test_records(good):
    loaded, lines = load(*good)
    assert [record.target.image_id for record in loaded] == [2, 5, 9] and len(loaded) == 3
    assert loaded.categories == ("cat", "hot dog") and loaded.category_ids == {"cat": 7, "hot dog": 3}
    first, second, third = loaded
    assert (first.id, first.source, first.width, first.height) == ("2", "a.jpg", 64, 48)
    assert first.categories == loaded.categories
    assert (
        first.target.boxes.tolist() == [[1, 2, 31.5, 22], [10, 10, 15, 16]] and first.target.boxes.dtype == np.float64
    )
    assert first.target.labels == ("cat", "hot dog") and first.target.ignore.tolist() == [False, False]
    assert first.target.areas.tolist() == [300.5, 30.0]
    assert second.target.ignore.tolist() == [True, False] and second.target.areas.tolist() == [100, 100]
    assert third.target.boxes.shape == (0, 4) and third.target.labels == () and third.target.ignore.shape == (0,)
    assert loaded[1:].records == (second, third) and loaded[1:].category_ids == loaded.category_ids
    assert loaded[-1] is third
    assert lines == [f"{good[1].parent / 'instances.json'}: 3 images (1 without objects), 4 boxes (1 crowd regions), "
                     "2 categories"]  # fmt: skip


def test_pixels(good):
    data, folder = good
    loaded, _ = load(data, folder)
    for record in pickle.loads(pickle.dumps(loaded.records)):  # records travel to worker processes
        image = record.load()
        assert image.mode == "RGB" and image.size == (record.width, record.height)
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(folder / record.source)))


@pytest.mark.parametrize("mode", ["L", "CMYK", "1", "P", "RGBA", "LA"])
def test_other_modes_become_rgb(good, mode):
    data, folder = good
    data["images"][2]["file_name"] = name = "c.jpg" if mode in ("L", "CMYK") else "c.png"
    colours = Image.open(folder / "c.png")
    colours.convert(mode).save(folder / name)
    image = load(data, folder)[0][2].load()
    assert image.mode == "RGB"
    expected = np.asarray(colours.convert(mode).convert("RGB"), int)
    assert np.abs(np.asarray(image, int) - expected).mean() < (20 if name == "c.jpg" else 0.01)


def test_exif_orientation_is_not_applied(good):
    data, folder = good
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    Image.open(folder / "a.jpg").save(folder / "a.jpg", exif=exif)
    assert Image.open(folder / "a.jpg").getexif()[0x0112] == 6
    assert load(data, folder)[0][0].load().size == (64, 48)


def test_dropped_and_clipped_boxes_are_counted(good):
    data, folder = good
    data["annotations"] += [
        {"id": 5, "image_id": 9, "category_id": 7, "bbox": [-5, 10, 10, 60], "area": 700.0},
        {"id": 6, "image_id": 9, "category_id": 7, "bbox": [4, 4, 0, 5]},
        {"id": 7, "image_id": 9, "category_id": 7, "bbox": [4, 4, 5, -5]},
        {"id": 8, "image_id": 9, "category_id": 7, "bbox": [20, 0, 5, 5]},
        {"id": 9, "image_id": 9, "category_id": 7, "bbox": [0, 0, 20.0000000001, 50]},  # x + width, rounded
    ]
    loaded, lines = load(data, folder)
    assert loaded[2].target.boxes.tolist() == [[0, 10, 5, 50], [0, 0, 20, 50]]
    assert loaded[2].target.areas[0] == 700.0
    assert loaded.counts == {"images": 3, "boxes": 6, "crowd": 1, "clipped": 1, "no_area": 2, "outside": 1,
                             "empty_images": 0}  # fmt: skip
    assert "dropped 2 boxes without area and 1 outside their image, clipped 1" in lines[1] and len(lines) == 2


def test_boxes_that_look_like_corners_are_reported(good):
    data, folder = good
    data["annotations"] = [{"image_id": 2, "category_id": 7, "bbox": [20, 20, 60, 40]} for _ in range(3)]
    assert "WARNING" in load(data, folder)[1][-1] and "[x, y, width, height]" in load(data, folder)[1][-1]


def change(path, value):
    """A function that puts `value` at `path` of the annotations; `None` removes what is there."""

    def apply(data, folder):
        here = data
        for key in path[:-1]:
            here = here[key]
        if value is None:
            del here[path[-1]]
        else:
            here[path[-1]] = value

    return apply


def cut(name, share):
    def apply(data, folder):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(len(whole) * share)])

    return apply


def deep(data, folder):
    Image.fromarray(np.zeros((50, 20), np.uint16)).save(folder / "c.png")


BAD = {
    "no categories": (change(["categories"], []), "no categories"),
    "no images": (change(["images"], []), "no images.*nothing to train"),
    "images key": (change(["images"], None), "not COCO instances but a file without a list 'images'"),
    "annotations key": (change(["annotations"], None), "without a list 'annotations'"),
    "captions": (change(["annotations"], [{"image_id": 2, "id": 1, "caption": "A cat."}]), "COCO captions.*instances"),
    "captions file": (lambda d, f: (d.pop("categories"), d["annotations"][0].update(caption="x")), "COCO captions"),
    "category id": (change(["annotations", 2, "category_id"], 4), r"annotation 3 \(image 2, a.jpg\).*category_id 4"),
    "image of annotation": (change(["annotations", 0, "image_id"], 77), "annotation 1 is of image id 77"),
    "list as image id": (change(["annotations", 0, "image_id"], [2]), r"annotation 1 is of image id \[2\]"),
    "annotation": (change(["annotations", 0], 3), "annotation entry 0 is not an object"),
    "three numbers": (
        change(["annotations", 0, "bbox"], [1, 2, 3]),
        r"annotation 1 .*bbox \[1, 2, 3\].*4 finite numbers",
    ),
    "no bbox": (change(["annotations", 0, "bbox"], None), "bbox None.*4 finite numbers"),
    "nan": (change(["annotations", 0, "bbox"], [1, 2, 3, float("nan")]), "4 finite numbers"),
    "inf": (change(["annotations", 0, "bbox"], [1, 2, 3, float("inf")]), "4 finite numbers"),
    "huge": (change(["annotations", 0, "bbox"], [1, 2, 3, 10**400]), "4 finite numbers"),
    "text": (change(["annotations", 0, "bbox"], ["1", 2, 3, 4]), "4 finite numbers"),
    "duplicate image": (change(["images", 0, "id"], 2), "duplicate image id 2.*b.jpg and a.jpg"),
    "duplicate category": (change(["categories", 0, "id"], 3), "duplicate category id 3"),
    "duplicate name": (change(["categories", 0, "name"], " hot dog"), "duplicate category name 'hot dog'"),
    "no name": (change(["categories", 0, "name"], None), "category .* has no id and name"),
    "empty name": (change(["categories", 0, "name"], " "), "name of category 7 is empty"),
    "no file name": (change(["images", 1, "file_name"], None), "image entry 1 has no whole-number id and file_name"),
    "text id": (change(["images", 1, "id"], "2"), "image entry 1 has no whole-number id"),
    "no width": (change(["images", 1, "width"], None), "image 2 .a.jpg. has no width and height"),
    "no size": (change(["images", 1, "height"], 0), "image 2 .a.jpg. has no width and height"),
    "other size": (change(["images", 1, "width"], 65), "a.jpg: the image is 64x48, but annotated as 65x48.*--images"),
    "missing files": (
        lambda d, f: [(f / n).unlink() for n in ("b.jpg", "c.png")],
        "2 of 3 .*missing.*b.jpg, c.png.*--images",
    ),
    "cut JPEG": (cut("a.jpg", 0.7), "1 of 3 image files.*a.jpg: the image is broken or truncated.*replace"),
    "cut PNG": (cut("c.png", 0.7), "c.png: the image is broken or truncated"),
    "empty file": (cut("b.jpg", 0), "b.jpg: not a readable image"),
    "16 bits": (deep, "c.png: its pixels are of mode I;16.*8 bits"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("many", [False, True])
def test_bad_input(good, kind, many, monkeypatch):
    """many: as in a set of more than 2,000 images, of which only the end of each file is read."""
    data, folder = copy.deepcopy(good[0]), good[1]
    spoil, message = BAD[kind]
    spoil(data, folder)
    if many:
        monkeypatch.setattr(image_files, "FULL_DECODE", 0)
    with pytest.raises(ValueError, match=rf"(?s){message}") as raised:
        load(data, folder)
    assert str(folder.parent) in str(raised.value)


def test_a_long_check_decodes_only_files_without_an_end(good, monkeypatch):
    data, folder = good
    with open(folder / "a.jpg", "ab") as file:
        file.write(b"appended by a camera")
    Image.open(folder / "c.png").save(folder / "c.bmp")
    data["images"][2]["file_name"] = "c.bmp"
    monkeypatch.setattr(image_files, "FULL_DECODE", 0)
    decoded, original = [], Image.Image.load

    def spy(image):
        decoded.append(Path(image.filename).name)
        return original(image)

    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.load", spy, raising=False)
    load(data, folder)
    assert "a.jpg" in decoded and "b.jpg" not in decoded


def test_unverified_files_fail_when_they_are_loaded(good):
    data, folder = good
    cut("a.jpg", 0.7)(data, folder)
    Image.new("RGB", (41, 30)).save(folder / "b.jpg")
    loaded, _ = load(data, folder, verify=False)
    with pytest.raises(ValueError, match="a.jpg: the image cannot be decoded"):
        loaded[0].load()
    with pytest.raises(ValueError, match="b.jpg: the image is 41x30, but annotated as 40x30"):
        loaded[1].load()


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not JSON"),
        ('{"images": [', "not JSON.*downloaded whole"),
        ("[" * 100_000, "not JSON"),
        (
            '[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}]',
            "a list, such as COCO results.*--predictions",
        ),
        ("3", "not COCO instances"),
        ('{"annotations": 3}', "not COCO instances"),
    ],
)
def test_files_that_are_no_instances(good, text, message):
    with pytest.raises(ValueError, match=f"(?s)instances.json.*{message}"):
        load(text, good[1])


def test_missing_paths(good):
    data, folder = good
    with pytest.raises(ValueError, match="none.json: there is no such annotation file.*--data"):
        load_coco(folder / "none.json", folder)
    with pytest.raises(ValueError, match="there is no such annotation file"):
        load_coco(folder, folder)
    file = folder.parent / "instances.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"none: there is no such folder of images.*--images"):
        load_coco(file, folder / "none")
    with pytest.raises(ValueError, match="read without their images.*--images"):
        TASKS["det"].load(str(file), None)[0].load()
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="instances.json: not JSON"):
        load_coco(file, folder)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no {DATA}")
@pytest.mark.parametrize("split, images, boxes, crowds", [("train2017", 215, 2035, 19), ("val2017", 82, 759, 11)])
def test_real_coco(split, images, boxes, crowds):
    file, lines = DATA / "annotations" / f"instances_{split}.json", []
    loaded = load_coco(file, DATA / split, log=lines.append)
    assert (len(loaded), loaded.counts["boxes"], loaded.counts["crowd"]) == (images, boxes, crowds)
    assert len(loaded.categories) == 80 and loaded.categories[0] == "person" and loaded.category_ids["toothbrush"] == 90
    raw = {}
    for entry in json.loads(file.read_text())["annotations"]:
        raw.setdefault(entry["image_id"], []).append(entry)
    for record in loaded:
        x, y, w, h = np.array([e["bbox"] for e in raw.get(record.target.image_id, [])]).reshape(-1, 4).T
        assert np.allclose(record.target.boxes, np.stack([x, y, x + w, y + h], 1), atol=1e-9)
        assert record.target.ignore.tolist() == [bool(e["iscrowd"]) for e in raw.get(record.target.image_id, [])]
        assert (record.target.boxes >= 0).all() and (record.target.boxes[:, 2] <= record.width).all()
    assert loaded[0].load().size == (loaded[0].width, loaded[0].height)
