"""The contenders of bench/step.py, each in a process of its own: same model and rollouts from seeds, check, then time.

    python bench/step_contenders.py JOBS.json

Started by step.py with the interpreter of an environment: imports once, then forks for each job, so that peak memory is
one contender's own. A job writes its result to job["result"]; the first of a shape is what the others are checked with.
"""

import sys

sys.path[:] = [p for p in sys.path if not p.rstrip("/").endswith("/bench")]  # bench/ holds names like kernels.py

import contextlib
import json
import os
import runpy
import statistics
import tempfile
import time
import traceback
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from pr1.config import config_from
from pr1.kernels import Objective, linear_grpo_loss, linear_token_logprobs
from pr1.optim import Optimizer
from pr1.packing import Normaliser, count, pack, to_device
from pr1.policy import FeatureCache, Policy

PACK_TOKENS = 16384
PROBLEM = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("step_problem.py"))))
KEEP = 4 << 30  # bytes of image features
STAGES = ("pack", "vision", "trunk", "head", "backward")


class Stages:
    """Seconds by stage: what has passed since the last mark belongs to the stage named."""

    def __init__(self, device):
        self.sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.seconds: dict[str, float] = {}

    def start(self) -> None:
        self.sync()
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.last = time.perf_counter()

    def mark(self, stage: str) -> None:
        self.sync()
        now = time.perf_counter()
        self.seconds[stage] += now - self.last
        self.last = now

    def watch(self, model) -> None:
        """Splits every forward pass of a transformers model into vision and trunk, whoever calls it."""
        model.model.visual.register_forward_pre_hook(lambda *_: self.mark("trunk"))
        model.model.visual.register_forward_hook(lambda *_: self.mark("vision"))
        model.model.language_model.register_forward_hook(lambda *_: self.mark("trunk"))


class Ours:
    """The trainer's own update: packs, cached features of a frozen tower, hidden states, fused loss."""

    def __init__(self, model, family, rollouts, advantages, job, stages):
        trained = job["train_vision"]
        self.policy = Policy(family, model, device_of(model), train_vision=trained, cache=FeatureCache(KEEP))
        self.rollouts, self.advantages, self.stages, self.cold = rollouts, advantages, stages, job["cold"]
        self.share = job["share"]
        self.normaliser = Normaliser("token-mean", *count(rollouts), job["shape"][1])
        self.objective = Objective(clip_low=job["clip"][0], clip_high=job["clip"][1])
        # half precision: float32 gradients, as the trainer accumulates them; on a CPU parameters are float32 anyway
        half = next(model.parameters()).dtype != torch.float32
        self.optimizer = Optimizer(self.policy, config_from({"task": "det"})) if half or job["full"] else None
        self.step = job["full"]

    def packs(self) -> list:
        packs = pack(self.rollouts, self.advantages, PACK_TOKENS, self.normaliser, drop_flat=True,
                     share_prefix=self.share)  # fmt: skip
        packs = [to_device(p, self.policy.device) for p in packs]
        return [replace(p, rows=replace(p.rows, logp_start=p.rows.logp_rollout)) for p in packs]

    def update(self) -> float:
        if self.cold:
            self.policy.cache = FeatureCache(KEEP)
        packs, total = self.packs(), 0.0
        self.stages.mark("pack")
        for p in packs:
            with self.policy.head() as weight:
                loss, _ = linear_grpo_loss(self.policy.hidden(p), weight, p.rows, self.objective)
                self.stages.mark("head")
                loss.backward()
            self.stages.mark("backward")
            total += loss.detach()
        return float(total)

    def gradients(self, model) -> dict:
        named = zip(self.optimizer.names, self.optimizer.masters) if self.optimizer else model.named_parameters()
        return {name: p.grad for name, p in named if p.grad is not None}

    def end(self, model) -> None:
        if self.step:
            self.optimizer.step(0)
        elif self.optimizer:
            self.optimizer.zero()
        model.zero_grad(set_to_none=True)


