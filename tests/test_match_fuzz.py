"""Tens of thousands of random ragged problems: every instruction set and number of threads gives the same bits, and a
part of them is compared with the slow references of test_match_boxes.py."""

import numpy as np
import pytest
from isas import on_every_isa
from scipy.optimize import linear_sum_assignment
from test_match_boxes import reference_ignored, reference_tables

from pr1.matcher import Boxes, MatchCost, linear_sum_assignment_batch, match_boxes

BATCH = 500  # of each of the seeds below: 40,000 problems
SEEDS = range(80)


def random_side(rng, count, grid):
    """Boxes on a coarse grid (ties, equal and touching boxes) or anywhere; one in 16 is no box."""
    if grid:
        low, size = rng.integers(0, 6, (count, 2)) * 10.0, rng.integers(1, 5, (count, 2)) * 10.0
    else:
        low, size = rng.random((count, 2)) * 80, rng.random((count, 2)) * 40
    boxes = np.concatenate([low, low + size], 1)
    flat = rng.random(count) < 1 / 16
    boxes[flat, 2] = boxes[flat, 0]
    return boxes


def random_batch(seed):
    """pred, gt, sizes, cost: 0 to 70 boxes a side, 1 to 4 classes, half of the predictions near an object."""
    rng = np.random.default_rng(seed)
    m, n = rng.integers(0, [71, 25, 12, 5][seed % 4], (2, BATCH))
    starts, gt_starts = (np.concatenate([[0], np.cumsum(x)]) for x in (m, n))
    grid, classes = rng.random() < 0.5, rng.integers(1, 5)
    boxes, gt_boxes = (random_side(rng, x[-1], grid) for x in (starts, gt_starts))
    labels, gt_labels = (rng.integers(0, classes, x[-1]) for x in (starts, gt_starts))
    problem = np.repeat(np.arange(BATCH), m)
    near = (n[problem] > 0) & (rng.random(len(problem)) < 0.5)
    at = gt_starts[problem[near]] + rng.integers(0, n[problem[near]])
    boxes[near] = gt_boxes[at] + (rng.integers(-1, 2, (len(at), 4)) if grid else rng.normal(0, 1, (len(at), 4))) * 2
    labels[near] = gt_labels[at]
    boxes[rng.random(len(boxes)) < 0.01, seed % 4] = [np.nan, np.inf, -np.inf, 1e300][seed // 4 % 4]
    ignore = rng.random(len(gt_boxes)) < rng.choice([0.0, 0.1, 0.3])
    pred_ignore = rng.random(len(boxes)) < 0.1 if seed % 5 == 0 else None
    cost = MatchCost(*rng.choice([[5, 2, 2], [1.5, 0, 1], [0, 0, 0], [1000, 1, 0]]), rng.random() < 0.5,
                     rng.choice([0.0, 0.1, 0.5, 0.75]))  # fmt: skip
    pred, gt = Boxes(boxes, labels, starts, pred_ignore), Boxes(gt_boxes, gt_labels, gt_starts, ignore)
    return pred, gt, rng.integers(20, 120, (BATCH, 2)).astype(np.float64), cost


def on_every_path(monkeypatch, function):
    """The result, a tuple of arrays, after checking that it has the same bits on one thread and on four."""
    results = []
    for threads in ("1", "4"):
        monkeypatch.setenv("PR1_THREADS", threads)
        results.append(on_every_isa(function))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(*results, strict=True))
    return results[0]


def test_every_path_matches_alike_and_as_the_references(monkeypatch):
    total = 0
    for seed in SEEDS:
        pred, gt, sizes, cost = random_batch(seed)
        run = lambda: tuple(vars(match_boxes(pred, gt, sizes, cost)).values())  # noqa: B023, E731
        rows, cols, offsets, _, table, table_offsets, ignored = on_every_path(monkeypatch, run)
        total += len(rows)
        i = seed % 16  # one problem of each batch
        a, b = slice(*pred.offsets[i : i + 2]), slice(*gt.offsets[i : i + 2])
        target = gt.boxes[b], gt.labels[b], gt.ignore[b]
        ious, costs, legal = reference_tables((pred.boxes[a], pred.labels[a]), target, sizes[i], cost)
        if pred.ignore is not None:
            legal &= ~pred.ignore[a, None]
        mine = table[table_offsets[i] : table_offsets[i + 1]].reshape(ious.shape)
        np.testing.assert_allclose(mine, ious, rtol=1e-12, atol=1e-15)
        inside = [reference_ignored(*item, target) for item in zip(pred.boxes[a], pred.labels[a], strict=True)]
        assert ignored[a].tolist() == inside
        r, c = rows[offsets[i] : offsets[i + 1]], cols[offsets[i] : offsets[i + 1]]
        best = linear_sum_assignment(np.where(legal, costs, 1e7))
        best = tuple(index[legal[best]] for index in best)
        assert legal[r, c].all() and len(r) == len(best[0]) == len(set(c.tolist()))
        assert costs[r, c].sum() == pytest.approx(costs[best].sum(), rel=1e-9, abs=1e-9)
    assert total > 5 * BATCH * len(SEEDS)  # pairs: the problems are not trivially empty


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_path_assigns_alike(dtype, monkeypatch):
    for seed in range(16):
        rng = np.random.default_rng(seed)
        shapes = rng.integers(0, [71, 25][seed % 2], (BATCH, 2))
        whole = seed % 4 < 2
        costs = [(rng.integers(0, 6, s) if whole else rng.random(s)).astype(dtype) for s in shapes]
        rows, cols, offsets = on_every_path(monkeypatch, lambda: linear_sum_assignment_batch(costs))  # noqa: B023
        for i in range(0, BATCH, 10):
            mine = costs[i][rows[offsets[i] : offsets[i + 1]], cols[offsets[i] : offsets[i + 1]]]
            theirs = costs[i][linear_sum_assignment(costs[i])]
            assert mine.sum(dtype=np.float64) == pytest.approx(theirs.sum(dtype=np.float64), rel=1e-6, abs=0)
