"""The sampler: its random numbers, its frequencies, what it keeps, and what it reports."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pr1.kernels import Sampling, sample, sample_tokens, sample_tokens_ref, token_keys, token_logprobs, uniform
from pr1.kernels.sample import sample_tokens_triton

INF = math.inf
FIELDS = ("seed", "step", "prompt", "completion", "position")


def keys(n, vary="position", **fixed):
    """n keys that differ in one field only."""
    values = {"seed": 1, "step": 2, "prompt": 3, "completion": 4, "position": 5} | fixed
    if vary in ("seed", "step"):
        at = {k: torch.tensor([v]) for k, v in values.items() if k not in ("seed", "step")}
        return torch.cat([token_keys(**(values | at | {vary: i})) for i in range(n)])
    tensors = {k: torch.full((n,), values[k]) for k in ("prompt", "completion", "position")}
    return token_keys(values["seed"], values["step"], **(tensors | {vary: torch.arange(n)}))


def p_value(tokens, probabilities):
    """Chi-square of drawn tokens against their probabilities; a token of probability 0 settles it."""
    counts = np.bincount(tokens.numpy(), minlength=len(probabilities)).astype(float)
    expected = np.asarray(probabilities, float) * counts.sum()
    if counts[expected == 0].any():
        return 0.0
    small = expected < 5  # pooled, as the test needs a few expected in each cell
    counts = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    return stats.chisquare(counts, expected).pvalue


def allowed(logits, sampling, forbid=False):
    """Slow and obvious: the kept set of one row of float64 logits, as a boolean array."""
    z = np.asarray(logits, float) / (sampling.temperature or 1)
    ok = np.isfinite(z)
    if sampling.banned is not None:
        ok &= ~sampling.banned.numpy()
    if forbid:
        ok[list(sampling.stop_ids)] = False
    ranked = sorted((i for i in range(len(z)) if ok[i]), key=lambda i: (-z[i], i))
    if sampling.temperature == 0:
        ranked = ranked[:1]
    if sampling.top_k:
        ranked = ranked[: sampling.top_k]
    weights = np.exp(z[ranked] - z[ranked].max())
    kept, mass = [], 0.0
    for i, w in zip(ranked, weights / weights.sum(), strict=True):
        kept.append(i)
        mass += w
        if mass >= sampling.top_p:
            break
    return np.isin(np.arange(len(z)), kept)


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def test_hash_is_splitmix64():
    # first outputs of splitmix64 seeded with 1234567, as published with it
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    gamma = 0x9E3779B97F4A7C15
    states = [(1234567 + i * gamma + 2**63) % 2**64 - 2**63 for i in range(3)]
    ours = uniform(torch.tensor(states))
    assert ours.dtype == torch.float64
    assert ours.tolist() == [(word >> 11) * 2.0**-53 for word in published]


def test_keys_are_fixed_forever():
    # a change of these numbers breaks the resuming of runs; independently computed with Python integers
    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    for values in ((0, 0, 0, 0, 0), (17, 3, 15, 7, 1023), (-1, 2**40, 2**33, 1, 0), (2**64 + 5, 0, 1, 2, 3)):
        key = 0
        for value in values:
            key = mix(((key ^ (value % 2**64)) + 0x9E3779B97F4A7C15) % 2**64)
        ours = token_keys(values[0], values[1], *(torch.tensor([v]) for v in values[2:]))
        assert ours.dtype == torch.int64 and ours.item() % 2**64 == key


@pytest.mark.parametrize("vary", FIELDS)
def test_uniform_whatever_field_varies(vary):
    n = 2000 if vary in ("seed", "step") else 100_000
    u = uniform(keys(n, vary)).numpy()
    assert u.min() >= 0 and u.max() < 1 and len(np.unique(u)) == n
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert stats.chisquare(np.histogram(u, 64, (0, 1))[0]).pvalue > 1e-3
    # neighbours are independent: lag 1 and lag 8 pairs fill the unit square evenly
    for lag in (1, 8):
        table = np.histogram2d(
            u[: -lag : lag + 1], u[lag :: lag + 1][: len(u[: -lag : lag + 1])], 12, ((0, 1), (0, 1))
        )[0]
        assert stats.chisquare(table.ravel()).pvalue > 1e-3, lag
    low_bits = (uniform(keys(n, vary)) * 2**53).long().numpy() % 16
    assert stats.chisquare(np.bincount(low_bits, minlength=16)).pvalue > 1e-3


def test_keys_do_not_collide_and_fields_do_not_swap():
    grid = torch.cartesian_prod(torch.arange(20), torch.arange(8), torch.arange(1000))
    some = torch.cat([token_keys(0, step, *grid.T) for step in range(4)])
    assert len(some.unique()) == 4 * len(grid)
    one, two = torch.tensor([1]), torch.tensor([2])
    variants = [
        token_keys(1, 2, one, one, one),
        token_keys(2, 1, one, one, one),
        token_keys(1, 1, two, one, one),
        token_keys(1, 1, one, two, one),
        token_keys(1, 1, one, one, two),
    ]
    assert len(torch.cat(variants).unique()) == 5
    wide = token_keys(0, 0, torch.arange(4)[:, None], torch.arange(3), torch.tensor([0]))
    assert wide.shape == (4, 3) and wide[2, 1] == token_keys(
        0, 0, torch.tensor([2]), torch.tensor([1]), torch.tensor([0])
    )


def draws(sampling, logits, n=40_000, forbid=None, **fixed):
    x = torch.as_tensor(logits, dtype=torch.float32).expand(n, -1)
    forbid = None if forbid is None else torch.full((n,), forbid)
    return sample_tokens(x, keys(n, **fixed), sampling, forbid_stop=forbid)


def normal_logits(v, seed=0, scale=2.0):
    return scale * np.random.default_rng(seed).standard_normal(v)


def bans(v, *ids):
    banned = torch.zeros(v, dtype=torch.bool)
    banned[list(ids)] = True
    return banned


CASES = [
    ("plain", Sampling(), False),
    ("temperature", Sampling(temperature=0.7), False),
    ("bans", Sampling(banned=bans(150, 3, 70, 149)), False),
    ("a ban of nothing", Sampling(banned=bans(150)), False),
    ("stops forbidden", Sampling(stop_ids=(0, 149), temperature=1.4, min_new_tokens=2), True),
    ("stops allowed", Sampling(stop_ids=(0, 149), min_new_tokens=2), False),
    ("top-k", Sampling(top_k=9), False),
    ("top-p", Sampling(top_p=0.8, temperature=1.2), False),
    ("all", Sampling(0.8, 0.9, 40, 2, 8, (0, 77), bans(150, *range(5, 30))), True),
]


@pytest.mark.parametrize("name, sampling, forbid", CASES, ids=[c[0] for c in CASES])
def test_frequencies(name, sampling, forbid):
    logits = normal_logits(150)
    p = softmax(logits.astype(np.float32).astype(float) / sampling.temperature)
    kept = allowed(logits, sampling, forbid)
    token, logp, entropy, log_kept = draws(sampling, logits, forbid=forbid)
    assert p_value(token, np.where(kept, p, 0) / p[kept].sum()) > 1e-3
    np.testing.assert_allclose(logp.numpy(), np.log(p)[token.numpy()], atol=3e-6)
    np.testing.assert_allclose(entropy.numpy(), -(p * np.log(p)).sum(), atol=3e-6)
    np.testing.assert_allclose(log_kept.numpy(), np.log(p[kept].sum()), atol=3e-7)
    if kept.all():
        assert not log_kept.any()  # exactly 0


def test_mutants_are_caught():
    """The frequency test has the power to see a temperature off by a tenth, one missing ban, one token too many."""
    logits, banned = normal_logits(150), bans(150, 38)
    p = softmax(logits)
    assert 0.001 < p[38] < 0.02
    right = np.where(banned.numpy(), 0, p) / p[~banned.numpy()].sum()
    assert p_value(draws(Sampling(banned=banned), logits)[0], right) > 1e-3
    assert p_value(draws(Sampling(banned=banned, temperature=1.1), logits)[0], right) < 1e-6
    assert p_value(draws(Sampling(), logits)[0], right) < 1e-6
    assert p_value(draws(Sampling(banned=bans(150, 38, 39)), logits)[0], right) < 1e-6


@pytest.mark.parametrize("v", [1, 2, 63, 64, 65, 300, 1024])
def test_tokens_invert_the_cdf(v):
    """Against the CDF summed in float64: the same token, but where the uniform is within rounding of a step."""
    n = 4000
    rng = np.random.default_rng(v)
    logits = (3 * rng.standard_normal((n, v))).astype(np.float32)
    logits[:, 1:][rng.random((n, v - 1)) < 0.3] = -INF
    logits[:, 64:128] = -INF  # a whole block of probability 0
    k = keys(n, "prompt", step=v)
    token, _, _, log_kept = sample_tokens(torch.from_numpy(logits), k, Sampling())
    cdf, u = softmax(logits.astype(float)).cumsum(-1), uniform(k).numpy()
    truth = (cdf <= u[:, None] * cdf[:, -1:]).sum(-1)
    different = truth != token.numpy()
    assert different.mean() < 1e-3
    assert np.abs(cdf[different] - u[different, None]).min(-1).max(initial=0) < 1e-6
    assert np.isfinite(logits[np.arange(n), token.numpy()]).all() and not log_kept.any()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_k=1),
        Sampling(top_k=5),
        Sampling(top_k=500),
        Sampling(top_p=0.3),
        Sampling(top_p=0.95),
        Sampling(top_p=1e-9),
        Sampling(top_k=7, top_p=0.6, temperature=0.5, banned=bans(90, 1, 2, 88)),
        Sampling(temperature=0),
        Sampling(temperature=0, top_k=3, banned=bans(90, *range(45)), stop_ids=(60, 61)),
    ],
)
def test_kept_set_and_its_mass_against_brute_force(sampling):
    n, v = 150, 90
    rng = np.random.default_rng(4)
    logits = np.round(2 * rng.standard_normal((n, v)), 1).astype(np.float32)  # many ties
    logits[rng.random((n, v)) < 0.05] = -INF
    forbid = rng.random(n) < 0.5
    p = softmax(logits.astype(float) / (sampling.temperature or 1))
    kept = np.stack([allowed(logits[i], sampling, forbid[i]) for i in range(n)])
    seen = np.zeros_like(kept)
    for repeat in range(24):
        token, logp, entropy, log_kept = sample_tokens(
            torch.from_numpy(logits),
            keys(n, "completion", position=repeat),
            sampling,
            forbid_stop=torch.from_numpy(forbid),
        )
        seen[np.arange(n), token.numpy()] = True
    assert not (seen & ~kept).any()
    np.testing.assert_allclose(log_kept.numpy(), np.log((p * kept).sum(-1)), atol=1e-6)
    np.testing.assert_allclose(logp.numpy(), np.log(p[np.arange(n), token.numpy()]), atol=3e-6)
    np.testing.assert_allclose(entropy.numpy(), -(p * np.log(np.where(p > 0, p, 1))).sum(-1), atol=3e-6)
    if sampling.top_k and sampling.top_k < 10:  # the tokens not seen are the unlikely ones of the kept
        assert seen.sum() > 0.6 * kept.sum()


def test_ends_of_the_uniform_range_never_hit_probability_zero():
    q = torch.zeros(3, 300)
    q[0, 70], q[0, 130], q[1, 299], q[2, :10] = 0.3, 1.0, 1e-30, 0.1
    for u, truth in ((0.0, [70, 299, 0]), (1 - 2.0**-53, [130, 299, 9])):
        token = sample._invert_cdf(*sample._block_sums(q), torch.full((3,), u, dtype=torch.float64))
        assert token[:, 0].tolist() == truth
    # on a step of the CDF the next token begins; sums of eighths are exact
    token = sample._invert_cdf(
        *sample._block_sums(torch.full((1, 128), 0.125)), torch.tensor([0.75], dtype=torch.float64)
    )
    assert token.item() == 96


def test_log_kept_of_a_tiny_loss_of_mass_and_of_a_tiny_rest():
    """1e-6 lost is seen, within float32's resolution of the mass; 1e-13 kept is not lost in cancellation; e^-20000 kept
    still draws."""
    logits = torch.tensor([[0.0, 0.0, math.log(2e-6)], [-30.0, -30.0, 0.0], [0.0, 0.0, 2e4]])
    out = sample_tokens(logits, keys(3), Sampling(banned=bans(3, 2)))
    truth = [-math.log1p(1e-6), math.log(2) - 30, math.log(2) - 2e4]
    np.testing.assert_allclose(out[3].numpy(), truth, rtol=1e-6, atol=1.2e-7)
    assert out[3][0] < 0
    assert out[0].max() < 2
    np.testing.assert_allclose(out[1].numpy(), [-math.log(2), -30, -2e4], rtol=1e-5)


def test_greedy():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 1.0, 2.0, 2.0]])
    token, logp, entropy, log_kept = sample_tokens(
        logits, keys(2), Sampling(temperature=0, stop_ids=(0,)), forbid_stop=torch.tensor([False, True])
    )
    assert token.tolist() == [1, 2]  # the lowest id of a tie
    truth = token_logprobs(logits, token)
    torch.testing.assert_close(logp, truth[0])
    torch.testing.assert_close(entropy, truth[1])
    assert torch.equal(log_kept, logp)  # drawn with probability exp(logp - log_kept) = 1


def test_a_draw_depends_on_its_row_alone():
    logits = torch.from_numpy(normal_logits(64 * 333)).view(64, 333).float()
    for sampling in (Sampling(), Sampling(0.9, 0.9, 50, banned=bans(333, 5))):
        whole = sample_tokens(logits, keys(64), sampling)
        order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
        shuffled = sample_tokens(logits[order], keys(64)[order], sampling)
        alone = [
            torch.cat(x)
            for x in zip(
                *(sample_tokens(logits[i : i + 1], keys(64)[i : i + 1], sampling) for i in range(64)), strict=True
            )
        ]
        for a, b, c in zip(whole, shuffled, alone, strict=True):
            assert torch.equal(a[order], b)
            torch.testing.assert_close(a, c)
        assert torch.equal(whole[0], alone[0])


def test_sampled_logp_is_the_trainers():
    logits = torch.from_numpy(normal_logits(200 * 1024)).view(200, 1024).float()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = logits.to(dtype)
        token, logp, entropy, _ = sample_tokens(x, keys(200), Sampling(temperature=0.8, banned=bans(1024, 9)))
        truth = token_logprobs(x, token, 0.8)
        assert logp.dtype == entropy.dtype == truth[0].dtype
        torch.testing.assert_close(logp, truth[0], atol=2e-6, rtol=0)
        torch.testing.assert_close(entropy, truth[1], atol=3e-6, rtol=0)


def test_inputs_are_left_alone():
    logits = torch.from_numpy(normal_logits(8 * 70)).view(8, 70).float().requires_grad_()
    before, strided = logits.detach().clone(), torch.randn(70, 8).T
    for sampling in (Sampling(), Sampling(stop_ids=(1,)), Sampling(0.5, 0.5, 5, banned=bans(70, 0))):
        out = sample_tokens(logits, keys(8), sampling, forbid_stop=torch.ones(8, dtype=torch.bool))
        assert torch.equal(logits, before) and not any(v.requires_grad for v in out)
        again = sample_tokens(strided.contiguous(), keys(8), sampling)
        for a, b in zip(sample_tokens(strided, keys(8), sampling), again, strict=True):
            torch.testing.assert_close(a, b)


def test_no_rows():
    for sampling in (Sampling(), Sampling(0), Sampling(0.5, 0.5, 5, banned=bans(7, 0))):
        out = sample_tokens(torch.empty(0, 7), torch.empty(0, dtype=torch.int64), sampling)
        assert [v.shape for v in out] == [(0,)] * 4 and out[0].dtype == torch.int64


def test_nothing_to_draw_and_broken_logits_are_refused():
    x, k = torch.zeros(3, 4), keys(3)
    some = torch.tensor([False, True, False])
    cases = [
        (x, Sampling(banned=torch.ones(4, dtype=torch.bool)), None, "row 0: no token is left"),
        (x, Sampling(0, banned=torch.ones(4, dtype=torch.bool)), None, "row 0: no token is left"),
        (x, Sampling(stop_ids=(3,), banned=bans(4, 0, 1, 2)), some, "row 1: no token is left"),
        (torch.tensor([[0.0] * 4, [1.0] * 4, [-INF] * 4]), Sampling(), None, "row 2: no token is left"),
        (torch.tensor([[0.0] * 4, [0, math.nan, 0, 0], [0.0] * 4]), Sampling(), None, "row 1: the logits hold NaN"),
        (torch.tensor([[0.0] * 4, [0, 0, 0, INF], [0.0] * 4]), Sampling(banned=bans(4, 3)), None, "row 1: the logits"),
    ]
    for logits, sampling, forbid, message in cases:
        with pytest.raises(ValueError, match=message):
            sample_tokens(logits, k, sampling, forbid_stop=forbid)


def test_bad_arguments_are_named():
    x, k = torch.zeros(3, 4), keys(3)
    calls = [
        (lambda: sample_tokens(x[0], k, Sampling()), "logits must be a two-dimensional"),
        (lambda: sample_tokens(x, k[:2], Sampling()), r"keys must be \(3,\) int64"),
        (lambda: sample_tokens(x, k.int(), Sampling()), "keys must be .*int32"),
        (lambda: sample_tokens(x, 7, Sampling()), "keys must be .*int"),
        (lambda: sample_tokens(x, k, Sampling(banned=bans(5))), r"Sampling.banned must be \(4,\)"),
        (lambda: sample_tokens(x, k, Sampling(stop_ids=(4,))), "Sampling.stop_ids"),
        (lambda: sample_tokens(x, k, Sampling(), forbid_stop=torch.ones(3)), r"forbid_stop must be \(3,\) bool"),
        (lambda: Sampling(temperature=-1), "temperature"),
        (lambda: Sampling(temperature=math.nan), "temperature"),
        (lambda: Sampling(top_p=0.0), "top_p"),
        (lambda: Sampling(top_p=1.5), "top_p"),
        (lambda: Sampling(top_k=-1), "top_k"),
        (lambda: Sampling(min_new_tokens=5, max_new_tokens=4), "min_new_tokens"),
        (lambda: Sampling(max_new_tokens=0), "max_new_tokens"),
        (lambda: Sampling(banned=torch.zeros(4)), "banned"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()


# ---- the Triton kernel (through the interpreter where there is no device) --------------------------------------------

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL_CASES = {
    "plain": (Sampling(), False),
    "cold": (Sampling(temperature=0.6), False),
    "hot": (Sampling(temperature=1.7), False),
    "bans": (Sampling(banned=bans(300, 0, 5, 299), temperature=0.8), False),
    "stops": (Sampling(stop_ids=(3, 7), min_new_tokens=1), True),
    "bans and stops": (Sampling(banned=bans(300, 1, 7), stop_ids=(3, 7), min_new_tokens=1), True),
    "greedy": (Sampling(temperature=0.0, banned=bans(300, 4), stop_ids=(2,), min_new_tokens=1), True),
}


@pytest.mark.parametrize("block", [64, 4096])
@pytest.mark.parametrize("name", KERNEL_CASES)
def test_kernel_against_the_plain_form(name, block, monkeypatch):
    """Numbers to float32 rounding; the same token unless the uniform falls within 1e-6 of a step of the CDF."""
    from pr1.kernels import sample_triton

    monkeypatch.setattr(sample_triton, "BLOCK", block)
    sampling, forbids = KERNEL_CASES[name]
    generator = torch.Generator().manual_seed(block)
    x = 3 * torch.randn(24, 300, generator=generator)
    x[3, 5] = 40.0  # the whole mass on a token that may be banned
    x[4] = 0.0
    x[5, :200] = -INF
    x[6] -= 5000.0
    x[7, 100:] -= 200.0
    k, forbid = keys(24), torch.arange(24) % 3 == 0 if forbids else None
    ours = sample_tokens_triton(x.to(DEVICE), k.to(DEVICE), sampling, forbid_stop=None if forbid is None else
                                forbid.to(DEVICE))  # fmt: skip
    ours, theirs = [v.cpu() for v in ours], sample_tokens_ref(x, k, sampling, forbid_stop=forbid)
    same = ours[0] == theirs[0]
    if sampling.temperature == 0:
        assert same.all()
    for row in (~same).nonzero()[:, 0].tolist():
        ok = torch.from_numpy(allowed(x[row], sampling, bool(forbids and forbid[row])))
        cdf = (x[row].double() / sampling.temperature).masked_fill(~ok, -INF).softmax(-1).cumsum(-1)
        between = cdf[int(min(ours[0][row], theirs[0][row]))]
        assert abs(between - uniform(k[row : row + 1])) < 1e-6, row
    assert same.sum() >= 23
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(a[same], b[same], rtol=1e-5, atol=2e-5)


def test_kernel_marks_rows_that_cannot_be_drawn():
    x = torch.zeros(5, 20)
    x[1, 3] = math.nan
    x[2, 3] = INF
    x[3] = -INF
    sampling = Sampling(banned=bans(20, *range(10, 20)), stop_ids=tuple(range(10)), min_new_tokens=1)
    forbid = torch.tensor([False, False, False, False, True])
    token, *numbers = (v.cpu() for v in sample_tokens_triton(x.to(DEVICE), keys(5).to(DEVICE), sampling,
                                                             forbid_stop=forbid.to(DEVICE)))  # fmt: skip
    assert ((0 <= token) & (token < 20)).all()
    for values in numbers:
        assert torch.isfinite(values).tolist() == [True, False, False, False, False]


def test_kernel_is_launched(monkeypatch):
    from pr1.kernels import sample_triton

    class Unlaunchable:
        def __getitem__(self, grid):
            raise RuntimeError("launched")

    monkeypatch.setattr(sample_triton, "_sample", Unlaunchable())
    with pytest.raises(RuntimeError, match="launched"):
        sample_tokens_triton(torch.zeros(2, 4, device=DEVICE), keys(2).to(DEVICE), Sampling())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_device_path_on_a_full_vocabulary(dtype):
    x = (2 * torch.randn(64, 151_936, generator=torch.Generator().manual_seed(0))).to(dtype)
    sampling = Sampling(banned=bans(151_936, *range(151_000, 151_936)), temperature=0.9)
    ours = sample_tokens(x.cuda(), keys(64).cuda(), sampling)
    theirs = sample_tokens_ref(x, keys(64), sampling)
    same = ours[0].cpu() == theirs[0]
    assert same.sum() >= 62
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(a.cpu()[same], b[same], rtol=1e-4, atol=1e-4)
