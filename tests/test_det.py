"""Detection: prompt, target text, reading of answers, and the reward against hand-worked numbers and a slow reference.

The frame of these tests is 1000 x 1000 pixels in 1000 x 1000 text units for every family, so boxes stand in the text as
they are. The reference reward knows neither the matcher nor a parser: it tries every assignment.
"""

import itertools
import random
import time
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from pr1.families import FAMILIES
from pr1.records import BoxTarget, Frame, ImageRecord, Sample
from pr1.tasks import TASKS

DET = TASKS["det"]
NAMES = sorted(FAMILIES)
PARTS = {"f1", "precision", "recall", "iou", "count_ratio", "format"}


@dataclass(frozen=True)
class Unit(Frame):
    """Text units of `scale` per pixel, read by the family named."""

    family: str = ""
    scale: float = 1.0

    @property
    def text_size(self):
        return round(self.width * self.scale), round(self.height * self.scale)


def make_sample(objects, family="qwen2_5_vl", crowds=(), width=1000, height=1000, scale=1.0):
    rows = [(label, box, False) for label, box in objects] + [(label, box, True) for label, box in crowds]
    target = BoxTarget(
        boxes=np.array([box for _, box, _ in rows], np.float64).reshape(-1, 4), labels=tuple(row[0] for row in rows),
        ignore=np.array([row[2] for row in rows], bool), image_id=7,
    )  # fmt: skip
    frame = Unit(width, height, width, height, family, scale)
    return Sample(id="7", task="det", messages=[], images=(None,), frames=(frame,), target=target)


def reward_of(text, sample):
    rewards, parts = DET.reward([[text]], [sample])
    return float(rewards[0, 0]), {name: float(values[0, 0]) for name, values in parts.items()}


def value(items, objects, family="qwen2_5_vl", crowds=()):
    return reward_of(FAMILIES[family].format_boxes(items), make_sample(objects, family, crowds))[0]


# ---- prompt, target text, reading ---------------------------------------------------------------------------------


def test_prompt_is_the_papers_and_needs_no_pixels():
    def load():
        raise AssertionError("no pixels are needed")

    target = BoxTarget(np.zeros((0, 4)), (), np.zeros(0, bool))
    record = ImageRecord("1", "a.jpg", 30, 20, target, ("person", "bicycle", "hot dog"), load)
    (message,) = DET.messages(record)
    text = "Please output bbox coordinates and names of person, bicycle, hot dog."
    assert message == {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}


def test_build_decodes_once_and_keeps_the_target():
    class Family:
        @staticmethod
        def frame(width, height):
            return Unit(width, height, width, height, "qwen2_5_vl")

    target = BoxTarget(np.array([[1.0, 2, 3, 4]]), ("cat",), np.array([False]), image_id=9)
    record = ImageRecord("9", "a.jpg", 30, 20, target, ("cat",), lambda: Image.new("RGB", (30, 20), (1, 2, 3)))
    sample = DET.build(record, Family)
    assert (sample.id, sample.task) == ("9", "det")
    assert sample.target.boxes is target.boxes and sample.target.categories == ("cat",)
    assert sample.frames == (Unit(30, 20, 30, 20, "qwen2_5_vl"),)
    assert sample.images[0].size == (30, 20) and sample.images[0].getpixel((0, 0)) == (1, 2, 3)
    assert sample.messages == DET.messages(record)


def test_answer_is_sorted_scaled_and_leaves_ignored_out():
    objects = [("dog", (300, 10, 500, 100)), ("cat", (100, 200, 199, 260)), ("cow", (100, 50, 120, 90)),
               ("ant", (100, 50, 700, 90))]  # fmt: skip
    sample = make_sample(objects, crowds=[("cat", (0, 0, 900, 900))], scale=0.5)
    assert DET.answer(sample) == (
        '[{"bbox_2d": [50, 25, 60, 45], "label": "cow"}, {"bbox_2d": [50, 25, 350, 45], "label": "ant"}, '
        '{"bbox_2d": [50, 100, 100, 130], "label": "cat"}, {"bbox_2d": [150, 5, 250, 50], "label": "dog"}]'
    )  # 99.5 rounds to even, 100


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("box", [(500.1, 500.1, 500.3, 500.2), (999.9, 999.8, 1000, 1000), (0, 0, 0.1, 0.2)])
def test_answer_keeps_a_flat_box_a_box(family, box):
    sample = make_sample([("cat", box)], family)
    (found,) = DET.boxes(DET.answer(sample), sample)
    assert found.valid and np.abs(found.xyxy - np.array(box)).max() <= 1.0
    assert (found.xyxy >= 0).all() and (found.xyxy <= 1000).all()


