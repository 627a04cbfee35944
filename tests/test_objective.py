"""The objective of a row: numbers worked by hand, and its explicit derivatives against autograd."""

import math

import pytest
import torch

from pr1.kernels import Objective, Rows, row_loss, row_terms

OFF = dict(rollout_cap=0.0)  # no rollout correction


def one_row(logp, advantage=1.0, weight=1.0, *, start=None, ref=None, rollout=0.0, kept=None, entropy=0.0, **objective):
    def t(v):
        return None if v is None else torch.tensor([v], dtype=torch.float64)

    tokens = torch.tensor([3])
    rows = Rows(tokens, t(advantage), t(weight), t(rollout), tokens, t(start), t(ref), t(kept))
    loss, dlogp, dentropy, stats = row_loss(t(logp), t(entropy), rows, Objective(**objective))
    return loss.item(), dlogp.item(), dentropy.item(), stats


# ln = natural log of the ratio wanted; clip range [.8, 1.28]
GOLDEN = [
    # name, arguments, loss, dlogp, clipped
    ("on policy: ratio 1", dict(logp=-1.2, advantage=1.5, weight=0.25, **OFF), -0.375, -0.375, 0),
    ("clip up", dict(logp=math.log(1.5), start=0.0, advantage=2.0, **OFF), -2.56, 0.0, 1),
    ("below the upper clip", dict(logp=math.log(1.25), start=0.0, advantage=2.0, **OFF), -2.5, -2.5, 0),
    ("clip down, negative advantage", dict(logp=math.log(0.5), start=0.0, advantage=-1.0, **OFF), 0.8, 0.0, 1),
    (
        "negative advantage, ratio up: not clipped",
        dict(logp=math.log(1.5), start=0.0, advantage=-1.0, **OFF),
        1.5,
        1.5,
        0,
    ),
    ("positive advantage, ratio down: not clipped", dict(logp=math.log(0.5), start=0.0, **OFF), -0.5, -0.5, 0),
    ("no clipping above", dict(logp=math.log(7.0), start=0.0, clip_high=math.inf, **OFF), -7.0, -7.0, 0),
    (
        "no clipping below",
        dict(logp=math.log(0.01), start=0.0, advantage=-1.0, clip_low=math.inf, **OFF),
        0.01,
        0.01,
        0,
    ),
    # e^20 = 485165195.40979; the ratio stops moving beyond
    ("ratio clamped at e^20", dict(logp=30.0, start=0.0, advantage=-2.0, **OFF), 2 * 485165195.40979, 0.0, 0),
    ("correction 3, cap 2", dict(logp=-1.0, rollout=-1.0 - math.log(3.0)), -2.0, -2.0, 0),
    ("correction 3, no cap", dict(logp=-1.0, rollout=-1.0 - math.log(3.0), rollout_cap=math.inf), -3.0, -3.0, 0),
    ("correction 1.5 * kept 1/2", dict(logp=-1.0, rollout=-1.0 - math.log(1.5), kept=math.log(0.5)), -0.75, -0.75, 0),
    ("correction off", dict(logp=-1.0, rollout=-9.0, kept=-1.0, **OFF), -1.0, -1.0, 0),
    (
        "correction is of the start policy: ratio 1.25 times 1/2",
        dict(logp=math.log(1.25), start=0.0, rollout=math.log(2.0)),
        -0.625,
        -0.625,
        0,
    ),
    # d = ln 2: k3 = 2 - ln 2 - 1 = 0.30685281944, slope -(2 - 1); k2 = ln(2)^2 / 2 = 0.24022650696, slope -ln 2
    ("k3", dict(logp=-1.0, ref=-1.0 + math.log(2.0), advantage=0.0, kl_coef=0.5), 0.15342640972, -0.5, 0),
    (
        "k2",
        dict(logp=-1.0, ref=-1.0 + math.log(2.0), advantage=0.0, kl_coef=0.5, kl="k2"),
        0.12011325348,
        -0.34657359028,
        0,
    ),
    (
        "k3 from below",
        dict(logp=-1.0, ref=-1.0 - math.log(4.0), advantage=0.0, weight=2.0, kl_coef=1.0),
        2 * (0.25 + math.log(4.0) - 1),
        2 * 0.75,
        0,
    ),
    (
        "clipped, but the KL still pulls",
        dict(logp=math.log(1.5), start=0.0, ref=0.0, kl_coef=1.0, **OFF),
        -1.28 + 2 / 3 + math.log(1.5) - 1,
        1 - 2 / 3,
        1,
    ),
    (
        "masked",
        dict(logp=-1.0, ref=3.0, start=5.0, weight=0.0, kl_coef=1.0, entropy=2.0, entropy_coef=1.0),
        0.0,
        0.0,
        0,
    ),
]


