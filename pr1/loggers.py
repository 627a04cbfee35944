"""TensorBoard and wandb behind one face: write(step, metrics), rewind(step), close(). The loop never asks which are on.

metrics.jsonl is the record; these are views of it. `metrics` holds finite numbers only.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


class TensorBoard:
    """Event files in `folder`; after a rewind the events of the steps done again are hidden (purge_step)."""

    def __init__(self, folder: Path, make_writer):
        self._folder, self._make_writer = folder, make_writer
        self._writer, self._purge = None, None

    def write(self, step: int, metrics: dict) -> None:
        if self._writer is None:  # made late: only a rewind knows which old events to hide
            self._writer = self._make_writer(str(self._folder), purge_step=self._purge, flush_secs=10)
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def rewind(self, step: int) -> None:
        self.close()
        self._purge = step

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Wandb:
    """One wandb run per run folder, by the id in its config.json, in project $WANDB_PROJECT or pr1.

    wandb counts steps upwards only: after a rewind it keeps its first values of the steps done again.
    """

    def __init__(self, wandb, folder: Path, record: dict):
        settings = {key: record[key] for key in ("task", "config", "environment")}
        project, name = os.environ.get("WANDB_PROJECT", "pr1"), folder.resolve().name
        where = {"project": project, "name": name, "id": record["id"], "dir": str(folder)}
        self._run = wandb.init(**where, resume="allow", config=settings)

    def write(self, step: int, metrics: dict) -> None:
        self._run.log(metrics, step=step)

    def rewind(self, step: int) -> None:
        pass

    def close(self) -> None:
        self._run.finish()


def open_tensorboard(folder: Path) -> list[TensorBoard]:
    """[TensorBoard], or [] and a note on stderr where the package is missing: on by default, it must not stop a run."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("note: no TensorBoard files: the package is missing (pip install tensorboard)", file=sys.stderr)
        return []
    return [TensorBoard(folder, SummaryWriter)]


def import_wandb():
    """The wandb module. Raises ValueError with the remedy where it is not installed."""
    try:
        import wandb
    except ImportError:
        wandb = None
    if not hasattr(wandb, "init"):  # a folder ./wandb of old logs imports as an empty namespace package
        raise ValueError("logging to wandb needs its package: pip install wandb (or drop the flag)")
    return wandb
