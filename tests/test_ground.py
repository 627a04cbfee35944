"""Grounding: prompt, target text, reward against hand-worked numbers and a slow reference, ladders, metrics, scenes.

The frame of most tests is 1000 x 1000 pixels in 1000 x 1000 text units for every family, so boxes stand in the text as
they are.
"""

import itertools
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pr1.data.scenes import COLOURS
from pr1.families import FAMILIES
from pr1.records import Frame, ImageRecord, NamedTarget, Sample
from pr1.tasks.ground import GroundTask

NAMES = sorted(FAMILIES)
GROUND = GroundTask()
DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "refcocos"
A = (100, 100, 300, 300)
NONE = {"qwen2_5_vl": "[]", "qwen2_vl": "<|object_ref_start|>red cat<|object_ref_end|>"}


@dataclass(frozen=True)
class Unit(Frame):
    """Text units of `scale` per pixel, read by the family named."""

    family: str = ""
    scale: float = 1.0

    @property
    def text_size(self):
        return round(self.width * self.scale), round(self.height * self.scale)


def make_sample(box=A, family="qwen2_5_vl", name="red cat", width=1000, height=1000, scale=1.0):
    boxes = np.array([] if box is None else [box], np.float64).reshape(-1, 4)
    target = NamedTarget(boxes, (name,) * len(boxes), np.zeros(len(boxes), bool), name=name, count=len(boxes))
    frame = Unit(width, height, width, height, family, scale)
    return Sample(id="7", task="ground", messages=[], images=(None,), frames=(frame,), target=target)


def text_of(boxes, family="qwen2_5_vl", label="red cat"):
    return FAMILIES[family].format_boxes([(label, box) for box in boxes])


def value(text, sample, task=GROUND):
    rewards, parts = task.reward([[text]], [sample])
    assert rewards.shape == (1, 1) and rewards.dtype == np.float32
    return float(rewards[0, 0]), {name: float(values[0, 0]) for name, values in parts.items()}


# ---- prompt and target text ---------------------------------------------------------------------------------------


def record_of(name, box=A):
    return ImageRecord(
        "7", "a.jpg", 1000, 1000, make_sample(box, name=name).target, (name,), lambda: Image.new("RGB", (9, 9))
    )


@pytest.mark.parametrize("name, question", [("red cat", "red cat"), ("The man on top", "man on top"),
                                            ("theatre seat", "theatre seat"), ("a {question}", "a {question}")])  # fmt: skip
def test_prompt_is_the_papers(name, question):
    (message,) = GROUND.messages(record_of(name))
    text = f"Output the bounding box of the {question} in the image."
    assert message == {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}


def test_prompt_of_ones_own_and_thinking():
    task = GroundTask(prompt="Where is {question}? {x}", thinking=True)
    text = task.messages(record_of("the cat"))[0]["content"][1]["text"]
    assert text.startswith("Where is cat? {x} Output the thinking process in <think> </think>")


@pytest.mark.parametrize("family", NAMES)
def test_answer(family):
    expected = {
        "qwen2_5_vl": '[{"bbox_2d": [50, 25, 60, 45], "label": "red cat"}]',
        "qwen2_vl": "<|object_ref_start|>red cat<|object_ref_end|><|box_start|>(50,25),(60,45)<|box_end|>",
    }
    assert GROUND.answer(make_sample((100, 50, 120, 90), family, scale=0.5)) == expected[family]
    assert GROUND.answer(make_sample(None, family)) == NONE[family]
    assert (
        GroundTask(thinking=True).answer(make_sample(None, family)) == f"<think></think><answer>{NONE[family]}</answer>"
    )


def test_boxes_are_original_pixels_with_spans_of_the_whole_text():
    task, sample = GroundTask(thinking=True), make_sample(width=200, height=400, scale=0.5)
    item = '{"bbox_2d": [10, 20, 30, 40], "label": "x"}'
    text = f"<think>hm</think><answer>[{item}]</answer>"
    (found,) = task.boxes(text, sample)
    assert found.xyxy.tolist() == [20.0, 40.0, 60.0, 80.0] and text[found.start : found.end] == item
    assert task.parse(text, sample).format_ok and not GROUND.parse(text, sample).format_ok


