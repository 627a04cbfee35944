"""Rollouts against transformers' own model: greedy answers token for token, sampled ones by their log-probs, entropies
and frequencies.

The plain model computes one prompt, or one prompt with one completion, at a time, with its own attention, positions
and cache. Before anything is compared, another image, other positions and a sibling's tokens are shown to move a
log-prob by more than 0.1 nat.
"""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_models import make_tiny, picture
from worlds import make_policy, make_sample, plain_logits

from pr1.families import load_family
from pr1.kernels import Sampling
from pr1.packing import Normaliser, pack
from pr1.reference import pack_logprobs
from pr1.rollout import generate

# several attention windows, ragged at the edge; several images in a prompt; text alone
SIZES = [[(168, 140)], [(252, 364)], [(140, 84), (196, 168)], [], [(364, 112)], [(84, 84), (112, 140), (56, 196)]]
LONGEST = 72  # crosses the decoder's growth step of 64 tokens
# Weights for which greedy answers stop late (from 8 tokens on, one at 65) or early (one after a single token).
MODELS = {
    "qwen2_5_vl-late": ("qwen2_5_vl", dict(tied=False, seed=10, stop_gain=1.25)),
    "qwen2_5_vl-early": ("qwen2_5_vl", dict(tied=False, seed=11, stop_gain=4.0)),
    "qwen2_vl-late": ("qwen2_vl", dict(tied=True, seed=6, stop_gain=2.0)),
    "qwen2_vl-early": ("qwen2_vl", dict(tied=True, seed=9, stop_gain=4.0)),
}
MARGIN = 1e-3  # a greedy choice may not hang on rounding
# Against transformers in the same dtype. In float64 what is left is the decoder's float32 softmax.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 5e-6}


@pytest.fixture(scope="module", params=MODELS)
def family(request, tmp_path_factory):
    name, how = MODELS[request.param]
    return load_family(make_tiny(tmp_path_factory.mktemp(request.param), name, **how))


@pytest.fixture(scope="module")
def late(tmp_path_factory):
    name, how = MODELS["qwen2_5_vl-late"]
    return load_family(make_tiny(tmp_path_factory.mktemp("late"), name, **how))


def make_samples(family, sizes=SIZES):
    return [make_sample(family, each, name=f"s{i}") for i, each in enumerate(sizes)]


def policy_of(family, dtype=torch.float32):
    return make_policy(family, dtype, train_vision=False)


def plain_model(family, dtype=torch.float32):
    return family.load_model(dtype).eval()


def greedy(**how):
    return Sampling(temperature=0.0, **{"max_new_tokens": LONGEST, **how})


@torch.no_grad()
def plain_greedy(family, model, prompt, **how) -> list[int]:
    """transformers' own greedy generation on one prompt, with the same bans and the same stops."""
    extra = {}
    if prompt.images:
        extra = dict(pixel_values=torch.cat([i.pixels for i in prompt.images]),
                     image_grid_thw=torch.tensor([i.grid for i in prompt.images]),
                     mm_token_type_ids=(prompt.ids == family.image_token_id).int()[None])  # fmt: skip
    banned = family.banned_ids(model.config.get_text_config().vocab_size).nonzero()[:, 0].tolist()
    model.model.rope_deltas = None
    out = model.generate(
        input_ids=prompt.ids[None], attention_mask=torch.ones_like(prompt.ids)[None], do_sample=False, num_beams=1,
        suppress_tokens=banned, eos_token_id=list(family.stop_ids), pad_token_id=family.stop_ids[-1],
        **{"max_new_tokens": LONGEST, **how}, **extra,
    )  # fmt: skip
    return out[0, len(prompt.ids) :].tolist()


@torch.no_grad()
def truth(family, model, rollout, temperature=1.0, min_new_tokens=0):
    """(logp, entropy, log_kept) of a rollout's tokens from a teacher-forced plain forward, in float64."""
    z = plain_logits(model, rollout.inputs, rollout.completion_ids).double() / temperature
    logp = z.log_softmax(-1)
    kept = (~family.banned_ids(z.shape[1])).expand_as(z).clone()
    kept[:min_new_tokens, list(family.stop_ids)] = False
    return (logp[torch.arange(len(z)), rollout.completion_ids], -(logp.exp() * logp).sum(-1),
            logp.masked_fill(~kept, -torch.inf).logsumexp(-1))  # fmt: skip


