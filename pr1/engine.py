"""Continuous batching: prompts enter as room allows, completions leave one by one.

The engine holds a fixed number of completion rows and prompt slots, and their keys and values (`Pools`). A prompt is
prefilled once and keeps its slot and the logits of its first new token until all its completions are done; its
completions take rows as they become free. Live rows are 0..n-1, live slots 0..p-1: what leaves is replaced by the last.
What is drawn depends on a row's key alone (seed, step, prompt, completion), so order and company do not matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from pr1.decode import DecodeAttention, Pools, PrefillAttention
from pr1.graphs import Graphs
from pr1.kernels import Sampling, sample_tokens
from pr1.kernels.linear import all_logits
from pr1.kernels.sample import position_keys
from pr1.records import Prompt, Rollout, Segments

PREFILL_TOKENS = 16384  # of one prefill call; a longer prompt goes alone
CHECK_EVERY = 8  # on a GPU: tokens between two looks at which completions have stopped


def pool_sizes(budget_mb: int, per_token: int, batch: int, group_size: int, count: int, prompt_tokens: int,
               new_tokens: int) -> tuple[int, int]:  # fmt: skip
    """(rows, prompt slots) that fit the budget, at most `batch` rows. ValueError when not even one of each fits.

    per_token: bytes of a token's keys and values; count: prompts to come. With several completions a prompt there are
    twice the slots that full rows need, so that stragglers of some groups do not keep new ones out.
    """
    budget, rows = budget_mb << 20, min(batch, count * group_size)

    def slots(rows: int, spare: int) -> int:
        return min(count, -(-rows // group_size) * spare)

    def size(rows: int, spare: int) -> int:
        return (slots(rows, spare) * prompt_tokens + rows * new_tokens) * per_token

    if size(1, 1) > budget:
        raise ValueError(
            f"--rollout-cache-mb {budget_mb}: a prompt of up to {prompt_tokens} tokens and one completion of up to "
            f"{new_tokens} need {math.ceil(size(1, 1) / 2**20)} MB of keys and values; raise it, or lower "
            "--max-prompt-tokens or --max-new-tokens"
        )
    for spare in (2, 1) if group_size > 1 else (1,):
        if size(rows, spare) <= budget:
            return rows, slots(rows, spare)
    while size(rows, 1) > budget:
        rows -= 1
    return rows, slots(rows, 1)


@dataclass(eq=False)
class _Slot:
    """A prompt whose completions are being written."""

    index: int  # in the call
    prompt: Prompt
    logits: torch.Tensor  # (V,) of the first new token
    started: int = 0
    rows: list[int] = field(default_factory=list)
    done: list[Rollout] = field(default_factory=list)


class Engine:
    """Rows and slots of one policy. The same object serves call after call; nothing is kept from one to the next."""

    def __init__(self, policy, rows: int, prompts: int, prompt_tokens: int, new_tokens: int):
        parameter = policy.text.embed_tokens.weight
        self.device = policy.device
        self.rows, self.prompts, self.prompt_tokens, self.new_tokens = rows, prompts, prompt_tokens, new_tokens
        self.pools = Pools(policy.text.config, rows, prompts, prompt_tokens, new_tokens, parameter.dtype, self.device)
        # per row: last token, tokens written, position of the first new token, key of the random stream
        self.state = torch.zeros(4, rows, dtype=torch.int64, device=self.device)
        self.token, self.length, self.base, self.stream = self.state
        self.done = torch.ones(rows, dtype=torch.bool, device=self.device)
        # one column more than is read: a row that is done keeps writing there until it is taken away
        self.tokens = torch.zeros(rows, new_tokens + 1, dtype=torch.int64, device=self.device)
        self.numbers = torch.zeros(rows, new_tokens + 1, 3, device=self.device)  # logp, entropy, log_kept
        self.row = torch.arange(rows, device=self.device)
        self.graphs = Graphs() if self.device.type == "cuda" else None  # None: no graphs, a look at every token

    def serves(self, rows: int, prompts: int, prompt_tokens: int, new_tokens: int) -> bool:
        """Whether the storage is large enough; if so, the next run uses no more of it than this."""
        pools = self.pools
        fits = (rows <= pools.rows and prompts <= pools.prompts and prompt_tokens <= pools.prompt_tokens
                and new_tokens <= pools.new_tokens)  # fmt: skip
        if fits:
            self.rows, self.prompts, self.prompt_tokens, self.new_tokens = rows, prompts, prompt_tokens, new_tokens
        return fits

    def run(self, policy, weight, coming: Iterator[Prompt], group_size: int, sampling: Sampling, streams,
            first: int) -> Iterator[list[Rollout]]:  # fmt: skip
        """Yields the G rollouts of a prompt as the last of them is done.

        coming: prompts in order, taken as there is room. streams(index, completions) -> their (n,) int64 keys.
        """
        self.policy, self.weight, self.group_size, self.sampling = policy, weight, group_size, sampling
        self.streams, self.first = streams, first
        self.stops = torch.tensor(sampling.stop_ids, device=self.device)
        self.attend = DecodeAttention(self.pools, group_size)
        if self.graphs is not None:
            self.graphs.open(self)
        self.coming, self.next, self.exhausted = coming, 0, False
        self.slots: list[_Slot] = []
        self.owner: list[_Slot] = []  # of each live row
        self.completion: list[int] = []
        self.age: list[int] = []  # tokens written by each live row, were it not to stop
        self.done.fill_(True)
        while True:
            self._admit()
            live = len(self.owner)
            yield from self._retire()
            if not live:
                return
            if len(self.owner) == live:  # else there may be room for more
                for _ in range(1 if self.graphs is None else self._steps_to_check()):
                    self._step()

    # ---- entering ------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Start completions while rows are free; prefill when an eighth of the rows is (or all are)."""
        changed, rows = False, self.rows
        while True:
            changed |= self._start_rows()
            free, room = rows - len(self.owner), self.prompts - len(self.slots)
            waits = any(slot.started < self.group_size for slot in self.slots)
            if waits or not room or self.exhausted or (self.owner and free < max(1, rows // 8)):
                break
            if not self._prefill(min(room, -(-free // self.group_size))):
                break
        if changed:
            self._arrange()

    def _prefill(self, most: int) -> bool:
        """Take at most so many prompts of at most PREFILL_TOKENS together; False when there are no more."""
        chunk, tokens = [], 0
        while len(chunk) < most and tokens < PREFILL_TOKENS:
            prompt = next(self.coming, None)
            if prompt is None:
                self.exhausted = True
                break
            if len(prompt.ids) > self.prompt_tokens:
                raise ValueError(
                    f"prompt {self.first + self.next + len(chunk)} takes {len(prompt.ids)} tokens, more than "
                    f"--max-prompt-tokens {self.prompt_tokens}; raise it"
                )
            chunk.append(prompt)
            tokens += len(prompt.ids)
        if not chunk:
            return False
        cu = torch.tensor([0, *(len(p.ids) for p in chunk)]).cumsum(0)
        longest = max(len(p.ids) for p in chunk)
        rows = torch.arange(tokens, device=self.device)
        places = range(len(self.slots), len(self.slots) + len(chunk))
        attend = PrefillAttention(Segments(cu.int(), cu.int(), rows, longest, longest), self.pools, list(places))
        ids = torch.cat([p.ids for p in chunk]).to(self.device)
        positions = torch.cat([p.position_ids for p in chunk], 1).to(self.device)
        features = self.policy.features([image for p in chunk for image in p.images])
        hidden = self.policy.run(ids, positions, features, attend)  # (T, H)
        logits = all_logits(hidden[(cu[1:] - 1).to(self.device)], self.weight)  # (P, V)
        for prompt, row in zip(chunk, logits):
            self.slots.append(_Slot(self.next, prompt, row))
            self.next += 1
        return True

    def _start_rows(self) -> bool:
        """First tokens of completions that have not begun, as far as rows are free."""
        begin = at = len(self.owner)
        keys, logits, base = [], [], []
        for slot in self.slots:
            n = min(self.group_size - slot.started, self.rows - at)
            if n == 0:
                continue
            new = range(slot.started, slot.started + n)
            keys.append(self.streams(slot.index, torch.arange(new.start, new.stop)))
            logits.append(slot.logits.expand(n, -1))
            base += [slot.prompt.next_position] * n
            self.owner += [slot] * n
            self.completion += new
            self.age += [0] * n
            slot.started += n
            at += n
        if at == begin:
            return False
        self.stream[begin:at] = torch.cat(keys).to(self.device)
        self.base[begin:at] = torch.tensor(base, device=self.device)
        self.length[begin:at] = 0
        self.done[begin:at] = False
        self._draw(torch.cat(logits), slice(begin, at))
        self.age[begin:at] = [1] * (at - begin)
        return True

    # ---- one token -------------------------------------------------------------------------------------------------

    def _draw(self, logits: torch.Tensor, rows: slice) -> None:
        """Next token of these rows, and what is recorded of it. A row that is done stays as it is."""
        length, done, sampling = self.length[rows], self.done[rows], self.sampling
        forbid = length < sampling.min_new_tokens if sampling.min_new_tokens else None
        token, *numbers = sample_tokens(logits, position_keys(self.stream[rows], length), sampling, forbid_stop=forbid)
        token = torch.where(done, self.token[rows], token)
        self.token[rows] = token
        self.tokens[self.row[rows], length] = token
        self.numbers[self.row[rows], length] = torch.stack(numbers, -1).float()
        self.length[rows] = length = length + ~done
        self.done[rows] = done | (token[:, None] == self.stops).any(1) | (length >= self.new_tokens)

    def forward(self, n: int) -> None:
        """One more token for rows 0..n-1."""
        length = self.length[:n]
        self.attend.begin(length, max(self.age), min(self.age))
        positions = self.base[:n] + length - 1
        hidden = self.policy.step(self.token[:n], positions, self.attend)
        self._draw(all_logits(hidden, self.weight), slice(0, n))

    def _step(self) -> None:
        n = len(self.owner)
        if self.graphs is None:
            self.forward(n)
        else:
            self.graphs.replay(self, n)
        self.age = [age + 1 for age in self.age]

    def _steps_to_check(self) -> int:
        return max(1, min(CHECK_EVERY, self.new_tokens - min(self.age)))

    # ---- leaving ---------------------------------------------------------------------------------------------------

    def _retire(self) -> Iterator[list[Rollout]]:
        n = len(self.owner)
        done = self.done[:n].tolist()  # sync
        gone = [row for row in range(n) if done[row]]
        if not gone:
            return
        self._read(gone)
        left = n - len(gone)
        holes, movers = [r for r in gone if r < left], [r for r in range(left, n) if not done[r]]
        if holes:
            self.pools.move_rows(holes, movers, max(self.age))
            self.state[:, holes] = self.state[:, movers]
            self.done[holes] = False
            self.tokens[holes] = self.tokens[movers]
            self.numbers[holes] = self.numbers[movers]
            for values in (self.owner, self.completion, self.age):
                for hole, mover in zip(holes, movers):
                    values[hole] = values[mover]
        self.done[left:n] = True
        del self.owner[left:], self.completion[left:], self.age[left:]
        whole = [slot for slot in self.slots if len(slot.done) == self.group_size]
        self._free(whole)
        self._arrange()
        for slot in whole:
            yield sorted(slot.done, key=lambda rollout: rollout.completion)

    def _read(self, gone: list[int]) -> None:
        """Rollouts of the rows that are done. ValueError when a row had no token to draw."""
        tokens, numbers, lengths = self.tokens[gone].cpu(), self.numbers[gone].cpu(), self.length[gone].tolist()
        family, stops = self.policy.family, self.sampling.stop_ids
        for row, ids, values, length in zip(gone, tokens, numbers, lengths):
            slot, ids, values = self.owner[row], ids[:length].clone(), values[:length]
            if not bool(torch.isfinite(values).all()):
                raise ValueError(
                    f"prompt {self.first + slot.index}, completion {self.completion[row]}: the logits hold NaN or inf, "
                    "or every token is banned"
                )
            logp, entropy, log_kept = (column.clone() for column in values.unbind(1))
            finished = int(ids[-1]) in stops
            slot.done.append(Rollout(
                prompt=self.first + slot.index, completion=self.completion[row], inputs=slot.prompt,
                completion_ids=ids, loss_mask=torch.ones(length, dtype=torch.bool), logp_rollout=logp,
                log_kept=log_kept, entropy=entropy, text=family.decode(ids[:-1] if finished else ids),
                finished=finished,
            ))  # fmt: skip

    def _free(self, whole: list[_Slot]) -> None:
        """Give back the prompt slots of these; the last ones move into the holes."""
        left = len(self.slots) - len(whole)
        holes = [i for i, slot in enumerate(self.slots[:left]) if slot in whole]
        movers = [i for i in range(left, len(self.slots)) if self.slots[i] not in whole]
        if holes:
            self.pools.move_prompts(holes, movers, max(len(self.slots[i].prompt.ids) for i in movers))
            for hole, mover in zip(holes, movers):
                self.slots[hole] = self.slots[mover]
        del self.slots[left:]

    def _arrange(self) -> None:
        """Tell the attention which rows continue which prompt."""
        for slot in self.slots:
            slot.rows = []
        for row, slot in enumerate(self.owner):
            slot.rows.append(row)
        if self.owner:
            self.attend.arrange([slot.rows for slot in self.slots], [len(slot.prompt.ids) for slot in self.slots])
