"""Group advantages, worked by hand."""

import math

import numpy as np
import pytest

from pr1.advantage import flat_groups, group_advantages


def test_by_hand():
    """(0, 0, 1, 1): mean 1/2, deviations 1/2, variance with n-1 = 4 * (1/4) / 3 = 1/3. (1, 2, 6): mean 3, deviations
    (-2, -1, 3), variance 14 / 2 = 7."""
    a = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    np.testing.assert_allclose(
        group_advantages([[0, 0, 1, 1], [1, 1, 0, 0]]), [[-a, -a, a, a], [a, a, -a, -a]], rtol=1e-14
    )
    s = math.sqrt(7) + 1e-4
    np.testing.assert_allclose(group_advantages([[1, 2, 6]]), [[-2 / s, -1 / s, 3 / s]], rtol=1e-14)
    # two completions: deviations -+d/2, std d/sqrt(2)
    np.testing.assert_allclose(
        group_advantages([[0.2, 0.6]]), np.array([[-0.2, 0.2]]) / (0.4 / math.sqrt(2) + 1e-4), rtol=1e-14
    )


def test_centred_only():
    """Dr.GRPO: no division."""
    np.testing.assert_allclose(group_advantages([[1, 2, 6], [0, 0, 3]], "none"), [[-2, -1, 3], [-1, -1, 2]], rtol=1e-15)


@pytest.mark.parametrize("scale", ["group", "none"])
def test_flat_groups_give_exactly_zero(scale):
    """0.1 * 3 != 0.3 and means round: what is equal to 1e-6 gets no advantage at all."""
    third = [0.1 + 0.2, 0.3, 0.3]
    rewards = np.array([[0.7] * 3, third, [0.5, 0.5, 0.5 + 0.9e-6], [0.5, 0.5, 0.5 + 1.1e-6]])
    assert rewards[1, 0] != rewards[1, 1]
    assert flat_groups(rewards).tolist() == [True, True, True, False]
    advantages = group_advantages(rewards, scale)
    assert (advantages[:3] == 0).all() and (advantages[3] != 0).all()


def test_computed_in_float64():
    """Float32 rewards on a large offset: float32 arithmetic would be off by percents."""
    rewards = np.array([[1000.001, 1000.002, 1000.004]], np.float32)
    exact = rewards.astype(np.float64)
    deviations = exact[0] - sum(exact[0]) / 3
    truth = deviations / (math.sqrt((deviations**2).sum() / 2) + 1e-4)
    advantages = group_advantages(rewards)
    assert advantages.dtype == np.float64
    np.testing.assert_allclose(advantages[0], truth, rtol=1e-9)
    centred = rewards[0] - rewards[0].mean()
    assert np.abs(centred / (centred.std(ddof=1) + 1e-4) / truth - 1).max() > 0.005  # what float32 would give


@pytest.mark.parametrize("scale", ["group", "none"])
def test_groups_do_not_mix_and_sum_to_zero(scale):
    rewards = np.random.default_rng(0).random((5, 8))
    advantages = group_advantages(rewards, scale)
    np.testing.assert_allclose(advantages.sum(1), 0, atol=1e-12)
    for p in range(5):
        np.testing.assert_array_equal(advantages[p : p + 1], group_advantages(rewards[p : p + 1], scale))
        assert (np.argsort(advantages[p]) == np.argsort(rewards[p])).all()
    if scale == "group":
        np.testing.assert_allclose(advantages.std(1, ddof=1), 1, atol=2e-3)
    before = rewards.copy()
    group_advantages(rewards, scale)
    np.testing.assert_array_equal(rewards, before)


def test_no_groups():
    assert group_advantages(np.zeros((0, 8))).shape == (0, 8)
    assert flat_groups(np.zeros((0, 8))).shape == (0,)


@pytest.mark.parametrize("rewards, scale, complaint", [
    ([[1.0], [2.0]], "group", r"at least 2 completions \(--group-size\)"),
    ([1.0, 2.0], "group", "at least 2 completions"),
    ([[0, 1], [0, math.nan], [math.inf, 0]], "group", "prompt 1 are not all finite"),
    ([[0, 1], [0, 1], [-math.inf, 0]], "none", "prompt 2 are not all finite"),
    ([[0, 1]], "batch", "'batch': group or none"),
])  # fmt: skip
def test_errors(rewards, scale, complaint):
    with pytest.raises(ValueError, match=complaint):
        group_advantages(rewards, scale)
