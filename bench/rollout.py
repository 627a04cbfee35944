"""Rollouts against transformers' `generate(num_return_sequences=G)`: prefill, decode, tokens a second, peak memory.

    python bench/rollout.py [--quick] [--only CASE ...] [--repeats N] [--out FILE.jsonl]

Every contender runs in a process of its own; medians. All completions have the same length (stops are forbidden), the
same prompts, weights, dtype and temperature 1; transformers runs with sdpa and its DynamicCache. First, greedy answers
of both are compared token by token. On a CPU, float32: the embedded policy on rendered scenes, and a random one of 41 M
parameters at the full P=1500, C=100, G=8, scaled down by taking 2 prompts instead of 16 (its vision tower is a toy: the
prefill is the language model's). On a GPU, bf16: the shape of Qwen2.5-VL-3B with random weights, P=1500, C=100.

The prefill ends as the first new tokens are to be drawn, or just were; ms/step is the rest over C - 1. The limit of a
decoding step is (weights + keys and values, each prompt read once per group) / bandwidth of a device copy, measured in
the run; on a CPU the products of the weights with the rows bound it instead, and no limit is given. Peak memory is what
a run needs above the loaded model. transformers' continuous batching (`generate_batch`) takes token ids only, no images,
and cannot run this.
"""

import sys

sys.path[:] = [p for p in sys.path if not p.rstrip("/").endswith("/bench")]  # bench/ holds names like kernels.py

import argparse
import json
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from pr1.engine import Engine
from pr1.environment import environment
from pr1.families import load_family
from pr1.kernels import Sampling
from pr1.policy import FeatureCache, Policy
from pr1.records import Sample
from pr1.rollout import generate

ROOT = Path(__file__).resolve().parents[1]
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
BIG = {"hidden": 2048, "layers": 36, "heads": 16, "kv_heads": 2}
# case -> prompts, G, C, image sides (none: rendered scenes), shape of the model (none: the embedded one)
CPU_CASES = {"embedded": (16, 8, 50, None, None),
             "41M": (2, 8, 100, 1064, {"hidden": 640, "layers": 12, "heads": 10, "kv_heads": 2}),
             "104M": (2, 8, 100, 1064, {"hidden": 1024, "layers": 12, "heads": 16, "kv_heads": 2})}  # fmt: skip
QUICK_CASES = {"embedded": (4, 4, 12, None, None),
               "tiny": (2, 8, 12, 560, {"hidden": 128, "layers": 2, "heads": 4, "kv_heads": 2})}  # fmt: skip
