"""Tasks by name and by file, their options, and what all of them keep."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from runs import SHORT

import pr1.eval
import pr1.train
from pr1.config import parse_config, parse_weights
from pr1.data.images import read_size
from pr1.families import load_family
from pr1.predictions import read_answers, write_predictions
from pr1.tasks import TASKS, Task, load_task
from pr1.tasks.common import TaskOptions

ALL = sorted(TASKS)
MY_TASK = '''
"""Name the colour of the first object."""
from dataclasses import dataclass
from typing import ClassVar
import numpy as np
from pr1.tasks.det import DetTask

@dataclass(frozen=True)
class Colour(DetTask):
    name: ClassVar[str] = "colour"

    def reward(self, texts, samples, *, progress=1.0):
        right = [[float(t.startswith(s.target.labels[0]) if s.target.labels else t == "") for t in group]
                 for group, s in zip(texts, samples)]
        return np.array(right, np.float32), {"right": np.array(right, np.float32)}

    def ladders(self, sample):
        return {"colour": [sample.target.labels[0] if sample.target.labels else "", "x"]}

    def zeros(self, sample):
        return {"wrong": "x"}

TASK = Colour()
'''


@pytest.mark.parametrize("name", ALL)
def test_a_task_has_the_whole_interface(name):
    task = TASKS[name]
    assert isinstance(task, TaskOptions) and task.name == name and task.presets[0] == "set"
    assert [m for m in vars(Task) if not m.startswith("_") and not hasattr(task, m)] == []


@pytest.mark.parametrize("name", ALL)
def test_rendered_samples_end_to_end(name):
    """Every rendered record builds, its exact answer is worth nearly 1 and its zeros 0."""
    task = load_task(name)
    family = load_family(str(Path(pr1.train.__file__).parent / "assets" / "tiny-qwen2.5-vl"))
    records = task.rendered("val", 12, 0.25)
    samples = [task.build(records[i], family) for i in range(12)]
    answers = [task.answer(s) for s in samples]
    rewards, parts = task.reward([[a] for a in answers], samples)
    assert rewards.dtype == np.float32 and rewards.shape == (12, 1) and all(p.shape == (12, 1) for p in parts.values())
    assert rewards.min() > 0.85  # boxes are rounded to whole text units
    for sample in samples:
        for text in task.zeros(sample).values():
            assert task.reward([[text]], [sample])[0][0, 0] == 0, text
    assert not any("image" in m["content"][0] and m["role"] != "user" for s in samples for m in s.messages)


def test_options_reach_the_task(tmp_path):
    task = load_task("det", preset="set", prompt="Find {names}!", thinking=True)
    record = task.rendered("val", 3, 0.0)[0]
    text = task.messages(record)[0]["content"][1]["text"]
    assert text.startswith("Find red, blue,") and text.endswith("<answer> </answer> tags.")
    with pytest.raises(ValueError, match="--reward is 'best': task ocr has the rewards set, paper"):
        load_task("ocr", preset="best")
    assert parse_weights("a=1, b=-0.5") == (("a", 1.0), ("b", -0.5)) and parse_weights("") == ()
    for text in ("a", "a=x", "a=nan", "=,"):
        with pytest.raises(ValueError, match="--reward-weights"):
            parse_config(["--task", "det", "--reward-weights", text], "x", "")


def test_final_answers():
    task = load_task("det", thinking=True)
    for text, wanted, formed in [
        ("<think>a</think><answer>[]</answer>", "[]", True),
        (" <think>a\n<b></think>\n<answer>x</answer>\n", "x", True),
        ("<answer>x</answer>", "x", False),
        ("<think>a</think> x", " x", False),
        ("<think>a</think><answer>x", "x", False),
        ("x", "x", False),
        ("<think><answer>a</answer></think><answer>x</answer>", "x", False),
    ]:
        start, end, ok = task.final(text)
        assert (text[start:end], ok) == (wanted, formed), text
        assert TASKS["det"].final(text) == (0, len(text), True)
    assert task.final(task.spoken("y"))[2] and TASKS["det"].spoken("y") == "y"
    huge = "<think>" + "<answer>" * 20_000  # no pattern takes quadratic time
    assert task.final(huge)[2] is False


def test_a_task_of_ones_own(tmp_path, capsys):
    """Trains and evaluates; its run folder, its reward and its parts are its own."""
    file = tmp_path / "my_task.py"
    file.write_text(MY_TASK)
    flags = [
        *SHORT[2:],
        "--steps",
        "1",
        "--eval-every",
        "0",
        "--run-dir",
        str(tmp_path / "run"),
        "--max-new-tokens",
        "4",
    ]
    assert pr1.train.main(["--task", str(file), *flags]) == 0
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["reward/right"] == line["reward"] and "eval/ap" in line
    assert json.loads((tmp_path / "run" / "config.json").read_text())["task"] == "colour"


@pytest.mark.parametrize("text, says", [
    (None, "no such file"), ("TASK = 3", "must define TASK"), ("", "must define TASK"), ("1 / 0", "ZeroDivisionError"),
    ("from pr1.tasks.common import TaskOptions\nclass T(TaskOptions):\n    name = 't'\nTASK = T()", "TASK lacks"),
])  # fmt: skip
def test_a_bad_task_file_is_named(tmp_path, text, says):
    file = tmp_path / "bad.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        load_task(str(file))
    assert str(file) in str(error.value)


def test_predictions_files(tmp_path):
    file = tmp_path / "p.jsonl"
    lines = [{"id": "a", "text": "x\u2028y", "items": []}, {"id": "b", "text": "", "items": [{"label": "c"}]}]
    write_predictions(file, lines)
    assert read_answers(file) == lines
    for text, says in [("{", "line 1: not JSON"), ('{"id": 3, "text": ""}', "line 1"), ('{"id": "a"}', "line 1"),
                       ('{"id": "a", "text": ""}\n{"id": "a", "text": ""}', "line 2: id 'a' was on line 1")]:  # fmt: skip
        file.write_text(text)
        with pytest.raises(ValueError, match=says):
            read_answers(file)
    with pytest.raises(ValueError, match="cannot read"):
        read_answers(tmp_path / "none")


def test_read_size_names_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="line 3: the image .*x.png does not exist"):
        read_size("f, line 3", tmp_path / "x.png")


def test_tasks_are_values():
    for name in ALL:
        assert dataclasses.replace(TASKS[name], thinking=True) != TASKS[name] and hash(TASKS[name])
