"""What tasks share: their options, the prompt in place of theirs, the think/answer form.

A task is a frozen dataclass derived from `TaskOptions`; `dataclasses.replace(TASKS["det"], preset="paper")` is the same
task with another reward.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pr1.predictions import read_answers

# DeepSeek-R1's form as Perception-R1 asks for it (arXiv 2504.07954, appendix).
THINKING_REQUEST = " Output the thinking process in <think> </think> and final answer in <answer> </answer> tags."
THINKING_FORM = re.compile(r"\s*<think>(?:(?!</?think>|</?answer>).)*</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)


@dataclass(frozen=True)
class TaskOptions:
    """Options every task takes. Raises ValueError for a reward preset or a part that the task does not have."""

    preset: str = "set"  # reward preset, one of `presets`
    weights: tuple[tuple[str, float], ...] = ()  # (part, weight), in place of the preset's own
    prompt: str | None = None  # user text in place of the task's own; {braces} as the task states
    thinking: bool = False  # ask for <think>...</think><answer>...</answer>

    name: ClassVar[str]
    presets: ClassVar[tuple[str, ...]] = ("set",)
    paths_from_data: ClassVar[bool] = True  # without --images, image paths start at the annotation file's folder

    def __post_init__(self):
        if self.preset not in self.presets:
            raise ValueError(f"--reward is {self.preset!r}: task {self.name} has the rewards {', '.join(self.presets)}")

    def request(self, text: str, **values: str) -> str:
        """The user text of the prompt, for training and evaluation alike: the task's own `text`, or `prompt` in its
        place, with {name} replaced by values["name"], and the request to think when that is asked for."""
        text = text if self.prompt is None else self.prompt
        for name, value in values.items():
            text = text.replace("{" + name + "}", value)
        return text + (THINKING_REQUEST if self.thinking else "")

    def final(self, text: str) -> tuple[int, int, bool]:
        """(start, end, well-formed) of the final answer in a completion: all of it without `thinking`; with it what
        stands between the answer tags, or, where the form is broken, after the last tag of it."""
        if not self.thinking:
            return 0, len(text), True
        if match := THINKING_FORM.fullmatch(text):
            return match.start(1), match.end(1), True
        starts = [text.rfind(tag) + len(tag) for tag in ("<answer>", "</think>") if tag in text]
        start = max(starts, default=0)
        end = text.find("</answer>", start)
        return start, len(text) if end < 0 else end, False

    def truth(self, record) -> list[dict]:
        """What to draw of the annotation, {"label", "bbox"} in original pixels: the boxes of a BoxTarget."""
        target = record.target
        return [
            {"label": label, "bbox": [float(x) for x in box]}
            for label, box, ignore in zip(target.labels, target.boxes, target.ignore, strict=True)
            if not ignore
        ]

    def read_predictions(self, file: str, records: Sequence) -> list[dict]:
        """Lines as eval.py writes them, found again by `id`. Raises ValueError naming file, line and remedy."""
        return read_answers(file)

    def spoken(self, answer: str) -> str:
        """The target text of supervised training: the answer, in the think/answer form when that is asked for."""
        return f"<think></think><answer>{answer}</answer>" if self.thinking else answer
