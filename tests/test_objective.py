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
    # dual clip 3: for A < 0 the ratio is followed up to 3; for A > 0 it changes nothing
    ("dual clip", dict(logp=math.log(5.0), start=0.0, advantage=-2.0, dual_clip=3.0, **OFF), 6.0, 0.0, 1),
    ("below dual clip", dict(logp=math.log(2.5), start=0.0, advantage=-2.0, dual_clip=3.0, **OFF), 5.0, 5.0, 0),
    ("dual clip, clip down", dict(logp=math.log(0.5), start=0.0, advantage=-1.0, dual_clip=3.0, **OFF), 0.8, 0.0, 1),
    ("dual clip, A > 0", dict(logp=math.log(5.0), start=0.0, dual_clip=3.0, clip_high=9.0, **OFF), -5.0, -5.0, 0),
    # CISPO: a constant weight on log p = ln 2 = .69314718056; it is clipped, the gradient is not taken away
    ("cispo inside", dict(logp=math.log(2), start=math.log(1.6), loss="cispo", **OFF), -0.86643397570, -1.25, 0),
    ("cispo above", dict(logp=math.log(2), start=0.0, loss="cispo", **OFF), -0.88722839112, -1.28, 1),
    (
        "cispo above, A < 0",
        dict(logp=math.log(2), start=0.0, advantage=-0.5, loss="cispo", **OFF),
        0.44361419556,
        0.64,
        1,
    ),
    ("cispo below", dict(logp=math.log(2), start=math.log(8), loss="cispo", **OFF), -0.55451774445, -0.8, 1),
    ("cispo, capped twice", dict(logp=math.log(2), start=0.0, rollout=-2.0, loss="cispo"), -1.77445678224, -2.56, 1),
    # SAPO: gate 4/tau sigmoid(tau (r - 1)), slope 4 sigmoid (1 - sigmoid) r. sigmoid(1) = .73105857863, r = 2;
    # tau 2, r = 1.5 again sigmoid(1), for A < 0; at r = 1 the gate is 2 / tau and the slope 1
    ("sapo, ratio 1", dict(logp=-1.0, advantage=1.5, loss="sapo", **OFF), -3.0, -1.5, 0),
    ("sapo", dict(logp=math.log(2), start=0.0, loss="sapo", **OFF), -2.92423431452, -1.57289546593, 0),
    (
        "sapo, A < 0",
        dict(logp=math.log(1.5), start=0.0, advantage=-1.0, loss="sapo", sapo_tau_pos=9.0, sapo_tau_neg=2.0, **OFF),
        1.46211715726,
        1.17967159945,
        0,
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
    lengths = torch.randint(1, 9, (n,), generator=g)  # completions of 1 to 8 rows, numbered anyhow
    sequence = torch.randint(-(2**62), 2**62, (n,), generator=g).repeat_interleave(lengths)[:n]
    sequence[masked] += torch.randint(-1, 2, (int(masked.sum()),), generator=g)  # a masked row may say anything
    kept = -normal(0.2).abs()
    start = logp_start if start else None
    rows = Rows(torch.arange(n), advantage, weight, logp_rollout, sequence, start, logp_ref, kept)
    return logp, normal().abs(), rows


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize(
    "objective",
    [
        Objective(kl_coef=0.04, entropy_coef=0.01),
        Objective(kl_coef=0.3, kl="k2", entropy_coef=-0.1, rollout_cap=0),
        Objective(clip_low=math.inf, clip_high=math.inf, rollout_cap=math.inf),
        Objective(clip_low=0.0, clip_high=0.0),
        Objective(dual_clip=1.3, kl_coef=0.04),
        Objective(loss="cispo", kl_coef=0.04, entropy_coef=0.01),
        Objective(loss="cispo", clip_low=math.inf, clip_high=math.inf),
        Objective(loss="sapo", sapo_tau_pos=0.5, sapo_tau_neg=3.0, entropy_coef=0.01),
        Objective(ratio="sequence", kl_coef=0.04, entropy_coef=0.01),
        Objective(ratio="sequence", clip_low=0.01, clip_high=0.02, dual_clip=1.1, rollout_cap=0),
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
    if start and objective == Objective(kl_coef=0.04, entropy_coef=0.01):
        t = logp - rows.logp_start
        assert (t[~masked].abs() > 20).sum() > 50 and stats.clipped.sum() > 200  # the branches were visited


# ---- each variant as its paper writes it: completions (B, L), padded, mask (B, L), advantage (B, 1); J is maximised -----


def dual_clip_ppo(logp, start, advantage, mask, low, high, c):
    """Ye et al. 2020, arXiv 1912.09729, the dual-clip PPO objective; mean over the tokens."""
    r = (logp - start).exp()
    clipped = torch.minimum(r * advantage, r.clamp(1 - low, 1 + high) * advantage)
    j = torch.where(advantage < 0, torch.maximum(clipped, c * advantage), clipped)
    return (j * mask).sum() / mask.sum()


def gspo(logp, start, advantage, mask, low, high):
    """Zheng et al. 2025, arXiv 2507.18071, eq. 5 with the ratio of eq. 7."""
    s = (((logp - start) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)).exp()
    return torch.minimum(s * advantage, s.clamp(1 - low, 1 + high) * advantage).mean()


def cispo(logp, start, advantage, mask, low, high):
    """MiniMax-M1, arXiv 2506.13585, eq. 4 with the weight of eq. 5."""
    weight = (logp - start).exp().clamp(1 - low, 1 + high).detach()
    return (weight * advantage * logp * mask).sum() / mask.sum()


def sapo(logp, start, advantage, mask, tau_pos, tau_neg):
    """Gao et al. 2025, arXiv 2511.20347: J = mean over i of (1/|y_i|) sum over t of f(r) A."""
    r = (logp - start).exp()
    tau = torch.where(advantage > 0, torch.full_like(advantage, tau_pos), torch.full_like(advantage, tau_neg))
    f = torch.sigmoid(tau * (r - 1)) * 4 / tau
    return ((f * advantage * mask).sum(1) / mask.sum(1)).mean()


BOUNDS = dict(low=0.1, high=0.2)
CLIP = dict(clip_low=0.1, clip_high=0.2, rollout_cap=0)
PAPERS = [
    (dual_clip_ppo, dict(**BOUNDS, c=1.5), Objective(**CLIP, dual_clip=1.5), "tokens"),
    (gspo, BOUNDS, Objective(**CLIP, ratio="sequence"), "sequences"),
    (cispo, BOUNDS, Objective(**CLIP, loss="cispo"), "tokens"),
    (sapo, dict(tau_pos=1.0, tau_neg=1.05), Objective(loss="sapo", rollout_cap=0), "sequences"),
    (sapo, dict(tau_pos=4.0, tau_neg=0.3), Objective(loss="sapo", sapo_tau_pos=4.0, sapo_tau_neg=0.3, rollout_cap=0),
     "sequences"),
]  # fmt: skip


@pytest.mark.parametrize("order", ["as packed", "shuffled"])
@pytest.mark.parametrize("paper, arguments, objective, mean", PAPERS, ids=[p[0].__name__ for p in PAPERS])
def test_each_variant_is_its_paper(paper, arguments, objective, mean, order):
    g = torch.Generator().manual_seed(1)
    b, length = 64, 17
    start = -torch.rand(b, length, generator=g, dtype=torch.float64) * 3
    drift = torch.randn(b, 1, generator=g, dtype=torch.float64) * 0.2  # so that whole sequences move
    logp = (start + drift + torch.randn(start.shape, generator=g, dtype=torch.float64) * 0.3).requires_grad_()
    advantage = torch.randn(b, 1, generator=g, dtype=torch.float64)
    lengths = torch.randint(1, length + 1, (b, 1), generator=g)
    mask = (torch.arange(length) < lengths).double()
    j = paper(logp, start, advantage, mask, **arguments)
    (slope,) = torch.autograd.grad(j, logp)

    live = mask.bool()
    weight = (mask / mask.sum() if mean == "tokens" else mask / lengths / b)[live]
    sequence = torch.arange(b)[:, None].expand(b, length)[live] * 7 - 100
    rows = Rows(sequence, advantage.expand(b, length)[live], weight, start[live], sequence, start[live])
    mine, wanted = logp.detach()[live], -slope[live]
    if order == "shuffled":  # the rows of a sequence need not be neighbours
        shuffle = torch.randperm(len(rows), generator=g)
        rows, mine, wanted = rows.take(shuffle), mine[shuffle], wanted[shuffle]
    loss, dlogp, dentropy, stats = row_loss(mine, torch.zeros_like(mine), rows, objective)
    assert loss.sum().item() == pytest.approx(-j.item(), rel=1e-12)
    torch.testing.assert_close(dlogp, wanted, rtol=1e-11, atol=1e-16)
    assert not dentropy.any()
    if objective.loss != "sapo":
        assert 0.1 < stats.clipped.mean() < 0.9  # both sides of the clip were seen


def test_sequence_ratio_by_hand():
    """Completion 5: two live rows, ratios 2 and 1/8, mean log -ln 2, s = 1/2; completion -3: one row, s = 1.25."""
    t = lambda *v: torch.tensor(v, dtype=torch.float64)  # noqa: E731
    logp = t(math.log(2), math.nan, -math.log(8), math.log(1.25))
    sequence = torch.tensor([5, 5, 5, -3])
    weight = t(0.25, 0.0, 0.75, 2.0)
    rows = Rows(sequence, t(1, 1, 1, -2), weight, t(0, 0, 0, 0), sequence, t(0, 0, 0, 0))
    loss, dlogp, _, stats = row_loss(logp, torch.zeros_like(logp), rows, Objective(ratio="sequence", rollout_cap=0))
    assert stats.ratio.tolist() == pytest.approx([0.5, 0, 0.5, 1.25])
    assert loss.tolist() == pytest.approx([-0.125, 0, -0.375, 5.0])  # weight times -s A
    # each of the two rows moves s by s / 2 and with it both losses: -(.25 + .75) .5 / 2
    assert dlogp.tolist() == pytest.approx([-0.25, 0, -0.25, 5.0])
    # advantage -1: 1/2 is below the clip at .8
    rows = Rows(sequence, t(-1, -1, -1, 2), weight, t(0, 0, 0, 0), sequence, t(0, 0, 0, 0))
    loss, dlogp, _, stats = row_loss(logp, torch.zeros_like(logp), rows, Objective(ratio="sequence", rollout_cap=0))
    assert loss.tolist() == pytest.approx([0.2, 0, 0.6, -5.0]) and dlogp.tolist() == pytest.approx([0, 0, 0, -5.0])
    assert stats.clipped.tolist() == [1, 0, 1, 0]


def test_one_update_per_batch_is_the_same_for_token_and_sequence():
    """At ratio 1, with equal weights in a sequence, GSPO's gradient is GRPO's (and CISPO's, and SAPO's)."""
    logp, entropy, rows = many_rows(300, start=False)
    logp = logp.nan_to_num().clamp(-9, 0)
    _, sequence = rows.sequence.unique(return_inverse=True)
    rows = Rows(rows.tokens, torch.sin(sequence.double()), 0.1 + (sequence % 3).double(), logp, rows.sequence)
    kinds = [dict(), dict(ratio="sequence"), dict(loss="cispo"), dict(loss="sapo"), dict(dual_clip=3.0)]
    slopes = [row_loss(logp, entropy, rows, Objective(**kind))[1] for kind in kinds]
    for slope in slopes[1:]:
        torch.testing.assert_close(slope, slopes[0], rtol=1e-12, atol=1e-14)
    assert not Objective().sequence_level and Objective(ratio="sequence").sequence_level


@pytest.mark.parametrize("kind", [dict(), dict(ratio="sequence"), dict(loss="cispo"), dict(loss="sapo")])
def test_nothing_looks_at_a_value(kind):
    """Tensors without data would raise where a size or a branch depended on one: on a GPU, a device sync."""
    logp, entropy, rows = many_rows(50)
    objective = Objective(**kind, kl_coef=0.1, entropy_coef=0.1)
    loss, dlogp, dentropy, stats = row_loss(logp.to("meta"), entropy.to("meta"), rows.to("meta"), objective)
    assert all(v.shape == (50,) for v in (loss, dlogp, dentropy, *vars(stats).values()))
    none = rows.take(torch.zeros(0, dtype=torch.int64))
    assert row_loss(logp[:0], entropy[:0], none, objective)[1].shape == (0,)


def test_a_ratio_on_the_bound_is_not_clipped():
    # 1 - clip_low = 0.5, 1 + clip_high = 2 and 4 are exact, and so are exp(log(2)), exp(-log(2)), exp(log(4)) in float64
    for ratio, advantage in ((2.0, 1.0), (0.5, -1.0), (4.0, -1.0)):
        logp = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        index = torch.zeros(1, dtype=torch.int64)
        rows = Rows(index, advantage * one, one, zero, index, logp_start=zero)
        objective = Objective(clip_low=0.5, clip_high=1.0, dual_clip=4.0, rollout_cap=0)
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
        (dict(loss="ppo"), '"clip", "cispo" or "sapo"'),
        (dict(ratio="prompt"), '"token" or "sequence"'),
        (dict(ratio="sequence", loss="cispo"), 'needs loss="clip"'),
        (dict(ratio="sequence", loss="sapo"), 'needs loss="clip"'),
        (dict(dual_clip=1.0), "dual_clip must be above 1"),
        (dict(dual_clip=math.nan), "dual_clip must be above 1"),
        (dict(dual_clip=3.0, loss="sapo"), 'dual_clip=3.0 needs loss="clip"'),
        (dict(sapo_tau_neg=0.0), "sapo_tau_neg"),
    ],
)
def test_bad_objectives_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        Objective(**bad)


def test_a_kl_coefficient_needs_a_reference():
    with pytest.raises(ValueError, match="needs Rows.logp_ref"):
        one_row(-1.0, kl_coef=0.1)
