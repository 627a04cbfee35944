"""Every operation on every path: PyTorch on the CPU, Triton in its interpreter, and, marked `gpu`, on a device.

The rule: against float64, at most twice the error of plain PyTorch in the same dtype (and a rounding of the result).
The interpreter truncates to bfloat16 where a device rounds, so bfloat16 is for the CPU path and for devices.
"""

import math
from dataclasses import fields

import pytest
import torch

from pr1 import kernels
from pr1.kernels import Objective, Rows, row_terms, token_logprobs_ref
from pr1.kernels.linear import runs

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
INTERPRETER = pytest.mark.skipif(torch.cuda.is_available(), reason="the device runs the same kernels")


class Way:
    """How the operations are reached: by name on a device."""

    def __init__(self, suffix, device):
        self.device = device
        for name in ("token_logprobs", "linear_token_logprobs", "grpo_loss", "linear_grpo_loss"):
            setattr(self, name, getattr(kernels, name + suffix))


WAYS = [
    *(pytest.param(Way("", "cpu"), t, id=f"cpu-{str(t)[6:]}") for t in (F32, BF16, F16)),
    *(pytest.param(Way("_triton", "cpu"), t, id=f"interpreter-{str(t)[6:]}", marks=INTERPRETER) for t in (F32, F16)),
    *(pytest.param(Way("", "cuda"), t, id=f"gpu-{str(t)[6:]}", marks=pytest.mark.gpu) for t in (F32, BF16, F16)),
]
every_way = pytest.mark.parametrize("way, dtype", WAYS)
exact_ways = pytest.mark.parametrize("way, dtype", [w for w in WAYS if w.values[1] == F32])

OBJECTIVES = {
    "default": Objective(),
    "kl and entropy": Objective(kl_coef=0.04, entropy_coef=0.02, temperature=0.7),
    "k2, no clip": Objective(kl_coef=0.5, kl="k2", clip_low=math.inf, clip_high=math.inf, rollout_cap=0),
    "sequence": Objective(ratio="sequence", entropy_coef=0.01, temperature=1.3),
}


