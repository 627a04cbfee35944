"""The optimizer against AdamW written out in float64, and what half-precision parameters must not lose."""

import copy
import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pr1.config import Config
from pr1.optim import Optimizer, learning_rate
from pr1.world import World

ALONE = World(0, 1, torch.device("cpu"))


class Tiny(torch.nn.Module):
    """A tower and a language part, each with a matrix and a vector."""

    def __init__(self, dtype=torch.float32, seed=0, tower_dtype=None):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def part(kind):
            module = torch.nn.Linear(5, 3).to(kind)
            for p in module.parameters():
                p.data.copy_(torch.randn(p.shape, generator=generator))
            return module

        self.visual, self.text = part(tower_dtype or dtype), part(dtype)


def make(dtype=torch.float32, seed=0, tower_dtype=None, **how):
    model = Tiny(dtype, seed, tower_dtype)
    cfg = Config(**{"task": "det", "lr": 1e-2, "warmup_steps": 0, "steps": 100, **how})
    return model, Optimizer(SimpleNamespace(model=model, visual=model.visual), cfg)


def gradients(model, step, scale=1.0):
    """Repeatable gradients, one per parameter, float32."""
    generator = torch.Generator().manual_seed(1000 + step)
    return [scale * torch.randn(p.shape, generator=generator) for p in model.parameters()]


def backward(model, grads):
    """Runs a real backward pass with these gradients."""
    sum((p * g.to(p.dtype)).sum() for p, g in zip(model.parameters(), grads, strict=True)).backward()


def adamw(params, grads_of, steps, lr, b1, b2, decay):
    """Loshchilov and Hutter 2019, algorithm 2, in float64: decoupled decay, bias-corrected moments, eps 1e-8 outside
    the root. lr(step, number of the parameter), decay(number of the parameter)."""
    params = [np.asarray(p, np.float64) for p in params]
    m, v = [0.0 * p for p in params], [0.0 * p for p in params]
    for step in range(steps):
        for i, g in enumerate(grads_of(step)):
            g = np.asarray(g, np.float64)
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g**2
            m_hat, v_hat = m[i] / (1 - b1 ** (step + 1)), v[i] / (1 - b2 ** (step + 1))
            params[i] = params[i] - lr(step, i) * (decay(i) * params[i] + m_hat / (np.sqrt(v_hat) + 1e-8))
    return params


def numpy_of(tensors):
    return [t.detach().double().numpy().copy() for t in tensors]


def close(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.detach().double().numpy(), b, rtol=0, atol=tolerance)


# ---- AdamW -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_adamw_written_out(dtype):
    """Eight steps with decay on matrices alone, the tower's own learning rate, warm-up and linear decay. Half-precision
    parameters: the masters are compared, the parameters are their roundings."""
    model, optimizer = make(dtype, beta1=0.8, beta2=0.95, weight_decay=0.1, vision_lr=3e-3, train_vision=True,
                            warmup_steps=2, steps=10, schedule="linear", grad_clip=0.0)  # fmt: skip
    start, names = numpy_of(model.parameters()), [n for n, _ in model.named_parameters()]
    assert names == ["visual.weight", "visual.bias", "text.weight", "text.bias"]
    shape = [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8]  # by hand
    for step in range(8):
        backward(model, gradients(model, step))
        optimizer.sum_gradients(ALONE)
        assert optimizer.step(step) == pytest.approx(1e-2 * shape[step], rel=1e-12)
    rounded = [[g.to(dtype).double().numpy() for g in gradients(model, s)] for s in range(8)]
    truth = adamw(start, lambda s: rounded[s], 8, lambda s, i: (3e-3 if i < 2 else 1e-2) * shape[s], 0.8, 0.95,
                  lambda i: (0.1, 0, 0.1, 0)[i])  # fmt: skip
    moved = max(np.abs(a - b).max() for a, b in zip(start, truth, strict=True))
    assert moved > 0.03
    close(optimizer.masters, truth, 1e-6)
    for param, master in zip(optimizer.params, optimizer.masters, strict=True):
        assert param.dtype == dtype and torch.equal(param, master.to(dtype))
        assert (param is master) == (dtype == torch.float32)


