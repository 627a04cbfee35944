"""The matcher against other solvers, and boxes -> reward against NumPy and scipy. Checks first, then times.

    python bench/matcher.py [--quick] [--out FILE.jsonl]

Per matrix, microseconds, medians of rounds in which every solver takes its turn. Costs, float32 for us, float64 for the
others (what each takes natively):
- uniform: independent in 0..1;
- det: boxes of .02 to .5 of the image a side; 80 % of the shorter side are matches, jittered by N(0, .15 of the box's size),
  the rest on both sides strangers; cost = 5 * L1 + 2 * (1 - GIoU), as the reward `set` has it within a class.
`left over`: share of matrices that the greedy start did not solve. Work is between m * n and m * m * n additions and
comparisons; the limit for small sizes is the latency of one sweep (load, compare, minimum over lanes), not bandwidth.

Rivals: scipy; lapx (`lap.lapjvh_batch`, its fastest for batches, and `lap.lapjv`, which is also the `lap` package's);
torch_linear_assignment. One that is not installed is left out and said so.
"""

import sys

sys.path[:] = [p for p in sys.path if not p.rstrip("/").endswith("/bench")]  # bench/ holds names like kernels.py

import argparse
import importlib
import json
import os
import platform
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from pr1.matcher import Boxes, linear_sum_assignment_batch, settings
from pr1.rewards import score

SHAPES = [(5, 5), (10, 10), (20, 20), (50, 50), (100, 100), (300, 300), (10, 20), (20, 50), (50, 20), (100, 300)]


def random_boxes(rng, *shape):
    """(*shape, 4) xyxy in a unit image, sides .02 to .5."""
    size = rng.uniform(0.02, 0.5, (*shape, 2))
    low = rng.random((*shape, 2)) * (1 - size)
    return np.concatenate([low, low + size], -1)


def detection(rng, m, n):
    """m predictions and n objects with labels; 80 % of the shorter side are jittered matches."""
    pred, gt = random_boxes(rng, m), random_boxes(rng, n)
    labels, pred_labels = rng.integers(0, 5, n), rng.integers(0, 5, m)
    k = round(0.8 * min(m, n))
    rows, cols = rng.permutation(m)[:k], rng.permutation(n)[:k]
    size = np.tile(gt[cols, 2:] - gt[cols, :2], 2)
    moved = gt[cols] + rng.normal(0, 0.15, (k, 4)) * size
    pred[rows] = np.sort(moved.reshape(k, 2, 2), 1).reshape(k, 4)
    pred_labels[rows] = labels[cols]
    return pred, pred_labels, gt, labels


def pairwise(a, b):
    """(..., m, n) IoU and cost 5 * L1 + 2 * (1 - GIoU) of boxes (..., m, 4) and (..., n, 4) in a unit image, as one
    would write it in NumPy."""
    centre = lambda x: np.concatenate([(x[..., :2] + x[..., 2:]) / 2, x[..., 2:] - x[..., :2]], -1)  # noqa: E731
    area = lambda x: (x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1])  # noqa: E731
    distance = np.abs(centre(a)[..., :, None, :] - centre(b)[..., None, :, :]).sum(-1)
    area_a, area_b, a, b = area(a)[..., :, None], area(b)[..., None, :], a[..., :, None, :], b[..., None, :, :]
    overlap = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None)
    hull = np.maximum(a[..., 2:], b[..., 2:]) - np.minimum(a[..., :2], b[..., :2])
    inter, hull = overlap[..., 0] * overlap[..., 1], hull[..., 0] * hull[..., 1]
    union = area_a + area_b - inter
    iou = inter / union
    return iou, 5 * distance + 2 * (1 - iou + (hull - union) / hull)


def numpy_reward(problems):
    """Soft F1 of each problem: legal pairs first, then least cost, by a price no cost reaches."""
    rewards = []
    for pred, pred_labels, gt, labels in problems:
        iou, cost = pairwise(pred, gt)
        legal = (pred_labels[:, None] == labels[None]) & (iou >= 0.5)
        rows, cols = linear_sum_assignment(np.where(legal, cost, 1e6))
        quality = np.where(legal[rows, cols], np.clip((iou[rows, cols] - 0.5) / 0.5, 0, 1), 0)
        rewards.append(2 * quality.sum() / (len(pred) + len(gt)))
    return np.array(rewards)


