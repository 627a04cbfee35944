"""Attention against a dense masked softmax written out here in float64, head by head."""

import inspect
import sys
from itertools import pairwise

import pytest
import torch
import transformers
from tiny_models import make_tiny
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from worlds import make_policy, make_sample, plain_logits

from pr1 import attention
from pr1.attention import TEXT, VISION, PackedAttention
from pr1.families import load_family
from pr1.packing import Normaliser, pack
from pr1.records import Segments

Q_HEADS, K_HEADS, DIM = 6, 2, 8
SCALE = 0.31  # not 1/sqrt(DIM): the caller's is to be used


def rand(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(q, k, v, sees):
    """softmax(q k' * SCALE, where sees) v, head by head; q (Hq, n, D), k and v (Hk, m, D), sees (n, m) bool."""
    out = []
    for head in range(len(q)):
        shared = head // (len(q) // len(k))
        scores = (q[head] @ k[shared].T * SCALE).masked_fill(~sees, -torch.inf)
        weights = scores.exp() / scores.exp().sum(1, keepdim=True)
        out.append(weights @ v[shared])
    return torch.stack(out)


def segments(pieces):
    """Segments from [(number of queries, list of key rows)]."""
    n_q, n_k = [n for n, _ in pieces], [len(rows) for _, rows in pieces]
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in (n_q, n_k))
    return Segments(cu_q, cu_k, torch.tensor([r for _, rows in pieces for r in rows]), max(n_q), max(n_k))


def with_gradients(function, tensors):
    """The result for detached copies of the tensors, and the gradients of one scalar made of it."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    (out * rand(99, *out.shape).to(out.dtype)).sum().backward()
    return out.detach(), [x.grad for x in leaves]


def assert_equal(ours, theirs, atol=1e-12):
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=atol)
    for a, b in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


# ---- packs -----------------------------------------------------------------------------------------------------------


def test_packed_attention_is_the_mask_of_a_pack():
    """Two groups in a stream of 17 rows; who sees whom is said row by row, from the story of a pack."""
    #       prompt     a     b   c        prompt   d        e
    group = [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    part = [".", ".", ".", ".", "a", "a", "b", "c", "c", ".", ".", ".", "d", "d", "d", "e", "e"]
    sees = torch.tensor([[group[j] == group[i] and part[j] in (".", part[i]) and j <= i for j in range(17)]
                         for i in range(17)])  # fmt: skip
    pieces = [(6, [*range(6)]), (1, [0, 1, 2, 3, 6]), (2, [0, 1, 2, 3, 7, 8]),
              (6, [*range(9, 15)]), (2, [9, 10, 11, 15, 16])]  # fmt: skip
    q, k, v = rand(0, Q_HEADS, 17, DIM), rand(1, K_HEADS, 17, DIM), rand(2, K_HEADS, 17, DIM)
    attend = PackedAttention(segments(pieces))
    ours = with_gradients(lambda q, k, v: attend(0, q, k, v, SCALE), (q, k, v))
    assert_equal(ours, with_gradients(lambda q, k, v: dense(q, k, v, sees), (q, k, v)))


@pytest.mark.parametrize("seed", range(6))
def test_packed_attention_on_any_segments(seed):
    """Keys gathered from anywhere, rows used several times or never, one query, all lengths; bottom-right causal."""
    generator = torch.Generator().manual_seed(seed)

    def pick(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    n_q = [pick(1, 7) for _ in range(5)]
    total = sum(n_q)
    pieces = [(n, [pick(0, total) for _ in range(n + (0 if i == 2 else pick(0, 9)))]) for i, n in enumerate(n_q)]
    q, k, v = (rand(seed + 10 * i, heads, total, DIM) for i, heads in enumerate((Q_HEADS, K_HEADS, K_HEADS)))

    def truth(q, k, v):
        out, start = [], 0
        for n, rows in pieces:
            hidden = len(rows) - n  # keys that the first query sees beside its own
            sees = torch.tensor([[j <= hidden + i for j in range(len(rows))] for i in range(n)])
            out.append(dense(q[:, start : start + n], k[:, rows], v[:, rows], sees))
            start += n
        return torch.cat(out, 1)

    attend = PackedAttention(segments(pieces))
    ours = with_gradients(lambda q, k, v: attend(3, q, k, v, SCALE), (q, k, v))
    assert_equal(ours, with_gradients(truth, (q, k, v)))


def test_packed_attention_makes_no_mask_of_the_whole_stream():
    prompt, suffix = 40, 5
    pieces = [(prompt + suffix, [*range(prompt + suffix)])]
    pieces += [(suffix, [*range(prompt), *range(s, s + suffix)]) for s in range(prompt + suffix, 200, suffix)]
    attend = PackedAttention(segments(pieces))
    total = sum(n for n, _ in pieces)
    attend(0, rand(0, Q_HEADS, total, DIM), rand(1, K_HEADS, total, DIM), rand(2, K_HEADS, total, DIM), SCALE)
    assert [tuple(m.shape) for m in attend.masks.values()] == [(suffix, prompt + suffix)]  # one, shared by all suffixes


def test_gradients_of_shared_keys_are_added_in_float32(monkeypatch):
    """400 completions read one key: in bfloat16, as a GPU's atomics would add, a sum of ones ends at 256."""
    add, types = torch.Tensor.index_add_, []
    monkeypatch.setattr(torch.Tensor, "index_add_", lambda x, *how: types.append(x.dtype) or add(x, *how))
    x, index = torch.ones(2, 1, 1, dtype=torch.bfloat16, requires_grad=True), torch.tensor([1] * 400 + [0])
    PackedAttention.gather(x, index).sum().backward()
    assert x.grad[:, 0, 0].tolist() == [1, 400] and x.grad.dtype == torch.bfloat16
    assert types == [torch.float32]


