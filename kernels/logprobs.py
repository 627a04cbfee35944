"""Log-probability of given tokens and entropy of the whole distribution, from logits or from hidden states.

    z = logits / temperature         logp = z[token] - logsumexp(z)         entropy = -sum over v of p_v log p_v

Statistics are float32 whatever the logits are (float64 stays float64). With g, h the gradients of logp and entropy:

    dlogits_v = ( g ([v = token] - p_v) - h p_v (log p_v + entropy) ) / temperature

A logit of -inf has probability 0 and no gradient; a row with a NaN, with +inf or with nothing but -inf gives NaN.

CUDA tensors (but float64) go through Triton, all others through PyTorch, by the same two autograd functions over two
sets of row operations. The `*_triton` forms insist on Triton, whatever the device.
"""

from __future__ import annotations

import contextlib
import math

import torch

from . import softmax_torch
from .linear import Head
from .objective import describe
from .softmax_torch import RowSoftmax, widened


def check_matrix(name: str, x, columns: int | None = None) -> None:
    """Raises ValueError unless x is a (rows, columns) floating point tensor."""
    if not isinstance(x, torch.Tensor) or x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"{name} must be a two-dimensional floating point tensor, got {describe(x)}")
    if x.shape[1] == 0:
        raise ValueError(f"{name} has no columns: {tuple(x.shape)}")
    if columns is not None and x.shape[1] != columns:
        raise ValueError(f"{name} must have {columns} columns, got {tuple(x.shape)}")


def check_tokens(tokens, n: int, vocabulary: int, like: torch.Tensor) -> None:
    """Raises ValueError unless tokens is (n,) int64 on the device of `like`; ids are checked on the CPU only, where
    looking costs no device sync."""
    if not isinstance(tokens, torch.Tensor) or tokens.shape != (n,) or tokens.dtype != torch.int64:
        raise ValueError(f"tokens must be ({n},) int64, one per row, got {describe(tokens)}")
    if tokens.device != like.device:
        raise ValueError(f"tokens are on {tokens.device}, the rows on {like.device}")
    if n and tokens.device.type == "cpu":
        low, high = (int(v) for v in tokens.aminmax())
        if low < 0 or high >= vocabulary:
            raise ValueError(f"token ids must be in [0, {vocabulary}), got {low if low < 0 else high}")