# ---- reward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize(
    "boxes, expected",  # the target is 200 x 200
    [
        ([A], 1.0),
        ([(120, 100, 320, 300)], (180 / 220 - 0.5) / 0.5),
        ([(100, 100, 300, 201)], 0.01),  # IoU .505
        ([(100, 100, 300, 200)], 0.0),
        ([(600, 600, 800, 800)], 0.0),
        ([A, (600, 600, 800, 800)], 2 / 3),
        ([(600, 600, 800, 800), A], 2 / 3),  # the best box is taken, wherever it stands
        ([A, A, A], 2 / 4),
        ([(120, 100, 320, 300)] * 9 + [A], 2 / 11),
    ],
)
def test_golden(family, boxes, expected):
    reward, parts = value(text_of(boxes, family), make_sample(family=family))
    assert reward == pytest.approx(expected, abs=1e-6) == parts["set"]
    assert parts["boxes"] == len(boxes) and parts["format"] == (len(boxes) == 1)


@pytest.mark.parametrize("family", NAMES)
def test_no_such_object(family):
    none, some = make_sample(None, family), make_sample(A, family)
    assert value(NONE[family], none)[0] == 1.0
    assert value(text_of([A], family), none)[0] == 0.0
    assert value(NONE[family], some)[0] == 0.0
    for text in ("", "garbage", "[", "no", "null", NONE[family] + " I think", text_of([A], family)[:-12]):
        assert value(text, none)[0] == 0.0, text


def test_labels_do_not_matter_but_form_is_logged():
    sample = make_sample()
    assert value(text_of([A], label="something else"), sample)[0] == 1.0
    reward, parts = value('[{"bbox_2d": [100, 100, 300, 300]}]', sample)
    assert (reward, parts["format"]) == (1.0, 0.0)
    reward, parts = value("Here: " + text_of([A]) + " .", sample)
    assert (reward, parts["format"]) == (1.0, 0.0)


def test_malformed_and_broken_off_boxes_are_wrong_ones():
    sample = make_sample()
    for bad in ('{"bbox_2d": [1, 2, 3], "label": "x"}', '{"bbox_2d": [9, 9, 1, 1], "label": "x"}',
                '{"bbox_2d": [1, 1, 1, 9], "label": "x"}', '{"bbox_2d": [0, 0, 9e6, 9], "label": "x"}'):  # fmt: skip
        assert value(text_of([A])[:-1] + f", {bad}]", sample)[0] == pytest.approx(2 / 3), bad
    assert value(text_of([A])[:-1] + ', {"bbox_2d": [100, 1', sample)[0] == pytest.approx(2 / 3)
    assert value(text_of([A])[:20], sample)[0] == 0.0


@pytest.mark.parametrize("family", NAMES)
def test_paper_and_its_code(family):
    sample, none = make_sample(family=family), make_sample(None, family)
    shifted, far = (120, 100, 320, 300), (600, 600, 800, 800)
    for preset, power in (("paper", 1), ("paper-code", 2)):
        task = GroundTask(preset=preset)
        assert value(text_of([shifted], family), sample, task)[0] == pytest.approx(1 + (180 / 220) ** power)
        assert value(text_of([far, A], family), sample, task)[0] == 0.0  # the first box, and two are not the format
        assert value("<" + text_of([shifted], family), sample, task)[0] == pytest.approx((180 / 220) ** power)
        assert value("<garbage", sample, task)[0] == 0.0  # passes the released format check
        assert value(NONE[family], none, task)[0] == 2.0
        assert value(NONE[family], sample, task)[0] == 1.0
    weighted = GroundTask(preset="paper", weights=(("format", 0.25), ("iou2", 1.0)))
    assert value(text_of([shifted], family), sample, weighted)[0] == pytest.approx(0.25 + 180 / 220 + (180 / 220) ** 2)
    with pytest.raises(ValueError, match="--reward-weights names 'colour'.*iou"):
        GroundTask(preset="paper", weights=(("colour", 1.0),))
    with pytest.raises(ValueError, match="--reward is 'giou'.*paper-code"):
        GroundTask(preset="giou")


