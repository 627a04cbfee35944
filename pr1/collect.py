"""The data side of a step: draw prompts, roll out, reward, and draw again for groups that carry no signal."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pr1.advantage import flat_groups
from pr1.kernels import Sampling
from pr1.records import Rollout, Sample
from pr1.rollout import generate


@dataclass(frozen=True)
class Batch:
    """One rank's groups of a step. P is this rank's share here."""

    samples: list[Sample]  # P
    rollouts: list[Rollout]  # P*G, group-major
    rewards: np.ndarray  # (P, G) float64
    parts: dict[str, np.ndarray]  # name -> (P, G)
    drawn: int  # prompts drawn on this rank, refills included
    flat: int  # of these, groups whose rewards were all equal


def collect(run, step: int, clock) -> Batch:
    """This rank's share of P groups, at most `max_refill` rounds of drawing.

    Every round draws as many prompts as live groups are still missing. What is kept: every live group, and the flat
    ones of the last round, which make up the number exactly. The choice depends on no rank's share.
    """
    cfg, world, task = run.cfg, run.world, run.task
    sampling = Sampling(temperature=cfg.temperature, top_p=cfg.top_p, top_k=cfg.top_k,
                        min_new_tokens=cfg.min_new_tokens, max_new_tokens=cfg.max_new_tokens)  # fmt: skip
    kept, live, first, drawn, flat = [], 0, 0, 0, 0
    for round_ in range(cfg.max_refill):
        missing = cfg.prompts_per_step - live
        indices = run.sampler.draw(missing)  # the same on every rank
        share = world.share(missing)
        with clock("data"):
            samples = [task.build(run.records[indices[i]], run.family) for i in share]
            prompts = [run.family.encode(sample) for sample in samples]
        with clock("rollout"):
            rollouts = generate(run.policy, samples, cfg.group_size, sampling, seed=cfg.seed, step=step,
                                first=first + share.start, batch=cfg.rollout_batch, prompts=prompts,
                                cache_mb=cfg.rollout_cache_mb, max_prompt_tokens=cfg.max_prompt_tokens)  # fmt: skip
        with clock("reward"):
            groups = _score(task, samples, rollouts, cfg.group_size, step / max(1, cfg.steps))
        is_flat = [bool(flat_groups(rewards[None])[0]) for _, _, rewards, _ in groups]
        last = round_ + 1 == cfg.max_refill
        live += int(world.sum([len(groups) - sum(is_flat)])[0]) if not last else 0
        kept = [g for g in kept if not g[0]] + [(f, group) for f, group in zip(is_flat, groups)]
        drawn, flat, first = drawn + len(groups), flat + sum(is_flat), first + missing
        if live == cfg.prompts_per_step:
            break
    kept = [group for _, group in kept]
    names = kept[0][3].keys() if kept else ()
    return Batch(
        samples=[g[0] for g in kept],
        rollouts=[r for g in kept for r in g[1]],
        rewards=np.array([g[2] for g in kept], np.float64).reshape(-1, cfg.group_size),
        parts={name: np.array([g[3][name] for g in kept]) for name in names},
        drawn=drawn, flat=flat,
    )  # fmt: skip


def _score(task, samples, rollouts, group_size, progress):
    """[(sample, its G rollouts, rewards (G,), {part: (G,)})]"""
    texts = [[r.text for r in rollouts[p * group_size : (p + 1) * group_size]] for p in range(len(samples))]
    if not samples:
        return []
    rewards, parts = task.reward(texts, samples, progress=progress)
    return [
        (sample, rollouts[p * group_size : (p + 1) * group_size], np.asarray(rewards[p], np.float64),
         {name: values[p] for name, values in parts.items()})
        for p, sample in enumerate(samples)
    ]  # fmt: skip
