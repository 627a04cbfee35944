"""eval.py: the reference numbers of pycocotools, a model's predictions scored by hand, one rank and two."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from runs import read_lines
from tiny_models import make_tiny

import pr1.eval
from pr1.data.scenes import LABELS
from pr1.families import load_family
from pr1.predict import item_score, prediction
from pr1.records import BoxTarget, Rollout, Sample
from pr1.tasks import TASKS

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco_eval_reference"
SCORED = 0.504580698724963  # COCO's own evaluation of its fake results on 100 images of val2014


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    model = make_tiny(folder / "model", "qwen2_5_vl", hidden=32)
    return model, *runs.coco_data(folder, 5)


def run_eval(argv, capsys) -> dict:
    """eval.py in this process; the metrics of its last line."""
    capsys.readouterr()
    assert pr1.eval.main([str(a) for a in argv]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def coco_by_hand(annotations, results: list[dict]) -> np.ndarray:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        run = COCOeval(truth, truth.loadRes(results), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run.stats


@pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"needs {REFERENCE}")
def test_reference_results_of_coco(capsys):
    annotations = REFERENCE / "instances_val2014_100.json"
    results = REFERENCE / "instances_val2014_fakebbox100_results.json"
    metrics = run_eval(["--task", "det", "--data", annotations, "--predictions", results], capsys)
    assert metrics["ap_scored"] == pytest.approx(SCORED, abs=1e-12)
    stats = coco_by_hand(annotations, [{**r, "score": 1.0} for r in json.loads(results.read_text())])
    for name, i in {"ap": 0, "ap50": 1, "ap75": 2, "ap_s": 3, "ap_m": 4, "ap_l": 5, "ar100": 8}.items():
        assert metrics[name] == pytest.approx(stats[i], abs=1e-12), name


class Talker:
    """Makes a model's answers legible: every completion becomes boxes, right and wrong ones, that depend on it."""

    def __init__(self, monkeypatch):
        import pr1.predict
        from pr1.tasks.det import DetTask

        build, stream, samples = DetTask.build, pr1.predict.stream, []

        def kept(task, record, family):
            samples.append(build(task, record, family))
            return samples[-1]

        def talk(policy, *args, **kwargs):
            for (rollout,) in stream(policy, *args, **kwargs):
                yield (self.rewrite(policy.family, samples[rollout.prompt], rollout),)

        monkeypatch.setattr(DetTask, "build", kept)
        monkeypatch.setattr(pr1.predict, "stream", talk)

    @staticmethod
    def rewrite(family, sample, rollout):
        target, frame = sample.target, sample.frames[0]
        items = [
            (label, [int(v) for v in box])
            for label, box in zip(target.labels, frame.to_text(target.boxes), strict=True)
        ]
        items = [(name, [x1, y1, max(x1 + 1, x2 - 5 * i), y2]) for i, (name, (x1, y1, x2, y2)) in enumerate(items)]
        text = family.format_boxes([*items, (LABELS[0], [0, 0, 30, 30]), ("no such class", [1, 1, 5, 5])])
        ids = torch.tensor([*family.tokenizer.encode(text, add_special_tokens=False), family.stop_ids[0]])
        seed = torch.Generator().manual_seed(int(rollout.completion_ids.sum()))
        n = len(ids)
        return Rollout(rollout.prompt, 0, rollout.inputs, ids, torch.ones(n, dtype=torch.bool),
                       -3 * torch.rand(n, generator=seed), torch.zeros(n), torch.zeros(n), text, True)  # fmt: skip


def test_model_ap_is_pycocotools_on_its_predictions(data, tmp_path, capsys, monkeypatch):
    """The file --predictions wrote, read by hand: pixels of the original, category ids of the annotations, scores."""
    model, annotations, images = data
    Talker(monkeypatch)
    file = tmp_path / "predictions.jsonl"
    flags = ["--task", "det", "--data", annotations, "--images", images, "--max-new-tokens", "4"]
    metrics = run_eval([*flags, "--model", model, "--predictions", file], capsys)
    lines = read_lines(file)
    assert [line["image_id"] for line in lines] == [100, 103, 106, 109, 112]
    names = {c["name"]: c["id"] for c in json.loads(Path(annotations).read_text())["categories"]}
    results = []
    for line in lines:
        assert len(line["items"]) >= 3 and "category_id" not in line["items"][-1]
        for item in line["items"][:-1]:  # the last has a label that is no category
            x1, y1, x2, y2 = item["bbox"]
            assert item["category_id"] == names[item["label"]]
            results.append({"image_id": line["image_id"], "category_id": item["category_id"],
                            "bbox": [x1, y1, x2 - x1, y2 - y1], "score": item["score"]})  # fmt: skip
    assert len({r["score"] for r in results}) > 5
    scored = coco_by_hand(annotations, results)
    ones = coco_by_hand(annotations, [{**r, "score": 1.0} for r in results])
    assert 0.05 < scored[0] < 0.95 and abs(scored[0] - ones[0]) > 1e-3
    assert metrics["ap_scored"] == pytest.approx(scored[0], abs=1e-12)
    for name, i in {"ap": 0, "ap50": 1, "ap75": 2, "ap_m": 4, "ar100": 8}.items():
        assert metrics[name] == pytest.approx(ones[i], abs=1e-12), name
    assert metrics["reward"] == pytest.approx(np.mean([line["reward"] for line in lines]))
    # the file scored again, without model or images, gives the same but for the reward, which only a model's text has
    again = run_eval(["--task", "det", "--data", annotations, "--predictions", file], capsys)
    assert again == {k: v for k, v in metrics.items() if k != "reward"}