def assert_true_to(family, model, rollouts, temperature=1.0, min_new_tokens=0):
    """The recorded numbers of the rollouts are those of the plain model in its dtype."""
    tolerance = TOLERANCE[model.dtype]
    for r in rollouts:
        logp, entropy, log_kept = truth(family, model, r, temperature, min_new_tokens)
        for name, ours, theirs in (("logp", r.logp_rollout, logp), ("entropy", r.entropy, entropy),
                                   ("log_kept", r.log_kept, log_kept)):  # fmt: skip
            error = float((ours.double() - theirs).abs().max())
            assert ours.dtype == torch.float32 and error < tolerance, (
                f"{name} of {r.prompt}.{r.completion}: {error:.1e}"
            )


def tokens_of(rollouts):
    return [r.completion_ids.tolist() for r in rollouts]


def assert_same(ours, theirs):
    """Two lists of rollouts are the same; log-probs may differ by the rounding of another batch size."""
    assert tokens_of(ours) == tokens_of(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.prompt, a.completion, a.text, a.finished) == (b.prompt, b.completion, b.text, b.finished)
        for name in ("logp_rollout", "entropy", "log_kept"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=3e-5)


# ---- greedy ----------------------------------------------------------------------------------------------------------


def test_the_weights_see_images_positions_and_siblings(family):
    """What the tests below must be able to notice moves a log-prob by more than 0.1 nat, in each prompt with images."""
    model, prompts = plain_model(family), [family.encode(s) for s in make_samples(family)]
    answers = [torch.tensor(plain_greedy(family, model, p, max_new_tokens=12, min_new_tokens=12)) for p in prompts]

    @torch.no_grad()
    def logp(prompt, ids, n, positions=None):
        if positions is None:
            logits = plain_logits(model, prompt, ids)[-n:]
        else:
            whole = torch.cat([prompt.ids, ids])
            embeds = family.embed(model, whole, family.image_features(model, prompt.images))
            logits = model(inputs_embeds=embeds[None], position_ids=positions[:, None]).logits[0, -n - 1 : -1]
        return logits.log_softmax(-1)[torch.arange(n), ids[-n:]]

    for i, (prompt, ids) in enumerate(zip(prompts, answers, strict=True)):
        n = len(ids)
        right, wrong = logp(prompt, ids, n), {}
        wrong["sibling"] = logp(prompt, torch.cat([answers[i - 1], ids]), n)
        own = torch.cat([prompt.position_ids, (prompt.next_position + torch.arange(n)).expand(3, -1)], 1)
        assert float((logp(prompt, ids, n, own) - right).abs().max()) < 1e-5  # positions passed by hand: the same
        if prompt.images:
            flipped = [picture(*size).transpose(0) for size in SIZES[i]]
            sample = dataclasses.replace(make_sample(family, SIZES[i]), images=tuple(flipped))
            wrong["image"] = logp(family.encode(sample), ids, n)
            late = torch.cat([prompt.position_ids, (len(prompt.ids) + torch.arange(n)).expand(3, -1)], 1)
            wrong["completion position"] = logp(prompt, ids, n, late)
            wrong["1-D positions"] = logp(prompt, ids, n, torch.arange(len(prompt.ids) + n).expand(3, -1))
        for what, moved in wrong.items():
            assert float((moved - right).abs().max()) > 0.1, f"prompt {i}: {what}"


@pytest.fixture(scope="module")
def answers(family):
    """transformers' greedy answers to SIZES; no choice among them hangs on rounding."""
    model, found = plain_model(family), []
    for prompt in (family.encode(sample) for sample in make_samples(family)):
        found.append(plain_greedy(family, model, prompt))
        with torch.no_grad():
            z = plain_logits(model, prompt, torch.tensor(found[-1]))
        two = z.masked_fill(family.banned_ids(z.shape[1]), -torch.inf).topk(2, -1).values
        assert float((two[:, 0] - two[:, 1]).min()) > MARGIN
    return found


def test_the_answers_are_worth_comparing(family, answers):
    """Three stop lengths or more, in every answer five distinct tokens (if it has so many), and one is long."""
    assert len({len(ids) for ids in answers if ids[-1] in family.stop_ids}) >= 3
    assert all(len(set(ids)) >= 5 for ids in answers if len(ids) >= 5)
    assert sum(len(ids) >= 5 for ids in answers) >= 3 and max(map(len, answers)) > 40


