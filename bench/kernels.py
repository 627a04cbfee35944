"""Log-prob and GRPO-loss kernels against everyone else's: checked against float64, then timed, operation by operation.

    python bench/kernels.py [--quick] [--sizes N ...] [--only OPERATION ...] [--out FILE.jsonl]

On a GPU: H=2048, V=151,936, bf16, CUDA events, the L2 cache flushed before every run. On a CPU: small sizes, float32 -
enough to see that it runs and how memory goes, not what a GPU does. Contenders that are not installed or cannot run here
get a line saying why. The limit stands in the same table: a device copy, or the bare matrix products of the same shapes.
Exit status 1: an output of ours was further from float64 than twice eager PyTorch's, or a kernel was compiled again.
"""

import sys

sys.path[:] = [p for p in sys.path if not p.rstrip("/").endswith("/bench")]  # bench/ holds names like kernels.py

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler that counts a CPU's memory talks on every start
import torch

from pr1.environment import environment
from pr1.kernels import grpo_loss, linear_grpo_loss, linear_token_logprobs, token_logprobs

spec = importlib.util.spec_from_file_location("kernel_contenders", Path(__file__).with_name("kernel_contenders.py"))
peers = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peers)

PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "quack-kernels")
KEPT = ("pr1", "eager")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
ROUNDING = 4e-6  # two units in the last place of a float32 log-prob of 16 nats
FORMULA = {
    **{op: f"bytes = {k} N V {DTYPE.itemsize}, limit: device copy" for op, k in peers.PASSES.items()},
    **{op: f"FLOP = {k} x 2 N H V, limit: {k} bare matrix products" for op, k in peers.GEMMS.items()},
}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def timed(step, refresh=None, seconds=1.0, least=3, most=50) -> float:
    """Median milliseconds of a step, once warm; on a GPU by events, with a cold L2 cache."""
    for _ in range(2 if CUDA else 1):
        if refresh:
            refresh()
        step()
    flush = torch.empty(2**28, dtype=torch.uint8, device=DEVICE) if CUDA else None
    times, end = [], time.perf_counter() + seconds
    while len(times) < least or (time.perf_counter() < end and len(times) < most):
        if refresh:
            refresh()
        if CUDA:
            flush.zero_()
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            step()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last))
        else:
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def peak_mib(step, refresh=None) -> float:
    """MiB that a step takes at its peak beyond its inputs, its outputs included."""
    if refresh:
        refresh()
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / 2**20


def limits(p, seconds: float) -> dict:
    """Measured in this run: GB/s of a copy (bytes read and written), ms of 1, 2 and 3 matrix products of p's shapes."""
    source = torch.empty(2**30 if CUDA else 2**25, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), seconds=seconds)
    x, w, z = p.hidden, p.weight, p.logits
    dz, dx, dw = torch.empty_like(z), torch.empty_like(x), torch.empty_like(w)

    def products(k):
        torch.mm(x, w.T, out=dz)
        if k > 1:
            torch.mm(z, w, out=dx)
        if k > 2:
            torch.mm(z.T, x, out=dw)

    return {"copy_gbps": 2 * source.numel() / copy / 1e6,
            "gemm_ms": {k: timed(lambda k=k: products(k), seconds=seconds) for k in (1, 2, 3)}}  # fmt: skip


def errors(outputs: dict, truth: dict) -> dict:
    """Largest error of each output; of gradients relative to the largest true entry, of the rest absolute (nats)."""
    found = {}
    for name, value in outputs.items():
        scale = truth[name].abs().max().item() if name.startswith("d") else 1.0
        found[name] = (value.detach().double().reshape(truth[name].shape) - truth[name]).abs().max().item() / scale
    return found


def attempt(fn):
    """(result, None), or (None, why not): a peer may be missing, may not run on this device, may not fit."""
    try:
        return fn(), None
    except ImportError as e:
        return None, f"missing: {e}"
    except Exception as e:  # whatever a peer raises is a line of the table; what ours raises is a failure
        text = " ".join(str(e).split())[:120]
        return None, "needs a GPU (Triton)" if "0 active drivers" in text else f"{type(e).__name__}: {text}"
    finally:
        if CUDA:
            gc.collect()
            torch.cuda.empty_cache()


def check(p, listed) -> tuple[dict, list]:
    """({(operation, name): errors or why not}, our failures)."""
    found, failures, truths = {}, [], {}
    for operation, name, kind, build in listed:
        key = (kind, operation.startswith("logits"))
        if key not in truths:
            truths.clear()  # one at a time: each holds several N x V float64
            truths[key] = p.truth(*key)

        def once(build=build, truth=truths[key]):
            step, refresh = build(p)
            if refresh:
                refresh()
            return errors(step(), truth)

        result, why = attempt(once)
        found[operation, name] = why or result
    for (operation, name), result in found.items():
        if name.startswith("pr1"):
            eager = found[operation, "eager"]
            failures += [f"{operation}, {name}: {result}"] if isinstance(result, str) else [
                f"{operation}, {name}: {output} is off by {error:.2e}, eager PyTorch by {eager[output]:.2e}"
                for output, error in result.items() if not error <= 2 * eager[output] + ROUNDING]  # fmt: skip
    return found, failures


