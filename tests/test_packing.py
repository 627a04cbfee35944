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

from pr1.attention import TEXT
from pr1.balance import WORTH, Costs, assign, balance, group_cost
from pr1.families import load_family
from pr1.kernels import Objective, linear_grpo_loss
from pr1.packing import Normaliser, count, pack
from pr1.records import Prompt

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


def test_the_order_of_groups_changes_nothing(family, case):
    """Groups in another order: best fit makes the same packs of them, up to ties, and losses and gradients agree."""
    _, rollouts, advantages = case
    whole = ours(make_policy(family), packs_of(case))
    budget = 1 + max(len(p.ids) for p in case[0]) + 12  # the largest group, and not two of that size
    order = [2, 0, 3, 1]
    shuffled = (None, [rollouts[3 * p + g] for p in order for g in range(3)], advantages[order])
    packs = packs_of(shuffled, budget=budget)
    assert len(packs) == len(packs_of(case, budget=budget)) > 1
    same(ours(make_policy(family), packs), whole)


def test_the_same_image_in_several_prompts(family):
    """Two prompts that ask about one picture, and one that shows it twice beside another: a trained tower sees each
    picture once a pack, and its gradient is the sum over all places, as transformers' over separate runs."""
    sizes = [[(168, 140)], [(168, 140)], [(252, 140), (168, 140), (168, 140)]]
    prompts = [family.encode(make_sample(family, each, text=text)) for each, text in zip(sizes, ("cat", "dog", "cat"))]
    rollouts = make_rollouts(family, prompts, [[4, 2], [3, 5], [1, 6]], seed=5)
    small = (prompts, rollouts, np.random.default_rng(1).normal(size=(3, 2)))
    policy, (p,) = make_policy(family), packs_of(small)
    assert len(p.images) == 5 and len({image.key for image in p.images}) == 2
    calls, function = [], family.image_features
    family.image_features = lambda model, images: calls.append(len(images)) or function(model, images)
    try:
        mine = ours(policy, [p])
    finally:
        del family.image_features
    assert calls == [2]
    same(mine, plain(plain_model(family), small, lambda n: 1 / count(rollouts)[0]))


def test_checkpointing_recomputes_layers_and_changes_nothing(family, case, monkeypatch):
    """Bit by bit the same gradients; every layer runs twice, and once where no gradient is taken."""
    from test_attention import counted

    plainly = ours(make_policy(family), packs_of(case))
    policy = make_policy(family, checkpointing=True)
    calls, (p,) = counted(monkeypatch, TEXT), packs_of(case)
    again = ours(policy, [p])
    assert len(calls) == 2 * len(policy.text.layers)
    assert again[0] == plainly[0] and again[1].keys() == plainly[1].keys()
    assert all(torch.equal(gradient, plainly[1][name]) for name, gradient in again[1].items())
    with torch.no_grad():
        policy.hidden(p)
    assert len(calls) == 3 * len(policy.text.layers)

    def kept(checkpointing):
        sizes = []
        model = make_policy(family, checkpointing=checkpointing)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            model.hidden(p)
        return sum(sizes)

    assert kept(True) < 0.4 * kept(False)


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
    prompt = Prompt(torch.tensor([10, 11, 12, 13]), torch.tensor([[0, 1, 1, 3], [0, 1, 2, 3], [0, 1, 1, 3]]), (),
                    torch.tensor([1, 2]))  # fmt: skip
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
    assert p.image_rows.tolist() == [1, 2]
    assert (p.segments.max_q, p.segments.max_k) == (6, 6)


def make_by_hand(prompt, completions, number=0):
    from pr1.records import Rollout

    return [Rollout(number, g, prompt, torch.tensor(ids), torch.ones(len(ids), dtype=torch.bool), torch.zeros(len(ids)),
                    torch.zeros(len(ids)), torch.zeros(len(ids)), "", True) for g, ids in enumerate(completions)]  # fmt: skip


# ---- what goes into which pack ---------------------------------------------------------------------------------------


def groups_of_lengths(groups):
    """Rollouts of groups given as (prompt tokens, [stream tokens of each completion]); every id is its group's number."""
    rollouts = []
    for number, (length, completions) in enumerate(groups):
        ids = torch.full((length,), number)
        prompt = Prompt(ids, torch.arange(length).expand(3, -1), ())
        rollouts += make_by_hand(prompt, [[number] * (n + 1) for n in completions], number)
    return rollouts


def packed(rollouts, budget, **how):
    norm = Normaliser("token-mean", 1, 1, 8)
    return pack(rollouts, np.ones((1, len(rollouts))), budget, norm, drop_flat=False, **how)


def test_the_drawing_in_the_docstring():
    packs = packed(groups_of_lengths([(2, [3]), (2, [2]), (2, [4, 3, 2]), (2, [1])]), 9)
    assert [p.ids.tolist() for p in packs] == [[0] * 5 + [1] * 4, [2] * 9, [2] * 4 + [3] * 3]
    assert [p.row_index.tolist() for p in packs] == [
        [1, 2, 3, 4, 6, 7, 8], [1, 2, 3, 4, 5, 1, 6, 7, 8], [1, 2, 3, 5, 6]
    ]  # fmt: skip