# ---- FlashAttention, its place taken by the dense truth -----------------------------------------------------------------


def dense_varlen(query, key, value, cu_q, cu_k, causal, scale):
    """What a varlen kernel computes: (T, H, D) in and out, bottom-right causal."""
    assert scale == SCALE and cu_q.dtype == cu_k.dtype == torch.int32
    out = []
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        sees = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
        sees = sees.tril(k1 - k0 - (q1 - q0)) if causal else sees
        out.append(dense(*(x.transpose(0, 1) for x in (query[q0:q1], key[k0:k1], value[k0:k1])), sees).transpose(0, 1))
    return torch.cat(out)


def stand_ins(monkeypatch, kind, asked):
    """CPU stand-ins for the kernel of this kind; `asked` grows by what each call was told."""

    def torch_old(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        assert query.shape[1] == key.shape[1]  # no grouped heads before 2.12
        asked.append((max_q, max_k, window_size))
        return dense_varlen(query, key, value, cu_q, cu_k, {(-1, 0): True, (-1, -1): False}[window_size], scale)

    def torch_new(*args, enable_gqa=False, **how):
        query, key, value, *rest = args
        assert enable_gqa == (query.shape[1] != key.shape[1])
        times = query.shape[1] // key.shape[1]
        return torch_old(query, *(x.repeat_interleave(times, 1) for x in (key, value)), *rest, **how)

    def flash(query, key, value, cu_q, cu_k, max_q, max_k, softmax_scale=None, causal=False, deterministic=False):
        asked.append((max_q, max_k, (-1, 0) if causal else (-1, -1)))
        return dense_varlen(query, key, value, cu_q, cu_k, causal, softmax_scale)

    monkeypatch.setattr(attention, "_flash", lambda query: True)
    monkeypatch.setattr(attention, "flash_attn_varlen_func", flash if kind == "flash_attn" else None)
    monkeypatch.setattr(attention, "varlen_attn", torch_new if kind == "torch 2.12" else torch_old)
    monkeypatch.setattr(attention, "GROUPED", kind == "torch 2.12")


@pytest.mark.parametrize("kind", ["flash_attn", "torch 2.11", "torch 2.12"])
def test_one_varlen_call_does_what_segments_do(monkeypatch, kind):
    pieces = [(6, [*range(6)]), (1, [0, 1, 2, 3, 6]), (2, [0, 1, 2, 3, 7, 8]), (6, [*range(9, 15)]),
              (2, [9, 10, 11, 15, 16])]  # fmt: skip
    tensors = rand(0, Q_HEADS, 17, DIM), rand(1, K_HEADS, 17, DIM), rand(2, K_HEADS, 17, DIM)

    def run(q, k, v):
        return PackedAttention(segments(pieces))(0, q, k, v, SCALE)

    theirs, asked = with_gradients(run, tensors), []
    stand_ins(monkeypatch, kind, asked)
    assert_equal(with_gradients(run, tensors), theirs)
    assert asked == [(6, 6, (-1, 0))]


@pytest.mark.parametrize("kind", ["flash_attn", "torch 2.11", "torch 2.12"])
def test_windows_in_one_varlen_call(monkeypatch, kind):
    cu, asked = torch.tensor([0, 16, 20, 36, 37]).int(), []
    tensors = [rand(i, 1, K_HEADS, 37, DIM) for i in range(3)]

    def run(q, k, v):
        return ALL_ATTENTION_FUNCTIONS[VISION](
            None, q, k, v, None, scaling=SCALE, cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=16, max_length_k=16
        )[0]

    theirs = with_gradients(run, tensors)
    stand_ins(monkeypatch, kind, asked)
    assert_equal(with_gradients(run, tensors), theirs)
    assert asked == [(16, 16, (-1, -1))]


def on_gpu(dim, dtype, *heads, tokens):
    return [rand(i, h, tokens, dim).to("cuda", dtype) for i, h in enumerate(heads)]


@pytest.mark.gpu
@pytest.mark.parametrize("own", [True, False])
def test_varlen_kernel_is_bottom_right_causal(monkeypatch, own):
    """The kernel of this machine (own: torch's, whatever is installed) against float64, forward and backward."""
    if own:
        monkeypatch.setattr(attention, "flash_attn_varlen_func", None)
    pieces = [(130, [*range(130)]), (1, [*range(100), 130]), (70, [*range(100), *range(131, 201)])]
    seg = segments(pieces)
    q, k, v = on_gpu(64, torch.bfloat16, Q_HEADS, K_HEADS, K_HEADS, tokens=201)

    def run(q, k, v):
        device = q.device
        there = Segments(*(x.to(device) for x in (seg.cu_q, seg.cu_k, seg.kv_index)), seg.max_q, seg.max_k)
        return PackedAttention(there)(0, q, k, v, SCALE)

    truth = with_gradients(run, [x.cpu().double() for x in (q, k, v)])
    out, grads = with_gradients(lambda *x: run(*x).cpu(), (q, k, v))
    for ours, theirs in zip([out, *grads], [truth[0], *truth[1]], strict=True):
        error = (ours.cpu().double() - theirs).norm() / theirs.norm()
        assert float(error) < 1e-2, float(error)


@pytest.mark.gpu
def test_windows_of_head_dim_80_on_the_gpu():
    cu = torch.tensor([0, 64, 96, 160]).int()
    q, k, v = on_gpu(80, torch.bfloat16, 4, 4, 4, tokens=160)
    function = ALL_ATTENTION_FUNCTIONS[VISION]

    def run(device, *tensors):
        return function(None, *(x[None] for x in tensors), None, scaling=80**-0.5, cu_seq_lens_q=cu.to(device),
                        max_length_q=64)[0]  # fmt: skip

    truth = with_gradients(lambda *x: run("cpu", *x), [x.cpu().double() for x in (q, k, v)])
    out, grads = with_gradients(lambda *x: run("cuda", *x).cpu(), (q, k, v))
    for ours, theirs in zip([out, *grads], [truth[0], *truth[1]], strict=True):
        assert float((ours.cpu().double() - theirs).norm() / theirs.norm()) < 1e-2


# ---- the vision tower ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[16], [16, 16, 16], [16, 4, 8, 16, 4, 1], [1, 1], [8, 16, 8]])
def test_windows(lengths):
    """Every window alone, in any order of lengths; the gradients, too."""
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v = (rand(i, 1, K_HEADS, sum(lengths), DIM) for i in range(3))

    def ours(q, k, v):
        out, weights = ALL_ATTENTION_FUNCTIONS[VISION](None, q, k, v, None, scaling=SCALE, cu_seq_lens_q=cu)
        assert weights is None
        return out

    def theirs(q, k, v):
        out = []
        for a, b in pairwise(cu.tolist()):
            every = torch.ones(b - a, b - a, dtype=torch.bool)
            out.append(dense(q[0, :, a:b], k[0, :, a:b], v[0, :, a:b], every).transpose(0, 1))
        return torch.cat(out)[None]  # (1, T, H, D)

    assert_equal(with_gradients(ours, (q, k, v)), with_gradients(theirs, (q, k, v)))


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen2_vl"])
def family(request, tmp_path_factory):
    return load_family(make_tiny(tmp_path_factory.mktemp(request.param), request.param))


def counted(monkeypatch, name):
    """Calls of a registered attention function: the list grows by the cu_seqlens (or None) of each."""
    calls, function = [], ALL_ATTENTION_FUNCTIONS[name]

    def counting(*args, **how):
        calls.append(how.get("cu_seq_lens_q"))
        return function(*args, **how)

    monkeypatch.setitem(AttentionInterface._global_mapping, name, counting)
    return calls


def test_one_call_a_block_whatever_the_windows(family, monkeypatch):
    policy = make_policy(family)
    images = family.encode(make_sample(family, [(252, 364), (168, 140)])).images
    calls = counted(monkeypatch, VISION)
    policy.features(images)
    blocks = policy.visual.config.depth
    assert len(calls) == blocks == 3
    patches = [i.grid[1] * i.grid[2] for i in images]
    ends = torch.tensor([0, *patches]).cumsum(0).tolist()
    windows = [c.tolist() for c in calls]
    if family.name == "qwen2_vl":
        assert windows == [ends] * 3  # one per image
    else:  # blocks 0 and 2 look at windows of 8 x 8 patches, ragged at the edges: 3 x 4 and 2 x 2 of them
        assert windows[1] == ends and windows[0] == windows[2] and len(windows[0]) == 1 + 12 + 4
        assert {b - a for a, b in pairwise(windows[0])} == {64, 16, 32, 8, 4}


def test_features_equal_those_of_the_plain_tower(family):
    """Frozen, one image a call, and trained, all in one call, against transformers' own loop over windows."""
    images = family.encode(make_sample(family, [(252, 364), (168, 140), (112, 112)])).images
    plain = family.load_model(torch.float64)
    assert plain.model.visual.config._attn_implementation == "sdpa"
    with torch.no_grad():
        theirs = plain.model.get_image_features(
            torch.cat([i.pixels for i in images]).double(), torch.tensor([i.grid for i in images]), return_dict=True
        ).pooler_output
    for train_vision in (False, True):
        ours = make_policy(family, train_vision=train_vision).features(images)
        for (mine,), other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.detach(), other, rtol=1e-5, atol=1e-6)  # float32 rotary tables in both


