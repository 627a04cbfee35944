"""Predictions files: one JSON line for each record answered."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path


def write_predictions(file: str | Path, predictions: Iterable[Mapping], ids: Mapping[str, int] | None = None) -> None:
    """Writes one JSON line a record; `ids`: category ids by name, which items of a known label get too."""
    ids = ids or {}
    with open(file, "w", encoding="utf-8") as out:
        for line in predictions:
            items = [{**i, "category_id": ids[i["label"]]} if i["label"] in ids else dict(i) for i in line["items"]]
            out.write(json.dumps({**line, "items": items}, ensure_ascii=False, allow_nan=False) + "\n")


def read_answers(file: str | Path) -> list[dict]:
    """Lines with `id` (str, once each), `text` (str) and `items` (a list; absent: none).

    Raises ValueError naming the file, the line and the remedy.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot read the predictions ({error}); give the file that eval.py wrote") from error
    lines, seen = [], {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error}); one object a line is expected") from None
        wrong = not isinstance(entry, dict) or not isinstance(entry.get("id"), str)
        if wrong or not isinstance(entry.get("text"), str) or not isinstance(entry.get("items", []), list):
            raise ValueError(f'{where}: {{"id": str, "text": str, "items": [...]}} is expected, as eval.py writes it')
        if seen.setdefault(entry["id"], number) != number:
            raise ValueError(f"{where}: id {entry['id']!r} was on line {seen[entry['id']]} already; keep one of them")
        lines.append({"items": [], **entry})
    return lines