def test_item_score_by_hand():
    """Tokens that touch the span count, each once; the score is their geometric mean."""
    logp = np.log([0.9, 0.5, 0.8, 0.1])
    spans = [(0, 2), (2, 5), (5, 9), (9, 12)]
    assert item_score(logp, spans, 2, 9) == pytest.approx(math.sqrt(0.5 * 0.8))
    assert item_score(logp, spans, 3, 6) == pytest.approx(math.sqrt(0.5 * 0.8))  # tokens that only overlap
    assert item_score(logp, spans, 0, 12) == pytest.approx((0.9 * 0.5 * 0.8 * 0.1) ** 0.25)
    assert item_score(logp, spans, 9, 10) == pytest.approx(0.1)
    assert item_score(logp, spans, 12, 12) == 0.0


def test_score_of_an_item_in_an_answer(data):
    """Token by token: the probabilities of exactly the characters {...} of the item, the stop token left out."""
    family = load_family(data[0])
    text = '[{"bbox_2d": [1, 2, 20, 30], "label": "cat"}, {"bbox_2d": [4, 4, 9, 9], "label": "dog"}]'
    ids = torch.tensor([*family.tokenizer.encode(text, add_special_tokens=False), family.stop_ids[0]])
    logp = -torch.arange(1, len(ids) + 1, dtype=torch.float32) / 10
    target = BoxTarget(np.zeros((0, 4)), (), np.zeros(0, bool), image_id=3)
    sample = Sample("x", "det", [], (), (family.frame(56, 56),), target)
    rollout = Rollout(0, 0, None, ids, torch.ones(len(ids), dtype=torch.bool), logp, logp, logp, text, True)
    line = prediction(TASKS["det"], family, sample, rollout)
    pieces, at, inside = [family.decode([i]) for i in ids[:-1].tolist()], 0, {0: [], 1: []}
    assert "".join(pieces) == text
    for piece, value in zip(pieces, logp.tolist(), strict=False):
        for n in range(2):
            start = text.index("{", n * text.index("}"))
            if at < text.index("}", start) + 1 and at + len(piece) > start:
                inside[n].append(value)
        at += len(piece)
    assert [item["score"] for item in line["items"]] == [
        pytest.approx(math.exp(sum(v) / len(v)), rel=1e-6) for v in inside.values()
    ]
    assert [item["label"] for item in line["items"]] == ["cat", "dog"]
    assert line["items"][0]["bbox"] == [1.0, 2.0, 20.0, 30.0] and line["image_id"] == 3


def test_two_ranks_write_the_file_of_one(data, tmp_path):
    model, annotations, images = data
    jobs = []
    for ranks in (1, 2):
        argv = ["eval", "--task", "det", "--model", model, "--data", annotations, "--images", images,
                "--max-new-tokens", 12, "--predictions", tmp_path / f"{ranks}.jsonl"]  # fmt: skip
        jobs.append(runs.server().start(argv, tmp_path / f"log{ranks}", ranks))
    for job in jobs:
        job.finish()
    one, two = (read_lines(tmp_path / f"{ranks}.jsonl") for ranks in (1, 2))
    assert one == two and len(one) == 5 and len({line["text"] for line in one}) > 1
    shown = [job.logs[0].read_text().splitlines()[-1] for job in jobs]
    assert json.loads(shown[0]) == json.loads(shown[1])
    assert "ap_scored" not in jobs[1].logs[1].read_text()  # only rank 0 speaks


def test_a_checkpoint_folder_is_a_model(data, tmp_path, capsys):
    """Held-out scenes when no data is named; the first images only when asked for."""
    flags = ["--task", "det", "--model", data[0], "--difficulty", "0", "--max-new-tokens", "4", "--eval-samples", "3"]
    metrics = run_eval([*flags, "--predictions", tmp_path / "p.jsonl"], capsys)
    assert [line["image_id"] for line in read_lines(tmp_path / "p.jsonl")] == [0, 1, 2]
    assert metrics["ap"] == 0.0


@pytest.mark.parametrize("argv, says", [
    (["--predictions", "none.jsonl", "--data", "DATA"], ["none.jsonl", "cannot read"]),
    (["--predictions", "DATA", "--data", "DATA"], ["DATA", "line 1", "eval.py"]),
    (["--predictions", "some.jsonl"], ["some.jsonl", "--data"]),
    (["--model", "MODEL", "--data", "DATA"], ["DATA", "--images"]),
    (["--model", "MODEL", "--data", "DATA", "--images", "IMAGES", "--predictions", "no/such/folder/p.jsonl"],
     ["no/such/folder/p.jsonl", "does not exist"]),
])  # fmt: skip
def test_bad_input(argv, says, data, capsys):
    for name, value in zip(("MODEL", "DATA", "IMAGES"), data, strict=True):
        argv = [value if a == name else a for a in argv]
        says = [value if s == name else s for s in says]
    assert pr1.eval.main(["--task", "det", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and all(word in error for word in says), error