# ---- transformers is left alone --------------------------------------------------------------------------------------


def test_the_language_model_calls_once_a_layer(family, monkeypatch):
    from worlds import make_rollouts

    policy = make_policy(family)
    prompts = [family.encode(make_sample(family, sizes)) for sizes in ([(168, 140)], [])]
    rollouts = make_rollouts(family, prompts, [[3, 5], [2, 4]])
    (p,) = pack(rollouts, torch.ones(2, 2), 10**6, Normaliser("token-mean", 14, 4, 8), drop_flat=False)
    calls = counted(monkeypatch, TEXT)
    policy.hidden(p)
    assert len(calls) == 2


def test_transformers_is_not_patched(family):
    """Every function of the two models' modules is transformers' own, and so are its attention functions; a plain model
    computes bit by bit the same before and after a policy was made and used beside it."""
    home = str(inspect.getfile(transformers)).rsplit("/", 1)[0]
    modules = [m for name, m in sys.modules.items() if name.startswith("transformers.models.qwen2")]
    assert len(modules) >= 4
    seen = 0
    for module in modules:
        for value in list(vars(module).values()):
            own_class = inspect.isclass(value) and value.__module__ == module.__name__
            for function in vars(value).values() if own_class else [value]:
                function = inspect.unwrap(function) if inspect.isfunction(function) else function
                if inspect.isfunction(function) and (function.__module__ or "").startswith("transformers"):
                    seen += 1
                    assert function.__code__.co_filename.startswith((home, "<")), function
                assert not str(getattr(function, "__module__", "")).startswith("pr1"), function
    assert seen > 100
    for name, function in ALL_ATTENTION_FUNCTIONS.items():
        owner = "pr1." if name in (TEXT, VISION) else "transformers."
        assert function.__module__.startswith(owner), name
    prompt, plain = family.encode(make_sample(family, [(168, 140)])), family.load_model(torch.float64)
    ids = torch.tensor([1, 2, 3])
    with torch.no_grad():
        before = plain_logits(plain, prompt, ids)
        make_policy(family).features(prompt.images)
        assert torch.equal(plain_logits(plain, prompt, ids), before)
    assert plain.config.get_text_config()._attn_implementation == "sdpa"
