"""A run is a folder: config.json, metrics.jsonl, samples.jsonl, tensorboard/, checkpoints/, report.html.

Rank 0 owns the folder: it holds a lock for as long as it lives and does all writing. Every other rank gets the same
object with writes that do nothing, so the training loop has no `if rank == 0`. What is on disk stays readable through a
kill -9 at any moment: whole files are replaced atomically, lines are appended by one write each.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import sys
import time
import uuid
import weakref
from collections.abc import Collection, Iterable
from pathlib import Path

import torch.distributed as dist

from pr1.environment import environment
from pr1.lines import encode_line, jsonable, open_append, rewind_lines, write_all, write_atomic
from pr1.loggers import Wandb, import_wandb, open_tensorboard

LINE_FILES = ("metrics", "samples")  # NAME.jsonl, each line with an integer "step"
ALWAYS_MAY_CHANGE = frozenset({"resume", "run_dir"})
NO_LOCKS_HERE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # file systems without flock, such as some Lustre mounts


class RunFolder:
    """An open run. `path`: its folder. `resumed`: the folder held a run before. `rank`: 0 writes, the others do not.

    Made by `open_run`; also a context manager. `write`, `rewind` and `close` do nothing on ranks above 0.
    """

    def __init__(self, path: Path, rank: int, resumed: bool, lock: int | None = None, loggers: Iterable = ()):
        self.path = path
        self.rank = rank
        self.resumed = resumed
        self._must_rewind = resumed and not rank
        self._lock = lock
        self._loggers = list(loggers)
        self._metrics = None if rank else open_append(path / "metrics.jsonl")
        _OPEN.add(self)

    def write(self, metrics: dict) -> None:
        """Append one step to metrics.jsonl and hand it to TensorBoard and wandb.

        metrics: `step` (int) and scalars: numbers, 0-d tensors or arrays, strings, None. NaN and infinities become
        null. Raises ValueError without an integer `step` or with a value that is no scalar. The line is one write on
        an O_APPEND descriptor, so a kill leaves at most a partial last line, which `rewind` drops.
        """
        if self.rank:
            return
        if self._must_rewind:
            raise RuntimeError("a resumed run must rewind(step) before it writes: the folder may hold later steps")
        metrics = jsonable(metrics)
        step = metrics.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise ValueError(f"metrics need an integer 'step', got {step!r}")
        for key, value in metrics.items():
            if isinstance(value, (list, dict)):
                raise ValueError(f"metric '{key}' is not a scalar")
        write_all(self._metrics, encode_line(metrics))
        for logger in self._loggers:
            logger.write(step, {k: v for k, v in metrics.items() if k != "step" and isinstance(v, (int, float))})

    def rewind(self, step: int) -> None:
        """Make the folder that of a run which has done steps 0 .. step-1 and is about to do `step`.

        Every resume calls it before its first `write`. A checkpoint `step-N` holds the state after steps 0 .. N-1, so
        resuming it calls `rewind(N)`, and without a checkpoint `rewind(0)`: complete lines of metrics.jsonl with
        "step" >= N (and lines that are no JSON object with an integer step) move to the end of
        metrics.discarded.jsonl, in order; a partial last line is dropped; samples.jsonl is treated alike. A kill inside
        loses nothing and moves nothing twice.
        """
        if self.rank:
            return
        self._must_rewind = False
        for name in LINE_FILES:
            rewind_lines(self.path / f"{name}.jsonl", self.path / f"{name}.discarded.jsonl", step)
        os.close(self._metrics)  # it points at the file that was just replaced
        self._metrics = open_append(self.path / "metrics.jsonl")
        for logger in self._loggers:
            logger.rewind(step)

    def close(self) -> None:
        """Flush the loggers and let go of the folder. Twice is harmless."""
        for logger in self._loggers:
            logger.close()
        self._loggers = []
        for descriptor in (self._metrics, self._lock):
            if descriptor is not None:
                os.close(descriptor)
        self._metrics = self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _forget_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


# A forked worker inherits the lock's descriptor and would keep the folder "in use" after its parent was killed.
_OPEN: weakref.WeakSet[RunFolder] = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [run._forget_lock() for run in _OPEN])


def open_run(
    path: str | None,
    config: dict,
    *,
    task: str,
    resume: bool,
    rank: int,
    may_change: Collection[str] = frozenset(),
    tensorboard: bool = True,
    wandb: bool = False,
) -> RunFolder:
    """Open the run folder at `path`, or a new `runs/<task>-YYYYmmdd-HHMMSS` when it is None.

    config: every config value, nested sections allowed; it is written to config.json (infinity as "inf") beside the
    environment.
    may_change: fields a resumed run may change, by their own or their dotted name (`steps`, `eval.every`).
    Raises ValueError when the folder is used by a living process; when it holds a run and `resume` is not set; when
    `resume` is set and there is no run; when a field outside `may_change` differs on resume (all of them are listed
    with both values); when wandb is asked for and missing. When torch.distributed is up, this is a collective call:
    every rank gets rank 0's folder, or raises rank 0's error. Otherwise ranks above 0 must be told the path.
    """
    together = dist.is_available() and dist.is_initialized()
    run, told = None, [path, None]
    if rank == 0:
        try:
            may_change = frozenset(may_change) | ALWAYS_MAY_CHANGE
            run = _open_as_writer(path, config, task, resume, may_change, tensorboard, wandb)
            told[0] = str(run.path)
        except (ValueError, OSError) as error:
            if not together:
                raise
            told[1] = f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error)
    if together:
        dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise ValueError(told[1])
    if rank and told[0] is None:
        raise ValueError(f"rank {rank} was given no run folder: only rank 0 may choose one")
    return run or RunFolder(Path(told[0]), rank, resume)


def _open_as_writer(path, config, task, resume, may_change, tensorboard, wandb) -> RunFolder:
    wandb = import_wandb() if wandb else None  # before anything is created
    if resume:
        if path is None:
            raise ValueError("--resume needs the folder of the run to go on with: add --run-dir DIR")
        folder = Path(path)
        if not (folder / "config.json").is_file():
            raise ValueError(f"--resume: {folder} holds no run (no config.json); drop --resume to start one there")
    else:
        folder = _new_default_folder(task) if path is None else Path(path)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"run folder {folder} is a file; choose another --run-dir")
        folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    try:
        if not resume and any((folder / name).exists() for name in ("config.json", "metrics.jsonl", "checkpoints")):
            raise ValueError(
                f"run folder {folder} already holds a run: add --resume to go on with it, or choose another --run-dir"
            )
        record = _write_config(folder, task, jsonable(config, nonfinite=str), may_change)
        loggers = open_tensorboard(folder / "tensorboard") if tensorboard else []
        if wandb:
            loggers.append(Wandb(wandb, folder, record))
        return RunFolder(folder, 0, resume, lock, loggers)
    except BaseException:
        os.close(lock)
        raise


def _new_default_folder(task: str) -> Path:
    name = Path(task).stem if task.endswith(".py") else re.sub(r"[^\w.-]+", "-", task)
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    Path("runs").mkdir(exist_ok=True)
    for suffix in ["", *(f"-{i}" for i in range(2, 1000))]:  # two runs started within one second
        try:
            (Path("runs") / (stem + suffix)).mkdir()
            return Path("runs") / (stem + suffix)
        except FileExistsError:
            continue
    raise ValueError(f"no free folder name runs/{stem}-*; give a --run-dir")


def _lock(folder: Path) -> int:
    """An exclusive lock on the folder, held until the descriptor is closed or the process ends in any way."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip()
        if error.errno in NO_LOCKS_HERE:
            print(f"note: {folder} is on a file system without locks; start no second run in it", file=sys.stderr)
            return descriptor
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            remedy = "stop that process or choose another --run-dir"
            raise ValueError(f"run folder in use: {folder} ({holder}); {remedy}") from None
        raise
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return descriptor


