"""JSON lines and whole files that survive a kill: one write per line, atomic replacement for everything else."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


def jsonable(value, nonfinite: Callable[[float], str | None] = lambda value: None):
    """The same value in plain JSON types: NaN and infinities become what `nonfinite` makes of them, tuples lists,
    tensors and arrays (nested lists of) numbers, anything else its str."""
    if isinstance(value, dict):
        return {str(k): jsonable(v, nonfinite) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v, nonfinite) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted((jsonable(v, nonfinite) for v in value), key=str)
    if hasattr(value, "tolist"):  # tensors, arrays and their scalars
        return jsonable(value.tolist(), nonfinite)
    if isinstance(value, float):
        return value if math.isfinite(value) else nonfinite(value)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def encode_line(record: dict) -> bytes:
    """One JSONL line, newline included. NaN, infinities and other non-JSON values become what `jsonable` says."""
    return (json.dumps(jsonable(record), allow_nan=False) + "\n").encode()


def parse_line(line: bytes) -> dict | None:
    """The JSON object with an integer "step" that a complete line holds, else None."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(record, dict) and isinstance(record.get("step"), int) and not isinstance(record["step"], bool)
    return record if whole else None


def read_lines(path: Path) -> Iterator[dict]:
    """The JSON objects with an integer "step" of a JSONL file, in order. Other lines, a partial last one included, are
    skipped; a missing file has none."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            record = parse_line(line)
            if record is not None:
                yield record


def append_lines(path: Path, records: Iterable[dict]) -> None:
    """Append records to a JSONL file by one write; a partial line that a kill left at its end is closed off first."""
    content = b"".join(encode_line(record) for record in records)
    descriptor = open_append(path)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            content = b"\n" + content
        write_all(descriptor, content)
    finally:
        os.close(descriptor)


def open_append(path: Path) -> int:
    """A descriptor whose writes land at the end of the file, whoever else writes to it."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)


def write_all(descriptor: int, content: bytes) -> None:
    """Write everything, by one system call wherever the system allows it."""
    written = os.write(descriptor, content)
    while written < len(content):  # above 2 GiB, or on a full disk, where the next call raises
        written += os.write(descriptor, content[written:])


def rewind_lines(path: Path, discarded: Path, step: int) -> None:
    """Move the complete lines of `path` with "step" >= step, and those that hold no step, to the end of `discarded`.

    Their order is kept; a partial last line is dropped. Both files are replaced atomically, `discarded` first: a kill
    between the two loses nothing, and doing it again moves nothing twice.
    """
    if not path.exists():
        return
    moved, partial = [], False
    with open(path, "rb") as file:
        for line in file:
            partial = not line.endswith(b"\n")
            if not partial and not _before(line, step):
                moved.append(line)
    if moved:
        old = discarded.read_bytes() if discarded.exists() else b""
        if not old.endswith(b"".join(moved)):  # else they are there already, from a rewind killed half-way
            write_atomic(discarded, [old, *moved])
    if moved or partial:
        with open(path, "rb") as file:
            write_atomic(path, (line for line in file if _before(line, step)))


def _before(line: bytes, step: int) -> bool:
    record = parse_line(line)
    return record is not None and record["step"] < step


def write_atomic(path: Path, chunks: Iterable[bytes]) -> None:
    """Replace a file so that it holds either its old or its new bytes whatever happens, power cuts included."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.writelines(chunks)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Push the content of a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
