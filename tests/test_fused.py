"""liger-kernel on the modules of one model: where it is set, what it computes, and that transformers is left alone.

Its kernels need a GPU. Here stand-ins take their place, and where liger-kernel is installed its own run through
Triton's interpreter, in a process of their own: the interpreter is chosen at import.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import make_tiny
from worlds import make_policy, make_rollouts, make_sample, plain_logits

from pr1 import fused
from pr1.families import load_family
from pr1.packing import Normaliser, pack


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen2_vl"])
def family(request, tmp_path_factory):
    return load_family(make_tiny(tmp_path_factory.mktemp(request.param), request.param))


def hidden_and_gradients(policy):
    family = policy.family
    prompts = [family.encode(make_sample(family, [(84, 56)]))]
    rollouts = make_rollouts(family, prompts, [[3, 2]])
    (p,) = pack(rollouts, torch.ones(1, 2), 10**6, Normaliser("token-mean", 5, 2, 8), drop_flat=False)
    hidden = policy.hidden(p)
    hidden.pow(2).sum().backward()
    return hidden.detach(), {n: q.grad for n, q in policy.model.named_parameters() if q.grad is not None}


class StandIns:
    """Liger's three in plain PyTorch, counting their calls."""

    def __init__(self):
        self.calls = {"norm": 0, "swiglu": 0, "rotary": 0}

    def norm(self, module, x):
        self.calls["norm"] += 1
        assert (module.offset, module.casting_mode, module.in_place, module.row_mode) == (0.0, "llama", False, None)
        wide = x.float()
        return module.weight * (wide * (wide.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()).to(x)

    def swiglu(self, module, x):
        self.calls["swiglu"] += 1
        return module.down_proj(F.silu(module.gate_proj(x)) * module.up_proj(x))

    def rotary(self, q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
        self.calls["rotary"] += 1
        cos, sin = cos[:, None], sin[:, None]
        half = q.shape[-1] // 2

        def turn(x):
            a, b = x[..., :half], x[..., half:]
            return torch.cat([a * cos[..., :half] - b * sin[..., :half], b * cos[..., half:] + a * sin[..., half:]], -1)

        return turn(q), turn(k)

    def install(self, patch):
        norm, swiglu = self.norm, self.swiglu
        patch.setattr(fused, "LigerRMSNorm", type("Norm", (), {"forward": lambda module, x: norm(module, x)}))
        patch.setattr(fused, "LigerSwiGLUMLP", type("Mlp", (), {"forward": lambda module, x: swiglu(module, x)}), False)
        patch.setattr(fused, "liger_rotary_pos_emb", self.rotary, False)


def test_set_on_instances_and_nowhere_else(family, monkeypatch):
    """Every RMSNorm, SwiGLU and rotary embedding of our model goes through the kernels, with the same values; classes
    and functions of transformers, and with them a plain model, stay as they are."""
    prompt, ids = family.encode(make_sample(family, [(84, 56)])), torch.tensor([5, 6, 7])
    plain = family.load_model(torch.float64)
    with torch.no_grad():
        before = plain_logits(plain, prompt, ids)
    classes = {type(m): dict(vars(type(m))) for m in plain.modules()}
    module = sys.modules[family.model_class.__module__]
    functions = dict(vars(module))
    truth = hidden_and_gradients(make_policy(family))

    liger = StandIns()
    liger.install(monkeypatch)
    policy = make_policy(family)
    changed = fused.use_liger(policy.model)
    ours = hidden_and_gradients(policy)
    layers, blocks = len(policy.text.layers), len(policy.visual.blocks)
    windows = family.name == "qwen2_5_vl"  # its tower has RMSNorm and SwiGLU, and a norm in the merger
    norms = 2 * layers + 1 + (2 * blocks + 1 if windows else 0)
    swiglu = layers + (blocks if windows else 0)
    assert liger.calls == {"norm": norms, "swiglu": swiglu, "rotary": layers} and changed == norms + swiglu + layers
    torch.testing.assert_close(ours[0], truth[0], rtol=1e-6, atol=1e-6)
    assert ours[1].keys() == truth[1].keys()
    for name, gradient in ours[1].items():
        torch.testing.assert_close(gradient, truth[1][name], rtol=1e-5, atol=1e-5 * float(truth[1][name].abs().max()))

    assert {c: dict(vars(c)) for c in classes} == classes and dict(vars(module)) == functions
    assert not any("forward" in vars(m) for m in plain.modules())
    with torch.no_grad():
        assert torch.equal(plain_logits(plain, prompt, ids), before)
        assert torch.equal(plain_logits(family.load_model(torch.float64), prompt, ids), before)
    assert sum(liger.calls.values()) == changed  # none by the plain models


def test_without_liger_or_a_gpu_nothing_is_set(family, monkeypatch):
    monkeypatch.setattr(fused, "LigerRMSNorm", None)
    assert fused.use_liger(family.load_model(torch.float32)) == 0
    assert not any("forward" in vars(m) for m in make_policy(family).model.modules())


IN_INTERPRETER = """
import sys
import numpy as np, torch, triton.language as tl, triton.runtime.interpreter as interpreter
import liger_kernel.ops.rms_norm as rms_norm
from test_fused import *

convert = interpreter._implicit_cvt
def with_floats(x):  # the interpreter hands floats over bare, kernels cast theirs
    if isinstance(x, float):
        return tl.tensor(interpreter.TensorHandle(np.array([x], np.float32), tl.float32), tl.float32)
    return convert(x)
interpreter._implicit_cvt = with_floats
rms_norm.rsqrt = lambda x: tl.rsqrt(x)  # libdevice is not for the interpreter

family = load_family(sys.argv[1])
classes = {type(m): dict(vars(type(m))) for m in family.load_model(torch.float32).modules()}
plain, ours = make_policy(family, torch.float32), make_policy(family, torch.float32)
assert fused.use_liger(ours.model) > 8
(a, ga), (b, gb) = hidden_and_gradients(plain), hidden_and_gradients(ours)
assert not torch.equal(a, b) and ga.keys() == gb.keys()
assert float((a - b).abs().max()) < 2e-5 * float(a.abs().max())
assert all(float((ga[n] - gb[n]).abs().max()) < 1e-4 * float(ga[n].abs().max()) for n in ga)
assert {c: dict(vars(c)) for c in classes} == classes
"""


def test_ligers_own_kernels_through_the_interpreter(family):
    if fused.LigerRMSNorm is None:
        pytest.skip("liger-kernel is not installed")
    here = str(Path(__file__).resolve().parent)
    path = os.pathsep.join([here, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    done = subprocess.run([sys.executable, "-c", IN_INTERPRETER, family.folder], text=True, capture_output=True,
                          timeout=200, env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
def test_ligers_kernels_on_the_gpu(family):
    if fused.LigerRMSNorm is None:
        pytest.skip("liger-kernel is not installed")
    truth = hidden_and_gradients(make_policy(family))[0]
    ours = hidden_and_gradients(make_policy(family, torch.float32, device="cuda"))[0]
    torch.testing.assert_close(ours.cpu().double(), truth, rtol=1e-3, atol=1e-3)
