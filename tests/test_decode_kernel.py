"""Decode attention: the Triton kernels, the CPU split and the plain form against scaled_dot_product_attention."""

import math

import pytest
import torch
import torch.nn.functional as F

from pr1.decode import BATCHED, DecodeAttention, Pools
from pr1.kernels.decode_attention import decode_attention, decode_attention_ref, decode_attention_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Config:
    """The numbers of a text configuration that pools read."""

    def __init__(self, q_heads=4, heads=2, dim=16, layers=1):
        self.num_attention_heads, self.num_key_value_heads, self.num_hidden_layers = q_heads, heads, layers
        self.hidden_size = q_heads * dim


def case(lengths, groups, ages, *, q_heads=4, heads=2, dim=16, longest=None, new_tokens=40, seed=0, dtype=torch.float32,
         device="cpu"):  # fmt: skip
    """Pools filled with noise beyond what is live, too; groups[p] lists the rows of prompt p, ages[b] tokens of row b."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    batch = len(ages)
    prefix = [rand(len(lengths) + 1, heads, longest or max(lengths), dim) for _ in range(2)]
    suffix = [rand(batch + 3, heads, new_tokens, dim) for _ in range(2)]
    members = torch.full((len(prefix[0]), max(map(len, groups))), -1, dtype=torch.int32)
    for p, rows in enumerate(groups):
        members[p, : len(rows)] = torch.tensor(rows, dtype=torch.int32)
    return dict(query=rand(batch, q_heads, dim), key=rand(batch, heads, dim), value=rand(batch, heads, dim),
                prefix_k=prefix[0], prefix_v=prefix[1],
                prefix_lengths=torch.tensor([*lengths, 0], dtype=torch.int32, device=device),
                members=members.to(device), suffix_k=suffix[0], suffix_v=suffix[1],
                lengths=torch.tensor(ages, device=device), scaling=dim**-0.5)  # fmt: skip


def truth(c, groups):
    """Row by row with SDPA in float64; also what the pools hold afterwards."""
    out = torch.zeros(c["query"].shape, dtype=torch.float64)
    for p, rows in enumerate(groups):
        for row in rows:
            n, t = int(c["prefix_lengths"][p]), int(c["lengths"][row]) - 1
            k, v = (torch.cat([c[f"prefix_{x}"][p, :, :n], c[f"suffix_{x}"][row, :, :t], new[row][:, None]], 1)
                    for x, new in (("k", c["key"]), ("v", c["value"])))  # fmt: skip
            q = c["query"][row][:, None]
            o = F.scaled_dot_product_attention(*(x[None].double().cpu() for x in (q, k, v)), scale=c["scaling"],
                                               enable_gqa=True)  # fmt: skip
            out[row] = o[0, :, 0]
    return out


CASES = {
    "one": ([5], [[0]], [1], {}),
    "ragged": ([70, 3, 300, 64], [[0, 3, 5], [1], [2, 4, 6, 7], [8]], [1, 40, 2, 17, 5, 9, 33, 1, 12], {}),
    "out of order": ([9, 17], [[4, 0, 2], [1, 3]], [3, 1, 30, 8, 2], {}),
    "a prompt nobody continues": ([20, 31, 8], [[0, 1], [], [2]], [4, 4, 4], {}),
    "many heads": ([130, 90], [[0, 1, 2, 3, 4, 5, 6, 7], [8]], [7] * 9, dict(q_heads=12, heads=2)),
    "more than a tile of queries": ([45], [[*range(20)]], [6] * 20, dict(q_heads=16, heads=2)),
    "no grouped heads": ([45, 2], [[0], [1]], [6, 3], dict(q_heads=2, heads=2, dim=32)),
    "long pool": ([600, 1], [[0, 1], [2]], [6, 1, 3], dict(longest=1100)),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_against_sdpa(name):
    lengths, groups, ages, how = CASES[name]
    c = case(lengths, groups, ages, device=DEVICE, **how)
    before = {x: c[x].clone() for x in ("suffix_k", "suffix_v")}
    expected = truth(c, groups)
    for fn in (decode_attention_triton, decode_attention_ref):
        for x, values in before.items():
            c[x].copy_(values)
        out = fn(**c)
        assert out.shape == c["query"].shape and out.dtype == c["query"].dtype
        torch.testing.assert_close(out.double().cpu(), expected, rtol=0, atol=2e-6)
        for x, new in (("k", c["key"]), ("v", c["value"])):  # the new token is in its place and nothing else moved
            wanted = before[f"suffix_{x}"].clone()
            for row, age in enumerate(ages):
                wanted[row, :, age - 1] = new[row]
            assert torch.equal(c[f"suffix_{x}"], wanted)
        assert torch.equal(decode_attention(**c), out) or DEVICE == "cpu"


def test_the_kernel_is_launched(monkeypatch):
    from pr1.kernels import decode_attention_triton as kernels

    class Unlaunchable:
        def __getitem__(self, grid):
            raise RuntimeError("launched")

    monkeypatch.setattr(kernels, "_suffix_kernel", Unlaunchable())
    with pytest.raises(RuntimeError, match="launched"):
        decode_attention_triton(**case([5], [[0]], [1], device=DEVICE))


def test_rows_of_no_group_disturb_nobody():
    """As in a captured graph that is larger than the batch."""
    c = case([33, 12], [[0, 2], [3]], [5, 9, 7, 2], device=DEVICE)
    out = decode_attention_triton(**c)
    expected = truth(c, [[0, 2], [3]])
    rows = [0, 2, 3]
    torch.testing.assert_close(out.double().cpu()[rows], expected[rows], rtol=0, atol=2e-6)


def test_extreme_scores():
    c = case([70, 9], [[0, 1], [2]], [5, 9, 1], device=DEVICE)
    c["query"] *= 200
    expected = truth(c, [[0, 1], [2]])
    torch.testing.assert_close(decode_attention_triton(**c).double().cpu(), expected, rtol=0, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("group", [1, 8, 16])
def test_half_precision_on_the_device(group):
    """Within a bfloat16 rounding of the output and of the weights: 1e-2 for values of order 1."""
    groups = [[*range(p * group, (p + 1) * group)] for p in range(4)]
    how = dict(q_heads=16, heads=2, dim=128, dtype=torch.bfloat16, device="cuda")
    c = case([1500, 1203, 64, 700], groups, [30] * (4 * group), **how)
    torch.testing.assert_close(decode_attention_triton(**c).double().cpu(), truth(c, groups), rtol=1e-2, atol=1e-2)


# ---- the CPU split ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_cpu_split_against_sdpa(name, dtype):
    """Padded together and one prompt at a time; several tokens, rows of equal and of different ages."""
    lengths, groups, ragged, how = CASES[name]
    tolerance = {torch.float32: 3e-6, torch.float64: 1e-12}[dtype]
    for ages in (ragged, [3] * len(ragged)):
        c = case(lengths, groups, ages, dtype=dtype, **how)
        config = Config(how.get("q_heads", 4), how.get("heads", 2), how.get("dim", 16))
        pools = Pools(config, len(ages) + 3, len(c["prefix_k"]), c["prefix_k"].shape[2], 40, dtype, torch.device("cpu"))
        pools.prefix[0] = torch.stack([c["prefix_k"], c["prefix_v"]])
        pools.suffix[0] = torch.stack([c["suffix_k"], c["suffix_v"]])
        attend = DecodeAttention(pools, 8)
        attend.arrange(groups, lengths)
        assert attend.batched == (max(lengths) <= BATCHED)
        attend.begin(c["lengths"], max(ages), min(ages))
        out = attend(0, c["query"], c["key"], c["value"], c["scaling"])
        assert float((out.double() - truth(c, groups)).abs().max()) < tolerance
        for x, which in (("key", 0), ("value", 1)):
            for row, age in enumerate(ages):
                assert torch.equal(pools.suffix[0, which, row, :, age - 1], c[x][row])


def test_each_prompt_is_read_once_for_its_group(monkeypatch):
    """The queries that meet a prompt's keys are those of all its completions, in one call."""
    from pr1 import decode

    seen, flash = [], decode.flash_cpu

    def spy(q, k, v, *rest, **how):
        seen.append((tuple(q.shape), tuple(k.shape)))
        return flash(q, k, v, *rest, **how)

    monkeypatch.setattr(decode, "flash_cpu", spy)
    c = case([300, 70], [[0, 1, 2], [3]], [2, 2, 2, 2])
    pools = Pools(Config(), 4, 2, 300, 40, torch.float32, torch.device("cpu"))
    attend = DecodeAttention(pools, 3)
    attend.arrange([[0, 1, 2], [3]], [300, 70])
    attend.begin(c["lengths"], 2, 2)
    attend(0, c["query"], c["key"], c["value"], c["scaling"])
    own, first, second = seen
    assert own == ((4, 2, 2, 16), (4, 2, 2, 16))
    assert first == ((1, 2, 3 * 2, 16), (1, 2, 300, 16)) and second == ((1, 2, 2, 16), (1, 2, 70, 16))  # no padding
    assert math.prod(first[1]) + math.prod(second[1]) == 2 * 370 * 16
