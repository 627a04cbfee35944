"""Whole runs of train.py on a GPU: half precision, float32 masters, captured graphs, and resumption to the bit."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import runs

TRAIN = Path(__file__).resolve().parents[1] / "pr1" / "train.py"
# of every kind: reference, several updates, the tower; a prompt or a completion more than one bucket of graphs
FLAGS = ["--task", "det", "--group-size", "5", "--prompts-per-step", "5", "--max-new-tokens", "48", "--difficulty", "0",
         "--kl-coef", "0.05", "--updates-per-batch", "2", "--train-vision", "--lr", "1e-4", "--warmup-steps", "1",
         "--eval-samples", "40", "--save-every", "1", "--no-tensorboard", "--deterministic"]  # fmt: skip


def train(run: Path, *flags) -> list[dict]:
    command = [sys.executable, TRAIN, *FLAGS, "--run-dir", run, *flags]
    done = subprocess.run([*map(str, command)], env=runs.environment(), cwd=run.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [runs.timeless(line) for line in runs.read_lines(run / "metrics.jsonl")]


@pytest.mark.gpu
def test_a_run_on_a_gpu_resumes_to_the_bit(tmp_path):
    """The whole run evaluates before its first step, which leaves larger pools; the resumed half does not."""
    whole = train(tmp_path / "whole", "--steps", "4", "--eval-every", "0")
    for line in whole[:4]:
        assert all(math.isfinite(v) for v in line.values() if v is not None)
        assert line["grad_norm"] > 0 and line["completion_tokens"] > 1 and line["logp_gap"] < 0.05, line
    first = train(tmp_path / "parts", "--steps", "2", "--eval-every", "-1")
    second = train(tmp_path / "parts", "--steps", "4", "--eval-every", "-1", "--resume")
    assert len(first) == 2 and second[:2] == first
    for ours, theirs in zip(second, whole, strict=False):
        assert ours == {k: v for k, v in theirs.items() if not k.startswith("eval/")}
    parts = [runs.state_of(tmp_path / name, 4) for name in ("whole", "parts")]
    assert runs.same(*parts)