GPU_CASES = {f"3B batch {b} G {g}": (b // g, g, 100, 1064, BIG) for b in (64, 128, 256) for g in (8, 16)}


def cases(quick: bool) -> dict:
    return QUICK_CASES if quick else GPU_CASES if CUDA else CPU_CASES


def make_model(folder: Path, shape: dict) -> None:
    """A random Qwen2.5-VL of this shape in `folder`, its answers no mere repetition; the 3B shape takes the published
    widths and vocabulary."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny_models as tiny

    tokenizer = tiny.make_tokenizer("qwen2_5_vl")
    config = tiny.make_config("qwen2_5_vl", tokenizer, tied=True, **shape)
    if shape is BIG:
        config.text_config.intermediate_size, config.text_config.vocab_size = 11008, 151_936
    with DEVICE:
        model = tiny.Qwen2_5_VLForConditionalGeneration(config).to(DTYPE)
    tiny.scale_weights(model, 0, 2.2)
    model.lm_head.weight.data /= 4  # tied: a louder embedding would make the last token the next one
    model.save_pretrained(folder)
    del model
    if CUDA:
        torch.cuda.empty_cache()
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(tiny.PREPROCESSOR))


def problem(name: str, quick: bool, folder: str):
    """(policy, samples, prompts, G, C) of a case."""
    count, group, new, side, shape = cases(quick)[name]
    family = load_family(folder if shape else str(ROOT / "pr1" / "assets" / "tiny-qwen2.5-vl"))
    if side is None:
        from pr1.data.scenes import SceneDataset, SceneOptions

        images = [record.load() for record in SceneDataset("val", count, SceneOptions.at(0.25))]
    else:
        from PIL import Image

        images = [Image.effect_noise((side, side), 30 + i).convert("RGB") for i in range(count)]
    text = {"type": "text", "text": "Output the bounding box of the cat in the image."}
    samples = [Sample(str(i), "det", [{"role": "user", "content": [{"type": "image"}, text]}], (image,),
                      (family.frame(*image.size),), None) for i, image in enumerate(images)]  # fmt: skip
    policy = Policy(family, family.load_model(DTYPE), DEVICE, train_vision=False, cache=FeatureCache(0))
    return policy, samples, [family.encode(sample) for sample in samples], group, new


def ours(policy, samples, prompts, group, new, temperature=1.0):
    sampling = Sampling(temperature=temperature, min_new_tokens=new, max_new_tokens=new)
    return generate(policy, samples, group, sampling, seed=0, step=0, prompts=prompts)


@torch.no_grad()
def theirs(policy, samples, prompts, group, new, temperature=1.0):
    """transformers' generate on its own attention; prompts padded on the left."""
    model, family = policy.model, policy.family
    longest = max(len(p.ids) for p in prompts)
    ids = torch.full((len(prompts), longest), family.stop_ids[-1])
    for row, prompt in zip(ids, prompts):
        row[longest - len(prompt.ids) :] = prompt.ids
    mask = torch.tensor([[i >= longest - len(p.ids) for i in range(longest)] for p in prompts]).long()
    images = [image for p in prompts for image in p.images]
    how = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else dict(do_sample=False)
    model.model.rope_deltas = None
    out = model.generate(
        input_ids=ids.to(DEVICE), attention_mask=mask.to(DEVICE), num_return_sequences=group, min_new_tokens=new,
        max_new_tokens=new, pixel_values=torch.cat([i.pixels for i in images]).to(DEVICE, DTYPE),
        image_grid_thw=torch.tensor([i.grid for i in images]).to(DEVICE), eos_token_id=list(family.stop_ids),
        mm_token_type_ids=((ids == family.image_token_id) & (mask == 1)).int().to(DEVICE),
        suppress_tokens=family.banned_ids(policy.vocab_size).nonzero()[:, 0].tolist(),
        pad_token_id=family.stop_ids[-1], logits_processor=LogitsProcessorList([WATCH]), **how,
    )  # fmt: skip
    return out[:, longest:]


class Watch(LogitsProcessor):
    """Seconds of a call, and until its first logits: of `generate` as the processor of all logits, of our engine as what
    precedes a decoding step."""

    first = 0.0  # None: yet to come

    def __call__(self, ids=None, scores=None):
        if self.first is None:
            self.first = self.now() - self.start
        return scores

    @staticmethod
    def now() -> float:
        if CUDA:
            torch.cuda.synchronize()
        return time.perf_counter()

    def time(self, fn, *args) -> tuple[float, float]:
        self.first, self.start = None, self.now()
        fn(*args)
        return self.now() - self.start, self.first


WATCH, step = Watch(), Engine._step


def watched(engine) -> None:
    WATCH()
    step(engine)


Engine._step = watched


def memory(peak: bool) -> int:
    """Bytes in use, or at most since `child` began to count."""
    if CUDA:
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    kb = re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+)", Path("/proc/self/status").read_text())[1]
    return int(kb) * 1024


def child(name: str, contender: str, quick: bool, folder: str, repeats: int) -> dict:
    """One contender's measurements."""
    policy, samples, prompts, group, new = problem(name, quick, folder)
    if contender == "generate":
        policy.text.config._attn_implementation = policy.visual.config._attn_implementation = "sdpa"
    run = ours if contender == "ours" else theirs
    answers = run(policy, samples, prompts, 1, min(new, 16), 0.0)
    answers = [a.completion_ids.tolist() for a in answers] if contender == "ours" else answers.tolist()
    policy.engine = None
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = memory(False)
    run(policy, samples, prompts, group, new if CUDA else 2)  # warms up
    times = [WATCH.time(run, policy, samples, prompts, group, new) for _ in range(repeats)]
    peak = memory(True) - before
    seconds, prefill = map(statistics.median, zip(*times))
    rows = len(prompts) * group
    weights = sum(p.nbytes for p in policy.text.parameters())
    c = policy.text.config
    token = 2 * c.num_hidden_layers * c.num_key_value_heads * (c.hidden_size // c.num_attention_heads) * DTYPE.itemsize
    return {"case": name, "contender": contender, "prompts": len(prompts), "G": group, "C": new,
            "P": max(len(p.ids) for p in prompts), "seconds": seconds, "prefill": prefill,
            "ms_per_step": 1e3 * (seconds - prefill) / (new - 1), "tokens_per_second": rows * new / seconds,
            "peak_mb": peak / 2**20, "answers": answers,
            "step_bytes": weights + token * (sum(len(p.ids) for p in prompts) + rows * new / 2)}  # fmt: skip


def bandwidth() -> float:
    """Bytes a second of a device copy, read and write counted."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.nbytes / statistics.median(WATCH.time(y.copy_, x)[0] for _ in range(9))


def spawn(name: str, contender: str, options, folder: str) -> dict:
    command = [sys.executable, __file__, "--child", name, contender, folder, "--repeats", str(options.repeats)]
    done = subprocess.run(command + ["--quick"] * options.quick, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}, {contender}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument("--only", nargs="+", help="cases")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", default="rollout.jsonl", help="one JSON object a case and contender")
    parser.add_argument("--child", nargs=3, metavar=("CASE", "CONTENDER", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, contender, folder = options.child
        print(json.dumps(child(name, contender, options.quick, folder, options.repeats)))
        return 0
    here, results, copies = environment(), [], bandwidth() if CUDA else None
    models = tempfile.TemporaryDirectory(prefix="rollout-")
    print("| case | contender | prefill s | ms/step | of limit | tokens/s | peak MB | against generate |\n"
          "|---|---|--:|--:|--:|--:|--:|--:|")  # fmt: skip
    for name in options.only or cases(options.quick):
        shape = cases(options.quick)[name][4]
        folder = Path(models.name, "-".join(map(str, shape.values())) if shape else "none")
        if shape and not folder.exists():  # once for all cases of a shape
            make_model(folder, shape)
        pair = {contender: spawn(name, contender, options, str(folder)) for contender in ("generate", "ours")}
        answers = [pair[c].pop("answers") for c in ("generate", "ours")]
        same = sum(a == b for a, b in zip(*answers)) / len(answers[0])
        if not (CUDA or options.quick) and len({token for answer in answers[0] for token in answer}) < 3:
            raise SystemExit(f"{name}: greedy answers that show nothing: {answers}")
        if same < 1 and not CUDA:
            raise SystemExit(f"{name}: the greedy answers differ: {answers}")
        for contender, r in pair.items():
            r["same_greedy_answers"], r["environment"] = same, here
            r["against_generate"] = pair["generate"]["seconds"] / r["seconds"]
            r["of_limit"] = r.pop("step_bytes") / copies / r["ms_per_step"] * 1e3 if CUDA else None
            limit = f"{100 * r['of_limit']:.0f} %" if CUDA else "-"
            print(f"| {name} | {contender} | {r['prefill']:.3f} | {r['ms_per_step']:.2f} | {limit} | "
                  f"{r['tokens_per_second']:.0f} | {r['peak_mb']:.0f} | {r['against_generate']:.2f}x |", flush=True)  # fmt: skip
            results.append(r)
        Path(options.out).write_text("".join(json.dumps(r) + "\n" for r in results))
    print("transformers' generate_batch (continuous batching): takes token ids only, no images; not run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