def test_thinking_costs_half_without_the_form():
    task, sample, answer = GroundTask(thinking=True), make_sample(), text_of([A])
    assert value(f"<think>x\ny</think>\n<answer>{answer}</answer>", sample, task) == (1.0, {
        "set": 1.0, "iou": 1.0, "iou2": 1.0, "boxes": 1.0, "format": 1.0, "think": 1.0})  # fmt: skip
    assert value(answer, sample, task)[0] == 0.5
    assert value(f"<think>{text_of([A, A])}</think><answer>{answer}</answer>", sample, task)[0] == 1.0
    assert value(f"<think></think>{answer}", sample, task)[0] == 0.5


def reference(boxes, box, said, broken):
    n = len(boxes) + broken
    if box is None:
        return float(n == 0 and said)
    best = 0.0
    for x1, y1, x2, y2 in boxes:
        w, h = min(x2, box[2]) - max(x1, box[0]), min(y2, box[3]) - max(y1, box[1])
        shared = w * h if w > 0 and h > 0 else 0
        iou = shared / ((x2 - x1) * (y2 - y1) + (box[2] - box[0]) * (box[3] - box[1]) - shared)
        best = max(best, (iou - 0.5) / 0.5)
    return 2 * best / (n + 1)


def test_a_batch_equals_the_reference():
    rng, cases = random.Random(3), []
    for _ in range(300):
        x, y = rng.randrange(0, 600), rng.randrange(0, 600)
        box = (x, y, x + rng.randrange(20, 300), y + rng.randrange(20, 300))
        wrong = [tuple(v + rng.randrange(-8, 9) for v in box) for _ in range(rng.choice([0, 1, 1, 1, 2, 5]))]
        broken = rng.random() < 0.2 and len(wrong) > 0
        family, target = rng.choice(NAMES), None if rng.random() < 0.2 else box
        text = text_of(wrong, family) if wrong else NONE[family]
        if broken:
            text += {"qwen2_5_vl": ', {"bbox_2d": [1', "qwen2_vl": "<|box_start|>(1,"}[family]
        cases.append((text, make_sample(target, family), reference(wrong, target, True, broken)))
    rewards, _ = GROUND.reward([[text, "", text] for text, _, _ in cases], [sample for _, sample, _ in cases])
    expected = np.array([r for _, _, r in cases])
    assert np.abs(rewards[:, [0, 2]] - expected[:, None]).max() < 1e-6 and (rewards[:, 1] == 0).all()
    assert (expected == 0).sum() > 20 and (expected == 1).sum() >= 10 and ((expected > 0) & (expected < 1)).sum() > 100


def test_shapes():
    rewards, parts = GROUND.reward([], [])
    assert rewards.shape == (0, 0) and parts["iou"].shape == (0, 0)
    assert GROUND.reward([[], []], [make_sample(), make_sample()])[0].shape == (2, 0)
    for texts in ([["[]"], ["[]"]], [["[]", "[]"]]):
        with pytest.raises(ValueError, match="groups of .* texts for"):
            GROUND.reward(texts + [["[]"]], [make_sample()] * 2)


# ---- ladders ------------------------------------------------------------------------------------------------------


def check_ladders(task, sample, exact=1.0):
    for name, ladder in task.ladders(sample).items():
        values = task.reward([ladder], [sample])[0][0]
        assert ladder[0] == task.answer(sample) and values[0] == exact, name
        assert (np.diff(values) < 0).all(), (sample.id, name, values, ladder)
    zeros = task.zeros(sample)
    assert (task.reward([list(zeros.values())], [sample])[0] == 0).all(), zeros


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("scale", [1.0, 0.31])
def test_ladders_fall_strictly(family, scale):
    """Boxes of every size, down to a part of a unit, at every edge."""
    rng = random.Random(4)
    boxes = [None, (0, 0, 1000, 1000), (999.6, 999.7, 1000, 1000), (0, 0, 0.2, 0.1), (500.4, 500.4, 500.6, 500.6)]
    for _ in range(40):
        x, y, w, h = (rng.random() * m for m in (700, 700, rng.choice([3, 30, 300]), rng.choice([3, 30, 300])))
        boxes.append((x, y, x + w, y + h))
    for box in boxes:
        sample = make_sample(box, family, scale=scale)
        check_ladders(GROUND, sample)
        for found in GROUND.boxes(GROUND.answer(sample), sample):
            assert (found.xyxy >= 0).all() and (found.xyxy <= 1000).all() and found.valid
    check_ladders(GroundTask(thinking=True), make_sample(A, family))