@pytest.mark.parametrize("name, arguments, loss, dlogp, clipped", GOLDEN, ids=[g[0] for g in GOLDEN])
def test_numbers_worked_by_hand(name, arguments, loss, dlogp, clipped):
    got_loss, got_dlogp, _, stats = one_row(**arguments)
    assert got_loss == pytest.approx(loss, rel=1e-9, abs=1e-10)
    assert got_dlogp == pytest.approx(dlogp, rel=1e-9, abs=1e-10)
    assert stats.clipped.item() == clipped


def test_entropy_term_is_weighted_and_negative():
    loss, dlogp, dentropy, stats = one_row(-1.0, 0.0, 0.25, entropy=2.0, entropy_coef=0.01)
    assert (loss, dlogp, dentropy) == (pytest.approx(-0.005), 0.0, pytest.approx(-0.0025))
    assert stats.entropy.item() == 2.0


def test_statistics():
    stats = one_row(math.log(0.5), start=0.0, ref=0.0, kl="k2")[3]  # d = ln 2; reported kl is k3 whatever kl says
    assert stats.kl.item() == pytest.approx(2 - math.log(2) - 1, rel=1e-6)
    assert stats.ratio.item() == pytest.approx(0.5)
    assert stats.logp.item() == pytest.approx(math.log(0.5))
    assert one_row(-1.0)[3].kl.item() == 0  # no reference
    assert one_row(-1.0)[3].ratio.item() == 1  # exactly
    masked = one_row(-1.0, start=0.0, ref=0.0, weight=0.0, entropy=1.0)[3]
    assert [v.item() for v in vars(masked).values()] == [0, 0, 0, 0, 0]
    assert all(v.dtype == torch.float32 and not v.requires_grad for v in vars(masked).values())


