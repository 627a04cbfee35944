"""hidden (N, H) @ weight (V, H).T a chunk of rows at a time, with the products that carry a gradient back.

The (N, V) matrix never exists. Logits are float32 (float64 of float64 operands) whatever the operands are: bfloat16 would
round a logit near 30 by up to 0.06, a log-prob with it. Gradients of the weight are accumulated in float32. CPU operands in
half precision, and operands of two dtypes, are widened first, which costs a float32 copy of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import blocks
from .softmax_torch import widened


def _product(a, b, out, *, add: bool = False) -> None:
    """out = a @ b, or out += a @ b. Half-precision factors into a float32 result: on CUDA, summed in float32."""
    if a.dtype == out.dtype:
        out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def all_logits(hidden, weight) -> torch.Tensor:
    """(N, V) logits of hidden (N, H) and weight (V, H) at once, for a few rows, in the dtype `Head` gives them."""
    if hidden.is_cuda and hidden.dtype.itemsize == 2:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return widened(hidden) @ widened(weight).T


class Head:
    """The products of one call. hidden (M, H), weight (V, H); gradients are taken of what the flags say."""

    def __init__(self, hidden, weight, *, want_hidden=False, want_weight=False, memory: int | None = None):
        given = hidden.dtype
        if hidden.dtype != weight.dtype or hidden.device.type == "cpu":
            hidden, weight = widened(hidden), widened(weight)
            if hidden.dtype != weight.dtype:
                hidden, weight = hidden.double(), weight.double()
        self.hidden, self.weight, self.wants_gradients = hidden, weight, want_hidden or want_weight
        self.exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        a_logit = self.exact.itemsize + (0 if hidden.dtype == self.exact else hidden.dtype.itemsize)
        if memory is None:
            memory = blocks.CHUNK_BYTES[hidden.device.type]
        self.rows = _even(len(hidden), max(1, memory // (len(weight) * a_logit)))
        self._logits = self._dlogits = None
        self._dhidden = torch.empty_like(hidden, dtype=given) if want_hidden else None
        self._dweight = torch.empty_like(weight, dtype=self.exact) if want_weight else None
        self._first = True

    def parts(self, start: int, stop: int) -> list[slice]:
        """Chunks of the rows from start to stop; an empty one of no rows."""
        return [slice(a, min(a + self.rows, stop)) for a in range(start, max(stop, start + 1), self.rows)]

    def _buffer(self, dtype) -> torch.Tensor:
        return torch.empty(min(self.rows, len(self.hidden)), len(self.weight), dtype=dtype, device=self.hidden.device)

    def logits(self, part: slice) -> torch.Tensor:
        """(n, V) of a chunk, in a buffer that the next call overwrites."""
        if self._logits is None:
            self._logits = self._buffer(self.exact)
        z = self._logits[: part.stop - part.start]
        _product(self.hidden[part], self.weight.T, z)
        return z

    def room(self, logits: torch.Tensor) -> torch.Tensor:
        """Where the gradient of a chunk's logits goes: over them, unless it is to be in half precision."""
        if self.hidden.dtype == self.exact:
            return logits
        if self._dlogits is None:
            self._dlogits = self._buffer(self.hidden.dtype)
        return self._dlogits[: len(logits)]

    def add(self, part: slice, dlogits: torch.Tensor) -> None:
        """Carries a chunk's (n, V) gradient on to hidden and weight."""
        if self._dhidden is not None:
            if self._dhidden.dtype == dlogits.dtype:
                torch.mm(dlogits, self.weight, out=self._dhidden[part])
            else:
                self._dhidden[part] = dlogits @ self.weight
        if self._dweight is not None:
            _product(dlogits.T, self.hidden[part], self._dweight, add=not self._first)
        self._first = False

    def gradients(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(M, H) in hidden's dtype and (V, H) in float32 (float64), each None unless wanted."""
        return self._dhidden, self._dweight


def _even(m: int, most: int) -> int:
    """Rows of a chunk: as few chunks as `most` allows, all about as long, in multiples of 128 where that fits."""
    chunks = max(1, -(-m // most))
    rows = max(1, -(-m // chunks))
    return min(most, -(-rows // 128) * 128)


def runs(sequence: torch.Tensor, rows: int) -> Iterator[tuple[int, int]]:
    """(M,) int64, equal values side by side -> ranges of whole sequences, of at most `rows` rows unless one sequence is
    longer than that. One device sync."""
    ends = [*((sequence[1:] != sequence[:-1]).nonzero().squeeze(1) + 1).tolist(), len(sequence)]
    start = stop = 0
    for end in ends:
        if end - start > rows and stop > start:
            yield start, stop
            start = stop
        stop = end
    yield start, stop