class Padded:
    """The transformers way, built well: every completion with its own prompt and image, right-padded, SDPA, logits of
    completion rows only, no checkpointing. The last token, which predicts nothing, is not run. `micro` rows a pass."""

    def __init__(self, model, family, rollouts, advantages, job, stages):
        model.model.visual.requires_grad_(job["train_vision"])
        self.model, self.stages, self.completion, self.clip = model, stages, job["shape"][1], job["clip"]
        self.tokens = sum(len(r.completion_ids) for r in rollouts)
        device, self.batches = device_of(model), []
        for at in range(0, len(rollouts), job["micro"]):
            rows = rollouts[at : at + job["micro"]]
            ids = torch.stack([torch.cat([r.prompt_ids, r.completion_ids[:-1]]) for r in rows])
            inputs = {
                "input_ids": ids, "attention_mask": torch.ones_like(ids),
                "mm_token_type_ids": (ids == family.image_token_id).int(),
                "pixel_values": torch.cat([i.pixels for r in rows for i in r.inputs.images]),
                "image_grid_thw": torch.tensor([i.grid for r in rows for i in r.inputs.images]),
            }  # fmt: skip
            advantage = torch.tensor(advantages.reshape(-1)[at : at + job["micro"], None], dtype=torch.float32)
            rest = (
                torch.stack([r.completion_ids for r in rows]),
                torch.stack([r.logp_rollout for r in rows]),
                advantage,
            )
            self.batches.append(({k: v.to(device) for k, v in inputs.items()}, [x.to(device) for x in rest]))

    def update(self) -> float:
        total = 0.0
        for inputs, (tokens, old, advantage) in self.batches:
            logits = self.model(**inputs, logits_to_keep=self.completion, use_cache=False).logits  # (B, C, V)
            logp = torch.log_softmax(logits.float(), -1).gather(2, tokens[..., None])[..., 0]
            ratio = torch.exp(logp - old)
            clipped = ratio.clamp(1 - self.clip[0], 1 + self.clip[1])
            loss = -torch.min(ratio * advantage, clipped * advantage).sum() / self.tokens
            self.stages.mark("head")
            del logits, logp
            loss.backward()
            self.stages.mark("backward")
            total += loss.detach()
        return float(total)

    def gradients(self, model) -> dict:
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def end(self, model) -> None:
        model.zero_grad(set_to_none=True)


def device_of(model) -> torch.device:
    return next(model.parameters()).device


def prepare(model, family, rollouts, job) -> None:
    """Writes log-probs of every completion, with noise, as those before the update."""
    noise = torch.Generator().manual_seed(2)
    contender = Ours(model, family, rollouts, np.ones(len(rollouts)), job, Stages(device_of(model)))
    values = {}
    with torch.no_grad():
        for p in contender.packs():
            hidden, weight = contender.policy.hidden(p), model.lm_head.weight
            logp = linear_token_logprobs(hidden, weight, p.rows.tokens)[0].float().cpu()
            for tokens, part in zip(p.rows.tokens.cpu().split(job["shape"][1]), logp.split(job["shape"][1])):
                values[tuple(tokens.tolist())] = part  # packs may hold the completions in any order
    old = [values[tuple(r.completion_ids.tolist())] for r in rollouts]
    # far from the clip bounds at log .8 and log 1.28, which rounding in bfloat16 would make tokens cross
    steps = torch.tensor([-0.4, -0.1, 0.1, 0.4])
    torch.save([x + steps[torch.randint(4, x.shape, generator=noise)] for x in old], job["old"])


