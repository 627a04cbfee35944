"""Image preprocessing of the Qwen vision-language models: its numbers, the size rule, and where they are read from."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BICUBIC = 3  # PIL's number for the resampling filter, as preprocessor_config.json writes it
MAX_ASPECT = 200  # beyond it the Qwen image processors refuse an image


@dataclass(frozen=True)
class ImageSpec:
    """The numbers of a model's image preprocessing."""

    patch: int  # pixels
    merge: int  # patches a side that become one token
    frames: int  # temporal patch size: an image is repeated this often
    min_pixels: int  # of the resized image
    max_pixels: int
    mean: tuple[float, float, float]  # of values rescaled by `scale`
    std: tuple[float, float, float]
    scale: float

    @property
    def factor(self) -> int:
        """Both sides of a resized image are multiples of this many pixels: one token is factor x factor."""
        return self.patch * self.merge

    def table(self) -> np.ndarray:
        """(3, 256) float32: the model's input value of each 8-bit value, channel by channel.

        Same operations in the same precision as transformers' PIL image processor (rescale in float64, round to
        float32, then normalise in float32), hence the same bits.
        """
        values = (np.arange(256, dtype=np.float64) * self.scale).astype(np.float32)
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        return (values[None, :] - mean[:, None]) / std[:, None]


def resized(width: int, height: int, spec: ImageSpec) -> tuple[int, int]:
    """(width, height) in pixels of an image as the model sees it: multiples of `spec.factor`, near the original aspect
    ratio, between `min_pixels` and `max_pixels` in area. The rule is `smart_resize` of Qwen2-VL's image processor
    (arXiv 2409.12191, section 2.1). ValueError for an empty image or an aspect ratio above 200."""
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(
            f"an image of {width}x{height} pixels: sides must be positive and differ by at most {MAX_ASPECT}x"
        )
    unit = spec.factor
    sides = [round(side / unit) * unit for side in (width, height)]
    if sides[0] * sides[1] > spec.max_pixels:
        shrink = math.sqrt(width * height / spec.max_pixels)
        sides = [max(unit, math.floor(side / shrink / unit) * unit) for side in (width, height)]
    elif sides[0] * sides[1] < spec.min_pixels:
        grow = math.sqrt(spec.min_pixels / (width * height))
        sides = [math.ceil(side * grow / unit) * unit for side in (width, height)]
    return sides[0], sides[1]


def read_json(folder: Path, name: str) -> dict | None:
    """The object in `folder/name`; None when there is no such file, ValueError when it is not a JSON object."""
    path = folder / name
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_image_spec(folder: Path, config: dict, max_pixels: int | None, min_pixels: int | None) -> ImageSpec:
    """The preprocessing numbers of a model folder; explicit pixel limits win over the folder's.

    Reads `processor_config.json` (what transformers 5 writes) or `preprocessor_config.json`. ValueError when neither
    exists, when they ask for a preprocessing that is not done here, or when the pixel limits contradict each other.
    """
    read = (read_json(folder, "processor_config.json") or {}).get("image_processor")
    read = read or read_json(folder, "preprocessor_config.json")
    if read is None:
        raise ValueError(f"{folder}: no preprocessor_config.json; copy it from the model this one was made from")
    for key, needed in {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": BICUBIC}.items():
        if read.get(key, needed) != needed:
            raise ValueError(
                f"{folder}: preprocessor_config.json sets {key} to {read[key]!r}; only {needed!r} is supported"
            )
    size = read.get("size") or {}

    def limit(given: int | None, key: str, edge: str, default: int) -> int:
        found = (given, read.get(key), size.get(edge), size.get(key), default)
        return int(next(value for value in found if value is not None))

    spec = ImageSpec(
        patch=int(read.get("patch_size", 14)),
        merge=int(read.get("merge_size", 2)),
        frames=int(read.get("temporal_patch_size", 2)),
        min_pixels=limit(min_pixels, "min_pixels", "shortest_edge", 56 * 56),
        max_pixels=limit(max_pixels, "max_pixels", "longest_edge", 28 * 28 * 1280),
        mean=tuple(read.get("image_mean", (0.48145466, 0.4578275, 0.40821073))),  # CLIP's, the Qwen default
        std=tuple(read.get("image_std", (0.26862954, 0.26130258, 0.27577711))),
        scale=float(read.get("rescale_factor", 1 / 255)),
    )
    if not spec.factor**2 <= spec.max_pixels or not 0 < spec.min_pixels <= spec.max_pixels:
        raise ValueError(
            f"{folder}: pixel limits min_pixels={spec.min_pixels}, max_pixels={spec.max_pixels} leave no image size; "
            f"max_pixels must reach min_pixels and {spec.factor**2} (one token): set --max-pixels / --min-pixels"
        )
    vision = config.get("vision_config") or {}
    for key, mine in {
        "patch_size": spec.patch,
        "spatial_merge_size": spec.merge,
        "temporal_patch_size": spec.frames,
    }.items():
        if vision.get(key, mine) != mine:
            raise ValueError(f"{folder}: config.json says {key}={vision[key]}, preprocessor_config.json says {mine}")
    return spec
