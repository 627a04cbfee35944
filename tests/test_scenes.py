"""Rendered scenes: boxes are the drawn pixels, the streams are deterministic and disjoint, the options hold."""

import hashlib
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pr1.data.scenes import (
    COLOURS,
    LABELS,
    SHAPES,
    SceneDataset,
    SceneOptions,
    paint,
    render,
    shape_mask,
)


def fingerprint(record) -> str:
    image = record.load()
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()


def changed_box(before: np.ndarray, after: np.ndarray) -> tuple[int, int, int, int]:
    """Half-open bounding box of the pixels that differ, by exhaustive look at rows and columns."""
    ys, xs = np.nonzero((before != after).any(-1))
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


def test_boxes_are_the_drawn_pixels():
    ds = SceneDataset("train", 200)
    seen = 0
    for i in range(200):
        scene, target = ds.scene(i), ds[i].target
        drawn = []
        for shape in scene.shapes:
            plain = np.full((scene.height, scene.width, 3), 200, np.int16)
            alone = plain.copy()
            paint(alone, [shape])
            drawn.append((shape.label, *changed_box(plain, alone)))
        listed = [(label, *box) for label, box in zip(target.labels, target.boxes.tolist(), strict=True)]
        assert sorted(drawn) == sorted(listed)
        assert target.boxes.dtype == np.float64 and target.boxes.shape == (len(drawn), 4)
        assert [tuple(b[1::-1]) for b in target.boxes] == sorted(tuple(b[1::-1]) for b in target.boxes)
        seen += len(drawn)
    assert seen > 500


def test_a_rendered_object_fills_its_box():
    """The same, seen from the final image: no noise, no clutter, one object, whatever the ground."""
    options = SceneOptions(min_objects=1, max_objects=1, noise=0, clutter=0)
    ds = SceneDataset("val", 60, options)
    for i in range(60):
        shape = ds.scene(i).shapes[0]
        pixels = np.asarray(ds[i].load())
        hit = (pixels == np.array(COLOURS[shape.label])).all(-1)
        ys, xs = np.nonzero(hit)
        assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == ds[i].target.boxes[0].tolist()
        assert pixels.shape == (ds[i].height, ds[i].width, 3)


@pytest.mark.parametrize("label", SHAPES)
def test_masks_touch_all_four_edges(label):
    for size in range(12, 253):
        for height in (size,) if label not in ("triangle", "cross") else (size, max(7, round(size / 1.6))):
            for mask in (shape_mask(label, size, height), shape_mask(label, height, size)):
                assert mask[0].any() and mask[-1].any() and mask[:, 0].any() and mask[:, -1].any(), (size, height)


def test_mask_areas_are_those_of_the_shapes():
    """Share of the box at 200 px against the areas known from geometry (the star's, of a regular pentagram, is
    5 * sin(36 deg) * (inner radius) * R^2 over a box of 2 sin(72 deg) R by (1 + cos(36 deg)) R)."""
    inner = np.cos(np.radians(72)) / np.cos(np.radians(36))
    star = 5 * np.sin(np.radians(36)) * inner / (2 * np.sin(np.radians(72)) * (1 + np.cos(np.radians(36))))
    circle = np.pi / 4
    known = {"square": 1, "circle": circle, "ring": circle * (1 - 4 / 9), "cross": 5 / 9, "triangle": 0.5, "star": star}
    for label in SHAPES:
        assert shape_mask(label, 200, 200).mean() == pytest.approx(known[label], abs=0.02), label


def test_shapes_are_told_apart_at_the_smallest_size():
    masks = [shape_mask(label, 18, 18) for label in SHAPES]
    for a in range(6):
        for b in range(a):
            assert (masks[a] != masks[b]).mean() > 0.15, (SHAPES[a], SHAPES[b])


@pytest.mark.parametrize("difficulty", [0.0, 0.5, 1.0])
def test_every_object_stays_visible(difficulty):
    options = SceneOptions.at(difficulty)
    ds = SceneDataset("train", 150, options)
    least = 1.0
    for i in range(150):
        scene = ds.scene(i)
        top = np.full((scene.height, scene.width), -1)
        for k, s in enumerate(scene.shapes):
            assert 0 <= s.x and s.x + s.width <= scene.width and 0 <= s.y and s.y + s.height <= scene.height
            top[s.y : s.y + s.height, s.x : s.x + s.width][s.mask] = k
        for k, s in enumerate(scene.shapes):
            least = min(least, (top == k).sum() / s.mask.sum())
    assert least >= 1 - options.max_overlap - 1e-12
    assert least == 1.0 if difficulty == 0 else least < 0.95  # overlaps do occur when allowed


