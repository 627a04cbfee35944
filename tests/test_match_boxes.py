"""match_boxes against brute force, a slow reference written with NumPy, and numbers worked out by hand."""

import itertools

import numpy as np
import pytest
from isas import on_every_isa
from scipy.optimize import linear_sum_assignment

from pr1 import matcher
from pr1.matcher import Boxes, Match, MatchCost


def match_boxes(*arguments):
    """On every instruction set of this machine, which must agree."""
    return Match(*on_every_isa(lambda: tuple(vars(matcher.match_boxes(*arguments)).values())))


def usable(box):
    return np.isfinite(box).all() and np.abs(box).max() <= 1e6 and box[2] > box[0] and box[3] > box[1]


def reference_iou(a, b):
    """IoU and GIoU of two usable boxes, straight from the definition."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0) * max(h, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return inter / union, inter / union - (hull - union) / hull


def reference_tables(pred, gt, size, cost):
    """(m, n) IoU, cost and legality of one problem; pred = (boxes, labels), gt = (boxes, labels, ignore)."""
    to_cxcywh = lambda b: np.array([(b[0] + b[2]) / 2, (b[1] + b[3]) / 2, b[2] - b[0], b[3] - b[1]])  # noqa: E731
    scale = np.array([size[0], size[1], size[0], size[1]])
    shape = len(pred[0]), len(gt[0])
    ious, costs, legal = np.zeros(shape), np.zeros(shape), np.zeros(shape, bool)
    for i, j in np.ndindex(shape):
        a, b = pred[0][i], gt[0][j]
        if not (usable(a) and usable(b)):
            continue
        ious[i, j], giou = reference_iou(a, b)
        other = pred[1][i] != gt[1][j]
        distance = np.abs((to_cxcywh(a) - to_cxcywh(b)) / scale).sum()
        costs[i, j] = cost.l1 * distance + cost.giou * (1 - giou) + cost.cls * other
        legal[i, j] = not gt[2][j] and ious[i, j] >= cost.min_iou and not (cost.forbid_other_class and other)
    return ious, costs, legal


def reference_ignored(box, label, gt):
    """More than half of the box lies inside one ignored box of its label."""
    if not usable(box):
        return False
    for other, other_label, ignore in zip(*gt, strict=True):
        w, h = min(box[2], other[2]) - max(box[0], other[0]), min(box[3], other[3]) - max(box[1], other[1])
        if ignore and label == other_label and max(w, 0) * max(h, 0) > 0.5 * (box[2] - box[0]) * (box[3] - box[1]):
            return True
    return False


def brute_force(costs, legal):
    """(most legal pairs, least cost among those) over every partial assignment of up to 4 x 4 boxes."""
    m, n = costs.shape
    best = (0, 0.0)
    for k in range(1, min(m, n) + 1):
        for rows in itertools.combinations(range(m), k):
            for cols in itertools.permutations(range(n), k):
                if legal[rows, cols].all():
                    best = min(best, (-k, costs[rows, cols].sum()))
    return -best[0], best[1]


def random_boxes(rng, n, degenerate):
    """Boxes on a coarse grid, so that ties, equal boxes and touching boxes are common."""
    corner = rng.integers(0, 6, (n, 2)) * 10.0
    boxes = np.concatenate([corner, corner + rng.integers(1, 5, (n, 2)) * 10.0], 1)
    for i in np.flatnonzero(rng.random(n) < degenerate):
        kind = rng.integers(5)
        if kind == 0:
            boxes[i] = boxes[i, [2, 3, 0, 1]]
        elif kind == 1:
            boxes[i, 2] = boxes[i, 0]
        else:
            boxes[i, rng.integers(4)] = [np.nan, -np.inf, 1e300][kind - 2]
    return boxes


def random_batch(seed, batch, largest):
    """Predictions are half of them near an object, some degenerate."""
    rng = np.random.default_rng(seed)
    preds, gts = [], []
    for _ in range(batch):
        m, n = rng.integers(0, largest + 1, 2)
        boxes, labels = random_boxes(rng, m, 0.2), rng.integers(0, 3, m)
        gts.append((random_boxes(rng, n, 0), rng.integers(0, 3, n), rng.random(n) < 0.15))
        near = rng.random(m) < 0.6
        if n:
            which = rng.integers(0, n, m)
            boxes[near] = gts[-1][0][which[near]] + rng.integers(-1, 2, (near.sum(), 4)) * 2.0
            labels[near] = gts[-1][1][which[near]]
        preds.append((boxes, labels))
    return preds, gts, rng.integers(20, 120, (batch, 2)).astype(np.float64)


def run(preds, gts, sizes, cost):
    pred = Boxes.pack([p[0] for p in preds], [p[1] for p in preds])
    gt = Boxes.pack([g[0] for g in gts], [g[1] for g in gts], [g[2] for g in gts])
    return match_boxes(pred, gt, sizes, cost)


COSTS = [
    MatchCost(),
    MatchCost(forbid_other_class=True),
    MatchCost(min_iou=0.5),
    MatchCost(l1=1.5, giou=0.25, cls=0.0, forbid_other_class=True, min_iou=0.1),
    MatchCost(l1=0.0, giou=0.0, cls=1.0, min_iou=0.2),  # nothing but ties
]


@pytest.mark.parametrize("cost", COSTS, ids=str)
@pytest.mark.parametrize("largest, batch", [(3, 300), (9, 150), (40, 12)])
def test_match_equals_the_reference(cost, largest, batch):
    preds, gts, sizes = random_batch(largest, batch, largest)
    match = run(preds, gts, sizes, cost)
    assert match.offsets[0] == match.table_offsets[0] == 0
    assert match.offsets[-1] == len(match.rows) == len(match.cols) == len(match.iou)
    matched, starts = 0, np.cumsum([0, *(len(p[0]) for p in preds)])
    for i in range(batch):
        ious, costs, legal = reference_tables(preds[i], gts[i], sizes[i], cost)
        table = match.table[match.table_offsets[i] : match.table_offsets[i + 1]]
        np.testing.assert_allclose(table.reshape(ious.shape), ious, rtol=1e-13)
        span = slice(match.offsets[i], match.offsets[i + 1])
        rows, cols = match.rows[span], match.cols[span]
        assert (np.diff(rows) > 0).all() and len(set(cols.tolist())) == len(cols)
        assert legal[rows, cols].all()
        np.testing.assert_allclose(match.iou[span], ious[rows, cols], rtol=1e-13)
        inside = [reference_ignored(box, label, gts[i]) for box, label in zip(*preds[i], strict=True)]
        assert match.ignored[starts[i] : starts[i + 1]].tolist() == inside
        # Independent optimum: a large constant for illegal pairs (the costs here are below 200, so 1e6 is exact enough).
        r, c = linear_sum_assignment(np.where(legal, costs, 1e6))
        best = legal[r, c]
        expected = best.sum(), costs[r, c][best].sum()
        if largest <= 3:
            count, total = brute_force(costs, legal)
            assert count == expected[0] and total == pytest.approx(expected[1], abs=1e-9)
        assert len(rows) == expected[0]
        assert costs[rows, cols].sum() == pytest.approx(expected[1], abs=1e-9)
        matched += len(rows)
    assert matched > batch / 3  # the cases are not trivially empty


def one(pred, gt, cost, size=(100, 100), pred_labels=None, gt_labels=None, ignore=None):
    labels = [pred_labels or [0] * len(pred)], [gt_labels or [0] * len(gt)]
    ignore = None if ignore is None else [ignore]
    return match_boxes(Boxes.pack([pred], labels[0]), Boxes.pack([gt], labels[1], ignore), [size], cost)


def test_cost_by_hand():
    """One prediction, two objects whose costs are worked out on paper, on both sides of the point where they are equal."""
    pred, gt = [[0, 0, 20, 10]], [[0, 0, 10, 10], [40, 0, 60, 10]]
    # First: IoU = GIoU = 1/2; centre off by 5, width by 10: L1 = 15 / width. Second: IoU 0, hull 600, GIoU = -200/600;
    # centre off by 40: L1 = 40 / width. With giou = 1: 15/W + 1/2 + cls against 40/W + 4/3, equal where cls = 25/W + 5/6.
    equal = 25 / 200 + 5 / 6
    for cls, expected in ((equal - 1e-9, 0), (equal + 1e-9, 1)):
        cost = MatchCost(l1=1, giou=1, cls=cls)
        match = one(pred, gt, cost, size=(200, 50), pred_labels=[7], gt_labels=[8, 7])
        assert match.cols.tolist() == [expected]
    assert match.table.tolist() == [0.5, 0.0] and match.table_offsets.tolist() == [0, 2]
    # Down: the same boxes turned, so the image's height (200) is what divides.
    pred, gt = [[0, 0, 10, 20]], [[0, 0, 10, 10], [0, 40, 10, 60]]
    for cls, expected in ((equal - 1e-9, 0), (equal + 1e-9, 1)):
        cost = MatchCost(l1=1, giou=1, cls=cls)
        assert one(pred, gt, cost, size=(50, 200), pred_labels=[7], gt_labels=[8, 7]).cols.tolist() == [expected]


def test_more_pairs_come_before_less_cost():
    # Taken alone, row 0 is dearer with column 1 than with column 0, but only so can row 1 be matched as well.
    gt = [[0, 0, 10, 10], [0, 0, 10, 19]]
    pred = [[0, 0, 10, 11], [0, 0, 10, 6]]
    match = one(pred, gt, MatchCost(min_iou=0.55))
    assert match.rows.tolist() == [0, 1] and match.cols.tolist() == [1, 0]
    assert match.iou == pytest.approx([11 / 19, 0.6])


def test_a_box_has_iou_one_with_itself():
    boxes = np.random.default_rng(5).uniform(0, 1000, (500, 2, 2))
    boxes = np.sort(boxes, 1).reshape(500, 4)
    packed = Boxes(boxes, np.zeros(500, np.int64), np.arange(501))
    match = match_boxes(packed, packed, np.full((500, 2), 1000), MatchCost())
    assert (match.table == 1.0).all() and (match.iou == 1.0).all() and len(match.rows) == 500


BROKEN = [
    [np.nan, 0, 1, 1],
    [0, 0, np.inf, 1],
    [-np.inf, -np.inf, np.inf, np.inf],
    [0, 0, 1e308, 1e308],
    [-1.1e6, 0, 5, 5],
    [9, 9, 1, 1],
    [3, 0, 3, 9],
    [0, 0, 0, 0],
]


def test_broken_predictions_match_nothing_and_disturb_nothing():
    good, gt = [1, 1, 9, 9], [[0, 0, 10, 10], [50, 50, 60, 60]]
    match = one([*BROKEN, good], gt, MatchCost())
    assert match.rows.tolist() == [len(BROKEN)] and match.cols.tolist() == [0]
    assert match.iou.tolist() == [0.64]
    assert (match.table[:-2] == 0).all() and match.table[-2:].tolist() == [0.64, 0]


def test_ignored_objects_have_no_partner_but_stand_in_the_table():
    match = one([[0, 0, 10, 10]], [[0, 0, 10, 10], [80, 80, 90, 90]], MatchCost(), ignore=[True, False])
    assert match.cols.tolist() == [1] and match.table.tolist() == [1, 0]


def test_inside_an_ignore_region_by_hand():
    """The region covers the left half of the first box exactly, and a little more of the second."""
    region = [[0, 0, 50, 100], [30, 0, 100, 100]]
    pred = [[40, 0, 60, 10], [39.9, 0, 60, 10], [39.9, 0, 60, 10], [10, 10, 20, 20], [10, 20, 20, 10], [np.nan] * 4]
    match = one(pred, region, MatchCost(), pred_labels=[0, 0, 1, 0, 0, 0], ignore=[True, False])
    assert match.ignored.tolist() == [False, True, False, True, False, False]
    match = one(pred, region, MatchCost())
    assert not match.ignored.any()


def test_many_legal_pairs_are_worth_more_than_any_cost():
    """A chain in which only the dearest of all choices lets every prediction be matched. Costs spread over 1e9."""
    # Prediction i overlaps object i a little and object i + 1 a lot; the last one has object n - 1 only.
    n = 60
    gt = [[10 * i, 0, 10 * i + 10, 10] for i in range(n)]
    pred = [[10 * i + 6, 0, 10 * i + 16, 10] for i in range(n)]
    for weight in (1e-3, 1.0, 1e6):
        match = one(pred, gt, MatchCost(l1=weight, giou=weight, cls=0, min_iou=0.2), size=(1000, 10))
        assert match.rows.tolist() == list(range(n)) and match.cols.tolist()[-1] == n - 1
        assert match.cols.tolist() == list(range(n))
        # Without the last prediction every other one has its better choice.
        match = one(pred[:-1], gt, MatchCost(l1=weight, giou=weight, cls=0, min_iou=0.2), size=(1000, 10))
        assert match.cols.tolist() == list(range(1, n))


def test_no_boxes_on_either_side():
    pred = Boxes.pack([[], [[0, 0, 1, 1]], []], [[], [0], []])
    gt = Boxes.pack([[[0, 0, 1, 1]], [], []], [[0], [], []])
    match = match_boxes(pred, gt, np.ones((3, 2)), MatchCost())
    assert match.offsets.tolist() == match.table_offsets.tolist() == [0, 0, 0, 0]
    assert len(match.rows) == len(match.iou) == len(match.table) == 0


def test_bad_ground_truth_and_sizes_name_the_problem():
    pred = Boxes.pack([[], []], [[], []])
    fine = [[0, 0, 1, 1]]
    for value in (np.nan, np.inf, 2e6):
        gt = Boxes.pack([fine, [[0, 0, 1, 1], [0, 0, value, 1]]], [[0], [0, 0]])
        with pytest.raises(ValueError, match="problem 1: ground truth box 1"):
            match_boxes(pred, gt, np.ones((2, 2)), MatchCost())
    gt = Boxes.pack([fine, fine], [[0], [0]])
    for size in ((0, 5), (np.nan, 5), (5, -1)):
        with pytest.raises(ValueError, match="problem 1: image size"):
            match_boxes(pred, gt, [(5, 5), size], MatchCost())


BAD_BOXES = [
    (Boxes(np.zeros((2, 3)), np.zeros(2), np.array([0, 2])), r"pred.boxes must be \(M, 4\), got shape \(2, 3\)"),
    (Boxes(np.zeros((2, 4)), np.zeros(1), np.array([0, 2])), r"2 boxes need as many labels"),
    (Boxes(np.zeros((2, 4)), np.zeros(2), np.array([0, 1])), r"pred.offsets must rise from 0 to 2"),
    (Boxes(np.zeros((2, 4)), np.zeros(2), np.array([0, 3, 2])), r"pred.offsets must rise"),
    (Boxes(np.zeros((2, 4)), np.zeros(2), np.array([0, 1, 2])), r"pred holds 2 problems, gt 1"),
]


@pytest.mark.parametrize("pred, message", BAD_BOXES)
def test_malformed_batches_are_refused(pred, message):
    gt = Boxes(np.zeros((0, 4)), np.zeros(0), np.array([0, 0]))
    with pytest.raises(ValueError, match=message):
        match_boxes(pred, gt, np.ones((1, 2)), MatchCost())


@pytest.mark.parametrize("fields", [{"l1": -1}, {"giou": np.nan}, {"cls": np.inf}, {"min_iou": 1.5}])
def test_bad_match_cost_names_the_field(fields):
    with pytest.raises(ValueError, match=f"MatchCost.{next(iter(fields))}"):
        MatchCost(**fields)
