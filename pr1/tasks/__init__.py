"""The tasks: what is asked, how an answer is read, what it is worth. A new task is one file here and a line in TASKS,
or a file of your own: `--task path/to/my_task.py`, which names its task object TASK.

No task knows of another; of a model family a task knows the three calls `frame`, `parse_boxes` and `format_boxes`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pr1.records import Answer, Sample
from pr1.tasks.common import TaskOptions
from pr1.tasks.count import CountTask
from pr1.tasks.det import DetTask
from pr1.tasks.ground import GroundTask
from pr1.tasks.ocr import OcrTask


class Task(Protocol):
    """The interface of a task: a frozen dataclass derived from `pr1.tasks.common.TaskOptions`, which has defaults for
    `truth` and `read_predictions`. P prompts, G completions of each."""

    name: str
    presets: tuple[str, ...]  # reward presets; the first is the default
    warm_start: str  # folder in pr1/assets of the embedded policy

    def rendered(self, split: str, n: int, difficulty: float, *, duplicates: float = 0.0) -> Sequence:
        """n rendered records of "train" or "val", the same for the same arguments: what is learnt without --data."""

    def load(self, data: str, images: str | None, **options) -> Sequence:
        """The records of an annotation file; ValueError naming file, record and remedy for bad input."""

    def messages(self, record) -> list[dict]:
        """The chat messages of a record, without decoding its image."""

    def build(self, record, family) -> Sample:
        """Record -> sample; decodes the image."""

    def answer(self, sample: Sample) -> str:
        """The target text for supervised training."""

    def parse(self, text: str, sample: Sample) -> Answer:
        """Reads an answer. Raises on no text."""

    def boxes(self, text: str, sample: Sample) -> list:
        """What to draw of an answer: items with label, xyxy (original pixels), valid, start and end; [] for no boxes."""

    def reward(
        self, texts: Sequence[Sequence[str]], samples: Sequence[Sample], *, progress: float = 1.0
    ) -> tuple[np.ndarray, dict]:
        """P lists of G texts and P samples -> (P, G) float32 and {part: (P, G) float32}. Raises on no text. progress:
        share of the training that is done, for rewards that grow harder."""

    def ladders(self, sample: Sample) -> dict[str, list[str]]:
        """Answers to a sample along one axis each, the exact one first: the reward must fall from rung to rung."""

    def zeros(self, sample: Sample) -> dict[str, str]:
        """Answers worth exactly 0, by what is wrong with them."""

    def truth(self, record) -> list[dict]:
        """What to draw of the annotation: {"label", "bbox"} in original pixels."""

    def read_predictions(self, file: str, records: Sequence) -> list[dict]:
        """The lines of a predictions file; ValueError naming file, line and remedy."""

    def evaluate(self, predictions: Sequence[Mapping[str, Any]], records: Sequence) -> dict[str, float | None]:
        """Lines of a predictions file against the records -> {metric: value, None where it is not defined}."""


class _Tasks(dict):
    def __missing__(self, name):
        known = ", ".join(sorted(self))
        raise ValueError(f"--task is {name!r}: known are {known}, or a file of your own (path/to/my_task.py)")


TASKS: dict[str, Task] = _Tasks(det=DetTask(), ground=GroundTask(), count=CountTask(), ocr=OcrTask())


def load_task(name: str, **options) -> Task:
    """The task of a name in TASKS or of a Python file that defines TASK, with these `TaskOptions`.

    Raises ValueError for an unknown name, a file that is missing, fails or defines no task, and for bad options.
    """
    task = _from_file(Path(name)) if name.endswith(".py") else TASKS[name]
    return dataclasses.replace(task, **options)


def _from_file(file: Path) -> Task:
    if not file.is_file():
        raise ValueError(f"--task {file}: no such file")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        raise ValueError(f"--task {file}: running it failed: {type(error).__name__}: {error}") from error
    task = getattr(module, "TASK", None)
    if not isinstance(task, TaskOptions):
        raise ValueError(f"--task {file}: it must define TASK, an instance of a class derived from TaskOptions")
    missing = [name for name in vars(Task) if not name.startswith("_") and not hasattr(task, name)]
    if missing:
        raise ValueError(f"--task {file}: TASK lacks {', '.join(missing)}; pr1/tasks/__init__.py says what they do")
    return task
