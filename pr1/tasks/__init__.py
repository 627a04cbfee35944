"""The tasks: what is asked, how an answer is read, what it is worth. A new task is one file here and a line in TASKS.

No task knows of another; of a model family a task knows the three calls `frame`, `parse_boxes` and `format_boxes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from pr1.records import Answer, Sample
from pr1.tasks.det import DetTask


class Task(Protocol):
    """The interface of a task. P prompts, G completions of each."""

    name: str

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

    def reward(self, texts: Sequence[Sequence[str]], samples: Sequence[Sample]) -> tuple[np.ndarray, dict]:
        """P lists of G texts and P samples -> (P, G) float32 and {part: (P, G) float32}. Raises on no text."""

    def evaluate(self, predictions: Sequence[Mapping[str, Any]], records: Sequence) -> dict[str, float | None]:
        """Lines of a predictions file against the records -> {metric: value, None where it is not defined}."""


class _Tasks(dict):
    def __missing__(self, name):
        raise ValueError(f"unknown task {name!r}; known: {', '.join(sorted(self))} (--task)")


TASKS: dict[str, Task] = _Tasks(det=DetTask())