def batched_reward(pred, pred_labels, gt, labels):
    """The same for problems of one size, (B, m, 4), (B, m), (B, n, 4), (B, n): NumPy over the whole batch at once."""
    iou, cost = pairwise(pred, gt)
    legal = (pred_labels[:, :, None] == labels[:, None]) & (iou >= 0.5)
    cost, quality = np.where(legal, cost, 1e6), np.where(legal, np.clip((iou - 0.5) / 0.5, 0, 1), 0)
    total = np.array([q[linear_sum_assignment(c)].sum() for q, c in zip(quality, cost, strict=True)])
    return 2 * total / (pred.shape[1] + gt.shape[1])


def set_env(**values):
    os.environ.update({name: str(value) for name, value in values.items()})


def ours(isa, threads):
    def solve(single, double):
        set_env(PR1_ISA=isa, PR1_THREADS=threads)
        return linear_sum_assignment_batch(single)

    return solve


def solvers(threads):
    """Name -> function of (float32 stack, float64 stack). The first is the one that counts."""
    os.environ.pop("PR1_ISA", None)
    best = settings()[0]
    order = ["avx512", "avx2", "scalar"]
    found = {f"pr1 {isa}": ours(isa, threads) for isa in order[order.index(best) :]}
    if threads == 1:
        found["scipy"] = lambda single, double: [linear_sum_assignment(c) for c in double]
    missing = []
    try:
        lap = importlib.import_module("lap")
        if hasattr(lap, "lapjvh_batch"):
            found["lapx batch"] = lambda single, double: lap.lapjvh_batch(double, extend_cost=True, n_threads=threads)
        if threads == 1:
            found["lap.lapjv"] = lambda single, double: [lap.lapjv(c, extend_cost=True) for c in double]
    except ImportError:
        missing.append("lap / lapx")
    try:
        tla = importlib.import_module("torch_linear_assignment")
        if threads == 1:
            found["torch-l-a"] = lambda single, double: tla.batch_linear_assignment(torch.from_numpy(single))
    except ImportError:
        missing.append("torch_linear_assignment")
    return found, missing


def measure(functions, rounds, floor=0.01):
    """Median seconds of each; in every round each takes its turn, repeated until a turn lasts `floor` seconds."""
    repeats, times = {}, {name: [] for name in functions}
    for name, function in functions.items():
        function()
        start = time.perf_counter()
        function()
        repeats[name] = max(1, round(floor / (time.perf_counter() - start)))
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                function()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: float(np.median(values)) for name, values in times.items()}


def left_over(costs):
    """Share of matrices that the greedy start (csrc/solve.h, steps 1 and 2) does not solve."""
    count = 0
    for cost in costs:
        cost = cost.T if cost.shape[0] > cost.shape[1] else cost
        reduced = cost - cost.min(0) if cost.shape[0] == cost.shape[1] else cost
        count += len(set(reduced.argmin(1).tolist())) < len(cost)
    return count / len(costs)


def check(costs, result):
    rows, cols, offsets = result
    for i, cost in enumerate(costs):
        span = slice(offsets[i], offsets[i + 1])
        best = cost[linear_sum_assignment(cost)].astype(np.float64).sum()
        total = cost[rows[span], cols[span]].astype(np.float64).sum()
        assert abs(total - best) <= 1e-5 * max(1.0, float(np.abs(cost).sum())), (i, total, best)


