"""What a step reports: global means over all ranks, one host-device sync at its end."""

from __future__ import annotations

import contextlib
import time

import numpy as np
import torch


class Clock:
    """Seconds of a step by stage: `with clock("rollout"): ...`."""

    def __init__(self):
        self.start, self.stages = time.perf_counter(), {}

    @contextlib.contextmanager
    def __call__(self, stage: str):
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.stages[stage] = self.stages.get(stage, 0.0) + time.perf_counter() - begun

    def metrics(self, tokens: float) -> dict[str, float]:
        """seconds, seconds/<stage> of this rank, tokens_per_second (completion tokens of the step over its seconds)."""
        total = time.perf_counter() - self.start
        stages = {f"seconds/{stage}": seconds for stage, seconds in self.stages.items()}
        return {"seconds": total, **stages, "tokens_per_second": tokens / total}


def rollout_metrics(batch, world) -> dict[str, float]:
    """reward, reward/<part>, reward_std (mean over groups, n-1), entropy of the sampler, completion_tokens, truncated,
    flat_groups (share of the groups drawn)."""
    names = world.gather(sorted(batch.parts))
    names = max(names, key=len)  # a rank without prompts knows no parts
    lengths = [len(r.completion_ids) for r in batch.rollouts]
    sums = world.sum([
        len(batch.rollouts), len(batch.rewards), batch.drawn, batch.flat, batch.rewards.sum(),
        batch.rewards.std(1, ddof=1).sum() if len(batch.rewards) else 0.0,
        sum(lengths), sum(not r.finished for r in batch.rollouts),
        sum(float(r.entropy.double().sum()) for r in batch.rollouts),
        *(float(np.sum(batch.parts[name], dtype=np.float64)) if batch.parts else 0.0 for name in names),
    ])  # fmt: skip
    n, groups, drawn, flat, reward, std, tokens, cut, entropy, *parts = sums
    return {
        "reward": reward / n, **{f"reward/{name}": part / n for name, part in zip(names, parts)},
        "reward_std": std / groups, "entropy": entropy / max(1.0, tokens), "completion_tokens": tokens / n,
        "truncated": cut / n, "flat_groups": flat / drawn,
    }  # fmt: skip


def loss_metrics(updates: list, world) -> dict[str, float]:
    """kl (mean k3 over loss tokens), clipped (share of tokens), logp_gap and logp_gap_max (|trainer - sampler| before the
    first update), grad_norm (largest of the batch's updates).

    updates: per optimizer step ([(rows, stats) of each pack], grad_norm); kl and clipped are of the last step.
    """
    first, last = updates[0][0], updates[-1][0]
    gap = [(stats.logp - rows.logp_rollout).abs().double() for rows, stats in first]
    sums = [torch.stack([g.sum(), g.new_tensor(len(g)), s.kl.double().sum(), s.clipped.double().sum()])
            for g, (_, s) in zip(gap, last)]  # fmt: skip
    local = torch.stack(sums).sum(0).tolist() if sums else [0.0] * 4  # sync
    largest = max((float(g.max()) for g in gap if len(g)), default=0.0)
    gap_sum, n, kl, clipped = world.sum(local)
    n = max(1.0, n)
    return {"kl": kl / n, "clipped": clipped / n, "logp_gap": gap_sum / n, "logp_gap_max": world.max([largest])[0],
            "grad_norm": max(norm for _, norm in updates)}  # fmt: skip