def test_boxes_returns_original_pixels_and_spans():
    sample = make_sample([], width=200, height=400, scale=0.5)
    first, second = '{"bbox_2d": [10, 20, 30, 40], "label": "cat"}', '{"bbox_2d": [30, 20, 10, 40], "label": "dog"}'
    text = f"[{first}, {second}]"
    good, bad = DET.boxes(text, sample)
    assert good.xyxy.tolist() == [20.0, 40.0, 60.0, 80.0] and good.xyxy.dtype == np.float64
    assert (good.label, good.valid, text[good.start : good.end]) == ("cat", True, first)
    assert (bad.xyxy, bad.valid, text[bad.start : bad.end]) == (None, False, second)


@pytest.mark.parametrize("family", NAMES)
def test_parse_of_answer_is_exact(family):
    objects = [("a", (10, 20, 200, 300)), ("b", (400, 400, 480, 620)), ("a", (10, 20, 220, 310))]
    sample = make_sample(objects, family)
    score, parts = reward_of(DET.answer(sample), sample)
    assert score == 1.0 and parts == dict.fromkeys(PARTS, 1.0)


def test_unknown_task_names_the_known_ones():
    with pytest.raises(ValueError, match=r"--task is 'detect'.*det"):
        TASKS["detect"]


# ---- reward: hand-worked numbers ----------------------------------------------------------------------------------

A, B, C = (100, 100, 300, 300), (400, 100, 600, 300), (700, 700, 900, 800)


@pytest.mark.parametrize("family", NAMES)
def test_golden_shift(family):
    sample = make_sample([("cat", A)], family)
    score, parts = reward_of(FAMILIES[family].format_boxes([("cat", (120, 100, 320, 300))]), sample)
    iou = 180 / 220
    q = (iou - 0.5) / 0.5
    assert score == pytest.approx(q, abs=1e-6) and parts["iou"] == pytest.approx(iou, abs=1e-6)
    assert parts["precision"] == pytest.approx(q, abs=1e-6) and parts["recall"] == pytest.approx(q, abs=1e-6)


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize(
    "items, expected",
    [
        ([("cat", A), ("cat", B), ("dog", C)], (1.0, 1.0, 1.0, 1.0)),
        ([("dog", C), ("cat", B), ("cat", A)], (1.0, 1.0, 1.0, 1.0)),  # order is free
        ([("cat", A)], (2 * 1 / 4, 1.0, 1 / 3, 1 / 3)),  # two missed
        ([("cat", A), ("cat", B), ("cat", C)], (2 * 2 / 6, 2 / 3, 2 / 3, 1.0)),  # one wrong label
        ([("dog", A), ("dog", B), ("cat", C)], (0.0, 0.0, 0.0, 1.0)),  # all wrong labels
        ([("cat", A), ("cat", A)], (2 * 1 / 5, 1 / 2, 1 / 3, 2 / 3)),  # a duplicate earns once
        ([("cat", A), ("zebra", B)], (2 * 1 / 5, 1 / 2, 1 / 3, 2 / 3)),  # an unknown label is a wrong prediction
        ([("cat", A), ("cat", A), ("cat", A), ("cat", A)], (2 * 1 / 7, 1 / 4, 1 / 3, 3 / 4)),
        ([("cat", (100, 100, 300, 201))], (2 * 0.01 / 4, 0.01, 0.01 / 3, 1 / 3)),  # IoU .505
        ([("cat", (100, 100, 300, 200))], (0.0, 0.0, 0.0, 1 / 3)),  # IoU .5 is worth nothing
        ([], (0.0, 0.0, 0.0, 0.0)),
    ],
)
def test_golden_three_objects(family, items, expected):
    sample = make_sample([("cat", A), ("cat", B), ("dog", C)], family)
    score, parts = reward_of(FAMILIES[family].format_boxes(items), sample)
    assert (score, parts["precision"], parts["recall"], parts["count_ratio"]) == pytest.approx(expected, abs=1e-6)
    assert parts["format"] == 1.0


def test_a_box_of_another_class_takes_no_target():
    # The dog box fits the cat at (100, 100) better than the cat box does; priced, not forbidden, it would take it.
    objects, cat = [("cat", A)], ("cat", (120, 100, 320, 300))
    alone, beside = value([cat], objects), value([cat, ("dog", A)], objects)
    assert beside == pytest.approx(alone * 2 / 3, abs=1e-6)


