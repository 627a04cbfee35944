"""Does the reward teach? RL from one frozen warm start on rendered scenes, three seeds, against two controls.

    python bench/learning.py [--steps N] [--seeds 0 1 2] [--controls 3] [--jobs 2] [--out FILE.jsonl]

- rl:        `train.py --task det` as it is, once per seed;
- shuffled:  the same with advantages shuffled within each group: the numbers are the same, the signal is gone;
- sft:       `sft.py` on the same stream of scenes from the same checkpoint for the wall time the RL runs took.

Each line: AP (every box scored 1.0) on 1,000 held-out scenes before and after, and the seconds of its steps. The last
lines give the mean gain, its standard error over seeds and their ratio. `--jobs` runs share the cores, one thread each.
"""

import sys

sys.path[:] = [p for p in sys.path if not p.rstrip("/").endswith("/bench")]  # bench/ holds names like kernels.py

import argparse
import json
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

SHUFFLED = """
import sys, numpy as np, pr1.train as t
true, rng = t.group_advantages, np.random.default_rng(0)
t.group_advantages = lambda rewards, scale: rng.permuted(true(rewards, scale), axis=1)
sys.exit(t.main(sys.argv[1:]))
"""
PROGRAMS = {
    "rl": ["-c", "import sys, pr1.train as t; sys.exit(t.main(sys.argv[1:]))"],
    "shuffled": ["-c", SHUFFLED],
    "sft": ["-c", "import sys, pr1.sft as t; sys.exit(t.main(sys.argv[1:]))"],
}
SFT_FLAGS = ["--lr", "5e-4", "--schedule", "cosine", "--warmup-steps", "20", "--beta2", "0.98"]


def run(kind: str, seed: int, folder: Path, flags: list[str]) -> dict:
    """One run in a process of its own; its AP before and after and the seconds its steps took."""
    where = folder / f"{kind}-{seed}"
    command = [sys.executable, *PROGRAMS[kind], "--task", "det", "--seed", str(seed), "--run-dir", str(where), *flags]
    with open(folder / f"{kind}-{seed}.log", "w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = [json.loads(line) for line in open(where / "metrics.jsonl")]
    steps = [line for line in lines if "lr" in line]
    rewards = [line["reward"] for line in steps if "reward" in line]
    return {
        "run": kind, "seed": seed, "steps": len(steps), "before": lines[0]["eval/ap"], "after": lines[-1]["eval/ap"],
        "reward_first": float(np.mean(rewards[:20])) if rewards else None,
        "reward_last": float(np.mean(rewards[-20:])) if rewards else None,
        "seconds": round(sum(line["seconds"] for line in steps), 1),
        "environment": json.loads((where / "config.json").read_text())["environment"],
    }  # fmt: skip


def show(result: dict) -> None:
    gain = 100 * (result["after"] - result["before"])
    print(f"{result['run']:>9} seed {result['seed']}  AP {100 * result['before']:.2f} -> {100 * result['after']:.2f}  "
          f"({gain:+.2f})  {result['steps']} steps, {result['seconds']:.0f} s", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, help="RL steps (default: those of train.py)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--controls", type=int, default=3, help="seeds of the shuffled control")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", default="learning.jsonl", help="one JSON object a run")
    options = parser.parse_args()
    flags = ["--steps", str(options.steps)] if options.steps else []
    folder = Path(tempfile.mkdtemp(prefix="learning-"))
    print(f"runs and logs: {folder}", flush=True)
    results = []

    def finish(result: dict) -> dict:
        show(result)
        results.append(result)
        Path(options.out).write_text("".join(json.dumps(r) + "\n" for r in results))
        return result

    with ThreadPoolExecutor(options.jobs) as pool:
        kinds = [("rl", seed) for seed in options.seeds] + [("shuffled", s) for s in options.seeds[: options.controls]]
        futures = {job: pool.submit(lambda job=job: finish(run(*job, folder, flags))) for job in kinds}
        rl = [futures["rl", seed].result() for seed in options.seeds]
        probe = run("sft", 999, folder, ["--steps", "20", "--eval-samples", "10", *SFT_FLAGS])
        budget = np.mean(r["seconds"] for r in rl)
        steps = round(budget / (probe["seconds"] / probe["steps"]))
        pool.submit(lambda: finish(run("sft", 0, folder, ["--steps", str(steps), *SFT_FLAGS]))).result()
    for kind in ("rl", "shuffled"):
        gains = [100 * (r["after"] - r["before"]) for r in results if r["run"] == kind]
        if not gains:
            continue
        mean, error = np.mean(gains), np.std(gains, ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
        print(f"{kind}: mean gain {mean:.2f} AP points, standard error {error:.2f}"
              + (f", ratio {mean / error:.1f}" if error else ""))  # fmt: skip


if __name__ == "__main__":
    main()
