"""Counting: prompt, target text, rewards against hand-worked numbers, ladders for boxes, points and bare numbers,
metrics, scenes. Frames as in tests/test_ground.py: text units are pixels."""

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_ground import NAMES, Unit, check_ladders

from pr1.data.scenes import COLOURS
from pr1.families import FAMILIES
from pr1.records import ImageRecord, NamedTarget, Sample
from pr1.tasks.count import CountTask

COUNT, PAPER = CountTask(), CountTask(preset="paper")
DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco"
A, B, C = (100, 100, 300, 300), (400, 100, 600, 300), (700, 700, 900, 800)
ZERO = {"qwen2_5_vl": "[]", "qwen2_vl": "<|object_ref_start|>cat<|object_ref_end|>"}


def make_target(boxes=(), count=None):
    """Boxes, or points of two numbers, or a bare count."""
    boxes = np.array([[*box, *box][:4] if len(box) == 2 else box for box in boxes], np.float64).reshape(-1, 4)
    return NamedTarget(boxes, ("cat",) * len(boxes), np.zeros(len(boxes), bool), name="cat",
                       count=len(boxes) if count is None else count)  # fmt: skip


def make_sample(boxes=(), family="qwen2_5_vl", count=None, width=1000, height=1000, scale=1.0):
    frame = Unit(width, height, width, height, family, scale)
    return Sample("7", "count", [], (None,), (frame,), make_target(boxes, count))


def text_of(boxes, family="qwen2_5_vl", label="cat"):
    return FAMILIES[family].format_boxes([(label, box) for box in boxes] or [(label, None)])


def value(text, sample, task=COUNT):
    rewards, parts = task.reward([[text]], [sample])
    return float(rewards[0, 0]), {name: float(values[0, 0]) for name, values in parts.items()}


def around(*centres, half=10):
    return [(x - half, y - half, x + half, y + half) for x, y in centres]


# ---- prompt and target text ---------------------------------------------------------------------------------------


def test_prompt_is_the_papers():
    record = ImageRecord("7", "", 9, 9, make_target([A]), ("cat",), lambda: Image.new("RGB", (9, 9)))
    text = "Output all the bounding boxes of the cat"
    assert COUNT.messages(record) == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    task = CountTask(prompt="How many {label}?", thinking=True)
    assert task.messages(record)[0]["content"][1]["text"].startswith("How many cat? Output the thinking process")


@pytest.mark.parametrize("family", NAMES)
def test_answer(family):
    assert COUNT.answer(make_sample([B, C, A], family)) == text_of([A, B, C], family)
    assert COUNT.answer(make_sample([], family)) == ZERO[family]
    # points: boxes of a fiftieth of the image around them, smaller at an edge
    points = [(500, 300), (4, 600), (1000, 0)]
    assert COUNT.answer(make_sample(points, family)) == text_of(
        [(0, 590, 8, 610), (490, 290, 510, 310), (998, 0, 1000, 2)], family
    )
    once = COUNT.expressible(make_sample([*points, (0.4, 999.7), (333.3, 77.5)], family, scale=0.31))
    assert np.array_equal(COUNT.expressible(once).target.boxes, once.target.boxes)
    assert np.abs(once.target.boxes[:, :2] - [*points, (0.4, 999.7), (333.3, 77.5)]).max() < 1.5 / 0.31
    with pytest.raises(ValueError, match=r"sample 7: only the count is known \(3\).*give points or boxes"):
        COUNT.answer(make_sample([], family, count=3))


# ---- rewards ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize(
    "boxes, expected",
    [
        ([A, B, C], 1.0),
        ([C, A, B], 1.0),
        ([A, B], 0.5 * 4 / 5),
        ([A, B, C, C], 0.5 * 6 / 7),
        ([A, B, B], 0.5 * 4 / 6),  # the right number, but not of the objects
        ([A, B, (0, 0, 20, 20)], 0.5 * 4 / 6),
        ([A, B, (720, 700, 920, 800)], 0.5 + 0.5 * (2 + (180 / 220 - 0.5) / 0.5) / 3),
        ([A, B, (800, 700, 1000, 800)], 0.5 + 0.5 * 2 / 3),  # IoU 1/3: on the object, worth nothing
        ([A, B, (890, 700, 990, 800)], 0.5 * 4 / 6),  # IoU below .1: not on it
        ([], 0.0),
    ],
)
def test_golden_boxes(family, boxes, expected):
    reward, parts = value(text_of(boxes, family), make_sample([A, B, C], family))
    assert reward == pytest.approx(expected, abs=1e-6)
    assert parts["error"] == abs(len(boxes) - 3) and parts["format"] == 1.0 and parts["exact"] == (expected >= 0.5)