def test_ladders_have_the_axes():
    ladders = GROUND.ladders(make_sample())
    assert ladders.keys() == {"precision", "recall", "duplicates", "location x", "location y", "whole image",
                              "wrong frame", "truncated"}  # fmt: skip
    assert [text.count("bbox_2d") for text in ladders["duplicates"]] == [1, 2, 10]
    assert ladders["location x"][1:] == [text_of([(100 + d, 100, 300 + d, 300)]) for d in (4, 20, 60)]
    assert ladders["location y"][-1] == text_of([(100, 160, 300, 360)]) and ladders["recall"][1] == "[]"
    assert ladders["truncated"][1] == '[{"bbox_2d": [100, 100, 300, 300]'


def test_nothing_beats_exact():
    """All boxes of whole units near a target that lies between units: the nearest is worth 1, every other less."""
    sample = make_sample((10.4, 20.6, 13.55, 23.4))
    near = list(itertools.product(range(8, 13), range(19, 23), range(12, 16), range(21, 26)))
    rewards, _ = GROUND.reward([[text_of([box]) for box in near]], [sample])
    assert rewards.max() == 1.0 and near[int(rewards.argmax())] == (10, 21, 14, 23) and (rewards == 1).sum() == 1


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data is not here")
@pytest.mark.parametrize("family", NAMES)
def test_real_data(family, tmp_path):
    from tiny_models import make_tiny

    from pr1.families import load_family

    folder = load_family(make_tiny(tmp_path / family, family))
    records = GROUND.load(str(DATA / "refcocos_train.jsonl"), str(DATA), verify=False, log=lambda _: None)
    assert len(records) == 108 and sum(r.target.count == 0 for r in records) == 3
    assert records[0].target.boxes.tolist() == [[3.0, 72.0, 219.0, 366.0]]
    lines = []
    for record in records[::6]:
        sample = GROUND.build(record, folder)
        check_ladders(GROUND, sample)
        items = [{"label": f.label, "bbox": f.xyxy.tolist()} for f in GROUND.boxes(GROUND.answer(sample), sample)]
        lines.append({"id": record.id, "text": "", "items": items})
    metrics = GROUND.evaluate(lines, records[::6])
    assert metrics["acc75"] == metrics["acc_none"] == 1.0 and metrics["iou"] > 0.97  # half a unit is all that is lost
    assert len(folder.encode(sample).ids) < 2048


# ---- evaluation ---------------------------------------------------------------------------------------------------


def line(number, *boxes):
    return {"id": str(number), "text": "", "items": [{"label": "", "bbox": list(box), "score": 1.0} for box in boxes]}


def records_of(*boxes):
    return [ImageRecord(str(i), "", 9, 9, make_sample(box).target, (), None) for i, box in enumerate(boxes)]


def test_metrics():
    square = (0, 0, 100, 100)
    records = records_of(*[square] * 5, None, None, None)
    predictions = [
        line(0, square),
        line(1, (0, 0, 100, 80)),
        line(2, (0, 0, 100, 50)),
        line(3),
        line(5),
        line(6, square),
    ]
    assert GROUND.evaluate(predictions, records) == pytest.approx(  # nothing for 4 and 7
        {"acc50": 3 / 5, "acc75": 2 / 5, "acc95": 1 / 5, "iou": (1 + 0.8 + 0.5) / 5, "acc_none": 2 / 3}
    )
    several = GROUND.evaluate([line(0, square, (0, 0, 1, 1)), line(1, square)], records_of(square, square))
    assert several["acc50"] == several["iou"] == 0.5 and several["acc_none"] is None
    assert GROUND.evaluate([], records_of(None)) == {
        "acc50": None, "acc75": None, "acc95": None, "iou": None, "acc_none": 1.0}  # fmt: skip
    with pytest.raises(ValueError, match="1 ids that the data does not have, such as '9'"):
        GROUND.evaluate([line(9)], records)
    with pytest.raises(ValueError, match="no records"):
        GROUND.evaluate([], [])


