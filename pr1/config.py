"""The configuration: one dataclass, its command line and its recipes.

Precedence, lowest first: the defaults below, the recipe, those of `--loss`, `--config FILE.yaml`, the flags given.
Unknown and abbreviated flags are fatal. `parse_config` raises ValueError naming the flag; the entry points print it
without a traceback.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import types
import typing
from dataclasses import dataclass

import yaml


def option(default, section: str, help: str, choices: tuple | None = None):
    return dataclasses.field(default=default, metadata={"section": section, "help": help, "choices": choices})


@dataclass(frozen=True)
class Config:
    # run
    task: str = option("", "run", "what to learn: det, ground, count, ocr, or a file of your own that defines TASK")
    recipe: str = option(
        "default",
        "run",
        "default or paper (Perception-R1's); without --model the embedded recipe",
        ("default", "paper", "embedded"),
    )
    run_dir: str | None = option(None, "run", "folder of the run (default runs/TASK-TIME)")
    steps: int = option(500, "run", "optimizer steps (with several updates per batch: rollout batches)")
    seed: int = option(0, "run", "seed of prompt order and of every sampled token")
    resume: bool = option(False, "run", "continue --run-dir from its newest checkpoint")
    deterministic: bool = option(False, "run", "deterministic kernels on a GPU (slower); a CPU always is")
    # model
    model: str | None = option(None, "model", "Qwen2-VL or Qwen2.5-VL folder or hub id; none: the embedded tiny policy")
    max_pixels: int = option(1_000_000, "model", "images are shrunk to at most this many pixels")
    min_pixels: int = option(3136, "model", "images are enlarged to at least this many pixels")
    max_prompt_tokens: int = option(2048, "model", "longer prompts are an error before training starts")
    train_vision: bool = option(False, "model", "train the vision tower and merger too")
    feature_cache_mb: int = option(1024, "model", "budget for cached image features of a frozen tower, MB; 0: none")
    # data
    data: str | None = option(None, "data", "annotations (det: COCO instances JSON); none: rendered scenes")
    images: str | None = option(None, "data", "folder of the images that --data names")
    eval_data: str | None = option(None, "data", "annotations to evaluate on; none: no evaluation with --data")
    eval_images: str | None = option(None, "data", "folder of the images that --eval-data names (default --images)")
    eval_samples: int = option(1000, "data", "evaluate on the first this many images; 0: all")
    difficulty: float = option(0.25, "data", "difficulty of the rendered scenes, 0 to 1")
    duplicates: float = option(0.0, "data", "share of the training scenes' objects annotated twice, a badly merged data "
                               "set for sft.py to learn a bad habit from")  # fmt: skip
    # rollout
    group_size: int = option(8, "rollout", "G, completions per prompt")
    prompts_per_step: int = option(16, "rollout", "P, prompts of a step over all ranks")
    temperature: float = option(1.0, "rollout", "sampling temperature; log-probs are taken at it too")
    top_p: float = option(1.0, "rollout", "keep the smallest set of tokens with this mass; 1: all")
    top_k: int = option(0, "rollout", "keep the k most likely tokens; 0: all")
    min_new_tokens: int = option(0, "rollout", "no stop before this many tokens")
    max_new_tokens: int = option(1024, "rollout", "completions are cut here")
    max_refill: int = option(1, "rollout", "rounds of prompts a step may draw to replace flat groups; 1: no refill")
    rollout_batch: int = option(256, "rollout", "sequences decoded together on a rank, as far as the cache holds them")
    rollout_cache_mb: int = option(8192, "rollout", "budget for keys and values of a rollout on a rank, MB")
    # task
    reward: str = option("set", "task", "reward preset of the task (python -m pr1.lint tells which can be gamed)")
    reward_weights: str = option(
        "", "task", "weights of the preset's parts in place of its own, part=weight,part=weight"
    )
    prompt: str | None = option(
        None, "task", "the prompt's text in place of the task's own; {braces} as the task states"
    )
    thinking: bool = option(False, "task", "ask for <think></think><answer></answer>; half the reward without the form")
    # objective
    loss: str = option(
        "clip",
        "objective",
        "clip: PPO's and GRPO's clipped ratio; cispo: the ratio as a clipped constant weight (arXiv 2506.13585); "
        "sapo: a soft gate for the clip (arXiv 2511.20347)",
        ("clip", "cispo", "sapo"),
    )
    ratio: str = option(
        "token",
        "objective",
        "of a token, or of the whole sequence (GSPO, arXiv 2507.18071; it clips far tighter, 3e-4 and 4e-4)",
        ("token", "sequence"),
    )
    clip_low: float = option(0.2, "objective", "the ratio is clipped below 1 - this; inf: not (default of cispo, sapo)")
    clip_high: float = option(0.28, "objective", "the ratio is clipped above 1 + this; inf: not (default of sapo)")
    dual_clip: float = option(
        math.inf, "objective", "for negative advantages the ratio is clipped above this (arXiv 1912.09729: 3); inf: not"
    )
    sapo_tau_pos: float = option(1.0, "objective", "SAPO's temperature for positive advantages")
    sapo_tau_neg: float = option(1.05, "objective", "SAPO's temperature for negative advantages")
    kl_coef: float = option(0.0, "objective", "weight of the KL to the starting policy; 0: no reference is held")
    kl: str = option("k3", "objective", "KL estimator", ("k3", "k2"))
    entropy_coef: float = option(0.0, "objective", "weight of the entropy bonus")
    rollout_cap: float = option(2.0, "objective", "cap of the sampler-to-trainer importance weight")
    aggregation: str = option(
        "token-mean",
        "objective",
        "how token losses are averaged over the step",
        ("token-mean", "sequence-mean", "constant"),
    )
    advantage_scale: str = option(
        "group", "objective", "divide advantages by the group's std, or not (Dr.GRPO)", ("group", "none")
    )
    updates_per_batch: int = option(1, "objective", "optimizer steps on each batch of rollouts")
    # optimizer
    lr: float = option(1e-6, "optimizer", "peak learning rate of AdamW")
    vision_lr: float | None = option(None, "optimizer", "learning rate of tower and merger (default --lr)")
    beta1: float = option(0.9, "optimizer", "first-moment decay")
    beta2: float = option(0.999, "optimizer", "second-moment decay")
    weight_decay: float = option(0.0, "optimizer", "decoupled weight decay of matrices")
    grad_clip: float = option(1.0, "optimizer", "largest global gradient norm; 0: no clipping")
    warmup_steps: int = option(10, "optimizer", "linear warm-up")
    schedule: str = option("constant", "optimizer", "after the warm-up", ("constant", "linear", "cosine"))
    pack_tokens: int = option(16384, "optimizer", "tokens of one forward and backward pass on a rank")
    checkpointing: str = option("none", "optimizer", "activations to compute again in the backward pass instead of "
                                "keeping them; full: all of every layer", ("none", "full"))  # fmt: skip
    sft_batch: int = option(32, "optimizer", "samples per step of sft.py")
    # logging
    eval_every: int = option(100, "logging", "evaluate every this many steps; 0: only before and after; -1: never")
    save_every: int = option(100, "logging", "checkpoint every this many steps, and at the end; 0: only at the end")
    keep_checkpoints: int = option(2, "logging", "older checkpoints are deleted; 0: keep all")
    report_samples: int = option(12, "logging", "evaluated images drawn in report.html")
    tensorboard: bool = option(True, "logging", "write TensorBoard event files")
    wandb: bool = option(False, "logging", "log to Weights & Biases")

    def __post_init__(self):
        check(self)


RECIPES = {
    "default": {},
    # arXiv 2504.07954 and its released detection script (Qwen2.5-VL-3B, 8 GPUs)
    "paper": dict(reward="paper", kl_coef=0.04, kl="k3", aggregation="sequence-mean", clip_low=math.inf, clip_high=math.inf,
                  rollout_cap=math.inf, train_vision=True, schedule="linear", warmup_steps=0, prompts_per_step=14,
                  max_new_tokens=2048),
    # two CPU cores, ten minutes
    "embedded": dict(steps=200, lr=1e-4, temperature=0.7, prompts_per_step=16, max_new_tokens=100, eval_every=0,
                     save_every=50),
}  # fmt: skip

LOSSES = {"cispo": dict(clip_low=math.inf), "sapo": dict(clip_low=math.inf, clip_high=math.inf)}  # defaults of a loss

# what may differ between a run and its resumption
RESUMABLE = {"steps", "resume", "eval_every", "save_every", "keep_checkpoints", "report_samples", "tensorboard",
             "wandb", "run_dir", "rollout_batch", "rollout_cache_mb", "feature_cache_mb", "checkpointing"}  # fmt: skip

MAY_BE_INFINITE = ("clip_low", "clip_high", "dual_clip", "rollout_cap")


def check(cfg: Config) -> None:
    """Raises ValueError naming the flag, its value and what it may be."""

    def need(ok: bool, name: str, what: str):
        if not ok:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}: {what}")

    for field in dataclasses.fields(cfg):
        choices = field.metadata["choices"]
        need(not choices or getattr(cfg, field.name) in choices, field.name, f"one of {', '.join(choices or ())}")
        finite = not isinstance(getattr(cfg, field.name), float) or math.isfinite(getattr(cfg, field.name))
        need(finite or field.name in MAY_BE_INFINITE, field.name, "must be a finite number")
    need(cfg.group_size >= 2, "group_size", "a group needs at least 2 completions, advantages compare them")
    for name in ("prompts_per_step", "updates_per_batch", "max_refill", "max_new_tokens", "rollout_batch", "pack_tokens",
                 "rollout_cache_mb", "max_prompt_tokens", "sft_batch", "min_pixels"):  # fmt: skip
        need(getattr(cfg, name) >= 1, name, "must be at least 1")
    for name in ("steps", "seed", "kl_coef", "entropy_coef", "lr", "weight_decay", "grad_clip", "warmup_steps",
                 "save_every", "keep_checkpoints", "eval_samples", "top_k", "min_new_tokens", "clip_low", "clip_high",
                 "report_samples", "feature_cache_mb"):  # fmt: skip
        need(getattr(cfg, name) >= 0, name, "must not be negative")
    need(cfg.temperature > 0, "temperature", "must be above 0 (evaluation is greedy anyway)")
    need(cfg.eval_every >= -1, "eval_every", "must be -1 (never), 0 (before and after) or a number of steps")
    need(0 < cfg.top_p <= 1, "top_p", "must lie in (0, 1]")
    need(0 <= cfg.difficulty <= 1, "difficulty", "must lie in [0, 1]")
    need(0 <= cfg.duplicates <= 1, "duplicates", "must lie in [0, 1]")
    need(0 <= cfg.beta1 < 1, "beta1", "must lie in [0, 1)")
    need(0 <= cfg.beta2 < 1, "beta2", "must lie in [0, 1)")
    need(cfg.rollout_cap > 0, "rollout_cap", "must be above 0 (inf: no cap)")
    need(cfg.dual_clip > 1, "dual_clip", "must be above 1 (inf: off)")
    need(cfg.dual_clip == math.inf or cfg.loss == "clip", "dual_clip", "needs --loss clip")
    need(cfg.ratio == "token" or cfg.loss == "clip", "ratio", "needs --loss clip")
    for name, default in (("sapo_tau_pos", 1.0), ("sapo_tau_neg", 1.05)):
        need(getattr(cfg, name) > 0, name, "must be above 0")
        need(cfg.loss == "sapo" or getattr(cfg, name) == default, name, "needs --loss sapo")
    for name in ("clip_low", "clip_high"):
        need(cfg.loss != "sapo" or getattr(cfg, name) == math.inf, name, "--loss sapo has no bounds, only inf")
    need(cfg.max_pixels >= cfg.min_pixels, "max_pixels", f"must be at least --min-pixels ({cfg.min_pixels})")
    need(cfg.min_new_tokens <= cfg.max_new_tokens, "min_new_tokens", "must not exceed --max-new-tokens")
    need(cfg.vision_lr is None or cfg.train_vision, "vision_lr", "needs --train-vision")
    need(cfg.vision_lr is None or cfg.vision_lr >= 0, "vision_lr", "must not be negative")
    need(cfg.images is None or cfg.data is not None, "images", "needs --data")
    need(cfg.eval_images is None or cfg.eval_data is not None, "eval_images", "needs --eval-data")
    need(
        cfg.eval_data is None or cfg.data is not None, "eval_data", "needs --data (scenes have their own held-out set)"
    )
    parse_weights(cfg.reward_weights)
    need(not cfg.resume or cfg.run_dir is not None, "resume", "needs --run-dir, the run to continue")
    need(cfg.recipe != "embedded" or cfg.model is None, "recipe", "embedded is for the tiny policy, not for --model")


def parse_weights(text: str) -> tuple[tuple[str, float], ...]:
    """ "part=weight,part=weight" -> pairs. Raises ValueError for what is no finite number."""
    weights = []
    for entry in filter(None, text.split(",")):
        part, _, value = entry.partition("=")
        try:
            weights.append((part.strip(), float(value)))
        except ValueError:
            raise ValueError(f"--reward-weights: {entry!r} is not part=weight") from None
        if not math.isfinite(weights[-1][1]):
            raise ValueError(f"--reward-weights: {entry!r} is not a finite number")
    return tuple(weights)


def value_type(field: dataclasses.Field):
    """(type, optional) of a field; annotations are `T` or `T | None`."""
    kind = typing.get_type_hints(Config)[field.name]
    if isinstance(kind, types.UnionType):
        return next(k for k in typing.get_args(kind) if k is not type(None)), True
    return kind, False


class Parser(argparse.ArgumentParser):
    """Underscores in the name of a flag are hyphens."""

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        names = [arg.partition("=")[0] if arg.startswith("--") else "" for arg in args]
        return super().parse_args([n.replace("_", "-") + a[len(n) :] for n, a in zip(names, args)], namespace)


def build_parser(prog: str, description: str) -> argparse.ArgumentParser:
    parser = Parser(prog, description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--config", metavar="FILE.yaml", help="flags as YAML keys; flags given win over it")
    groups = {}
    for field in dataclasses.fields(Config):
        kind, _ = value_type(field)
        section = field.metadata["section"]
        group = groups.setdefault(section, parser.add_argument_group(section))
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        shown = "" if field.default in (None, "") or kind is bool else f" (default {field.default})"
        group.add_argument("--" + field.name.replace("_", "-"), dest=field.name, default=argparse.SUPPRESS,
                           help=field.metadata["help"] + shown, choices=field.metadata["choices"], **how)  # fmt: skip
    return parser


def read_yaml(path: str) -> dict:
    """The YAML mapping of flags in `path`; ValueError for an unreadable file, an unknown key or a wrong type."""
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: a mapping of flags is expected, not {type(values).__name__}")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    fields = {field.name: field for field in dataclasses.fields(Config)}
    for key, value in values.items():
        if key not in fields:
            raise ValueError(f"--config {path}: unknown key {key!r}")
        kind, optional = value_type(fields[key])
        if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
            try:  # YAML reads 1e-6 as a string
                values[key] = value = float(value)
            except ValueError:
                pass
        if not (isinstance(value, kind) and not (kind is int and isinstance(value, bool))) and not (
            optional and value is None
        ):
            raise ValueError(f"--config {path}: {key} is {value!r}, expected {kind.__name__}")
    return values


def config_from(flags: dict) -> Config:
    """The configuration of the flags given: defaults, recipe, --config file and flags, in this order."""
    flags = dict(flags)
    file = flags.pop("config", None)
    given = {**(read_yaml(file) if file else {}), **flags}
    recipe = given.get("recipe", "default" if given.get("model") else "embedded")
    if recipe not in RECIPES:
        raise ValueError(f"--recipe is {recipe!r}: one of {', '.join(RECIPES)}")
    values = {**RECIPES[recipe], **LOSSES.get(given.get("loss"), {}), **given, "recipe": recipe}
    if not values.get("task"):
        raise ValueError("--task is missing: what shall be learnt? (--task det)")
    return Config(**values)


def parse_config(argv: list[str], prog: str, description: str) -> Config:
    """The configuration of a command line (without the program's name)."""
    return config_from(vars(build_parser(prog, description).parse_args(argv)))
