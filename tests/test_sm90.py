"""Kernels compiled for sm_90 without a GPU, by each Triton the code is to run with, and what makes Triton compile again.

In subprocesses: this process may have set TRITON_INTERPRET, under which nothing compiles.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PREFIX = Path(sys.prefix)
OLDEST = PREFIX / "triton-3.6"  # put there by tools/setup_env.sh


def run(arguments, folder, oldest):
    """Runs Python with the installed Triton or the oldest one, an empty compilation cache and no interpreter."""
    if oldest and not OLDEST.exists():
        assert not (PREFIX / ".installed").exists(), f"{OLDEST} is missing: run make build"
        pytest.skip(f"{OLDEST} is missing; tools/setup_env.sh installs it")
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    env |= {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    if oldest:
        env["PYTHONPATH"] = str(OLDEST)
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("oldest", [False, True], ids=["installed", "3.6"])
def test_every_kernel_compiles_without_spills(tmp_path, oldest):
    run([ROOT / "bench" / "sm90.py", "--out", tmp_path / "out.jsonl"], tmp_path, oldest)
    results = [json.loads(line) for line in open(tmp_path / "out.jsonl")]
    assert len(results) > 8
    for r in results:
        assert r["triton"].startswith("3.6.") or not oldest
        assert r["spilled"] == 0, r
        assert 16 <= r["registers"] <= (128 if r["kernel"].startswith(("softmax", "scale")) else 255), r
        if "unit 16" in r["kernel"]:  # V and strides known to be multiples of 16: whole 16-byte loads
            assert r["widest_load"] == 16, r
    compiled = {r["kernel"].split()[0] + " " + r["kernel"].split()[1] for r in results}
    assert {"softmax forward", "softmax backward"} <= compiled


# Calls the row operations with recorders in place of the kernels, and prints the keys Triton would look up binaries by.
KEYS = """
import json, torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from pr1.kernels import Objective, Rows, grpo_loss_triton, linear_grpo_loss_triton
from pr1.kernels import linear_token_logprobs_triton, softmax_triton, token_logprobs_triton

backend = make_backend(GPUTarget("cuda", 90, 32))
keys = {}

class Recorder:
    def __init__(self, name):
        self.name, self.kernel = name, getattr(softmax_triton, name)
        assert isinstance(self.kernel, JITFunction)
        self.bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)

    def __getitem__(self, grid):
        assert 0 < grid[0] < 2**31 and len(grid) == 1
        return self.launch

    def launch(self, *args, **kwargs):
        bound, specialisation, options = self.bind(*args, **kwargs)
        key = repr((specialisation, sorted(options.items())))
        keys.setdefault(self.name, {}).setdefault(key, []).append(case)

for name in ("forward_kernel", "backward_kernel", "scale_kernel"):
    setattr(softmax_triton, name, Recorder(name))

def logprobs(dtype, n, v, temperature, start):
    x = torch.zeros(n, v, dtype=dtype).requires_grad_()
    tokens = torch.zeros(n + 1, dtype=torch.int64)[start : n + start]
    logp, entropy = token_logprobs_triton(x, tokens, temperature)
    (logp.sum() + entropy.sum()).backward()

def loss(dtype, n, v, objective, start):
    x = torch.zeros(n, v, dtype=dtype).requires_grad_()
    tokens, one = torch.zeros(n, dtype=torch.int64), torch.rand(n + 1)[start : n + start] + 0.1
    rows = Rows(tokens, one, one, -one, tokens, logp_ref=one)
    grpo_loss_triton(x, rows, objective)[0].backward()
    h = torch.zeros(n, 16, dtype=dtype).requires_grad_()
    w = torch.zeros(v, 16, dtype=dtype).requires_grad_()
    (linear_grpo_loss_triton(h, w, rows, objective, memory=v * 4 * 128)[0] * 2).backward()

OBJECTIVES = [
    Objective(),
    Objective(kl_coef=1.0, entropy_coef=1.0, clip_low=1.0, clip_high=0.0, temperature=2.0),
    Objective(kl_coef=0.04, kl="k2", entropy_coef=16.0, rollout_cap=1.0, temperature=0.3),
]
found = {}
for v in (48, 37):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for n in (1, 2, 3, 16, 17, 4096, 70000):
            for temperature in (1.0, 0.7, 1, 16, 2.0**-3) if n in (1, 17) else (1.0,):
                for start in (0, 1):
                    case = str((dtype, n, temperature, start))
                    logprobs(dtype, n, v, temperature, start)
    found[f"logprobs {v}"], keys = keys, {}
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for n in (1, 2, 16, 17, 300):
        for objective in OBJECTIVES:
            case = str((dtype, n))
            loss(dtype, n, 48, objective, n % 2)
found["loss 48"] = keys
print(json.dumps({what: {name: list(k.values()) for name, k in keys.items()} for what, keys in found.items()}))
"""


@pytest.mark.parametrize("oldest", [False, True], ids=["installed", "3.6"])
def test_one_binary_a_dtype(tmp_path, oldest):
    """Whatever N, the alignment of row vectors, the temperature and every coefficient: nothing is compiled again."""
    (tmp_path / "keys.py").write_text(KEYS)
    found = json.loads(run([tmp_path / "keys.py"], tmp_path, oldest))
    assert {what: {name: len(k) for name, k in keys.items()} for what, keys in found.items()} == {
        "logprobs 48": {"forward_kernel": 3, "backward_kernel": 3},
        "logprobs 37": {"forward_kernel": 3, "backward_kernel": 3},
        # from logits one a dtype; the linear form on a CPU makes float32 of each, and has no mask
        "loss 48": {"forward_kernel": 4, "backward_kernel": 3, "scale_kernel": 3},
    }, found


def test_the_key_test_can_see_a_second_key(tmp_path):
    """Without `do_not_specialize` N = 1, N = 16 and N = 17 would be three binaries."""
    broken = "from pr1.kernels import softmax_triton as s\nfor k in (s.forward_kernel, s.backward_kernel):\n"
    broken += "    for p in k.params:\n        p.__dict__['do_not_specialize'] = False\n"
    (tmp_path / "keys.py").write_text(KEYS.replace("backend =", broken + "backend =", 1))
    keys = json.loads(run([tmp_path / "keys.py"], tmp_path, False))["logprobs 48"]
    assert all(len(k) > 6 for k in keys.values())
