"""Promise 1 in its plain form: a packed, shared-prefix step equals transformers' own forward, one completion at a time.

The weights are scaled so that the wrong image, the wrong position or a sibling's tokens move a log-prob by more than
0.1 nat, which is shown first; equality is then asked in float64: loss to 1e-9, every gradient to 2e-6 (transformers' RMSNorm and
rotary embeddings compute in float32 even there).
"""

import dataclasses

import numpy as np
import pytest
import torch
from tiny_models import make_tiny
from worlds import make_policy, make_rollouts, make_sample, plain_logits

from pr1.families import load_family
from pr1.kernels import Objective, linear_grpo_loss
from pr1.packing import Normaliser, count, pack

FAMILIES = ["qwen2_5_vl", "qwen2_vl"]
# 112x112 is a single attention window and proves nothing; these have several, ragged at the edge
SIZES = [[(168, 140)], [(252, 364)], [(140, 84), (196, 168)], []]
LENGTHS = [[5, 1, 9], [3, 7, 2], [4, 0, 6], [8, 2, 1]]  # an empty completion and two of one token


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    tied = request.param == "qwen2_vl"  # one tied head, one untied
    return load_family(make_tiny(tmp_path_factory.mktemp(request.param), request.param, tied=tied))


@pytest.fixture(scope="module")
def case(family):
    samples = [make_sample(family, sizes, name=f"s{i}") for i, sizes in enumerate(SIZES)]
    prompts = [family.encode(sample) for sample in samples]
    rollouts = make_rollouts(family, prompts, LENGTHS)
    return prompts, rollouts, np.random.default_rng(0).normal(size=(4, 3))


def packs_of(case, budget=100_000, aggregation="token-mean", **how):
    _, rollouts, advantages = case
    tokens, sequences = count(rollouts)
    return pack(rollouts, advantages, budget, Normaliser(aggregation, tokens, sequences, 16), drop_flat=False, **how)


def grads(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def ours(policy, packs):
    policy.model.zero_grad()
    total = 0.0
    for p in packs:
        rows = dataclasses.replace(p.rows, **{f: getattr(p.rows, f).double() for f in ("advantage", "weight")})
        with policy.head() as weight:
            loss, _ = linear_grpo_loss(policy.hidden(p), weight, rows, Objective(rollout_cap=torch.inf))
            loss.backward()
        total += float(loss.detach())
    return total, grads(policy.model)


def plain(model, case, weight_of):
    """The same loss written out: -A * exp(logp - detach) * min(exp(logp - logp_rollout)) per token, no packing."""
    _, rollouts, advantages = case
    model.zero_grad()
    total = 0.0
    for rollout, advantage in zip(rollouts, advantages.reshape(-1)):
        n = len(rollout.completion_ids)
        if not n:
            continue
        logp = plain_logits(model, rollout.inputs, rollout.completion_ids).log_softmax(-1)
        logp = logp[torch.arange(n), rollout.completion_ids]
        correction = (logp.detach() - rollout.logp_rollout.double()).clamp(-20, 20).exp()
        a, w = float(np.float32(advantage)), float(np.float32(weight_of(n)))  # rows hold them in float32
        loss = -(a * correction * (logp - logp.detach()).exp() * w).sum()
        loss.backward()
        total += float(loss.detach())
    return total, grads(model)


def plain_model(family):
    return family.load_model(torch.float64).eval()


def close(a, b, what):
    error = float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))
    assert error < 2e-6, f"{what}: relative error {error:.1e}"


def same(ours_, theirs):
    assert ours_[0] == pytest.approx(theirs[0], rel=1e-9)
    assert set(theirs[1]) >= set(ours_[1])
    for name, gradient in ours_[1].items():
        close(gradient, theirs[1][name], name)


def test_the_weights_see_images_positions_and_siblings(family, case):
    """What the equality tests below must be able to notice moves log-probs by more than 0.1 nat."""
    prompts, rollouts, _ = case
    model = plain_model(family)
    a, sibling = rollouts[0], rollouts[2]

    def logp(prompt, ids):
        with torch.no_grad():
            return plain_logits(model, prompt, ids).log_softmax(-1)[-len(a.completion_ids) :]

    right = logp(a.inputs, a.completion_ids)
    other = family.encode(make_sample(family, [(140, 168)]))  # as many tokens, another picture and grid
    wrong_image = dataclasses.replace(a.inputs, images=other.images)
    leaked = logp(a.inputs, torch.cat([sibling.completion_ids, a.completion_ids]))
    chosen = (torch.arange(len(a.completion_ids)), a.completion_ids)
    for what, wrong in (("image", logp(wrong_image, a.completion_ids)), ("sibling", leaked)):
        assert float((wrong[chosen] - right[chosen]).abs().max()) > 0.1, what
    policy = make_policy(family)
    (p,) = packs_of(case)
    with torch.no_grad(), policy.head() as weight:
        at = (policy.hidden(p) @ weight.T).log_softmax(-1)
        own = torch.arange(len(p.ids)).expand(3, -1)  # 1-D positions, and no restart for completions
        shifted = dataclasses.replace(p, position_ids=own)
        moved = (policy.hidden(shifted) @ weight.T).log_softmax(-1)
    rows = torch.arange(len(p.rows))
    assert float((at[rows, p.rows.tokens] - moved[rows, p.rows.tokens]).abs().max()) > 0.1, "positions"


@pytest.mark.parametrize("share_prefix", [True, False])
def test_packed_step_equals_plain_transformers(family, case, share_prefix):
    tokens, _ = count(case[1])
    theirs = plain(plain_model(family), case, lambda n: 1 / tokens)
    packs = packs_of(case, share_prefix=share_prefix)
    assert len(packs) == 1
    shared = sum(len(p.ids) for p in case[0]) + sum(max(0, n - 1) for g in LENGTHS for n in g)
    copies = shared + sum(len(p.ids) * (sum(n > 0 for n in g) - 1) for p, g in zip(case[0], LENGTHS))
    assert len(packs[0].ids) == (shared if share_prefix else copies)
    same(ours(make_policy(family), packs), theirs)


