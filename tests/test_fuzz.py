"""Broken answers raise nothing: real ones mutated, unicode, huge numbers, deep nesting, megabytes, NaN.

python tests/test_fuzz.py 100000        the same on as many, with the CPU time from text to reward
"""

from __future__ import annotations

import gc
import itertools
import random
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from pr1.data.scenes import LABELS, SceneDataset, SceneOptions
from pr1.families.qwen2_5_vl import Qwen25Frame
from pr1.families.qwen2_vl import Qwen2Frame
from pr1.rewards import PRESETS
from pr1.tasks.det import DetTask

DET = DetTask()
ALPHABET = '[]{}()",:<>|\\/ \n\t0123456789.-+eE_catdogbbox_2dlabel\x00\x1b\x7fé中\u2028\u202e\ud83d\U0001f600\ufeff`'
PIECES = [
    *("NaN", "-Infinity", "1e999", "-1e-999", "9" * 400, "0." + "3" * 400, "null", "true", "{}", "[]", "''", '"', "\\"),
    *('{"bbox_2d":', '"label":', "```json", "```", "\\ud83d", "\\u0000", "<think>", "</answer>", "none", "\U0010ffff"),
    *("<|box_start|>", "<|box_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|im_end|>", "<|", "|>"),
]
LONG = [
    *("[" * 5000, '{"a":' * 5000, "{" * 50_000, "}" * 50_000, '"' * 50_000, "," * 50_000, " " * 100_000, "9" * 100_000),
    *('{"bbox_2d": [' * 8000, '{"bbox_2d": [1,2,3,4], "label": "a",}' * 3000, "<|box_start|>" * 8000, "(1,2)," * 20_000),
    *("<|object_ref_start|>a" * 5000, '{"bbox_2d": [1, 2, 3, ' * 5000, "\\" * 100_000, "é" * 1_000_000, "[1," * 400_000),
    *('"bbox_2d"' * 10_000, '{"bbox_2d": [' + "1," * 50_000, "{,}" * 30_000, ("9" * 4000 + ",") * 25, "```json" * 10_000),
    '{"bbox_2d": [1,2,3,4], "label": "' + "x" * 1_000_000 + '"}',
]  # fmt: skip


def frames(width, height):
    return [
        Qwen25Frame(width, height, 28 * (width // 28), 28 * (height // 28)),
        Qwen2Frame(width, height, width, height),
    ]


def make_samples():
    """Scenes of 0 to 12 objects and one of 60, in both families, some with a region to be ignored."""
    scenes = SceneDataset("val", 12, SceneOptions.at(1.0, max_objects=12))
    samples = []
    for i in range(len(scenes)):
        record = scenes[i]
        target = replace(record.target, categories=LABELS)
        if i % 4 == 3:
            target = replace(target, ignore=np.arange(len(target.labels)) == 0)
        samples += [
            SimpleNamespace(id=record.id, frames=(frame,), target=target)
            for frame in frames(record.width, record.height)
        ]
    grid = np.array([(40 * x, 30 * y, 40 * x + 30, 30 * y + 20) for x, y in itertools.product(range(10), range(6))])
    target = replace(scenes[0].target, boxes=grid.astype(float), labels=("red",) * 60, ignore=np.zeros(60, bool))
    return samples + [SimpleNamespace(id="grid", frames=(frame,), target=target) for frame in frames(400, 180)]


def mutate(text: str, rng: random.Random) -> str:
    for _ in range(rng.randrange(1, 6)):
        at, kind = rng.randrange(len(text) + 1), rng.randrange(8)
        stop = min(len(text), at + rng.randrange(1, 40))
        if kind == 0:
            text = text[:at]
        elif kind == 1:
            text = text[:at] + text[stop:]
        elif kind == 2:
            text = text[:at] + "".join(rng.choices(ALPHABET, k=rng.randrange(1, 12))) + text[at:]
        elif kind == 3:
            text = text[:at] + rng.choice(PIECES) + text[at:]
        elif kind == 4:
            text = text[:stop] + text[at:stop] * rng.randrange(1, 30) + text[stop:]
        elif kind == 5:
            text = "".join(chr(rng.randrange(0x110000)) if rng.random() < 0.02 else c for c in text)
        elif kind == 6:
            text = text[::-1] if rng.random() < 0.2 else text[at:] + text[:at]
        elif rng.random() < 0.05:
            text = text[:at] + rng.choice(LONG) + text[at:]
    return text


def answers(n: int, samples, seed: int):
    """n fuzzed answers with the index of their sample; one in a hundred long alone."""
    rng = random.Random(seed)
    real = [DET.answer(sample) for sample in samples]
    for k in range(n):
        i = rng.randrange(len(samples))
        yield i, rng.choice(LONG) if k % 100 == 99 else mutate(real[i], rng)


def check(text: str, sample, task=DET) -> float:
    rewards, parts = task.reward([[text]], [sample])
    assert all(np.isfinite(values).all() for values in (rewards, *parts.values())), text[:500]
    for item in task.parse(text, sample).items:
        assert 0 <= item.start < item.end <= len(text)
        item.label.encode("utf-8", "surrogatepass")
    return float(rewards[0, 0])


def test_fuzzed_answers_raise_nothing():
    samples = make_samples()
    rewards = [check(text, samples[i]) for i, text in answers(8000, samples, seed=1)]
    assert min(rewards) == 0.0 and 0.95 < max(rewards) <= 1.0
    assert 0.2 < np.mean(np.array(rewards) > 0) < 0.8  # some survive, some do not


@pytest.mark.parametrize(
    "options", [*({"preset": name} for name in PRESETS if name != "set"), {"thinking": True}], ids=str
)
def test_fuzzed_answers_raise_nothing_under_any_option(options):
    samples, task = make_samples(), DetTask(**options)
    rng = random.Random(2)
    for i, text in answers(300, samples, seed=3):
        check(mutate(task.spoken(text), rng) if task.thinking else text, samples[i], task)


def test_long_answers_raise_nothing():
    for text in LONG:
        for sample in make_samples()[-4:]:
            assert check(text, sample) < 0.2


def main(n: int) -> None:
    gc.freeze()  # as a run does: else the longest answer is the one that a collection of all of torch falls on
    samples, seconds, worst = make_samples(), [], (0.0, "")
    for sample in samples:
        check(DET.answer(sample), sample)
    for i, text in answers(n, samples, seed=4):
        begun = time.process_time()
        DET.reward([[text]], [samples[i]])
        seconds.append(time.process_time() - begun)
        if seconds[-1] > worst[0]:
            worst = (seconds[-1], f"{len(text)} characters: {text[:80]!r}")
    at = {q: 1e3 * np.quantile(seconds, q) for q in (0.5, 0.9, 0.99, 0.999)}
    shown = ", ".join(f"{q:.1%} {ms:.3f} ms" for q, ms in at.items())
    print(f"{n} fuzzed answers, CPU time from text to reward: {shown}, most {1e3 * worst[0]:.1f} ms ({worst[1]})")


if __name__ == "__main__":
    main(int(sys.argv[1]))