# ---- rendered scenes ----------------------------------------------------------------------------------------------


def meant(words, shapes):
    """The shapes that an expression is true of, read by the words' own meaning."""
    found = [s for s in shapes if all(w not in COLOURS or s.label == w for w in words)]
    keys = {"left": lambda s: 2 * s.x + s.width, "right": lambda s: -2 * s.x - s.width,
            "top": lambda s: 2 * s.y + s.height, "bottom": lambda s: -2 * s.y - s.height}  # fmt: skip
    for word in words:
        if word in keys:
            assert len(found) > 1
            order = sorted(found, key=keys[word])
            assert keys[word](order[1]) - keys[word](order[0]) >= 16  # 8 px between centres
            found = order[:1]
    return found


@pytest.mark.parametrize("difficulty", [0.0, 0.25, 1.0])
def test_expressions_are_true_of_one_object(difficulty):
    scenes = GROUND.rendered("train", 300, difficulty)
    kinds = {}
    for i, record in enumerate(scenes):
        *words, noun = record.target.name.split()
        assert noun == "object" and words and record.categories == (record.target.name,)
        found = meant(words, scenes.scene(i).shapes)
        boxes = [[s.x, s.y, s.x + s.width, s.y + s.height] for s in found]
        assert len(found) == record.target.count <= 1 and record.target.boxes.tolist() == boxes
        kind = "none" if not found else " ".join("colour" if w in COLOURS else "side" for w in words)
        kinds[kind] = kinds.get(kind, 0) + 1
    assert set(kinds) == {"none", "colour", "side", "side colour"}
    assert 0.07 < kinds["none"] / 300 < 0.2 and min(kinds.values()) > 15


def test_scenes_are_fixed_and_show_what_is_named():
    train, val = GROUND.rendered("train", 50, 0.25), GROUND.rendered("val", 50, 0.25)
    again = GROUND.rendered("train", 60, 0.25)
    for i in range(50):
        assert again[i].target.name == train[i].target.name
        assert np.array_equal(again[i].target.boxes, train[i].target.boxes)
    assert np.array_equal(np.asarray(again[7].load()), np.asarray(train[7].load()))
    assert [train[i].target.name for i in range(6)] == GOLDEN_NAMES
    assert sum(a.target.name == b.target.name for a, b in zip(train, val, strict=True)) < 20
    for record in list(train)[:20]:
        colour = record.target.name.split()[-2]
        pixels = np.asarray(record.load()).astype(int)
        for x1, y1, x2, y2 in record.target.boxes.astype(int):
            if colour in COLOURS:
                close = (np.abs(pixels[y1:y2, x1:x2] - COLOURS[colour]).max(-1) <= 16).mean()
                assert close > 0.25, record.source


def test_scenes_annotated_twice():
    once, twice = GROUND.rendered("train", 80, 0.25), GROUND.rendered("train", 80, 0.25, duplicates=0.6)
    added = 0
    for a, b in zip(once, twice, strict=True):
        assert a.target.name == b.target.name and a.target.count <= b.target.count <= 2 * a.target.count
        assert b.target.boxes[: a.target.count].tolist() == a.target.boxes.tolist()
        added += b.target.count - a.target.count
        for second in b.target.boxes[a.target.count :]:
            x1, y1, x2, y2 = a.target.boxes[0]
            assert np.abs(second - a.target.boxes[0]).max() <= max(x2 - x1, y2 - y1) / 10 + 0.5
    assert 0.45 < added / sum(a.target.count for a in once) < 0.75


GOLDEN_NAMES = ["yellow object", "black object", "left yellow object", "yellow object", "right object",
                "bottom yellow object"]  # fmt: skip
