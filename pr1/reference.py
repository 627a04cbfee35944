"""Log-probs of a pack's tokens under another set of weights, through the same packed path."""

from __future__ import annotations

from dataclasses import replace

import torch

from pr1.kernels import linear_token_logprobs
from pr1.records import Pack


@torch.no_grad()
def pack_logprobs(policy, pack: Pack, temperature: float) -> torch.Tensor:
    """(N,) log-probs of rows.tokens."""
    with policy.head() as weight:
        return linear_token_logprobs(policy.hidden(pack), weight, pack.rows.tokens, temperature)[0]


def with_reference(pack: Pack, reference, temperature: float) -> Pack:
    """The pack with rows.logp_ref of the frozen reference; unchanged without one."""
    if reference is None:
        return pack
    return replace(pack, rows=replace(pack.rows, logp_ref=pack_logprobs(reference, pack, temperature)))


def with_start(pack: Pack, policy, temperature: float) -> Pack:
    """The pack with rows.logp_start: the trainer's log-probs before the first of several updates on it."""
    return replace(pack, rows=replace(pack.rows, logp_start=pack_logprobs(policy, pack, temperature)))
