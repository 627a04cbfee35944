"""OCR: all the text of a page.

Reward `set`: 1 - edit distance / longer length, over texts whose runs of white space are one space. An answer longer
than 4x the target + 1,000 characters is cut there, and what is cut counts as edits: no answer takes long to score.
Reward `paper`: Perception-R1's, 1 - edit distance / longer length of the texts as they are (its code was never
released; this is the measure its evaluation uses). Mended: the same cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rapidfuzz.distance import Levenshtein

from pr1.data.pages import PageDataset, PageOptions, RenderedPages, load_pages
from pr1.records import Answer, ImageRecord, Sample
from pr1.rewards import check_weights, weigh
from pr1.tasks.common import TaskOptions, by_record, group_size
from pr1.text_metric import has_wordnet, page_metrics, plain

PARTS = {"similarity": 1.0, "length_ratio": 0.0}  # what both presets pay for them
STRANGE = "\u2603"  # a snowman: no page has one


@dataclass(frozen=True)
class OcrTask(TaskOptions):
    """See `pr1.tasks.Task`."""

    name: ClassVar[str] = "ocr"
    presets: ClassVar[tuple[str, ...]] = ("set", "paper")
    warm_start: ClassVar[str] = "tiny-qwen2.5-vl-ocr"

    def __post_init__(self):
        super().__post_init__()
        check_weights(PARTS, self.weights, self.preset)

    def load(self, data: str, images: str | None, **options) -> PageDataset:
        """JSONL of {"image", "text"}; see `pr1.data.pages.load_pages`."""
        return load_pages(data, images, **options)

    def rendered(self, split: str, n: int, difficulty: float, *, duplicates: float = 0.0) -> RenderedPages:
        """n rendered pages of a split ("train" or "val"); duplicates: share of lines transcribed twice."""
        return RenderedPages(split, n, PageOptions.at(difficulty, duplicates))

    def messages(self, record: ImageRecord) -> list[dict]:
        """Perception-R1's prompt (arXiv 2504.07954), for training and evaluation alike."""
        text = self.request("OCR this image.")
        return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]

    def answer(self, sample: Sample) -> str:
        """The text of the page."""
        return self.spoken(sample.target.text)

    def parse(self, text: str, sample: Sample) -> Answer:
        """An answer of plain text has no items; its form is right unless thinking was asked for and is not there."""
        return Answer(format_ok=self.final(text)[2])

    def boxes(self, text: str, sample: Sample) -> list:
        """Nothing to draw."""
        return []

    def truth(self, record: ImageRecord) -> list[dict]:
        """Nothing to draw."""
        return []

    def reward(self, texts: Sequence[Sequence[str]], samples: Sequence[Sample], *, progress: float = 1.0):
        """(P, G) float32 in 0..1 and its parts: similarity; length_ratio, min / max of the two lengths; with thinking
        `think`, 1 if the form is right: without it an answer is worth half. Raises ValueError for unequal groups only."""
        shape = (len(samples), group_size(texts, samples))
        rows = np.array(
            [self._score(text, sample.target.text) for answers, sample in zip(texts, samples) for text in answers]
        ).reshape(*shape, 3)
        similarity, length_ratio, think = (rows[..., i].astype(np.float32) for i in range(3))
        parts = {"similarity": similarity, "length_ratio": length_ratio}
        reward = weigh(parts, PARTS, self.weights)
        if self.thinking:
            reward, parts = reward * (0.5 + 0.5 * think), {**parts, "think": think}
        return reward.astype(np.float32), parts

    def _score(self, text: str, wanted: str) -> tuple[float, float, float]:
        start, end, formed = self.final(text)
        found = text[start:end]
        limit = 4 * len(wanted) + 1000
        beyond = max(0, len(found) - limit)
        found = found[:limit]
        if self.preset == "set":
            found, wanted = plain(found), plain(wanted)
        longest = max(len(found) + beyond, len(wanted))
        if longest == 0:
            return 1.0, 1.0, float(formed)
        distance = Levenshtein.distance(found, wanted) + beyond
        ratio = min(len(found) + beyond, len(wanted)) / longest
        return max(0.0, 1.0 - distance / longest), ratio, float(formed)

    def ladders(self, sample: Sample) -> dict[str, list[str]]:
        """Wrong characters, text left out, text added, the page repeated."""
        text = plain(sample.target.text)

        def garbled(share: float) -> str:
            every = max(1, round(1 / share))
            return "".join(STRANGE if i % every == 0 and c != " " else c for i, c in enumerate(text))

        n = len(text)
        rungs = {
            "characters": [text, STRANGE + text[1:], garbled(0.1), garbled(0.34), garbled(1.0)],
            "missing": [text, text[: n - 1], text[: n - n // 4], text[: n // 2], ""],
            "spurious": [
                text,
                text + " " + STRANGE,
                text + " " + STRANGE * max(2, n // 2),
                text + STRANGE * (2 * n + 2),
            ],
            "repeats": [text, f"{text} {text}", " ".join([text] * 10)],
        }
        if not text:
            rungs = {"spurious": ["", STRANGE]}
        return {name: [self.spoken(rung) for rung in steps] for name, steps in rungs.items()}

    def zeros(self, sample: Sample) -> dict[str, str]:
        """No text where there is some, and text that shares no character with the page."""
        text = plain(sample.target.text)
        wrong = {"other characters": STRANGE * max(1, len(text))}
        return {**wrong, "empty": ""} if text else wrong

    def evaluate(self, predictions: Sequence[Mapping], records: Sequence[ImageRecord]) -> dict[str, float | None]:
        """Means over the pages; a page without a line counts as an empty answer. See `pr1.text_metric`."""
        synonyms = has_wordnet()
        pages = []
        for line, record in zip(by_record(predictions, records), records):
            text = line["text"] if line else ""
            start, end, _ = self.final(text)
            pages.append(page_metrics(text[start:end], record.target.text, synonyms))
        return {name: float(np.mean([page[name] for page in pages])) for name in pages[0]}
