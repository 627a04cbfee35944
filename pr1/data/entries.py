"""Annotation files that are lists of entries: JSON Lines, or one JSON list, each entry naming its image."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pr1.data.images import read_size


def read_entries(file: str | Path, expected: str) -> list[tuple[str, dict]]:
    """[(where, entry)]: `where` names file and line (JSON Lines) or file and entry (a list, from 0).

    Raises ValueError naming the place and `expected`, what an entry looks like.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); give a JSON or JSONL file in UTF-8 (--data)") from error
    if text.lstrip().startswith("["):
        values = [(f"{file}, entry {i}", value) for i, value in enumerate(_loads(str(file), text, expected))]
    else:
        lines = ((f"{file}, line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip())
        values = [(where, _loads(where, line, expected)) for where, line in lines]
    if not values:
        raise ValueError(f"{file}: no entries; {expected} is expected for each")
    for where, value in values:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: {expected} is expected")
    return values


def _loads(where: str, text: str, expected: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}); {expected} is expected") from None


class ImageFiles:
    """The images entries name, under one folder; `sizes` is what `verify_images` takes. Each header is read once."""

    def __init__(self, folder: str | Path | None):
        if folder is not None and not os.path.isdir(folder):
            raise ValueError(f"{folder}: there is no such folder of images (--images)")
        self.folder, self.sizes = folder, {}

    def find(self, where: str, entry: dict) -> tuple[str, str | None, tuple[int, int]]:
        """(name, path, (width, height)) of an entry's image: the size it states, else that of the file.

        Without a folder the path is None and a size that is not stated (0, 0). Raises ValueError if there is none.
        """
        name = first(entry, "image", "image_path")
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f'{where}: no image; write its path from --images, "image": "folder/name.jpg"')
        size = (entry.get("width"), entry.get("height"))
        stated = all(type(v) is int and v > 0 for v in size)
        if self.folder is None:
            return name, None, size if stated else (0, 0)
        path = os.path.join(self.folder, name)
        if path not in self.sizes:
            found = read_size(where, path)
            self.sizes[path] = size if stated else found  # a stated one is compared with the file's when verified
        return name, path, self.sizes[path]


def first(entry: dict, *keys: str):
    """The value of the first of the keys that the entry has."""
    return next((entry[key] for key in keys if key in entry), None)


def numbers(value, n: int) -> np.ndarray | None:
    """(n,) float64 when value is a list of n finite numbers, else None."""
    ok = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == n
    if not ok or not all(type(v) in (int, float) and abs(v) <= 1e9 for v in value):
        return None
    return np.array(value, np.float64)


def short(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
