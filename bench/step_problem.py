"""The problem of bench/step.py: a random policy of a given size and rollouts of given shapes, the same in any process."""

import sys

sys.path[:] = [p for p in sys.path if not p.rstrip("/").endswith("/bench")]  # bench/ holds names like kernels.py

import json
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from pr1 import tiny
from pr1.advantage import group_advantages
from pr1.families import load_family
from pr1.records import ImageInput, Prompt, Rollout

WORDS = 1500  # ids below are ordinary tokens of the small tokenizer
VISION_3B = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
             "fullatt_block_indexes": [7, 15, 23, 31]}  # fmt: skip
SIZES = {  # what differs from the embedded policy's config.json
    "toy": ({"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 1,
             "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
            {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 64,
             "fullatt_block_indexes": [1]}),
    # Proportions of the 3B: grouped keys, MLP 5.4 wide, head 11 % of the trunk, tower (windows alone: at this width
    # the four full-attention blocks of 32 would outweigh the rest) .92 of the trunk per image token.
    "cpu": ({"num_hidden_layers": 2, "hidden_size": 512, "intermediate_size": 2752, "num_attention_heads": 8,
             "num_key_value_heads": 1, "vocab_size": 2112, "rope_theta": 1e6,
             "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}},
            {"depth": 2, "hidden_size": 256, "intermediate_size": 640, "out_hidden_size": 512,
             "fullatt_block_indexes": []}),
    "3b": ({"num_hidden_layers": 36, "hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16,
            "num_key_value_heads": 2, "vocab_size": 151936, "rope_theta": 1e6, "max_position_embeddings": 128000,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, VISION_3B),
}  # fmt: skip


def build_family(size: str, folder):
    """The family of a model of this size: config, tokenizer and preprocessing files, no weights."""
    tokenizer = tiny.build_tokenizer()
    text, vision = SIZES[size]
    config = {**tiny.model_config(tokenizer), **text}
    config["vision_config"] = {**config["vision_config"], **vision}
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
    for name, content in {**tiny.side_files(tokenizer), "config.json": config}.items():
        (Path(folder) / name).write_text(json.dumps(content))
    return load_family(str(folder)), config


@torch.no_grad()
def build_model(config: dict, device, dtype):
    """Random weights from a seed, scaled so that every input moves the log-probs; the same in every process."""
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(
            Qwen2_5_VLConfig.from_dict(config), dtype=dtype, attn_implementation="sdpa"
        )
    generator = torch.Generator(device).manual_seed(0)
    for _, weight in sorted(model.named_parameters()):
        if weight.ndim == 1:
            weight.fill_(1.0)
        else:
            weight.normal_(generator=generator).mul_(weight[0].numel() ** -0.5)
    return model


def make_rollouts(job: dict, family) -> tuple[list[Rollout], np.ndarray]:
    """groups x G rollouts of equal lengths, one image a group; advantages (groups, G)."""
    (length, completion, size), (rows, columns) = job["shape"], job["image"]
    rng, rollouts = torch.Generator().manual_seed(1), []
    old = torch.load(job["old"]) if Path(job["old"]).exists() else None
    start, end = family.vision_ids[:2]
    before, after = (length - rows * columns - 2) // 2, (length - rows * columns - 1) // 2
    for group in range(job["groups"]):
        words = torch.randint(WORDS, (before + after,), generator=rng).split([before, after])
        pads = torch.full((rows * columns,), family.image_token_id)
        ids = torch.cat([words[0], torch.tensor([start]), pads, torch.tensor([end]), words[1]])
        grid = (1, 2 * rows, 2 * columns)
        pixels = torch.randn(4 * rows * columns, 3 * 2 * 14 * 14, generator=rng)
        where = (ids == family.image_token_id).nonzero()[:, 0]
        prompt = Prompt(ids, family.positions(ids, [grid]), (ImageInput(f"image {group}", pixels, grid),), where)
        for i in range(size):
            tokens, logp = torch.randint(WORDS, (completion,), generator=rng), torch.zeros(completion)
            if old is not None:
                logp = old[group * size + i]
            rollouts.append(Rollout(group, i, prompt, tokens, torch.ones(completion, dtype=torch.bool), logp,
                                    torch.zeros(completion), torch.zeros(completion), "", True))  # fmt: skip
    rewards = torch.rand(job["groups"], size, generator=rng).double().numpy()
    return rollouts, group_advantages(rewards)
