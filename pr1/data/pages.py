"""Pages of text -> image records: JSONL of {"image": path, "text": str}, and rendered pages for training with nothing.

Rendered pages are lines of words in a 5x7 dot font of our own, so the same page has the same bytes on every machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from pr1.data.images import load_image, read_size, verify_images
from pr1.data.scenes import SPLITS, Draws
from pr1.records import ImageRecord, TextTarget


@dataclass(frozen=True)
class PageDataset(Sequence):
    """Image records in the order of the file."""

    records: tuple[ImageRecord, ...]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index):
        """A record; of a slice the data set of those records."""
        return replace(self, records=self.records[index]) if isinstance(index, slice) else self.records[index]


def load_pages(
    file: str | Path, images_dir: str | Path | None, *, verify: bool = True, log: Callable[[str], None] = print
) -> PageDataset:
    """Reads JSON lines {"image": path under images_dir, "text": str, optionally "id": str}.

    A record's id is its `id`, else its image path. images_dir=None reads the texts alone, to score predictions.
    verify=False skips decoding the images, not looking at their headers. Raises ValueError naming file, line and remedy.
    """
    records, seen, paths = [], {}, {}
    for number, entry in _lines(file):
        where = f"{file}, line {number}"
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("image", "text")):
            raise ValueError(f'{where}: {{"image": "page.png", "text": "..."}} is expected')
        name = entry["image"]
        record_id = str(entry.get("id", name))
        if seen.setdefault(record_id, number) != number:
            raise ValueError(f'{where}: {record_id!r} was on line {seen[record_id]} already; give each its own "id"')
        path = None if images_dir is None else Path(images_dir) / name
        size = (0, 0) if path is None else read_size(where, path)
        paths[path] = size
        records.append(ImageRecord(id=record_id, source=name, width=size[0], height=size[1],
                                   target=TextTarget(entry["text"]), categories=(),
                                   load=partial(load_image, path, size)))  # fmt: skip
    if not records:
        raise ValueError(f"{file}: no pages; the file is empty")
    if verify and images_dir is not None:
        verify_images(str(file), paths)
    log(f"{file}: {len(records)} pages, {sum(len(r.target.text) for r in records)} characters")
    return PageDataset(tuple(records))


def _lines(file: str | Path):
    """(line number, value) of each line that is not blank."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); give a JSONL file of pages in UTF-8 (--data)") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}, line {number}: not JSON ({error}); one object a line is expected") from None


# Rows of 5 dots, top to bottom, the leftmost dot the highest bit.
FONT = {
    c: tuple(int(row, 16) for row in rows.split())
    for c, rows in {
        "A": "E 11 11 1F 11 11 11", "B": "1E 11 11 1E 11 11 1E", "C": "E 11 10 10 10 11 E", "D": "1E 11 11 11 11 11 1E",
        "E": "1F 10 10 1E 10 10 1F", "F": "1F 10 10 1E 10 10 10", "H": "11 11 11 1F 11 11 11", "K": "11 12 14 18 14 12 11",
        "L": "10 10 10 10 10 10 1F", "M": "11 1B 15 15 11 11 11", "N": "11 19 15 13 11 11 11", "P": "1E 11 11 1E 10 10 10",
        "R": "1E 11 11 1E 14 12 11", "S": "F 10 10 E 1 1 1E", "T": "1F 4 4 4 4 4 4", "U": "11 11 11 11 11 11 E",
        "V": "11 11 11 11 11 A 4", "X": "11 11 A 4 A 11 11", "Y": "11 11 A 4 4 4 4", "Z": "1F 1 2 4 8 10 1F",
        "2": "E 11 1 2 4 8 1F", "3": "1F 2 4 2 1 11 E", "4": "2 6 A 12 1F 2 2", "7": "1F 1 2 4 8 8 8",
    }.items()
}  # fmt: skip
ALPHABET = "AEHLTNXUCDFKMPRSVYZB2347"  # easy pages use the first ones only
DOTS_WIDE, DOTS_HIGH, GAP = 5, 7, 1