def peaked(n, v, h, dtype, seed=0):
    """Hidden states and weights whose logits are peaked like a trained model's: a few words take most of the mass."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(v, h, generator=g) / h**0.5
    tokens = torch.randint(v, (n,), generator=g)
    hidden = torch.randn(n, h, generator=g) + 6 * weight[tokens]
    tokens[1::3] = torch.randint(v, (len(tokens[1::3]),), generator=g)
    return hidden.to(dtype), weight.to(dtype), tokens


def make_rows(logits, tokens, masked=True, seed=1):
    g = torch.Generator().manual_seed(seed)
    n = len(tokens)
    logp = token_logprobs_ref(logits.double().cpu(), tokens.cpu())[0]

    def near(scale):
        return (logp + scale * torch.randn(n, generator=g)).float()

    weight = (0.5 + torch.rand(n, generator=g)) / n
    weight[2::4] *= 0.0 if masked else 1.0
    return Rows(
        tokens.cpu(), torch.randn(n, generator=g), weight, near(0.2), torch.arange(n) // 3, near(0.3), near(0.5)
    )


def check(ours, plain, truth):
    """The rule. A scalar is a loss: a sum of terms near 1, of which one rounding may remain where they cancel."""
    for a, b, t in zip(ours, plain, truth, strict=True):
        assert a.shape == t.shape
        a, b, t = (x.detach().double().cpu() for x in (a, b, t))
        finite = torch.isfinite(t)
        assert torch.equal(a[~finite].nan_to_num(), t[~finite].nan_to_num())
        error, allowed = (a - t)[finite].abs(), (b - t)[finite].abs()
        if error.numel():
            one_rounding = 2.0**-23 * (1.0 if t.ndim == 0 else t[finite].abs().max())
            assert error.max() <= 2 * allowed.max() + one_rounding, (error.max(), allowed.max())


def leaves(device, *xs):
    return [x.detach().clone().to(device).requires_grad_() for x in xs]


def graded(outputs, weights, inputs):
    total = sum((o * w.to(o)).sum() for o, w in zip(outputs, weights))
    return [*outputs, *torch.autograd.grad(total, inputs)]


# ---- log-probs -------------------------------------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("n, v", [(6, 37), (4, 5000), (3, 4096), (1, 1), (0, 8)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_from_logits(way, dtype, n, v, temperature):
    hidden, weight, tokens = peaked(n, v, 16, F32)
    logits = 2 * (hidden @ weight.T)
    if n > 1:
        logits[0, :] = 1.5  # all equal
        logits[1, 1:v:2] = -math.inf
        tokens[1] = 1 if n == 6 else 0  # an impossible token, and a possible one
    logits = logits.to(dtype)
    g = torch.randn(2, n, generator=torch.Generator().manual_seed(2))
    g[:, 2::3] = 0  # rows that nobody asks for a gradient
    (ours,), (plain,), (truth,) = (
        leaves(d, x) for d, x in ((way.device, logits), ("cpu", logits), ("cpu", logits.double()))
    )
    check(
        graded(way.token_logprobs(ours, tokens.to(way.device), temperature), g, [ours]),
        graded(token_logprobs_ref(plain, tokens, temperature), g, [plain]),
        graded(token_logprobs_ref(truth, tokens, temperature), g, [truth]),
    )


@every_way
@pytest.mark.parametrize("n, v, memory", [(7, 40, None), (7, 37, 4 * 37 * 3), (1, 5, None), (0, 8, None)])
def test_logprobs_from_hidden_states(way, dtype, n, v, memory):
    hidden, weight, tokens = peaked(n, v, 24, dtype)
    g = torch.randn(2, n, generator=torch.Generator().manual_seed(2))
    ours, plain = leaves(way.device, hidden, weight), leaves("cpu", hidden, weight)
    truth = leaves("cpu", hidden.double(), weight.double())
    check(
        graded(way.linear_token_logprobs(*ours, tokens.to(way.device), 0.8, memory=memory), g, ours),
        graded(token_logprobs_ref(plain[0] @ plain[1].T, tokens, 0.8), g, plain),
        graded(token_logprobs_ref(truth[0] @ truth[1].T, tokens, 0.8), g, truth),
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy on -inf, in the interpreter
@exact_ways
def test_extreme_logits(way, dtype):
    inf = math.inf
    logits = torch.tensor([[1e4, -1e4, 0.0, 1e4], [-inf, 0.0, math.log(3.0), -inf], [5.0, -inf, -inf, -inf],
                           [1e4, 1e4 - 1, 1e4 - 2, -inf], [-1e4, -1e4, -1e4, -1e4]])  # fmt: skip
    (x,) = leaves(way.device, logits)
    logp, entropy = way.token_logprobs(x, torch.tensor([0, 2, 0, 1, 3], device=x.device))
    quarters = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    e = [1.0, math.exp(-1), math.exp(-2)]
    p = [a / sum(e) for a in e]
    spread = -sum(a * math.log(a) for a in p)
    torch.testing.assert_close(
        logp.cpu(), torch.tensor([-math.log(2), math.log(0.75), 0.0, math.log(p[1]), -math.log(4)])
    )
    torch.testing.assert_close(entropy.cpu(), torch.tensor([math.log(2), quarters, 0.0, spread, math.log(4)]))
    (logp.sum() + entropy.sum()).backward()
    h = [0.25 * (math.log(0.25) + quarters), 0.75 * (math.log(0.75) + quarters)]
    s = [(i == 1) - a - a * (math.log(a) + spread) for i, a in enumerate(p)]
    truth = [[0.5, 0, 0, -0.5], [0, -0.25 - h[0], 0.25 - h[1], 0], [0] * 4, [*s, 0], [-0.25, -0.25, -0.25, 0.75]]
    torch.testing.assert_close(x.grad.cpu(), torch.tensor(truth), atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@exact_ways
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_broken_rows_are_nan_and_alone(way, dtype, bad):
    logits = torch.zeros(3, 40)
    logits[1] = bad if bad < 0 else 0.0
    logits[1, 7] = bad
    logp, entropy = way.token_logprobs(logits.to(way.device), torch.tensor([1, 2, 3], device=way.device))
    for x in (logp, entropy):
        assert x.isnan().tolist() == [False, True, False]


@every_way
def test_rows_by_index_in_place_and_strided(way, dtype):
    hidden, weight, tokens = peaked(9, 48, 16, F32)
    logits = (hidden @ weight.T).to(dtype).to(way.device)
    index = torch.tensor([7, 0, 4], device=way.device)
    tokens = tokens[:3].to(way.device)
    (x,) = leaves(way.device, logits)
    expected = graded(way.token_logprobs(x[index].contiguous(), tokens), torch.ones(2, 3), [x])
    (y,) = leaves(way.device, logits)
    wide = torch.zeros(9, 64, dtype=dtype, device=way.device)
    strided = wide[:, 8:56].copy_(logits).requires_grad_()
    turned = logits.T.contiguous().T.requires_grad_()
    for z in (y, strided, turned):
        for a, b in zip(graded(way.token_logprobs(z, tokens, index=index), torch.ones(2, 3), [z]), expected):
            assert torch.equal(a, b)
    z = y * 1  # in place: over the activation, which nobody else needs
    logp, entropy = way.token_logprobs(z, tokens, index=index, in_place=True)
    total = logp.sum() + entropy.sum()
    (grad,) = torch.autograd.grad(total, [z], retain_graph=True)
    assert torch.equal(grad, expected[2]) and grad.data_ptr() == z.data_ptr()
    with pytest.raises(RuntimeError, match="no second backward|modified by an inplace"):
        total.backward()


# ---- losses ----------------------------------------------------------------------------------------------------------


def plain_loss(logits, rows, objective):
    """Autograd through the rows that count, in the dtype of the logits."""
    live = rows.weight.nonzero().squeeze(1)
    mine = rows.take(live)
    logp, entropy = token_logprobs_ref(logits[live], mine.tokens, objective.temperature)
    return row_terms(logp, entropy, mine, objective)[0].sum()


@every_way
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("n, v", [(8, 40), (1, 37)])
def test_loss_from_logits(way, dtype, n, v, objective):
    hidden, weight, tokens = peaked(n, v, 16, F32)
    logits = (hidden @ weight.T).to(dtype)
    rows = make_rows(logits, tokens)
    (ours,), (plain,), (truth,) = (
        leaves(d, x) for d, x in ((way.device, logits), ("cpu", logits), ("cpu", logits.double()))
    )
    loss, stats = way.grpo_loss(ours, rows.to(way.device), objective)
    grads = [torch.autograd.grad(2.5 * plain_loss(x, rows, objective), x)[0] for x in (plain, truth)]
    mine = torch.autograd.grad(2.5 * loss, ours)[0]
    check([loss, mine], [plain_loss(plain, rows, objective), grads[0]], [plain_loss(truth, rows, objective), grads[1]])
    dead = rows.weight == 0
    assert not mine.cpu()[dead].any()
    for f in fields(stats):
        x = getattr(stats, f.name).cpu()
        assert x.shape == (n,) and x.dtype == F32 and not x.requires_grad and not x[dead].any()


@every_way
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("memory", [None, 4 * 40 * 5, 4 * 40 * 2], ids=["one chunk", "chunks", "short chunks"])
def test_loss_from_hidden_states(way, dtype, memory, objective):
    """Chunks of 5 rows hold one sequence of 3 and not two; chunks of 2 rows make a sequence take two visits."""
    hidden, weight, tokens = peaked(11, 40, 24, dtype)
    rows = make_rows(hidden.float() @ weight.float().T, tokens)
    ours, plain = leaves(way.device, hidden, weight), leaves("cpu", hidden, weight)
    truth = leaves("cpu", hidden.double(), weight.double())
    loss, _ = way.linear_grpo_loss(*ours, rows.to(way.device), objective, memory=memory)
    losses = [plain_loss(x @ w.T, rows, objective) for x, w in (plain, truth)]
    mine = torch.autograd.grad(2.5 * loss, ours)
    check(
        [loss, *mine],
        [losses[0], *torch.autograd.grad(2.5 * losses[0], plain)],
        [losses[1], *torch.autograd.grad(2.5 * losses[1], truth)],
    )
    assert not mine[0].cpu()[rows.weight == 0].any()


@exact_ways
def test_sequences_in_any_order(way, dtype):
    hidden, weight, tokens = peaked(12, 40, 24, dtype)
    rows = make_rows(hidden @ weight.T, tokens)
    mixed = torch.tensor([5, 0, 7, 3, 11, 2, 1, 9, 4, 10, 8, 6])
    objective, memory = OBJECTIVES["sequence"], 4 * 40 * 2
    results = []
    for order in (torch.arange(12), mixed):
        x, w = leaves(way.device, hidden[order], weight)
        loss, stats = way.linear_grpo_loss(x, w, rows.take(order).to(way.device), objective, memory=memory)
        loss.backward()
        results.append([loss.cpu(), x.grad.cpu(), w.grad.cpu(), stats.ratio.cpu()])
    a, b = results
    for got, expected in ((b[0], a[0]), (b[1], a[1][mixed]), (b[2], a[2]), (b[3], a[3][mixed])):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_chunks_end_where_sequences_end():
    """Of 6 rows at most; only the sequence of 8 is longer, and alone. Sequences that fit are never visited twice."""
    lengths = [2, 3, 1, 4, 8, 1, 5]
    sequence = torch.repeat_interleave(torch.tensor([3, 9, 4, 0, 7, 2, 5]), torch.tensor(lengths))
    assert list(runs(sequence, 6)) == [(0, 6), (6, 10), (10, 18), (18, 24)]
    assert list(runs(sequence[:0], 6)) == [(0, 0)] and list(runs(sequence[:1], 6)) == [(0, 1)]


@exact_ways
@pytest.mark.parametrize("which", ["hidden", "weight", "neither", "no_grad"])
def test_partial_requires_grad(way, dtype, which, monkeypatch):
    """And what is not wanted is not computed: products are counted."""
    hidden, weight, tokens = peaked(8, 40, 24, dtype)
    rows = make_rows(hidden @ weight.T, tokens).to(way.device)
    both = leaves(way.device, hidden, weight)
    way.linear_grpo_loss(*both, rows, Objective())[0].backward()
    x, w = hidden.to(way.device), weight.to(way.device)
    x.requires_grad_(which in ("hidden", "no_grad")), w.requires_grad_(which in ("weight", "no_grad"))
    products, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: products.append(1) or mm(*a, **k))
    with torch.set_grad_enabled(which != "no_grad"):
        loss = way.linear_grpo_loss(x, w, rows, Objective())[0]
    assert len(products) == {"hidden": 2, "weight": 2, "neither": 1, "no_grad": 1}[which]
    assert loss.requires_grad == (which in ("hidden", "weight"))
    if loss.requires_grad:
        loss.backward()
        assert len(products) == 2
        assert torch.equal(x.grad if which == "hidden" else w.grad, both[which == "weight"].grad)
        assert (x.grad is None) == (which != "hidden") and (w.grad is None) == (which != "weight")


@exact_ways
def test_weightless_rows_never_reach_a_product(way, dtype, monkeypatch):
    hidden, weight, tokens = peaked(12, 40, 24, dtype)
    rows = make_rows(hidden @ weight.T, tokens)
    dead = rows.weight == 0
    hidden[dead], rows.logp_start[dead], tokens[dead] = math.nan, math.nan, -100
    sizes, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **k: sizes.append(len(a)) or mm(a, b, **k))
    x, w = leaves(way.device, hidden, weight)
    loss, _ = way.linear_grpo_loss(x, w, rows.to(way.device), Objective(entropy_coef=0.1))
    loss.backward()
    assert sizes[0] == 9 and torch.isfinite(w.grad).all() and torch.isfinite(x.grad).all()
    assert not x.grad.cpu()[dead].any()


@exact_ways
@pytest.mark.parametrize("n", [0, 5])
def test_nothing_to_learn_from(way, dtype, n):
    hidden, weight, tokens = peaked(n, 40, 24, dtype)
    zero = torch.zeros(n)
    rows = Rows(tokens, zero, zero, zero, tokens).to(way.device)
    x, w = leaves(way.device, hidden, weight)
    for objective in (Objective(), OBJECTIVES["sequence"]):
        loss, stats = way.linear_grpo_loss(x, w, rows, objective)
        assert loss.item() == 0 and stats.logp.tolist() == [0.0] * n
        for grad, like in zip(torch.autograd.grad(loss, (x, w)), (x, w)):
            assert grad.shape == like.shape and not grad.any()


@exact_ways
def test_a_second_backward_is_refused(way, dtype):
    hidden, weight, tokens = peaked(6, 40, 24, dtype)
    rows = make_rows(hidden @ weight.T, tokens).to(way.device)
    x, w = leaves(way.device, hidden, weight)
    loss, _ = way.linear_grpo_loss(x, w, rows, Objective())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_grpo_loss forms its gradients in the forward"):
        loss.backward()
    logp, _ = way.linear_token_logprobs(x, w, rows.tokens)  # this one may: it makes its logits again
    first, second = (torch.autograd.grad(logp.sum(), (x, w), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@exact_ways
def test_upstream_of_one_costs_no_pass_and_others_multiply(way, dtype):
    hidden, weight, tokens = peaked(6, 40, 24, dtype)
    rows = make_rows(hidden @ weight.T, tokens).to(way.device)
    grads = []
    for upstream in (1.0, -3.0, 0.0):
        x, w = leaves(way.device, hidden, weight)
        loss, _ = way.linear_grpo_loss(x, w, rows, Objective())
        (upstream * loss).backward()
        grads.append((x.grad, w.grad))
    for one, three, none in zip(*grads):
        torch.testing.assert_close(three, -3 * one)
        assert one.any() and not none.any()


@pytest.mark.gpu
def test_many_rows_and_wide_offsets_on_a_device():
    """Past 65,535 rows and past 2^31 logits: the last rows are those of a small call."""
    n, v = 70_000, 37_000  # 2.6e9 logits, 5.2 GB
    logits = torch.randn(n, v, device="cuda", dtype=BF16)
    tokens = torch.randint(v, (n,), device="cuda")
    logits.requires_grad_()
    logp, entropy = kernels.token_logprobs(logits, tokens, in_place=True)
    some = logits.detach()[-50:].clone().requires_grad_()
    expected = token_logprobs_ref(some, tokens[-50:])
    torch.testing.assert_close(logp[-50:], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy[-50:], expected[1], rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(logp.sum() + entropy.sum(), [logits])
    torch.testing.assert_close(grad[-50:], torch.autograd.grad(expected[0].sum() + expected[1].sum(), some)[0])


@pytest.mark.parametrize("name", ["token_logprobs", "linear_token_logprobs", "grpo_loss", "linear_grpo_loss"])
@INTERPRETER
def test_triton_forms_notice_that_no_kernel_ran(name, monkeypatch):
    from pr1.kernels import softmax_torch, softmax_triton

    monkeypatch.setattr(softmax_triton, "forward", softmax_torch.forward)
    hidden, weight, tokens = peaked(4, 16, 8, F32)
    first = (hidden, weight) if name.startswith("linear") else (hidden @ weight.T,)
    rest = (make_rows(hidden @ weight.T, tokens), Objective()) if "grpo" in name else (tokens,)
    with pytest.raises(AssertionError, match="no Triton kernel was launched"):
        getattr(kernels, name + "_triton")(*first, *rest)