def test_golden_points():
    sample = make_sample([(200, 200), (800, 600)])
    for shift, q in ((0, 1.0), (30, 0.7), (100, 0.0)):
        reward, parts = value(text_of(around((200, 200), (800, 600 + shift))), sample)
        assert reward == pytest.approx(0.5 + 0.5 * (1 + q) / 2) and parts["exact"] == 1.0
    assert value(text_of(around((200, 200), (800, 701))), sample)[0] == pytest.approx(0.25)
    assert value(text_of(around((200, 200), (800, 600), half=150)), sample)[0] == 1.0  # extents are not known
    wide = make_sample([(400, 100)], width=2000, height=500)  # thousandths of either side
    assert value(text_of(around((440, 100), half=20)), wide)[0] == pytest.approx(0.5 + 0.5 * 0.8)
    assert value(text_of(around((400, 110), half=20)), wide)[0] == pytest.approx(0.5 + 0.5 * 0.8)


def test_golden_bare_counts():
    sample = make_sample(count=4)
    for n in range(9):
        expected = 0.5 * (n == 4) + 0.5 * 2 * min(n, 4) / (n + 4)
        assert value(text_of(around(*[(50 * i + 50, 500) for i in range(n)])), sample)[0] == pytest.approx(expected)
    assert value(text_of(around((1, 5), half=0)), make_sample(count=1))[0] == 0.0  # no box at all


@pytest.mark.parametrize("family", NAMES)
def test_golden_paper(family):
    """The released reward: 100 units off .929, 8 of 9 .889, 300 off .788."""
    one = make_sample([(300, 500)], family)
    nine = [(100 * i + 50, 500) for i in range(9)]
    assert value(text_of(around((400, 500)), family), one, PAPER)[0] == pytest.approx(0.929, abs=5e-4)
    assert value(text_of(around((300, 800)), family), one, PAPER)[0] == pytest.approx(0.788, abs=5e-4)
    assert value(text_of(around(*nine[1:]), family), make_sample(nine, family), PAPER)[0] == pytest.approx(8 / 9)
    boxes = make_sample([(200, 400, 400, 600)], family)  # boxes are compared by their centres
    assert value(text_of(around((400, 500)), family), boxes, PAPER)[0] == pytest.approx(0.929, abs=5e-4)
    assert value("I see: " + text_of(around((300, 500)), family), one, PAPER)[0] == 0.0  # the gate
    assert value(ZERO[family], make_sample([], family), PAPER)[0] == 1.0 and value(ZERO[family], one, PAPER)[0] == 0.0
    assert value(text_of(around((5, 5), half=5), family), make_sample([], family), PAPER)[0] == 0.0


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("task", [COUNT, PAPER])
def test_zero(family, task):
    nothing = make_sample([], family)
    assert value(ZERO[family], nothing, task)[0] == 1.0 and value(text_of([A], family), nothing, task)[0] == 0.0
    for text in ("", "zero", "0", "[", ZERO[family] + " cats", text_of([A], family)[:-12]):
        assert value(text, nothing, task)[0] == 0.0, text


def test_malformed_boxes_labels_and_weights():
    sample = make_sample([A, B])
    bad = ', {"bbox_2d": [1, 2, 3], "label": "cat"}]'
    assert value(text_of([A, B])[:-1] + bad, sample)[0] == pytest.approx(0.5 * 4 / 5)
    assert value(text_of([A])[:-1] + bad, sample)[0] == pytest.approx(0.5 * 2 / 4)  # makes up no number
    assert value(text_of([A, B])[:-1] + ', {"bbox_2d": [4', sample)[0] == pytest.approx(0.5 * 4 / 5)
    assert value(text_of([A, B], label="dog"), sample)[0] == 1.0
    weighted = CountTask(weights=(("f1", 0.0), ("recall", 2.0)))
    assert value(text_of([A]), sample, weighted)[0] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="--reward-weights names 'iou'"):
        CountTask(weights=(("iou", 1.0),))


def test_thinking():
    task, sample = CountTask(thinking=True), make_sample([A])
    assert value(f"<think></think><answer>{text_of([A])}</answer>", sample, task)[0] == 1.0
    assert value(text_of([A]), sample, task)[0] == 0.5 and value(text_of([A]), sample, task)[1]["think"] == 0.0


def test_a_wrong_count_is_never_worth_a_right_one():
    rng, texts, samples, right = random.Random(1), [], [], []
    for _ in range(200):
        objects = [
            (x := rng.randrange(800), y := rng.randrange(800), x + 60, y + 80) for _ in range(rng.randrange(1, 6))
        ]
        kept = [tuple(v + rng.randrange(-25, 26) for v in box) for box in objects if rng.random() < 0.9]
        kept += [(5, 5, 25, 25)] * rng.choice([0, 0, 0, 1])
        samples.append(make_sample(objects))
        texts.append([text_of(kept)])
        right.append(len(kept) == len(objects))
    rewards, parts = COUNT.reward(texts, samples)
    assert (rewards[~np.array(right)] < 0.5).all()
    exact = parts["exact"] == 1
    assert (rewards[exact] >= 0.5).all() and not exact[~np.array(right)].any() and 30 < exact.sum() < 190
    assert (parts["error"][:, 0] == [abs(t[0].count("bbox_2d") - s.target.count) for t, s in zip(texts, samples)]).all()


