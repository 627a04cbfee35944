"""The reward lint: `set` ranks rightly, bad rewards are caught, and what the program prints and returns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from pr1.data.convert import main as convert
from pr1.data.scenes import SceneDataset, SceneOptions
from pr1.families.preprocessing import ImageSpec, resized
from pr1.families.qwen2_5_vl import Qwen25Frame
from pr1.families.qwen2_vl import Qwen2Frame
from pr1.lint import lint, lint_before_training, main, without_pixels
from pr1.matcher import Boxes
from pr1.records import BoxTarget
from pr1.tasks.det import DetTask
from pr1.tasks.rungs import box_ladders, moved_box, spurious

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SPEC = ImageSpec(14, 2, 2, 3136, 1_000_000, (0, 0, 0), (1, 1, 1), 1 / 255)  # Qwen's numbers
DET = DetTask()


class Family:
    def __init__(self, frame_class):
        self.frame_class = frame_class

    def frame(self, width, height):
        return self.frame_class(width, height, *resized(width, height, SPEC))


FAMILIES = {"qwen2_5_vl": Family(Qwen25Frame), "qwen2_vl": Family(Qwen2Frame)}


def scenes(family="qwen2_5_vl", n=12):
    data = SceneDataset("val", n, SceneOptions.at(0.7))
    return [without_pixels(DET, FAMILIES[family], data[i]) for i in range(n)]


def altered(sample, boxes, labels, ignore=None):
    ignore = np.zeros(len(boxes), bool) if ignore is None else np.array(ignore)
    target = BoxTarget(
        np.array(boxes, float).reshape(-1, 4), tuple(labels), ignore, categories=("red", "green", "blue")
    )
    return replace(sample, target=target)


@pytest.mark.parametrize("options", [{}, {"thinking": True}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_reward_ranks_rightly_on_scenes(family, options):
    report = lint(DetTask(**options), scenes(family))
    assert report.violations == [] and report.rows["recall"].samples >= 10
    assert report.rows["exact is worth 1"].samples == report.rows["zeros"].samples == 12


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "boxes, labels, ignore",
    [
        ([], [], None),
        ([(10, 10, 60, 50)], ["red"], None),
        ([(10, 10, 60, 50)] * 2, ["red", "red"], None),  # annotated twice
        ([(10, 10, 60, 50)] * 3, ["red", "green", "blue"], None),  # three classes on one place, none left to be wrong
        ([(20.4, 20.4, 20.9, 20.6), (50, 50, 53, 52)], ["red", "blue"], None),  # below the resolution of the text
        ([(10 + 20 * i, 10, 28 + 20 * i, 40) for i in range(9)], ["red"] * 9, None),  # a row of equal neighbours
        ([(0, 0, 1e9, 1e9), (10, 10, 60, 50)], ["red", "red"], [True, False]),  # the whole image is a crowd
        ([(0, 0, 1e9, 1e9)], ["red"], None),  # one object, all of the image
    ],
)
def test_the_default_reward_ranks_rightly_where_it_is_hard(family, boxes, labels, ignore):
    sample = scenes(family, 1)[0]
    frame = sample.frames[0]
    boxes = np.minimum(np.array(boxes, float).reshape(-1, 4), [frame.width, frame.height] * 2)
    assert lint(DET, [altered(sample, boxes, labels, ignore)]).violations == []


def data_sets(tmp_path):
    for name in ("instances_train2017.json", "instances_val2017.json"):
        yield SHARED / "coco" / "annotations" / name
    convert(["voc", str(SHARED / "bccd"), str(tmp_path)])
    yield from sorted(tmp_path.glob("*.json"))


@pytest.mark.skipif(not (SHARED / "coco").is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_reward_ranks_rightly_on_real_images(family, tmp_path):
    """Every eighth image; the program goes over all of them."""
    records = [r for file in data_sets(tmp_path) for r in DET.load(str(file), None, verify=False, log=lambda _: None)]
    assert len(records) > 500
    report = lint(DET, [without_pixels(DET, FAMILIES[family], record) for record in records[::8]])
    assert report.violations == [] and report.rows["location"].samples > 60


@dataclass(frozen=True)
class Worse(DetTask):
    """Rewards with a planted flaw."""

    flaw: str = ""

    def reward(self, texts, samples, *, progress=1.0):
        rewards, parts = super().reward(texts, samples, progress=progress)
        flawed = {
            "recall": parts["precision"],
            "precision": parts["recall"],
            "duplicates": parts["recall"],
            "zeros": np.maximum(rewards, 0.01),
            "exact is worth 1": 0.9 * rewards,
            "exact is best": np.array([[1.5 if text == "garbage]" else v for text, v in zip(*row)] for row in zip(texts, rewards)]),
        }  # fmt: skip
        return flawed[self.flaw], parts

    def zeros(self, sample):
        return {**super().zeros(sample), **({"bracket": "garbage]"} if self.flaw == "exact is best" else {})}


@pytest.mark.parametrize("flaw", ["recall", "precision", "duplicates", "zeros", "exact is worth 1", "exact is best"])
def test_a_flaw_is_found_and_named(flaw):
    samples = scenes()
    report = lint(Worse(flaw=flaw), samples)
    found = report.rows[flaw].violations
    assert len(found) >= 10 and found[0].startswith("sample val-") and found[0] in report.violations
    if flaw in ("recall", "precision", "duplicates"):
        assert f"{flaw}, rung 0 is worth" in "".join(found)


def test_before_training_the_default_is_fatal_and_a_preset_warned_of():
    records, family, said = SceneDataset("val", 4, SceneOptions.at(0.7)), FAMILIES["qwen2_vl"], []
    lint_before_training(DET, family, records, said.append)
    assert said == []
    with pytest.raises(ValueError, match="the reward set ranks answers wrongly .* sample val-1: recall"):
        lint_before_training(Worse(flaw="recall"), family, records, said.append)
    lint_before_training(DetTask(preset="vlm-r1-map"), family, records, said.append)
    assert len(said) == 1 and said[0].startswith("warning: the reward vlm-r1-map ranks answers wrongly")


@pytest.mark.parametrize(
    "preset, violated",
    [("paper", set()), ("vlm-r1-map", {"duplicates", "precision"}), ("rex-omni", {"duplicates"}),
     ("visual-rft", {"zeros"}), ("vision-r1", {"location", "zeros"}), ("visionreasoner", {"label", "location"})],
)  # fmt: skip
def test_what_is_known_of_the_presets(preset, violated):
    samples = [sample for sample in scenes() if len(sample.target.labels) >= 3]
    rows = lint(DetTask(preset=preset), samples).rows
    assert len(samples) > 5 and all(len(rows[name].violations) == len(samples) for name in violated)
    if preset == "paper":
        assert not any(row.violations for row in rows.values())


def test_rungs():
    sample = altered(scenes(n=1)[0], [(20, 20, 120, 60), (20, 80, 24, 110)], ["red", "green"])
    items = [("red", (20, 20, 120, 60)), ("green", (20, 80, 24, 110))]
    ladders = box_ladders(items, sample)
    assert [rung[0][1] for rung in ladders["location"]] == [(20 + d, 20, 120 + d, 60) for d in (0, 2, 10, 30)]
    assert [rung[1][1] for rung in ladders["location"]] == [(20, 80 - d, 24, 110 - d) for d in (0, 1, 3, 9)]
    assert [len(rung) for rung in ladders["recall"]] == [2, 1, 0]
    assert [len(rung) for rung in ladders["precision"]] == [2, 3, 4]
    assert [len(rung) for rung in ladders["duplicates"]] == [2, 4, 20]
    assert [[label for label, _ in rung] for rung in ladders["label"]] == [
        ["red", "green"],
        ["blue", "green"],
        ["blue", "blue"],
    ]
    assert moved_box((0, 0, 3, 2), 0.02, 1) == (1, 0, 4, 2)


def test_spurious_boxes_are_far_from_everything():
    sample = altered(scenes(n=1)[0], [(0, 0, 100, 100), (50, 60, 150, 160)], ["red", "red"], [False, True])
    found = spurious(40, "red", sample)
    assert len({box for _, box in found}) == 40
    original = sample.frames[0].to_original(np.array([box for _, box in found], float))
    for box in original:
        w = np.clip(
            np.minimum(box[2:], sample.target.boxes[:, 2:]) - np.maximum(box[:2], sample.target.boxes[:, :2]), 0, None
        )
        assert (w.prod(1) < 0.5 * (box[2:] - box[:2]).prod()).all() or w.prod(1)[1] == 0
    assert Boxes.pack([original], [[0] * 40]).offsets[-1] == 40


def test_the_program(capsys, tmp_path):
    if not (Path(__file__).resolve().parents[1] / "pr1" / "assets" / DET.warm_start / "config.json").exists():
        pytest.skip("needs the embedded policy (make warmstart)")
    assert main(["--task", "det", "--eval-samples", "5"]) == 0
    out = capsys.readouterr().out
    assert "reward set" in out and "duplicates" in out and "on unrounded targets" in out and "violated: " not in out
    assert main(["--task", "det", "--eval-samples", "5", "--reward", "vlm-r1-map"]) == 1
    assert "violated: sample val-" in capsys.readouterr().out
    assert main(["--task", "det", "--data", str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_weights_of_ones_own_are_a_warning():
    """The exact answer of a weighted `set` need not be worth 1, and training is not refused for it."""
    family, said = FAMILIES["qwen2_5_vl"], []
    task, records = DetTask(weights=(("f1", 0.0), ("count_ratio", 0.5))), SceneDataset("val", 4, SceneOptions.at(0.7))
    lint_before_training(task, family, records, said.append)
    assert len(said) == 1 and said[0].startswith("warning: the reward set ranks answers wrongly")
    assert "exact is worth 1" not in lint(task, [without_pixels(task, family, records[0])]).rows