@pytest.mark.parametrize("room", [0, 6])
def test_split_groups_and_several_packs_change_nothing(family, case, room):
    """Budgets that hold one completion, or some, beside the first prompt: groups are split, their prompts repeated."""
    whole = ours(make_policy(family), packs_of(case))
    packs = packs_of(case, budget=len(case[0][0].ids) + room if room else 1)
    assert len(packs) == 11 if room == 0 else 4 < len(packs) < 11
    same(ours(make_policy(family), packs), whole)


@pytest.mark.parametrize("aggregation", ["sequence-mean", "constant"])
def test_aggregations(family, case, aggregation):
    weight = {"sequence-mean": lambda n: 1 / (12 * n), "constant": lambda n: 1 / (12 * 16)}[aggregation]
    theirs = plain(plain_model(family), case, weight)
    same(ours(make_policy(family), packs_of(case, aggregation=aggregation)), theirs)


def test_frozen_tower_gives_the_same_gradients_elsewhere(family, case):
    trained = ours(make_policy(family), packs_of(case))
    policy = make_policy(family, train_vision=False)
    frozen = ours(policy, packs_of(case))
    assert frozen[0] == pytest.approx(trained[0], rel=1e-9)
    assert not any(name.startswith("model.visual") for name in frozen[1])
    assert any(name.startswith("model.visual") for name in trained[1])
    for name, gradient in frozen[1].items():
        close(gradient, trained[1][name], name)
    assert len(policy.cache.entries) == 4  # four different images


@pytest.mark.parametrize("group", [1, 16])
def test_group_sizes(family, group):
    prompts = [family.encode(make_sample(family, [(84, 140)]))]
    lengths = [[1 + (3 * g) % 7 for g in range(group)]]
    rollouts = make_rollouts(family, prompts, lengths, seed=3)
    small = (prompts, rollouts, np.linspace(-1, 1, group)[None] + 0.1)
    same(
        ours(make_policy(family), packs_of(small)), plain(plain_model(family), small, lambda n: 1 / count(rollouts)[0])
    )


def test_masked_tokens_and_flat_groups_leave_the_update_but_not_the_normaliser(family, case):
    prompts, rollouts, advantages = case
    masked = [dataclasses.replace(r, loss_mask=torch.arange(len(r.completion_ids)) % 2 == 0) for r in rollouts]
    advantages = advantages.copy()
    advantages[1] = 0.0
    tokens, sequences = count(masked)
    assert tokens == sum((n + 1) // 2 for g in LENGTHS for n in g) and sequences == 12
    (p,) = pack(masked, advantages, 10**6, Normaliser("token-mean", tokens, sequences, 16), drop_flat=True)
    live = [r for i, r in enumerate(masked) if i // 3 != 1 and len(r.completion_ids)]
    assert p.rows.tokens.tolist() == [t for r in live for t in r.completion_ids[::2].tolist()]
    assert torch.allclose(p.rows.weight, torch.tensor(1 / tokens, dtype=torch.float32))
    assert len(p.images) == 3  # the flat group's image is not looked at
    (kept,) = pack(masked, advantages, 10**6, Normaliser("token-mean", tokens, sequences, 16), drop_flat=False)
    assert len(kept.images) == 4 and len(kept.rows) > len(p.rows)


def test_table_written_by_hand():
    """The example in packing's docstring, worked out with a pencil."""
    from pr1.records import Prompt

    prompt = Prompt(torch.tensor([10, 11, 12, 13]), torch.tensor([[0, 1, 1, 3], [0, 1, 2, 3], [0, 1, 1, 3]]), ())
    rollouts = make_by_hand(prompt, [[20, 21, 22], [30, 31]])
    (p,) = pack(rollouts, np.array([[1.0, -1.0]]), 100, Normaliser("token-mean", 5, 2, 8), drop_flat=True)
    assert p.ids.tolist() == [10, 11, 12, 13, 20, 21, 30]
    assert p.position_ids.tolist() == [[0, 1, 1, 3, 4, 5, 4], [0, 1, 2, 3, 4, 5, 4], [0, 1, 1, 3, 4, 5, 4]]
    assert p.row_index.tolist() == [3, 4, 5, 3, 6]
    assert p.rows.tokens.tolist() == [20, 21, 22, 30, 31]
    assert p.rows.sequence.tolist() == [0, 0, 0, 1, 1]
    assert p.rows.advantage.tolist() == [1, 1, 1, -1, -1]
    assert p.segments.cu_q.tolist() == [0, 6, 7] and p.segments.cu_k.tolist() == [0, 6, 11]
    assert p.segments.kv_index.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 6]
    assert (p.segments.max_q, p.segments.max_k) == (6, 6)


def make_by_hand(prompt, completions):
    from pr1.records import Rollout

    return [Rollout(0, g, prompt, torch.tensor(ids), torch.ones(len(ids), dtype=torch.bool), torch.zeros(len(ids)),
                    torch.zeros(len(ids)), torch.zeros(len(ids)), "", True) for g, ids in enumerate(completions)]  # fmt: skip


def test_no_rollouts_no_packs():
    assert pack([], np.zeros((0, 4)), 100, Normaliser("token-mean", 1, 1, 8), drop_flat=True) == []
    with pytest.raises(ValueError, match="2 rollouts but 1 advantages"):
        pack([None, None], np.zeros((1, 1)), 100, Normaliser("token-mean", 1, 1, 8), drop_flat=True)