def many_rows(n=4000, seed=0, start=True):
    """Rows that visit every branch: clipped on both sides, clamped, capped, masked with NaN, impossible tokens."""
    g = torch.Generator().manual_seed(seed)

    def normal(scale=1.0):
        return scale * torch.randn(n, generator=g, dtype=torch.float64)

    logp = -normal().abs() - 0.1
    far = torch.rand(n, generator=g) < 0.1
    logp_start = logp + normal(0.3) + far * normal(30)
    logp_ref = logp + normal(0.3) + far * normal(30)
    advantage, weight = normal(), torch.rand(n, generator=g, dtype=torch.float64)
    weight[torch.rand(n, generator=g) < 0.2] = 0
    advantage[::7] = 0
    logp[::50], logp_start[::100] = -math.inf, -math.inf
    logp_start[:20] = logp[:20] + torch.tensor([20.0, -20.0], dtype=torch.float64).repeat(10)  # at or near the clamp
    masked = weight == 0
    logp_rollout = logp_start + normal(0.5)
    for bad in (logp_rollout, logp_ref, logp_start, advantage, logp):
        bad[masked.nonzero().squeeze(1)[::3]] = math.nan
    sequence = torch.arange(n)
    rows = Rows(
        sequence, advantage, weight, logp_rollout, sequence, logp_start if start else None, logp_ref, -normal(0.2).abs()
    )
    return logp, normal().abs(), rows


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize(
    "objective",
    [
        Objective(kl_coef=0.04, entropy_coef=0.01),
        Objective(kl_coef=0.3, kl="k2", entropy_coef=-0.1, rollout_cap=0),
        Objective(clip_low=math.inf, clip_high=math.inf, rollout_cap=math.inf),
        Objective(clip_low=0.0, clip_high=0.0),
    ],
)
def test_derivatives_equal_autograd(objective, start):
    logp, entropy, rows = many_rows(start=start)
    x, h = logp.clone().requires_grad_(), entropy.clone().requires_grad_()
    truth, truth_stats = row_terms(x, h, rows, objective)
    dx, dh = torch.autograd.grad(truth.sum(), (x, h))
    loss, dlogp, dentropy, stats = row_loss(logp, entropy, rows, objective)
    assert torch.isfinite(loss).all() and torch.isfinite(dlogp).all()
    assert torch.equal(loss, truth.detach())
    torch.testing.assert_close(dlogp, dx, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(dentropy, dh, rtol=1e-12, atol=0)
    masked = rows.weight == 0
    assert masked.any() and not loss[masked].any() and not dlogp[masked].any() and not dentropy[masked].any()
    for a, b in zip(vars(stats).values(), vars(truth_stats).values(), strict=True):
        assert torch.equal(a, b) and not a[masked].any()
    if start and objective.clip_high == 0.28:
        t = logp - rows.logp_start
        assert (t[~masked].abs() > 20).sum() > 50 and stats.clipped.sum() > 200  # the branches were visited


def test_a_ratio_on_the_bound_is_not_clipped():
    # 1 - clip_low = 0.5 and 1 + clip_high = 2 are exact, and so are exp(log(2)) and exp(-log(2)) in float64
    for ratio, advantage in ((2.0, 1.0), (0.5, -1.0)):
        logp = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        index = torch.zeros(1, dtype=torch.int64)
        rows = Rows(index, advantage * one, one, zero, index, logp_start=zero)
        objective = Objective(clip_low=0.5, clip_high=1.0, rollout_cap=0)
        loss, stats = row_terms(logp, zero, rows, objective)
        loss.sum().backward()
        assert stats.ratio.item() == ratio and stats.clipped.item() == 0
        assert row_loss(logp.detach(), zero, rows, objective)[1].item() == logp.grad.item() == -ratio * advantage


def test_nan_in_a_live_row_shows():
    loss, dlogp, _, _ = one_row(math.nan, start=0.0, ref=0.0, kl_coef=1.0)
    assert math.isnan(loss) and math.isnan(dlogp)


def test_loss_of_float32_rows_is_float32():
    logp, entropy, rows = many_rows(50)
    rows = Rows(*(v if v.dtype == torch.int64 else v.float() for v in vars(rows).values()))
    loss, dlogp, dentropy, _ = row_loss(logp.float(), entropy.float(), rows, Objective(entropy_coef=0.1))
    assert loss.dtype == dlogp.dtype == dentropy.dtype == torch.float32


def test_rows_are_checked():
    f, i = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    Rows(i, f, f, f, i, f, f, f)
    with pytest.raises(ValueError, match="Rows.tokens must be a one-dimensional"):
        Rows(i[None], f, f, f, i)
    with pytest.raises(ValueError, match=r"Rows.tokens must be \(3,\) int64.*int32"):
        Rows(i.int(), f, f, f, i)
    with pytest.raises(ValueError, match=r"Rows.advantage must be \(3,\) float32.*\(2,\)"):
        Rows(i, f[:2], f, f, i)
    with pytest.raises(ValueError, match=r"Rows.weight must be .* bool"):
        Rows(i, f, f > 0, f, i)
    with pytest.raises(ValueError, match=r"Rows.logp_rollout must be .* NoneType"):
        Rows(i, f, f, None, i)
    with pytest.raises(ValueError, match="Rows.log_kept"):
        Rows(i, f, f, f, i, log_kept=f.half())
    with pytest.raises(ValueError, match="Rows.sequence is on meta"):
        Rows(i, f, f, f, i.to("meta"))


def test_rows_move_and_are_taken():
    i = torch.arange(4)
    rows = Rows(i, i * 1.0, i * 2.0, i * 3.0, i, log_kept=i * 4.0)
    taken = rows.take(torch.tensor([3, 1]))
    assert taken.tokens.tolist() == [3, 1] and taken.log_kept.tolist() == [12, 4] and taken.logp_ref is None
    assert len(rows.take(i > 0)) == 3
    moved = rows.to("meta")
    assert moved.weight.device.type == "meta" and moved.log_kept.device.type == "meta" and moved.logp_start is None


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(kl="k1"), "zero in expectation"),
        (dict(kl="k4"), '"k3" or "k2"'),
        (dict(clip_low=-0.1), "clip_low"),
        (dict(clip_high=math.nan), "clip_high"),
        (dict(rollout_cap=-1.0), "rollout_cap"),
        (dict(temperature=0.0), "temperature"),
        (dict(kl_coef=math.inf), "kl_coef"),
    ],
)
def test_bad_objectives_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        Objective(**bad)


def test_a_kl_coefficient_needs_a_reference():
    with pytest.raises(ValueError, match="needs Rows.logp_ref"):
        one_row(-1.0, kl_coef=0.1)
