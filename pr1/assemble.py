"""Puts a run together from its configuration: task, family, data, policy. Everything that can be wrong is found here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar

from pr1.config import Config, parse_weights
from pr1.decode import token_bytes
from pr1.engine import pool_sizes
from pr1.families import load_family
from pr1.policy import FeatureCache, Policy
from pr1.progress import track
from pr1.tasks import load_task
from pr1.world import World

disable_progress_bar()  # of the weights; a run has bars of its own

ASSETS = Path(__file__).parent / "assets"
TRAIN_SCENES = 1 << 16


def build_task(cfg: Config):
    """The task with its options. Raises ValueError for an unknown task, preset, part or weight."""
    weights = parse_weights(cfg.reward_weights)
    return load_task(cfg.task, preset=cfg.reward, weights=weights, prompt=cfg.prompt, thinking=cfg.thinking)


def load_model_family(cfg: Config, task, say):
    """The family of --model, or of the task's tiny policy in the package."""
    tiny = ASSETS / task.warm_start
    if cfg.model is None:
        if not (tiny / "config.json").exists():
            raise ValueError(f"the embedded tiny policy is missing ({tiny}): run `make warmstart`, or pass --model")
        say(f"policy: the embedded tiny one ({tiny.name}, Qwen2.5-VL architecture, warm-started on rendered data); "
            "for the real thing pass --model Qwen/Qwen2.5-VL-3B-Instruct")  # fmt: skip
    family = load_family(cfg.model or str(tiny), max_pixels=cfg.max_pixels, min_pixels=cfg.min_pixels)
    family.check_weights()  # now, not after the data has been read
    return family


def load_train_data(cfg: Config, task, say) -> Sequence:
    if cfg.data is None:
        say("data: rendered; for your own pass --data FILE --images DIR")
        return task.rendered("train", TRAIN_SCENES, cfg.difficulty, duplicates=cfg.duplicates)
    return task.load(cfg.data, _images_folder(task, "--data", cfg.data, cfg.images), log=say)


def _images_folder(task, flag: str, data: str, images: str | None) -> str:
    """--images; without it the annotations' own folder, for tasks whose annotations hold paths from there."""
    if images is None and not task.paths_from_data:
        raise ValueError(f"{flag} {data}: the folder of its images is missing (--images DIR)")
    return images or str(Path(data).parent)


def load_eval_data(cfg: Config, task, say) -> Sequence | None:
    """Held-out records, or None when nothing says what to evaluate on."""
    if cfg.data is None:
        return task.rendered("val", cfg.eval_samples or 1000, cfg.difficulty)
    if cfg.eval_data is None:
        return None
    images = _images_folder(task, "--eval-data", cfg.eval_data, cfg.eval_images or cfg.images)
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
    check_cache(cfg, family)
    say(f"{what}: {len(records)} images, longest prompt {longest} tokens")


def check_cache(cfg: Config, family) -> None:
    """Raises ValueError when --rollout-cache-mb cannot hold one prompt with one completion of the longest allowed."""
    config = AutoConfig.from_pretrained(family.folder).get_text_config()
    per_token = token_bytes(config, torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    pool_sizes(cfg.rollout_cache_mb, per_token, 1, 1, 1, cfg.max_prompt_tokens, cfg.max_new_tokens)


def build_policy(cfg: Config, family, world: World, weights: Path | None = None) -> Policy:
    """The trainable policy; weights: a checkpoint folder to load instead of the family's own."""
    dtype = torch.float32 if world.device.type == "cpu" else torch.bfloat16
    model = (load_family(str(weights)) if weights else family).load_model(dtype)
    cache = FeatureCache(cfg.feature_cache_mb << 20)
    return Policy(family, model, world.device, train_vision=cfg.train_vision, cache=cache,
                  checkpointing=cfg.checkpointing == "full")  # fmt: skip


def build_reference(cfg: Config, family, world: World, policy: Policy) -> Policy | None:
    """The frozen starting policy, held only when the KL has a coefficient. A frozen tower is shared with the policy."""
    if cfg.kl_coef == 0:
        return None
    model = family.load_model(next(policy.model.parameters()).dtype)
    model.requires_grad_(False)
    cache = FeatureCache(cfg.feature_cache_mb << 20) if cfg.train_vision else policy.cache
    return Policy(family, model, world.device, train_vision=False, cache=cache)
