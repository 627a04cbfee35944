"""Ranks: shares, and sums, maxima and gathers of two real processes."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from pr1.world import World, start_world

SHAPES = ((4, (2, 2)), (3, (3,)), (0, (0,)), (12, (3, 4)), (1, ()), (2, (2, 1)))

# What each of the two processes does; prints one line of JSON. Values are such that a lost or doubled rank shows.
RANK = """
import json, torch
from pr1.world import start_world
import torch.distributed as dist

world = start_world()
r, out = world.rank, {}
out["world"] = [world.rank, world.size, str(world.device), world.main, dist.get_backend()]
out["sum"] = world.sum([1 + r, 10.5 * (1 - r), 2.0**-20 if r else 2.0**20])
out["max"] = world.max([1 - r, -5 - r, 3])
calls, reduce = [], dist.all_reduce
def counting(tensor, *args, **how):
    calls.append(tensor.numel())
    return reduce(tensor, *args, **how)
for bucket in (1, 6, 7, 100, 1 << 26):
    tensors = [torch.arange(n).reshape(shape) + 100.0 * r for n, shape in SHAPES]
    where = [t.data_ptr() for t in tensors]
    dist.all_reduce = counting
    world.sum_tensors(tensors, bucket)
    dist.all_reduce = reduce
    out[f"tensors {bucket}"] = [t.tolist() for t in tensors]
    out[f"calls {bucket}"] = list(calls)
    assert where == [t.data_ptr() for t in tensors]
    calls.clear()
strided = torch.arange(6.0).reshape(2, 3).T + r  # not contiguous
world.sum_tensors([strided])
out["strided"] = strided.tolist()
half = torch.full((3,), 1.0 + r, dtype=torch.float64)
world.sum_tensors([half])
out["double"] = [str(half.dtype), half.tolist()]
world.sum_tensors([])
out["gather"] = world.gather({"rank": r, "lines": [f"line {r}"] * r})
world.barrier()
world.close()
out["closed"] = not dist.is_initialized()
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def ranks():
    """The JSON lines of two processes, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    command = [sys.executable, "-P", "-c", f"SHAPES = {SHAPES}\n{RANK}"]
    running = [
        subprocess.Popen(command, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True) for rank in range(2)
    ]  # fmt: skip
    try:
        done = [process.communicate(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, done, strict=True):
        assert process.returncode == 0, errors[-2000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in done]


def test_two_processes_know_who_they_are(ranks):
    assert [each["world"] for each in ranks] == [[0, 2, "cpu", True, "gloo"], [1, 2, "cpu", False, "gloo"]]
    assert all(each["closed"] for each in ranks)


def test_sums_and_maxima_reach_every_rank(ranks):
    for each in ranks:
        assert each["sum"] == [3, 10.5, 2.0**20 + 2.0**-20]  # in float64: float32 would lose the small one
        assert each["max"] == [1, -5, 3]


@pytest.mark.parametrize("bucket, calls", [
    (1, [4, 3, 12, 1, 2]),  # larger tensors go alone; the empty one rides with its predecessor
    (6, [4, 3, 12, 3]),
    (7, [7, 12, 3]),
    (100, [22]),
    (1 << 26, [22]),
])  # fmt: skip
def test_tensors_are_summed_in_buckets(ranks, bucket, calls):
    expected = [(2 * torch.arange(n) + 100.0).reshape(shape).tolist() for n, shape in SHAPES]
    for each in ranks:
        assert each[f"tensors {bucket}"] == expected
        assert [n for n in each[f"calls {bucket}"] if n] == calls
    for each in ranks:
        assert each["strided"] == (2 * torch.arange(6.0).reshape(2, 3).T + 1).tolist()
        assert each["double"] == ["torch.float64", [3.0] * 3]


def test_gathered_objects_come_in_rank_order_to_every_rank(ranks):
    for each in ranks:
        assert each["gather"] == [{"rank": 0, "lines": []}, {"rank": 1, "lines": ["line 1"]}]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_cover_everything_once(size):
    for n in (0, 1, 2, 5, 7, 16, 100):
        shares = [World(rank, size, torch.device("cpu")).share(n) for rank in range(size)]
        assert [i for share in shares for i in share] == list(range(n))  # contiguous, in order
        lengths = [len(share) for share in shares]
        assert max(lengths) - min(lengths) <= 1


def test_one_process_alone(monkeypatch):
    """No process group is needed or made; everything is its own sum."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    world = start_world()
    assert (world.rank, world.size, world.main) == (0, 1, True) and not torch.distributed.is_initialized()
    assert world.sum([1, 2.5]) == world.max([1, 2.5]) == [1.0, 2.5] and world.gather("x") == ["x"]
    tensor = torch.arange(3.0)
    world.sum_tensors([tensor])
    assert tensor.tolist() == [0, 1, 2]
    world.barrier()
    world.close()
