"""GRPO for visual perception, one file that reads as the algorithm.

    torchrun pr1/train.py --task det                                    a tiny policy on rendered scenes
    torchrun --nproc_per_node 8 pr1/train.py --task det --model Qwen/Qwen2.5-VL-3B-Instruct \\
        --data instances_train2017.json --images train2017 --eval-data instances_val2017.json --eval-images val2017

sample -> rollout -> reward -> advantage -> pack -> policy -> loss -> step; each stage is a file of that name.
"""

from __future__ import annotations

import math
import sys

from pr1.advantage import group_advantages
from pr1.balance import balance
from pr1.collect import collect
from pr1.config import Config
from pr1.kernels import Objective, linear_grpo_loss
from pr1.metrics import Clock, loss_metrics, rollout_metrics
from pr1.packing import Normaliser, count, pack, to_device
from pr1.reference import with_reference, with_start
from pr1.session import Session, run_program


def make_objective(cfg: Config) -> Objective:
    return Objective(loss=cfg.loss, ratio=cfg.ratio, clip_low=cfg.clip_low, clip_high=cfg.clip_high,
                     dual_clip=cfg.dual_clip, sapo_tau_pos=cfg.sapo_tau_pos, sapo_tau_neg=cfg.sapo_tau_neg,
                     kl_coef=cfg.kl_coef, kl=cfg.kl, entropy_coef=cfg.entropy_coef, rollout_cap=cfg.rollout_cap,
                     temperature=cfg.temperature)  # fmt: skip


def train(run: Session) -> None:
    cfg, world, policy, optimizer = run.cfg, run.world, run.policy, run.optimizer
    objective = make_objective(cfg)
    drop_flat = cfg.kl_coef == 0 and cfg.entropy_coef == 0  # then a row of advantage 0 has no gradient
    for step in range(run.start, cfg.steps):
        if run.evaluate_due(step):
            run.evaluate(step)
        clock = Clock()
        batch = collect(run, step, clock)  # draw, roll out, reward: this rank's groups
        with clock("pack"):
            advantages = group_advantages(batch.rewards, cfg.advantage_scale)  # (P, G)
            tokens, sequences = world.sum(count(batch.rollouts))  # over every pack and rank, before any backward
            normaliser = Normaliser(cfg.aggregation, tokens, sequences, cfg.max_new_tokens)
            rollouts, advantages = balance(batch.rollouts, advantages, world, policy.costs, drop_flat=drop_flat)
            packs = pack(rollouts, advantages, cfg.pack_tokens, normaliser, drop_flat=drop_flat)
            packs = [to_device(p, policy.device) for p in packs]
        with clock("reference"):
            packs = [with_reference(p, run.reference, cfg.temperature) for p in packs]
            if cfg.updates_per_batch > 1:
                packs = [with_start(p, policy, cfg.temperature) for p in packs]
        updates = []
        with clock("update"):
            for _ in range(cfg.updates_per_batch):
                stats = []
                for p in packs:  # ranks may hold different numbers of packs, or none
                    with policy.head() as weight:
                        loss, row_stats = linear_grpo_loss(policy.hidden(p), weight, p.rows, objective)
                        loss.backward()
                    stats.append((p.rows, row_stats))
                optimizer.sum_gradients(world)  # once, after the last backward
                grad_norm = optimizer.clip()  # sync
                check_finite(step, grad_norm)
                lr = optimizer.step(step)
                updates.append((stats, grad_norm))
        run.log(
            step, {**rollout_metrics(batch, world), **loss_metrics(updates, world), "lr": lr, **clock.metrics(tokens)}
        )
        if run.save_due(step + 1):
            run.save(step + 1)
    run.close()


def check_finite(step: int, grad_norm: float) -> None:
    """Raises FloatingPointError before a broken gradient touches the weights."""
    if not math.isfinite(grad_norm):
        raise FloatingPointError(
            f"step {step}: the gradient norm is {grad_norm}; stopping before the weights are touched. "
            "The checkpoints are whole: --resume continues from the newest, a lower --lr may help"
        )


def main(argv: list[str] | None = None) -> int:
    return run_program(sys.argv[1:] if argv is None else argv, "train.py", __doc__.splitlines()[0], train)


if __name__ == "__main__":
    sys.exit(main())
