"""Whole groups move from ranks with much work to ranks with little, before packing.

Groups live where they were generated, in equal numbers; what the update costs differs: flat groups leave it, answers
and prompts have any length, a refill may leave a rank without groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pr1.packing import is_live, stream_tokens
from pr1.records import Rollout

WORTH = 0.05  # of the mean load: a move by which the larger of two loads falls less is not made


@dataclass(frozen=True)
class Costs:
    """FLOPs in units of one token through the trunk."""

    pair: float  # one query attending to one key, in all layers
    image: float  # the vision tower per image token; 0 when it is frozen


def group_cost(group: Sequence[tuple[Rollout, float]], costs: Costs, drop_flat: bool) -> float:
    """Cost of a group's update, (rollout, advantage) each: tokens and attention pairs with the prompt shared."""
    lengths = np.array([stream_tokens(r) for r, a in group if is_live(r, a, drop_flat)], np.float64)
    if not len(lengths):
        return 0.0
    prompt, image = len(group[0][0].prompt_ids), len(group[0][0].inputs.image_rows)
    pairs = prompt * (prompt + 1) / 2 + (lengths * (prompt + (lengths + 1) / 2)).sum()
    return prompt + lengths.sum() + costs.pair * pairs + costs.image * image


def assign(cost: np.ndarray, owner: np.ndarray, size: int) -> np.ndarray:
    """cost (n,) float64 and owner (n,) int64, the rank of every group -> new owners (n,). As long as it pays, the most
    loaded rank gives the least loaded one the group nearest to half their difference; ties: the first rank and group."""
    owner, load = owner.copy(), np.bincount(owner, cost, size)
    least = WORTH * load.mean()
    while True:
        heavy, light = load.argmax(), load.argmin()
        relief = np.minimum(cost, load[heavy] - load[light] - cost)  # by so much the larger of the two loads falls
        relief[owner != heavy] = -np.inf
        if not len(cost) or relief.max() <= least:
            return owner
        moved = relief.argmax()
        owner[moved] = light
        load[heavy] -= cost[moved]
        load[light] += cost[moved]


def balance(rollouts: Sequence[Rollout], advantages: np.ndarray, world, costs: Costs, *, drop_flat: bool):
    """This rank's rollouts (group-major) and their advantages (P, G) after groups have moved; all ranks call it together.
    Groups stay in order of their prompts. With one rank, or when nothing is worth moving, they are what they were."""
    if world.size == 1:
        return rollouts, advantages
    n = advantages.shape[1]
    groups = [(rollouts[p * n : (p + 1) * n], advantages[p]) for p in range(len(advantages))]
    every = world.gather([group_cost(list(zip(*group)), costs, drop_flat) for group in groups])
    owner = np.repeat(np.arange(world.size), [len(each) for each in every])
    target = assign(np.array([c for each in every for c in each], np.float64), owner, world.size)
    if (target == owner).all():
        return rollouts, advantages
    mine = target[owner == world.rank]
    sent = [
        [g for g, to in zip(groups, mine) if to == rank] if rank != world.rank else [] for rank in range(world.size)
    ]
    kept = [g for g, to in zip(groups, mine) if to == world.rank]
    kept += [group for each in world.exchange(sent) for group in each]
    kept.sort(key=lambda group: group[0][0].prompt)
    return [r for group, _ in kept for r in group], np.array([a for _, a in kept]).reshape(-1, n)
