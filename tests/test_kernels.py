"""Log-probs and GRPO losses, from logits and from hidden states, against float64 formulas written row by row."""

import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from pr1.config import Config
from pr1.kernels import (
    Objective,
    Rows,
    grpo_loss,
    linear_grpo_loss,
    linear_token_logprobs,
    token_logprobs,
)
from pr1.kernels.linear import Head
from pr1.optim import Optimizer

# (N, V, H): even, odd sizes, one row, one word
SHAPES = [(16, 64, 32), (7, 130, 9), (1, 3, 2), (5, 1, 4)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make(n, v, h, dtype=torch.float64, seed=0):
    g = generator(seed)
    hidden = torch.randn(n, h, generator=g, dtype=torch.float64)
    weight = 2 * torch.randn(v, h, generator=g, dtype=torch.float64) / math.sqrt(h)
    return hidden.to(dtype), weight.to(dtype), torch.randint(v, (n,), generator=g)


def truth_logprobs(logits, tokens, temperature):
    """Row by row, from the definition."""
    logp, entropy = [], []
    for z, token in zip(logits.double() / temperature, tokens.tolist(), strict=True):
        z = z[torch.isfinite(z)] if not torch.isfinite(z).all() else z
        p = (z - z.max()).exp() / (z - z.max()).exp().sum()
        entropy.append(-(p * p.log()).sum())
        logp.append((logits[len(logp)].double()[token] / temperature - torch.logsumexp(z, 0)))
    empty = logits.double().sum(-1)
    return (torch.stack(logp), torch.stack(entropy)) if logp else (empty, empty)


def truth_loss(logits, rows, o):
    """The objective as prose states it, one Python `if` at a time; autograd differentiates what is left."""
    total = logits.double().sum() * 0
    logp, entropy = truth_logprobs(logits, rows.tokens, o.temperature)
    for i in range(len(rows)):
        w, a, lp = rows.weight[i].item(), rows.advantage[i].item(), logp[i]
        if w == 0:
            continue
        start = lp.item() if rows.logp_start is None else rows.logp_start[i].item()
        corr = 1.0
        if o.rollout_cap:
            kept = 0.0 if rows.log_kept is None else rows.log_kept[i].item()
            corr = min(math.exp(start - rows.logp_rollout[i].item() + kept), o.rollout_cap)
        ratio = torch.exp(lp - start)
        if a > 0 and ratio.item() > 1 + o.clip_high:
            ratio = 1 + o.clip_high
        if a < 0 and ratio.item() < 1 - o.clip_low:
            ratio = 1 - o.clip_low
        term = -corr * ratio * a - o.entropy_coef * entropy[i]
        if o.kl_coef:
            d = rows.logp_ref[i].item() - lp
            term = term + o.kl_coef * (torch.exp(d) - d - 1 if o.kl == "k3" else d**2 / 2)
        total = total + w * term
    return total


def make_rows(logits, tokens, temperature=1.0, seed=1, start=True, dtype=torch.float32):
    g = generator(seed)
    logp = truth_logprobs(logits.detach(), tokens, temperature)[0]
    n = len(tokens)

    def near(scale):
        return (logp + scale * torch.randn(n, generator=g, dtype=torch.float64)).to(dtype)

    weight = torch.rand(n, generator=g).to(dtype) / max(n, 1)
    weight[1::4] = 0
    advantage = torch.randn(n, generator=g).to(dtype)
    return Rows(
        tokens,
        advantage,
        weight,
        near(0.3),
        torch.arange(n) // 3,
        near(0.3) if start else None,
        near(0.5),
        -0.3 * torch.rand(n, generator=g).to(dtype),
    )


OBJECTIVES = [
    Objective(),
    Objective(kl_coef=0.04, entropy_coef=0.02, temperature=0.7),
    Objective(kl_coef=0.5, kl="k2", clip_low=math.inf, clip_high=math.inf, rollout_cap=0, temperature=1.3),
]


def assert_grads_close(ours, truth, rtol=1e-9, atol=1e-12):
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("n, v, h", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_and_their_gradients(n, v, h, temperature):
    hidden, weight, tokens = (x.requires_grad_() if x.is_floating_point() else x for x in make(n, v, h))
    g = torch.randn(2, n, generator=generator(5), dtype=torch.float64)
    truth = truth_logprobs(hidden @ weight.T, tokens, temperature)
    truth_grads = torch.autograd.grad((g[0] * truth[0] + g[1] * truth[1]).sum(), (hidden, weight))
    forms = (
        token_logprobs(hidden @ weight.T, tokens, temperature),
        linear_token_logprobs(hidden, weight, tokens, temperature),
    )
    for ours in forms:
        assert ours[0].shape == ours[1].shape == (n,) and ours[0].dtype == torch.float64
        assert_grads_close(ours, truth)
        assert_grads_close(torch.autograd.grad((g[0] * ours[0] + g[1] * ours[1]).sum(), (hidden, weight)), truth_grads)


def test_logprobs_numerical_gradient():
    hidden, weight, tokens = (x.requires_grad_() if x.is_floating_point() else x for x in make(4, 6, 3))
    torch.autograd.gradcheck(lambda x, w: linear_token_logprobs(x, w, tokens, 0.8), (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_are_float32_for_narrow_inputs(dtype):
    hidden, weight, tokens = make(9, 100, 16, dtype)
    logits = (4 * (hidden @ weight.T)).detach()
    for ours, exact in (
        (token_logprobs(logits, tokens), logits.double()),
        # the product of narrow inputs is kept in float32, never rounded back
        (linear_token_logprobs(hidden, weight, tokens), hidden.double() @ weight.double().T),
    ):
        truth = truth_logprobs(exact, tokens, 1.0)
        assert ours[0].dtype == ours[1].dtype == torch.float32
        assert_grads_close(ours, truth, rtol=2e-6, atol=2e-6)
    hidden.requires_grad_(), weight.requires_grad_()
    linear_token_logprobs(hidden, weight, tokens)[0].sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == dtype


def test_extreme_logits():
    inf = math.inf
    logits = torch.tensor(
        [
            [1e4, -1e4, 0.0, 1e4],
            [-inf, 0.0, math.log(3.0), -inf],
            [-1e4, -1e4, -1e4, -1e4],
            [5.0, -inf, -inf, -inf],
        ],
        requires_grad=True,
    )
    logp, entropy = token_logprobs(logits, torch.tensor([0, 2, 1, 0]))
    # halves; 1/4 and 3/4; quarters; certainty
    quarters = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    torch.testing.assert_close(logp, torch.tensor([-math.log(2), math.log(0.75), -math.log(4), 0.0]))
    torch.testing.assert_close(entropy, torch.tensor([math.log(2), quarters, math.log(4), 0.0]))
    (logp.sum() + entropy.sum()).backward()
    h = [0.25 * (math.log(0.25) + quarters), 0.75 * (math.log(0.75) + quarters)]
    truth = torch.tensor([[0.5, 0, 0, -0.5], [0, -0.25 - h[0], 0.25 - h[1], 0], [-0.25, 0.75, -0.25, -0.25], [0] * 4])
    torch.testing.assert_close(logits.grad, truth, atol=1e-6, rtol=1e-5)
    far, _ = token_logprobs(logits.detach(), torch.tensor([1, 0, 0, 1]))
    torch.testing.assert_close(far, torch.tensor([-2e4 - math.log(2), -inf, -math.log(4), -inf]))
    assert token_logprobs(torch.full((1, 3), -inf), torch.tensor([0]))[0].isnan().all()


def test_shifting_a_row_changes_nothing():
    hidden, weight, tokens = make(8, 40, 8)
    logits = hidden @ weight.T
    shift = torch.randn(8, 1, generator=generator(3), dtype=torch.float64) * 50
    assert_grads_close(token_logprobs(logits + shift, tokens), token_logprobs(logits, tokens), rtol=1e-10, atol=1e-12)


def test_equal_rows_get_equal_values():
    hidden, weight, _ = make(1, 50, 8, torch.float32)
    logp, entropy = token_logprobs((hidden @ weight.T).repeat(6, 1), torch.full((6,), 11))
    assert (logp == logp[0]).all() and (entropy == entropy[0]).all()


def test_tied_head():
    """The head is the embedding too: its gradient is the sum of both uses."""
    _, weight, tokens = make(10, 15, 4)
    ids = torch.arange(10)
    tied, embedding, head = (weight.clone().requires_grad_() for _ in range(3))
    linear_token_logprobs(tied[ids], tied, tokens)[0].sum().backward()
    truth_logprobs(embedding[ids] @ head.T, tokens, 1.0)[0].sum().backward()
    assert_grads_close([tied.grad], [embedding.grad + head.grad])


def test_chunks_of_rows_change_nothing():
    hidden, weight, tokens = (x.requires_grad_() if x.is_floating_point() else x for x in make(11, 20, 6))
    rows = make_rows(hidden @ weight.T, tokens, dtype=torch.float64)

    def run(**memory):
        outputs = (
            *linear_token_logprobs(hidden, weight, tokens, **memory),
            linear_grpo_loss(hidden, weight, rows, Objective(), **memory)[0],
        )
        return outputs, torch.autograd.grad(sum(x.sum() for x in outputs), (hidden, weight))

    whole, truth = run()
    for rows_a_chunk in (4, 1):
        parts, grads = run(memory=20 * 8 * rows_a_chunk)
        assert_grads_close(parts, whole)
        assert_grads_close(grads, truth)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("n, v, h", SHAPES)
def test_loss_and_its_gradients(n, v, h, objective, start):
    hidden, weight, tokens = (x.requires_grad_() if x.is_floating_point() else x for x in make(n, v, h))
    rows = make_rows(hidden @ weight.T, tokens, objective.temperature, start=start, dtype=torch.float64)
    logits = (hidden @ weight.T).detach().requires_grad_()
    truth = truth_loss(logits, rows, objective)
    loss, _ = grpo_loss(logits, rows, objective)
    assert loss.shape == () and loss.dtype == torch.float64
    assert_grads_close((loss, *torch.autograd.grad(loss, logits)), (truth, *torch.autograd.grad(truth, logits)))
    truth = truth_loss(hidden @ weight.T, rows, objective)
    loss, _ = linear_grpo_loss(hidden, weight, rows, objective)
    assert_grads_close(
        (loss, *torch.autograd.grad(loss, (hidden, weight))), (truth, *torch.autograd.grad(truth, (hidden, weight)))
    )


def test_loss_numerical_gradient():
    hidden, weight, tokens = make(6, 7, 3)
    objective = Objective(kl_coef=0.2, entropy_coef=0.3, temperature=0.9)
    rows = make_rows(hidden @ weight.T, tokens, 0.9, dtype=torch.float64)
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    linear_grpo_loss(x, w, rows, objective)[0].backward()
    for leaf, at in ((x, hidden), (w, weight)):
        for i in range(at.numel()):
            values = []
            for step in (1e-6, -1e-6):
                at.view(-1)[i] += step
                values.append(linear_grpo_loss(hidden, weight, rows, objective)[0].item())
                at.view(-1)[i] -= step
            assert leaf.grad.view(-1)[i].item() == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-8)


def test_float32_loss_is_close_to_float64():
    hidden, weight, tokens = make(64, 500, 32, torch.float32)
    logits = (hidden @ weight.T).requires_grad_()
    rows, objective = make_rows(logits, tokens), OBJECTIVES[1]
    loss, stats = grpo_loss(logits, rows, objective)
    truth = truth_loss(logits, rows, objective)
    assert loss.dtype == torch.float32
    assert_grads_close(
        (loss, *torch.autograd.grad(loss, logits)), (truth, *torch.autograd.grad(truth, logits)), rtol=1e-5, atol=1e-7
    )
    live = rows.weight != 0
    logp, entropy = truth_logprobs(logits, tokens, objective.temperature)
    torch.testing.assert_close(stats.logp[live].double(), logp[live], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.entropy[live].double(), entropy[live], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.ratio[live].double(), (logp - rows.logp_start)[live].exp(), rtol=1e-5, atol=1e-6)
    d = rows.logp_ref - logp
    torch.testing.assert_close(stats.kl[live].double(), (d.exp() - d - 1)[live], rtol=1e-4, atol=1e-6)
    assert 0 < stats.clipped.sum() < live.sum()
    for value in vars(stats).values():
        assert value.shape == (64,) and value.dtype == torch.float32 and not value.requires_grad
        assert not value[~live].any()


@pytest.mark.parametrize("which", ["hidden", "weight", "neither"])
def test_partial_requires_grad(which):
    hidden, weight, tokens = make(8, 30, 5)
    rows = make_rows(hidden @ weight.T, tokens, dtype=torch.float64)
    both = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    linear_grpo_loss(*both, rows, Objective())[0].backward()
    x, w = hidden.clone().requires_grad_(which == "hidden"), weight.clone().requires_grad_(which == "weight")
    for value in (linear_grpo_loss(x, w, rows, Objective())[0], linear_token_logprobs(x, w, tokens)[0]):
        assert value.requires_grad == (which != "neither")
    if which != "neither":
        linear_grpo_loss(x, w, rows, Objective())[0].backward()
        assert torch.equal(x.grad if which == "hidden" else w.grad, both[which == "weight"].grad)
    assert (x.grad is None) == (which != "hidden") and (w.grad is None) == (which != "weight")


@pytest.mark.parametrize("n", [0, 5])
def test_no_live_row_gives_zero_loss_and_zero_gradient(n):
    hidden, weight, tokens = (x.requires_grad_() if x.is_floating_point() else x for x in make(n, 12, 4, torch.float32))
    rows = make_rows(hidden @ weight.T, tokens)
    rows = Rows(tokens, rows.advantage, rows.weight * 0, rows.logp_rollout, rows.sequence)
    for loss, stats in (
        grpo_loss(hidden @ weight.T, rows, Objective()),
        linear_grpo_loss(hidden, weight, rows, Objective()),
    ):
        assert loss.item() == 0 and stats.ratio.tolist() == [0.0] * n
        grads = torch.autograd.grad(loss, (hidden, weight))
        assert [g.shape for g in grads] == [hidden.shape, weight.shape] and not any(g.any() for g in grads)
    if n == 0:
        for out in (token_logprobs(hidden @ weight.T, tokens), linear_token_logprobs(hidden, weight, tokens)):
            assert out[0].shape == out[1].shape == (0,)
            assert not torch.autograd.grad(out[0].sum() + out[1].sum(), weight, allow_unused=True)[0].any()


def test_masked_rows_may_hold_anything():
    hidden, weight, tokens = make(9, 12, 4)
    rows = make_rows(hidden @ weight.T, tokens, dtype=torch.float64)
    masked = (rows.weight == 0).nonzero().squeeze(1)
    assert len(masked) == 2
    clean = hidden.clone().requires_grad_()
    expected, stats = linear_grpo_loss(clean, weight, rows, OBJECTIVES[1])
    expected.backward()
    for f in (rows.advantage, rows.logp_rollout, rows.logp_start, rows.logp_ref, rows.log_kept, hidden):
        f[masked] = math.nan
    tokens[masked] = -100
    dirty = hidden.requires_grad_()
    logits = (hidden @ weight.T).detach().requires_grad_()
    loss, dirty_stats = linear_grpo_loss(dirty, weight, rows, OBJECTIVES[1])
    loss.backward()
    assert loss.item() == expected.item() and torch.equal(dirty.grad, clean.grad) and not dirty.grad[masked].any()
    assert all(torch.equal(a, b) for a, b in zip(vars(stats).values(), vars(dirty_stats).values(), strict=True))
    loss, _ = grpo_loss(logits, rows, OBJECTIVES[1])
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.isfinite(logits.grad).all() and not logits.grad[masked].any()


def test_losses_of_parts_add_up():
    hidden, weight, tokens = make(12, 12, 4)
    rows = make_rows(hidden @ weight.T, tokens, dtype=torch.float64)
    whole = linear_grpo_loss(hidden, weight, rows, OBJECTIVES[1])[0]
    parts = [linear_grpo_loss(hidden[i], weight, rows.take(i), OBJECTIVES[1])[0] for i in torch.arange(12).split(5)]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)


def test_an_impossible_token_is_finite():
    logits = torch.zeros(2, 4)
    logits[:, 1] = -math.inf
    logits.requires_grad_()
    one = torch.ones(2)
    rows = Rows(torch.tensor([1, 2]), one, one, -one, torch.arange(2), logp_ref=-one)
    loss, stats = grpo_loss(logits, rows, Objective(kl_coef=0.1, entropy_coef=0.1))
    loss.backward()
    assert math.isfinite(loss.item()) and torch.isfinite(logits.grad).all()
    assert stats.ratio.tolist() == [1, 1]


def test_bad_arguments_are_named():
    hidden, weight, tokens = make(4, 10, 3, torch.float32)
    logits = hidden @ weight.T
    rows = make_rows(logits, tokens)
    cases = [
        (lambda: token_logprobs(logits[0], tokens), "logits must be a two-dimensional"),
        (lambda: token_logprobs(logits.long(), tokens), "logits must be .* floating point.*int64"),
        (lambda: token_logprobs(logits[:, :0], tokens), "logits has no columns"),
        (lambda: token_logprobs(logits, tokens.int()), r"tokens must be \(4,\) int64.*int32"),
        (lambda: token_logprobs(logits, tokens[:3]), r"tokens must be \(4,\) int64.*\(3,\)"),
        (lambda: token_logprobs(logits, tokens + 10), r"token ids must be in \[0, 10\)"),
        (lambda: token_logprobs(logits, tokens - 11), r"token ids must be in \[0, 10\), got -"),
        (lambda: token_logprobs(logits, tokens, 0.0), "temperature must be positive"),
        (lambda: token_logprobs(logits, tokens.to("meta")), "tokens are on meta"),
        (lambda: linear_token_logprobs(hidden, weight.T, tokens), "weight must have 3 columns"),
        (lambda: linear_token_logprobs(hidden, weight, tokens, -1.0), "temperature must be positive"),
        (lambda: linear_token_logprobs(hidden, weight.to("meta"), tokens), "weight on meta"),
        (lambda: grpo_loss(logits[:3], rows, Objective()), "4 rows for 3 rows"),
        (lambda: linear_grpo_loss(hidden[:3], weight, rows, Objective()), "4 rows for 3 rows"),
        (lambda: linear_grpo_loss(hidden, weight[:2], rows, Objective()), "token ids must be in"),
        (lambda: grpo_loss(logits, Rows(tokens, *[rows.weight] * 3, tokens), Objective(kl_coef=1.0)), "logp_ref"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


# ---- memory ----------------------------------------------------------------------------------------------------------

# Peak resident memory above what the process held before the call, MiB.
PEAK = """
import sys, torch
from pr1 import kernels
from pr1.kernels import Objective, Rows
torch.set_num_threads(1)
n, h, v = 2048, 64, 20000
x, w = torch.randn(n, h).requires_grad_(), torch.randn(v, h).requires_grad_()
tokens, one = torch.randint(v, (n,)), torch.ones(n)
def call(x, w, n):
    loss = getattr(kernels, sys.argv[1])(x, w, Rows(tokens[:n], one[:n], one[:n], -one[:n], tokens[:n]), Objective())[0]
    loss.backward()
tokens %= 500
call(x.detach()[:64].requires_grad_(), w.detach()[:500].requires_grad_(), 64)  # libraries loaded, pools made
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew from what is resident now
def resident(what):
    return int(next(line for line in open("/proc/self/status") if line.startswith(what)).split()[1]) / 1024
before = resident("VmRSS")
call(x, w, n)
print(resident("VmHWM") - before)
"""


def test_peak_memory_is_a_chunk_and_the_weight_gradient():
    peak = {}
    for name in ("linear_grpo_loss", "linear_grpo_loss_ref"):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", PEAK, name], env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        peak[name] = float(done.stdout)
    logits, chunk, gradients = 2048 * 20000 * 4 / 2**20, 16, (20000 + 2048) * 64 * 4 / 2**20  # MiB: 156, 16, 5.4
    print(peak)
    assert chunk < peak["linear_grpo_loss"] < chunk + gradients + 10  # tiles, row vectors, what the allocator keeps
    assert peak["linear_grpo_loss_ref"] > 3 * logits


def test_memory_at_full_size():
    """N = 8192, H = 2048, V = 151,936 in bfloat16: two chunks of 4 GiB at most, and 1.2 GB of float32 weight gradient."""
    hidden = torch.empty(8192, 2048, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(151_936, 2048, dtype=torch.bfloat16, device="meta")
    head = Head(hidden, weight, want_hidden=True, want_weight=True, memory=2**32)
    parts = head.parts(0, 8192)
    assert [(s.start, s.stop) for s in parts] == [(0, 4096), (4096, 8192)]
    assert 4096 * 151_936 * (4 + 2) < 2**32
    dhidden, dweight = head.gradients()
    assert dweight.dtype == torch.float32 and dweight.nbytes == 151_936 * 2048 * 4 and dhidden.dtype == torch.bfloat16


# ---- float32 accumulation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_the_head_add_up_in_float32(tied):
    """16 packs, bfloat16 parameters, gradients near 1e-9: the head's reach the optimizer's sum without a rounding to
    bfloat16, and the sum is float32's, bit by bit, of gradients a float32 weight would get."""
    g = generator(3)
    model = torch.nn.Module()
    model.visual = torch.nn.Linear(2, 2)
    model.lm_head = torch.nn.Linear(16, 40, bias=False).bfloat16()
    weight = model.lm_head.weight
    optimizer = Optimizer(SimpleNamespace(model=model, visual=model.visual), Config(task="det"))
    master = optimizer.masters[optimizer.names.index("lm_head.weight")]
    single = torch.zeros(40, 16)
    exact = torch.zeros(40, 16, dtype=torch.float64)
    rounded = torch.zeros(40, 16, dtype=torch.float64)
    for _ in range(16):
        hidden = torch.randn(3, 16, generator=g).bfloat16()
        tokens = torch.randint(40, (3,), generator=g)
        one = torch.ones(3)
        rows = Rows(tokens, torch.randn(3, generator=g), 3e-9 * one, -3.0 * one, torch.arange(3))
        x = hidden + 0.0 * weight[tokens] if tied else hidden  # a second use of the weight, as an embedding
        linear_grpo_loss(x, weight, rows, Objective())[0].backward()
        assert weight.grad is None
        wide = weight.detach().float().requires_grad_()
        linear_grpo_loss(hidden, wide, rows, Objective())[0].backward()
        single += wide.grad
        double = weight.detach().double().requires_grad_()
        linear_grpo_loss(hidden.double(), double, rows, Objective())[0].backward()
        exact += double.grad
        rounded += double.grad.bfloat16().double()
    assert master.grad.dtype == torch.float32 and 1e-10 < float(exact.abs().max()) < 1e-7
    assert torch.equal(master.grad, single)
    error, half = (float((v.double() - exact).abs().max() / exact.abs().max()) for v in (master.grad, rounded))
    assert error < 1e-6 and half > 1e-4
