"""Two processes do what one does: the same rollouts, and losses, gradients and metrics equal to rounding.

Gradients are compared, not weights: Adam's first steps turn the rounding of a tiny gradient into a whole step.
"""

from __future__ import annotations

import math

import pytest
import runs
import torch
from runs import SHORT, read_lines, timeless
from tiny_models import make_tiny

from pr1.assemble import TRAIN_SCENES
from pr1.sampler import PromptSampler

EXACT = ("step", "completion_tokens", "truncated", "flat_groups", "clipped", "lr")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("ranks") / "model", "qwen2_5_vl", hidden=32)


def load(dump, ranks: int) -> list[dict]:
    return [torch.load(f"{dump}.{rank}.pt") for rank in range(ranks)]


def start(model, folder, ranks: int, flags: str, flat=()):
    """flat: places in the drawing order whose groups are flat."""
    argv = ["train", *SHORT, "--model", model, "--run-dir", folder / f"run{ranks}", "--steps", 1, *flags.split()]
    order = PromptSampler(TRAIN_SCENES, 0).draw(20)
    ids = ",".join(f"train-{order[i]}" for i in flat)
    launcher = [["--flat", ids, "--dump", str(folder / f"dump{ranks}")] for _ in range(ranks)]
    return runs.server().start(argv, folder / f"log{ranks}", ranks, launcher)


def groups_of(dumps: list[dict], step: int = 0) -> dict:
    """Prompt index in the global step -> (sample, rewards, its rollouts), over all ranks."""
    found = {}
    for dump in dumps:
        batch = dump["batches"][step]
        group = len(batch["rollouts"]) // max(1, len(batch["samples"]))
        for i, sample in enumerate(batch["samples"]):
            rollouts = batch["rollouts"][i * group : (i + 1) * group]
            assert rollouts[0]["prompt"] not in found
            found[rollouts[0]["prompt"]] = sample, batch["rewards"][i], rollouts
    return found


def compare(one: list[dict], two: list[dict], folder, rtol: float = 1e-5) -> None:
    """One process's dump and lines against those of two. rtol: of the metrics."""
    a, b = groups_of(one), groups_of(two)
    assert a.keys() == b.keys()
    for prompt, (sample, rewards, rollouts) in a.items():
        assert (sample, rewards) == b[prompt][:2]
        for ours, theirs in zip(rollouts, b[prompt][2], strict=True):
            assert (ours["completion"], ours["ids"], ours["text"]) == tuple(
                theirs[k] for k in ("completion", "ids", "text")
            )
            assert torch.allclose(ours["logp"], theirs["logp"], atol=1e-5)
    losses = [sum(sum(dump["losses"]) for dump in dumps) for dumps in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=10 * rtol, abs=1e-6)
    truth = one[0]["grads"][0]
    whole = math.sqrt(sum(float(g.double().square().sum()) for g in truth.values()))
    assert whole > 1e-3
    for dump in two:  # the sum over ranks, on each of them
        for name, grad in dump["grads"][0].items():
            error = float((grad - truth[name]).double().norm())
            assert error <= 1e-5 * max(float(truth[name].norm()), 1e-2 * whole), (name, error)
    for ours, theirs in zip(*(read_lines(folder / f"run{n}" / "metrics.jsonl") for n in (1, 2)), strict=True):
        ours, theirs = timeless(ours), timeless(theirs)
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            if key in EXACT or value is None:
                assert theirs[key] == value, key
            elif key.startswith("logp_gap"):
                assert 0 < theirs[key] < 1e-4
            else:
                assert theirs[key] == pytest.approx(value, rel=rtol, abs=1e-7), key