@pytest.mark.parametrize("group_size, batch", [(1, 256), (1, 4), (3, 7), (3, 1), (16, 24)])
def test_greedy_equals_transformers_token_for_token(family, answers, group_size, batch):
    rollouts = generate(policy_of(family), make_samples(family), group_size, greedy(), seed=1, step=2, batch=batch)
    assert [(r.prompt, r.completion) for r in rollouts] == [(p, g) for p in range(6) for g in range(group_size)]
    assert tokens_of(rollouts) == [ids for ids in answers for _ in range(group_size)]
    for r in rollouts:
        assert r.finished == (r.completion_ids[-1] in family.stop_ids) == (len(r.completion_ids) < LONGEST)
        assert torch.equal(r.log_kept, r.logp_rollout)  # what is kept is the one token


def test_greedy_records_log_probs_at_temperature_one(family):
    model = plain_model(family, torch.float64)
    for r in generate(policy_of(family, torch.float64), make_samples(family), 1, greedy(), seed=0, step=0):
        logp, entropy, _ = truth(family, model, r)
        torch.testing.assert_close(r.logp_rollout.double(), logp, rtol=0, atol=TOLERANCE[torch.float64])
        torch.testing.assert_close(r.entropy.double(), entropy, rtol=0, atol=TOLERANCE[torch.float64])


def test_min_new_tokens(family, answers):
    """As transformers understands it: the first stop may be token number least + 1."""
    samples = make_samples(family)
    least = sorted(map(len, answers))[1] + 3  # two or more of the answers may not stop where they would
    rollouts = generate(policy_of(family), samples, 1, greedy(min_new_tokens=least), seed=0, step=0)
    model = plain_model(family)
    theirs = [plain_greedy(family, model, r.inputs, min_new_tokens=least) for r in rollouts]
    assert tokens_of(rollouts) == theirs
    assert sum(a != b for a, b in zip(answers, theirs, strict=True)) >= 2
    assert all(len(ids) > least and not set(ids[:least]) & set(family.stop_ids) for ids in theirs)
    sampling = Sampling(min_new_tokens=6, max_new_tokens=9)
    drawn = generate(policy_of(family, torch.float64), samples, 3, sampling, seed=0, step=0)
    assert all(len(r.completion_ids) > 6 for r in drawn)
    assert_true_to(family, plain_model(family, torch.float64), drawn, min_new_tokens=6)


def test_stop_token_truncation_and_text(family, answers):
    """The stop token is in the completion and not in the text; an answer cut one token before it is unfinished."""
    which = max((i for i, ids in enumerate(answers) if ids[-1] in family.stop_ids), key=lambda i: len(answers[i]))
    length, samples, policy = len(answers[which]), [make_samples(family)[which]], policy_of(family)
    (whole,) = generate(policy, samples, 1, greedy(max_new_tokens=length), seed=0, step=0)
    (cut,) = generate(policy, samples, 1, greedy(max_new_tokens=length - 1), seed=0, step=0)
    assert whole.finished and whole.completion_ids.tolist() == answers[which]
    assert not cut.finished and cut.completion_ids.tolist() == answers[which][:-1]
    assert whole.text == cut.text == family.decode(torch.tensor(answers[which][:-1])) and "<|im_end|>" not in whole.text
    for r in (whole, cut):
        n = len(r.completion_ids)
        assert r.loss_mask.tolist() == [True] * n
        assert r.logp_rollout.shape == r.log_kept.shape == r.entropy.shape == (n,)


# ---- sampled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature, dtype", [(1.0, torch.float64), (0.6, torch.float64), (1.4, torch.float64),
                                                (1.0, torch.float32)])  # fmt: skip
def test_recorded_log_probs_are_the_plain_models(family, temperature, dtype):
    sampling = Sampling(temperature=temperature, max_new_tokens=24)
    rollouts = generate(policy_of(family, dtype), make_samples(family), 3, sampling, seed=5, step=1)
    assert_true_to(family, plain_model(family, dtype), rollouts, temperature)
    assert min(float(r.log_kept.min()) for r in rollouts) < -1e-3  # the bans take something away
    texts = {tuple(ids) for ids in tokens_of(rollouts)}
    assert len(texts) > 12
    for r in rollouts:
        stops = torch.isin(r.completion_ids, torch.tensor(family.stop_ids)).tolist()
        assert not any(stops[:-1]) and stops[-1] == r.finished and (r.finished or len(stops) == 24)


def test_float32_rollouts_are_as_exact_as_the_plain_model(family):
    """With these weights float32 itself is off by up to 5e-5 nat, ours no more than transformers'."""
    policy, plain, exact = policy_of(family), plain_model(family), plain_model(family, torch.float64)
    rollouts = generate(policy, make_samples(family), 3, Sampling(max_new_tokens=24), seed=5, step=1)
    right = [truth(family, exact, r)[0] for r in rollouts]
    ours = torch.cat([r.logp_rollout.double() - t for r, t in zip(rollouts, right, strict=True)])
    theirs = torch.cat([truth(family, plain, r)[0] - t for r, t in zip(rollouts, right, strict=True)])
    assert float(ours.norm()) < 1.3 * float(theirs.norm()) and float(ours.abs().max()) < 1e-4


