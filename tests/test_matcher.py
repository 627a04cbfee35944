"""linear_sum_assignment_batch against scipy's solver, on every instruction set of this machine."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from isas import ISAS, on_every_isa
from scipy.optimize import linear_sum_assignment

from pr1 import matcher


def linear_sum_assignment_batch(costs):
    return on_every_isa(matcher.linear_sum_assignment_batch, costs)


INSTANCES = 3500  # of each of the 30 families below: 105,000 in all
SHAPES = [(3, 3), (4, 6), (7, 4), (8, 8), (2, 12)]  # square, wide, tall, larger square, very wide


def ties(rng, shape):
    return rng.integers(0, 4, shape).astype(np.float64)


def negated(rng, shape):
    """A transposed view of negative and positive costs: not contiguous."""
    return -rng.integers(-9, 10, (shape[0], shape[2], shape[1])).astype(np.float64).transpose(0, 2, 1)


def uniform(rng, shape):
    return rng.random(shape)


def huge_range(rng, shape):
    return rng.choice([-1.0, 1.0], shape) * 10.0 ** rng.uniform(-12, 12, shape)


def forbidden(rng, shape):
    """A third of the pairs forbidden, but one complete assignment always left."""
    costs = rng.integers(0, 6, shape).astype(np.float64)
    costs[rng.random(shape) < 0.33] = np.inf
    k = np.arange(min(shape[1:]))
    costs[:, k, k] = rng.integers(0, 30, (shape[0], len(k)))
    return costs


def duplicated(rng, shape):
    """Rank one plus repeated columns: almost every assignment ties with others."""
    costs = rng.integers(0, 3, shape[:2])[:, :, None] + rng.integers(0, 3, (shape[0], 1, shape[2]))
    return costs.astype(np.float64)


FAMILIES = [ties, negated, uniform, huge_range, forbidden, duplicated]


def check_pairs(rows, cols, shape):
    """A complete assignment: min(m, n) pairs, rows ascending, nothing used twice."""
    m, n = shape
    assert len(rows) == len(cols) == min(m, n)
    assert (np.diff(rows) > 0).all()
    assert len(set(cols.tolist())) == len(cols)
    assert len(rows) == 0 or (rows.min() >= 0 and rows.max() < m and cols.min() >= 0 and cols.max() < n)


def totals(costs, rows, cols):
    """(B,) float64 total of each (m, n) matrix of a stack, after checking that its pairs are a complete assignment."""
    batch, m, n = costs.shape
    rows, cols = rows.reshape(batch, min(m, n)), cols.reshape(batch, min(m, n))
    assert (np.diff(rows) > 0).all() and (np.diff(np.sort(cols)) > 0).all()
    for index, limit in ((rows, m), (cols, n)):
        assert index.min() >= 0 and index.max() < limit
    return costs[np.arange(batch)[:, None], rows, cols].astype(np.float64).sum(1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_total_cost_equals_scipy(family, shape):
    rng = np.random.default_rng(SHAPES.index(shape) * 100 + FAMILIES.index(family))
    costs = family(rng, (INSTANCES, *shape))
    rows, cols, offsets = linear_sum_assignment_batch(costs)
    assert offsets.dtype == rows.dtype == cols.dtype == np.int64
    assert (offsets == np.arange(INSTANCES + 1) * min(shape)).all()
    ours = totals(costs, rows, cols)
    scipys = np.array([cost[linear_sum_assignment(cost)].sum() for cost in costs])
    single = totals(costs, *linear_sum_assignment_batch(costs.astype(np.float32))[:2])
    if family in (uniform, huge_range):
        magnitude = np.abs(costs).sum((1, 2))
        assert (np.abs(ours - scipys) <= 1e-13 * magnitude).all()  # what float64 gives
        assert (np.abs(single - scipys) <= 1e-5 * np.maximum(1.0, magnitude)).all()
        assert (np.abs(single - scipys) <= 1e-6 * magnitude).all()  # what float32 gives, rounding its input included
    else:
        assert (ours == scipys).all() and (single == scipys).all()


# 64 columns are the most that one word of the free list holds, and 16 to 64 float32 ones stay in registers.
EDGES = [(1, 1), (1, 17), (5, 16), (8, 8), (9, 9), (16, 16), (17, 17), (20, 20), (32, 32), (33, 24), (48, 48), (49, 49)]
EDGES += [(63, 65), (64, 64), (65, 65), (65, 63), (10, 129), (128, 30)]


@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_sizes_around_whole_vectors_equal_scipy(shape):
    rng = np.random.default_rng(shape)
    batch = max(4, 12000 // (shape[0] * shape[1] + 100))
    for costs in (rng.random((batch, *shape)), rng.integers(0, 10, (batch, *shape)).astype(np.float64)):
        for dtype, bound in ((np.float64, 1e-14), (np.float32, 1e-6)):
            stack = costs.astype(dtype)
            ours = totals(stack, *linear_sum_assignment_batch(stack)[:2])
            scipys = [cost[linear_sum_assignment(cost)].astype(np.float64).sum() for cost in stack]
            assert ours == pytest.approx(scipys, rel=bound, abs=0)


def test_large_problems_equal_scipy():
    rng = np.random.default_rng(0)
    costs = [
        rng.random((150, 150)),
        rng.random((40, 300)),
        rng.integers(0, 5, (300, 90)),
        rng.integers(0, 99, (120, 120)),
    ]
    rows, cols, offsets = linear_sum_assignment_batch(costs)
    for i, cost in enumerate(costs):
        r, c = rows[offsets[i] : offsets[i + 1]], cols[offsets[i] : offsets[i + 1]]
        check_pairs(r, c, cost.shape)
        assert cost[r, c].sum() == pytest.approx(cost[linear_sum_assignment(cost)].sum(), rel=1e-14)


@pytest.mark.parametrize("shape", [(12, 12), (12, 16)], ids=str)
def test_large_whole_numbers_in_float32_are_exact(shape):
    """Each fits the 24 bits of a float32, but not their sums, and the best assignments differ by little."""
    rng = np.random.default_rng(shape)
    rows, cols = (rng.integers(-(2**23), 2**23, (300, *side)) for side in ((shape[0], 1), (1, shape[1])))
    costs = (rows // 2 * 2 + cols + rng.integers(0, 3, (300, *shape))).clip(-(2**24), 2**24).astype(np.float32)
    ours = totals(costs, *linear_sum_assignment_batch(costs)[:2])
    assert (ours == [cost[linear_sum_assignment(cost)].astype(np.float64).sum() for cost in costs]).all()


def test_a_difference_that_float32_cannot_hold_does_not_become_a_tie():
    """Each entry is exact in float32; row 0 less the columns' least costs is 2^25 - 1 in column 1, 2^25 elsewhere."""
    big = 2.0**24
    costs = np.array([[[big, big - 1, big], [-big] * 3, [-big] * 3]], np.float32)
    assert linear_sum_assignment_batch(costs)[1][0] == 1


