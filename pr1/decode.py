"""Keys and values while completions are written, and attention over them.

Prompts are written once into slots of the prefix pool, the tokens of completion row b into slot b of the suffix pool.
A new token sees its prompt and its own completion: the prompt is read once for all completions of the group, the two
parts are joined by their log-sum-exp (Juravsky et al. 2024, "Hydragen", section 3.1).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from pr1.attention import PackedAttention
from pr1.kernels.decode_attention import decode_attention
from pr1.records import Segments

BATCHED = 256  # CPU: prompts up to this length are padded to one another and run as one call, longer ones one by one
flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the public name keeps the log-sum-exp back


class Pools:
    """Static storage of keys and values: live prompts take slots 0..p-1, live completions slots 0..n-1."""

    def __init__(self, text_config, rows: int, prompts: int, prompt_tokens: int, new_tokens: int, dtype, device):
        c = text_config
        heads, dim = c.num_key_value_heads, c.hidden_size // c.num_attention_heads
        self.rows, self.prompts, self.prompt_tokens, self.new_tokens = rows, prompts, prompt_tokens, new_tokens
        layers = c.num_hidden_layers
        self.prefix = _zeros((layers, 2, prompts, heads, prompt_tokens, dim), dtype, device)
        self.suffix = _zeros((layers, 2, rows, heads, new_tokens, dim), dtype, device)

    def move_prompts(self, to: list[int], source: list[int], tokens: int) -> None:
        self.prefix[:, :, to, :, :tokens] = self.prefix[:, :, source, :, :tokens]

    def move_rows(self, to: list[int], source: list[int], tokens: int) -> None:
        self.suffix[:, :, to, :, :tokens] = self.suffix[:, :, source, :, :tokens]


def token_bytes(text_config, dtype) -> int:
    """Bytes of one token's keys and values in all layers."""
    c = text_config
    per_layer = 2 * c.num_key_value_heads * (c.hidden_size // c.num_attention_heads)
    return c.num_hidden_layers * per_layer * torch.empty((), dtype=dtype).element_size()


class PrefillAttention(PackedAttention):
    """Prompts side by side; the keys and values of prompt i go into slot slots[i] of the prefix pool. The bounds in
    `segments` may be on the CPU: they are read here."""

    def __init__(self, segments: Segments, pools: Pools, slots: list[int]):
        bounds, device = segments.cu_q.tolist(), pools.prefix.device
        super().__init__(replace(segments, cu_q=segments.cu_q.to(device), cu_k=segments.cu_k.to(device)))
        self.pools, self.places = pools, list(zip(slots, bounds, bounds[1:]))

    def __call__(self, layer, query, key, value, scaling):
        for slot, start, end in self.places:
            for which, x in enumerate((key, value)):
                self.pools.prefix[layer, which, slot, :, : end - start] = x[:, start:end]
        return super().__call__(layer, query, key, value, scaling)


class DecodeAttention:
    """One query per live completion.

    members[p] lists the rows that continue prompt slot p. `arrange` is called when members change, `begin` before the
    layers of each token.
    """

    def __init__(self, pools: Pools, group_size: int):
        self.pools = pools
        device = pools.prefix.device
        self.on_cpu = device.type == "cpu"
        if not self.on_cpu:  # static: captured graphs read these
            width = min(group_size, pools.rows)
            self.members = torch.full((pools.prompts, width), -1, dtype=torch.int32, device=device)
            self.prefix_lengths = torch.zeros(pools.prompts, dtype=torch.int32, device=device)

    def arrange(self, members: list[list[int]], lengths: list[int]) -> None:
        """members, lengths: of prompt slots 0..p-1."""
        if self.on_cpu:
            self._arrange_cpu(members, lengths)
            return
        width = self.members.shape[1]
        table = torch.full(self.members.shape, -1, dtype=torch.int32)
        for p, rows in enumerate(members):
            table[p, : len(rows)] = torch.tensor(rows[:width], dtype=torch.int32)
        self.members.copy_(table)
        padded = torch.zeros(self.pools.prompts, dtype=torch.int32)
        padded[: len(lengths)] = torch.tensor(lengths, dtype=torch.int32)
        self.prefix_lengths.copy_(padded)

    def begin(self, lengths: torch.Tensor, longest: int, shortest: int) -> None:
        """lengths (B,) int64: tokens of each completion, the one now fed included; on a GPU the other two are unused
        (shapes are those of the pool)."""
        self.lengths = lengths
        if not self.on_cpu:
            return
        self.longest, self.suffix_mask = longest, None
        self.rows, self.at = slice(len(lengths)), longest - 1  # a plain copy, a third of the time of an indexed one
        if shortest < longest:
            self.rows, self.at = torch.arange(len(lengths)), lengths - 1
            outside = torch.arange(longest) >= lengths[:, None]
            self.suffix_mask = _minus_infinity(outside, self.pools.suffix.dtype)[:, None, None]  # (B, 1, 1, t)

    def __call__(self, layer: int, query, key, value, scaling) -> torch.Tensor:
        """query (B, Hq, D), key and value (B, Hk, D) of the new tokens -> (B, Hq, D). The keys and values are kept."""
        prefix, suffix = self.pools.prefix[layer], self.pools.suffix[layer]
        if not self.on_cpu:
            return decode_attention(query, key, value, prefix[0], prefix[1], self.prefix_lengths, self.members,
                                    suffix[0], suffix[1], self.lengths, scaling)  # fmt: skip
        suffix[0, self.rows, :, self.at] = key
        suffix[1, self.rows, :, self.at] = value
        batch, q_heads, dim = query.shape
        heads = key.shape[1]
        k, v = suffix[:, :batch, :, : self.longest]
        single = query.reshape(batch, heads, q_heads // heads, dim)
        own, own_lse = flash_cpu(single, k, v, 0.0, False, attn_mask=self.suffix_mask, scale=scaling)
        shared, shared_lse = self._on_prefix(prefix, query.reshape(batch * q_heads, dim), scaling)
        # flash_cpu lays its results out as (B, rep, Hk, D); so are the rows of `shared`
        own, own_lse = own.transpose(1, 2), own_lse.transpose(1, 2)
        share = torch.sigmoid(shared_lse.view(own_lse.shape) - own_lse).to(own.dtype)
        joint = torch.lerp(own, shared.view(own.shape), share[..., None])
        return joint.transpose(1, 2).reshape(batch, q_heads, dim)

    # ---- the prompt's part on a CPU ------------------------------------------------------------------------------

    def _arrange_cpu(self, members, lengths) -> None:
        self.groups, self.prefix_lengths, self.index = members, lengths, None
        self.batched = max(lengths) <= BATCHED
        self.prefix_longest = max(lengths)
        self.prefix_mask = None
        if self.batched and min(lengths) < self.prefix_longest:
            outside = torch.arange(self.prefix_longest) >= torch.tensor(lengths)[:, None]
            self.prefix_mask = _minus_infinity(outside, self.pools.prefix.dtype)[:, None, None]  # (P, 1, 1, Lmax)

    def _make_index(self, q_heads: int, heads: int) -> None:
        """Where the query rows of (B, Hq) go in group order, and where the results come from.

        Batched: (P, Hk, Gmax * rep), a missing sibling's place taken by row 0. One by one: groups behind one another.
        """
        repeat, width = q_heads // heads, max(map(len, self.groups))
        table = torch.tensor([rows + [-1] * (width - len(rows)) for rows in self.groups])  # (P, Gmax)
        live, h, r = table >= 0, torch.arange(heads), torch.arange(repeat)
        index = table.clamp_min(0)[:, None, :, None] * q_heads + h[:, None, None] * repeat + r  # (P, Hk, Gmax, rep)
        place = live.flatten().nonzero()[:, 0]
        if not self.batched:
            index, place = index[live[:, None, :, None].expand_as(index)], torch.arange(len(place))
        back = torch.empty(len(place), repeat, heads, dtype=torch.int64)
        back[table[live]] = (place[:, None, None] * repeat + r[:, None]) * heads + h  # results stand as (G, rep, Hk)
        self.index, self.back = index.flatten(), back.flatten()

    def _on_prefix(self, prefix, query, scaling):
        """query (B * Hq, D) -> outputs (B * rep * Hk, D) and their log-sum-exp (B * rep * Hk,)."""
        heads, dim = prefix.shape[2], query.shape[1]
        q_heads = len(query) // sum(map(len, self.groups))
        if self.index is None:
            self._make_index(q_heads, heads)
        query = query.index_select(0, self.index)
        if self.batched:
            p = len(self.groups)
            k, v = prefix[:, :p, :, : self.prefix_longest]
            out, lse = flash_cpu(query.view(p, heads, -1, dim), k, v, 0.0, False, attn_mask=self.prefix_mask,
                                 scale=scaling)  # fmt: skip
            out, lse = out.transpose(1, 2).reshape(-1, dim), lse.transpose(1, 2).reshape(-1)
        else:
            parts = query.split([len(rows) * q_heads for rows in self.groups])
            results = [
                flash_cpu(q.view(1, heads, -1, dim), prefix[:1, p, :, :length], prefix[1:, p, :, :length], 0.0, False,
                          scale=scaling)
                for p, (q, length) in enumerate(zip(parts, self.prefix_lengths)) if len(q)
            ]  # fmt: skip
            out = torch.cat([o.transpose(1, 2).reshape(-1, dim) for o, _ in results])
            lse = torch.cat([each.transpose(1, 2).reshape(-1) for _, each in results])
        return out.index_select(0, self.back), lse.index_select(0, self.back)


def _zeros(shape: tuple[int, ...], dtype, device) -> torch.Tensor:
    """Zeros (what a mask leaves out must still be finite); on a CPU memory is taken when it is first written to."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    width = torch.empty((), dtype=dtype).element_size()
    return torch.from_numpy(np.zeros((*shape[:-1], shape[-1] * width), np.uint8)).view(dtype)


def _minus_infinity(where: torch.Tensor, dtype) -> torch.Tensor:
    return torch.zeros(where.shape, dtype=dtype).masked_fill_(where, float("-inf"))