def check_index(index, logits) -> None:
    """Raises ValueError unless index is None or (N,) int64 on the device of logits; rows are checked on the CPU only."""
    if index is None:
        return
    if not isinstance(index, torch.Tensor) or index.ndim != 1 or index.dtype != torch.int64:
        raise ValueError(f"index must be one-dimensional int64, got {describe(index)}")
    if index.device != logits.device:
        raise ValueError(f"index is on {index.device}, logits on {logits.device}")
    if len(index) and index.device.type == "cpu":
        low, high = (int(v) for v in index.aminmax())
        if low < 0 or high >= len(logits):
            raise ValueError(f"index must be in [0, {len(logits)}), got {low if low < 0 else high}")
        if len(index.unique()) != len(index):
            raise ValueError("index names a row twice; its gradient would be that of the last only")


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless the temperature is positive and finite."""
    if not (0 < temperature < math.inf):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def check_linear(hidden, weight) -> None:
    """Raises ValueError unless hidden (N,H) and weight (V,H) can be multiplied."""
    check_matrix("hidden", hidden)
    check_matrix("weight", weight, hidden.shape[1])
    if hidden.device != weight.device:
        raise ValueError(f"hidden is on {hidden.device}, weight on {weight.device}")


def token_logprobs_ref(logits, tokens, temperature=1.0):
    """`token_logprobs` in plain PyTorch, differentiated by autograd."""
    log_p = torch.log_softmax(widened(logits) / temperature, dim=-1)
    logp = log_p.gather(1, tokens[:, None]).squeeze(1)
    p = log_p.exp()
    entropy = -(p * torch.where(p == 0, 0.0, log_p)).sum(-1)  # 0 log 0 = 0, in the gradient too
    return logp, entropy


def linear_token_logprobs_ref(hidden, weight, tokens, temperature=1.0):
    """`linear_token_logprobs` in plain PyTorch: all logits at once, in float32."""
    return token_logprobs_ref(widened(hidden) @ widened(weight).T, tokens, temperature)


def row_ops(like: torch.Tensor):
    """The module of row operations for a tensor: Triton on CUDA unless it is float64."""
    if not like.is_cuda or like.dtype == torch.float64:
        return softmax_torch
    from . import softmax_triton  # late: triton is not there on every platform

    return softmax_triton


def triton_ops():
    """The Triton row operations for any device; float64 has none."""
    from . import softmax_triton

    return softmax_triton


@contextlib.contextmanager
def launched(rows: int):
    """Asserts that a Triton kernel was launched inside, unless there are no rows."""
    ops = triton_ops()
    before = ops.launches
    yield
    assert rows == 0 or ops.launches > before, "no Triton kernel was launched"


class TokenLogprobs(torch.autograd.Function):
    """logits, tokens, index, weight, temperature, in_place, row operations -> logp, entropy."""

    @staticmethod
    def forward(ctx, logits, tokens, index, weight, temperature, in_place, ops):
        rows = ops.forward(logits, tokens, temperature, index=index, weight=weight)
        ctx.save_for_backward(logits, tokens, index, *rows)
        ctx.temperature, ctx.in_place, ctx.ops, ctx.spent = temperature, in_place, ops, False
        return rows.logp, rows.entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogp, dentropy):
        if ctx.spent:
            raise RuntimeError("the logits were overwritten with their gradient (in_place=True): no second backward")
        logits, tokens, index, *rows = ctx.saved_tensors
        ctx.spent = ctx.in_place
        if ctx.in_place:
            out = logits.detach()
        else:
            out = torch.empty_like(logits, memory_format=torch.contiguous_format)
        ctx.ops.backward(logits, out, tokens, RowSoftmax(*rows), dlogp, dentropy, ctx.temperature, index=index)
        if index is not None:  # rows that nothing was asked of
            others = torch.ones(len(out), dtype=torch.bool, device=out.device).index_fill_(0, index, False)
            out.masked_fill_(others[:, None], 0)
        return out, None, None, None, None, None, None


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, tokens, temperature, memory, ops, differentiable):
        head = Head(hidden, weight, memory=memory)
        parts, rows = head.parts(0, len(tokens)), []
        for s in parts:
            logits = head.logits(s)
            rows.append(torch.stack(ops.forward(logits, tokens[s], temperature)))
        rows = RowSoftmax(*torch.cat(rows, 1))
        ctx.save_for_backward(hidden, weight, tokens, *rows)
        ctx.temperature, ctx.memory, ctx.ops = temperature, memory, ops
        ctx.logits = logits if differentiable and len(parts) == 1 else None  # one chunk may stay: it is within `memory`
        return rows.logp, rows.entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogp, dentropy):
        hidden, weight, tokens, *rows = ctx.saved_tensors
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        head = Head(hidden, weight, want_hidden=want_hidden, want_weight=want_weight, memory=ctx.memory)
        kept, ctx.logits = ctx.logits, None
        for s in head.parts(0, len(tokens)):
            logits = head.logits(s) if kept is None else kept
            room, mine = head.room(logits), RowSoftmax(*(x[s] for x in rows))
            ctx.ops.backward(logits, room, tokens[s], mine, dlogp[s], dentropy[s], ctx.temperature)
            head.add(s, room)
        return *head.gradients(), None, None, None, None, None


def _token_logprobs(logits, tokens, temperature, index, in_place, ops):
    check_matrix("logits", logits)
    check_index(index, logits)
    check_tokens(tokens, logits.shape[0] if index is None else len(index), logits.shape[1], logits)
    check_temperature(temperature)
    ops = ops or row_ops(logits)
    return TokenLogprobs.apply(logits, tokens, index, None, temperature, in_place, ops)


def token_logprobs(logits, tokens, temperature: float = 1.0, *, index=None, in_place: bool = False):
    """Log-prob of each row's token, and the row's entropy.

    logits (N, V) floating point, tokens (N,) int64. Returns logp (N,) and entropy (N,) in nats, float32 (float64 for
    float64 logits), both differentiable in logits. Raises ValueError for wrong shapes, dtypes, ids or temperatures.
    index (N,) int64: row i is then row index[i] of logits (T, V), none of them twice; the others are not read.
    in_place: backward writes the gradient over the logits instead of beside them.
    """
    return _token_logprobs(logits, tokens, temperature, index, in_place, None)


def token_logprobs_triton(logits, tokens, temperature: float = 1.0, *, index=None, in_place: bool = False):
    """`token_logprobs` through Triton."""
    with launched(len(tokens)):
        return _token_logprobs(logits, tokens, temperature, index, in_place, triton_ops())


def _linear_token_logprobs(hidden, weight, tokens, temperature, memory, ops):
    check_linear(hidden, weight)
    check_tokens(tokens, hidden.shape[0], weight.shape[0], hidden)
    check_temperature(temperature)
    ops = ops or row_ops(hidden)
    differentiable = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearTokenLogprobs.apply(hidden, weight, tokens, temperature, memory, ops, differentiable)


def linear_token_logprobs(hidden, weight, tokens, temperature: float = 1.0, *, memory: int | None = None):
    """`token_logprobs(hidden @ weight.T, tokens, temperature)`, the product taken and kept in float32.

    hidden (N, H), weight (V, H) floating point, tokens (N,) int64. Returns logp (N,) and entropy (N,) in nats, float32
    (float64 for float64 input), differentiable in hidden and weight. Raises ValueError like `token_logprobs`.
    memory: bytes for one chunk of logits (None: blocks.CHUNK_BYTES of the device). Backward makes each chunk again, unless
    there was only one.
    """
    return _linear_token_logprobs(hidden, weight, tokens, temperature, memory, None)


def linear_token_logprobs_triton(hidden, weight, tokens, temperature: float = 1.0, *, memory: int | None = None):
    """`linear_token_logprobs` through Triton."""
    with launched(len(tokens)):
        return _linear_token_logprobs(hidden, weight, tokens, temperature, memory, triton_ops())