def test_statistics():
    options = SceneOptions()
    ds = SceneDataset("train", 3000, options)
    scenes = [ds.scene(i) for i in range(3000)]
    counts = np.bincount([len(s.shapes) for s in scenes], minlength=7) / 3000
    assert len(counts) == 7
    assert counts[0] == pytest.approx(0.04, abs=0.015)  # 4 standard errors
    assert counts[6] == pytest.approx(0.15 + 0.81 / 6, abs=0.035)
    assert counts[1:6] == pytest.approx(np.full(5, 0.81 / 6), abs=0.027)
    shapes = [s for scene in scenes for s in scene.shapes]
    names = np.array([SHAPES.index(s.name) for s in shapes])
    labels = np.array([LABELS.index(s.label) for s in shapes])
    table = np.histogram2d(names, labels, bins=(6, 8))[0] / len(shapes)
    assert table == pytest.approx(np.full((6, 8), 1 / 48), abs=0.006)  # the shape tells nothing of the label
    long = [max(s.width, s.height) for s in shapes]
    assert min(long) == options.min_size and 0.9 * options.max_size <= max(long) <= options.max_size
    sides = np.array([(s.width, s.height) for s in scenes])
    assert sides.min() == options.min_side and sides.max() == options.max_side and (sides % 28 != 0).mean() > 0.9
    # attention windows of 112 px after rounding to 28: both one alone and several
    windows = {-(-round(w / 28) // 4) * -(-round(h / 28) // 4) for w, h in sides.tolist()}
    assert {1, 2, 4} <= windows


@pytest.mark.parametrize(
    "fields", [{"min_objects": 16, "max_objects": 16, "min_size": 12}, {"min_objects": 6, "min_size": 19}]
)
def test_crowds_find_their_places(fields):
    options = SceneOptions(min_side=84, max_side=84, max_size=80, max_overlap=0.0, **fields)  # the fullest allowed
    ds = SceneDataset("val", 200, options)
    assert {len(ds.scene(i).shapes) for i in range(200)} == {options.max_objects}


def test_deterministic_by_index_alone():
    ds = SceneDataset("train", 50, seed=7)
    forward = [fingerprint(ds[i]) for i in range(50)]
    assert [fingerprint(ds[i]) for i in reversed(range(50))] == forward[::-1]
    longer = SceneDataset("train", 10_000, seed=7)
    assert [fingerprint(longer[i]) for i in range(50)] == forward
    assert fingerprint(ds[-1]) == forward[-1]
    assert fingerprint(pickle.loads(pickle.dumps(ds[3]))) == forward[3]  # a loader's worker may draw it
    assert forward != [fingerprint(r) for r in SceneDataset("train", 50, seed=8)]


def digest() -> str:
    ds = SceneDataset("val", 5, SceneOptions(min_side=112, max_side=252, max_size=90), seed=3)
    return hashlib.sha256(b"".join(r.load().tobytes() + r.target.boxes.tobytes() for r in ds)).hexdigest()


def test_bytes_are_the_same_everywhere():
    """In another process with another hash seed; and as written down, which only a change of the scenes may change."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_scenes; print(test_scenes.digest())"
    here = str(Path(__file__).parent)
    env = os.environ | {"PYTHONHASHSEED": "5"}
    other = subprocess.run([sys.executable, "-c", code, here], env=env, capture_output=True, text=True, check=True)
    assert digest() == other.stdout.strip() == "9caa7f3dd253ff8024354fe7caa99c669819dab6ae054df2df72cc11b1aae100"


def test_train_and_val_never_meet():
    """By pixels for some, by layout for many; also across seeds whose keys lie next to each other."""
    train = {fingerprint(r) for r in SceneDataset("train", 400)}
    val = {fingerprint(r) for r in SceneDataset("val", 400)}
    assert len(train) == len(val) == 400 and not train & val
    options = SceneOptions(min_objects=1, max_objects=2)
    layouts = []
    for seed in (0, 1, 2):
        for split in ("train", "val"):
            ds = SceneDataset(split, 1000, options, seed)
            layouts += [(s.width, s.height, s.shapes) for s in map(ds.scene, range(1000))]
    assert len(set(layouts)) == 6000


def test_records():
    ds = SceneDataset("val", 30, SceneOptions(min_objects=0, empty=0.5, crowded=0.0))
    records = list(ds)
    assert len(records) == len(ds) == 30 and len({r.id for r in records}) == 30
    r = records[17]
    assert (r.id, r.source, r.target.image_id, r.target.image) == ("val-17", "scene 17 of val", 17, 0)
    assert r.categories == ds.categories == LABELS and not r.target.ignore.any() and r.target.areas is None
    assert r.load().mode == "RGB" and r.load().size == (r.width, r.height)
    empties = [r for r in records if not r.target.labels]
    assert empties and all(r.target.boxes.shape == (0, 4) and r.target.ignore.shape == (0,) for r in empties)
    with pytest.raises(IndexError, match="30"):
        ds[30]
    with pytest.raises(IndexError):
        ds[-31]


def test_noise_and_clutter_are_bounded():
    quiet, loud = (SceneDataset("train", 1, SceneOptions(noise=n, clutter=0)) for n in (0, 8))
    a, b = (np.asarray(render(ds.scene(0)), np.int16) for ds in (quiet, loud))
    assert set(np.unique(b - a)) == set(range(-8, 9))


def test_difficulty():
    assert SceneOptions.at(0.5) == SceneOptions()
    assert SceneOptions.at(1.0, noise=0) == SceneOptions(
        max_objects=10, min_size=12, max_overlap=0.4, noise=0, clutter=8
    )
    for percent in range(101):
        SceneOptions.at(percent / 100)
    assert SceneOptions.at(0.0) == SceneOptions(max_objects=2, min_size=24, max_overlap=0.0, noise=0, clutter=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SceneOptions(min_objects=7), "min_objects = 7: must lie between 0 and 6"),
        (lambda: SceneOptions(max_objects=0), "max_objects = 0"),
        (lambda: SceneOptions(max_objects=2.5), "max_objects = 2.5: must be a whole number"),
        (lambda: SceneOptions(min_side=300, max_side=250), "min_side = 300: must lie between 28 and 250"),
        (lambda: SceneOptions(min_size=5, max_size=60), "min_size = 5: must lie between 12 and 60"),
        (lambda: SceneOptions(max_size=200, min_side=100), "max_size = 200: must lie between 18 and 100"),
        (lambda: SceneOptions(max_overlap=0.7), "max_overlap = 0.7"),
        (lambda: SceneOptions(empty=float("nan")), "empty = nan"),
        (lambda: SceneOptions(empty=0.9, crowded=0.2), "crowded = 0.2"),
        (lambda: SceneOptions(noise=-1), "noise = -1"),
        (lambda: SceneOptions(max_objects=50), "50 objects of 18 px do not fit"),
        (lambda: SceneOptions.at(1.5), "difficulty = 1.5"),
        (lambda: SceneDataset("test", 5), "scene split 'test': must be one of train, val"),
        (lambda: SceneDataset("val", 0), "0 scenes"),
        (lambda: SceneDataset("val", 5, seed=-1), "scene seed -1"),
        (lambda: shape_mask("blob", 20, 20), "unknown shape 'blob'"),
    ],
)
def test_wrong_options_are_named(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_second_annotations():
    """Six objects of ten are marked twice, the second box off by at most a tenth of a side and inside; pixels stay."""
    clean, twice = SceneDataset("train", 400, SceneOptions()), SceneDataset("train", 400, SceneOptions(duplicates=0.6))
    once = second = 0
    for i in range(400):
        a, b = clean[i], twice[i]
        n, extra = len(a.target.labels), b.target.boxes[len(a.target.labels) :]
        assert (b.target.boxes[:n] == a.target.boxes).all() and len(b.target.ignore) == len(b.target.labels)
        once, second = once + n, second + len(extra)
        for box, label in zip(extra, b.target.labels[n:], strict=True):
            near = [
                (np.abs(box - full) <= 0.1 * np.tile(full[2:] - full[:2], 2) + 0.5).all() and name == label
                for full, name in zip(a.target.boxes, a.target.labels, strict=True)
            ]
            assert any(near) and (box >= 0).all() and (box <= [b.width, b.height] * 2).all()
    assert second / once == pytest.approx(0.6, abs=0.05)
    assert clean[3].load().tobytes() == twice[3].load().tobytes()
