"""Qwen2-VL: boxes between special tokens, in thousandths of the image."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import Qwen2VLForConditionalGeneration

from pr1.families.base import Family
from pr1.records import Answer, Frame, Item

MAX_CHARS = 100_000  # of an answer are looked at; 1,000 boxes take about 100,000
MAX_ITEMS = 2000  # of an answer are read
EMPTY = "none"  # the answer when nothing is to be named; the native syntax has no empty list
MARK = re.compile(r"<\|(object_ref|box)_(start|end)\|>")
NUMBER = r"\s*+([-+]?[0-9]{1,7}(?:\.[0-9]{1,20})?)\s*+"  # longer ones are no coordinates
BOX = re.compile(rf"\s*+\({NUMBER},{NUMBER}\)\s*+,\s*+\({NUMBER},{NUMBER}\)\s*+")


class Qwen2Frame(Frame):
    """Text units are thousandths of the image's width and height."""

    family = "qwen2_vl"

    @property
    def text_size(self) -> tuple[int, int]:
        return 1000, 1000


class Qwen2VL(Family):
    name = "qwen2_vl"
    frame_class = Qwen2Frame
    model_class = Qwen2VLForConditionalGeneration

    @staticmethod
    def format_boxes(items: Sequence[tuple[str, Sequence[int] | None]]) -> str:
        """`<|object_ref_start|>cat<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>`, one after the other. A
        box of None leaves the phrase alone: there is no such object. No items at all: the word `none`."""
        parts = []
        for label, box in items:
            parts.append(f"<|object_ref_start|>{label}<|object_ref_end|>")
            if box is not None:
                x1, y1, x2, y2 = (int(v) for v in box)
                parts.append(f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>")
        return "".join(parts) or EMPTY

    @staticmethod
    def parse_boxes(text: str) -> Answer:
        """Read the boxes of a native Qwen2-VL answer, whatever stands around them.

        Each `<|box_start|>...<|box_end|>` is an item labelled by the phrase before it; several boxes may follow one
        phrase. The first one's span begins at its phrase, the others' at their own start. A phrase without a box says
        that there is no such object and is no item. A box that breaks off at another special token, or is not four
        numbers in order x1 <= x2, y1 <= y2, is an invalid item without a box, one without a phrase an invalid item with
        its box; one that the end of the text cuts is no item. Only the first 100,000 characters and 2,000 boxes are
        looked at. `format_ok`: nothing but phrases, each followed by its boxes, and white space, or the word
        `none` alone.
        """
        head = text[:MAX_CHARS]
        if head.strip().rstrip(".").lower() == EMPTY:
            return Answer((), len(text) <= MAX_CHARS)
        reader = _Reader(head)
        for mark in MARK.finditer(head):
            reader.take(mark)
            if len(reader.items) == MAX_ITEMS:
                return Answer(tuple(reader.items))
        return reader.answer(whole=len(text) <= MAX_CHARS)


class _Reader:
    """Walks over the special tokens of an answer once, from left to right."""

    def __init__(self, text: str):
        self.text, self.items, self.clean = text, [], True
        self.label, self.phrase = "", None  # of the last whole phrase; where it began, until its first box takes it
        self.open, self.begin, self.inner = "", 0, 0  # "object_ref" or "box" that is open, where it and its text begin
        self.rest = 0  # end of the last whole part

    def take(self, mark: re.Match) -> None:
        kind, edge = mark[1], mark[2]
        if self.open and (edge == "start" or kind != self.open):  # the open part breaks off here
            self.clean = False
            if self.open == "box":
                self._add("", mark.start())
            self.open, self.rest = "", mark.start()
        if edge == "start":
            self.clean = self.clean and not self.text[self.rest : mark.start()].strip()
            if kind == "object_ref":
                self.label, self.phrase = "", None
            self.open, self.begin, self.inner = kind, mark.start(), mark.end()
            return
        if not self.open:
            self.clean = False
        elif kind == "object_ref":
            self.label, self.phrase = self.text[self.inner : mark.start()].strip(), self.begin
            self.clean = self.clean and bool(self.label)
        else:
            self._add(self.text[self.inner : mark.start()], mark.end())
        self.open, self.rest = "", mark.end()

    def _add(self, inside: str, end: int) -> None:
        found, box = BOX.fullmatch(inside), None
        if found:
            x1, y1, x2, y2 = map(float, found.groups())
            box = (x1, y1, x2, y2) if x1 <= x2 and y1 <= y2 else None
        start = self.begin if self.phrase is None else self.phrase
        self.items.append(Item(self.label, box, start, end, valid=bool(self.label) and box is not None))
        self.phrase = None

    def answer(self, whole: bool) -> Answer:
        clean = self.clean and whole and not self.open and self.rest > 0 and not self.text[self.rest :].strip()
        return Answer(tuple(self.items), clean and all(item.valid for item in self.items), bool(self.open))
