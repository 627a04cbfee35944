"""bench/step.py: its contenders do the same update, and what it counts is what is run."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

BENCH = Path(__file__).resolve().parents[1] / "bench"
# Qwen2.5-VL-3B by hand: q, k, v, o and MLP of 36 layers; per patch the tower's 32 blocks and patch embedding
LAYER = 2048 * (2048 + 2 * 256 + 2048) + 3 * 2048 * 11008
THREE_B = {
    "trunk": 36 * LAYER, "layers": 36, "width": 2048, "head": 151936 * 2048, "window": 8,
    "patch": 32 * (4 * 1280**2 + 3 * 1280 * 3420) + 1176 * 1280, "merger": 5120 * 5120 + 5120 * 2048,
    "tower_layers": 32, "tower_full": 4, "tower_width": 1280,
}  # fmt: skip


@pytest.fixture(scope="module")
def step():
    return runpy.run_path(str(BENCH / "step.py"))


def job(step, name, shape, image):
    fixed = {"contender": "ours", "share": True, "cold": False, "train_vision": False}
    return fixed | step["CONTENDERS"][name] | {"shape": shape, "image": image}


def test_quick_run_agrees_and_counts_its_tokens(tmp_path):
    out = tmp_path / "step.jsonl"
    command = [sys.executable, str(BENCH / "step.py"), "--quick", "--repeats", "1", "--out", str(out)]
    run = subprocess.run([*command, "--contenders", "ours", "unshared", "padded"], capture_output=True, text=True,
                         timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert run.returncode == 0, run.stderr
    lines = {line["contender"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert list(lines) == ["ours", "unshared", "padded"]
    # P 60, C 6, G 4, two groups: 2 (60 + 4 * 5) shared, 2 * 4 * 65 not; a cached tower sees no image, padded sees all
    assert [line["tokens"] for line in lines.values()] == [160, 520, 520]
    assert [line["images"] for line in lines.values()] == [0, 0, 8]
    loss = lines["ours"]["loss"]
    for line in lines.values():
        assert abs(line["loss"] - loss) <= 1e-4 * abs(loss) and line.get("grad_diff", 0) <= 1e-4
        assert abs(line["grad_norm"] / lines["ours"]["grad_norm"] - 1) < 1e-5
        assert line["seconds"]["total"] > 0 and line["memory"] > 0
        stages = line["seconds"]
        assert stages["trunk"] > 0 and stages["backward"] > 0 and (stages["vision"] > 0) == (line["images"] > 0)
    assert abs(loss) > 1e-3  # ratios are not 1, or advantages would cancel


def test_another_update_is_refused(tmp_path):
    contenders = runpy.run_path(str(BENCH / "step_contenders.py"))
    grads = {"a": (1.0, 0.5), "b": (2.0, -1.0)}
    (tmp_path / "first").write_text(json.dumps({"loss": 0.01, "digest": grads}))
    work = {"name": "x", "expect": str(tmp_path / "first"), "result": str(tmp_path / "mine"), "tolerance": 1e-4}
    assert contenders["check"](work, 0.01, grads)["grad_diff"] == 0
    for loss, gradients in (
        (0.010002, grads), (float("nan"), grads), (0.01, {"a": (1.0, 0.5)}), (0.01, grads | {"b": (2.0, -1.001)}),
    ):  # fmt: skip
        with pytest.raises(SystemExit, match="x disagrees"):
            contenders["check"](work, loss, gradients)


@pytest.mark.parametrize("shape,image,shared,single,ratio", [
    # tokens of a group: P + G C and G (P + C), less the G last tokens; ratio of trunk FLOPs with attention
    ([1500, 100, 8], (40, 35), 2300 - 8, 12800 - 8, 5.50),
    ([1500, 400, 8], (40, 35), 4700 - 8, 15200 - 8, 3.16),
    ([700, 60, 16], (30, 20), 1660 - 16, 12160 - 16, 7.25),
])  # fmt: skip
def test_arithmetic_of_the_three_shapes(step, shape, image, shared, single, ratio):
    count = {
        name: step["count"](job(step, name, shape, image), THREE_B) for name in ("ours", "unshared", "padded", "trl")
    }
    size = shape[2]
    assert [count[name]["tokens"] for name in count] == [2 * n for n in (shared, single, single, single + size)]
    trunk = {name: c["flops"]["trunk"] for name, c in count.items()}
    assert trunk["padded"] / trunk["ours"] == pytest.approx(ratio, rel=0.01)
    assert trunk["unshared"] == trunk["padded"]
    assert [c["images"] for c in count.values()] == [0, 0, 2 * size, 2 * size]
    image_tflop = {1500: 7.9, 700: 3.2}[shape[0]]
    assert count["padded"]["flops"]["vision"] / (2 * size) / 1e12 == pytest.approx(image_tflop, rel=0.03)
    total = count["ours"]["flops"]
    assert total["total"] == 3 * (total["trunk"] + total["head"])  # nothing else is run with cached features


def test_counted_flops_are_those_of_the_model(step, tmp_path):
    """Against torch's own counter over plain transformers, matrices only: it does not know which pairs are visible."""
    contenders = runpy.run_path(str(BENCH / "step_contenders.py"))
    problem = contenders["PROBLEM"]
    family, config = problem.build_family("toy", tmp_path)
    model = problem.build_model(config, torch.device("cpu"), torch.float32)
    work = job(step, "padded", [60, 6, 4], (6, 5)) | {"groups": 2, "old": "none", "micro": 4, "clip": [0.2, 0.28]}
    rollouts, advantages = problem.make_rollouts(work, family)
    padded = contenders["Padded"](model, family, rollouts, advantages, work, None)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        for inputs, _ in padded.batches:
            model(**inputs, logits_to_keep=6, use_cache=False)
    counts = counter.get_flop_counts()["Global"]
    seen = sum(n for op, n in counts.items() if "attention" not in str(op) and "bmm" not in str(op))
    matrices = contenders["numbers"](model) | {"width": 0, "tower_width": 0}
    flops = step["count"](work, matrices)["flops"]
    assert flops["vision"] + flops["trunk"] + flops["head"] == seen