def measure(p, listed, checked, seconds: float, limit: dict) -> list[dict]:
    """One record for each contender at the size of p."""
    records = []
    for operation, name, _, build in listed:
        record = {"operation": operation, "contender": name, "n": p.n, "h": p.h, "v": p.v, "status": "ok"}
        records.append(record)
        if isinstance(checked[operation, name], str):
            record["status"] = checked[operation, name]
            continue
        record["error"] = checked[operation, name]

        def run(build=build):
            step, refresh = build(p)
            return timed(step, refresh, seconds), peak_mib(step, refresh)

        found, why = attempt(run)
        if why:
            record["status"] = why
            continue
        ms, mib = found
        record.update(ms=ms, peak_mib=mib)
        if operation in peers.PASSES:
            bound = peers.PASSES[operation] * p.n * p.v * DTYPE.itemsize / limit["copy_gbps"] / 1e6
            record["gbps"] = peers.PASSES[operation] * p.n * p.v * DTYPE.itemsize / ms / 1e6
        else:
            bound = limit["gemm_ms"][peers.GEMMS[operation]]
            record["tflops"] = peers.GEMMS[operation] * 2 * p.n * p.h * p.v / ms / 1e9
        record["limit_percent"] = 100 * bound / ms
    return records


def save(out: str, records: list[dict]) -> None:
    sys.stdout.flush()
    Path(out).write_text("".join(json.dumps(r) + "\n" for r in records))


def show(records: list[dict]) -> None:
    for operation in dict.fromkeys(r["operation"] for r in records):
        mine = [r for r in records if r["operation"] == operation]
        ours = next((r["ms"] for r in mine if r["contender"] == "pr1" and "ms" in r), None)
        print(f"\n{peers.OPERATIONS[operation]}, N={mine[0]['n']} ({FORMULA[operation]})")
        print(f"  {'':<24}{'ms':>10}{'rate':>16}{'of limit':>10}{'peak MiB':>10}{'max error':>11}{'/ pr1':>8}")
        for r in sorted(mine, key=lambda r: r.get("ms", float("inf"))):
            if "ms" not in r:
                print(f"  {r['contender']:<24}{r['status']}")
                continue
            rate = f"{r['gbps']:.1f} GB/s" if "gbps" in r else f"{r['tflops']:.3g} TFLOP/s"
            ratio = f"{r['ms'] / ours:.2f}" if ours else ""
            print(f"  {r['contender']:<24}{r['ms']:>10.3f}{rate:>16}{r['limit_percent']:>9.0f}%{r['peak_mib']:>10.1f}"
                  f"{max(r['error'].values()):>11.1e}{ratio:>8}")  # fmt: skip


def summary(records: list[dict]) -> None:
    """Ours against the fastest other that computes the same, one line for each operation and size."""
    print(f"\n  {'':<22}{'N':>6}{'pr1 ms':>10}{'of limit':>10}{'peak MiB':>10}   fastest other")
    for ours in records:
        if ours.get("contender") != "pr1" or "ms" not in ours:
            continue
        others = [r for r in records if (r.get("operation"), r.get("n")) == (ours["operation"], ours["n"]) and "ms" in r
                  and not r["contender"].startswith("pr1") and not r["contender"].endswith(")")]  # fmt: skip
        best = min(others, key=lambda r: r["ms"], default=None)
        told = (
            f"{best['contender']}: {best['ms'] / ours['ms']:.2f} x the time, {best['peak_mib']:.1f} MiB" if best else ""
        )
        print(f"  {ours['operation']:<22}{ours['n']:>6}{ours['ms']:>10.3f}{ours['limit_percent']:>9.0f}%"
              f"{ours['peak_mib']:>10.1f}   {told}")  # fmt: skip


def watch_compiler() -> list:
    """Grows by the name of each Triton kernel of ours that is compiled from now on. Stays empty on a CPU."""
    seen = []
    if CUDA:
        from triton import knobs

        knobs.runtime.jit_post_compile_hook = lambda *_, fn, **__: seen.extend(
            [fn.name] if fn.module.startswith("pr1.kernels") else []
        )
    return seen