def test_bfloat16_rollouts_are_the_trainers(family):
    """`logp_gap` in bfloat16: decoding and a packed forward round alike, no worse against float32, but not the same."""
    policy, exact = policy_of(family, torch.bfloat16), policy_of(family)
    samples, gaps = make_samples(family), []
    rollouts = generate(policy, samples, 4, Sampling(max_new_tokens=40), seed=0, step=0)
    every = Normaliser("token-mean", 1.0, 1.0, 40)
    for p in pack(rollouts, np.ones((len(samples), 4)), 2048, every, drop_flat=False):
        trainer, right = pack_logprobs(policy, p, 1.0), pack_logprobs(exact, p, 1.0)
        gaps.append(torch.stack([p.rows.logp_rollout - trainer, p.rows.logp_rollout - right, trainer - right]))
    gap, sampler, trainer = torch.cat(gaps, 1)
    assert 1e-3 < float(gap.abs().mean()) < 0.04 and float(gap.abs().max()) < 0.4  # measured: 0.026 and 0.17 at most
    assert float(sampler.norm()) < 1.3 * float(trainer.norm())


def test_groups_that_leave_at_different_times(late):
    """Stops made likely: some groups are done before the suffix grows, others long after, and within a group, too."""
    policy, model = policy_of(late, torch.float64), plain_model(late, torch.float64)
    for each in (policy.model, model):
        with torch.no_grad():
            each.lm_head.weight[late.stop_ids[0]] *= 1.2
    rollouts = generate(policy, make_samples(late), 2, Sampling(max_new_tokens=90), seed=1, step=0)
    lengths = [[len(r.completion_ids) for r in rollouts[2 * p : 2 * p + 2]] for p in range(6)]
    ends = [max(group) for group in lengths]
    assert len(set(ends)) >= 4 and min(ends) < 40 and max(ends) > 80, ends
    assert any(min(group) < 10 and max(group) > 60 for group in lengths)
    assert_true_to(late, model, rollouts)


def test_batches_and_shares_change_nothing(family):
    """A completion is a function of (seed, step, prompt's index in the global step, completion), and of its prompt."""
    policy, samples = policy_of(family), make_samples(family)
    sampling = Sampling(max_new_tokens=20)

    def run(samples=samples, seed=3, step=7, first=0, **how):
        return generate(policy, samples, 3, sampling, seed=seed, step=step, first=first, **how)

    whole = run()
    for batch in (1, 3, 6, 10, 18):
        assert_same(run(batch=batch), whole)
    assert_same(run(samples[:2]) + run(samples[2:], first=2), whole)
    assert_same([r for i in range(6) for r in run(samples[i : i + 1], first=i)], whole)
    encoded, done = [policy.family.encode(s) for s in samples], []
    assert_same(run(prompts=encoded, on_batch=done.append, batch=12), whole)
    assert done == [1] * 6
    assert all(r.inputs is encoded[r.prompt] for r in run(prompts=encoded))


def test_every_field_of_the_counter_matters(family):
    """The same prompt six times: what differs between its completions is the random stream alone."""
    policy, sample = policy_of(family), make_sample(family, [(84, 140)])
    sampling = Sampling(max_new_tokens=12, min_new_tokens=11)

    def run(seed=3, step=7, first=0):
        return tokens_of(generate(policy, [sample] * 2, 3, sampling, seed=seed, step=step, first=first))

    base = run()
    assert base == run()
    others = {"seed": run(seed=4), "step": run(step=8), "first": run(first=2), "swap": run(seed=7, step=3)}
    for name, other in others.items():
        assert not any(a == b for a in base for b in other), name
    assert len({tuple(ids) for ids in base}) == 6  # two prompts of three completions each
    assert run(first=1)[:3] == base[3:]
    for ids in base:
        assert len(set(ids)) > 4  # positions draw with different numbers