def test_float32_near_its_end_does_not_overflow():
    small = np.random.default_rng(8).integers(-4, 5, (500, 6, 6)).astype(np.float32)
    ours = totals(small, *linear_sum_assignment_batch(small * np.float32(2.0**125))[:2])
    assert (ours == [cost[linear_sum_assignment(cost)].sum() for cost in small]).all()


def test_large_offsets_in_float64_keep_their_digits():
    small = np.random.default_rng(9).random((300, 10, 10))
    ours = totals(small, *linear_sum_assignment_batch(small + 1e6)[:2])
    assert ours == pytest.approx([cost[linear_sum_assignment(cost)].sum() for cost in small], abs=1e-8)


def elements(dtype):
    width = 64 if dtype == np.float64 else 32
    whole = st.integers(-8, 8).map(dtype)
    finite = st.floats(-(2.0**60), 2.0**60, width=width)
    return st.one_of(whole, st.just(dtype(np.inf)), finite)


matrices = st.sampled_from([np.float32, np.float64]).flatmap(
    lambda dtype: st.tuples(st.integers(0, 9), st.integers(0, 20)).flatmap(
        lambda shape: arrays(dtype, shape, elements=elements(dtype), fill=st.just(dtype(1)))
    )
)


@settings(max_examples=400, deadline=None)
@given(matrices, st.booleans())
def test_any_matrix_equals_scipy_or_is_infeasible_for_both(cost, transpose):
    cost = cost.T if transpose else cost
    try:
        expected = cost[linear_sum_assignment(cost)].astype(np.float64).sum()
    except ValueError:
        with pytest.raises(ValueError, match="problem 0: every complete assignment"):
            linear_sum_assignment_batch([cost])
        return
    rows, cols, _ = linear_sum_assignment_batch([cost])
    check_pairs(rows, cols, cost.shape)
    magnitude = np.abs(cost[np.isfinite(cost)], dtype=np.float64).sum()
    bound = 1e-14 if cost.dtype == np.float64 else 1e-6
    assert abs(cost[rows, cols].astype(np.float64).sum() - expected) <= bound * max(1.0, magnitude)