def numbers(model) -> dict:
    """What step.py counts FLOPs from: weights of matrices, and the sizes attention depends on."""
    text, tower = model.model.language_model, model.model.visual

    def linear(*modules):
        return sum(w.numel() for module in modules for w in module.parameters() if w.ndim > 1)

    return {
        "trunk": linear(text.layers), "layers": len(text.layers), "width": text.layers[0].self_attn.o_proj.in_features,
        "head": model.lm_head.weight.numel(), "patch": linear(tower.blocks, tower.patch_embed),
        "merger": linear(tower.merger), "tower_layers": len(tower.blocks), "tower_width": tower.config.hidden_size,
        "tower_full": len(tower.config.fullatt_block_indexes),
        "window": tower.config.window_size // tower.config.patch_size,
        "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip


def digest(gradients: dict) -> dict:
    """name -> (norm, product with a fixed random tensor): what is compared between processes."""
    out = {}
    for i, (name, grad) in enumerate(sorted(gradients.items())):
        grad = grad.detach().float()
        probe = torch.randn(grad.shape, generator=torch.Generator(grad.device).manual_seed(i), device=grad.device)
        out[name] = (float(grad.norm()), float((grad * probe).sum()))
    return out


def difference(mine: dict, other: dict) -> float:
    """|mine - other| / |other| over all entries of two digests; inf when the parameters differ."""
    if set(mine) != set(other):
        return float("inf")
    a, b = (np.array([d[name] for name in sorted(mine)]) for d in (mine, other))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def parts(contender, model) -> dict:
    """Bytes held between updates of a full fine-tuning: what is left of the peak is activations and head."""

    def size(tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    optimizer, cache = contender.optimizer, contender.policy.cache
    masters = [m for p, m in zip(optimizer.params, optimizer.masters) if m is not p]
    moments = [t for state in optimizer.adam.state.values() for name, t in state.items() if name != "step"]
    gradients = 4 * sum(m.numel() for m in optimizer.masters)
    return {"weights": size(model.parameters()), "float32 masters": size(masters), "moments": size(moments),
            "float32 gradients": gradients, "image features": cache.used}  # fmt: skip


class Memory:
    """Peak bytes since the reset, beyond what was held then (weights and inputs)."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the high-water mark starts anew
            self.before = self._resident("VmRSS")

    @staticmethod
    def _resident(field: str) -> int:
        line = next(line for line in open("/proc/self/status") if line.startswith(field))
        return int(line.split()[1]) * 1024

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else self._resident("VmHWM")


def check(job: dict, loss: float, gradients: dict) -> dict:
    """Loss, gradients and their relative differences from the first contender; SystemExit when they are too large."""
    result = {"loss": loss, "grad_norm": sum(n * n for n, _ in gradients.values()) ** 0.5, "digest": gradients}
    if job["expect"] == job["result"]:
        return result
    expect = json.loads(Path(job["expect"]).read_text())
    result["loss_diff"] = abs(loss - expect["loss"]) / abs(expect["loss"])
    result["grad_diff"] = difference(gradients, expect["digest"])
    if not max(result["loss_diff"], result["grad_diff"]) <= job["tolerance"]:
        raise SystemExit(f"{job['name']} disagrees: loss {loss} for {expect['loss']}, gradients by "
                         f"{result['grad_diff']:.1e} (allowed {job['tolerance']:.0e})")  # fmt: skip
    return result


def environment(device) -> dict:
    found = {"python": sys.version.split()[0], "threads": torch.get_num_threads()}
    for name in ("torch", "transformers", "trl"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found | {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}


def run(job: dict) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        family, config = PROBLEM.build_family(job["size"], folder)
    model = PROBLEM.build_model(config, device, dtype)
    rollouts, advantages = PROBLEM.make_rollouts(job, family)
    if job["contender"] == "prepare":
        return prepare(model, family, rollouts, job)
    trl = runpy.run_path(str(Path(__file__).with_name("step_trl.py")))["Trl"] if job["contender"] == "trl" else None
    stages = Stages(device)
    kind = {"ours": Ours, "padded": Padded, "trl": trl}[job["contender"]]
    contender = kind(model, family, rollouts, advantages, job, stages)
    stages.watch(model)
    memory, runs, cpu, result, spent = Memory(device), [], [], {}, 0.0
    # The first update fills the feature cache and warms up the allocator; it is checked, not timed.
    while len(runs) < 2 or (len(runs) <= job["repeats"] and spent < job["budget"]):
        begun = time.process_time()
        stages.start()
        loss = contender.update()
        runs.append(stages.seconds)
        cpu.append(time.process_time() - begun)
        if len(runs) == 1:
            result = check(job, loss, digest(contender.gradients(model)))
        else:
            spent += sum(stages.seconds.values())
        contender.end(model)
    totals = [sum(r.values()) for r in runs[1:]]
    seconds = {stage: statistics.median(r[stage] for r in runs[1:]) for stage in runs[0]}
    result |= {
        "seconds": {**seconds, "total": statistics.median(totals)}, "all_seconds": totals,
        "cpu_seconds": statistics.median(cpu[1:]),
        "memory": memory.peak() - memory.before, "memory_peak": memory.peak(), "numbers": numbers(model),
        "environment": environment(device),
    }  # fmt: skip
    if job["full"]:
        result["memory_parts"] = parts(contender, model)
        result["memory_parts"]["rest of the peak"] = memory.peak() - sum(result["memory_parts"].values())
    Path(job["result"]).write_text(json.dumps(result))


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    if any(job["contender"] == "trl" for job in jobs):
        import trl.trainer.grpo_trainer  # noqa: F401  once, before the forks
    for job in jobs:
        child = os.fork()  # nothing has been computed yet: no threads, no CUDA context
        if not child:
            status = 1
            try:
                run(job)
                status = 0
            except SystemExit as error:
                print(error, file=sys.stderr)
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(status)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"{job['name']} failed")


if __name__ == "__main__":
    main()
