"""The rollout engine: room, entering and leaving, and the frequencies of whole completions."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_models import make_tiny
from worlds import make_policy, make_sample, plain_logits

import pr1.rollout
from pr1.decode import Pools, PrefillAttention, token_bytes
from pr1.engine import Engine, pool_sizes
from pr1.families import load_family
from pr1.kernels import Sampling
from pr1.packing import Normaliser, pack, to_device
from pr1.records import Segments
from pr1.reference import pack_logprobs
from pr1.rollout import generate, stream

SIZES = [[(168, 140)], [(84, 84)], [(140, 84), (112, 84)], [], [(112, 112)], [(84, 140)], [(112, 56)]]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return load_family(make_tiny(tmp_path_factory.mktemp("engine"), "qwen2_5_vl", tied=False, seed=10, stop_gain=2.0))


@pytest.fixture(scope="module")
def samples(family):
    return [make_sample(family, each, name=f"s{i}") for i, each in enumerate(SIZES)]


@pytest.fixture
def policy(family):
    return make_policy(family, torch.float32, train_vision=False)


def tokens_of(rollouts):
    return [(r.prompt, r.completion, r.completion_ids.tolist()) for r in rollouts]


# ---- the budget ------------------------------------------------------------------------------------------------------


def test_pool_sizes_by_hand():
    # 1 MB holds 1024 tokens of 1 kB; a prompt of 100 tokens, completions of 20
    def sizes(mb, batch=256, group=8, count=16):
        return pool_sizes(mb, 1024, batch, group, count, 100, 20)

    assert sizes(100) == (128, 16)  # all that there are
    assert sizes(100, batch=64) == (64, 16)  # 8 groups at a time, and twice their slots
    assert sizes(100, batch=64, count=10) == (64, 10)
    assert sizes(100, batch=5) == (5, 2)  # not even a whole group
    assert sizes(100, batch=64, group=1, count=100) == (64, 64)
    assert sizes(2, batch=64) == (62, 8)  # 2048 tokens: 8 * 100 + 62 * 20 = 2040
    assert sizes(1, batch=64) == (31, 4)  # 1024 tokens: 4 * 100 + 31 * 20 = 1020


def test_pools_stay_within_the_budget():
    class Text:
        num_hidden_layers, num_key_value_heads, num_attention_heads, hidden_size = 3, 2, 4, 64

    per_token = token_bytes(Text, torch.float32)
    assert per_token == 3 * 2 * 2 * 16 * 4
    for mb, group, count, longest, new in itertools.product((1, 3, 17), (1, 4, 16), (1, 5, 40), (33, 300), (7, 90)):
        rows, slots = pool_sizes(mb, per_token, 64, group, count, longest, new)
        assert 1 <= rows <= min(64, group * count) and 1 <= slots <= count and slots * group >= rows
        pools = Pools(Text, rows, slots, longest, new, torch.float32, torch.device("cpu"))
        assert pools.prefix.nbytes + pools.suffix.nbytes <= mb << 20
        assert not pools.prefix[-1].any() and pools.prefix.dtype == torch.float32
    with pytest.raises(
        ValueError, match=r"--rollout-cache-mb 1: a prompt of up to 2000 tokens .* need 2 MB .*raise it"
    ):
        pool_sizes(1, per_token, 64, 8, 16, 2000, 100)


def test_a_prompt_that_never_fits_is_refused_before_anything_runs(policy, samples):
    with pytest.raises(ValueError, match="--rollout-cache-mb 1: .*--max-prompt-tokens or --max-new-tokens"):
        generate(policy, samples, 2, Sampling(max_new_tokens=5000), seed=0, step=0, cache_mb=1)
    prompts = (policy.family.encode(s) for s in samples)
    with pytest.raises(ValueError, match="prompt 0 takes .* tokens, more than --max-prompt-tokens 20"):
        list(stream(policy, prompts, 1, Sampling(max_new_tokens=5), seed=0, step=0, count=7, max_prompt_tokens=20))


# ---- entering and leaving --------------------------------------------------------------------------------------------


class Watched(Engine):
    """An engine of a given size that notes what is live whenever prompts enter and tokens are drawn."""

    def __init__(self, *args):
        super().__init__(*args)
        self.entered, self.most_rows, self.most_slots = [], 0, 0

    def _prefill(self, most):
        live = len(self.owner)
        found = super()._prefill(most)
        self.entered.append((live, self.next))
        return found

    def _step(self):
        self.most_rows, self.most_slots = max(self.most_rows, len(self.owner)), max(self.most_slots, len(self.slots))
        assert len(set(map(id, self.owner))) <= len(self.slots)
        assert sorted(row for slot in self.slots for row in slot.rows) == list(range(len(self.owner)))
        super()._step()


def run(policy, samples, monkeypatch, rows, slots, group, sampling, **how):
    """generate through an engine with so many rows and slots."""
    monkeypatch.setattr(pr1.rollout, "pool_sizes", lambda *_: (rows, slots))
    monkeypatch.setattr(pr1.rollout, "Engine", Watched)
    policy.engine = None
    rollouts = generate(policy, samples, group, sampling, seed=3, step=1, **how)
    assert policy.engine.most_rows <= rows and policy.engine.most_slots <= slots
    return rollouts, policy.engine


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_room_and_order_change_nothing(policy, samples, monkeypatch, temperature):
    """Rows and slots so scarce that groups are split, wait, and enter while others are in the middle of theirs."""
    sampling = Sampling(temperature=temperature, max_new_tokens=24)
    whole, engine = run(policy, samples, monkeypatch, 21, 7, 3, sampling)
    lengths = {len(r.completion_ids) for r in whole}
    assert len(lengths) >= 3 and engine.entered[0] == (0, 7)
    for rows, slots in ((1, 1), (2, 1), (4, 3), (7, 7), (5, 2), (20, 2)):
        again, engine = run(policy, samples, monkeypatch, rows, slots, 3, sampling)
        assert tokens_of(again) == tokens_of(whole), (rows, slots)
        for a, b in zip(again, whole, strict=True):
            torch.testing.assert_close(a.logp_rollout, b.logp_rollout, rtol=0, atol=3e-5)
        if 1 < rows and 1 < slots:
            assert any(live > 0 for live, _ in engine.entered), "nobody entered in mid-flight"
    shuffled = [4, 0, 6, 2, 5, 1, 3]  # each prompt keeps its index
    other = [run(policy, [samples[i]], monkeypatch, 2, 1, 3, sampling, first=i)[0] for i in shuffled]
    found = dict(zip(shuffled, other, strict=True))
    assert tokens_of([r for i in range(7) for r in found[i]]) == tokens_of(whole)


def test_an_engine_serves_later_calls_and_keeps_nothing(policy, samples):
    """Larger, smaller, other groups and lengths; what an abandoned call leaves behind does not matter."""
    first = generate(policy, samples, 4, Sampling(max_new_tokens=16), seed=3, step=1)
    engine = policy.engine
    small = generate(policy, samples[:2], 2, Sampling(max_new_tokens=9), seed=3, step=1)
    assert policy.engine is engine
    assert [r.completion_ids.tolist() for r in small] == [r.completion_ids[:9].tolist() for r in first[:8] if
                                                          r.completion < 2]  # fmt: skip
    coming = stream(policy, map(policy.family.encode, samples), 4, Sampling(max_new_tokens=16), seed=9, step=1, count=7,
                    max_prompt_tokens=max(len(r.prompt_ids) for r in first))  # fmt: skip
    next(coming)
    coming.close()
    assert policy.engine is engine
    again = generate(policy, samples, 4, Sampling(max_new_tokens=16), seed=3, step=1)
    assert tokens_of(again) == tokens_of(first) and policy.engine is engine
    generate(policy, samples, 4, Sampling(max_new_tokens=17), seed=3, step=1)
    assert policy.engine is not engine


def test_prompts_are_taken_as_there_is_room_and_groups_come_as_they_are_done(policy, samples):
    taken, group_size = [], 2

    def prompts():
        for i, sample in enumerate(samples):
            taken.append(i)
            yield policy.family.encode(sample)

    orders = []
    for seed in range(3):
        done = []
        taken.clear()
        for group in stream(policy, prompts(), group_size, Sampling(max_new_tokens=30), seed=seed, step=0, count=7,
                            batch=4, max_prompt_tokens=200):  # fmt: skip
            done.append(group[0].prompt)
            assert [r.completion for r in group] == [0, 1] and len({r.prompt for r in group}) == 1
            assert len(taken) <= len(done) + 4  # four slots
        assert sorted(done) == list(range(7))
        orders.append(done)
    assert any(done != sorted(done) for done in orders)


def test_no_prompts_no_rollouts(policy):
    assert generate(policy, [], 4, Sampling(), seed=0, step=0) == []
    assert list(stream(policy, iter(()), 4, Sampling(), seed=0, step=0, count=0, max_prompt_tokens=9)) == []


def test_completions_of_one_token(policy, samples):
    (a, b) = (generate(policy, samples, 3, Sampling(max_new_tokens=n), seed=1, step=1) for n in (1, 2))
    assert all(len(r.completion_ids) == 1 for r in a)
    assert [r.completion_ids[0] for r in a] == [r.completion_ids[0] for r in b]


def test_the_prompt_is_kept_in_its_slot():
    """Keys and values of prompt i in slot slots[i], at every layer, and the output is plain causal attention."""

    class Text:
        num_hidden_layers, num_key_value_heads, num_attention_heads, hidden_size = 2, 2, 4, 32

    pools = Pools(Text, 1, 4, 9, 1, torch.float64, torch.device("cpu"))
    lengths, slots = [5, 9, 2], [2, 0, 3]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    attend = PrefillAttention(Segments(cu.int(), cu.int(), torch.arange(16), 9, 9), pools, slots)
    for layer in range(2):
        q, k, v = (torch.randn(h, 16, 8, dtype=torch.float64) for h in (4, 2, 2))
        out = attend(layer, q, k, v, 0.3)
        for slot, a, b in zip(slots, cu.tolist(), cu.tolist()[1:]):
            assert torch.equal(pools.prefix[layer, 0, slot, :, : b - a], k[:, a:b])
            assert torch.equal(pools.prefix[layer, 1, slot, :, : b - a], v[:, a:b])
            wanted = torch.nn.functional.scaled_dot_product_attention(
                q[None, :, a:b], k[None, :, a:b], v[None, :, a:b], is_causal=True, scale=0.3, enable_gqa=True
            )
            torch.testing.assert_close(out[:, a:b], wanted[0], rtol=0, atol=1e-12)
    assert not pools.prefix[:, :, 1].any()


# ---- whole completions, against their exact probabilities ------------------------------------------------------------

LETTERS, LONGEST, DRAWN = 5, 4, 50_000
TEMPERATURE = 1.6


@pytest.fixture(scope="module")
def alphabet(family):
    """A policy that may draw five tokens and one stop, its prompt, and the exact probability of every completion."""
    allowed = torch.tensor([*range(65, 65 + LETTERS), family.stop_ids[0]])
    model = family.load_model(torch.float64).eval()
    with torch.no_grad():
        model.lm_head.weight[family.stop_ids[0]] *= 0.3
    banned = torch.ones(model.lm_head.weight.shape[0], dtype=torch.bool)
    banned[allowed] = False
    sample = dataclasses.replace(make_sample(family, []), messages=[{"role": "user", "content": "cat"}])
    prompt = family.encode(sample)

    @torch.no_grad()
    def next_probabilities(ids):
        z = plain_logits(model, prompt, torch.tensor([*ids, 0]))[-1] / TEMPERATURE
        return z.masked_fill(banned, -torch.inf).softmax(-1)[allowed]

    probabilities, entropies, open_ = {}, [], [((), 1.0)]
    for length in range(1, LONGEST + 1):
        longer = []
        for ids, mass in open_:
            p = next_probabilities(ids)
            entropies.append(float(torch.special.entr(p).sum()) / math.log(LETTERS + 1))
            for token, q in zip(allowed.tolist(), (mass * p).tolist()):
                done = token == family.stop_ids[0] or length == LONGEST
                if done:
                    probabilities[*ids, token] = q
                else:
                    longer.append(((*ids, token), q))
        open_ = longer
    policy = make_policy(family, torch.float32, train_vision=False)
    with torch.no_grad():
        policy.model.lm_head.weight[family.stop_ids[0]] *= 0.3
    return policy, sample, banned, probabilities, entropies


def draw(alphabet, seed, monkeypatch, *, temperature=TEMPERATURE, banned=None):
    policy, sample, bans = alphabet[:3]
    monkeypatch.setattr(policy.family, "banned_ids", lambda _: bans if banned is None else banned, raising=False)
    sampling = Sampling(temperature=temperature, max_new_tokens=LONGEST)
    rollouts = generate(policy, [sample], DRAWN, sampling, seed=seed, step=0, batch=5000)
    monkeypatch.undo()
    return [tuple(r.completion_ids.tolist()) for r in rollouts]


def p_value(drawn, probabilities):
    counts = dict.fromkeys(probabilities, 0)
    for ids in drawn:
        if ids not in counts:
            return 0.0
        counts[ids] += 1
    observed = np.array(list(counts.values()), float)
    expected = np.array(list(probabilities.values())) * len(drawn)
    rare = expected < 5
    if rare.any():
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    assert len(expected) > 100
    return stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue


def test_the_alphabet_is_worth_drawing_from(alphabet):
    probabilities, entropies = alphabet[3:]
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-12)
    assert 0.3 < np.mean(entropies) < 0.8, np.mean(entropies)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_frequencies_of_whole_completions(alphabet, seed, monkeypatch):
    assert p_value(draw(alphabet, seed, monkeypatch), alphabet[3]) > 1e-3


@pytest.mark.parametrize("mutant", ["temperature", "a ban missing", "a shared random stream"])
def test_wrong_sampling_is_caught(alphabet, mutant, monkeypatch):
    how = {}
    if mutant == "temperature":
        how = dict(temperature=1.1 * TEMPERATURE)
    elif mutant == "a ban missing":
        how = dict(banned=alphabet[2].clone().index_fill_(0, torch.tensor([70]), False))
    else:
        keys = pr1.rollout.sequence_keys
        monkeypatch.setattr(pr1.rollout, "sequence_keys", lambda a, b, p, completion: keys(a, b, p, completion // 2))
    assert p_value(draw(alphabet, 0, monkeypatch, **how), alphabet[3]) < 1e-6


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_graphs_change_nothing_and_parameters_stay_in_place(family, samples):
    from pr1.policy import FeatureCache, Policy

    policy = Policy(family, family.load_model(torch.float32), torch.device("cuda"), train_vision=False,
                    cache=FeatureCache(1 << 28))  # fmt: skip
    greedy = Sampling(temperature=0.0, max_new_tokens=40)
    with_graphs = generate(policy, samples, 5, greedy, seed=0, step=0, batch=24)
    assert policy.engine.graphs.graphs  # some were captured
    policy.engine.graphs = None
    without = generate(policy, samples, 5, greedy, seed=0, step=0, batch=24)
    assert tokens_of(with_graphs) == tokens_of(without)
    policy.engine = None
    sampling = Sampling(max_new_tokens=40)
    generate(policy, samples, 5, sampling, seed=0, step=0)
    places = [p.data_ptr() for p in policy.model.parameters()]
    captured = dict(policy.engine.graphs.graphs)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-2)
    for parameter in policy.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert places == [p.data_ptr() for p in policy.model.parameters()]
    after = generate(policy, samples, 5, sampling, seed=0, step=0)
    assert captured.items() <= policy.engine.graphs.graphs.items()  # none anew, and yet with the new weights:
    policy.engine.graphs = None
    assert tokens_of(after) == tokens_of(generate(policy, samples, 5, sampling, seed=0, step=0))


@pytest.mark.gpu
def test_half_precision_rollouts_on_a_gpu_are_the_trainers(family, samples):
    """bfloat16: what the sampler records is at most twice as far from float32 as what the trainer computes; again, the
    same tokens come, through the graphs captured before."""
    policy, exact = (make_policy(family, dtype, train_vision=False, device=device)
                     for dtype, device in ((torch.bfloat16, "cuda"), (torch.float32, "cpu")))  # fmt: skip
    rollouts = generate(policy, samples, 5, Sampling(max_new_tokens=40), seed=0, step=0, batch=24)
    assert policy.engine.graphs.graphs
    assert tokens_of(generate(policy, samples, 5, Sampling(max_new_tokens=40), seed=0, step=0, batch=24)) == tokens_of(
        rollouts
    )
    every = Normaliser("token-mean", 1.0, 1.0, 40)
    errors = []
    for p in pack(rollouts, np.ones((len(samples), 5)), 2048, every, drop_flat=False):
        truth = pack_logprobs(exact, p, 1.0)
        ours = pack_logprobs(policy, to_device(p, policy.device), 1.0).cpu()
        errors += [torch.stack([p.rows.logp_rollout - truth, ours - truth])]
    sampler, trainer = torch.cat(errors, 1).norm(dim=1)
    assert 0 < float(sampler) <= 2 * float(trainer)