def best_fit_truth(lengths, capacity):
    """Bins of best-fit decreasing, written down plainly."""
    bins = []  # (room, indices)
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [b for b in bins if b[0] >= lengths[i]]
        target = min(fitting, key=lambda b: b[0]) if fitting else [capacity, []]
        if not fitting:
            bins.append(target)
        target[0] -= lengths[i]
        target[1].append(i)
    return sorted(sorted(members) for _, members in bins)


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_decreasing(seed):
    """The bins of an implementation of its own; every completion is in one pack once, and packs keep to the budget."""
    rng = np.random.default_rng(seed)
    groups = [(int(rng.integers(1, 30)), rng.integers(0, 20, rng.integers(1, 6)).tolist())
              for _ in range(rng.integers(1, 30))]  # fmt: skip
    whole = [length + sum(completions) for length, completions in groups]
    budget = max(whole) + int(rng.integers(0, 40))
    packs = packed(groups_of_lengths(groups), budget)
    assert [sorted(set(p.ids.tolist())) for p in packs] == best_fit_truth(whole, budget)
    assert sum(len(p.ids) for p in packs) == sum(whole) and max(len(p.ids) for p in packs) <= budget
    small = max(length + max(completions) for length, completions in groups)  # groups are split, completions fit
    packs = packed(groups_of_lengths(groups), small)
    assert max(len(p.ids) for p in packs) <= small
    rows = sum(len(p.rows) for p in packs)
    assert rows == sum(n + 1 for _, completions in groups for n in completions)
    for number, (length, completions) in enumerate(groups):
        found = sum((p.ids == number).sum() for p in packs)  # its completions, and its prompt once or more
        assert (found - sum(completions)) % length == 0
        if length + sum(completions) <= small:
            assert found == length + sum(completions)


def test_splitting_takes_the_fewest_prompts_that_best_fit_finds():
    """Seven and three, five and five: in order they would take three parts."""
    packs = packed(groups_of_lengths([(4, [7, 5, 3, 5])]), 14)
    assert [len(p.ids) for p in packs] == [14, 14]


# ---- balance over ranks ----------------------------------------------------------------------------------------------


def test_cost_of_a_group():
    """Prompt 3, completions of 2 and 1 stream tokens: counted pair by pair, a flat completion left out."""
    rollouts = groups_of_lengths([(3, [2, 1, 4])])
    pairs = (1 + 2 + 3) + (4 + 5) + 4
    group = list(zip(rollouts, [1.0, -1.0, 0.0]))
    assert group_cost(group, Costs(0.5, 0.0), True) == 3 + 3 + 0.5 * pairs
    assert group_cost(group, Costs(0.5, 0.0), False) == 3 + 7 + 0.5 * (pairs + 4 + 5 + 6 + 7)
    assert group_cost([(r, 0.0) for r in rollouts], Costs(0.5, 0.0), True) == 0
    shown = dataclasses.replace(rollouts[0].inputs, image_rows=torch.tensor([1, 2]))
    group = [(dataclasses.replace(r, inputs=shown), 1.0) for r in rollouts[:2]]
    assert group_cost(group, Costs(0.5, 7.0), True) == 3 + 3 + 0.5 * pairs + 14


def test_costs_of_a_model(family):
    """Against counts of the parameters' multiplications: attention 4 FLOPs a channel, layer and pair."""
    policy = make_policy(family)
    layers = [p for n, p in policy.model.named_parameters() if n.startswith("model.language_model.layers")]
    trunk = sum(p.numel() for p in layers)
    config = policy.text.config
    heads = config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    assert policy.costs.pair == pytest.approx(4 * heads * config.num_hidden_layers / (2 * trunk))
    blocks = sum(p.numel() for n, p in policy.model.named_parameters() if n.startswith("model.visual.blocks"))
    assert policy.costs.image == pytest.approx(4 * blocks / trunk)
    assert make_policy(family, train_vision=False).costs.image == 0


def test_assign_by_hand():
    def moved(cost, owner, size):
        return assign(np.array(cost, float), np.array(owner, np.int64), size).tolist()

    assert moved([5, 5, 5, 5], [0, 0, 0, 0], 2) == [1, 1, 0, 0]
    assert moved([9, 1, 5, 5], [0, 0, 1, 1], 2) == [0, 0, 1, 1]
    assert moved([0, 0, 8, 8], [0, 0, 1, 1], 2) == [0, 0, 0, 1]  # a rank of flat groups takes one
    assert moved([100, 1, 1], [0, 0, 1], 2) == [0, 0, 1]  # not worth it
    assert moved([7], [1], 3) == [1] and moved([], [], 2) == []


@pytest.mark.parametrize("seed", range(10))
def test_assign_balances_and_moves_little(seed):
    rng = np.random.default_rng(seed)
    owner = np.sort(rng.integers(0, 4, 40))
    cost = rng.gamma(2, 1, 40) * (rng.random(40) > 0.3)
    target = assign(cost, owner, 4)
    before, after = np.bincount(owner, cost, 4), np.bincount(target, cost, 4)
    assert after.sum() == pytest.approx(cost.sum()) and after.max() <= before.max()
    assert after.max() <= 1.1 * after.mean()
    for heavy, light in [(after.argmax(), after.argmin())]:  # no single move between these two would still pay
        left = [min(c, after[heavy] - after[light] - c) for c in cost[target == heavy]]
        assert max(left) <= WORTH * after.mean() * (1 + 1e-9)
    assert not (target != owner)[cost == 0].any()


def test_one_rank_keeps_its_groups():
    class Alone:
        size = 1

    rollouts, advantages = groups_of_lengths([(3, [2, 1])]), np.ones((1, 2))
    assert balance(rollouts, advantages, Alone, Costs(0.1, 0.0), drop_flat=True) == (rollouts, advantages)


def test_no_rollouts_no_packs():
    assert pack([], np.zeros((0, 4)), 100, Normaliser("token-mean", 1, 1, 8), drop_flat=True) == []
    with pytest.raises(ValueError, match="2 rollouts but 1 advantages"):
        pack([None, None], np.zeros((1, 1)), 100, Normaliser("token-mean", 1, 1, 8), drop_flat=True)
