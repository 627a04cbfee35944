"""Rollouts -> packs: whole groups in one stream without padding, each prompt once, the shift done here and only here.

One group with prompt p0..p3 and completions a0..a2, b0..b1 (the last token of a completion predicts nothing and is not
in the stream):

    stream    p0 p1 p2 p3 | a0 a1 | b0
    position  0  1  2  3  | 4  5  | 4        completions restart at max(prompt position rows) + 1
    predicts           a0,  a1 a2   b1       p3 predicts the first token of every completion: rows a0 and b0
                       b0
    segment 0 q: p0..a1   k: p0..a1          plain causal
    segment 1 q: b0       k: p0..p3 b0       bottom-right causal

Groups fill packs by best fit, the longest first; a group longer than a pack is split, its prompt repeated:

    groups    aa 111   bb 22   cc 1111 222 33   dd 1            --pack-tokens 9; prompt letters, then completions
    packs     [aa 111 bb 22]   [cc 1111 222]   [cc 33 dd 1]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numba
import numpy as np
import torch

from pr1.kernels import Rows
from pr1.records import Pack, Prompt, Rollout, Segments


@dataclass(frozen=True)
class Normaliser:
    """What a token's loss is divided by; counted over all packs and ranks of one optimizer step, flat groups included."""

    aggregation: str  # token-mean | sequence-mean | constant
    tokens: float  # loss tokens
    sequences: float  # completions
    max_length: int  # max_new_tokens, for "constant" (Dr.GRPO)

    def weight(self, length: int) -> float:
        """Weight of each of the `length` loss tokens of one completion."""
        if self.aggregation == "token-mean":
            return 1.0 / self.tokens
        return 1.0 / (self.sequences * (length if self.aggregation == "sequence-mean" else self.max_length))


def count(rollouts: Sequence[Rollout]) -> list[float]:
    """[loss tokens, completions]: what ranks add up to make a Normaliser."""
    return [float(sum(int(r.loss_mask.sum()) for r in rollouts)), float(len(rollouts))]


def pack(
    rollouts: Sequence[Rollout],
    advantages: np.ndarray,
    pack_tokens: int,
    normaliser: Normaliser,
    *,
    drop_flat: bool,
    share_prefix: bool = True,
) -> list[Pack]:
    """Packs one rank's rollouts (group-major; advantages (P, G) in the same order).

    Best fit, longest first; ties and the order inside and among packs follow the rollouts' order. A pack holds at most
    `pack_tokens` stream tokens unless one completion with its prompt alone is longer; a group longer than that is split
    by completions, its prompt repeated. drop_flat leaves out rows whose advantage is 0 (right only when KL and entropy
    coefficients are 0). Rows with loss_mask False are never loss rows.
    share_prefix=False gives every completion its own prompt: the plain packed path of tests and benchmarks.
    """
    flat = np.asarray(advantages, np.float64).reshape(-1)
    if len(flat) != len(rollouts):
        raise ValueError(f"{len(rollouts)} rollouts but {len(flat)} advantages")
    parts = []  # completions that share one copy of their prompt, with their stream length
    pairs = [(r, float(a)) for r, a in zip(rollouts, flat) if is_live(r, a, drop_flat)]
    for _, group in groupby(pairs, lambda pair: pair[0].prompt if share_prefix else id(pair[0])):
        group = list(group)
        prompt, lengths = len(group[0][0].prompt_ids), np.array([stream_tokens(r) for r, _ in group])
        if prompt + lengths.sum() <= pack_tokens:
            parts.append((group, prompt + lengths.sum()))
            continue
        for members in _bins(lengths, pack_tokens - prompt):
            parts.append(([group[i] for i in members], prompt + lengths[members].sum()))
    bins = _bins(np.array([length for _, length in parts], np.int64), pack_tokens)
    return [_build([parts[i][0] for i in members], normaliser) for members in bins]


def is_live(rollout: Rollout, advantage: float, drop_flat: bool) -> bool:
    """Whether the completion has loss rows."""
    return bool(rollout.loss_mask.any()) and not (drop_flat and advantage == 0)