def bench_solvers(quick, rounds):
    rng = np.random.default_rng(0)
    for m, n in SHAPES[2:4] if quick else SHAPES:
        batch = max(8, min(1024, 400_000 // (m * n)))
        for kind in ("det", "uniform"):
            if kind == "det":
                double = np.stack([pairwise(d[0], d[2])[1] for d in (detection(rng, m, n) for _ in range(batch))])
            else:
                double = rng.random((batch, m, n))
            single = double.astype(np.float32)
            for threads in (1, 2):
                functions, _ = solvers(threads)
                for name, function in functions.items():
                    if name.startswith("pr1"):
                        check(single[:50], function(single[:50], None))
                calls = {name: lambda f=f: f(single, double) for name, f in functions.items()}  # noqa: B023
                seconds = measure(calls, rounds)
                yield {
                    "bench": "solve", "kind": kind, "shape": [m, n], "batch": batch, "threads": threads,
                    "left_over": round(left_over(single), 3),
                    "us": {name: round(1e6 * value / batch, 3) for name, value in seconds.items()},
                }  # fmt: skip


def bench_reward(rounds, threads, completions=256, boxes=20):
    """Boxes -> reward, all of `pr1.rewards.score`, preset `set`, against NumPy + scipy giving the same numbers:
    completion by completion, as rewards are written, and over the whole batch, which needs as many boxes in each."""
    rng = np.random.default_rng(1)
    problems = [detection(rng, boxes, boxes) for _ in range(completions)]
    pred, gt = (Boxes.pack([p[i] for p in problems], [p[i + 1] for p in problems]) for i in (0, 2))
    sizes = np.ones((completions, 2))
    stacked = [np.stack([p[i] for p in problems]) for i in range(4)]
    functions = {}

    def on(isa):
        def call():
            set_env(PR1_ISA=isa, PR1_THREADS=threads)
            return score(pred, gt, sizes)[0]

        return call

    for name in [name for name in solvers(threads)[0] if name.startswith("pr1")]:
        functions[name] = on(name.split()[1])
    if threads == 1:
        functions["numpy + scipy"] = lambda: numpy_reward(problems)
        functions["numpy batched + scipy"] = lambda: batched_reward(*stacked)
    expected = numpy_reward(problems)
    for function in functions.values():
        assert np.allclose(function(), expected, atol=1e-9)
    seconds = measure(functions, rounds)
    return {
        "bench": "boxes -> reward", "completions": completions, "boxes": boxes, "threads": threads,
        "mean_reward": round(float(expected.mean()), 4),
        "ms": {name: round(1e3 * value, 3) for name, value in seconds.items()},
    }  # fmt: skip


def ratios(us):
    """How many times as long the others take as our first path."""
    first, *_ = us
    rivals = {name: value for name, value in us.items() if not name.startswith("pr1")}
    libraries = [value for name, value in rivals.items() if name != "scipy"]
    parts = [f"scipy {rivals['scipy'] / us[first]:.1f}x"] if "scipy" in rivals else []
    parts += [f"best library {min(libraries) / us[first]:.1f}x"] if libraries else []
    return ", ".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two sizes, few rounds")
    parser.add_argument("--out", type=Path, help="JSONL file to write")
    args = parser.parse_args()
    rounds = 3 if args.quick else 9
    for name in ("PR1_ISA", "PR1_THREADS"):
        os.environ.pop(name, None)
    root = Path(__file__).resolve().parents[1]
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True).stdout.strip()
    info = Path("/proc/cpuinfo")
    model = (
        [x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    )
    missing = solvers(1)[1]
    head = {
        "bench": "head", "device": (model or [platform.processor()])[0], "cores": os.cpu_count(), "isa": settings()[0],
        "git": git, "python": platform.python_version(), "numpy": np.__version__, "missing": missing,
    }  # fmt: skip
    records = [head]
    print(head)
    for record in bench_solvers(args.quick, rounds):
        records.append(record)
        size = "x".join(map(str, record["shape"]))
        times = "  ".join(f"{name} {value:.2f}" for name, value in record["us"].items())
        print(f"{record['kind']:8s}{size:>8s}  {record['threads']} thr  left over {record['left_over']:.2f}  us: {times}"
              f"  | {ratios(record['us'])}", flush=True)  # fmt: skip
    for threads in (1, 2):
        record = bench_reward(rounds, threads)
        records.append(record)
        ms = record["ms"]
        first = next(iter(ms))
        rivals = ", ".join(f"{name} {ms[name] / ms[first]:.1f}x" for name in ms if not name.startswith("pr1"))
        print(f"boxes -> reward, 256 completions x 20 boxes, {threads} thr, ms: {ms}  | {rivals}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("".join(json.dumps(r) + "\n" for r in records))


if __name__ == "__main__":
    main()