def test_ragged_list_with_empty_problems_keeps_each_problem_apart():
    rng = np.random.default_rng(1)
    shapes = [(0, 0), (3, 5), (0, 4), (5, 3), (4, 0), (1, 1), (6, 6), (0, 0)]
    costs = [rng.integers(0, 9, s) for s in shapes]
    rows, cols, offsets = linear_sum_assignment_batch(costs)
    assert (np.diff(offsets) == [min(s) for s in shapes]).all()
    for i, cost in enumerate(costs):
        alone = linear_sum_assignment_batch([cost])
        assert (rows[offsets[i] : offsets[i + 1]] == alone[0]).all()
        assert (cols[offsets[i] : offsets[i + 1]] == alone[1]).all()
        assert cost[alone[:2]].sum() == cost[linear_sum_assignment(cost)].sum()


@pytest.mark.parametrize(
    "costs", [[], np.zeros((0, 3, 3)), np.zeros((4, 0, 3)), np.zeros((4, 3, 0)), [np.zeros((0, 7))]]
)
def test_nothing_to_assign(costs):
    rows, cols, offsets = linear_sum_assignment_batch(costs)
    assert rows.shape == cols.shape == (0,)
    assert offsets.tolist() == [0] * (len(costs) + 1)


@pytest.mark.parametrize("shape", [(4, 4), (3, 6), (6, 3)])
def test_ties_are_broken_as_documented(shape):
    k = np.arange(min(shape))
    rows, cols, _ = linear_sum_assignment_batch(np.full((1, *shape), 2.5))
    assert (rows == k).all() and (cols == k).all()
    # Row 0 takes column 0, the lowest of its two cheapest. Row 1 only likes column 0: the shortest path moves row 0 over.
    rows, cols, _ = linear_sum_assignment_batch([[[1, 1, 5], [1, 5, 5], [9, 9, 9]]])
    assert cols.tolist() == [1, 0, 2]
    # Row 1 may take the free column 2, or column 0 by moving row 0 to column 1, at the same cost: the free one wins.
    assert linear_sum_assignment_batch([[[1, 1, 9], [1, 5, 1]]])[1].tolist() == [0, 2]


