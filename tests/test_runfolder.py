"""The run folder: what a kill -9 leaves, the lock, the config a resume may bring, and lines that are always JSON."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pr1 import lines
from pr1.checkpoint import checkpoints, load_trainer_state, newest_checkpoint
from pr1.environment import environment
from pr1.progress import Progress, track
from pr1.runfolder import open_run

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {"lr": 1e-6, "steps": 10, "seed": 0, "clip": math.inf, "eval": {"every": 5, "samples": 8}}


def start(path, config=CONFIG, resume=False, rank=0, **options):
    options = {"task": "det", "tensorboard": False} | options
    return open_run(str(path) if path else None, config, resume=resume, rank=rank, **options)


def steps_of(file: Path) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


# --- opening ---------------------------------------------------------------------------------------------------------


def test_config_json_tells_everything(tmp_path):
    with start(tmp_path / "run"):
        pass
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["config"] == {**CONFIG, "clip": "inf"}
    assert record["task"] == "det" and record["resumes"] == []
    told = record["environment"]
    assert told["torch"] == torch.__version__ and told["python"] == sys.version.split()[0]
    assert told["image_backend"] == "pil" and told["world_size"] == 1 and told["device"]
    assert {"git_hash", "transformers", "triton", "pr1"} <= set(told)


def test_git_hash_is_that_of_this_checkout_and_never_an_error(tmp_path, monkeypatch):
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        assert environment()["git_hash"] == head
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert environment()["git_hash"] is None


def test_git_hash_of_a_surrounding_foreign_repository_is_not_taken(tmp_path):
    subprocess.run("git init -q . && git -c user.name=a -c user.email=a@b commit -q --allow-empty -m x", shell=True,
                   cwd=tmp_path, check=True)  # fmt: skip
    package = tmp_path / "venv" / "site-packages" / "pr1"
    package.mkdir(parents=True)
    code = (ROOT / "pr1" / "environment.py").read_text()
    space = {"__file__": str(package / "environment.py"), "__name__": "copy"}
    exec(compile(code, "environment.py", "exec"), space)
    assert space["environment"]()["git_hash"] is None


def test_default_path_and_two_runs_in_one_second(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form, *_: "20260102-030405")
    with start(None) as first, start(None, task="my/tasks/shapes.py") as other, start(None) as second:
        assert str(first.path) == "runs/det-20260102-030405"
        assert str(second.path) == "runs/det-20260102-030405-2"
        assert str(other.path) == "runs/shapes-20260102-030405"


def test_folder_with_a_run_needs_resume_or_another_folder(tmp_path):
    start(tmp_path / "run").close()
    with pytest.raises(ValueError, match=r"run already holds a run: add --resume .* choose another --run-dir"):
        start(tmp_path / "run")
    start(tmp_path / "run", resume=True).close()  # the refusal let go of the lock


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(ValueError, match="--resume needs .* --run-dir"):
        start(None, resume=True)
    with pytest.raises(ValueError, match="nothing holds no run"):
        start(tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        start(tmp_path / "file")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    with pytest.raises(ValueError, match="not the config of a run"):
        start(tmp_path, resume=True)


def test_changed_config_lists_every_field_with_both_values(tmp_path):
    start(tmp_path / "run").close()
    before = (tmp_path / "run" / "config.json").read_text()
    new = {**CONFIG, "lr": 2e-6, "steps": 20, "eval": {"every": 1, "samples": 9}, "added": True}
    with pytest.raises(ValueError) as error:
        start(tmp_path / "run", new, resume=True, may_change={"steps", "every"})
    told = str(error.value).splitlines()[1:]
    assert told == ["  lr: was 1e-06, now 2e-06", "  eval.samples: was 8, now 9", "  added: was (absent), now true"]
    assert (tmp_path / "run" / "config.json").read_text() == before


def test_allowed_changes_are_taken_and_remembered(tmp_path):
    start(tmp_path / "run").close()
    new = {**CONFIG, "steps": 20, "eval": {"every": 1, "samples": 8}}
    with start(tmp_path / "run", new, resume=True, may_change={"steps", "eval.every"}) as run:
        assert run.resumed
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["config"] == {**new, "clip": "inf"}
    assert record["resumes"][0]["changed"] == {"steps": [10, 20], "eval.every": [5, 1]}


def test_config_json_is_never_seen_half_written(tmp_path):
    """A reader that polls while the file is rewritten sees a whole one every time."""
    big = {**CONFIG, **{f"field{i}": "x" * 200 for i in range(5000)}}
    start(tmp_path / "run", big).close()
    broken, reads, done = [], [0], threading.Event()

    def read():
        while not done.is_set():
            try:
                json.loads((tmp_path / "run" / "config.json").read_bytes())
            except (ValueError, OSError) as error:
                broken.append(error)
            reads[0] += 1

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(15):
        start(tmp_path / "run", big, resume=True).close()
    done.set()
    reader.join()
    assert reads[0] > 5 and not broken


# --- ranks and the lock ----------------------------------------------------------------------------------------------


def test_other_ranks_write_nothing(tmp_path):
    with start(tmp_path / "run") as run:
        run.write({"step": 0, "reward": 1.0})
        other = start(tmp_path / "run", rank=3)
        assert other.path == run.path
        other.write({"step": 1})
        other.rewind(0)
        other.close()
    assert steps_of(tmp_path / "run" / "metrics.jsonl") == [0]
    with pytest.raises(ValueError, match="rank 1 was given no run folder"):
        start(None, rank=1)


def test_all_ranks_get_rank_0s_folder_or_its_error(tmp_path):
    start(tmp_path / "taken").close()

    def rank_process(rank: int, out: int) -> None:
        os.chdir(tmp_path)
        meet = f"file://{tmp_path}/meet"
        torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
        told = [str(start(None, rank=rank).path)]
        try:
            start(tmp_path / "taken" if rank == 0 else "/elsewhere", rank=rank)
        except ValueError as error:
            told.append(str(error))
        os.write(out, json.dumps([*told, environment()["world_size"]]).encode())

    ends, workers = [], []
    for rank in (0, 1):  # forked, because importing torch twice takes seconds
        end, out = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                rank_process(rank, out)
            finally:
                os._exit(0)
        os.close(out)
        ends.append(end)
        workers.append(pid)
    said = []
    for end, pid in zip(ends, workers, strict=True):
        with open(end) as pipe:
            said.append(json.loads(pipe.read()))
        os.waitpid(pid, 0)
    assert said[0] == said[1]
    assert said[0][0].startswith("runs/det-20") and "already holds a run" in said[0][1] and said[0][2] == 2


def test_a_folder_in_use_is_refused(tmp_path):
    with start(tmp_path / "run"):
        for resume in (False, True):
            with pytest.raises(ValueError, match=rf"run folder in use: .*run \(process {os.getpid()} on "):
                start(tmp_path / "run", resume=resume)
    start(tmp_path / "run", resume=True).close()


def test_a_killed_run_frees_its_folder_even_if_a_forked_worker_lives_on(tmp_path):
    end, out = os.pipe()
    parent = os.fork()
    if parent == 0:
        try:
            run = start(tmp_path / "run")  # noqa: F841  its lock lives as long as this name
            worker = os.fork()
            if worker:
                os.write(out, f"{worker}\n".encode())
            time.sleep(60)
        finally:
            os._exit(0)
    with open(end) as pipe:
        worker = int(pipe.readline())
    try:
        with pytest.raises(ValueError, match=f"in use.*process {parent} "):
            start(tmp_path / "run", resume=True)
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        os.kill(worker, 0)  # alive
        start(tmp_path / "run", resume=True).close()
    finally:
        for pid in (parent, worker):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_lines_are_json_whatever_the_values(tmp_path):
    with start(tmp_path / "run") as run:
        run.write({"step": 0, "nan": math.nan, "inf": -math.inf, "tensor": torch.tensor(0.5), "numpy": np.float32(0.25),
                   "np_nan": np.float64("nan"), "int": np.int64(3), "none": None, "text": "a\nb"})  # fmt: skip
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()

    def no_constants(name):
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(line, parse_constant=no_constants) == {
        "step": 0, "nan": None, "inf": None, "tensor": 0.5, "numpy": 0.25, "np_nan": None, "int": 3, "none": None,
        "text": "a\nb"}  # fmt: skip


def test_what_is_no_metric_is_refused(tmp_path):
    with start(tmp_path / "run") as run:
        for bad in ({"reward": 1.0}, {"step": 1.5}, {"step": True}):
            with pytest.raises(ValueError, match="integer 'step'"):
                run.write(bad)
        with pytest.raises(ValueError, match="'reward' is not a scalar"):
            run.write({"step": 0, "reward": torch.zeros(2)})
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == b""


def test_rewind_moves_exactly_the_steps_that_run_again(tmp_path):
    run = start(tmp_path / "run")
    for step in range(6):
        run.write({"step": step})
    run.close()
    file, discarded = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "metrics.discarded.jsonl"
    with open(file, "ab") as end:
        end.write(b'not json\n{"step": 6, "rew')
    with start(tmp_path / "run", resume=True) as run:
        with pytest.raises(RuntimeError, match="rewind"):
            run.write({"step": 4})
        run.rewind(4)  # checkpoint step-4: steps 0..3 are done
        assert steps_of(file) == [0, 1, 2, 3]
        assert discarded.read_bytes() == b'{"step": 4}\n{"step": 5}\nnot json\n'
        run.write({"step": 4, "again": True})  # lands in the new file, not in the replaced one
        assert steps_of(file) == [0, 1, 2, 3, 4]
    with start(tmp_path / "run", resume=True) as run:
        run.rewind(4)
        assert steps_of(file) == [0, 1, 2, 3]
        assert discarded.read_bytes().endswith(b'not json\n{"step": 4, "again": true}\n')
        run.rewind(4)  # nothing left to move
    assert discarded.read_bytes().count(b"\n") == 4


def test_a_partial_line_alone_is_dropped_too(tmp_path):
    start(tmp_path / "run").close()
    file = tmp_path / "run" / "metrics.jsonl"
    for tail in ('{"step": 1, "rew', '{"step": 1}'):  # the second lacks but its newline
        file.write_text('{"step": 0}\n' + tail)
        with start(tmp_path / "run", resume=True) as run:
            run.rewind(2)
            run.write({"step": 1, "again": True})
        assert file.read_text() == '{"step": 0}\n{"step": 1, "again": true}\n'
    assert not file.with_name("metrics.discarded.jsonl").exists()


def test_rewind_treats_samples_alike(tmp_path):
    start(tmp_path / "run").close()
    samples = tmp_path / "run" / "samples.jsonl"
    lines.append_lines(samples, [{"step": 0, "id": "a"}, {"step": 5, "id": "a"}])
    with start(tmp_path / "run", resume=True) as run:
        run.rewind(5)
    assert steps_of(samples) == [0]
    assert steps_of(samples.with_name("samples.discarded.jsonl")) == [5]


@pytest.mark.parametrize("crash_at", [0, 1])
def test_rewind_killed_between_its_two_files_loses_nothing_and_moves_nothing_twice(tmp_path, monkeypatch, crash_at):
    run = start(tmp_path / "run")
    for step in range(5):
        run.write({"step": step})
    run.close()
    file, discarded = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "metrics.discarded.jsonl"
    replace, calls = os.replace, []

    def crash(source, target):
        calls.append(target)
        if len(calls) == crash_at + 1:
            raise KeyboardInterrupt
        replace(source, target)

    with start(tmp_path / "run", resume=True) as run:
        monkeypatch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            run.rewind(2)
        monkeypatch.undo()
        assert steps_of(file) == [0, 1, 2, 3, 4]
    with start(tmp_path / "run", resume=True) as run:
        run.rewind(2)
    assert steps_of(file) == [0, 1] and steps_of(discarded) == [2, 3, 4]


# --- a real kill -----------------------------------------------------------------------------------------------------

# A run in small: the state is one float64, a metric of step k is the state before it, a checkpoint comes every 3 steps.
TRAIN = """
import os, sys
import torch
from pr1.checkpoint import load_trainer_state, newest_checkpoint, save_checkpoint, save_trainer_state
from pr1.runfolder import open_run

