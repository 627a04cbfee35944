"""Resuming is bitwise: runs killed anywhere, inside writes too, end with the weights and metrics of one left alone."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import runs
from runs import SHORT, read_lines, same, state_of, timeless
from tiny_models import make_tiny

STEPS = 6
# State of every kind: two moments, the reference, the tower, several updates, a schedule, refills, epochs (5 images).
FLAGS = [
    *("--kl-coef", "0.05", "--entropy-coef", "0.001", "--updates-per-batch", "2", "--train-vision"),
    *("--max-refill", "2"),
    *("--weight-decay", "0.1", "--schedule", "cosine", "--steps", STEPS, "--eval-every", "3"),
]
RIG = ["--flat", "100"]  # the group of this image is always flat: others are drawn instead


class Lab:
    """Model, data and the uninterrupted runs the killed ones are compared with."""

    def __init__(self, folder: Path):
        self.folder, self.whole = folder, {}
        self.model = make_tiny(folder / "model", "qwen2_5_vl", hidden=32)
        data, images = runs.coco_data(folder)
        held_out, held_out_images = runs.coco_data(folder, 2, "val")
        self.flags = ["train", *SHORT, *FLAGS, "--model", self.model, "--data", data, "--images", images,
                      "--eval-data", held_out, "--eval-images", held_out_images]  # fmt: skip

    def start(self, run: Path, *flags, ranks=1, kill=None, killed_rank=0, events=None):
        launcher = [list(RIG) for _ in range(ranks)]
        if kill:
            launcher[killed_rank] += ["--kill", str(kill)]
        if events:
            launcher[0] += ["--events", str(events)]
        argv = [*self.flags, "--run-dir", run, *flags]
        return runs.server().start(argv, Path(f"{run}-log"), ranks, launcher)

    def uninterrupted(self, ranks: int = 1, save_every: int = 1) -> tuple[Path, list[str]]:
        """The run folder, and the calls that changed the disk, in order."""
        key = ranks, save_every
        if key not in self.whole:
            run, events = self.folder / f"whole-{ranks}-{save_every}", self.folder / f"events-{ranks}-{save_every}"
            self.start(run, "--save-every", save_every, ranks=ranks, events=events).finish()
            self.whole[key] = run, events.read_text().split()
        return self.whole[key]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("resume"))


def check_equal(run: Path, whole: Path) -> None:
    ours, truth = state_of(run, STEPS), state_of(whole, STEPS)
    assert same(ours["weights"], truth["weights"])
    assert same(ours["trainer"], truth["trainer"])
    lines = [timeless(line) for line in read_lines(run / "metrics.jsonl")]
    assert lines == [timeless(line) for line in read_lines(whole / "metrics.jsonl")]
    assert [line["step"] for line in lines] == [*range(STEPS + 1)]  # the last holds the evaluation behind the last step
    assert (run / "report.html").is_file()
    assert read_lines(run / "samples.jsonl") == read_lines(whole / "samples.jsonl")
    stale = [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".tmp")]
    assert not stale


def check_discarded(run: Path, whole: Path) -> None:
    """Whatever was computed and thrown away was the same too."""
    truth = {line["step"]: timeless(line) for line in read_lines(whole / "metrics.jsonl")}
    file = run / "metrics.discarded.jsonl"
    for line in read_lines(file) if file.exists() else []:
        assert timeless(line) == truth[line["step"]]


def steps_done(run: Path) -> int:
    """Complete lines of metrics.jsonl."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def test_the_uninterrupted_run_has_state_of_every_kind(lab):
    """Else a resume that forgets some of it would go unseen."""
    whole, events = lab.uninterrupted()
    lines, trainer = read_lines(whole / "metrics.jsonl"), state_of(whole, STEPS)["trainer"]
    assert trainer["sampler"]["epoch"] >= 2 and 0 < trainer["sampler"]["cursor"]
    # without refills 2 prompts a step are drawn
    assert trainer["sampler"]["epoch"] * 5 + trainer["sampler"]["cursor"] > 2 * STEPS
    assert all(line["kl"] > 0 for line in lines[:-1])
    assert any(name.startswith("model.visual") for name in trainer["optimizer"])
    moments = trainer["optimizer"]["model.language_model.embed_tokens.weight"]
    assert float(moments["step"]) == 2 * STEPS and moments["exp_avg"].abs().max() > 0
    assert events.count("write") >= STEPS and events.count("save") >= STEPS and "rmtree" in events


def test_interrupted_between_checkpoints(lab, tmp_path):
    """Killed after step 3 was logged, with a checkpoint at step 2: steps 2 and 3 are done again and equal."""
    whole, events = lab.uninterrupted(save_every=2)
    writes = [i for i, name in enumerate(events) if name == "write"]
    after_step_3 = next(i for i in range(writes[3] + 1, len(events)) if events[i] == "save") + 1
    run = tmp_path / "run"
    assert lab.start(run, "--save-every", 2, kill=after_step_3).wait() == [-9]
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [0, 1, 2, 3]
    assert sorted(p.name for p in (run / "checkpoints").glob("step-*")) == ["step-2"]
    # another number of checkpoints and of steps between them may be chosen for the rest, nothing that changes numbers
    refused = lab.start(run, "--save-every", 2, "--resume", "--seed", 7)
    assert refused.wait() == [2]
    assert "seed: was 0, now 7" in refused.logs[0].read_text()
    lab.start(run, "--save-every", 1, "--resume", "--keep-checkpoints", 5).finish()
    check_equal(run, whole)
    assert [line["step"] for line in read_lines(run / "metrics.discarded.jsonl")] == [2, 3]
    check_discarded(run, whole)


