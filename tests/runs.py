"""Real runs for the tests: small data, a reward that random models can move, processes that are launched and killed.

A random tiny model never finds a box, so `det` itself gives it no gradient. `RiggedDet` is `det` in everything but the
reward, which is a fixed function of the text. Child processes come from one server that has imported everything and
forks (tests/rigged_run.py --serve); `torchrun` launches for real.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pr1.data.scenes import SceneDataset, SceneOptions
from pr1.tasks.det import DetTask

HERE = Path(__file__).resolve().parent
LAUNCHER = HERE / "rigged_run.py"
# A run of few, short steps. Images of difficulty 0 are small; save_every and evaluation are off unless asked for.
SHORT = [
    *("--task", "det", "--group-size", "3", "--prompts-per-step", "2", "--max-new-tokens", "8", "--difficulty", "0"),
    *("--lr", "2e-4", "--warmup-steps", "2", "--eval-every", "-1", "--eval-samples", "3", "--save-every", "0"),
    "--no-tensorboard",
]


@dataclass(frozen=True)
class RiggedDet(DetTask):
    """Detection whose reward is a hash of the text, from 0 to 1; the groups of the samples `flat` are worth 0.5."""

    flat: tuple[str, ...] = ()

    def reward(self, texts, samples, *, progress=1.0):
        _, parts = super().reward(texts, samples)
        values = [
            [500 if sample.id in self.flat else zlib.crc32(text.encode()) % 1001 for text in group]
            for group, sample in zip(texts, samples, strict=True)
        ]
        return np.array(values, np.float32).reshape(len(texts), -1) / 1000, parts


class Spy:
    """Keeps what passes through the training loop of this process: batches, gradients before clipping, weights."""

    def __init__(self, setattr_):
        import pr1.train
        from pr1.optim import Optimizer

        self.batches, self.grads, self.weights, self.losses = [], [], [], []
        collect, clip, loss = pr1.train.collect, Optimizer.clip, pr1.train.linear_grpo_loss

        def spied_collect(*args):
            self.batches.append(collect(*args))
            return self.batches[-1]

        def spied_clip(optimizer):
            self.grads.append({n: m.grad.clone() for n, m in zip(optimizer.names, optimizer.masters, strict=True)})
            self.weights.append(
                {n: m.detach().clone() for n, m in zip(optimizer.names, optimizer.masters, strict=True)}
            )
            return clip(optimizer)

        def spied_loss(*args):
            value, stats = loss(*args)
            self.losses.append(float(value.detach()))
            return value, stats

        setattr_(pr1.train, "collect", spied_collect)
        setattr_(pr1.train, "linear_grpo_loss", spied_loss)
        setattr_(Optimizer, "clip", spied_clip)

    def plain(self) -> dict:
        """Everything as plain values and tensors, rollouts as {prompt, completion, ids, text}."""
        batches = [
            {"rollouts": [{"prompt": r.prompt, "completion": r.completion, "ids": r.completion_ids.tolist(),
                           "text": r.text, "logp": r.logp_rollout, "log_kept": r.log_kept} for r in batch.rollouts],
             "samples": [s.id for s in batch.samples], "rewards": batch.rewards.tolist(), "drawn": batch.drawn,
             "flat": batch.flat}
            for batch in self.batches
        ]  # fmt: skip
        return {"batches": batches, "grads": self.grads, "losses": self.losses}


# ---- data ----------------------------------------------------------------------------------------------------------


def coco_data(folder: Path, n: int = 5, split: str = "train") -> tuple[str, str]:
    """Writes n small rendered scenes as PNG files and a COCO instances file; returns (annotations, images)."""
    images, annotations = Path(folder) / f"{split}-images", []
    images.mkdir(parents=True)
    records = [SceneDataset(split, n, SceneOptions.at(0.0, min_objects=1))[i] for i in range(n)]
    ids = {name: 7 + 2 * i for i, name in enumerate(records[0].categories)}
    entries = []
    for number, record in enumerate(records):
        name, image_id = f"{number:03d}.png", 100 + 3 * number
        record.load().save(images / name)
        entries.append({"id": image_id, "file_name": name, "width": record.width, "height": record.height})
        for box, label in zip(record.target.boxes, record.target.labels, strict=True):
            x1, y1, x2, y2 = map(float, box)
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": ids[label],
                                "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1),
                                "iscrowd": 0})  # fmt: skip
    file = Path(folder) / f"{split}.json"
    categories = [{"id": i, "name": name} for name, i in ids.items()]
    file.write_text(json.dumps({"images": entries, "annotations": annotations, "categories": categories}))
    return str(file), str(images)


def one_image_data(folder: Path, **changes) -> dict:
    """A COCO instances dict of one grey 40x30 image in `folder`/images, one box; top-level keys can be replaced."""
    images = Path(folder) / "images"
    images.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (90, 90, 90)).save(images / "a.png")
    return {
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}],
        "annotations": [{"id": 5, "image_id": 1, "category_id": 2, "bbox": [1, 2, 10, 12], "iscrowd": 0}],
        "categories": [{"id": 2, "name": "cat"}],
        **changes,
    }


# ---- what a run left -----------------------------------------------------------------------------------------------


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def timeless(line: dict) -> dict:
    """A metrics line without what depends on the clock."""
    return {k: v for k, v in line.items() if not k.startswith("seconds") and not k.endswith("_per_second")}


def state_of(run_dir: Path, step: int) -> dict:
    """Weights and trainer state of a checkpoint, tensors by name."""
    from safetensors.torch import load_file

    folder = Path(run_dir) / "checkpoints" / f"step-{step}"
    return {"weights": load_file(folder / "model.safetensors"), "trainer": torch.load(folder / "trainer_state.pt")}


def same(a, b) -> bool:
    """Bitwise equality of nested states."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


