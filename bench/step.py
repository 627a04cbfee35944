"""One update on the same rollouts, ours against the padded transformers way and TRL; check first, then time.

    python bench/step.py [--quick] [--contenders NAME ...] [--shapes P,C,G ...] [--trl-python PYTHON] [--out FILE.jsonl]
    python bench/step.py --whole-step [--trl-python PYTHON]       rollout + reward + update on the embedded default

Contenders: `ours` (tower frozen, features cached), `ours-cold` (features made once an image), `unshared` (ours, every
completion with its own prompt), `padded` (plain transformers built well), `trl` (GRPOTrainer's own training step built
well), `trl-default` (as shipped), `trl:ours` (ours in TRL's environment, which is what TRL is compared with),
`ours-vision` and `padded-vision` (tower trained), `ours-full` (with AdamW, for memory). No optimizer step is timed.

Two groups of equal completions, so nothing is padded. The CPU's policy is small but keeps the 3B's proportions, shapes
are not scaled; on a GPU it is a random Qwen2.5-VL-3B in bfloat16. A group of P prompt and C completion tokens is
P + G(C-1) tokens for ours and G(P+C-1) for `unshared` and `padded`: the last token of a completion predicts nothing and
is not run; TRL runs it, G(P+C). Bound by arithmetic: `FLOP x`, the ratio that FLOPs alone would give, stands beside
that of wall time and, for machines that are shared, that of CPU time (all threads).

TRL's environment: python3.11 -m venv trl; trl/bin/pip install torch==2.14.1 torchvision==0.29.1 transformers==5.23.0
trl==1.16.0 setuptools pybind11 cmake ninja; trl/bin/pip install --no-build-isolation -e .
"""

import sys

