"""What the trainer asks of a model family, and the machinery the Qwen vision-language families share.

A family is the one place that knows a model's chat template, image preprocessing, coordinate frame, m-RoPE positions,
vision call, forbidden tokens and box syntax. `pr1/families/<family>.py` adds what is special to one of them.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer
from transformers.vision_utils import get_vision_attention_seqlens, get_vision_position_ids

from pr1.families.decoder import step_hidden
from pr1.families.messages import as_list, byte_alphabet, check_messages
from pr1.families.preprocessing import BICUBIC, read_image_spec, read_json, resized
from pr1.records import Answer, Frame, ImageInput, Prompt, Sample

TEMPLATE_CACHE = 4096  # rendered and tokenized prompts kept; a dataset with one fixed prompt needs a single entry
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")


class Family:
    """A Qwen-style vision-language model: tokenizer, preprocessing, positions and answer syntax.

    `folder` holds the small files (config, tokenizer, preprocessing); `source` is what the user named and where the
    weights come from. Made by `pr1.families.load_family`.
    """

    name: ClassVar[str]
    frame_class: ClassVar[type[Frame]]
    model_class: ClassVar[Any]  # the transformers class for conditional generation

    def __init__(
        self, folder: str, *, source: str | None = None, max_pixels: int | None = None, min_pixels: int | None = None
    ):
        self.folder = str(folder)
        self.source = source or self.folder
        where = Path(folder)
        self.spec = read_image_spec(where, read_json(where, "config.json") or {}, max_pixels, min_pixels)
        self._table = self.spec.table()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder}: the tokenizer does not load ({error})") from None
        known = self.tokenizer.get_vocab()
        missing = [token for token in (*VISION_TOKENS, *STOP_TOKENS) if token not in known]
        if missing:
            raise ValueError(f"{folder}: the tokenizer lacks {', '.join(missing)}; a {self.name} model needs them")
        self.stop_ids: tuple[int, ...] = tuple(known[token] for token in STOP_TOKENS)
        self.vision_ids: tuple[int, ...] = tuple(known[token] for token in VISION_TOKENS)
        self.image_token_id: int = known["<|image_pad|>"]
        self.video_token_id: int = known["<|video_pad|>"]
        self.tokenizer.chat_template = self._chat_template(where)
        self._prompts: dict[str, np.ndarray] = {}
        self._pieces: dict[int, bytes] = {}
        self._alphabet = byte_alphabet()
        self._added = self.tokenizer.added_tokens_decoder

    def _chat_template(self, folder: Path) -> str:
        """The template that knows images: the processor's files first, a tokenizer may carry a text-only one."""
        jinja = folder / "chat_template.jinja"
        candidates = [
            jinja.read_text(encoding="utf-8") if jinja.is_file() else None,
            (read_json(folder, "chat_template.json") or {}).get("chat_template"),
            self.tokenizer.chat_template,
        ]
        for template in candidates:
            if isinstance(template, str) and "<|image_pad|>" in template:
                return template
        raise ValueError(f"{folder}: no chat template that places images; add the model's chat_template.json")

    def save_pretrained(self, folder: str) -> None:
        """Write tokenizer, chat template and preprocessing numbers (with the pixel limits in use) beside saved weights,
        so that `load_family(folder)` and transformers' own processor read the folder alike."""
        self.tokenizer.save_pretrained(folder)
        spec = self.spec
        numbers = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "size": {"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels},
            "min_pixels": spec.min_pixels, "max_pixels": spec.max_pixels,
            "patch_size": spec.patch, "merge_size": spec.merge, "temporal_patch_size": spec.frames,
            "image_mean": list(spec.mean), "image_std": list(spec.std),
            "rescale_factor": spec.scale, "resample": BICUBIC,
        }  # fmt: skip
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")

    # ---- the model ------------------------------------------------------------------------------------------------

    def check_weights(self) -> None:
        """ValueError when weight files of a model folder are missing or cut, which their headers tell. The files of a
        hub name come when the model is loaded; weights in another format than safetensors are not looked at."""
        folder = Path(self.source)
        if not folder.is_dir() or (any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors"))):
            return
        shards = (read_json(folder, "model.safetensors.index.json") or {}).get("weight_map", {})
        for name in sorted(set(shards.values())) or ["model.safetensors"]:
            try:
                with safe_open(folder / name, "pt"):
                    pass
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"model {self.source}: the weights {name} cannot be read ({error}); copy or download them again"
                ) from None

    def load_model(self, dtype: torch.dtype):
        """The transformers model with its weights in `dtype`, on the CPU."""
        return self.model_class.from_pretrained(self.source, dtype=dtype, attn_implementation="sdpa")

    @staticmethod
    def language_model(model):
        """The decoder stack: takes (1, T, H) embeddings and (3, 1, T) positions."""
        return model.model.language_model

    step_hidden = staticmethod(step_hidden)  # one token per sequence through that stack

    @staticmethod
    def visual(model):
        """The vision tower with its merger."""
        return model.model.visual

    def vision_inputs(self, model, grid: torch.Tensor) -> dict:
        """What transformers' tower would work out from grid (images, 3) int64 on its device, with a host sync each:
        rotary positions, window bounds (int32) and their largest lengths (int), computed on the CPU."""
        tower = self.visual(model)
        bounds, longest = get_vision_attention_seqlens(grid, tower.config)
        positions = get_vision_position_ids(grid, tower.spatial_merge_size)
        return {"position_ids": positions, "cu_seqlens": bounds, "max_seqlen": longest}

    def image_features(self, model, images: Sequence[ImageInput]) -> list[tuple[torch.Tensor, ...]]:
        """Per image a tuple of tensors to be put into the model, here one (tokens, H); a single vision call for all."""
        if not images:
            return []
        device = next(self.visual(model).parameters()).device
        pixels = torch.cat([image.pixels for image in images]).to(device, non_blocking=True)
        grid = torch.tensor([image.grid for image in images], dtype=torch.int64)  # stays on the CPU
        known = {name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
                 for name, value in self.vision_inputs(model, grid).items()}  # fmt: skip
        return [
            (each,) for each in model.model.get_image_features(pixels, grid, return_dict=True, **known).pooler_output
        ]

    def embed(self, model, ids: torch.Tensor, features: Sequence[tuple[torch.Tensor, ...]],
              rows: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
        """ids (T,) int64, features of the images in stream order, rows (I,) int64 of the image tokens (found in ids,
        with a host sync, when not given) -> (T, H) input embeddings, differentiable in both the embedding matrix and
        the features. ValueError when image tokens and feature rows differ in number."""
        hidden = self.language_model(model).embed_tokens(ids)
        if rows is None:
            rows = (ids == self.image_token_id).nonzero()[:, 0]
        tokens, found = len(rows), sum(len(each[0]) for each in features)
        if tokens != found:
            raise ValueError(f"{tokens} image tokens in the stream but {found} rows of image features")
        if not tokens:
            return hidden
        values = torch.cat([each[0] for each in features]).to(hidden.device, hidden.dtype)
        return hidden.index_copy(0, rows, values)

    def banned_ids(self, vocab_size: int) -> torch.Tensor:
        """(vocab_size,) bool, True for tokens that a sampler must never draw: those that stand for images or video, and
        the rows of a padded vocabulary that are no token. Box and object-ref tokens stay allowed."""
        banned = torch.zeros(vocab_size, dtype=torch.bool)
        banned[list(self.vision_ids)] = True
        banned[len(self.tokenizer) :] = True
        return banned

    # ---- prompts --------------------------------------------------------------------------------------------------

    def frame(self, width: int, height: int) -> Frame:
        """The coordinate frames of an image of width x height pixels. ValueError for an impossible size."""
        return self.frame_class(width, height, *resized(width, height, self.spec))

    def _image_tokens(self, frame: Frame) -> int:
        return (frame.model_width // self.spec.factor) * (frame.model_height // self.spec.factor)

    def _text_ids(self, messages: list[dict], count: int, who: str) -> np.ndarray:
        """The templated prompt as token ids (int64) with a single image token per image, checked against `count`."""
        key = json.dumps(messages, default=lambda value: type(value).__name__)
        ids = self._prompts.get(key)
        if ids is None:
            check_messages(messages, who)
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)
            if len(self._prompts) >= TEMPLATE_CACHE:
                self._prompts.clear()
            self._prompts[key] = ids
        if (ids == self.video_token_id).any():
            raise ValueError(f"{who}: the text contains <|video_pad|>; video is not supported, remove it")
        placeholders = int((ids == self.image_token_id).sum())
        if placeholders != count:
            raise ValueError(
                f"{who}: the messages hold {placeholders} image placeholders but the sample has {count} images; "
                'give one {"type": "image"} per image and keep <|image_pad|> out of the text'
            )
        return ids

    def prompt_length(self, messages: list[dict], frames: Sequence[Frame]) -> int:
        """Tokens of the prompt with images of these frames, known without touching a pixel. ValueError as `encode`."""
        ids = self._text_ids(messages, len(frames), "the prompt")
        return len(ids) + sum(self._image_tokens(frame) - 1 for frame in frames)

    def encode(self, sample: Sample) -> Prompt:
        """Template, tokens, pixels and positions of a sample, ready for the model.

        ValueError naming the sample: video content, images in assistant turns, placeholders and images that differ in
        number, or a frame that is not this family's frame of its image.
        """
        who = f"sample {sample.id}"
        if len(sample.frames) != len(sample.images):
            raise ValueError(f"{who}: {len(sample.images)} images but {len(sample.frames)} frames")
        ids = self._text_ids(sample.messages, len(sample.images), who)
        for number, (image, frame) in enumerate(zip(sample.images, sample.frames, strict=True)):
            if frame != self.frame(*image.size):
                raise ValueError(
                    f"{who}: image {number} is {image.width}x{image.height} pixels, its frame is {frame}; "
                    "make frames with this family's frame() from the size of the image that is passed"
                )
        images = tuple(
            self.image_input(image, frame) for image, frame in zip(sample.images, sample.frames, strict=True)
        )
        repeats = np.ones(len(ids), np.int64)
        repeats[ids == self.image_token_id] = [self._image_tokens(frame) for frame in sample.frames]
        ids = np.repeat(ids, repeats)
        rows = torch.from_numpy(np.flatnonzero(ids == self.image_token_id))
        return Prompt(torch.from_numpy(ids), self.positions(ids, [image.grid for image in images]), images, rows)

    def image_input(self, image: Image.Image, frame: Frame) -> ImageInput:
        """Resize, normalise and cut an RGB image into patches, with the values of transformers' PIL image processor.

        Pixels (patches, 3 * frames * patch * patch) float32; patches run over merge x merge blocks, so that the rows of
        one token are neighbours. Cutting bytes and looking their values up afterwards halves the time of the reference.
        """
        spec, size = self.spec, (frame.model_width, frame.model_height)
        image = image if image.mode == "RGB" else image.convert("RGB")
        pixels = np.asarray(image.resize(size, resample=BICUBIC))  # (height, width, 3) uint8
        rows, columns, merge, patch = size[1] // spec.patch, size[0] // spec.patch, spec.merge, spec.patch
        cut = pixels.reshape(rows // merge, merge, patch, columns // merge, merge, patch, 3)
        cut = cut.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, 3, 1, patch * patch)
        values = np.empty((rows * columns, 3, spec.frames, patch * patch), np.float32)
        for channel in range(3):
            values[:, channel] = np.take(self._table[channel], cut[:, channel], mode="clip")
        # The resized bytes and their shape determine the pixels; a digest of them is the image's identity in caches.
        digest = hashlib.blake2b(pixels.tobytes(), digest_size=16, person=b"%dx%d" % size).hexdigest()
        return ImageInput(digest, torch.from_numpy(values.reshape(rows * columns, -1)), (1, rows, columns))

    def positions(self, ids, grids: Sequence[Sequence[int]]) -> torch.Tensor:
        """ids (L,) with expanded image tokens, grids (t, h, w) in patches -> (3, L) int64 m-RoPE rows t, h, w.

        Text advances all three rows together; the tokens of an image take (t, h, w) of their place in the merged grid,
        counted from the position the image begins at, and the text behind goes on at that position plus
        max(h, w) (Qwen2-VL, arXiv 2409.12191, section 2.1). ValueError when image tokens and grids disagree.
        """
        ids, merge = np.asarray(ids), self.spec.merge
        out = np.empty((3, len(ids)), np.int64)
        pads = np.flatnonzero(ids == self.image_token_id)
        cells = [(t, h // merge, w // merge) for t, h, w in grids]
        if len(pads) != sum(t * h * w for t, h, w in cells):
            raise ValueError(f"{len(pads)} image tokens do not fit the image grids {[tuple(grid) for grid in grids]}")
        done = position = used = 0
        for t, h, w in cells:
            first, count = int(pads[used]), t * h * w
            if pads[used + count - 1] != first + count - 1:
                raise ValueError(
                    f"the image tokens from {first} on are not {count} in a row, as grid {(t, h, w)} needs"
                )
            out[:, done:first] = position + np.arange(first - done)
            position += first - done
            out[:, first : first + count] = position + np.indices((t, h, w)).reshape(3, count)
            position += max(h, w)
            done, used = first + count, used + count
        out[:, done:] = position + np.arange(len(ids) - done)
        return torch.from_numpy(out)

    # ---- answers --------------------------------------------------------------------------------------------------

    def _piece(self, token: int) -> bytes:
        """The bytes a token stands for; none for stop tokens and for ids that are no token."""
        piece = self._pieces.get(token)
        if piece is None:
            text = self.tokenizer.convert_ids_to_tokens(token) if token < len(self.tokenizer) else None
            if text is None or token in self.stop_ids:
                piece = b""
            elif token in self._added:
                piece = self._added[token].content.encode()
            else:
                piece = bytes(self._alphabet[char] for char in text)
            self._pieces[token] = piece
        return piece

    def decode(self, ids) -> str:
        """The text of a completion (tensor or sequence of ids) without its stop tokens. Other special tokens, such as
        the box tokens, stay; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self._piece, as_list(ids))).decode("utf-8", "replace")

    def token_spans(self, ids) -> list[tuple[int, int]]:
        """The half-open character span of each token in `decode(ids)`. Tokens that hold parts of one multi-byte
        character share it; tokens without text (stop tokens) have an empty span."""
        decoder, spans = codecs.getincrementaldecoder("utf-8")("replace"), []
        done, pending = 0, False  # whole characters so far; whether the bytes of one more have begun
        for token in as_list(ids):
            start = end = done
            piece = self._piece(token)
            if piece.isascii() and not pending:
                done = end = done + len(piece)
                piece = b""
            for i, byte in enumerate(piece):
                done += len(decoder.decode(bytes([byte])))
                pending = bool(decoder.getstate()[0])
                end = done + pending  # this byte's character is the pending one, else the last whole one
                start = end - 1 if i == 0 else start
            spans.append((start, end))
        return spans

    @staticmethod
    def format_boxes(items: Sequence[tuple[str, Sequence[int] | None]]) -> str:
        """(label, integer box in text units) pairs -> the family's answer text. Box None: there is no such object."""
        raise NotImplementedError

    @staticmethod
    def parse_boxes(text: str) -> Answer:
        """Any text -> the objects in it, with exact character spans. Never raises; time is linear in the text."""
        raise NotImplementedError
