"""bench/kernels.py runs, says all it promises, and fails when an output of ours is wrong."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench" / "kernels.py"


def load():
    spec = importlib.util.spec_from_file_location("bench_kernels", BENCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_quick_run_is_complete(tmp_path):
    run = subprocess.run(
        [sys.executable, str(BENCH), "--quick", "--out", "k.jsonl"], cwd=tmp_path, capture_output=True, text=True,
        timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "a CPU (1 threads): small sizes" in run.stdout and "fastest other" in run.stdout
    header, limit, *records, compiled = [json.loads(line) for line in open(tmp_path / "k.jsonl")]
    assert header["environment"]["torch"] and header["environment"]["device"] and "git_hash" in header["environment"]
    assert header["device"] == "cpu" and header["mean_entropy"] < 2 < math.log(header["v"])  # peaked
    assert limit["copy_gbps"] > 0 and sorted(limit["gemm_ms"]) == ["1", "2", "3"]
    assert compiled == {"operation": "compiled", "contender": "pr1", "first": 0, "later": 0}
    bench = load()
    wanted = [(o, name) for o, name, _, _ in bench.peers.contenders() if name != "torch.compile"]
    assert [(r["operation"], r["contender"]) for r in records] == wanted
    for r in records:
        if r["status"] != "ok":
            assert r["status"] and not r["contender"].startswith("pr1") and r["contender"] != "eager", r
            continue
        rate = r["gbps" if r["operation"].startswith("logits") else "tflops"]
        assert min(r["ms"], r["peak_mib"], rate, r["limit_percent"]) > 0 and r["n"] == 64
        assert max(r["error"].values()) < 1e-4
        gradients = {k for k in r["error"] if k.startswith("d")}
        assert gradients == {
            "logits-forward": set(), "hidden-forward": set(), "hidden-grpo": {"dhidden", "dweight"},
            "hidden-grpo-frozen": {"dhidden"},
        }.get(r["operation"], {"dlogits"})  # fmt: skip


@pytest.mark.parametrize("name, spoil", [
    ("token_logprobs", lambda f: lambda x, t, **how: (f(x, t, **how)[0], f(x, t, **how)[1] + 1e-3)),
    ("grpo_loss", lambda f: lambda x, rows, o, **how: (1.001 * f(x, rows, o, **how)[0], None)),
    ("linear_token_logprobs", lambda f: lambda x, w, t, **how: tuple(1.001 * y for y in f(x, w, t, **how))),
    ("linear_grpo_loss", lambda f: lambda x, w, rows, o: f(x, w.detach() + (w - w.detach()) * 0.99, rows, o)),
])  # fmt: skip
def test_a_wrong_output_of_ours_fails_the_check(name, spoil, monkeypatch):
    bench = load()
    listed = [c for c in bench.peers.contenders() if c[1] in ("pr1", "eager")]
    problem = bench.peers.Problem(16, 32, 128, bench.torch.float32, "cpu", 20.0)
    assert bench.check(problem, listed)[1] == []
    monkeypatch.setattr(bench.peers, name, spoil(getattr(bench.peers, name)))
    listed = [c for c in bench.peers.contenders() if c[1] in ("pr1", "eager")]
    failures = bench.check(problem, listed)[1]
    assert failures and all("pr1: " in failure and "is off by" in failure for failure in failures)


def test_memory_of_a_step_is_its_peak():
    bench = load()
    torch = bench.torch

    def step():
        a = torch.zeros(2**20)  # 4 MiB
        b = a + 1  # 8 MiB held
        del a
        c = b.double()  # 4 + 8
        del b
        return c.sum() + torch.ones(2**18).sum()  # 8 + 1

    step()
    assert bench.peak_mib(step) == pytest.approx(12, abs=0.1)


def test_gpu_script_skips_parts_and_knows_its_names(tmp_path):
    def run(*arguments):
        env = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": sys.executable}
        return subprocess.run([str(BENCH.with_name("gpu.sh")), *arguments], capture_output=True, text=True, env=env)

    parts = ["build", "tests", "kernels", "step", "rollout", "matcher"]
    done = run(*(word for part in parts for word in ("--skip", part)))
    assert done.returncode == 0 and done.stdout.count("skipped") == 6, done.stdout + done.stderr
    assert not list((tmp_path / "out").iterdir())
    wrong = run("kernel")
    assert wrong.returncode == 2 and "'kernel'" in wrong.stderr
