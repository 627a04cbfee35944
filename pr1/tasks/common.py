"""What tasks share: their options, the prompt in place of theirs, the think/answer form.

A task is a frozen dataclass derived from `TaskOptions`; `dataclasses.replace(TASKS["det"], preset="paper")` is the same
task with another reward.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pr1.predictions import read_answers
from pr1.records import ImageRecord, Sample

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

    def build(self, record: ImageRecord, family) -> Sample:
        """Record -> sample; decodes the image. Raises ValueError naming the source if it cannot be decoded."""
        return Sample(id=record.id, task=self.name, messages=self.messages(record), images=(record.load(),),
                      frames=(family.frame(record.width, record.height),), target=record.target)  # fmt: skip

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


def group_size(texts: Sequence[Sequence[str]], samples: Sequence[Sample]) -> int:
    """G of P groups of G texts for P samples. Raises ValueError when they do not fit."""
    sizes = {len(group) for group in texts}
    if len(texts) != len(samples) or len(sizes) > 1:
        raise ValueError(f"{len(texts)} groups of {sorted(sizes)} texts for {len(samples)} samples: need one equal group "
                         "each")  # fmt: skip
    return sizes.pop() if sizes else 0


def by_record(predictions: Sequence[Mapping], records: Sequence) -> list[Mapping | None]:
    """The prediction for each record, found by id; None where there is none.

    Raises ValueError for no records and for a prediction of an id that the data does not have.
    """
    if not len(records):
        raise ValueError("there is nothing to evaluate on: no records")
    lines = {line["id"]: line for line in predictions}
    unknown = lines.keys() - {record.id for record in records}
    if unknown:
        raise ValueError(f"the predictions hold {len(unknown)} ids that the data does not have, such as "
                         f"{min(unknown)!r}; give the data they were made on (--data)")  # fmt: skip
    return [lines.get(record.id) for record in records]