def _write_config(folder: Path, task: str, config: dict, may_change: frozenset) -> dict:
    """Write config.json, checking it against the one there: {id, task, created, config, environment, resumes}."""
    now = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "environment": environment()}
    file = folder / "config.json"
    if not file.exists():
        record = {"id": uuid.uuid4().hex, "task": task, "created": now["time"], "config": config}
        record |= {"environment": now["environment"], "resumes": []}
    else:
        record = _read_config(file)
        changed = _differences(record["config"], config)
        refused = {k: v for k, v in changed.items() if not may_change & {k, k.rsplit(".", 1)[-1]}}
        if refused:
            lines = "".join(f"\n  {k}: was {_show(old)}, now {_show(new)}" for k, (old, new) in refused.items())
            remedy = "give the old values or choose another --run-dir"
            raise ValueError(f"--resume: {folder} was started with another config; {remedy}:{lines}")
        moved = _differences(record["environment"], now["environment"])
        if moved:
            told = ", ".join(f"{k} {_show(old)} -> {_show(new)}" for k, (old, new) in moved.items())
            print(f"note: resuming in another environment, so not bit for bit: {told}", file=sys.stderr)
        record["resumes"].append(now | {"changed": {k: list(v) for k, v in changed.items()}})
        record["config"] = config
    write_atomic(file, [(json.dumps(record, indent=2, allow_nan=False) + "\n").encode()])
    return record


def _read_config(file: Path) -> dict:
    try:
        record = json.loads(file.read_text())
        if {"id", "config", "environment", "resumes"} <= set(record):
            return record
    except ValueError:
        pass
    raise ValueError(f"{file} is not the config of a run; choose another --run-dir")


_ABSENT = object()


def _differences(old: dict, new: dict, prefix: str = "") -> dict[str, tuple]:
    """Fields that differ, by dotted name: (old, new), the string "(absent)" standing for a missing one."""
    found = {}
    for key in [*old, *(k for k in new if k not in old)]:
        a, b = old.get(key, _ABSENT), new.get(key, _ABSENT)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= _differences(a, b, f"{prefix}{key}.")
        elif a != b or isinstance(a, bool) != isinstance(b, bool):
            found[prefix + key] = tuple("(absent)" if v is _ABSENT else v for v in (a, b))
    return found


def _show(value) -> str:
    return value if value == "(absent)" else json.dumps(value)