def test_malformed_items_count_as_wrong_predictions():
    sample = make_sample([("cat", A)])
    good = '{"bbox_2d": [100, 100, 300, 300], "label": "cat"}'
    for bad in ('{"bbox_2d": [100, 100, 300], "label": "cat"}', '{"bbox_2d": [300, 300, 100, 100], "label": "cat"}',
                '{"bbox_2d": [1, 1, 1, 50], "label": "cat"}', '{"bbox_2d": ["a", 1, 2, 3], "label": "cat"}',
                '{"label": "cat"}', '{"bbox_2d": [100, 100, 300, 300]}',
                '{"bbox_2d": [0, 0, 9e6, 9e6], "label": "cat"}',
                '{"bbox_2d": [0, 0, 1e400, 1], "label": "cat"}'):  # fmt: skip
        score, parts = reward_of(f"[{good}, {bad}]", sample)
        assert score == pytest.approx(2 / 3) and parts["precision"] == pytest.approx(0.5), bad


EMPTY = {"qwen2_5_vl": "[]", "qwen2_vl": "none"}
GARBAGE = [
    "",
    " ",
    "garbage",
    "[",
    "]",
    "{}",
    "no objects",
    "null",
    "\x00",
    "[[[[",
    "There are no objects: []",
    "\ud800",
]


@pytest.mark.parametrize("family", NAMES)
def test_breaking_off_inside_a_box_is_a_wrong_prediction(family):
    """A policy that is unsure of a box must not get out of it by stopping halfway."""
    objects = [("cat", (100, 100, 300, 300)), ("dog", (500, 500, 700, 700))]
    first = FAMILIES[family].format_boxes(objects[:1])
    both = FAMILIES[family].format_boxes(objects)
    closed = reward_of(first, make_sample(objects, family))[0]
    assert closed == pytest.approx(2 / 3)  # one of two found, nothing wrong
    for cut in (both[: both.rindex("(500" if family == "qwen2_vl" else "500")], both[: both.rindex("700") - 1]):
        reward, parts = reward_of(cut, make_sample(objects, family))
        assert reward == pytest.approx(2 * 1 / (2 + 2)) and parts["precision"] == pytest.approx(0.5), cut


@pytest.mark.parametrize("family", NAMES)
def test_empty_images(family):
    nothing, something = make_sample([], family), make_sample([("cat", A)], family)
    box = FAMILIES[family].format_boxes([("cat", A)])
    assert FAMILIES[family].format_boxes([]) == EMPTY[family] and DET.answer(nothing) == EMPTY[family]
    assert reward_of(EMPTY[family], nothing) == (1.0, dict.fromkeys(PARTS, 1.0) | {"iou": 0.0})
    assert reward_of(EMPTY[family], something)[0] == 0.0
    assert reward_of(box, nothing)[0] == 0.0
    for text in GARBAGE:
        for sample in (nothing, something):
            score, parts = reward_of(text, sample)
            assert score == parts["format"] == parts["precision"] == parts["recall"] == 0.0, text


def test_text_around_an_answer_costs_the_format_only():
    score, parts = reward_of('Here: [{"bbox_2d": [100, 100, 300, 300], "label": "cat"}] Bye', make_sample([("cat", A)]))
    assert score == 1.0 and parts["format"] == 0.0
    nothing = make_sample([], crowds=[("cat", (0, 0, 500, 500))])
    assert (
        reward_of('Here: [{"bbox_2d": [100, 100, 300, 300], "label": "cat"}] Bye', nothing)[0] == 1.0
    )  # it is ignored


# ---- reward: ignore regions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", NAMES)
def test_ignore_regions(family):
    crowd = [("cat", (500, 500, 900, 900))]

    def score(items, objects=(("cat", A),)):
        return value(items, list(objects), family, crowd)

    exact = ("cat", A)
    assert score([exact]) == 1.0  # the crowd is no target
    assert score([exact, ("cat", (520, 520, 600, 600)), ("cat", (700, 700, 800, 800))]) == 1.0  # inside: neither way
    assert score([exact, ("dog", (520, 520, 600, 600))]) == pytest.approx(2 / 3)  # another class
    assert score([exact, ("cat", (449, 600, 549, 700))]) == pytest.approx(2 / 3)  # 49 % inside
    assert score([exact, ("cat", (450, 600, 550, 700))]) == pytest.approx(2 / 3)  # exactly half
    assert score([exact, ("cat", (451, 600, 551, 700))]) == 1.0  # 51 % inside
    assert score([exact, ("cat", (0, 0, 1000, 1000))]) == pytest.approx(2 / 3)  # holds the region, is not inside it
    assert score([("cat", (500, 500, 900, 900))]) == 0.0  # matching the region is no recall
    assert score([], objects=()) == 1.0
    assert score([("cat", (520, 520, 600, 600))], objects=()) == 1.0  # as if it had not been said
    assert score([("dog", (520, 520, 600, 600))], objects=()) == 0.0