def test_steps_equal_torchs_in_float64():
    model, optimizer = make(weight_decay=0.05, grad_clip=0.0)
    double = copy.deepcopy(model).double()
    theirs = torch.optim.AdamW(
        [dict(params=[p for p in double.parameters() if p.ndim == 2], weight_decay=0.05),
         dict(params=[p for p in double.parameters() if p.ndim == 1], weight_decay=0.0)],
        lr=1e-2, betas=(0.9, 0.999), foreach=False, fused=False,
    )  # fmt: skip
    for step in range(6):
        grads = gradients(model, step, 10.0**-step)  # a wide range: eps and bias correction matter
        backward(model, grads)
        optimizer.sum_gradients(ALONE)
        optimizer.step(step)
        for p, g in zip(double.parameters(), grads, strict=True):
            p.grad = g.double()
        theirs.step()
    close(model.parameters(), numpy_of(double.parameters()), 1e-6)


def test_frozen_parameters_are_left_alone():
    model = Tiny()
    model.visual.requires_grad_(False)
    optimizer = Optimizer(SimpleNamespace(model=model, visual=model.visual), Config(task="det", lr=1e-2))
    assert optimizer.names == ["text.weight", "text.bias"]
    before = numpy_of(model.visual.parameters())
    (model.text.weight.sum() + model.text.bias.sum()).backward()
    optimizer.sum_gradients(ALONE)
    optimizer.step(0)
    close(model.visual.parameters(), before, 0)


def test_a_step_without_gradients_and_zero():
    """A rank without packs steps with zeros: moments decay, nothing is left out; `zero` forgets a gradient."""
    model, optimizer = make()
    start = numpy_of(model.parameters())
    optimizer.sum_gradients(ALONE)
    assert all(m.grad is not None and not m.grad.any() for m in optimizer.masters)
    assert optimizer.clip() == 0
    optimizer.step(0)
    close(model.parameters(), start, 0)
    backward(model, gradients(model, 0))
    optimizer.zero()
    assert all(m.grad is None for m in optimizer.masters)


# ---- half precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0.0, 1.0])
def test_gradients_of_packs_add_up_in_float32(first):
    """16 packs of 1e-9, alone and behind one of 1: bfloat16 sums would lose bits, and behind a 1 all of them. Float32
    sums are those of float32, bit by bit, and so within its rounding of the float64 sum."""
    model, optimizer = make(torch.bfloat16)
    packs = [[torch.full_like(g, first) for g in gradients(model, 0)]] * bool(first)
    packs += [[1e-9 * (1 + k / 16) * torch.sign(g) for g in gradients(model, 3)] for k in range(16)]
    for grads in packs:
        backward(model, grads)
        assert all(p.grad is None for p in model.parameters())  # no half-precision gradient is left to add to
    seen = [[g.bfloat16() for g in grads] for grads in packs]  # what a backward pass hands over
    for i, master in enumerate(optimizer.masters):
        in_order = torch.zeros_like(master)
        for grads in seen:
            in_order = in_order + grads[i].float()
        assert master.grad.dtype == torch.float32 and torch.equal(master.grad, in_order)
        exact = sum(grads[i].double() for grads in seen)
        assert float(((master.grad.double() - exact) / exact).abs().max()) < 17 * 2.0**-24
        half = sum(grads[i] for grads in seen).double()
        if not first:
            assert float(((half - exact) / exact).abs().max()) > 1e-3  # what the masters save us from


def test_masters_advance_where_half_precision_cannot():
    """Updates of 1e-4 on weights near 1, whose bfloat16 neighbours lie 1/128 above and 1/256 below."""
    model, optimizer = make(torch.bfloat16, lr=1e-4)
    for p, m in zip(optimizer.params, optimizer.masters, strict=True):
        with torch.no_grad():
            p.fill_(1.0)
            m.fill_(1.0)
    for step in range(30):
        backward(model, [torch.ones_like(g) for g in gradients(model, 0)])  # Adam's step is lr against it
        optimizer.sum_gradients(ALONE)
        optimizer.step(step)
        expected = 1 - 1e-4 * (step + 1)
        for p, m in zip(optimizer.params, optimizer.masters, strict=True):
            np.testing.assert_allclose(m.detach().numpy(), expected, rtol=0, atol=3e-6)
            assert torch.equal(p, torch.full_like(p, 1.0 if expected > 1 - 1 / 512 else 1 - 1 / 256)), step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_keep_their_addresses(dtype):
    model, optimizer = make(dtype)
    where = [p.data_ptr() for p in model.parameters()]
    fresh = make(dtype, seed=1)[1]
    for step in range(2):
        backward(model, gradients(model, step))
        optimizer.sum_gradients(ALONE)
        optimizer.clip()
        optimizer.step(step)
        fresh.load_state_dict(optimizer.state_dict())
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert [p.data_ptr() for p in model.parameters()] == where


