"""Completions from the training weights: each prompt prefilled once, all sequences decoded together.

The random number of a token is a function of (seed, step, prompt's index in the global step, completion, position), so
a completion does not depend on rank, batch, cache budget or neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from pr1.decode import token_bytes
from pr1.engine import Engine, pool_sizes
from pr1.kernels import Sampling
from pr1.kernels.sample import sequence_keys
from pr1.records import Prompt, Rollout, Sample

CACHE_MB = 8192


def generate(
    policy, samples: Sequence[Sample], group_size: int, sampling: Sampling, *, seed: int, step: int, first: int = 0,
    batch: int = 256, cache_mb: int = CACHE_MB, max_prompt_tokens: int | None = None,
    prompts: Sequence[Prompt] | None = None, on_batch=None,
) -> list[Rollout]:  # fmt: skip
    """P * group_size completions, group-major.

    first: index of samples[0] in the global step. batch: sequences decoded together at most. cache_mb: budget of their
    keys and values; max_prompt_tokens: length of a prompt's slot there (None: that of the longest). prompts: the
    samples already encoded. sampling.temperature 0 decodes greedily. on_batch(n) is
    called as n prompts are done. ValueError when the budget cannot hold the longest prompt and one completion.
    """
    if not len(samples):
        return []
    if prompts is None:
        prompts = [policy.family.encode(sample) for sample in samples]
    groups = [None] * len(prompts)
    for group in stream(
        policy, prompts, group_size, sampling, seed=seed, step=step, count=len(prompts), first=first, batch=batch,
        cache_mb=cache_mb, max_prompt_tokens=max_prompt_tokens or max(len(p.ids) for p in prompts),
    ):  # fmt: skip
        groups[group[0].prompt - first] = group
        if on_batch:
            on_batch(1)
    return [rollout for group in groups for rollout in group]


@torch.no_grad()
def stream(
    policy, prompts: Iterable[Prompt], group_size: int, sampling: Sampling, *, seed: int, step: int, count: int,
    max_prompt_tokens: int, first: int = 0, batch: int = 256, cache_mb: int = CACHE_MB,
) -> Iterator[list[Rollout]]:  # fmt: skip
    """The G rollouts of each prompt as soon as the last of them is done, in no fixed order of prompts.

    prompts are taken one after the other as there is room for them; count: how many there are. The rest as `generate`.
    """
    if count == 0:
        return
    family = policy.family
    sampling = replace(sampling, banned=family.banned_ids(policy.vocab_size).to(policy.device),
                       stop_ids=family.stop_ids)  # fmt: skip
    per_token = token_bytes(policy.text.config, policy.text.embed_tokens.weight.dtype)
    shape = (*pool_sizes(cache_mb, per_token, batch, group_size, count, max_prompt_tokens, sampling.max_new_tokens),
             max_prompt_tokens, sampling.max_new_tokens)  # fmt: skip
    if getattr(policy, "engine", None) is None or not policy.engine.serves(*shape):
        policy.engine = None  # its pools go before the new ones come
        policy.engine = Engine(policy, *shape)

    def streams(index, completions):
        return sequence_keys(seed, step, torch.tensor(first + index), completions)

    with policy.rollout_weights(), policy.head() as weight:
        yield from policy.engine.run(policy, weight, iter(prompts), group_size, sampling, streams, first)