sys.path[:] = [p for p in sys.path if not p.rstrip("/").endswith("/bench")]  # bench/ holds names like kernels.py

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES = {1500: (40, 35), 700: (30, 20), 60: (6, 5)}  # prompt tokens -> the image's rows and columns of tokens
SHAPES, QUICK = ["1500,100,8", "1500,400,8", "700,60,16"], ["60,6,4"]
PEAK = 989e12  # FLOP/s of an H100 or H200 in dense bfloat16
CONTENDERS = {  # name -> what differs from `ours`
    "ours": {}, "ours-cold": {"cold": True}, "unshared": {"share": False}, "padded": {"contender": "padded"},
    "ours-full": {"full": True}, "ours-vision": {"train_vision": True},
    "padded-vision": {"contender": "padded", "train_vision": True}, "trl:ours": {},
    "trl": {"contender": "trl"}, "trl-default": {"contender": "trl", "default": True},
}  # fmt: skip
BASES = {"padded-vision": "ours-vision", "trl": "trl:ours", "trl-default": "trl:ours"}  # others: ours
GROUPS = 2
# What the imports ask before step_contenders.py forks must start neither threads nor CUDA (liger asks for a device).
FORKABLE = {"TOKENIZERS_PARALLELISM": "false", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


def count(job: dict, model: dict) -> dict:
    """Tokens, images and FLOPs of one update: 2 a multiply-add; backward twice the forward of what is trained, what
    checkpointing computes again left out. Attention: 4 D per head, layer and visible (query, key) pair."""
    (prompt, completion, size), (rows, columns) = job["shape"], job["image"]
    run = completion if job["contender"] == "trl" else completion - 1
    copies = 1 if job["contender"] == "ours" and job["share"] else size

    def triangle(n: int) -> int:
        return n * (n + 1) // 2

    tokens = copies * prompt + size * run
    pairs = copies * triangle(prompt) + size * (prompt * run + triangle(run))
    patches, side = 4 * rows * columns, model["window"]
    # pairs inside windows: the sum over windows of (rows * columns)^2 factors; windows at the far edges are cut off
    inside = math.prod(2 * n // side * side**2 + (2 * n % side) ** 2 for n in (rows, columns))
    image = 2 * patches * model["patch"] + 2 * patches // 4 * model["merger"]
    full = model["tower_full"]
    image += 4 * model["tower_width"] * (full * patches**2 + (model["tower_layers"] - full) * inside)
    images = size if job["contender"] != "ours" else int(job["cold"] or job["train_vision"])  # ours: distinct ones
    vision = images * image
    trunk = 2 * model["trunk"] * tokens + 4 * model["width"] * model["layers"] * pairs
    head = 2 * model["head"] * size * completion
    backward = 2 * (trunk + head + vision * job["train_vision"])
    flops = {"vision": vision, "trunk": trunk, "head": head, "backward": backward}
    flops["total"] = sum(flops.values())
    return {"tokens": GROUPS * tokens, "images": GROUPS * images, "flops": {k: GROUPS * v for k, v in flops.items()}}


def jobs_of(names: list[str], shape: list[int], options, folder: Path, gpu: bool) -> dict[str, dict]:
    """name -> job of each contender, in the order they run; the first one's result is what the others are checked with
    (a trained tower has other gradients: those are checked among themselves)."""
    jobs = {}
    for name in names:
        job = {
            "name": name, "contender": "ours", "share": True, "cold": False, "train_vision": False, "full": False,
            "default": False, "shape": shape, "image": IMAGES[shape[0]], "groups": GROUPS, "clip": [0.2, 0.28],
            "size": "toy" if options.quick else "3b" if gpu else "cpu", "micro": options.micro or shape[2],
            "old": str(folder / "old.pt"), "result": str(folder / f"{name}.json"), "repeats": options.repeats,
            "budget": options.budget, "tolerance": 0.1 if gpu else 1e-4,
        } | CONTENDERS[name]  # fmt: skip
        first = next((j for j in jobs.values() if j["train_vision"] == job["train_vision"]), job)
        jobs[name] = job | {"expect": first["result"]}
    first = next(iter(jobs.values()))
    return {"prepare": first | {"name": "prepare", "contender": "prepare"}} | jobs


def run_shape(shape: list[int], options, gpu: bool) -> list[dict]:
    """A result a contender, `ours` first; every environment's contenders in one process that forks."""
    with tempfile.TemporaryDirectory(prefix="step-") as folder:
        jobs = jobs_of(options.contenders, shape, options, Path(folder), gpu)
        for python, theirs in ((sys.executable, False), (options.trl_python, True)):
            mine = [job for name, job in jobs.items() if name.startswith("trl") == theirs]
            if mine:
                (Path(folder) / "jobs.json").write_text(json.dumps(mine))
                subprocess.run([python, str(ROOT / "bench/step_contenders.py"), f"{folder}/jobs.json"], check=True,
                               env={**os.environ, **FORKABLE})  # fmt: skip
        del jobs["prepare"]
        results = {name: json.loads(Path(job["result"]).read_text()) for name, job in jobs.items()}
    lines = []
    for name, result in results.items():
        result.pop("digest")
        line = {"contender": name, "shape": shape, "groups": GROUPS, "size": jobs[name]["size"],
                "micro": jobs[name]["micro"], "git": revision(), **count(jobs[name], result["numbers"]), **result}  # fmt: skip
        base = next((b for b in (BASES.get(name), "ours") if b in results and name != "trl:ours"), name)
        line |= {"base": base, "time_ratio": line["seconds"]["total"] / results[base]["seconds"]["total"],
                 "cpu_ratio": line["cpu_seconds"] / results[base]["cpu_seconds"],
                 "flop_ratio": line["flops"]["total"] / count(jobs[base], results[base]["numbers"])["flops"]["total"],
                 "memory_ratio": line["memory"] / max(1, results[base]["memory"])}  # fmt: skip
        if gpu:
            line["mfu"] = {s: line["flops"][s] / line["seconds"][s] / PEAK
                           for s in line["flops"] if line["seconds"][s] > 0}  # fmt: skip
        lines.append(line)
    return lines


def revision() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def show(lines: list[dict]) -> None:
    first, model = lines[0], lines[0]["numbers"]
    seen, env = first["shape"], first["environment"]
    print(f"\n(P, C, G) = ({seen[0]}, {seen[1]}, {seen[2]}), {GROUPS} groups, {env['device']}, {env['threads']} threads; "
          f"trunk {model['trunk'] / 1e6:.1f} M weights ({model['layers']} layers, width {model['width']}), head "
          f"{100 * model['head'] / model['trunk']:.0f} % of it; image token / text token FLOPs "
          f"{(4 * model['patch'] + model['merger']) / model['trunk']:.2f}")  # fmt: skip
    print(f"{'contender':>14} {'torch':>7} {'tokens':>7} {'images':>6} {'GFLOP':>8} {'seconds':>8} "
          f"{'pack':>7} {'vision':>7} {'trunk':>7} {'head':>7} {'backw.':>7} {'MB':>7} {'d loss':>8} {'d grad':>8} "
          f"{'time x':>7} {'CPU x':>7} {'FLOP x':>7}  of")  # fmt: skip
    for line in lines:
        seconds = line["seconds"]
        stages = " ".join(f"{seconds[s]:7.3f}" for s in ("pack", "vision", "trunk", "head", "backward"))
        print(f"{line['contender']:>14} {line['environment']['torch'].split('+')[0]:>7} {line['tokens']:>7} "
              f"{line['images']:>6} {line['flops']['total'] / 1e9:8.1f} {seconds['total']:8.3f} {stages} "
              f"{line['memory'] / 1e6:7.0f} {line.get('loss_diff', 0):8.1e} {line.get('grad_diff', 0):8.1e} "
              f"{line['time_ratio']:7.2f} {line['cpu_ratio']:7.2f} {line['flop_ratio']:7.2f}  {line['base']}")  # fmt: skip
        if "mfu" in line:
            print(" " * 15 + "MFU " + "  ".join(f"{s} {100 * v:.1f} %" for s, v in line["mfu"].items()))
        if "memory_parts" in line:
            print(" " * 15 + "GB  " + "  ".join(f"{s} {v / 1e9:.2f}" for s, v in line["memory_parts"].items()))


def whole_step(options) -> list[dict]:
    """Ours and TRL on the embedded default: natural lengths, then all completions forced to the same length."""
    lines = []
    for label, new_tokens, forced in (("natural", 100, 0), ("forced", 60, 60)):
        if options.quick:
            new_tokens, forced = 8, min(8, forced)
        flags = {"steps": 1 + options.repeats, "max_new_tokens": new_tokens, "min_new_tokens": forced}
        pythons = [("ours", sys.executable)]
        if options.trl_python:
            pythons += [("trl:ours", options.trl_python), ("trl", options.trl_python)]
        for name, python in pythons:
            with tempfile.TemporaryDirectory(prefix="step-") as folder:
                steps = (their_steps if name == "trl" else our_steps)(python, flags, Path(folder), options)[1:]
            middle = {key: statistics.median(s[key] for s in steps) for key in steps[0]}
            lines.append({"contender": name, "lengths": label, "flags": flags, "steps": len(steps), "git": revision(),
                          "threads": os.environ.get("OMP_NUM_THREADS"), **middle})  # fmt: skip
            rest = "  ".join(f"{k[8:]} {v:.3f}" for k, v in middle.items() if k.startswith("seconds/"))
            base = next(x for x in reversed(lines) if x["contender"] == ("trl:ours" if name == "trl" else name))
            print(f"{label:>8} {name:>9}  {middle['seconds']:7.3f} s a step ({rest}), {middle['completion_tokens']:.1f} "
                  f"tokens a completion, reward {middle['reward']:.3f}, {middle['seconds'] / base['seconds']:.2f} x of "
                  f"{base['contender']}", flush=True)  # fmt: skip
    return lines


def quietly(command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{' '.join(command[:2])} failed:\n{run.stderr[-2000:]}")


def our_steps(python: str, flags: dict, folder: Path, options) -> list[dict]:
    """Steps of train.py; its own clock. The first one is the warm-up."""
    command = [python, str(ROOT / "pr1/train.py"), "--task", "det", "--eval-every", "-1", "--save-every", "0",
               "--no-tensorboard", "--run-dir", str(folder / "run")]  # fmt: skip
    for name, value in flags.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    quietly(command)
    kept = ("seconds", "reward", "completion_tokens")
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k in kept or k.startswith("seconds/")} for line in lines if "lr" in line]


def their_steps(python: str, flags: dict, folder: Path, options) -> list[dict]:
    """Steps of TRL's GRPOTrainer with its own generation and the same reward function."""
    job = {"flags": flags, "micro": options.micro or 64, "result": str(folder / "result.json")}
    (folder / "job.json").write_text(json.dumps(job))
    quietly([python, str(ROOT / "bench/step_trl.py"), str(folder / "job.json")])
    lines = json.loads((folder / "result.json").read_text())
    return [
        {"seconds": s["seconds"], "reward": s["reward"], "completion_tokens": s["completion_tokens"],
         "seconds/rollout": s["rollout_seconds"], "seconds/reward": s["reward_seconds"],
         "seconds/update": s["seconds"] - s["rollout_seconds"] - s["reward_seconds"]} for s in lines
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="toy model and shape: does it run and agree?")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, metavar="NAME")
    parser.add_argument("--shapes", nargs="+", metavar="P,C,G", help=f"default {' '.join(SHAPES)}")
    parser.add_argument("--repeats", type=int, default=5, help="timed updates (whole steps) at most")
    parser.add_argument("--budget", type=float, default=20, help="seconds of timed updates a contender, one at least")
    parser.add_argument("--micro", type=int, help="rows a forward pass of padded and TRL (default G; whole steps: 64)")
    parser.add_argument("--trl-python", help="interpreter of TRL's environment (default: this one if it has trl)")
    parser.add_argument("--whole-step", action="store_true", help="rollout + reward + update on the embedded default")
    parser.add_argument("--out", default="step.jsonl", help="one JSON object a line")
    options = parser.parse_args()
    if options.trl_python is None and importlib.util.find_spec("trl"):
        options.trl_python = sys.executable
    if options.whole_step:
        lines = whole_step(options)
    else:
        gpu = subprocess.run([sys.executable, "-c", "import torch, sys; sys.exit(not torch.cuda.is_available())"])
        gpu = gpu.returncode == 0
        unwanted = set() if gpu else {"ours-full"}
        unwanted |= set() if options.trl_python else {name for name in CONTENDERS if name.startswith("trl")}
        options.contenders = options.contenders or [name for name in CONTENDERS if name not in unwanted]
        if missing := [c for c in options.contenders if c.startswith("trl") and not options.trl_python]:
            parser.error(f"{', '.join(missing)}: pass --trl-python, an interpreter that has trl (see --help)")
        lines = []
        for shape in options.shapes or (QUICK if options.quick else SHAPES):
            lines += run_shape([int(n) for n in shape.split(",")], options, gpu)
            show([line for line in lines if line["shape"] == lines[-1]["shape"]])
            Path(options.out).write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path(options.out).write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
