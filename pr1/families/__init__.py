"""Model families: all that depends on which model is trained."""

from __future__ import annotations

import re
from pathlib import Path

from pr1.families.base import Family
from pr1.families.preprocessing import read_json
from pr1.families.qwen2_5_vl import Qwen25VL
from pr1.families.qwen2_vl import Qwen2VL

FAMILIES: dict[str, type[Family]] = {family.name: family for family in (Qwen2VL, Qwen25VL)}  # by config.model_type
SUPPORTED = "supported are folders and hub names of Qwen2-VL (qwen2_vl) and Qwen2.5-VL (qwen2_5_vl) models"
SMALL_FILES = ["*.json", "*.txt", "*.jinja"]  # everything but the weights

__all__ = ["FAMILIES", "Family", "load_family"]


def load_family(model: str, *, max_pixels: int | None = None, min_pixels: int | None = None) -> Family:
    """The family of a model folder or hub name, ready to encode; reads no weights.

    `max_pixels` and `min_pixels` bound the area of a resized image and replace the model's own limits. ValueError when
    `model` is no Qwen2-VL or Qwen2.5-VL model, or lacks a file that is needed.
    """
    folder = Path(model)
    if not folder.is_dir():
        folder = _download(str(model))
    config = read_json(folder, "config.json")
    if config is None:
        raise ValueError(f"model {model}: the folder has no config.json; {SUPPORTED}")
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model {model}: config.json has model_type {kind!r}; {SUPPORTED}")
    return FAMILIES[kind](str(folder), source=str(model), max_pixels=max_pixels, min_pixels=min_pixels)


def _download(name: str) -> Path:
    """The small files of a hub model in the local cache; the weights follow when the model is loaded."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise ValueError(f"model {name}: no such folder; {SUPPORTED}")
    from huggingface_hub import snapshot_download  # only needed, and only allowed to touch the network, here

    try:
        return Path(snapshot_download(name, allow_patterns=SMALL_FILES))
    except Exception as error:  # the hub client raises many kinds for: absent, gated, offline
        raise ValueError(f"model {name}: neither a folder nor to be had from the hub ({error}); {SUPPORTED}") from None
