"""GRPO loss of N rows, from logits or from hidden states: token log-probs and entropy, then the objective, summed.

    loss = sum over rows of row_terms(token_logprobs(logits, rows.tokens, objective.temperature), rows, objective)

The formula of a row and its derivatives stand in `objective.py`, those of log-probs and entropy in `logprobs.py`: the
row kernels hand over two numbers a row and take two back. Rows of weight 0 are left out before anything is computed:
they cost nothing, may hold anything (NaN, ids of -100), get an exactly zero gradient, and have 0 in every statistic.
"""

from __future__ import annotations

from dataclasses import fields

import torch

from . import logprobs
from .linear import Head, runs
from .logprobs import check_index, check_linear, check_matrix, check_tokens
from .objective import Objective, Rows, RowStats, row_loss, row_terms


def _check_rows(inputs: torch.Tensor, rows: Rows, vocabulary: int, n: int) -> None:
    if len(rows) != n:
        raise ValueError(f"{len(rows)} rows for {n} rows of logits or hidden states")
    check_tokens(torch.where(rows.weight == 0, 0, rows.tokens), n, vocabulary, inputs)


def _spread(stats: RowStats, live: torch.Tensor | None, n: int) -> RowStats:
    """Statistics of the live rows -> of all n rows, zeros elsewhere. None: all rows are live."""
    if live is None:
        return stats
    values = (getattr(stats, f.name) for f in fields(stats))
    return RowStats(*(v.new_zeros(n).index_copy(0, live, v) for v in values))


def grpo_loss_ref(logits, rows: Rows, objective: Objective):
    """`grpo_loss` in plain PyTorch, differentiated by autograd."""
    live = rows.weight.nonzero().squeeze(1)
    mine = rows.take(live)
    logp, entropy = logprobs.token_logprobs_ref(logits[live], mine.tokens, objective.temperature)
    loss, stats = row_terms(logp, entropy, mine, objective)
    return loss.sum(), _spread(stats, live, len(rows))


def linear_grpo_loss_ref(hidden, weight, rows: Rows, objective: Objective):
    """`linear_grpo_loss` in plain PyTorch, differentiated by autograd; autograd keeps the live rows' logits."""
    live = rows.weight.nonzero().squeeze(1)
    mine = rows.take(live)
    logp, entropy = logprobs.linear_token_logprobs_ref(hidden[live], weight, mine.tokens, objective.temperature)
    loss, stats = row_terms(logp, entropy, mine, objective)
    return loss.sum(), _spread(stats, live, len(rows))


class _Loss(torch.autograd.Function):
    """The sum of row_loss, its derivatives taken in the forward; statistics leave through the list `stats`."""

    @staticmethod
    def forward(ctx, logp, entropy, rows, objective, stats):
        loss, dlogp, dentropy, seen = row_loss(logp, entropy, rows, objective)
        ctx.save_for_backward(dlogp, dentropy)
        stats.append(seen)
        return loss.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        dlogp, dentropy = ctx.saved_tensors
        return upstream * dlogp, upstream * dentropy, None, None, None


def _grpo_loss(logits, rows, objective, index, in_place, ops):
    check_matrix("logits", logits)
    check_index(index, logits)
    _check_rows(logits, rows, logits.shape[1], logits.shape[0] if index is None else len(index))
    ops, stats = ops or logprobs.row_ops(logits), []
    logp, entropy = logprobs.TokenLogprobs.apply(
        logits, rows.tokens, index, rows.weight, objective.temperature, in_place, ops
    )
    return _Loss.apply(logp, entropy, rows, objective, stats), stats[0]


def grpo_loss(logits, rows: Rows, objective: Objective, *, index=None, in_place: bool = False):
    """The loss of N rows from their logits.

    logits (N, V) floating point. Returns (loss, stats): a float32 scalar (float64 for float64 logits), differentiable
    in logits, and detached float32 (N,) RowStats. Normalisers are in rows.weight: losses of packs and ranks add up.
    Raises ValueError for wrong shapes, dtypes or ids, and for a KL coefficient without rows.logp_ref.
    index and in_place are those of `token_logprobs`: with both, one read forward, one read and one write backward.
    """
    return _grpo_loss(logits, rows, objective, index, in_place, None)


def grpo_loss_triton(logits, rows: Rows, objective: Objective, *, index=None, in_place: bool = False):
    """`grpo_loss` through Triton."""
    with logprobs.launched(len(rows)):
        return _grpo_loss(logits, rows, objective, index, in_place, logprobs.triton_ops())


