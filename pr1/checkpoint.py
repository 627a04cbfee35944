"""Checkpoints: `checkpoints/step-N`, a model folder for `from_pretrained` with the trainer's state beside it.

`step-N` holds the state after steps 0 .. N-1. It is written under another name, pushed to the disk and then renamed, so
a folder of that name is whole whatever happens; it is deleted by renaming it away first.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from pr1.lines import fsync

PLAIN = (int, float, bool, str, bytes, type(None))


def save_checkpoint(folder: Path | str, step: int, write: Callable[[Path], None], keep: int) -> Path:
    """Write `<folder>/checkpoints/step-<step>` and delete the oldest checkpoints beyond `keep` (0 keeps all).

    write(path) fills an empty folder: `save_pretrained` and `save_trainer_state`. Call it on rank 0 only, with what
    other ranks hold gathered before, and after the metrics of step-1 are written: they are pushed to the disk with it.
    A run resumes from its newest checkpoint, so a `step-N` that exists already is this very state and is left as it is.
    What `write` raises passes through and leaves no checkpoint. Raises ValueError for a negative step or keep.
    """
    if step < 0 or keep < 0:
        raise ValueError(f"step and keep must not be negative, got {step} and {keep}")
    root = Path(folder) / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    remove_stale(folder)
    final = root / f"step-{step}"
    if not final.exists():
        temporary = root / f".tmp-step-{step}-{os.getpid()}"
        temporary.mkdir()
        try:
            write(temporary)
            _fsync_tree(temporary)
            if (Path(folder) / "metrics.jsonl").exists():
                fsync(Path(folder) / "metrics.jsonl")
            os.rename(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync(root)
        fsync(root.parent)
    _prune(root, keep)
    return final


def remove_stale(folder: Path | str) -> None:
    """Delete what a killed process left half written or half deleted. Only for the one writer, who holds the lock."""
    for stale in (Path(folder) / "checkpoints").glob(".tmp-*"):
        shutil.rmtree(stale)


def checkpoint_step(path: Path) -> int | None:
    """N of a folder named step-N, else None."""
    match = re.fullmatch(r"step-(\d+)", path.name)
    return int(match.group(1)) if match else None


def checkpoints(folder: Path | str) -> list[Path]:
    """The whole checkpoints of a run folder, oldest first."""
    root = Path(folder) / "checkpoints"
    found = [p for p in root.iterdir() if checkpoint_step(p) is not None and p.is_dir()] if root.is_dir() else []
    return sorted(found, key=checkpoint_step)


def newest_checkpoint(folder: Path | str) -> Path | None:
    """The whole checkpoint with the most steps, or None."""
    return (checkpoints(folder) or [None])[-1]


def _prune(root: Path, keep: int) -> None:
    for old in checkpoints(root.parent)[:-keep] if keep else []:
        doomed = root / f".tmp-{old.name}-old"  # a kill while deleting must not leave half a step-N
        os.rename(old, doomed)
        shutil.rmtree(doomed)


def _fsync_tree(root: Path) -> None:
    for folder, _, files in os.walk(root, topdown=False):
        for name in files:
            fsync(Path(folder) / name)
        fsync(Path(folder))


def save_trainer_state(path: Path | str, state: dict) -> None:
    """Write everything a resume needs beside the weights to the file `path`, inside the checkpoint folder.

    state: nested dicts (keys str or int), lists and tuples of torch tensors and parameters, int, float, bool, str,
    bytes and None: what torch.load reads back without running code. Raises ValueError naming any other value; NumPy
    arrays go in as torch.from_numpy(array). A view is stored with the whole of its storage.
    """
    _check_plain(state, "state")
    torch.save(state, path)


def _check_plain(value, name: str) -> None:
    kind = type(value)
    if kind is dict:
        for key, entry in value.items():
            if type(key) not in (str, int):
                raise ValueError(f"{name} has a key of type {type(key).__name__}, allowed are str and int")
            _check_plain(entry, f"{name}[{key!r}]")
    elif kind in (list, tuple):
        for i, entry in enumerate(value):
            _check_plain(entry, f"{name}[{i}]")
    elif kind not in (*PLAIN, torch.Tensor, torch.nn.Parameter):
        allowed = "it takes tensors, numbers, strings, None and dicts, lists, tuples of them"
        raise ValueError(f"{name} is a {kind.__module__}.{kind.__qualname__}: not for a checkpoint, {allowed}")


def load_trainer_state(path: Path | str) -> dict:
    """The state that `save_trainer_state` wrote to the file `path`, its tensors on the CPU.

    Raises ValueError naming the file when it is missing, damaged or no trainer state.
    """
    file = Path(path)
    remedy = f"delete the checkpoint {file.parent} and resume again: the one before it is used"
    if not file.is_file():
        raise ValueError(f"{file} is missing; {remedy}")
    try:
        with zipfile.ZipFile(file) as archive:  # torch.load does not look at the checksums that torch.save wrote
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__}); {remedy}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{file} holds no trainer state; {remedy}")
    return state