def train(folder):
    resume = os.path.exists(folder + "/config.json")
    run = open_run(folder, {"seed": 0}, task="det", resume=resume, rank=0, tensorboard=False)
    x, start = torch.tensor([0.3], dtype=torch.float64), 0
    if resume:
        newest = newest_checkpoint(folder)
        if newest:
            state = load_trainer_state(newest / "state.pt")
            x, start = state["x"], state["step"]
        run.rewind(start)
    for step in range(start, 10**9):
        run.write({"step": step, "x": x[0], "pad": "p" * 3000})
        x = 3.7 * x * (1 - x)
        if (step + 1) % 3 == 0:
            def write(path):
                (path / "model").mkdir()
                (path / "model" / "weights").write_bytes(bytes([step % 256]) * 200_000)
                save_trainer_state(path / "state.pt", {"x": x, "step": step + 1})
            save_checkpoint(folder, step + 1, write, keep=2)

for line in sys.stdin:  # torch is imported once, every life of the run is a process of its own
    pid = os.fork()
    if pid == 0:
        train(sys.argv[1])
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def test_kill_9_at_any_moment_leaves_a_run_that_goes_on_exactly(tmp_path):
    folder = tmp_path / "run"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([sys.executable, "-c", TRAIN, str(folder)], env=env, text=True, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)  # fmt: skip
    rng, newest_steps = random.Random(0), []
    try:
        for life in range(12):
            server.stdin.write("go\n")
            server.stdin.flush()
            pid = int(server.stdout.readline())
            time.sleep(0.15 + 0.25 * rng.random() if life > 1 else 0.01 + 0.02 * life)
            os.kill(pid, signal.SIGKILL)
            assert int(server.stdout.readline()) == -signal.SIGKILL
            if not (folder / "config.json").exists():
                continue
            json.loads((folder / "config.json").read_text())
            newest = newest_checkpoint(folder)
            for whole in checkpoints(folder):
                state = load_trainer_state(whole / "state.pt")
                assert f"step-{state['step']}" == whole.name
                weights = (whole / "model" / "weights").read_bytes()
                assert weights == bytes([(state["step"] - 1) % 256]) * 200_000
            newest_steps.append(int(newest.name[5:]) if newest else 0)
    finally:
        server.kill()
    assert newest_steps == sorted(newest_steps) and newest_steps[-1] > newest_steps[1]
    with start(folder, {"seed": 0}, resume=True) as run:
        run.rewind(newest_steps[-1])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(newest_steps[-1]))
    x = torch.tensor([0.3], dtype=torch.float64)
    for row in rows:  # the metrics of a run that was never killed, bit for bit
        assert row["x"] == x.item()
        x = 3.7 * x * (1 - x)
    for line in (folder / "metrics.discarded.jsonl").read_text().splitlines():
        json.loads(line)