def stream_tokens(rollout: Rollout) -> int:
    """Tokens of the completion in the stream: all but the last, which predicts nothing."""
    return max(0, len(rollout.completion_ids) - 1)


def _bins(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Indices of each bin, ascending, bins in order of their first."""
    numbers = best_fit(np.argsort(-lengths, kind="stable"), lengths, capacity)
    _, first = np.unique(numbers, return_index=True)
    return [np.flatnonzero(numbers == numbers[i]) for i in np.sort(first)]


@numba.njit("int64[:](int64[:], int64[:], int64)", cache=True)
def best_fit(order, lengths, capacity):
    """Best-fit packing. order (n,) int64: in which the items are placed; lengths (n,) int64. Each item goes into the
    fullest bin that has room for it; one longer than `capacity` gets a bin of its own. Returns bin numbers (n,)."""
    room, bins = np.empty(len(order), np.int64), np.empty(len(order), np.int64)
    used = 0
    for i in order:
        best = -1
        for b in range(used):
            if room[b] >= lengths[i] and (best < 0 or room[b] < room[best]):
                best = b
        if best < 0:
            best = used
            room[best] = capacity
            used += 1
        room[best] -= lengths[i]
        bins[i] = best
    return bins


def _build(parts, normaliser: Normaliser) -> Pack:
    ids, positions, images, image_rows, rows, index = [], [], [], [], [], []
    cu_q, cu_k, kv, start, sequence = [0], [0], [], 0, 0
    for part in parts:
        prompt: Prompt = part[0][0].inputs
        ids.append(prompt.ids)
        positions.append(prompt.position_ids)
        images.extend(prompt.images)
        image_rows.append(start + prompt.image_rows)
        prompt_rows = torch.arange(start, start + len(prompt.ids))
        start += len(prompt.ids)
        opened = False  # segment 0 of a part is the prompt with its first completion
        for rollout, advantage in part:
            n = len(rollout.completion_ids) - 1
            own = torch.arange(start, start + n)
            ids.append(rollout.completion_ids[:-1])
            positions.append((prompt.next_position + torch.arange(n)).expand(3, n))
            if n or not opened:
                kv.append(torch.cat([prompt_rows, own]))
                cu_q.append(start + n)
                cu_k.append(cu_k[-1] + len(kv[-1]))
                opened = True
            start += n
            predicts = torch.cat([prompt_rows[-1:], own])  # (C,)
            index.append(predicts[rollout.loss_mask])
            rows.append(_rows(rollout, advantage, normaliser, sequence))
            sequence += 1
    q, k = np.diff(cu_q), np.diff(cu_k)
    segments = Segments(torch.tensor(cu_q, dtype=torch.int32), torch.tensor(cu_k, dtype=torch.int32), torch.cat(kv),
                        int(q.max()), int(k.max()))  # fmt: skip
    joined = [torch.cat(column) for column in zip(*rows)]
    return Pack(torch.cat(ids), torch.cat(positions, 1), segments, torch.cat(index),
                Rows(*joined[:5], log_kept=joined[5]), tuple(images), torch.cat(image_rows))  # fmt: skip


def _rows(rollout: Rollout, advantage: float, normaliser: Normaliser, sequence: int) -> tuple[torch.Tensor, ...]:
    mask = rollout.loss_mask
    n = int(mask.sum())
    return (rollout.completion_ids[mask], torch.full((n,), advantage), torch.full((n,), normaliser.weight(n)),
            rollout.logp_rollout[mask], torch.full((n,), sequence, dtype=torch.int64),
            rollout.log_kept[mask])  # fmt: skip


def to_device(pack: Pack, device) -> Pack:
    """The pack with every tensor on the device; pixels stay where they are until a tower needs them."""
    if torch.device(device).type == "cpu":
        return pack
    seg = pack.segments
    segments = Segments(*(x.to(device, non_blocking=True) for x in (seg.cu_q, seg.cu_k, seg.kv_index)), seg.max_q,
                        seg.max_k)  # fmt: skip
    return Pack(pack.ids.to(device), pack.position_ids.to(device), segments, pack.row_index.to(device),
                pack.rows.to(device), pack.images, pack.image_rows.to(device))  # fmt: skip