# ---- clipping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [0.5, 2.0, 1e3, 0.0])
def test_clip(dtype, limit):
    model, optimizer = make(dtype, grad_clip=limit)
    grads = [g.to(dtype) for g in gradients(model, 0)]
    backward(model, grads)
    optimizer.sum_gradients(ALONE)
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in grads))
    assert 2.0 < norm < 1e3
    assert optimizer.clip() == pytest.approx(norm, rel=1e-6)
    factor = limit / norm if 0 < limit < norm else 1.0  # 0: no clipping
    for master, g in zip(optimizer.masters, grads, strict=True):
        np.testing.assert_allclose(master.grad.numpy(), g.double().numpy() * factor, rtol=3e-6)


# ---- schedules -------------------------------------------------------------------------------------------------------

WARM = [0.25, 0.5, 0.75, 1.0]
ROOT = math.sqrt(0.5)


@pytest.mark.parametrize("schedule, after", [
    ("constant", [1.0] * 8),
    ("linear", [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
    ("cosine", [1, (1 + math.cos(math.pi / 8)) / 2, (1 + ROOT) / 2, (1 + math.sin(math.pi / 8)) / 2,
                0.5, (1 - math.sin(math.pi / 8)) / 2, (1 - ROOT) / 2, (1 - math.cos(math.pi / 8)) / 2]),
])  # fmt: skip
def test_schedules_by_hand(schedule, after):
    cfg = Config(task="det", warmup_steps=4, steps=12, schedule=schedule)
    rates = [learning_rate(cfg, step, 2e-3) for step in range(12)]
    np.testing.assert_allclose(rates, 2e-3 * np.array(WARM + after), rtol=1e-12)
    assert all(rate > 0 for rate in rates)  # no step is wasted


def test_schedules_at_their_edges():
    def rates(**how):
        cfg = Config(task="det", **how)
        return [learning_rate(cfg, step, 1.0) for step in range(cfg.steps)]

    assert rates(warmup_steps=0, steps=3) == [1, 1, 1]
    assert rates(warmup_steps=10, steps=4) == [0.1, 0.2, 0.3, 0.4]  # shorter than its warm-up
    assert rates(warmup_steps=2, steps=2, schedule="linear") == [0.5, 1.0]
    assert rates(warmup_steps=0, steps=1, schedule="cosine") == [1.0]


# ---- saving ----------------------------------------------------------------------------------------------------------


def saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize(
    "dtype, tower", [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)]
)
def test_state_goes_round_bit_by_bit(dtype, tower):
    """3 + 3 steps with a save and a fresh optimizer between = 6 steps: parameters, masters, moments, step counts."""

    def run(model, optimizer, steps):
        for step in steps:
            backward(model, gradients(model, step))
            optimizer.sum_gradients(ALONE)
            optimizer.clip()
            optimizer.step(step)

    how = dict(dtype=dtype, tower_dtype=tower, weight_decay=0.1, vision_lr=2e-3, train_vision=True)
    straight, one = make(**how)
    run(straight, one, range(6))
    first, two = make(**how)
    run(first, two, range(3))
    second, three = make(seed=5, **how)
    second.load_state_dict(first.state_dict())
    three.load_state_dict(saved(two))
    for a, b in zip(two.masters, three.masters, strict=True):
        assert torch.equal(a, b)
    run(second, three, range(3, 6))
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    ours, theirs = three.state_dict(), one.state_dict()
    assert list(ours) == list(theirs) == ["visual.weight", "visual.bias", "text.weight", "text.bias"]
    for name in theirs:
        half = theirs[name].get("master") is not None
        assert half == ((tower or dtype) == torch.bfloat16 if "visual" in name else dtype == torch.bfloat16)
        assert (
            set(ours[name]) == set(theirs[name]) == {"step", "exp_avg", "exp_avg_sq"} | ({"master"} if half else set())
        )
        for key, value in theirs[name].items():
            assert torch.equal(ours[name][key], value) and ours[name][key].dtype == value.dtype == torch.float32
        assert float(ours[name]["step"]) == 6


def test_state_of_an_optimizer_that_never_stepped():
    model, optimizer = make(torch.bfloat16)
    _, other = make(torch.bfloat16, seed=4)
    other.load_state_dict(saved(optimizer))
    for a, b in zip(optimizer.masters, other.masters, strict=True):
        assert torch.equal(a, b)


def test_state_of_other_parameters_is_refused():
    model, optimizer = make()
    state = optimizer.state_dict()
    for wrong, name in (({k: v for k, v in state.items() if k != "text.bias"}, "text.bias"),
                        ({**state, "extra.weight": {}}, "extra.weight")):  # fmt: skip
        with pytest.raises(ValueError, match=f"other parameters than this run: {name}"):
            optimizer.load_state_dict(wrong)