# --- loggers ---------------------------------------------------------------------------------------------------------


def test_tensorboard_shows_the_steps_done_again_once(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with start(tmp_path / "run", tensorboard=True) as run:
        for step in range(5):
            run.write({"step": step, "reward": 0.125 * step, "kl": math.nan, "note": "text"})
    with start(tmp_path / "run", tensorboard=True, resume=True) as run:
        run.rewind(3)
        for step in range(3, 6):
            run.write({"step": step, "reward": 10.0 + step})
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["reward"]
    shown = [(event.step, event.value) for event in events.Scalars("reward")]
    assert shown == [(0, 0.0), (1, 0.125), (2, 0.25), (3, 13.0), (4, 14.0), (5, 15.0)]


def test_tensorboard_off_leaves_no_folder(tmp_path):
    with start(tmp_path / "run") as run:
        run.write({"step": 0, "reward": 1.0})
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_wandb_missing_is_told_before_anything_is_made(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # the log folder of an earlier run imports as an empty package
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ValueError, match="pip install wandb"):
        start(tmp_path / "run", wandb=True)
    assert not (tmp_path / "run").exists()


def test_wandb_gets_one_run_across_a_resume(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text(
        "calls = []\n"
        "def init(**options): calls.append(options); return Run()\n"
        "class Run:\n"
        "    def log(self, metrics, step): calls.append((step, metrics))\n"
        "    def finish(self): calls.append('finish')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with start(tmp_path / "run", wandb=True) as run:
        run.write({"step": 0, "reward": 0.5, "kl": math.nan})
    start(tmp_path / "run", wandb=True, resume=True).close()
    first, logged, finished, second, _ = sys.modules["wandb"].calls
    monkeypatch.delitem(sys.modules, "wandb")
    assert logged == (0, {"reward": 0.5}) and finished == "finish"
    assert first["name"] == "run" and first["config"]["config"]["lr"] == 1e-6
    assert first["id"] == second["id"] and second["resume"] == "allow"


# --- progress --------------------------------------------------------------------------------------------------------


class Screen:
    def __init__(self, tty: bool):
        self.text, self.tty = "", tty

    def isatty(self):
        return self.tty

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_progress_in_a_log_file_is_whole_lines(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    screen = Screen(tty=False)
    progress = Progress(10, start=4, seconds=30, file=screen)
    for step in range(4, 10):
        now[0] += 20
        progress.update(step, {"reward": 0.5, "kl": None, "tokens_per_second": 1234.4})
    progress.close()
    assert screen.text.splitlines() == [
        "step 5/10  reward 0.500  tokens/s 1234  01:40 left",  # 20 s a step
        "step 7/10  reward 0.500  tokens/s 1234  01:00 left",
        "step 9/10  reward 0.500  tokens/s 1234  00:20 left",
        "step 10/10  reward 0.500  tokens/s 1234  00:00 left",
    ]
    assert all(character.isprintable() or character == "\n" for character in screen.text)


def test_progress_on_a_terminal_is_a_bar_and_silent_elsewhere():
    screen = Screen(tty=True)
    progress = Progress(10, file=screen)
    progress.update(0, {"reward": 0.5})
    progress.say("hello")
    progress.close()
    assert "1/10" in screen.text and "reward 0.500" in screen.text and "hello\n" in screen.text
    silent = Screen(tty=True)
    progress = Progress(10, enabled=False, file=silent)
    progress.update(0, {})
    progress.say("hello")
    progress.close()
    assert list(track(range(3), "x", rank=1, file=silent)) == [0, 1, 2] and silent.text == ""


def test_track_tells_of_long_work_only(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    screen = Screen(tty=False)
    for _ in track(range(4), "rendering", rank=0, seconds=10, file=screen):
        now[0] += 6
    assert screen.text.splitlines() == ["rendering: 2/4, 00:12 left", "rendering: 4, took 00:24"]
    short = Screen(tty=False)
    assert list(track(iter("ab"), "short", rank=0, seconds=100, file=short)) == ["a", "b"] and short.text == ""
    bar = Screen(tty=True)
    assert list(track([1, 2], "evaluating", rank=0, file=bar)) == [1, 2] and "evaluating" in bar.text
