"""Log-probability of given tokens and entropy of the whole distribution, from logits or from hidden states.

    z = logits / temperature         logp = z[token] - logsumexp(z)         entropy = -sum over v of p_v log p_v

Statistics are float32 whatever the logits are (float64 stays float64). With g, h the gradients of logp and entropy:

    dlogits_v = ( g ([v = token] - p_v) - h p_v (log p_v + entropy) ) / temperature

A logit of -inf has probability 0 and no gradient; a row with a NaN, with +inf or with nothing but -inf gives NaN.
"""

from __future__ import annotations

import math

import torch

from .objective import describe

CHUNK_ELEMENTS = 2**26  # logits the linear form makes at a time: 256 MiB in float32


def widened(x: torch.Tensor) -> torch.Tensor:
    """x in float32, or in float64 if it is that."""
    return x if x.dtype == torch.float64 else x.float()


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
    """`linear_token_logprobs` in plain PyTorch: logits in float32, a chunk of rows at a time. Autograd keeps every
    chunk until backward; without gradient one chunk lives at a time."""
    hidden, weight = widened(hidden), widened(weight)
    rows = max(1, CHUNK_ELEMENTS // max(1, weight.shape[0]))
    parts = [
        token_logprobs_ref(h @ weight.T, t, temperature)
        for h, t in zip(hidden.split(rows), tokens.split(rows), strict=True)
    ]
    logp, entropy = zip(*parts, strict=True)
    return torch.cat(logp), torch.cat(entropy)


def token_logprobs(logits, tokens, temperature: float = 1.0):
    """Log-prob of each row's token, and the row's entropy.

    logits (N, V) floating point, tokens (N,) int64. Returns logp (N,) and entropy (N,) in nats, float32 (float64 for
    float64 logits), both differentiable in logits. Raises ValueError for wrong shapes, dtypes, ids or temperatures.
    """
    check_matrix("logits", logits)
    check_tokens(tokens, logits.shape[0], logits.shape[1], logits)
    check_temperature(temperature)
    return token_logprobs_ref(logits, tokens, temperature)


def linear_token_logprobs(hidden, weight, tokens, temperature: float = 1.0):
    """`token_logprobs(hidden @ weight.T, tokens, temperature)`, the product taken and kept in float32.

    hidden (N, H), weight (V, H) floating point, tokens (N,) int64. Returns logp (N,) and entropy (N,) in nats, float32
    (float64 for float64 input), differentiable in hidden and weight. Raises ValueError like `token_logprobs`.
    """
    check_linear(hidden, weight)
    check_tokens(tokens, hidden.shape[0], weight.shape[0], hidden)
    check_temperature(temperature)
    return linear_token_logprobs_ref(hidden, weight, tokens, temperature)