def test_a_long_answer_takes_no_time_and_is_worth_little():
    sample = make_sample([A, B, C])
    text = text_of([A, B, C] + [(i % 900, i // 900, i % 900 + 9, i // 900 + 9) for i in range(1500)])
    assert 0 < value(text, sample)[0] < 0.005
    many = [(10 * (i % 90), 10 * (i // 90), 10 * (i % 90) + 9, 10 * (i // 90) + 9) for i in range(400)]
    assert value(text_of(many), make_sample(many))[0] == 1.0


# ---- ladders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("scale", [1.0, 0.31])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 10, 40])
def test_ladders_fall_strictly(family, scale, n):
    rng = random.Random(n)
    row = [(20 * i, 500, 20 * i + 66, 570) for i in range(n)]  # each lies on the next one, shifted by 30 %
    crowd = [(x := rng.random() * 900, y := rng.random() * 900, x + rng.choice([1, 9, 99]), y + rng.choice([1, 9, 99]))
             for _ in range(n)]  # fmt: skip
    points = [(rng.random() * 1000, rng.random() * 1000) for _ in range(n)]
    dense = [(500 + 3 * (i % 7), 500 + 3 * (i // 7)) for i in range(n)]
    for boxes in (row, crowd, points, dense):
        check_ladders(COUNT, make_sample(boxes, family, scale=scale))


def test_location_moves_the_largest_box_alone():
    ladder = COUNT.ladders(make_sample([A, B, (700, 700, 900, 1000)]))["location y"]
    assert ladder[1:] == [text_of([A, B, (700, 700 + d, 900, 1000 + d)]) for d in (6, 30, 90)]


@pytest.mark.parametrize("family", NAMES)
def test_ladders_of_bare_counts(family):
    for n in (1, 2, 3, 30):
        sample = make_sample([], family, count=n)
        ladders = COUNT.ladders(sample)
        assert not [name for name in ladders if "location" in name]
        for ladder in ladders.values():
            values = COUNT.reward([ladder], [sample])[0][0]
            assert values[0] == 1.0 and (np.diff(values) < 0).all()
        assert (COUNT.reward([list(COUNT.zeros(sample).values())], [sample])[0] == 0).all()


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data is not here")
@pytest.mark.parametrize("family", NAMES)
def test_real_data(family, tmp_path):
    from tiny_models import make_tiny

    from pr1.families import load_family

    folder = load_family(make_tiny(tmp_path / family, family))
    file = DATA / "annotations" / "instances_val2017.json"
    records = COUNT.load(str(file), str(DATA / "val2017"), verify=False, log=lambda _: None)
    assert len(records) == 303 and len({r.id for r in records}) == 303
    lines = []
    for record in records[::10]:
        sample = COUNT.build(record, folder)
        check_ladders(COUNT, sample)
        items = [{"label": f.label, "bbox": f.xyxy.tolist()} for f in COUNT.boxes(COUNT.answer(sample), sample)]
        lines.append({"id": record.id, "text": "", "items": items})
    assert COUNT.evaluate(lines, records[::10]) == {"acc": 1.0, "mae": 0.0}


# ---- evaluation ---------------------------------------------------------------------------------------------------


def test_metrics():
    records = [ImageRecord(str(i), "", 9, 9, make_target(count=n), (), None) for i, n in enumerate((0, 2, 3, 5))]
    predictions = [{"id": "1", "items": [{}] * 2}, {"id": "2", "items": [{}] * 7}, {"id": "3", "items": [{}] * 4}]
    assert COUNT.evaluate(predictions, records) == {"acc": 2 / 4, "mae": (0 + 0 + 4 + 1) / 4}
    with pytest.raises(ValueError, match="ids that the data does not have"):
        COUNT.evaluate([{"id": "x", "items": []}], records)


# ---- rendered scenes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("difficulty", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_scenes_count_what_they_show(difficulty):
    scenes = COUNT.rendered("train", 150, difficulty)
    counts = []
    for i, record in enumerate(scenes):
        colour, noun = record.target.name.split()
        shown = [s for s in scenes.scene(i).shapes if s.label == colour]
        assert noun == "object" and colour in COLOURS and record.target.count == len(shown)
        assert sorted(record.target.boxes.tolist()) == sorted([s.x, s.y, s.x + s.width, s.y + s.height] for s in shown)
        counts.append(len(shown))
    assert 5 < counts.count(0) < 40 and max(counts) >= round(2 + 4 * difficulty)


def test_scenes_annotated_twice():
    once, twice = COUNT.rendered("train", 80, 0.25), COUNT.rendered("train", 80, 0.25, duplicates=0.6)
    counts = np.array([(a.target.count, b.target.count) for a, b in zip(once, twice, strict=True)])
    assert all(a.target.name == b.target.name for a, b in zip(once, twice, strict=True))
    assert (counts[:, 1] >= counts[:, 0]).all() and 1.4 < counts[:, 1].sum() / counts[:, 0].sum() < 1.8
    assert (counts[counts[:, 0] == 0, 1] == 0).all()
