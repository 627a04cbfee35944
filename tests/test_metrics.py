"""The numbers of a step, from a batch worked out by hand, on one rank and on several of which one has nothing."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pr1.collect import Batch
from pr1.kernels import Rows, RowStats
from pr1.metrics import Clock, loss_metrics, rollout_metrics
from pr1.records import Rollout
from pr1.world import World

ALONE = World(0, 1, torch.device("cpu"))


class Ranks:
    """Worlds of several ranks in threads of one process: the same calls with the same meaning."""

    def __init__(self, size):
        self.barrier, self.size, self.slots = threading.Barrier(size, timeout=30), size, [None] * size

    def of(self, rank):
        def gather(thing):
            self.slots[rank] = thing
            self.barrier.wait()
            things = list(self.slots)
            self.barrier.wait()
            return things

        return SimpleNamespace(
            rank=rank, size=self.size, gather=gather, sum=lambda values: np.sum(gather(values), 0).tolist(),
            max=lambda values: np.max(gather(values), 0).tolist(),
        )  # fmt: skip


def on_ranks(function, inputs):
    """function(input, world) on every rank at once; the results in rank order."""
    ranks, results = Ranks(len(inputs)), [None] * len(inputs)

    def run(rank):
        try:
            results[rank] = function(inputs[rank], ranks.of(rank))
        except BaseException as error:
            results[rank] = error
            ranks.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def rollout(entropy, finished=True):
    n = len(entropy)
    zeros = torch.zeros(n)
    return Rollout(0, 0, None, torch.zeros(n, dtype=torch.int64), torch.ones(n, dtype=torch.bool), zeros, zeros,
                   torch.tensor(entropy), "", finished)  # fmt: skip


# Three groups of two; the numbers are worked out below.
REWARDS = np.array([[0.0, 1.0], [0.5, 0.5], [0.2, 0.8]])
PARTS = {
    "format": np.array([[1, 1], [0, 1], [1, 0]], np.float32),
    "iou": np.array([[0, 1], [0.25, 0.25], [0, 0.5]], np.float32),
}
ROLLOUTS = [rollout([1.0, 2.0]), rollout([0.5], finished=False), rollout([0.25] * 4), rollout([2.0, 1.0, 0.0]),
            rollout([0.75], finished=False), rollout([3.0])]  # fmt: skip
BY_HAND = {
    "reward": 3.0 / 6,
    "reward/format": 4 / 6,
    "reward/iou": 2.0 / 6,
    "reward_std": (np.sqrt(0.5) + 0 + 0.6 / np.sqrt(2)) / 3,  # of two: |difference| / sqrt(2)
    "entropy": (3 + 0.5 + 1 + 3 + 0.75 + 3) / 12,  # a mean over the 12 tokens, not over completions
    "completion_tokens": 12 / 6,
    "truncated": 2 / 6,
    "flat_groups": 3 / 5,  # of the five groups drawn, two of which were replaced
}


def batch(groups, drawn, flat):
    groups = list(groups)
    parts = {name: values[groups] for name, values in PARTS.items()} if groups else {}
    return Batch(samples=[None] * len(groups), rollouts=[ROLLOUTS[2 * p + g] for p in groups for g in range(2)],
                 rewards=REWARDS[groups].reshape(-1, 2), parts=parts, drawn=drawn, flat=flat)  # fmt: skip


def same(metrics, expected):
    assert list(metrics) == list(expected)
    assert metrics == pytest.approx(expected, rel=1e-7)


def test_a_batch_by_hand():
    same(rollout_metrics(batch(range(3), drawn=5, flat=3), ALONE), BY_HAND)


@pytest.mark.parametrize("shares", [
    [(range(2), 3, 2), (range(2, 3), 2, 1)],
    [(range(0), 0, 0), (range(3), 5, 3)],  # the first rank has nothing, and knows no parts
    [(range(1), 2, 1), (range(0), 1, 1), (range(1, 3), 2, 1)],
])  # fmt: skip
def test_ranks_report_what_one_rank_would(shares):
    """Means over everything, not means of the ranks' means."""
    for metrics in on_ranks(rollout_metrics, [batch(*share) for share in shares]):
        same(metrics, BY_HAND)


