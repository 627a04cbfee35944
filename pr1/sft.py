"""Supervised warm start on the same samples, prompts and packs as train.py: mean negative log-likelihood per token.

torchrun pr1/sft.py --task det --steps 500 --lr 1e-3
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from pr1.kernels import linear_token_logprobs
from pr1.metrics import Clock
from pr1.packing import Normaliser, count, pack, to_device
from pr1.records import Rollout
from pr1.session import Session, run_program


def as_rollout(sample, prompt, answer_ids: torch.Tensor, index: int, text: str) -> Rollout:
    """The right answer in the shape of a completion, so that it takes the same path through packing and policy."""
    zeros = torch.zeros(len(answer_ids))
    return Rollout(index, 0, prompt, answer_ids, torch.ones(len(answer_ids), dtype=torch.bool), zeros, zeros, zeros,
                   text, True)  # fmt: skip


def draw_answers(run: Session, clock: Clock) -> list[Rollout]:
    """This rank's share of the step's samples, each with its target answer and stop token."""
    indices = run.sampler.draw(run.cfg.sft_batch)
    rollouts = []
    with clock("data"):
        for i in run.world.share(len(indices)):
            sample = run.task.build(run.records[indices[i]], run.family)
            text = run.task.answer(sample)
            ids = run.family.tokenizer.encode(text, add_special_tokens=False)
            ids = torch.tensor([*ids, run.family.stop_ids[0]])
            rollouts.append(as_rollout(sample, run.family.encode(sample), ids, i, text))
    return rollouts


def sft(run: Session) -> None:
    cfg, world, policy, optimizer = run.cfg, run.world, run.policy, run.optimizer
    for step in range(run.start, cfg.steps):
        if run.evaluate_due(step):
            run.evaluate(step)
        clock = Clock()
        rollouts = draw_answers(run, clock)
        with clock("pack"):
            tokens, sequences = world.sum(count(rollouts))
            normaliser = Normaliser("token-mean", tokens, sequences, cfg.max_new_tokens)
            packs = pack(rollouts, np.ones((len(rollouts), 1)), cfg.pack_tokens, normaliser, drop_flat=False)
        with clock("update"):
            total = 0.0
            for p in packs:
                p = to_device(p, policy.device)
                with policy.head() as weight:
                    logp, _ = linear_token_logprobs(policy.hidden(p), weight, p.rows.tokens)
                    loss = -(p.rows.weight * logp).sum()
                    loss.backward()
                total += float(loss.detach())  # sync
            optimizer.sum_gradients(world)
            grad_norm = optimizer.clip()
            lr = optimizer.step(step)
        metrics = {"loss": world.sum([total])[0], "grad_norm": grad_norm, "lr": lr, **clock.metrics(tokens)}
        run.log(step, metrics)
        if run.save_due(step + 1):
            run.save(step + 1)
    run.close()


def main(argv: list[str] | None = None) -> int:
    return run_program(sys.argv[1:] if argv is None else argv, "sft.py", __doc__.splitlines()[0], sft)


if __name__ == "__main__":
    sys.exit(main())
