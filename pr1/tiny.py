"""The embedded policy: a Qwen2.5-VL checkpoint folder small enough to train on a CPU, made from nothing.

    python -m pr1.tiny DIR [--seed S]                      random weights
    python -m pr1.tiny DIR --weights CHECKPOINT            those of a checkpoint trained from such a folder

Everything that reads a published Qwen2.5-VL folder reads this one: the same architecture (transformers' own class,
random weights), file names, config keys, special tokens and chat template. Only the tokenizer's cut is ours. A tiny
policy's run time is its token count, so one token stands for each piece of an answer that is decided at once: the
opening of an object, a coordinate, the step to the label, the label, the close. Other text is spelt in bytes and pairs.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from pr1.data.scenes import LABELS, SHAPES

SPECIAL_TOKENS = tuple(
    f"<|{name}|>"
    for name in (
        "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end "
        "vision_start vision_end vision_pad image_pad video_pad"
    ).split()
)  # in the published order

# Where a text may be cut, first match wins; whatever matches nothing stays a piece of its own.
PIECES = "|".join(
    [
        r'(?:, )?\{"(?:bbox|point)_2d": \[',  # a new object: with the comma it is the decision to go on
        r'\], "label": "',
        r'"\}',
        r"\[\]",
        r"[\[\]]",
        r"(?:, )?[0-9]{1,3}",  # a coordinate, with the comma before it when there is one
        r" ?\p{L}+",
        r" ?[^\s\p{L}0-9\[\]]+",
        r"\s+(?!\S)|\s+",
    ]
)
COCO_NAMES = (
    "person bicycle car motorcycle airplane bus train truck boat traffic light fire hydrant stop sign parking "
    "meter bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase "
    "frisbee skis snowboard sports ball kite baseball bat baseball glove skateboard surfboard tennis racket "
    "bottle wine glass cup fork knife spoon bowl banana apple sandwich orange broccoli carrot hot dog pizza donut "
    "cake chair couch potted plant bed dining table toilet tv laptop mouse remote keyboard cell phone microwave "
    "oven toaster sink refrigerator book clock vase scissors teddy bear hair drier toothbrush"
)
PROMPT_WORDS = (
    "system user assistant You are a helpful assistant Please output bbox coordinates and names of Output the "
    "bounding box boxes all in image OCR this Locate every item from category list JSON format set includes "
    "object left right top bottom red green blue yellow purple orange black white pink on to with is no"
)

# What Qwen2.5-VL's own template writes, without its spellings of the same content (image_url, "image" without a type).
CHAT_TEMPLATE = """\
{%- set seen = namespace(images=0, videos=0) -%}
{%- if messages and messages[0].role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{%- set seen.images = seen.images + 1 -%}
{{- 'Picture %d: ' % seen.images if add_vision_id else '' -}}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' -%}
{%- set seen.videos = seen.videos + 1 -%}
{{- 'Video %d: ' % seen.videos if add_vision_id else '' -}}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- else -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt else '' -}}
"""

MIN_PIXELS, MAX_PIXELS = 56 * 56, 252 * 252  # sides of 28 to 252 px are only rounded to multiples of 28, never shrunk


def wanted_pieces() -> list[str]:
    """Texts that are one token each, in order of priority."""
    numbers = [str(n) for n in range(300)]
    template = ["[]", '{"bbox_2d": [', ', {"bbox_2d": [', '], "label": "', '"}', '{"point_2d": [', ', {"point_2d": [']
    words = [*LABELS, *SHAPES, *PROMPT_WORDS.split(), *COCO_NAMES.split()]
    spaced = [" " + word for word in words]
    return list(dict.fromkeys([*numbers, *(", " + n for n in numbers), *template, *words, *spaced, "),("]))


def learn_merges(pieces: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, best first, under which each piece becomes one token.

    Pieces in turn are cut by the merges so far and the parts joined from the left by new merges. A new one ranks
    behind all others and no earlier piece has two parts left for it, so earlier pieces stay whole; the order of
    `pieces` is all that decides, hence the same merges with every version of every library.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ranks: dict[tuple[str, str], int] = {}
    for piece in pieces:
        parts = list(byte_level.pre_tokenize_str(piece)[0][0])
        while len(parts) > 1:
            pairs = list(zip(parts, parts[1:], strict=False))
            best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
            ranks.setdefault(best, len(ranks))
            at = pairs.index(best)
            parts[at : at + 2] = ["".join(best)]
    return list(ranks)


def build_tokenizer() -> Tokenizer:
    """Byte-level BPE: any text comes back unchanged (no normaliser), the wanted pieces are one token each."""
    merges = learn_merges(wanted_pieces())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys([*alphabet, *("".join(pair) for pair in merges)])  # two merges may spell one token
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    return tokenizer


def model_config(tokenizer: Tokenizer) -> dict:
    """config.json with the keys and the flat shape of the published checkpoints."""
    size = tokenizer.get_vocab_size()
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "vision_token_id": tokenizer.token_to_id("<|vision_pad|>"),
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.08,  # about 1 / sqrt(hidden_size)
        "intermediate_size": 384,
        "max_position_embeddings": 4096,
        "max_window_layers": 4,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        # Sections give x the slowest of the 16 frequencies; at Qwen's 10^6 a grid of 9 tokens would not turn them at all.
        "rope_theta": 30.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "sliding_window": 4096,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": (size // 64 + 1) * 64,  # as published, larger than the tokenizer: ids no text has
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 4,
            "hidden_act": "silu",
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "in_chans": 3,
            "initializer_range": 0.08,
            "out_hidden_size": 128,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [1, 3],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
    }


def side_files(tokenizer: Tokenizer) -> dict[str, dict]:
    """The other JSON files of the folder, by name."""
    im_end, end_of_text = (tokenizer.token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>"))
    return {
        "generation_config.json": {
            "bos_token_id": end_of_text,
            "pad_token_id": end_of_text,
            "eos_token_id": [im_end, end_of_text],
            "do_sample": True,
            "temperature": 1.0,
        },
        "preprocessor_config.json": {
            "min_pixels": MIN_PIXELS,
            "max_pixels": MAX_PIXELS,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        },
        "tokenizer_config.json": {
            # Not Qwen2Tokenizer: that class puts its own cut, digit by digit, in place of the one in tokenizer.json.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
            "chat_template": CHAT_TEMPLATE,
        },
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
    }


@torch.no_grad()
def order_numbers(weight: torch.Tensor, tokenizer: Tokenizer) -> None:
    """Makes the embedding of every number token Fourier features of its value; weight: (V, H) float32, in place.

    The head is tied to the embeddings, so nearby numbers begin with nearby logits and what is learnt of one coordinate
    holds for its neighbours. With random embeddings each of some 200 coordinates is learnt on its own.
    """
    found = {i: m for t, i in tokenizer.get_vocab().items() if (m := re.fullmatch(r"(,Ġ)?(\d+)", t))}
    ids, numbers = torch.tensor(list(found)), torch.tensor([float(m[2]) for m in found.values()])
    comma = torch.tensor([float(m[1] is not None) for m in found.values()])[:, None] * torch.randn(weight.shape[1])
    pairs = weight.shape[1] // 4
    periods = 8.0 * 2 ** (7 * torch.arange(pairs) / (pairs - 1))  # 8 .. 1024 px
    angles = 2 * math.pi * numbers[:, None] / periods
    features = torch.cat([angles.sin(), angles.cos()], 1)  # (n, H/2)
    spread = torch.linalg.qr(torch.randn(weight.shape[1], features.shape[1]))[0]  # (H, H/2), orthonormal columns
    weight[ids] = (weight.std() * (2 * features @ spread.T + comma)).to(weight.dtype)


def make_tiny_policy(folder: str | Path, seed: int = 0, weights: str | Path | None = None) -> Path:
    """Writes the checkpoint folder (2.1 M parameters, bfloat16, 4 MB) and returns its path.

    Equal seeds give equal bytes; `weights`, a checkpoint trained from such a folder, takes the place of random ones. The
    global random state is left alone. Raises ValueError when the folder already holds a checkpoint.
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} already holds a checkpoint (config.json): remove it or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    config = model_config(tokenizer)
    if weights is not None:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(weights)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(config))
            order_numbers(model.lm_head.weight, tokenizer)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    # After save_pretrained, whose own config.json has the keys of the installed version only.
    for name, content in {**side_files(tokenizer), "config.json": config}.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pr1.tiny", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folder", metavar="DIR", help="folder to write; must not hold a checkpoint yet")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default 0)")
    parser.add_argument("--weights", metavar="CHECKPOINT", help="a checkpoint trained from such a folder; none: random")
    options = parser.parse_args()
    try:
        folder = make_tiny_policy(options.folder, options.seed, options.weights)
    except ValueError as error:
        parser.error(str(error))
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{folder}: {size / 1e6:.1f} MB, " + (options.weights or f"random weights, seed {options.seed}"))


if __name__ == "__main__":
    main()
