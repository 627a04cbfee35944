"""Tiny random Qwen2-VL and Qwen2.5-VL model folders that `from_pretrained` loads, for tests.

Nothing of the package is imported, so that scripts outside the package can use them too. The tokenizer is a
byte-level BPE whose merges are spelled out here, so that it is the same everywhere; the chat template and the special
tokens, in their order, are those of the published models. Weights are scaled up from the usual initialisation, at which
a tiny model hardly sees its input: with these, another image, other positions or another token move log-probs by more
than 0.1 nat (`tests/test_families.py` shows it).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
PLAIN_ADDED = {  # added tokens that are not special
    "qwen2_vl": [],
    "qwen2_5_vl": "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> "
    "<|file_sep|>".split(),
}
WORDS = (
    "system user assistant You Ġare Ġa Ġhelpful Output Ġthe Ġbounding Ġbox Ġof Ġin Ġimage Please Ġoutput Ġbbox "
    'Ġcoordinates Ġand Ġnames Ġred Ġblue Ġgreen Ġcircle Ġsquare Ġcat Ġdog cat dog bbox label [{" ":Ġ[ ],Ġ" ":Ġ" '
    '"},Ġ{" "}] none OCR Ġthis Ċ'
).split()
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in "
    "content or 'image_url' in content %}{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}"
    "Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif "
    "content['type'] == 'video' or 'video' in content %}{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PREPROCESSOR = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
}


def tiny_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The 256 byte characters, then every prefix of every word, each made by one merge."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters = [chr(byte) for byte in own] + [chr(256 + i) for i in range(256 - len(own))]
    vocabulary, merges = {character: i for i, character in enumerate(characters)}, []
    for word in WORDS:
        for cut in range(1, len(word)):
            if word[: cut + 1] not in vocabulary:
                vocabulary[word[: cut + 1]] = len(vocabulary)
                merges.append((word[:cut], word[cut]))
    return vocabulary, merges


def make_tokenizer(family: str) -> Qwen2Tokenizer:
    vocabulary, merges = tiny_vocabulary()
    for token in (*SPECIAL, *PLAIN_ADDED[family]):
        vocabulary[token] = len(vocabulary)
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, eos_token="<|im_end|>", additional_special_tokens=SPECIAL[1:]
    )
    tokenizer.add_tokens(PLAIN_ADDED[family])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_config(family: str, tokenizer, *, tied: bool, hidden: int, layers: int, heads: int, kv_heads: int):
    """A configuration with the published models' structure: grouped keys, m-RoPE sections, real vision windows."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    half = hidden // heads // 2  # rotary frequencies of a head, shared out 1 : 1.5 : 1.5 as in the published models
    sections = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
    text = {
        "vocab_size": (len(tokenizer) + 8 + 31) // 32 * 32,  # padded: some ids are no token
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": sections},
        "tie_word_embeddings": tied,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    vision = {"depth": 3, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if family == "qwen2_5_vl":
        vision |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": hidden, "window_size": 112}
        vision |= {"fullatt_block_indexes": [1]}
    else:
        vision |= {"embed_dim": 32, "hidden_size": hidden, "mlp_ratio": 2}
    kind = {"qwen2_vl": Qwen2VLConfig, "qwen2_5_vl": Qwen2_5_VLConfig}[family]
    return kind(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )


@torch.no_grad()
def scale_weights(model, seed: int, gain: float) -> None:
    """Fill every parameter from one seeded stream: matrices with `gain` over the root of their inputs, biases and norms
    with visible noise, so that no input is drowned and no symmetry hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:
            weight.copy_(0.2 * noise + (0.0 if name.endswith("bias") else 1.0))
        elif "embed_tokens" in name:
            weight.copy_(0.4 * noise)
        else:
            # Sharp attention would look at a few tokens and miss a change in all the others.
            share = 0.4 if ".q_proj." in name or ".k_proj." in name else 1.0
            weight.copy_(noise * share * gain / weight[0].numel() ** 0.5)


def picture(width: int, height: int) -> Image.Image:
    """A picture from a formula: gradients, stripes and a disc, so that a flip, a crop or a swap of sides shows."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    red = (3 * x + y * y // 7) % 256
    green = (5 * y + (x // 9) * 40) % 256
    blue = np.where((x - width // 3) ** 2 + (y - height // 2) ** 2 < (min(width, height) // 4) ** 2, 250, (x * y) % 97)
    return Image.fromarray(np.stack([red, green, blue], -1).astype(np.uint8))


def messages(images: int, text: str) -> list[dict]:
    """A user turn of so many images and a text."""
    return [{"role": "user", "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]}]


def make_tiny(
    folder,
    family: str = "qwen2_5_vl",
    *,
    tied: bool = False,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    gain: float = 2.2,
    stop_gain: float = 1.0,
) -> str:
    """Write a tiny model of `family` ("qwen2_vl" or "qwen2_5_vl") to `folder`, float32; returns the folder's path.

    `stop_gain` scales the output row of <|im_end|>, so that greedy answers stop early, and at different lengths.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(family)
    config = make_config(family, tokenizer, tied=tied, hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads)
    model_class = {"qwen2_vl": Qwen2VLForConditionalGeneration, "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration}[
        family
    ]
    model = model_class(config).to(torch.float32)
    scale_weights(model, seed, gain)
    with torch.no_grad():
        model.get_output_embeddings().weight[config.text_config.eos_token_id] *= stop_gain
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")
    return str(folder)
