"""GRPO loss of N rows, from logits or from hidden states: token log-probs and entropy, then the objective, summed.

    loss = sum over rows of row_terms(token_logprobs(logits, rows.tokens, objective.temperature), rows, objective)

The formula of a row and its derivatives stand in `objective.py`, those of log-probs and entropy in `logprobs.py`. Rows
of weight 0 are left out before anything is computed: they cost nothing, may hold anything (NaN, ids of -100), get an
exactly zero gradient, and have 0 in every statistic.
"""

from __future__ import annotations

from dataclasses import fields

import torch

from .logprobs import check_linear, check_matrix, check_tokens, linear_token_logprobs_ref, token_logprobs_ref
from .objective import Objective, Rows, RowStats, row_terms


def _check_rows(inputs: torch.Tensor, rows: Rows, vocabulary: int) -> None:
    if len(rows) != inputs.shape[0]:
        raise ValueError(f"{len(rows)} rows for {inputs.shape[0]} rows of logits or hidden states")
    check_tokens(torch.where(rows.weight == 0, 0, rows.tokens), len(rows), vocabulary, inputs)


def _spread(stats: RowStats, live: torch.Tensor, n: int) -> RowStats:
    """Statistics of the live rows -> of all n rows, zeros elsewhere."""
    values = (getattr(stats, f.name) for f in fields(stats))
    return RowStats(*(v.new_zeros(n).index_copy(0, live, v) for v in values))


def grpo_loss_ref(logits, rows: Rows, objective: Objective):
    """`grpo_loss` in plain PyTorch, differentiated by autograd."""
    live = rows.weight.nonzero().squeeze(1)
    mine = rows.take(live)
    logp, entropy = token_logprobs_ref(logits[live], mine.tokens, objective.temperature)
    loss, stats = row_terms(logp, entropy, mine, objective)
    return loss.sum(), _spread(stats, live, len(rows))


def linear_grpo_loss_ref(hidden, weight, rows: Rows, objective: Objective):
    """`linear_grpo_loss` in plain PyTorch, differentiated by autograd; autograd keeps the live rows' logits."""
    live = rows.weight.nonzero().squeeze(1)
    mine = rows.take(live)
    logp, entropy = linear_token_logprobs_ref(hidden[live], weight, mine.tokens, objective.temperature)
    loss, stats = row_terms(logp, entropy, mine, objective)
    return loss.sum(), _spread(stats, live, len(rows))


def grpo_loss(logits, rows: Rows, objective: Objective):
    """The loss of N rows from their logits.

    logits (N, V) floating point. Returns (loss, stats): a float32 scalar (float64 for float64 logits), differentiable
    in logits, and detached float32 (N,) RowStats. Normalisers are in rows.weight: losses of packs and ranks add up.
    Raises ValueError for wrong shapes, dtypes or ids, and for a KL coefficient without rows.logp_ref.
    """
    check_matrix("logits", logits)
    _check_rows(logits, rows, logits.shape[1])
    return grpo_loss_ref(logits, rows, objective)


def linear_grpo_loss(hidden, weight, rows: Rows, objective: Objective):
    """`grpo_loss(hidden @ weight.T, rows, objective)`, the product taken and kept in float32.

    hidden (N, H), weight (V, H) floating point; the loss is differentiable in both. Returns and raises as `grpo_loss`.
    """
    check_linear(hidden, weight)
    _check_rows(hidden, rows, weight.shape[0])
    return linear_grpo_loss_ref(hidden, weight, rows, objective)
