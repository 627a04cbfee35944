"""Checkpoints are whole or absent, the oldest go, and the trainer's state comes back bit for bit."""

from __future__ import annotations

import pickle
import random
import shutil

import numpy as np
import pytest
import torch

from pr1 import checkpoint
from pr1.checkpoint import checkpoints, load_trainer_state, newest_checkpoint, save_checkpoint, save_trainer_state


def names(folder):
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def put(value):
    return lambda path: (path / "weights").write_text(value)


def test_keep_counts_by_step_not_by_name(tmp_path):
    for step in (2, 9, 10, 100):
        assert save_checkpoint(tmp_path, step, put(str(step)), keep=2) == tmp_path / "checkpoints" / f"step-{step}"
    assert names(tmp_path) == ["step-10", "step-100"]
    assert newest_checkpoint(tmp_path).name == "step-100"
    save_checkpoint(tmp_path, 101, put("101"), keep=0)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-10", "step-100", "step-101"]
    for step, keep in ((-1, 2), (1, -1)):
        with pytest.raises(ValueError, match="negative"):
            save_checkpoint(tmp_path, step, put(""), keep)


def test_there_may_be_none(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".tmp-step-7-123").mkdir()
    (tmp_path / "checkpoints" / "step-x").mkdir()
    (tmp_path / "checkpoints" / "step-8").write_text("a file")
    assert newest_checkpoint(tmp_path) is None


def test_what_a_killed_process_left_is_swept(tmp_path):
    stale = tmp_path / "checkpoints" / ".tmp-step-7-123"
    stale.mkdir(parents=True)
    (stale / "weights").write_text("half")
    save_checkpoint(tmp_path, 8, put("8"), keep=1)
    assert names(tmp_path) == ["step-8"]


def test_a_failing_write_leaves_no_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 1, put("1"), keep=1)

    def fail(path):
        put("half")(path)
        assert newest_checkpoint(tmp_path).name == "step-1"  # not seen while it is being written
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, 2, fail, keep=1)
    assert names(tmp_path) == ["step-1"]


def test_a_step_that_is_there_already_stays(tmp_path):
    save_checkpoint(tmp_path, 5, put("old"), keep=1)
    save_checkpoint(tmp_path, 5, lambda path: pytest.fail("written again"), keep=1)
    assert (tmp_path / "checkpoints" / "step-5" / "weights").read_text() == "old"


def test_everything_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done = []
    fsync, rename = checkpoint.fsync, checkpoint.os.rename
    monkeypatch.setattr(checkpoint, "fsync", lambda path: (done.append(path.name), fsync(path)))
    monkeypatch.setattr(checkpoint.os, "rename", lambda a, b: (done.append(f"-> {b.name}"), rename(a, b)))
    (tmp_path / "metrics.jsonl").write_text("")

    def write(path):
        (path / "sub").mkdir()
        (path / "sub" / "inner").write_text("x")
        put("x")(path)

    save_checkpoint(tmp_path, 3, write, keep=1)
    named = done.index("-> step-3")
    assert {"inner", "sub", "weights", "metrics.jsonl"} <= set(done[:named])
    assert done.index("inner") < done.index("sub") and "checkpoints" in done[named:]


def test_a_kill_while_deleting_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, put("1"), keep=1)

    def killed(path, *_, **__):
        (path / "weights").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, put("2"), keep=1)
    monkeypatch.undo()
    assert [(p.name, (p / "weights").read_text()) for p in checkpoints(tmp_path)] == [("step-2", "2")]


def a_state():
    weight = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(weight.parameters(), lr=1e-3)
    weight(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return {
        "optimizer": optimizer.state_dict(), "master": dict(weight.named_parameters()), "step": 12, "lr": 0.1,
        "half": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16), "empty": torch.empty(0, 4, dtype=torch.int64),
        "rng": {"torch": torch.get_rng_state(), "python": random.getstate()}, "none": None, "raw": b"\x00\xff",
        "order": [3, 1, 2], "big": 2**80, "flag": True, "task": "détection",
    }  # fmt: skip


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.detach().numpy(force=True).tobytes() == b.detach().numpy(force=True).tobytes() if (
            a.dtype != torch.bfloat16) else torch.equal(a.view(torch.int16), b.view(torch.int16))  # fmt: skip
    else:
        assert a == b


def test_trainer_state_comes_back_bit_for_bit(tmp_path):
    state = a_state()
    save_trainer_state(tmp_path / "trainer.pt", state)
    assert_same(load_trainer_state(tmp_path / "trainer.pt"), state)


def test_what_could_run_code_or_not_be_read_back_is_refused_by_name(tmp_path):
    for value, name in ((np.zeros(2), "numpy.ndarray"), (np.float64(1), "numpy.float64"), (random.Random(), "Random"),
                        (torch.float32, "torch.dtype"), ({1, 2}, "builtins.set")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"state\['a'\]\[1\]\['b'\] is a .*{name}"):
            save_trainer_state(tmp_path / "trainer.pt", {"a": [0, {"b": value}]})
    with pytest.raises(ValueError, match="key of type tuple"):
        save_trainer_state(tmp_path / "trainer.pt", {(1, 2): 0})
    assert not (tmp_path / "trainer.pt").exists()


class Bomb:
    def __reduce__(self):
        return (open, ("/dev/null",))


def test_missing_or_damaged_state_names_the_file_and_the_remedy(tmp_path):
    folder = tmp_path / "step-7"
    folder.mkdir()
    file = folder / "trainer.pt"
    remedy = rf"delete the checkpoint {folder} and resume again"
    with pytest.raises(ValueError, match=rf"{file} is missing; {remedy}"):
        load_trainer_state(file)
    save_trainer_state(file, a_state())
    whole = file.read_bytes()
    middle = whole.index(torch.get_rng_state().numpy().tobytes()) + 100  # inside a tensor
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    half = len(whole) // 2
    for damaged in (b"", b"hello", whole[:100], whole[:half], whole[:-1], flipped, pickle.dumps(Bomb())):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{file} is damaged .*{remedy}"):
            load_trainer_state(file)
    torch.save(Bomb(), file)  # a whole archive that would run code
    with pytest.raises(ValueError, match=rf"{file} is damaged .*{remedy}"):
        load_trainer_state(file)
    torch.save([1, 2], file)
    with pytest.raises(ValueError, match="no trainer state"):
        load_trainer_state(file)
