"""Qwen2.5-VL: boxes as a JSON list in pixels of the resized image."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import torch
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.utils.generic import get_max_seqlen
from transformers.vision_utils import get_vision_window_index

from pr1.families.base import Family
from pr1.records import Answer, Frame, Item

MAX_CHARS = 100_000  # of an answer are looked at; 1,000 boxes take about 60,000
MAX_ITEMS = 2000  # of an answer are read
MAX_COORDINATE = 1e7  # what is larger is no coordinate
SPACE = re.compile(r"[ \t\r\n]*+")
# An object without inner objects, up to its closing brace, to the next opening brace, or to the end of the text.
FLAT = re.compile(r"\{[^{}]*+(\})?")
TRAILING_COMMA = re.compile(r",(?=\s*+[}\]])")
LABEL = re.compile(r'"label"\s*+:\s*+"([^"]*+)"')


class Qwen25Frame(Frame):
    """Text units are pixels of the image the model sees."""

    family = "qwen2_5_vl"

    @property
    def text_size(self) -> tuple[int, int]:
        return self.model_width, self.model_height


class Qwen25VL(Family):
    name = "qwen2_5_vl"
    frame_class = Qwen25Frame
    model_class = Qwen2_5_VLForConditionalGeneration

    def vision_inputs(self, model, grid: torch.Tensor) -> dict:
        """Also the tower's windows: most of its blocks attend inside squares of window_size pixels only."""
        config = self.visual(model).config
        order, bounds = get_vision_window_index(
            grid, spatial_merge_size=config.spatial_merge_size, window_size=config.window_size,
            patch_size=config.patch_size,
        )  # fmt: skip
        longest = get_max_seqlen(bounds, config)
        windows = {"window_index": order, "cu_window_seqlens": bounds, "max_window_seqlen": longest}
        return {**super().vision_inputs(model, grid), **windows}

    @staticmethod
    def format_boxes(items: Sequence[tuple[str, Sequence[int] | None]]) -> str:
        """One line, as `json.dumps` writes it (characters beyond ASCII stay themselves, as the model writes them):
        `[{"bbox_2d": [x1, y1, x2, y2], "label": "cat"}]`. A label whose box is None is left out; nothing is `[]`."""
        boxes = [(label, box) for label, box in items if box is not None]
        return json.dumps(
            [{"bbox_2d": [int(v) for v in box], "label": label} for label, box in boxes], ensure_ascii=False
        )

    @staticmethod
    def parse_boxes(text: str) -> Answer:
        """Read the objects of a JSON answer, however broken the rest of the text is.

        A text that is one JSON list of objects (in a ``` fence or not) is read by the JSON grammar. Any other text is
        searched for flat objects `{...}`: every closed one is an item, one that breaks off at a following `{` is an
        invalid item if it had named its `bbox_2d`, and one that the end of the text cuts is no item. A closed object
        is valid if it has a non-empty string `label` and a `bbox_2d` of four finite numbers with x1 <= x2, y1 <= y2;
        trailing commas are forgiven. Only the first 100,000 characters and 2,000 objects are looked at. `format_ok`
        asks for a JSON list, in a fence or not, of valid items only.
        """
        head = text[:MAX_CHARS]
        begin, end, closed = unfence(head)
        items = read_list(head, begin, end)
        if items is not None:
            whole = len(text) <= MAX_CHARS and len(items) < MAX_ITEMS
            return Answer(items, closed and whole and all(item.valid for item in items))
        return search_objects(head, begin, end)


def unfence(text: str) -> tuple[int, int, bool]:
    """The span of the text without surrounding white space and ``` or ```json fence, and whether an opened fence was
    closed (true when there is none)."""
    begin, end, closed = len(text) - len(text.lstrip()), len(text.rstrip()), True
    if text.startswith("```", begin):
        begin += 3
        if text[begin : begin + 4].lower() == "json":
            begin += 4
        closed = text.endswith("```", begin, end)
        end -= 3 * closed
        inner = text[begin:end]
        begin += len(inner) - len(inner.lstrip())
        end = begin + len(inner.strip())
    return begin, end, closed


def read_list(text: str, begin: int, end: int) -> tuple[Item, ...] | None:
    """The items when text[begin:end] is exactly one JSON list of objects, else None. One pass; deep nesting is refused
    by the JSON scanner's own limit."""
    if not text.startswith("[", begin):
        return None
    decoder, items = json.JSONDecoder(), []
    at = SPACE.match(text, begin + 1).end()
    if text.startswith("]", at):
        return () if at + 1 == end else None
    while text.startswith("{", at):
        try:
            value, stop = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        items.append(make_item(value, at, stop))
        if len(items) == MAX_ITEMS:
            return tuple(items)
        at = SPACE.match(text, stop).end()
        if text.startswith("]", at):
            return tuple(items) if at + 1 == end else None
        if not text.startswith(",", at):
            return None
        at = SPACE.match(text, at + 1).end()
    return None


def search_objects(text: str, begin: int, end: int) -> Answer:
    """The flat objects of text[begin:end]; `truncated` when an object is cut, or a list breaks off between objects."""
    items, first, last, cut = [], None, begin, False
    for match in FLAT.finditer(text, begin, end):
        first = match.start() if first is None else first
        last = match.end()
        if match[1]:
            items.append(make_item(read_object(match[0]), match.start(), last, match[0]))
        elif last == end:
            cut = True
        elif '"bbox_2d"' in match[0]:
            items.append(Item("", None, match.start(), last, valid=False))
        if len(items) == MAX_ITEMS:
            return Answer(tuple(items))
    before = text[begin : end if first is None else first].rstrip()
    after = "" if first is None else text[last:end].strip()
    return Answer(tuple(items), False, cut or (before.endswith("[") and after in ("", ",")))


def read_object(text: str):
    """The value of one flat object, trailing commas forgiven; None when it is not JSON."""
    if '"bbox_2d"' not in text:  # cannot become a valid item; also keeps a text full of {} cheap
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return json.loads(TRAILING_COMMA.sub("", text))
    except (ValueError, RecursionError):
        return None


def make_item(value, start: int, end: int, source: str = "") -> Item:
    """An item from a decoded object; from one that does not decode (None), whatever label its source shows."""
    if not isinstance(value, dict):
        found = LABEL.search(source)
        return Item(found[1] if found else "", None, start, end, valid=False)
    label, box = value.get("label"), read_box(value.get("bbox_2d"))
    label = label if isinstance(label, str) else ""
    if not label.isascii():  # an escaped lone surrogate is legal JSON but cannot be written to a file
        label = label.encode("utf-8", "replace").decode("utf-8")
    return Item(label, box, start, end, valid=bool(label) and box is not None)


def read_box(value) -> tuple[float, float, float, float] | None:
    """Four finite numbers of a sane size in order x1 <= x2, y1 <= y2, else None."""
    if not isinstance(value, list) or len(value) != 4 or not all(type(v) in (int, float) for v in value):
        return None
    if not all(-MAX_COORDINATE <= v <= MAX_COORDINATE for v in value):  # false for NaN too
        return None
    x1, y1, x2, y2 = map(float, value)
    return (x1, y1, x2, y2) if x1 <= x2 and y1 <= y2 else None