# ---- processes -----------------------------------------------------------------------------------------------------


class Job:
    """One run: a process per rank, all children of the server."""

    def __init__(self, server: Server, pids: list[int], logs: list[Path]):
        self.server, self.pids, self.logs = server, pids, logs

    def wait(self, timeout: float = 180.0) -> list[int | None]:
        """Exit status of every rank, -9 for a kill -9, None for one still running after `timeout` seconds."""
        return self.server.ask(do="wait", pids=self.pids, timeout=timeout)

    def kill(self, *ranks: int) -> None:
        """kill -9 of these ranks, or of all."""
        for pid in [self.pids[rank] for rank in ranks] or self.pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def finish(self) -> None:
        """Waits for success of every rank; a hang or a failure shows the end of the logs."""
        status = self.wait()
        if status != [0] * len(self.pids):
            self.kill()
            tails = "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in self.logs)
            raise AssertionError(f"exit status {status} (None: no end within the time)\n{tails}")


class Server:
    """Forks runs of tests/rigged_run.py from a process that has done its imports."""

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, str(LAUNCHER), "--serve"], stdin=subprocess.PIPE, text=True,
                                        stdout=subprocess.PIPE, env=environment())  # fmt: skip

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, argv: list[str], log: Path, ranks: int = 1, launcher: list[list[str]] | None = None) -> Job:
        """argv: program and flags. launcher: options of tests/rigged_run.py for each rank."""
        port = free_port()
        options = launcher or [[]] * ranks
        logs = [Path(f"{log}.{rank}.log") for rank in range(ranks)]
        processes = [
            {"argv": [*options[rank], *map(str, argv)], "log": str(logs[rank]), "env": {} if ranks == 1 else {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}}
            for rank in range(ranks)
        ]  # fmt: skip
        return Job(self, self.ask(do="start", processes=processes), logs)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=20)


@functools.cache
def server() -> Server:
    """The one server of this test session."""
    the_server = Server()
    atexit.register(the_server.close)
    return the_server


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(argv: list[str], cwd: Path, ranks: int = 2, timeout: float = 400.0) -> subprocess.CompletedProcess:
    """A real launch of tests/rigged_run.py by torch.distributed.run on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    process = subprocess.Popen([*command, str(LAUNCHER), *map(str, argv)], cwd=cwd, env=environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends its workers then; a kill would leave them behind
        out, err = process.communicate(timeout=60)
        raise AssertionError(f"no end within {timeout} s\n{err[-3000:]}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def train_here(argv: list, task=None):
    """train.py in this process with the rigged reward, or another task. Returns (session, spy) after the run."""
    import pytest

    import pr1.session
    from pr1.session import run_program
    from pr1.tasks import TASKS
    from pr1.train import train

    sessions = []

    def body(session):
        sessions.append(session)
        train(session)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # else the run sets its own number of threads for all tests to come
        patch.setitem(TASKS, "det", task or RiggedDet())
        patch.setattr(pr1.session, "lint_before_training", lambda *_: None)  # a rigged reward ranks nothing rightly
        spy = Spy(patch.setattr)
        assert run_program([str(a) for a in argv], "train.py", "", body) == 0
    return sessions[0], spy