def test_a_target_inside_an_ignore_region_is_still_a_target():
    objects, crowd = [("cat", (550, 550, 650, 650))], [("cat", (500, 500, 900, 900))]
    assert value([("cat", (550, 550, 650, 650))], objects, crowds=crowd) == 1.0
    # A worse box is matched (q = .5): it counts, although it also lies inside.
    assert value([("cat", (550, 550, 650, 625))], objects, crowds=crowd) == pytest.approx(0.5)
    assert value([], objects, crowds=crowd) == 0.0
    # Of two boxes of one target the one left over lies inside and counts neither way.
    assert value([("cat", (550, 550, 650, 650)), ("cat", (550, 550, 650, 625))], objects, crowds=crowd) == 1.0


# ---- reward: the slow reference -----------------------------------------------------------------------------------


def overlap(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return w * h if w > 0 and h > 0 else 0.0


def size(a):
    return (a[2] - a[0]) * (a[3] - a[1])


def ref_iou(a, b):
    return overlap(a, b) / (size(a) + size(b) - overlap(a, b))


def ref_cost(a, b):
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    union = size(a) + size(b) - overlap(a, b)
    giou = overlap(a, b) / union - (hull - union) / hull
    middle = abs(a[0] + a[2] - b[0] - b[2]) / 2 + abs(a[1] + a[3] - b[1] - b[3]) / 2
    extent = abs(a[2] - a[0] - b[2] + b[0]) + abs(a[3] - a[1] - b[3] + b[1])
    return 5 * (middle + extent) / 1000 + 2 * (1 - giou)


def reference(items, objects, crowds, malformed):
    best = (0, 0.0, ())  # pairs, -cost, the assignment
    for columns in set(itertools.permutations([*range(len(objects)), *[None] * len(items)], len(items))):
        pairs = [(i, j) for i, j in enumerate(columns) if j is not None]
        if all(items[i][0] == objects[j][0] and ref_iou(items[i][1], objects[j][1]) >= 0.5 for i, j in pairs):
            cost = sum(ref_cost(items[i][1], objects[j][1]) for i, j in pairs)
            best = max(best, (len(pairs), -cost, tuple(pairs)))
    worth = {i: min(1.0, max(0.0, 2 * ref_iou(items[i][1], objects[j][1]) - 1)) for i, j in best[2]}
    counted = malformed
    for i, (label, box) in enumerate(items):
        inside = any(label == c and overlap(box, region) > 0.5 * size(box) for c, region in crowds)
        counted += worth.get(i, 0) > 0 or not inside
    if counted == 0 and not objects:
        return 1.0
    if counted == 0 or not objects or not sum(worth.values()):
        return 0.0
    precision, recall = sum(worth.values()) / counted, sum(worth.values()) / len(objects)
    return 2 * precision * recall / (precision + recall)


def random_case(rng):
    def box():
        x, y = rng.randrange(0, 300), rng.randrange(0, 300)
        return x, y, x + rng.randrange(40, 200), y + rng.randrange(40, 200)

    labels = ["cat", "dog"]
    objects = [(rng.choice(labels), box()) for _ in range(rng.randrange(0, 4))]
    if len(objects) > 1 and rng.random() < 0.6:  # two that compete for the same predictions
        label, (x1, y1, x2, y2) = objects[0]
        objects[1] = label, (x1 + 9, y1 + 4, x2 + 12, y2 + 9)
    crowds = [(rng.choice(labels), box()) for _ in range(rng.choice([0, 0, 1, 2]))]
    items = []
    for _ in range(rng.randrange(0, 5)):
        label, (x1, y1, x2, y2) = (
            rng.choice(objects + crowds) if objects + crowds and rng.random() < 0.8 else ("dog", box())
        )
        d = [rng.randrange(-9, 10) for _ in range(4)]
        items.append(
            (rng.choice([label] * 6 + ["cat", "zebra"]), (max(0, x1 + d[0]), max(0, y1 + d[1]), x2 + d[2], y2 + d[3]))
        )
    return items, objects, crowds


def test_reward_equals_the_reference():
    rng, broken = random.Random(5), '{"bbox_2d": [1, 2, 3], "label": "cat"}'
    cases = [(*random_case(rng), rng.choice([0, 0, 0, 1, 2]), rng.choice(NAMES)) for _ in range(400)]
    expected, texts, samples = [], [], []
    for items, objects, crowds, malformed, family in cases:
        malformed = malformed if family == "qwen2_5_vl" else 0
        text = FAMILIES[family].format_boxes(items)
        if malformed:
            text = text[:-1] + (", " if items else "") + ", ".join([broken] * malformed) + "]"
        expected.append(reference(items, objects, crowds, malformed))
        texts.append(text)
        samples.append(make_sample(objects, family, crowds))
    rewards, parts = DET.reward([[text, text] for text in texts], samples)
    assert rewards.shape == (400, 2) and rewards.dtype == np.float32 and parts.keys() == PARTS
    assert all(values.shape == (400, 2) and values.dtype == np.float32 for values in parts.values())
    assert np.abs(rewards - np.array(expected)[:, None]).max() < 1e-6
    assert (np.array(expected) == 0).sum() > 20 and (np.array(expected) == 1).sum() > 20  # the cases are not all alike
    assert ((np.array(expected) > 0) & (np.array(expected) < 1)).sum() > 150


def test_a_batch_is_its_answers_one_by_one():
    rng = random.Random(6)
    cases = [random_case(rng) for _ in range(12)]
    samples = [make_sample(objects, "qwen2_vl", crowds) for _, objects, crowds in cases]
    texts = [[FAMILIES["qwen2_vl"].format_boxes(cases[(p + g) % 12][0]) for g in range(5)] for p in range(12)]
    together, parts = DET.reward(texts, samples)
    for p, g in itertools.product(range(12), range(5)):
        score, alone = reward_of(texts[p][g], samples[p])
        assert score == together[p, g] and alone == {name: parts[name][p, g] for name in parts}


def test_shapes_of_nothing():
    rewards, parts = DET.reward([], [])
    assert rewards.shape == (0, 0) and parts.keys() == PARTS
    assert DET.reward([[], []], [make_sample([]), make_sample([])])[0].shape == (2, 0)
    with pytest.raises(ValueError, match="2 groups of .* texts for 1 samples"):
        DET.reward([["[]"], ["[]"]], [make_sample([])])


# ---- reward: ladders ----------------------------------------------------------------------------------------------


def scene(kind, n):
    """n objects of 100 x 100: apart and of three classes, or in pairs of one class that overlap by half (IoU 1/3)."""
    if kind == "apart":
        corners = [(10 + 140 * (i % 7), 10 + 140 * (i // 7)) for i in range(n)]
        return [(("cat", "dog", "cow")[i % 3], (x, y, x + 100, y + 100)) for i, (x, y) in enumerate(corners)]
    corners = [(10 + 190 * (i // 2 % 5) + 50 * (i % 2), 10 + 110 * (i // 10)) for i in range(n)]
    return [("cat", (x, y, x + 100, y + 100)) for x, y in corners]


def moved(objects, dx, dy):
    return [(label, (x1 + dx, y1 + dy, x2 + dx, y2 + dy)) for label, (x1, y1, x2, y2) in objects]


def ladders(objects, spurious):
    n = len(objects)
    counts = sorted({0, 1, n // 2, n})
    wrong = {"cat": "dog", "dog": "zebra", "cow": "cat"}
    relabelled = [[(wrong[label] if i < k else label, box) for i, (label, box) in enumerate(objects)] for k in counts]
    return {
        "location in x": [moved(objects, d, 0) for d in (0, 2, 10, 30)],
        "location in x and y": [moved(objects, d, d) for d in (0, 2, 10)],
        "recall": [objects[k:] for k in counts],
        "recall from the end": [objects[: n - k] for k in counts],
        "precision": [objects + spurious[:k] for k in sorted({0, 1, n})],
        "precision, spurious first": [spurious[:k] + objects for k in sorted({0, 1, n})],
        "duplicates": [objects * k for k in (1, 2, 10)],
        "duplicates one by one": [[item for item in objects for _ in range(k)] for k in (1, 2, 10)],
        "label": relabelled,
    }


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 10, 40])
@pytest.mark.parametrize("kind", ["apart", "overlapping"])
def test_ladders_fall_strictly(kind, n, family):
    objects = scene(kind, n)
    far = [("cat", (10 * i, 990, 10 * i + 8, 998)) for i in range(n)]
    near = [(label, (x1 + 8, y1 + 6, x2, y2 - 4)) for label, (x1, y1, x2, y2) in objects]  # IoU .83 with a target
    for spurious in (far, near):
        for name, ladder in ladders(objects, spurious).items():
            values = [value(items, objects, family) for items in ladder]
            assert values[0] == 1.0, name
            assert all(a > b for a, b in itertools.pairwise(values)), (name, values)
            assert values[-1] == 0.0 or name not in ("recall", "label"), name
        if n >= 3:
            tenfold = value(objects * 10, objects, family)
            assert tenfold < value(objects[1:], objects, family)
            assert tenfold < value(objects + spurious[:1], objects, family)


def test_nothing_beats_exact():
    rng = random.Random(7)
    for _ in range(300):
        items, objects, _ = random_case(rng)
        assert value(objects, objects) == 1.0
        assert value(items, objects) < 1.0 or sorted(items) == sorted(objects)


# ---- broken answers -----------------------------------------------------------------------------------------------

ALPHABET = '[]{}()",:<>|\\ \n\t0123456789.-+eE_catdogbbox_2dlabel\x00é\u2028\ud83d\U0001f600nulltrueNaNInfinity`'
PIECES = ["<|box_start|>", "<|box_end|>", "<|object_ref_start|>", "1e999", "-Infinity", "NaN", "9" * 400, "[[[[" * 300,
          '{"bbox_2d":', '"label":', "```json", '{"a":' * 200, "-1", "null"]  # fmt: skip


def mutate(text, rng):
    for _ in range(rng.randrange(1, 6)):
        at, kind = rng.randrange(len(text) + 1), rng.randrange(6)
        stop = min(len(text), at + rng.randrange(1, 30))
        if kind == 0:
            text = text[:at]
        elif kind == 1:
            text = text[:at] + text[stop:]
        elif kind == 2:
            text = text[:at] + "".join(rng.choices(ALPHABET, k=rng.randrange(1, 10))) + text[at:]
        elif kind == 3:
            text = text[:at] + rng.choice(PIECES) + text[at:]
        elif kind == 4:
            text = text[:stop] + text[at:stop] * rng.randrange(1, 20) + text[stop:]
        else:
            text = text[::-1] if rng.random() < 0.1 else text[at:]
    return text


def test_fuzzed_answers_raise_nothing():
    rng = random.Random(8)
    samples = [make_sample(scene("apart", n), family, [("cat", A)][: n % 2]) for family in NAMES for n in (0, 1, 2, 5)]
    texts = [[mutate(DET.answer(sample), rng) for _ in range(2400 // len(samples))] for sample in samples]
    began = time.perf_counter()
    rewards, parts = DET.reward(texts, samples)
    assert time.perf_counter() - began < 10
    for values in (rewards, *parts.values()):
        assert np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1
    assert 0.1 < (rewards > 0).mean() < 0.9  # some survive, some do not
    for group, sample in zip(texts, samples, strict=True):
        for box in itertools.chain.from_iterable(DET.boxes(text, sample) for text in group):
            assert (box.xyxy is None) == (not box.valid)
            assert not box.valid or (np.isfinite(box.xyxy).all() and (box.xyxy[2:] > box.xyxy[:2]).all())


@pytest.mark.parametrize("family", NAMES)
def test_a_huge_answer_is_fast_and_worth_little(family):
    objects = scene("apart", 10)
    text = FAMILIES[family].format_boxes(objects * 1000)
    sample = make_sample(objects, family)
    began = time.perf_counter()
    rewards, _ = DET.reward([[text] * 8], [sample])
    assert time.perf_counter() - began < 5
    assert 0 < rewards.max() < 0.05
    # What lies beyond the cap is wrong, not unsaid: 300 spurious boxes first, and the exact ones come too late.
    late = FAMILIES[family].format_boxes([("cat", (0, 990, 8, 998))] * 300 + objects)
    assert reward_of(late, sample)[0] == 0.0


def test_many_targets_raise_the_cap():
    objects = [("cat", (x, y, x + 18, y + 18)) for x in range(0, 1000, 40) for y in range(0, 1000, 40)]
    assert len(objects) == 625 and value(objects, objects) == 1.0
    assert value(objects + [("cat", (19, 19, 39, 39))], objects) == pytest.approx(2 * 625 / 1251, abs=1e-6)