def test_vision_ids_are_never_drawn(late):
    """A head bent towards the banned ids, of both signs, so that one of them is always the most probable token."""
    policy, model = policy_of(late, torch.float64), plain_model(late, torch.float64)
    banned = late.banned_ids(policy.vocab_size)
    ids = banned.nonzero()[:, 0]
    assert set(ids.tolist()) == {*late.vision_ids, *range(len(late.tokenizer), policy.vocab_size)}
    for each in (policy.model, model):
        with torch.no_grad():
            sign = 2.5 - 5.0 * (torch.arange(len(ids)) % 2)  # 2.5, -2.5, 2.5, ...
            each.lm_head.weight[ids] = each.lm_head.weight[ids][torch.arange(len(ids)) // 2] * sign[:, None]
    samples = make_samples(late)
    for temperature in (0.0, 5.0, 1.0):
        sampling = Sampling(temperature=temperature, max_new_tokens=20)
        rollouts = generate(policy, samples, 2, sampling, seed=0, step=0)
        assert not any(banned[r.completion_ids].any() for r in rollouts)
        if temperature:
            assert_true_to(late, model, rollouts, temperature)
    kept = torch.cat([r.log_kept for r in rollouts])
    assert float(kept.median()) < np.log(0.5)  # at temperature 1 the banned ids hold most of the mass
    with torch.no_grad():
        argmax = [plain_logits(model, r.inputs, r.completion_ids).argmax(-1) for r in rollouts]
    assert float(banned[torch.cat(argmax)].float().mean()) > 0.8


def test_both_stop_tokens_stop(late):
    """<|endoftext|> ends an answer as <|im_end|> does."""
    policy, samples = policy_of(late), make_samples(late)
    with torch.no_grad():
        policy.model.lm_head.weight[late.stop_ids[0]] = 0
        policy.model.lm_head.weight[late.stop_ids[1]] *= 3
    rollouts = generate(policy, samples, 3, Sampling(max_new_tokens=60), seed=0, step=0)
    ended = [r for r in rollouts if r.finished and r.completion_ids[-1] == late.stop_ids[1]]
    assert len(ended) > 6 and all(late.stop_ids[1] not in r.completion_ids[:-1] for r in rollouts)


@pytest.fixture(scope="module")
def pairs(late):
    """A policy, a short prompt, and the exact probabilities of every first token and pair of tokens, float64."""
    sample = dataclasses.replace(make_sample(late, []), messages=[{"role": "user", "content": "cat"}])
    prompt, model = late.encode(sample), late.load_model(torch.float64).eval()
    v = model.lm_head.weight.shape[0]
    with torch.no_grad():
        first = plain_logits(model, prompt, torch.tensor([0]))[0]
        streams = torch.cat([prompt.ids.expand(v, -1), torch.arange(v)[:, None]], 1)
        model.model.rope_deltas = None
        second = model(input_ids=streams, attention_mask=torch.ones_like(streams), use_cache=False).logits[:, -1]
    return policy_of(late), sample, first, second, late.banned_ids(v)


def cells(pairs, temperature):
    """(V, V) probability of each pair; a stop token ends the answer, its mass stands in column 0 of its row."""
    policy, _, first, second, banned = pairs
    p = (first / temperature).masked_fill(banned, -torch.inf).softmax(-1)
    q = (second / temperature).masked_fill(banned, -torch.inf).softmax(-1)
    stops = list(policy.family.stop_ids)
    q[stops] = 0
    q[stops, 0] = 1
    return (p[:, None] * q).numpy()


def draw_pairs(pairs, n, temperature, seed):
    policy, sample = pairs[:2]
    sampling = Sampling(temperature=temperature, max_new_tokens=2)
    return generate(policy, [sample], n, sampling, seed=seed, step=0, batch=n)


def p_value(rollouts, expected):
    """Chi-square over pairs; rare ones are pooled in the order of their probability, so that a distribution that is too
    flat or too sharp still shows."""
    counts = np.zeros_like(expected)
    for r in rollouts:
        ids = r.completion_ids.tolist()
        counts[ids[0], ids[1] if len(ids) == 2 else 0] += 1
    assert not counts[expected == 0].any()
    n, order = len(rollouts), np.argsort(-expected, axis=None)
    bins = np.minimum(np.floor(np.cumsum(expected.flat[order]) * n / 25), n // 25 - 1).astype(int)  # some 25 a bin
    observed = np.bincount(bins, counts.flat[order])
    wanted = np.bincount(bins, expected.flat[order]) * n
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    assert wanted.min() > 5 and len(wanted) > 50
    return stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_frequencies_of_the_first_two_tokens(pairs, temperature):
    expected = cells(pairs, temperature)
    assert expected.sum() == pytest.approx(1, abs=1e-9)
    for seed in (0, 1):
        assert p_value(draw_pairs(pairs, 4000, temperature, seed), expected) > 1e-3
    assert p_value(draw_pairs(pairs, 4000, 1.1 * temperature, 0), expected) < 1e-6
