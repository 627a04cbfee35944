"""Puts a run together from its configuration: task, family, data, policy. Everything that can be wrong is found here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from pr1.config import Config
from pr1.data.scenes import SceneDataset, SceneOptions
from pr1.families import load_family
from pr1.policy import FeatureCache, Policy
from pr1.progress import track
from pr1.world import World

disable_progress_bar()  # of the weights; a run has bars of its own

TINY = Path(__file__).parent / "assets" / "tiny-qwen2.5-vl"
TRAIN_SCENES = 1 << 16


def load_model_family(cfg: Config, say):
    """The family of --model, or of the tiny policy in the package."""
    if cfg.model is None:
        if not (TINY / "config.json").exists():
            raise ValueError(f"the embedded tiny policy is missing ({TINY}): run `make warmstart`, or pass --model")
        say(f"policy: the embedded tiny one ({TINY.name}, Qwen2.5-VL architecture, warm-started on rendered scenes); "
            "for the real thing pass --model Qwen/Qwen2.5-VL-3B-Instruct")  # fmt: skip
    family = load_family(cfg.model or str(TINY), max_pixels=cfg.max_pixels, min_pixels=cfg.min_pixels)
    family.check_weights()  # now, not after the data has been read
    return family


def load_train_data(cfg: Config, task, say) -> Sequence:
    if cfg.data is None:
        say("data: rendered scenes; for your own pass --data instances.json --images DIR")
        return SceneDataset("train", TRAIN_SCENES, SceneOptions.at(cfg.difficulty, duplicates=cfg.duplicates))
    if cfg.images is None:
        raise ValueError(f"--data {cfg.data}: the folder of its images is missing (--images DIR)")
    return task.load(cfg.data, cfg.images, log=say)


def load_eval_data(cfg: Config, task, say) -> Sequence | None:
    """Held-out records, or None when nothing says what to evaluate on."""
    if cfg.data is None:
        return SceneDataset("val", cfg.eval_samples or 1000, SceneOptions.at(cfg.difficulty))
    if cfg.eval_data is None:
        return None
    images = cfg.eval_images or cfg.images
    if images is None:
        raise ValueError(f"{cfg.eval_data}: the folder of its images is missing (--images DIR)")
    records = task.load(cfg.eval_data, images, log=say)
    return records[: cfg.eval_samples] if cfg.eval_samples else records


def check_prompts(cfg: Config, task, family, records: Sequence, what: str, say) -> None:
    """Raises ValueError naming the first prompt that is longer than --max-prompt-tokens."""
    scan = records if cfg.data is not None else [records[i] for i in range(min(64, len(records)))]
    longest = 0
    for record in track(scan, f"measuring {what} prompts"):
        frame = family.frame(record.width, record.height)
        length = family.prompt_length(task.messages(record), (frame,))
        longest = max(longest, length)
        if length > cfg.max_prompt_tokens:
            raise ValueError(
                f"{record.source}: the prompt takes {length} tokens, --max-prompt-tokens is {cfg.max_prompt_tokens}; "
                "raise it, or lower --max-pixels"
            )
    say(f"{what}: {len(records)} images, longest prompt {longest} tokens")


def build_policy(cfg: Config, family, world: World, weights: Path | None = None) -> Policy:
    """The trainable policy; weights: a checkpoint folder to load instead of the family's own."""
    dtype = torch.float32 if world.device.type == "cpu" else torch.bfloat16
    model = (load_family(str(weights)) if weights else family).load_model(dtype)
    cache = FeatureCache(cfg.feature_cache_mb << 20)
    return Policy(family, model, world.device, train_vision=cfg.train_vision, cache=cache)


def build_reference(cfg: Config, family, world: World, policy: Policy) -> Policy | None:
    """The frozen starting policy, held only when the KL has a coefficient. A frozen tower is shared with the policy."""
    if cfg.kl_coef == 0:
        return None
    model = family.load_model(next(policy.model.parameters()).dtype)
    model.requires_grad_(False)
    cache = FeatureCache(cfg.feature_cache_mb << 20) if cfg.train_vision else policy.cache
    return Policy(family, model, world.device, train_vision=False, cache=cache)
