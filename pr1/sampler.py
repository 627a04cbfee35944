"""The order in which prompts are drawn: a fresh permutation every epoch, a function of (seed, epoch) alone."""

from __future__ import annotations

import numpy as np


class PromptSampler:
    """Draws record indices without replacement within an epoch. Its state is two integers."""

    def __init__(self, size: int, seed: int):
        if size < 1:
            raise ValueError("there are no prompts to draw")
        self.size, self.seed, self.epoch, self.cursor = size, seed, 0, 0
        self._order = self._permutation()

    def _permutation(self) -> np.ndarray:
        return np.random.Generator(np.random.PCG64([self.seed, self.epoch])).permutation(self.size)

    def draw(self, n: int) -> list[int]:
        """The next n indices; an epoch's end is followed by the next epoch's beginning."""
        drawn = []
        while len(drawn) < n:
            if self.cursor == self.size:
                self.epoch, self.cursor = self.epoch + 1, 0
                self._order = self._permutation()
            take = min(n - len(drawn), self.size - self.cursor)
            drawn += self._order[self.cursor : self.cursor + take].tolist()
            self.cursor += take
        return drawn

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "cursor": self.cursor}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.cursor = int(state["epoch"]), int(state["cursor"])
        self._order = self._permutation()