def stats(logp, kl, clipped):
    zeros = torch.zeros(len(logp))
    return RowStats(torch.tensor(logp), zeros, torch.tensor(kl), zeros + 1, torch.tensor(clipped))


def rows(logp_rollout):
    n = len(logp_rollout)
    zeros = torch.zeros(n)
    return Rows(
        torch.zeros(n, dtype=torch.int64),
        zeros,
        zeros + 1,
        torch.tensor(logp_rollout),
        torch.zeros(n, dtype=torch.int64),
    )


def updates(packs, norms):
    """Two optimizer steps on the same packs; the gap is of the first, kl and clipped of the last."""
    one = [(rows(p["rollout"]), stats(p["logp"], [9.0] * len(p["logp"]), [1.0] * len(p["logp"]))) for p in packs]
    two = [(rows(p["rollout"]), stats([-9.0] * len(p["logp"]), p["kl"], p["clipped"])) for p in packs]
    return [(one, norms[0]), (two, norms[1])]


PACKS = [
    dict(rollout=[-1.0, -2.0, -0.5], logp=[-1.0, -2.25, -0.25], kl=[0.0, 0.3, 0.6], clipped=[0.0, 1.0, 0.0]),
    dict(rollout=[-3.0], logp=[-2.0], kl=[0.1], clipped=[1.0]),
]
LOSS_BY_HAND = {"kl": 1.0 / 4, "clipped": 2 / 4, "logp_gap": 1.5 / 4, "logp_gap_max": 1.0, "grad_norm": 3.0}


def test_losses_by_hand():
    same(loss_metrics(updates(PACKS, (1.5, 3.0)), ALONE), LOSS_BY_HAND)
    same(loss_metrics(updates(PACKS, (3.0, 0.5)), ALONE), LOSS_BY_HAND)  # the largest norm, wherever it is
    single = updates(PACKS, (3.0, 0.0))[:1]
    assert loss_metrics(single, ALONE)["kl"] == pytest.approx(9.0) and loss_metrics(single, ALONE)["clipped"] == 1


@pytest.mark.parametrize("shares", [[PACKS[:1], PACKS[1:]], [[], PACKS], [PACKS[1:], [], PACKS[:1]]])
def test_losses_over_ranks(shares):
    """A rank without packs knows no loss rows, but the norm, which is summed before."""
    for metrics in on_ranks(loss_metrics, [updates(share, (1.5, 3.0)) for share in shares]):
        same(metrics, LOSS_BY_HAND)


def test_a_step_without_any_rows():
    """Every group flat: zeros, no division by zero."""
    same(loss_metrics([([], 0.0)], ALONE), {"kl": 0, "clipped": 0, "logp_gap": 0, "logp_gap_max": 0, "grad_norm": 0})


def test_clock():
    clock = Clock()
    for stage, seconds in (("rollout", 0.02), ("update", 0.03), ("rollout", 0.04)):
        with clock(stage):
            time.sleep(seconds)
    with pytest.raises(KeyError), clock("reward"):  # the time of what fails is counted, too
        raise KeyError
    metrics = clock.metrics(120)
    assert list(metrics) == ["seconds", "seconds/rollout", "seconds/update", "seconds/reward", "tokens_per_second"]
    assert metrics["seconds/rollout"] >= 0.06 and metrics["seconds/update"] >= 0.03
    assert metrics["seconds"] >= metrics["seconds/rollout"] + metrics["seconds/update"]
    assert metrics["tokens_per_second"] == pytest.approx(120 / metrics["seconds"], rel=1e-9)
