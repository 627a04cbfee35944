"""What a person sees while waiting: a tqdm bar on a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

SHOWN = (("reward", "reward", ".3f"), ("kl", "kl", ".2g"), ("tokens_per_second", "tokens/s", ".0f"))


class Progress:
    """The bar of the training loop: steps done of `total`, reward, KL, tokens per second, time left.

    On a terminal one moving line; elsewhere one line every `seconds` seconds, the first and the last step always,
    without control characters. enabled: rank 0 only. start: steps done by the run before it was resumed.
    """

    def __init__(self, total: int, start: int = 0, *, enabled: bool = True, seconds: float = 30.0, file=None):
        self._total, self._start, self._done = total, start, start
        self._file = sys.stderr if file is None else file
        self._seconds, self._silent = seconds, not enabled
        self._began = time.monotonic()
        self._last, self._shown = None, None  # time of the last line, step it told of
        self._text = ""
        self._bar = None
        if not self._silent and self._file.isatty():
            self._bar = tqdm(total=total, initial=start, unit="step", file=self._file, dynamic_ncols=True)

    def update(self, step: int, metrics: dict) -> None:
        """Show that `step`, counted from 0, is done. metrics: as written to metrics.jsonl."""
        if self._silent:
            return
        new, self._done = step + 1 - self._done, step + 1
        self._text = "  ".join(f"{name} {metrics[key]:{how}}" for key, name, how in SHOWN if _number(metrics.get(key)))
        if self._bar is not None:
            self._bar.set_postfix_str(self._text, refresh=False)
            self._bar.update(new)
        elif self._last is None or self._done == self._total or time.monotonic() - self._last >= self._seconds:
            self._line()

    def say(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if self._bar is not None:
            tqdm.write(text, file=self._file)
        elif not self._silent:
            print(text, file=self._file, flush=True)

    def close(self) -> None:
        """End the bar; in a log file the last step is told if it was not."""
        if self._bar is not None:
            self._bar.close()
        elif not self._silent and self._done > self._start and self._shown != self._done:
            self._line()

    def _line(self) -> None:
        self._last, self._shown = time.monotonic(), self._done
        each = (self._last - self._began) / max(1, self._done - self._start)
        left = tqdm.format_interval(each * (self._total - self._done))
        parts = [f"step {self._done}/{self._total}", self._text, f"{left} left"]
        print("  ".join(part for part in parts if part), file=self._file, flush=True)


def track(
    iterable: Iterable,
    label: str,
    total: int | None = None,
    *,
    rank: int | None = None,
    seconds: float = 10.0,
    file=None,
) -> Iterator:
    """Yield the items of `iterable`, showing how far it is: for set-up and evaluation that may take long.

    A bar on a terminal; elsewhere nothing for the first `seconds` seconds, then a line that often and one at the end.
    Silent on ranks above 0 (`rank`, by default torchrun's RANK).
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    file = sys.stderr if file is None else file
    if (int(os.environ.get("RANK", 0)) if rank is None else rank) != 0:
        yield from iterable
        return
    if file.isatty():
        yield from tqdm(iterable, desc=label, total=total, file=file, leave=False, dynamic_ncols=True)
        return
    began = last = time.monotonic()
    done = 0
    for item in iterable:
        now = time.monotonic()
        if now - last >= seconds:
            last = now
            left = f", {tqdm.format_interval((now - began) / done * (total - done))} left" if total and done else ""
            print(f"{label}: {done}{f'/{total}' if total else ''}{left}", file=file, flush=True)
        yield item
        done += 1
    if last != began:
        print(f"{label}: {done}, took {tqdm.format_interval(time.monotonic() - began)}", file=file, flush=True)


def _number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