def test_a_finished_run_can_be_extended(lab, tmp_path):
    """3 steps, then 6 with --resume, equal 6 in one go; without --resume the folder is refused."""
    run = tmp_path / "run"
    constant = ["--schedule", "constant", "--eval-every", "-1"]  # a decay would depend on the number of steps
    lab.start(run, *constant, "--steps", 3).finish()
    refused = lab.start(run, *constant)
    assert refused.wait() == [2] and "--resume" in refused.logs[0].read_text()
    lab.start(run, *constant, "--resume").finish()
    lab.start(tmp_path / "whole", *constant).finish()
    ours, truth = state_of(run, STEPS), state_of(tmp_path / "whole", STEPS)
    assert same(ours, truth)
    lines = [[timeless(line) for line in read_lines(folder / "metrics.jsonl")] for folder in (run, tmp_path / "whole")]
    assert lines[0] == lines[1] and len(lines[0]) == STEPS


def kill_points(events: list[str]) -> list[int]:
    """Eight calls, numbered from 1, to die in: of every kind one, the others anywhere, never twice the same."""
    draw = random.Random(20250)
    first = events.index("write") + 1  # before it there is no line
    points = [
        draw.choice([i for i, n in enumerate(events, 1) if n == name and i >= first]) for name in sorted({*events})
    ]
    rest = [i for i in range(1, len(events) + 1) if i not in points]
    return points + draw.sample(rest, 8 - len(points))


def test_killed_inside_a_write_with_one_process(lab, tmp_path):
    """Half a metrics line, half a trainer state, half-deleted checkpoints, before renames and pushes to the disk."""
    whole, events = lab.uninterrupted()
    torn = 0
    for point in kill_points(events):
        run = tmp_path / f"run-{point}-{events[point - 1]}"
        assert lab.start(run, "--save-every", 1, kill=point).wait() == [-9]
        metrics = run / "metrics.jsonl"
        torn += metrics.exists() and metrics.read_bytes()[-1:] not in (b"", b"\n")
        if (run / "config.json").exists():
            lab.start(run, "--save-every", 1, "--resume").finish()
        else:  # killed before there was a run
            lab.start(run, "--save-every", 1).finish()
        check_equal(run, whole)
        check_discarded(run, whole)
    assert torn  # a line was cut in half at least once


def test_killed_at_any_time_again_and_again(lab, tmp_path):
    """One run, killed from outside whenever it has done one or two steps more, and once in its first second."""
    whole, _ = lab.uninterrupted()
    draw, run, kills = random.Random(7), tmp_path / "run", 0
    while kills < 4:
        resume = ["--resume"] if (run / "config.json").exists() else []
        job, before, begun = lab.start(run, "--save-every", 1, *resume), steps_done(run), time.monotonic()
        if kills == 0:
            time.sleep(draw.uniform(0.05, 0.3))
        else:
            while steps_done(run) <= before and time.monotonic() - begun < 30:
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.05))
        job.kill()
        if job.wait() == [0]:
            break  # it was done already
        kills += 1
    assert kills >= 2
    resume = ["--resume"] if (run / "config.json").exists() else []
    lab.start(run, "--save-every", 1, *resume).finish()
    check_equal(run, whole)
    check_discarded(run, whole)


def test_killed_with_two_processes(lab, tmp_path):
    """Rank 0 dies inside its writes, rank 1 at a random time; the other rank is killed too, as torchrun would do."""
    whole, events = lab.uninterrupted(ranks=2)
    draw = random.Random(3)
    writes = [i for i, name in enumerate(events, 1) if name == "write"]
    saves = [i for i, name in enumerate(events, 1) if name == "save"]
    for point in (draw.choice(writes[1:]), draw.choice(saves[1:])):
        run = tmp_path / f"run-{point}"
        job = lab.start(run, "--save-every", 1, ranks=2, kill=point)
        assert runs.Job(job.server, job.pids[:1], job.logs).wait() == [-9]
        job.kill()
        job.wait()
        lab.start(run, "--save-every", 1, "--resume", ranks=2).finish()
        check_equal(run, whole)
        check_discarded(run, whole)
    run = tmp_path / "run-outside"
    job = lab.start(run, "--save-every", 1, ranks=2)
    while steps_done(run) < 3 and job.wait(0.002) == [None, None]:
        pass
    job.kill(1)
    time.sleep(draw.uniform(0, 0.1))
    job.kill()
    job.wait()
    lab.start(run, "--save-every", 1, "--resume", ranks=2).finish()
    check_equal(run, whole)


def test_killed_under_torchrun(lab, tmp_path):
    """The real launcher: a rank that dies ends the launch with an error, and the same command with --resume goes on."""
    whole, events = lab.uninterrupted(ranks=2)
    run = tmp_path / "run"
    point = [i for i, name in enumerate(events, 1) if name == "rename"][2]
    argv = [*lab.flags, "--run-dir", run, "--save-every", 1]
    killed = runs.torchrun([*RIG, "--kill", point, *argv], tmp_path)
    assert killed.returncode != 0
    assert (run / "checkpoints" / "step-2").is_dir() and not (run / "checkpoints" / "step-6").exists()
    resumed = runs.torchrun([*RIG, *argv, "--resume"], tmp_path)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    check_equal(run, whole)
