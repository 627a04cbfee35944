"""What the stages pass to one another: sample -> rollout -> reward -> advantage -> pack -> policy -> loss.

Plain frozen dataclasses; shapes and dtypes stand on the line. Names used in the shapes: P prompts of the global step,
G completions per prompt (the group), L prompt tokens, C completion tokens, T tokens of a pack, N loss rows of a pack.
Boxes are always `xyxy` float pixels of the original image unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from pr1.kernels import Rows

NONE = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Frame:
    """The coordinate frames of one image: original pixels, the pixels the model sees, and the units it writes.

    Each family subclasses it and says in `text_size` how far its text units reach along x and y.
    """

    width: int  # original image, pixels
    height: int
    model_width: int  # after the family's resize, pixels
    model_height: int

    family: ClassVar[str] = ""

    @property
    def text_size(self) -> tuple[int, int]:
        """Text units at the right and at the lower edge of the image."""
        raise NotImplementedError

    def scale_to_text(self, xyxy) -> np.ndarray:
        """(..., 4) original pixels -> (..., 4) text units, float64, before rounding."""
        tw, th = self.text_size
        return np.asarray(xyxy, np.float64) * np.array([tw / self.width, th / self.height] * 2)

    def to_text(self, xyxy) -> np.ndarray:
        """(..., 4) original pixels -> (..., 4) int64 text units, rounded and clipped to the image."""
        tw, th = self.text_size
        return np.clip(np.rint(self.scale_to_text(xyxy)), 0, np.array([tw, th] * 2)).astype(np.int64)

    def to_original(self, xyxy) -> np.ndarray:
        """(..., 4) text units -> (..., 4) float64 pixels of the original image. The inverse of `scale_to_text`."""
        tw, th = self.text_size
        return np.asarray(xyxy, np.float64) * np.array([self.width / tw, self.height / th] * 2)


@dataclass(frozen=True)
class Sample:
    """One prompt with its images and what is known of the right answer."""

    id: str
    task: str
    messages: list[dict]  # chat messages; an image stands as {"type": "image"} in a content list, in order of `images`
    images: tuple  # PIL RGB images
    frames: tuple[Frame, ...]  # one per image
    target: Any  # the task's own; for det a BoxTarget


@dataclass(frozen=True)
class BoxTarget:
    """Objects to be found in an image."""

    boxes: np.ndarray  # (n, 4) float64 xyxy original pixels
    labels: tuple[str, ...]  # n names
    ignore: np.ndarray  # (n,) bool: crowd regions, never a target
    image: int = 0  # index into Sample.images
    image_id: int = 0  # id in the annotation file, for COCO evaluation
    areas: np.ndarray | None = None  # (n,) float64 annotated areas (pixels squared); None means the boxes' own
    categories: tuple[str, ...] = ()  # every class of the data set, where a sample's task needs them


@dataclass(frozen=True)
class NamedTarget(BoxTarget):
    """Objects of one name, to be found or counted. A point is a box without area; where only a number is known there
    are no boxes."""

    name: str = ""
    count: int = 0


@dataclass(frozen=True)
class TextTarget:
    """Text to be read in an image."""

    text: str


@dataclass(frozen=True)
class ImageInput:
    """One preprocessed image."""

    key: str  # hash of content and size: equal keys, equal pixels
    pixels: torch.Tensor  # (patches, channels*time*patch*patch) float32
    grid: tuple[int, int, int]  # (t, h, w) in patches


@dataclass(frozen=True)
class Prompt:
    """A sample as the model reads it."""

    ids: torch.Tensor  # (L,) int64, image tokens expanded
    position_ids: torch.Tensor  # (3, L) int64 m-RoPE rows t, h, w
    images: tuple[ImageInput, ...]
    image_rows: torch.Tensor = NONE  # (I,) int64, where the image tokens are

    @property
    def next_position(self) -> int:
        """Position of the first completion token: the largest position in any row plus one."""
        return int(self.position_ids.max()) + 1


@dataclass(frozen=True)
class Rollout:
    """One completion of one prompt."""

    prompt: int  # index of the prompt in the global step
    completion: int  # 0..G-1
    inputs: Prompt
    completion_ids: torch.Tensor  # (C,) int64, the stop token included when it was drawn
    loss_mask: torch.Tensor  # (C,) bool
    logp_rollout: torch.Tensor  # (C,) float32, full softmax at the sampling temperature
    log_kept: torch.Tensor  # (C,) float32, log of the probability mass the sampler drew from
    entropy: torch.Tensor  # (C,) float32, nats
    text: str
    finished: bool  # False: cut at max_new_tokens

    @property
    def prompt_ids(self) -> torch.Tensor:
        return self.inputs.ids


@dataclass(frozen=True)
class Segments:
    """Attention inside a pack: query rows cu_q[i]:cu_q[i+1] see the keys kv_index[cu_k[i]:cu_k[i+1]], causal and
    aligned at the end (the last query sees every key of its segment)."""

    cu_q: torch.Tensor  # (S+1,) int32
    cu_k: torch.Tensor  # (S+1,) int32
    kv_index: torch.Tensor  # (K,) int64, rows of the pack
    max_q: int
    max_k: int


@dataclass(frozen=True)
class Pack:
    """Several groups in one stream, without padding."""

    ids: torch.Tensor  # (T,) int64
    position_ids: torch.Tensor  # (3, T) int64
    segments: Segments
    row_index: torch.Tensor  # (N,) int64: the stream row whose hidden state predicts rows.tokens[i]
    rows: Rows
    images: tuple[ImageInput, ...] = ()  # in stream order
    image_rows: torch.Tensor = NONE  # (I,) int64, the stream rows of the image tokens


@dataclass(frozen=True)
class Item:
    """One object of an answer."""

    label: str
    box: tuple[float, float, float, float] | None  # text units of the family, as written; None: no usable box
    start: int  # character span in the text
    end: int
    valid: bool = True  # False: an object was begun but is malformed; it counts as a wrong prediction


@dataclass(frozen=True)
class Answer:
    """What was read out of a completion."""

    items: tuple[Item, ...] = field(default=())
    format_ok: bool = False  # the whole text is one well-formed answer of the family
    truncated: bool = False  # the text ends inside an answer


@dataclass(frozen=True)
class ImageRecord:
    """One annotated image of a dataset, not yet decoded or rendered."""

    id: str  # unique in the dataset
    source: str  # file name, or "scene 17 of val": what an error message names
    width: int
    height: int
    target: Any  # BoxTarget or another the task knows
    categories: tuple[str, ...]  # every category of the dataset, in its order
    load: Callable[[], Any]  # () -> PIL RGB image of width x height; raises ValueError naming the source
