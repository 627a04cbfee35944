"""The policy: its feature cache, its vision calls, and its hidden states against transformers'."""

import dataclasses

import pytest
import torch
from tiny_models import make_tiny
from worlds import make_policy, make_rollouts, make_sample

from pr1.attention import TEXT, VISION
from pr1.families import load_family
from pr1.packing import Normaliser, pack
from pr1.policy import FeatureCache, Policy

SIZES = [(168, 140), (252, 364), (140, 84)]


def features(n, fill=0.0, dtype=torch.float32):
    """4 * n bytes in two tensors, as a family with several layers' worth of features has them."""
    return (torch.full((n // 2,), fill, dtype=dtype), torch.full((n - n // 2,), fill, dtype=dtype))


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_cache_drops_the_least_recently_used_to_stay_within_its_budget():
    cache = FeatureCache(40)  # bytes: ten floats
    cache.put("a", features(4, 1.0))
    cache.put("b", features(4, 2.0))
    assert cache.used == 32 and list(cache.entries) == ["a", "b"]
    assert float(cache.get("a")[1][0]) == 1.0  # now b is the older one
    cache.put("c", features(6, 3.0))
    assert list(cache.entries) == ["a", "c"] and cache.used == 40
    assert cache.get("b") is None
    cache.put("d", features(5, 4.0))  # both must go
    assert list(cache.entries) == ["d"] and cache.used == 20
    cache.put("e", features(10, 5.0))  # exactly the budget
    assert list(cache.entries) == ["e"] and cache.used == 40


def test_cache_counts_bytes_not_numbers():
    cache = FeatureCache(40)
    cache.put("half", features(12, dtype=torch.bfloat16))
    assert cache.used == 24
    cache.put("double", features(2, dtype=torch.float64))
    assert cache.used == 40 and len(cache.entries) == 2


def test_what_is_larger_than_the_budget_is_not_kept_and_drives_nothing_out():
    cache = FeatureCache(40)
    cache.put("a", features(4))
    cache.put("whale", features(11))
    assert list(cache.entries) == ["a"] and cache.used == 16
    nothing = FeatureCache(0)
    nothing.put("a", features(4))
    assert nothing.get("a") is None and nothing.used == 0


def test_putting_again_replaces():
    cache = FeatureCache(40)
    cache.put("a", features(4, 1.0))
    cache.put("b", features(2, 1.0))
    cache.put("a", features(6, 2.0))
    assert cache.used == 32 and float(cache.get("a")[0][0]) == 2.0 and list(cache.entries) == ["b", "a"]


# ---- vision calls ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen2_vl"])
def family(request, tmp_path_factory):
    return load_family(
        make_tiny(tmp_path_factory.mktemp(request.param), request.param, tied=request.param == "qwen2_vl")
    )


@pytest.fixture(scope="module")
def images(family):
    return family.encode(make_sample(family, SIZES)).images


def counted(policy, monkeypatch):
    """The keys of the images of each vision call."""
    calls, function = [], policy.family.image_features

    def counting(model, images):
        calls.append([image.key for image in images])
        return function(model, images)

    monkeypatch.setattr(policy.family, "image_features", counting)
    return calls


def plain_features(family, images):
    model = family.load_model(torch.float64)
    with torch.no_grad():
        return model.model.get_image_features(
            torch.cat([i.pixels for i in images]).double(), torch.tensor([i.grid for i in images]), return_dict=True
        ).pooler_output


def test_frozen_tower_runs_one_image_a_call_and_caches(family, images, monkeypatch):
    policy = make_policy(family, train_vision=False)
    calls = counted(policy, monkeypatch)
    a, b, c = images
    first = policy.features([a, b, a, c])
    assert calls == [[a.key], [b.key], [c.key]]
    assert first[0] is first[2]
    again = policy.features([c, a])
    assert len(calls) == 3 and again[0] is first[3] and again[1] is first[0]
    for mine, theirs in zip([first[0], first[1], first[3]], plain_features(family, images), strict=True):
        torch.testing.assert_close(mine[0], theirs, rtol=1e-5, atol=1e-6)
        assert not mine[0].requires_grad
    assert policy.cache.used == sum(x.numel() * 8 for each in (first[0], first[1], first[3]) for x in each)


def test_frozen_features_do_not_depend_on_the_company(family, images):
    """Bit by bit the same whichever other images a pack holds, and whatever the cache has dropped."""
    alone = [make_policy(family, torch.float32, train_vision=False).features([image])[0][0] for image in images]
    together = make_policy(family, torch.float32, train_vision=False).features(images)
    forgetful = make_policy(family, torch.float32, train_vision=False)
    forgetful.cache = FeatureCache(0)
    for one, two, three in zip(alone, together, forgetful.features(images[::-1])[::-1], strict=True):
        assert torch.equal(one, two[0]) and torch.equal(one, three[0])


def test_a_small_cache_computes_again(family, images, monkeypatch):
    policy = make_policy(family, train_vision=False)
    a, b, c = images
    one = sum(x.numel() * x.element_size() for x in policy.features([b])[0])  # the largest
    policy.cache = FeatureCache(one)
    calls = counted(policy, monkeypatch)
    policy.features([b, b, a, b])
    assert calls == [[b.key], [a.key], [b.key]]


def test_trained_tower_sees_all_images_in_one_call(family, images, monkeypatch):
    policy = make_policy(family, train_vision=True)
    calls = counted(policy, monkeypatch)
    got = policy.features(images)
    assert calls == [[image.key for image in images]]
    for mine, theirs in zip(got, plain_features(family, images), strict=True):
        torch.testing.assert_close(mine[0].detach(), theirs, rtol=1e-5, atol=1e-6)
        assert mine[0].requires_grad
    policy.features(images)
    assert len(calls) == 2 and not policy.cache.entries  # weights change, so nothing is kept
    assert policy.features([]) == [] and len(calls) == 2


def test_which_parameters_train(family):
    """The tower by the flag, all else always; our attention is set; nothing is in training mode."""
    for train_vision in (False, True):
        policy = make_policy(family, train_vision=train_vision)
        for name, parameter in policy.model.named_parameters():
            assert parameter.requires_grad == (train_vision or not name.startswith("model.visual")), name
        assert not policy.model.training
        assert policy.text.config._attn_implementation == TEXT
        assert policy.visual.config._attn_implementation == VISION
        assert policy.vocab_size == policy.model.config.get_text_config().vocab_size


def test_vision_inputs_are_what_the_tower_would_compute(family, images):
    """With and without them, the tower of a plain model gives the same features, and none is left over."""
    plain, grid = family.load_model(torch.float64), torch.tensor([image.grid for image in images])
    pixels = torch.cat([image.pixels for image in images]).double()
    policy = make_policy(family)
    known, seen = family.vision_inputs(policy.model, grid), []
    for name, value in known.items():
        assert value is None or isinstance(value, int if "max" in name else torch.Tensor), name
    blocks = policy.visual.blocks
    hook = blocks[0].register_forward_pre_hook(lambda _, args, how: seen.append(set(how)), with_kwargs=True)
    with torch.no_grad():
        theirs = plain.model.visual(pixels, grid_thw=grid).pooler_output
        ours = policy.visual(pixels, grid_thw=grid, **known).pooler_output
    hook.remove()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert seen == [{"cu_seqlens", "max_seqlen", "position_embeddings"}]


def test_a_trained_tower_runs_over_distinct_images(family, images, monkeypatch):
    policy = make_policy(family)
    calls = counted(policy, monkeypatch)
    a, b, _ = images
    got = policy.features([a, b, a, a])
    assert calls == [[a.key, b.key]]
    assert got[0][0] is got[2][0] is got[3][0] and got[0][0] is not got[1][0]


# ---- hidden states ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_hidden(model, prompt, completion, device="cpu"):
    """(C, H): transformers' last hidden states at the rows that predict the completion's tokens."""
    ids = torch.cat([prompt.ids, completion])[None].to(device)
    extra = {}
    if prompt.images:
        extra = dict(pixel_values=torch.cat([i.pixels for i in prompt.images]).to(device, model.dtype),
                     image_grid_thw=torch.tensor([i.grid for i in prompt.images], device=device),
                     mm_token_type_ids=(ids == model.config.image_token_id).int())  # fmt: skip
    model.model.rope_deltas = None
    out = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **extra)
    return out.last_hidden_state[0, len(prompt.ids) - 1 : -1]


@pytest.mark.parametrize("train_vision", [False, True])
def test_hidden_states_are_transformers(family, train_vision):
    """Two groups with images and one without, packed; rows in the order of the completions' tokens."""
    prompts = [family.encode(make_sample(family, sizes)) for sizes in ([SIZES[0]], SIZES[1:], [])]
    rollouts = make_rollouts(family, prompts, [[5, 3], [1, 6], [4, 2]])
    (p,) = pack(rollouts, torch.ones(3, 2), 10**6, Normaliser("token-mean", 21, 6, 8), drop_flat=False)
    policy, plain = make_policy(family, train_vision=train_vision), family.load_model(torch.float64)
    hidden = policy.hidden(p)
    theirs = torch.cat([plain_hidden(plain, r.inputs, r.completion_ids) for r in rollouts])
    torch.testing.assert_close(hidden.detach(), theirs, rtol=1e-5, atol=1e-5)
    swapped = dataclasses.replace(p, images=(p.images[0], p.images[2], p.images[1]))  # and images are seen
    with policy.head() as weight, torch.no_grad():
        moved = policy.hidden(swapped)
        assert weight.shape == (policy.vocab_size, hidden.shape[1])
        rows = torch.arange(8, 15)  # the second group
        change = ((moved - hidden) @ weight.T)[rows].abs().max()
    assert float(change) > 0.1


def test_head_is_the_models_own_and_takes_gradients(family):
    policy = make_policy(family)
    with policy.head() as weight, policy.rollout_weights():
        assert weight is policy.model.lm_head.weight
        weight.sum().backward()
    assert torch.equal(policy.model.lm_head.weight.grad, torch.ones_like(policy.model.lm_head.weight))
    tied = family.name == "qwen2_vl"
    assert (policy.model.lm_head.weight is policy.text.embed_tokens.weight) == tied


def test_policies_do_not_share_state(family, images):
    """A second policy, and the reference beside it, has a cache and a configuration of its own."""
    one, two = (make_policy(family, train_vision=False) for _ in range(2))
    one.features(images)
    assert len(one.cache.entries) == 3 and not two.cache.entries
    shared = Policy(family, family.load_model(torch.float64), torch.device("cpu"), train_vision=False, cache=one.cache)
    assert shared.features(images)[0] is one.features(images)[0]


def one_pack(family, sizes=((SIZES[0],), ())):
    prompts = [family.encode(make_sample(family, list(each))) for each in sizes]
    rollouts = make_rollouts(family, prompts, [[5, 3]] * len(prompts))
    tokens = 8 * len(prompts)
    (p,) = pack(rollouts, torch.ones(len(prompts), 2), 10**6, Normaliser("token-mean", tokens, 2, 8), drop_flat=False)
    return p


def test_hidden_reads_nothing_back_from_the_device(family, monkeypatch):
    """With features at hand and one attention call, nothing asks a tensor for its value: on a GPU that would wait."""
    from pr1 import attention

    policy, p = make_policy(family, train_vision=False), one_pack(family)
    policy.features(p.images)
    monkeypatch.setattr(attention, "_flash", lambda query: True)
    monkeypatch.setattr(attention, "varlen", lambda query, *_, **__: query.clone())

    def asked(*_, **__):
        raise AssertionError("a host sync")

    with monkeypatch.context() as patch:
        for name in ("tolist", "item", "nonzero", "__bool__", "__int__", "__float__", "numpy", "cpu"):
            patch.setattr(torch.Tensor, name, asked)
        hidden = policy.hidden(p)
    hidden.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("train_vision", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_hidden_on_a_gpu_in_half_precision(family, train_vision, checkpointing):
    """bfloat16 against float32: at most twice the error of transformers' own bfloat16 model run one completion at a
    time; forward and backward without a host sync."""
    from pr1.packing import to_device

    p = one_pack(family, ((SIZES[0], SIZES[1]), ()))
    truth = make_policy(family, torch.float32, train_vision).hidden(p).detach()
    policy = make_policy(family, torch.bfloat16, train_vision, "cuda", checkpointing=checkpointing)
    there = to_device(p, policy.device)
    policy.hidden(there)  # fills the cache, compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error" if not train_vision else "default")
    try:
        hidden = policy.hidden(there)
        hidden.float().square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    plain = family.load_model(torch.bfloat16).to("cuda")
    prompts = [family.encode(make_sample(family, list(each))) for each in ((SIZES[0], SIZES[1]), ())]
    rollouts = make_rollouts(family, prompts, [[5, 3]] * 2)
    theirs = torch.cat([plain_hidden(plain, r.inputs, r.completion_ids, "cuda") for r in rollouts]).cpu().float()
    ours = hidden.detach().cpu().float()
    assert float((ours - truth).norm()) <= 2 * float((theirs - truth).norm())
