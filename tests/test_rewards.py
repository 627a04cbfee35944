"""The reward presets against slow references in plain Python, pycocotools, scipy and numbers worked by hand.

A case is one answer: predicted and wanted (label, box), regions to be ignored, how many malformed items came along, and
whether the text was in form. The references know neither the matcher, nor tables, nor batches.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.optimize import linear_sum_assignment

from pr1.matcher import Boxes
from pr1.rewards import COUNT_SET, PRESETS, aligned_iou, check_weights, count_paper, count_set, quality, score, weigh
from pr1.rewards.compiled import average_precision
from pr1.rewards.tables import aligned_giou, all_pairs

WIDTH, HEIGHT = 640, 480

# ---- plain geometry ---------------------------------------------------------------------------------------------------


def area(a):
    return (a[2] - a[0]) * (a[3] - a[1])


def shared(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return w * h if w > 0 and h > 0 else 0.0


def iou(a, b):
    return shared(a, b) / (area(a) + area(b) - shared(a, b))


def giou(a, b):
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    union = area(a) + area(b) - shared(a, b)
    return shared(a, b) / union - (hull - union) / hull


def l1(a, b):
    def cxcywh(v):
        return ((v[0] + v[2]) / 2 / WIDTH, (v[1] + v[3]) / 2 / HEIGHT, (v[2] - v[0]) / WIDTH, (v[3] - v[1]) / HEIGHT)

    return sum(abs(x - y) for x, y in zip(cxcywh(a), cxcywh(b), strict=True))


def centre(a):
    return (a[0] + a[2]) / 2, (a[1] + a[3]) / 2


# ---- cases ------------------------------------------------------------------------------------------------------------


def random_box(rng, low=20, high=200):
    x, y = rng.uniform(0, WIDTH - 30), rng.uniform(0, HEIGHT - 30)
    return x, y, x + rng.uniform(low, high), y + rng.uniform(low, high)


def near(rng, box, scale):
    w, h = box[2] - box[0], box[3] - box[1]
    x1, y1, x2, y2 = (v + rng.gauss(0, scale) * s for v, s in zip(box, (w, h, w, h), strict=True))
    return (x1, y1, max(x2, x1 + 1), max(y2, y1 + 1))


def random_case(rng, regions=True, most=4):
    gt = [(rng.randrange(3), random_box(rng)) for _ in range(rng.choice([0, 1, 2, 3, most]))]
    if len(gt) > 1 and rng.random() < 0.5:  # two that compete for the same predictions
        gt[1] = gt[0][0], near(rng, gt[0][1], 0.1)
    ignore = [(rng.randrange(3), random_box(rng, 100, 300)) for _ in range(rng.choice([0, 0, 1, 2]) if regions else 0)]
    pred = []
    for _ in range(rng.choice([0, 1, 2, 3, most])):
        label, box = rng.choice(gt + ignore) if gt + ignore and rng.random() < 0.85 else (0, random_box(rng))
        label = label if rng.random() < 0.8 else rng.randrange(4)  # 3: a class without targets
        pred.append((label, near(rng, box, rng.choice([0.001, 0.01, 0.05, 0.15]))))
    if pred and rng.random() < 0.2:
        pred.append(rng.choice(pred))
    return SimpleNamespace(pred=pred, gt=gt, ignore=ignore, bad=rng.choice([0, 0, 0, 1, 2]), form=rng.random() < 0.7)


def packed(cases):
    pred = Boxes.pack([[b for _, b in c.pred] for c in cases], [[label for label, _ in c.pred] for c in cases])
    rows = [c.gt + c.ignore for c in cases]
    gt = Boxes.pack([[b for _, b in r] for r in rows], [[label for label, _ in r] for r in rows],
                    [[False] * len(c.gt) + [True] * len(c.ignore) for c in cases])  # fmt: skip
    return pred, gt


def scored(cases, preset, **options):
    pred, gt = packed(cases)
    n_known = np.array([len(c.pred) for c in cases])
    n_pred = n_known + [c.bad for c in cases]
    return score(pred, gt, np.tile([[WIDTH, HEIGHT]], (len(cases), 1)), n_pred=n_pred, n_known=n_known,
                 format_ok=[c.form for c in cases], preset=preset, **options)  # fmt: skip


def set_pairs(pred, gt):
    """Every assignment is tried: most pairs, then least cost."""
    best = (0, 0.0, ())
    for columns in set(itertools.permutations([*range(len(gt)), *[None] * len(pred)], len(pred))):
        pairs = [(i, j) for i, j in enumerate(columns) if j is not None]
        if all(pred[i][0] == gt[j][0] and iou(pred[i][1], gt[j][1]) >= 0.5 for i, j in pairs):
            cost = sum(5 * l1(pred[i][1], gt[j][1]) + 2 * (1 - giou(pred[i][1], gt[j][1])) for i, j in pairs)
            best = max(best, (len(pairs), -cost, tuple(pairs)))
    return best[2]


def without_ignored(case):
    """The case as every preset sees it: predictions inside an ignore region of their class are gone, but not those that
    have a target. `said`: there is an answer."""
    pairs = dict(set_pairs(case.pred, case.gt)) if case.ignore else {}

    def counts(i):
        label, box = case.pred[i]
        inside = any(label == other and shared(box, region) > 0.5 * area(box) for other, region in case.ignore)
        return not inside or i in pairs

    pred = [case.pred[i] for i in range(len(case.pred)) if counts(i)]
    return SimpleNamespace(pred=pred, gt=case.gt, n_pred=len(pred) + case.bad, n_gt=len(case.gt), known=len(pred),
                           form=float(case.form), said=float(case.form or len(pred) < len(case.pred)))  # fmt: skip


def hungarian(c, cost):
    table = np.array([[cost(p, g) for g in c.gt] for p in c.pred]).reshape(len(c.pred), len(c.gt))
    return list(zip(*linear_sum_assignment(table), strict=True))


# ---- references: one answer -> the reward -----------------------------------------------------------------------------


def ref_set(c):
    total = sum(min(1.0, max(0.0, 2 * iou(c.pred[i][1], c.gt[j][1]) - 1)) for i, j in set_pairs(c.pred, c.gt))
    precision, recall = total / max(1, c.n_pred), total / max(1, c.n_gt)
    return 2 * precision * recall / (precision + recall) if total else 0.0


def ref_paper(c, penalty=0.0):
    pairs = hungarian(c, lambda p, g: 5 * l1(p[1], g[1]) + (p[0] != g[0]) + 2 * (1 - giou(p[1], g[1])))
    pairs = [(c.pred[i], c.gt[j]) for i, j in pairs if iou(c.pred[i][1], c.gt[j][1]) > 0.5]
    total = 0.25 * c.known / c.n_pred if c.n_pred else 0.0
    if not pairs:
        return total
    precision, recall = len(pairs) / c.known, len(pairs) / c.n_gt
    total += 0.75 * 2 * precision * recall / (precision + recall)
    total += sum(p[0] == g[0] for p, g in pairs) / len(pairs) + sum(iou(p[1], g[1]) for p, g in pairs) / len(pairs)
    return max(0.0, total - penalty * ((1 - precision) + (1 - recall)))


def ref_rex_omni(c):
    precision = sum(max([iou(p[1], g[1]) for g in c.gt if g[0] == p[0]], default=0) for p in c.pred) / max(1, c.n_pred)
    recall = sum(max([iou(p[1], g[1]) for p in c.pred if g[0] == p[0]], default=0) for g in c.gt) / max(1, c.n_gt)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def ref_visual_rft(c):
    free, total, hits = list(range(c.n_gt)), 0.0, 0
    for label, box in c.pred:
        found = max(((iou(box, c.gt[j][1]), -j) for j in free if c.gt[j][0] == label), default=(0, 0))
        if found[0] > 0.5:
            free.remove(-found[1])
            total, hits = total + found[0], hits + 1
    return total / max(1, c.n_pred, c.n_gt) + hits / max(1, c.n_pred) + c.form


def ref_vision_r1(c, late=False):
    def step(x, low, high):
        return 0.0 if x < low else 1.0 if x > high else x

    pairs = hungarian(c, lambda p, g: l1(p[1], g[1]) + (p[0] != g[0]) - giou(p[1], g[1]))
    values = [giou(c.pred[i][1], c.gt[j][1]) for i, j in pairs]
    reach, low, high = (0.75, 0.75, 0.9) if late else (0.5, 0.5, 0.75)
    recall = step(sum(step(v, reach, reach) for v in values) / max(1, c.n_gt), 0.5, 0.75)
    return c.form + recall + sum(step(v, low, high) for v in values) / max(1, c.n_pred)


def ref_v_triune(c, threshold=0.85):
    if not c.pred:
        return 0.0
    free, total, hits = list(range(len(c.pred))), 0.0, 0
    for label, box in c.gt:
        found = max(((iou(c.pred[i][1], box), -i) for i in free if c.pred[i][0] == label), default=(-1, 0))
        if found[0] >= threshold:
            free.remove(-found[1])
            total, hits = total + found[0], hits + 1
    if not c.gt:
        return 0.1
    complete = 1 - ((c.n_gt - hits) / c.n_gt + (c.n_pred - hits) / c.n_pred) / 2
    return 0.9 * (0.7 * total / c.n_gt + 0.3 * complete) * 0.6 ** abs(c.n_pred - c.n_gt) + 0.1


def ref_visionreasoner(c):
    def tests(p, g):
        scale = (840 / WIDTH, 840 / HEIGHT) * 2
        a, b = ([v * s for v, s in zip(box, scale, strict=True)] for box in (p[1], g[1]))
        corners = sum(abs(x - y) for x, y in zip(a, b, strict=True)) / 4
        return (iou(a, b) > 0.5) + (corners < 10) + (math.dist(centre(a), centre(b)) < 30)

    total = sum(tests(c.pred[i], c.gt[j]) for i, j in hungarian(c, lambda p, g: -tests(p, g)))
    return total / max(1, c.n_pred, c.n_gt) + (c.known / c.n_pred if c.n_pred else 0.0)


def ref_map(c):
    """pycocotools on the one image; the categories are those of the targets, as VLM-R1 has them."""
    if not c.gt:
        return 0.0
    kinds = sorted({label for label, _ in c.gt})
    coco = COCO()
    coco.dataset = {
        "images": [{"id": 1}], "categories": [{"id": k} for k in kinds],
        "annotations": [{"id": i, "image_id": 1, "category_id": label, "iscrowd": 0, "area": area(b),
                         "bbox": [b[0], b[1], b[2] - b[0], b[3] - b[1]]} for i, (label, b) in enumerate(c.gt, 1)],
    }  # fmt: skip
    found = [{"image_id": 1, "category_id": label, "score": s, "bbox": [b[0], b[1], b[2] - b[0], b[3] - b[1]]}
             for (label, b), s in zip(c.pred, getattr(c, "scores", [1.0] * len(c.pred)), strict=True)
             if label in kinds]  # fmt: skip
    if not found:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        run = COCOeval(coco, coco.loadRes(found), "bbox")
        run.params.areaRng, run.params.areaRngLbl, run.params.maxDets = [[0, 1e10]], ["all"], [100]
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][:, :, :, 0, 0]
    return float(precision[precision > -1].mean())


def ref_odlength(c):
    return ref_map(c) * (min(1.0, c.n_gt / c.n_pred) if c.n_pred else 1.0)


# preset, options, reference, what a right empty answer is worth
REFERENCES = [
    ("set", {}, ref_set, 1.0),
    ("paper", {}, ref_paper, 3.0),
    ("paper", {"weights": (("penalty", 0.5),)}, lambda c: ref_paper(c, 0.5), 3.0),
    ("vlm-r1-map", {}, ref_map, 1.0),
    ("vlm-r1-odlength", {}, ref_odlength, 1.0),
    ("rex-omni", {}, ref_rex_omni, 1.0),
    ("visual-rft", {}, ref_visual_rft, None),
    ("vision-r1", {}, ref_vision_r1, None),
    ("vision-r1", {"progress": 0.6}, lambda c: ref_vision_r1(c, late=True), None),
    ("v-triune", {}, ref_v_triune, 1.0),
    ("v-triune", {"progress": 0.2}, lambda c: ref_v_triune(c, 0.95), 1.0),
    ("v-triune", {"progress": 0.5}, lambda c: ref_v_triune(c, 0.99), 1.0),
    ("visionreasoner", {}, ref_visionreasoner, 4.0),
]


def test_every_preset_has_a_reference():
    assert {name for name, *_ in REFERENCES} == set(PRESETS)


@pytest.mark.parametrize("preset, options, reference, empty", REFERENCES, ids=[f"{r[0]}-{r[1]}" for r in REFERENCES])
def test_a_preset_equals_its_reference(preset, options, reference, empty):
    rng = random.Random(11)
    cases = [random_case(rng) for _ in range(1000)]
    rewards, parts = scored(cases, preset, **options)
    assert rewards.shape == (1000,) and rewards.dtype == np.float64 and parts.keys() == PRESETS[preset].weights.keys()
    seen = 0
    for case, reward in zip(cases, rewards, strict=True):
        c = without_ignored(case)
        if c.n_pred == 0 and c.n_gt == 0:
            full = 2 * c.said + c.form if empty is None else empty * c.said
            assert reward == pytest.approx(full, abs=1e-12)
            seen += 1
        else:
            assert reward == pytest.approx(reference(c), abs=1e-9), case
    assert seen > 20 and len(set(np.round(rewards, 6))) > 40


def test_ap_with_scores_equals_pycocotools():
    """Also with given scores, ties among them, one image of 130 predictions of one class (100 count)."""
    rng = random.Random(12)
    cases = [random_case(rng, regions=False, most=8) for _ in range(150)]
    crowded = random_case(rng, regions=False)
    crowded.gt = [(0, random_box(rng)) for _ in range(40)]
    crowded.pred = [(0, near(rng, crowded.gt[k % 40][1], 0.05)) for k in range(130)]
    cases.append(crowded)
    for case in cases:
        case.scores = [rng.choice([0.1, 0.5, 0.9, rng.random()]) for _ in case.pred]
    pred, gt = packed(cases)
    rows, cols = all_pairs(pred.offsets, gt.offsets)
    starts = np.concatenate([[0], np.cumsum(np.diff(pred.offsets) * np.diff(gt.offsets))])
    scores = np.array([s for case in cases for s in case.scores])
    found = average_precision(aligned_iou(pred.boxes[rows], gt.boxes[cols]), starts, pred.labels, pred.offsets,
                              gt.labels, gt.offsets, scores)  # fmt: skip
    expected = [ref_map(case) for case in cases]
    assert np.abs(found - expected).max() < 1e-12 and len(set(np.round(expected, 9))) > 60


def test_all_pairs_are_in_the_order_of_the_table():
    from pr1.matcher import match_boxes

    rng = random.Random(13)
    pred, gt = packed([random_case(rng, regions=False) for _ in range(50)])
    rows, cols = all_pairs(pred.offsets, gt.offsets)
    table = match_boxes(pred, gt, np.tile([[WIDTH, HEIGHT]], (50, 1))).table
    assert np.abs(aligned_iou(pred.boxes[rows], gt.boxes[cols]) - table).max() < 1e-12
    assert len(table) > 100 and (table > 0).mean() > 0.1


# ---- numbers worked by hand -------------------------------------------------------------------------------------------


def row_of_objects(found, overlap):
    """`found` of ten objects in a row, at this IoU with their targets."""
    gt = [(0, (60.0 * i, 0.0, 60.0 * i + 50, 50.0)) for i in range(10)]
    pred = [(0, (x1, y1, x1 + 50 * overlap, y2)) for _, (x1, y1, _, y2) in gt[:found]]
    return SimpleNamespace(pred=pred, gt=gt, ignore=[], bad=0, form=True)


@pytest.mark.parametrize(
    "found, overlap, plain, with_penalty", [(1, 0.95, 2.34, 1.89), (5, 0.9, 2.65, 2.40), (10, 0.75, 2.75, 2.75)]
)
def test_golden_paper_pays_for_leaving_objects_out(found, overlap, plain, with_penalty):
    case = [row_of_objects(found, overlap)]
    assert scored(case, "paper")[0][0] == pytest.approx(plain, abs=0.005)
    assert scored(case, "paper", weights=(("penalty", 0.5),))[0][0] == pytest.approx(with_penalty, abs=0.005)
    assert scored(case, "set")[0][0] == pytest.approx((2 * overlap - 1) * 2 * found / (found + 10))


@pytest.mark.parametrize(
    "preset, full", [("set", 1), ("paper", 3), ("vlm-r1-map", 1), ("vlm-r1-odlength", 1), ("rex-omni", 1),
                     ("visual-rft", 3), ("vision-r1", 3), ("v-triune", 1), ("visionreasoner", 4)],
)  # fmt: skip
def test_exact_and_right_empty_answers_earn_everything(preset, full):
    exact = row_of_objects(10, 1.0)
    nothing = SimpleNamespace(pred=[], gt=[], ignore=[], bad=0, form=True)
    garbage = SimpleNamespace(pred=[], gt=[], ignore=[], bad=0, form=False)
    unfound = SimpleNamespace(pred=[], gt=exact.gt, ignore=[], bad=0, form=False)
    assert scored([exact, nothing, garbage, unfound], preset)[0] == pytest.approx([full, full, 0, 0], abs=1e-12)


def test_relatives_by_hand():
    half = row_of_objects(5, 0.9)
    assert scored([half], "rex-omni")[0] == pytest.approx(2 * 0.9 * 0.45 / 1.35)
    assert scored([half], "visual-rft")[0] == pytest.approx(0.9 * 5 / 10 + 1 + 1)
    assert scored([half], "vision-r1")[0] == pytest.approx(1 + 0.5 + 1)  # recall exactly .5 stays .5; GIoU .9 > .75
    assert scored([half], "vision-r1", progress=1.0)[0] == pytest.approx(1 + 0.5 + 0.9)  # .9 is not above .9
    assert scored([half], "v-triune")[0] == pytest.approx(0.9 * (0.7 * 0.45 + 0.3 * 0.75) * 0.6**5 + 0.1)
    assert scored([half], "v-triune", progress=1.0)[0] == pytest.approx(0.1 + 0.9 * 0)  # no pair reaches .99
    assert scored([half], "visionreasoner")[0] == pytest.approx(3 * 5 / 10 + 1)  # corners off by 5 / 640 * 840 / 4
    doubled = row_of_objects(10, 1.0)
    doubled.pred = doubled.pred * 2
    assert scored([doubled], "vlm-r1-map")[0] == 1.0  # duplicates are free once recall is complete
    assert scored([doubled], "vlm-r1-odlength")[0] == 0.5
    assert scored([doubled], "rex-omni")[0] == 1.0 and scored([doubled], "set")[0] == pytest.approx(2 / 3)


def test_weights_replace_and_are_checked():
    parts = {"a": np.array([1.0, 0.5]), "b": np.array([0.0, 1.0])}
    assert weigh(parts, {"a": 1.0, "b": 0.0}).tolist() == [1.0, 0.5]
    assert weigh(parts, {"a": 1.0, "b": 0.0}, (("b", 2.0),)).tolist() == [1.0, 2.5]
    assert weigh(parts, {"a": 1.0, "b": 0.0}, (("b", -2.0), ("a", 0.0))).tolist() == [0.0, 0.0]  # not below 0
    check_weights({"a": 1.0}, (("a", 0.5),), "x")
    with pytest.raises(ValueError, match=r"--reward-weights names 'f2': reward x has the parts a, b"):
        check_weights({"a": 1.0, "b": 2.0}, (("f2", 1.0),), "x")
    with pytest.raises(ValueError, match="finite"):
        check_weights({"a": 1.0}, (("a", math.nan),), "x")
    half = row_of_objects(5, 1.0)
    assert scored([half], "set", weights=(("f1", 0.0), ("recall", 1.0), ("format", 0.5)))[0] == pytest.approx(1.0)


def test_single_boxes():
    box = (0.0, 0, 10, 10)
    others = [(0, 0, 10, 10), (5, 0, 15, 10), (20, 0, 30, 10), (0, 0, 10, 5), (5, 5, 5, 9), (9, 0, 1, 9),
              (math.nan, 0, 1, 1), (0, 0, math.inf, 1)]  # fmt: skip
    expected = [1.0, 50 / 150, 0.0, 0.5, 0, 0, 0, 0]
    assert aligned_iou([box] * 8, others) == pytest.approx(expected) and aligned_iou(
        others, [box] * 8
    ) == pytest.approx(expected)
    assert aligned_iou([], []).shape == (0,)
    assert quality([0.2, 0.5, 0.75, 1.0]).tolist() == [0.0, 0.0, 0.5, 1.0]
    a, b = np.array([[0.0, 0, 10, 10]]), np.array([[20.0, 0, 30, 10]])
    assert aligned_giou(a, b) == pytest.approx(-100 / 300) and aligned_giou(a, a) == pytest.approx(1.0)


# ---- counting ---------------------------------------------------------------------------------------------------------


def points(*xy):
    return [(x, y, x, y) for x, y in xy]


def counted(function, pred, gt, size=(1000, 1000), n_pred=None):
    n_pred = None if n_pred is None else np.array([n_pred])
    parts = function(Boxes.pack([pred], [[0] * len(pred)]), Boxes.pack([gt], [[0] * len(gt)]), np.array([size]), n_pred)
    return {name: float(values[0]) for name, values in parts.items()}


NINE = [(100 * i, 50) for i in range(9)]


@pytest.mark.parametrize(
    "pred, gt, expected",
    [
        ([(100, 0)], [(0, 0)], 0.929),  # 100 units off
        (NINE[:8], NINE, 0.889),  # 8 of 9
        ([(x, y + 300) for x, y in NINE], NINE, 0.788),  # 300 off
        (NINE, NINE, 1.0),
        ([], NINE, 0.0),
        (NINE, [], 0.0),
        ([], [], 1.0),
    ],
)
def test_golden_counting(pred, gt, expected):
    assert counted(count_paper, points(*pred), points(*gt))["count"] == pytest.approx(expected, abs=0.0005)


def test_counting_distances_are_in_thousandths_of_each_side():
    parts = counted(count_paper, points((200, 200)), points((0, 100)), size=(2000, 500))  # 100 and 200 thousandths off
    assert parts["location"] == pytest.approx(1 - math.hypot(100, 200) / (1000 * math.sqrt(2)))


def test_golden_exact_counts():
    gt = points(*NINE)

    def value(pred, **how):
        parts = counted(count_set, pred, gt, **how)
        return float(weigh({name: np.array([v]) for name, v in parts.items()}, COUNT_SET)[0])

    assert value(gt) == 1.0
    assert value(gt[:8]) == pytest.approx(0.5 * 16 / 17) and value(gt[:8] + points((500, 900))) == pytest.approx(
        0.5 * 16 / 18
    )
    assert value([(x + 20, y, x + 20, y) for x, y in NINE]) == pytest.approx(0.5 + 0.5 * 0.8)  # 20 of 100 off
    assert value(gt[:1] * 9) == pytest.approx(0.5 / 9)  # nine copies of one are no nine objects
    assert value([], n_pred=9) == 0.0 and value(gt, n_pred=10) == pytest.approx(0.5 * 18 / 19)  # malformed items count
    boxes = [(0.0, 0, 100, 100), (300, 0, 400, 100)]
    shift = [(30.0, 0, 130, 100), (300, 0, 400, 100)]
    assert counted(count_set, shift, boxes) == pytest.approx(
        {"exact": 1.0, "f1": (1 + 2 * (70 / 130 - 0.5)) / 2, "precision": (1 + 2 * (70 / 130 - 0.5)) / 2,
         "recall": (1 + 2 * (70 / 130 - 0.5)) / 2}
    )  # fmt: skip
    assert counted(count_set, [], []) == {"exact": 1.0, "f1": 1.0, "precision": 1.0, "recall": 1.0}


def ref_count(pred, gt, n_pred, kind):
    """Every assignment is tried."""

    def off(a, b):
        return 1000 * math.dist(*([v / s for v, s in zip(centre(x), (WIDTH, HEIGHT), strict=True)] for x in (a, b)))

    if n_pred == 0 and not gt:
        return 1.0
    few, many = sorted((pred, gt), key=len)
    ways = [list(zip(few, choice, strict=True)) for choice in itertools.permutations(many, len(few))]
    ways = [[pair if few is pred else pair[::-1] for pair in way] for way in ways]
    if kind == "paper":
        if not pred or not gt:
            return 0.0
        mean = min(sum(off(p, g) for p, g in way) / len(few) for way in ways)
        return min(n_pred, len(gt)) / max(n_pred, len(gt)) * (1 - mean / (1000 * math.sqrt(2)))

    def worth(p, g):
        if g[0] == g[2]:
            return off(p, g) <= 100, max(0.0, 1 - off(p, g) / 100)
        return iou(p, g) >= 0.1, min(1.0, max(0.0, 2 * iou(p, g) - 1))

    on, total = max((sum(worth(p, g)[0] for p, g in way), sum(worth(p, g)[1] for p, g in way)) for way in ways)
    return 0.5 * (on == len(gt) == n_pred) + 0.5 * 2 * total / (n_pred + len(gt))


@pytest.mark.parametrize("kind", ["paper", "set"])
def test_counting_equals_the_reference(kind):
    rng, cases = random.Random(14), []
    for _ in range(1000):
        gt = [random_box(rng) for _ in range(rng.randrange(0, 5))]
        gt = [(*centre(b), *centre(b)) if rng.random() < 0.5 else b for b in gt]
        pred = [near(rng, b if b[0] < b[2] else (b[0] - 20, b[1] - 20, b[0] + 20, b[1] + 20), rng.choice([0.01, 0.1, 0.4]))
                for b in gt if rng.random() < 0.85]  # fmt: skip
        pred += [random_box(rng) for _ in range(rng.choice([0, 0, 0, 1, 2]))]
        rng.shuffle(pred)
        cases.append((pred, gt, len(pred) + rng.choice([0, 0, 0, 1])))
    pred, gt = (Boxes.pack([c[k] for c in cases], [[0] * len(c[k]) for c in cases]) for k in (0, 1))
    function, names = (count_paper, {"count": 1.0}) if kind == "paper" else (count_set, COUNT_SET)
    parts = function(pred, gt, np.tile([[WIDTH, HEIGHT]], (1000, 1)), np.array([c[2] for c in cases]))
    found = weigh(parts, names)
    expected = [ref_count(*case, kind) for case in cases]
    assert np.abs(found - expected).max() < 1e-9
    if kind == "set":
        assert 100 < parts["exact"].sum() < 900