class _FormedLoss(torch.autograd.Function):
    """A loss whose gradients are there already; backward multiplies them by the upstream scalar and gives them away."""

    @staticmethod
    def forward(ctx, hidden, weight, loss, gradients, ops):
        ctx.gradients, ctx.ops = gradients, ops
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_grpo_loss forms its gradients in the forward and gives them away in the first backward: "
                "call it again before a second backward (retain_graph has nothing to retain)"
            )
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            if gradient is not None:
                ctx.ops.scale_(gradient, upstream)
        return *gradients, None, None, None


def _form(head: Head, rows: Rows, objective: Objective, ops) -> tuple[torch.Tensor, RowStats]:
    """Loss and statistics of rows, all live; gradients, where the head wants them, go to the head."""
    losses, stats = [], []
    if objective.sequence_level:
        spans = runs(rows.sequence, head.rows)
    else:
        spans = ((s.start, s.stop) for s in head.parts(0, len(rows)))
    for start, stop in spans:  # rows that the objective sees together
        mine, parts = rows.take(slice(start, stop)), head.parts(start, stop)
        seen = [slice(s.start - start, s.stop - start) for s in parts]  # the same rows, counted from start
        softmax = []
        for s, here in zip(parts, seen):
            logits = head.logits(s)
            softmax.append(ops.forward(logits, mine.tokens[here], objective.temperature))
        logp, entropy = (torch.cat([getattr(x, name) for x in softmax]) for name in ("logp", "entropy"))
        loss, dlogp, dentropy, row_stats = row_loss(logp, entropy, mine, objective)
        losses.append(loss.sum())
        stats.append(row_stats)
        if not head.wants_gradients:
            continue
        for s, here, row_softmax in zip(parts, seen, softmax):
            if len(parts) > 1:  # a sequence longer than a chunk: its logits once more
                logits = head.logits(s)
            room = head.room(logits)
            ops.backward(logits, room, mine.tokens[here], row_softmax, dlogp[here], dentropy[here],
                         objective.temperature)  # fmt: skip
            head.add(s, room)
    joined = RowStats(*(torch.cat([getattr(x, f.name) for x in stats]) for f in fields(RowStats)))
    return torch.stack(losses).sum(), joined


@torch.no_grad()
def _linear_forward(hidden, weight, rows, objective, want_hidden, want_weight, memory, ops):
    n = len(rows)
    live = rows.weight.nonzero().squeeze(1)  # sync
    if objective.sequence_level:
        live = live[rows.sequence[live].argsort(stable=True)]
    elif len(live) == n:
        live = None
    if live is not None:
        hidden, rows = hidden[live], rows.take(live)
    head = Head(hidden, weight, want_hidden=want_hidden, want_weight=want_weight, memory=memory)
    loss, stats = _form(head, rows, objective, ops)
    dhidden, dweight = head.gradients()
    if want_hidden and live is not None:
        dhidden = dhidden.new_zeros(n, dhidden.shape[1]).index_copy_(0, live, dhidden)
    return loss, _spread(stats, live, n), (dhidden, dweight)


def _linear_grpo_loss(hidden, weight, rows, objective, memory, ops):
    check_linear(hidden, weight)
    _check_rows(hidden, rows, weight.shape[0], hidden.shape[0])
    ops = ops or logprobs.row_ops(hidden)
    grad = torch.is_grad_enabled()
    wants = grad and hidden.requires_grad, grad and weight.requires_grad
    loss, stats, gradients = _linear_forward(hidden, weight, rows, objective, *wants, memory, ops)
    return _FormedLoss.apply(hidden, weight, loss, gradients, ops), stats


def linear_grpo_loss(hidden, weight, rows: Rows, objective: Objective, *, memory: int | None = None):
    """`grpo_loss(hidden @ weight.T, rows, objective)`, the product taken and kept in float32.

    hidden (N, H), weight (V, H) floating point; the loss is differentiable in both, once: the gradients are formed here,
    a chunk of rows at a time, so that three products do (two for a frozen weight, one without gradient). The weight's
    is float32 until autograd casts it to the weight's dtype; with `weight.grad_dtype = None` (a leaf) it stays float32.
    memory: bytes for one chunk of logits and their gradient (None: blocks.CHUNK_BYTES of the device). An objective of
    sequence level sees whole sequences; one longer than a chunk has its logits made twice.
    Returns and raises as `grpo_loss`. A second backward raises RuntimeError.
    """
    return _linear_grpo_loss(hidden, weight, rows, objective, memory, None)


def linear_grpo_loss_triton(hidden, weight, rows: Rows, objective: Objective, *, memory: int | None = None):
    """`linear_grpo_loss` through Triton."""
    with logprobs.launched(int(rows.weight.count_nonzero())):
        return _linear_grpo_loss(hidden, weight, rows, objective, memory, logprobs.triton_ops())