def run_ours(n: int, h: int, v: int, value: float) -> None:
    """Every operation of ours once, `value` standing for temperature and coefficients."""
    p = peers.Problem(n, h, v, DTYPE, DEVICE, 20.0)
    objective = peers.Objective(rollout_cap=0.0, entropy_coef=value, temperature=value)
    for in_place in (False, True):
        sum(token_logprobs(p.logits.clone().requires_grad_(), p.tokens, value, in_place=in_place)).sum().backward()
        grpo_loss(p.logits.clone().requires_grad_(), p.rows, objective, in_place=in_place)[0].backward()
        hidden, weight = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_(in_place)
        linear_grpo_loss(hidden, weight, p.rows, objective)[0].backward()
    with torch.no_grad():
        linear_token_logprobs(p.hidden, p.weight, p.tokens, value)
        token_logprobs(p.logits, p.tokens, value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="one small size, short timings, no torch.compile")
    parser.add_argument(
        "--sizes", type=int, nargs="+", help="rows, multiples of 8 (2048 8192 32768; on a CPU 256 1024)"
    )
    parser.add_argument("--only", nargs="+", choices=peers.OPERATIONS, default=list(peers.OPERATIONS))
    parser.add_argument("--without", nargs="+", default=[], help="leave out contenders whose names begin so")
    parser.add_argument(
        "--sharpness", type=float, default=20.0, help="length of the hidden states; more is more peaked"
    )
    parser.add_argument("--out", default="kernels.jsonl", help="one JSON object a line")
    options = parser.parse_args()
    sizes, h, v = ([2048, 8192, 32768], 2048, 151_936) if CUDA else ([256, 1024], 256, 16_384)
    if options.quick:
        sizes, h, v = ([2048], h, v) if CUDA else ([64], 64, 2048)
    sizes, seconds = (
        options.sizes or sizes,
        (0.2 if options.quick else 0.5) if CUDA else (0.05 if options.quick else 2.0),
    )
    if any(n < 8 or n % peers.SEQUENCES for n in sizes):
        parser.error(f"--sizes {sizes}: multiples of {peers.SEQUENCES} are needed")
    left_out = tuple(options.without)
    listed = [c for c in peers.contenders() if c[0] in options.only and (c[1] in KEPT or not c[1].startswith(left_out))]
    if options.quick:
        listed = [c for c in listed if c[1] != "torch.compile"]

    compiled = watch_compiler()
    run_ours(64, h, v, 1.0)
    first = len(compiled)
    for i, n in enumerate((8, 16, 24, 136, 1000)):
        run_ours(n, h, v, 1.0 + 0.1 * i)
    p = peers.Problem(min(512, min(sizes)), h, v, DTYPE, DEVICE, options.sharpness)
    logp, entropy = (x.mean().item() for x in peers.eager(p.logits, p.tokens))
    header = {"benchmark": "kernels", "device": DEVICE, "dtype": str(DTYPE), "h": h, "v": v, "sharpness":
              options.sharpness, "mean_logp": logp, "mean_entropy": entropy, "kept_tiles": p.kept_tiles(),
              "threads": torch.get_num_threads(), "formula": FORMULA, "environment": environment(),
              "peers": {name: version(name) for name in PEERS}}  # fmt: skip
    print(f"{header['environment']['device']}, torch {torch.__version__}, {DTYPE}, H={h}, V={v}"
          + ("" if CUDA else f" - a CPU ({torch.get_num_threads()} threads): small sizes, our plain PyTorch path"))  # fmt: skip
    print(f"inputs: sharpness {options.sharpness:g}, mean log-prob {logp:.3f}, mean entropy {entropy:.3f} nats; "
          f"{100 * header['kept_tiles']:.0f} % of the 128 x 128 tiles have a |p - onehot| above 2^-12", flush=True)  # fmt: skip
    checked, failures = check(p, listed)
    records = [header]
    for n in sizes:
        p = peers.Problem(n, h, v, DTYPE, DEVICE, options.sharpness)
        limit, why = attempt(lambda p=p: limits(p, seconds))
        if why:
            raise SystemExit(f"N={n} does not fit this device: {why}")
        records.append({"operation": "limit", "n": n, "h": h, "v": v, **limit})
        print(f"\nN={n}: device copy {limit['copy_gbps']:.0f} GB/s; bare matrix products "
              + ", ".join(f"{k}: {ms:.3f} ms = {k * 2 * n * h * v / ms / 1e9:.3g} TFLOP/s"
                          for k, ms in limit["gemm_ms"].items()))  # fmt: skip
        done = measure(p, listed, checked, seconds, limit)
        records += done
        show(done)
        save(options.out, records)
    later = compiled[first:]
    records.append({"operation": "compiled", "contender": "pr1", "first": first, "later": len(later)})
    print(f"\nkernels compiled: {first} at the first size, {len(later)} more at {5 + len(sizes)} others"
          + ("" if CUDA else " (on a CPU none are)"))  # fmt: skip
    if later:
        failures.append(f"compiled again when N or a coefficient changed: {', '.join(sorted(set(later)))}")
    save(options.out, records)
    summary(records)
    for failure in failures:
        print(f"CHECK FAILED: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