@dataclass(frozen=True)
class PageOptions:
    """What rendered pages look like."""

    letters: int  # the first so many of ALPHABET
    lines: int  # at most
    words: int  # in a line, at most
    noise: int  # amplitude of the uniform pixel noise, grey levels of 255
    duplicates: float = 0.0  # share of lines transcribed twice: what a policy that repeats itself has learnt from
    dot: int = 3  # pixels a dot is wide and high

    @classmethod
    def at(cls, difficulty: float, duplicates: float = 0.0) -> PageOptions:
        """difficulty 0 to 1."""
        return cls(letters=8 + round(16 * difficulty), lines=1 + round(3 * difficulty), words=1 + round(difficulty),
                   noise=8 + round(40 * difficulty), duplicates=duplicates)  # fmt: skip


class RenderedPages(Sequence):
    """`size` pages of a split; page i depends on (split, i) and the options only."""

    def __init__(self, split: str, size: int, options: PageOptions):
        if split not in SPLITS:
            raise ValueError(f"split {split!r}: must be one of {', '.join(SPLITS)}")
        self.split, self.size, self.options = split, size, options

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> ImageRecord:
        if not 0 <= index < self.size:
            raise IndexError(f"page {index} of {self.size}")
        draws = Draws(0, STREAM + SPLITS.index(self.split), index)
        lines = [
            " ".join(_word(draws, self.options) for _ in range(draws.integer(1, self.options.words)))
            for _ in range(draws.integer(1, self.options.lines))
        ]
        pitch, leading = (DOTS_WIDE + GAP) * self.options.dot, (DOTS_HIGH + 2) * self.options.dot
        width = max(84, max(map(len, lines)) * pitch + draws.integer(8, 28))
        height = max(56, len(lines) * leading + draws.integer(8, 28))
        said = [line for line in lines for _ in range(1 + (draws.uniform() < self.options.duplicates))]
        return ImageRecord(
            id=f"{self.split}-{index}", source=f"page {index} of {self.split}", width=width, height=height,
            target=TextTarget("\n".join(said)), categories=(),
            load=partial(_render, lines, (width, height), self.options, self.split, index),
        )  # fmt: skip


STREAM = 100  # of the counter-based generator; scenes use others


def _word(draws: Draws, options: PageOptions) -> str:
    return "".join(ALPHABET[draws.integer(0, options.letters - 1)] for _ in range(draws.integer(2, 4)))


def _render(lines: Sequence[str], size: tuple[int, int], options: PageOptions, split: str, index: int) -> Image.Image:
    """Dark lines on a pale ground, from a place drawn so that all of them fit."""
    draws = Draws(1, STREAM + SPLITS.index(split), index)
    (width, height), dot = size, options.dot
    pitch, leading = (DOTS_WIDE + GAP) * dot, (DOTS_HIGH + 2) * dot
    left = draws.integer(2, width - max(map(len, lines)) * pitch)
    top = draws.integer(2, height - len(lines) * leading)
    page = np.full((height, width, 3), 255, np.int16) - draws.integer(0, 60)
    ink = np.array([draws.integer(0, 90) for _ in range(3)])
    for row, line in enumerate(lines):
        for column, letter in enumerate(line):
            if letter != " ":
                bits = np.array(FONT[letter])[:, None] >> np.arange(DOTS_WIDE)[::-1] & 1  # (7, 5)
                mask = np.kron(bits, np.ones((dot, dot), int)).astype(bool)
                y, x = top + row * leading, left + column * pitch
                page[y : y + mask.shape[0], x : x + mask.shape[1]][mask] = ink
    grain = draws.bytes(page.size).reshape(page.shape).astype(np.int16)
    page += (grain * (2 * options.noise + 1) >> 8) - options.noise
    return Image.fromarray(np.clip(page, 0, 255).astype(np.uint8))