@pytest.mark.parametrize(
    "convert",
    [
        lambda c: c.astype(np.float32),
        lambda c: c.astype(np.int32),
        lambda c: c.astype(np.float16),
        lambda c: c.tolist(),
        lambda c: torch.from_numpy(c).bfloat16(),
        lambda c: torch.from_numpy(c).requires_grad_(),
        lambda c: [torch.from_numpy(x) for x in c],
        lambda c: np.asfortranarray(c),
        lambda c: [c[0].astype(np.float32), *c[1:].tolist()],
    ],
)
def test_every_input_type_gives_the_same_pairs(convert):
    costs = np.random.default_rng(2).integers(0, 50, (6, 4, 5)).astype(np.float64)
    expected = linear_sum_assignment_batch(costs)
    for ours, theirs in zip(linear_sum_assignment_batch(convert(costs)), expected, strict=True):
        assert (ours == theirs).all()


def test_float64_is_not_rounded_to_float32():
    costs = np.array([[[1.0, 1.0 + 1e-12], [1.0 + 3e-12, 1.0 + 1e-12]]])
    assert linear_sum_assignment_batch(costs)[1].tolist() == [0, 1]
    costs = np.array([[[1.0 + 3e-12, 1.0], [1.0, 1.0 + 1e-12]]])
    assert linear_sum_assignment_batch(costs)[1].tolist() == [1, 0]


def test_costs_near_the_end_of_float64_do_not_overflow():
    small = np.random.default_rng(4).integers(-4, 5, (2000, 4, 4)).astype(np.float64)
    rows, cols, _ = linear_sum_assignment_batch(small * (np.finfo(np.float64).max / 4))
    ours = np.array(
        [cost[r, c].sum() for cost, r, c in zip(small, rows.reshape(-1, 4), cols.reshape(-1, 4), strict=True)]
    )
    assert (ours == [cost[linear_sum_assignment(cost)].sum() for cost in small]).all()


BAD_COSTS = [
    ([np.ones((2, 2)), [[1, np.nan], [1, 1]]], r"problem 1: cost\[0, 1\] is NaN"),
    ([np.ones((0, 2)), np.ones((2, 2)), [[1, 1, 1], [1, 1, -np.inf]]], r"problem 2: cost\[1, 2\] is -inf"),
    (
        np.array([[[1, 2], [3, 4.0]], [[np.inf, np.inf], [1, 2]]]),
        r"problem 1: every complete assignment holds a forbidden",
    ),
    ([[[np.inf, 1], [np.inf, 2], [np.inf, 3]]], r"problem 0: every complete assignment"),
    ([[[1, np.inf, np.inf], [1, np.inf, np.inf]]], r"problem 0: every complete assignment"),
    (np.ones((3, 3)), r"3 dimensions .*\(3, 3\).*costs\[None\]"),
    ([np.ones((2, 2)), np.ones(3)], r"problem 1: a cost matrix has 2 dimensions, got shape \(3,\)"),
    ([[[1, 2], [3]]], r"problem 0: costs cannot be read"),
    ([[["a"]]], r"problem 0: costs cannot be read"),
    ([np.ones((1, 1)), np.ones((1, 1), complex)], r"problem 1: .*real"),
    (torch.ones(1, 1, 1, dtype=torch.complex64), r"costs: .*real"),
    (torch.ones(1, 1, 1, device="meta"), r"CPU"),
]


@pytest.mark.parametrize("costs, message", BAD_COSTS)
@pytest.mark.parametrize("isa", ISAS)
def test_bad_costs_name_the_problem(costs, message, isa, monkeypatch):
    monkeypatch.setenv("PR1_ISA", isa)
    with pytest.raises(ValueError, match=message):
        matcher.linear_sum_assignment_batch(costs)


def test_other_threads_run_while_a_batch_is_solved():
    """The GIL is released: a Python thread makes progress inside one long call."""
    ticks, done = [], threading.Event()

    def tick():
        while not done.wait(0.001):
            ticks.append(1)

    thread = threading.Thread(target=tick)
    costs = np.random.default_rng(3).random((600, 120, 120))
    thread.start()
    try:
        before = len(ticks)
        matcher.linear_sum_assignment_batch(costs)
        during = len(ticks) - before
    finally:
        done.set()
        thread.join()
    assert during >= 3