CASES = {  # flags; flat places; groups of each rank
    "odd number of prompts": ("--prompts-per-step 3 --eval-every 0", (), [1, 2]),
    "a rank without prompts": ("--prompts-per-step 1 --kl-coef 0.1 --train-vision", (), [0, 1]),
    "a rank without packs": ("--prompts-per-step 4", (0, 1, 2), [2, 2]),
    "a group moves": ("--prompts-per-step 4", (0, 1), [2, 2]),  # rank 0 has no live group, rank 1 two
    "refill": ("--prompts-per-step 3 --max-refill 3 --aggregation sequence-mean --group-size 2", (0, 2, 3), [0, 3]),
    # behind the first update weights differ by Adam's share of the rounding, but kl is no longer 0
    "two updates": ("--prompts-per-step 3 --updates-per-batch 2 --kl-coef 0.01 --lr 1e-3", (), [1, 2]),
    "few rows": ("--prompts-per-step 5 --rollout-batch 4 --max-new-tokens 24", (), [2, 3]),  # refilled in mid-flight
    "several packs": ("--prompts-per-step 3 --pack-tokens 90 --entropy-coef 0.01", (), [1, 2]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_rank_and_two(case, model, tmp_path):
    flags, flat, shares = CASES[case]
    jobs = [start(model, tmp_path, n, flags, flat) for n in (1, 2)]
    for job in jobs:
        job.finish()  # a hang ends after three minutes
    one, two = load(tmp_path / "dump1", 1), load(tmp_path / "dump2", 2)
    compare(one, two, tmp_path, 1e-2 if case == "two updates" else 1e-5)
    assert [len(dump["batches"][0]["samples"]) for dump in two] == shares
    packs = [len(dump["losses"]) for dump in two]
    if case == "a rank without prompts":
        assert packs == [0, 1]
    if case == "a rank without packs":
        assert packs == [0, 1] and one[0]["batches"][0]["flat"] == 3
    if case == "a group moves":
        assert packs == [1, 1] and one[0]["batches"][0]["flat"] == 2
    if case == "refill":
        drawn = [sum(dump["batches"][0]["drawn"] for dump in dumps) for dumps in (one, two)]
        assert drawn == [6, 6]  # 0, 1, 2, then 3, 4, then 5
        assert sorted(groups_of(two)) == [1, 4, 5]
    if case == "several packs":
        assert packs[0] != packs[1] and len(one[0]["losses"]) > 2


def test_normaliser_is_global(model, tmp_path):
    """Every rank's losses are divided by the tokens of all: with unequal shares a mean of means is far off."""
    start(model, tmp_path, 2, "--prompts-per-step 3 --min-new-tokens 0 --max-new-tokens 12").finish()
    dumps = load(tmp_path / "dump2", 2)
    tokens = [sum(len(r["ids"]) for r in dump["batches"][0]["rollouts"]) for dump in dumps]
    assert tokens[0] != tokens[1]
    for dump in dumps:
        total = 0.0
        for rewards, i in zip(dump["batches"][0]["rewards"], range(3), strict=False):
            r = torch.tensor(rewards, dtype=torch.float64)
            advantages = (r - r.mean()) / (r.std() + 1e-4)
            rollouts = dump["batches"][0]["rollouts"][3 * i : 3 * i + 3]
            # ratio 1: the loss of a token is minus its advantage, times the mass the sampler drew from (some are banned)
            total -= sum(float(a * x["log_kept"].exp().sum()) for a, x in zip(advantages, rollouts, strict=True))
        assert sum(dump["losses"]) == pytest.approx(total / sum(tokens), abs=1e-5)


def test_torchrun_trains_as_one_process(model, tmp_path):
    """The real launcher, two steps: the same tokens drawn at the first, metrics to rounding, a checkpoint by rank 0."""
    argv = ["--dump", tmp_path / "dump2", "train", *SHORT, "--model", model, "--run-dir", tmp_path / "run2"]
    launched = runs.torchrun([*argv, "--steps", 1, "--prompts-per-step", 3, "--eval-every", 0], tmp_path)
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert launched.stdout.count("run folder:") == 1  # one rank speaks
    start(model, tmp_path, 1, "--prompts-per-step 3 --eval-every 0").finish()
    compare(load(tmp_path / "dump1", 1), load(tmp_path / "dump2", 2), tmp_path)
    assert (tmp_path / "run2" / "checkpoints" / "step-1" / "model.safetensors").is_file()


def test_bad_input_on_two_ranks_ends_both(model, tmp_path):
    """Found by every rank or told by rank 0: no rank is left waiting."""
    job = start(model, tmp_path, 2, "--data /nowhere.json --images /nowhere")
    assert job.wait() == [2, 2]
    (tmp_path / "run2").mkdir()
    (tmp_path / "run2" / "config.json").write_text("{}")
    job = start(model, tmp_path, 2, "")
    assert job.wait() == [2, 2]
    assert "already holds a run" in job.logs[0].read_text()
