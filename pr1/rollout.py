"""Completions from the training weights: each prompt prefilled once, all sequences decoded together.

The random number of a token is a function of (seed, step, prompt's index in the global step, completion, position), so
a completion does not depend on rank, batch or neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from pr1.attention import DecodeAttention, PrefillAttention
from pr1.kernels import Sampling, sample_tokens, token_keys
from pr1.records import Prompt, Rollout, Sample, Segments


@dataclass
class _Trace:
    """What has been drawn so far; every tensor is (B, max_new)."""

    tokens: torch.Tensor
    logp: torch.Tensor
    log_kept: torch.Tensor
    entropy: torch.Tensor
    length: torch.Tensor  # (B,)
    finished: torch.Tensor  # (B,) bool


def generate(
    policy, samples: Sequence[Sample], group_size: int, sampling: Sampling, *, seed: int, step: int, first: int = 0,
    batch: int = 256, prompts: Sequence[Prompt] | None = None, on_batch=None,
) -> list[Rollout]:  # fmt: skip
    """P * group_size completions, group-major.

    first: index of samples[0] in the global step. batch: sequences decoded together, whole groups. prompts: the samples
    already encoded. sampling.temperature 0 decodes greedily. on_batch(n) is called as n prompts are done.
    """
    sampling = replace(sampling, banned=policy.family.banned_ids(policy.vocab_size).to(policy.device),
                       stop_ids=policy.family.stop_ids)  # fmt: skip
    rollouts = []
    per_batch = max(1, batch // group_size)
    for start in range(0, len(samples), per_batch):
        chunk = samples[start : start + per_batch]
        encoded = prompts[start : start + per_batch] if prompts is not None else [
            policy.family.encode(sample) for sample in chunk
        ]  # fmt: skip
        rollouts += _batch(policy, encoded, group_size, sampling, seed, step, first + start)
        if on_batch:
            on_batch(len(chunk))
    return rollouts


@torch.no_grad()
def _batch(policy, prompts, group_size, sampling, seed, step, first) -> list[Rollout]:
    with policy.rollout_weights(), policy.head() as weight:
        logits, attend = _prefill(policy, prompts, weight, group_size)
        trace = _decode(policy, prompts, weight, logits, attend, sampling, (seed, step, first), group_size)
    return list(_rollouts(policy.family, prompts, trace, sampling, first, group_size))


def _prefill(policy, prompts, weight, group_size):
    """First logits (P*G, V) and the attention that continues from the prompts."""
    lengths = torch.tensor([len(p.ids) for p in prompts])
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    rows = torch.arange(int(cu[-1]), device=policy.device)
    longest = int(lengths.max())
    attend = PrefillAttention(Segments(cu.int(), cu.int(), rows, longest, longest))
    ids = torch.cat([p.ids for p in prompts]).to(policy.device)
    positions = torch.cat([p.position_ids for p in prompts], 1).to(policy.device)
    features = policy.features([image for p in prompts for image in p.images])
    hidden = policy.run(ids, positions, features, attend)  # (T, H)
    last = hidden[(cu[1:] - 1).to(policy.device)] @ weight.T  # (P, V)
    return last.repeat_interleave(group_size, 0), DecodeAttention(attend, group_size)


def _decode(policy, prompts, weight, logits, attend, sampling, counter, group_size) -> _Trace:
    seed, step, first = counter
    device, n, top = policy.device, len(prompts) * group_size, sampling.max_new_tokens
    trace = _Trace(torch.zeros(n, top, dtype=torch.int64, device=device),
                   *(torch.zeros(n, top, device=device) for _ in range(3)),
                   torch.full((n,), top, dtype=torch.int64, device=device),
                   torch.zeros(n, dtype=torch.bool, device=device))  # fmt: skip
    stops = torch.tensor(sampling.stop_ids, device=device)
    live = torch.arange(n, device=device)  # the rows of `trace` still being decoded, whole groups
    prompt, completion = live // group_size, live % group_size
    positions = torch.tensor([p.next_position for p in prompts], device=device).repeat_interleave(group_size)
    for t in range(top):
        keys = token_keys(seed, step, first + prompt, completion, torch.full_like(prompt, t))
        forbid = torch.ones_like(live, dtype=torch.bool) if t < sampling.min_new_tokens else None
        token, *numbers = sample_tokens(logits, keys, sampling, forbid_stop=forbid)
        trace.tokens[live, t] = token
        for column, values in zip((trace.logp, trace.entropy, trace.log_kept), numbers):
            column[live, t] = values.float()
        stopped = torch.isin(token, stops) & ~trace.finished[live]
        trace.length[live[stopped]] = t + 1
        trace.finished[live[stopped]] = True
        open_groups = ~trace.finished[live].view(-1, group_size).all(1)
        if t + 1 == top or not open_groups.any():
            break
        if not open_groups.all():
            attend.keep(open_groups.nonzero()[:, 0])
            kept = open_groups.repeat_interleave(group_size)
            live, prompt, completion, positions, token = (
                x[kept] for x in (live, prompt, completion, positions, token)
            )  # fmt: skip
        where = (positions + t).expand(3, -1)
        attend.advance()
        hidden = policy.run(token, where, [], attend)
        logits = hidden @ weight.T
    return trace


def _rollouts(family, prompts, trace: _Trace, sampling, first, group_size) -> Iterator[Rollout]:
    cpu = [x.cpu() for x in (trace.tokens, trace.logp.float(), trace.log_kept.float(), trace.entropy.float())]
    lengths, finished = trace.length.tolist(), trace.finished.tolist()
    for row, length in enumerate(lengths):
        tokens, logp, log_kept, entropy = (x[row, :length].clone() for x in cpu)
        text_ids = tokens[:-1] if finished[row] else tokens
        yield Rollout(
            prompt=first + row // group_size, completion=row % group_size, inputs=prompts[row // group_size],
            completion_ids=tokens, loss_mask=torch.ones(length, dtype=torch.bool), logp_rollout=logp,
            log_kept=log_kept, entropy=entropy, text=family.decode(text_ids), finished=finished[row],
        )  # fmt: skip
