"""Continuous batching: texts join and leave a running batch at every step, and each is generated as it would be alone.

Every text is a row of one shared key/value cache. Rows are aligned at the end: the newest token of each is in the same column,
and what is before a row's first token is marked as padding. Positions and masks count real tokens only, so a row's answer does not
depend on the others, except for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fieldguide.models.generation.few_row_linear import few_rows_mode
from fieldguide.models.generation.sampling import GenerativeModel, Sampling
from fieldguide.models.generation.stop_strings import StreamDecoder
from fieldguide.models.generation.token_rules import TokenRules
from fieldguide.models.layers.kv_cache import Cache

MIN_CAPACITY = 128  # columns of the shared cache
RANDOM_NUMBERS = 256  # drawn at once


class SlotCache(Cache):
    """A cache whose rows join and leave. `keys`, `values`, `states`, `real` and `count` are views of the rows in use."""

    def __init__(self, slots: int, like: Cache):
        self.like, self.slots = like, slots
        self.buffers: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.all_states = [state.new_zeros(slots, *state.shape[1:]) for state in like.states]
        self.marks = torch.zeros(slots, 0, dtype=torch.bool, device=like.real.device)
        self.counts = torch.zeros(slots, dtype=torch.int64, device=like.real.device)
        self.rows, self.used, self.start, self.padded, self.cross = 0, 0, 0, False, None
        self.show()

    def show(self) -> None:
        """Set the views after rows have joined, left or moved."""
        self.keys, self.values = ([buffer[: self.rows] for buffer in buffers] for buffers in self.buffers)
        self.states = [state[: self.rows] for state in self.all_states]
        self.real, self.count = self.marks[: self.rows], self.counts[: self.rows]
        self.padded = bool((self.count != self.used).any())

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.count.max()) if self.rows else 0

    def move(self, used: int, capacity: int) -> None:
        """Move all rows so that they end in column `used`, in buffers of `capacity` columns."""
        longest = self.longest
        capacity = max(capacity, self.marks.shape[1])
        moved: list[list[Tensor]] = []
        for old, like in zip(self.buffers, (self.like.keys, self.like.values)):
            new = []
            for layer, sample in enumerate(like):
                buffer = sample.new_zeros(self.slots, sample.shape[1], capacity, sample.shape[3])
                if self.rows:
                    buffer[: self.rows, :, used - longest : used] = old[layer][: self.rows, :, self.used - longest : self.used]
                new.append(buffer)
            moved.append(new)
        marks = self.marks.new_zeros(self.slots, capacity)
        if self.rows:
            marks[: self.rows, used - longest : used] = self.marks[: self.rows, self.used - longest : self.used]
        self.buffers, self.marks, self.used = (moved[0], moved[1]), marks, used
        self.show()

    def make_room(self, most: int) -> None:
        """Make room for one more column; `most` is the largest number of columns."""
        if self.used < min(self.marks.shape[1], most):
            return
        longest = self.longest
        self.move(longest, min(most, max(MIN_CAPACITY, 2 * longest)))

    def join(self, row: Cache, most: int) -> None:
        """Add a row that was read alone into a cache of its own."""
        tokens = row.used
        if not self.rows and tokens < self.marks.shape[1]:
            self.used = tokens
        elif tokens > self.used or not self.rows:
            self.move(tokens, min(most, max(MIN_CAPACITY, 2 * tokens)))
        index, columns = self.rows, slice(self.used - tokens, self.used)
        self.rows += 1
        for buffers, others in zip(self.buffers, (row.keys, row.values)):
            for buffer, other in zip(buffers, others):
                buffer[index, :, columns] = other[0, :, :tokens]
        for state, one in zip(self.all_states, row.states):
            state[index] = one[0]
        self.marks[index] = False
        self.marks[index, columns] = True
        self.counts[index] = tokens
        self.show()

    def leave(self, index: int) -> None:
        """Remove a row; the last one takes its place."""
        last = self.rows - 1
        if index != last:
            for buffer in (*self.buffers[0], *self.buffers[1], *self.all_states, self.marks, self.counts):
                buffer[index] = buffer[last]
        self.rows = last
        if not last:
            self.used = 0
        self.show()


@dataclass(eq=False)
class SlotRow:
    """A text that is generated: its prompt, how tokens are chosen, when it ends, and who is told.

    `on_piece` receives pieces of text, `on_end` is called once: with "stop" (an end token or a stop string), "length", "cancelled", or
    an exception. `row_id` selects the random numbers, as in `generate`.
    """

    prompt: Sequence[int]
    sampling: Sampling
    decoder: StreamDecoder
    eos_token_ids: Sequence[int]
    max_new_tokens: int
    seed: int = 0
    row_id: int = 0
    rules: TokenRules | None = None
    on_piece: Callable[[str], None] = lambda piece: None
    on_end: Callable[[str | BaseException], None] = lambda reason: None
    is_cancelled: Callable[[], bool] = lambda: False
    history: list[int] = field(default_factory=list)
    steps: int = 0
    numbers: list[float] = field(default_factory=list)
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        self.generator.manual_seed(self.seed * 1_000_003 + self.row_id)
        self.rules = self.rules if self.rules is not None and self.rules.is_active else None

    @property
    def is_plain(self) -> bool:
        """Whether the next token depends on the logits alone, and not on the tokens before."""
        return self.rules is None and self.sampling.repetition == 1

    def draw(self) -> float:
        """Return the next random number of the row."""
        if self.sampling.temperature == 0:
            return 0.0
        if not self.numbers:
            drawn = torch.rand(RANDOM_NUMBERS, generator=self.generator).tolist()
            self.numbers = drawn[::-1]
        return self.numbers.pop()

    def choose(self, logits: Tensor) -> int:  # 1 V
        """Return the next token, given the tokens before it."""
        history = torch.tensor([self.history], device=logits.device)
        sampling = self.sampling
        if self.rules is not None:
            is_last = self.steps == self.max_new_tokens - 1
            logits = self.rules.apply(sampling.penalize_repetition(logits, history), history, self.steps, is_last)
            sampling = replace(sampling, repetition=1.0)
        return int(sampling.choose(logits, history, torch.tensor([self.draw()], device=logits.device)))


class SlotEngine:
    """Generates texts in a shared batch of at most `slots` rows. All methods are called by one thread."""

    def __init__(self, network: GenerativeModel, slots: int):
        self.network, self.slots = network, slots
        self.window: int = network.config.length
        self.device = next(network.parameters()).device
        self.rows: list[SlotRow] = []
        self.cache: SlotCache | None = None
        self.generated = 0  # tokens

    @property
    def is_active(self) -> bool:
        """Whether there is a text to generate."""
        return bool(self.rows)

    @property
    def has_room(self) -> bool:
        """Whether another text can join."""
        return len(self.rows) < self.slots

    @torch.inference_mode()
    def admit(self, row: SlotRow) -> None:
        """Read the prompt of a text and choose its first token; unless that ends it, it takes part in the next step."""
        row.history = list(row.prompt)[-(self.window - 1) :]
        self.read(row, row.history)

    def read(self, row: SlotRow, tokens: Sequence[int]) -> None:
        """Read the newest tokens of a row into a cache of its own, choose a token, and let the row join."""
        own = self.network.new_cache(1, len(tokens))
        logits = self.network.last(torch.tensor([list(tokens)], device=self.device), None, own)
        if self.accept(row, row.choose(logits)):
            if self.cache is None:
                self.cache = SlotCache(self.slots, own)
            self.cache.join(own, self.window)
            self.rows.append(row)

    @torch.inference_mode()
    def step(self) -> None:
        """Generate one token of every text; those that end, or were cancelled, leave."""
        self.drop([row for row in self.rows if row.is_cancelled()], "cancelled")
        if not self.rows or self.cache is None:
            return
        if full := [row for row, used in zip(self.rows, self.cache.count.tolist()) if used >= self.window]:
            for row in full:  # read the newest half again, as `generate` does
                self.remove(row)
                self.read(row, row.history[-(self.window // 2) :])
            return
        self.cache.make_room(self.window)
        rows = list(self.rows)
        tokens = torch.tensor([[row.history[-1]] for row in rows], device=self.device)
        with few_rows_mode(len(rows), self.device):
            logits = self.network.last(tokens, None, self.cache)
        for row, token in zip(rows, self.choose(rows, logits)):
            if not self.accept(row, token):
                self.remove(row)

    def choose(self, rows: Sequence[SlotRow], logits: Tensor) -> list[int]:  # B V
        """Return the next token of each row; rows with the same options are computed together."""
        found: dict[int, int] = {}
        groups: dict[Sampling, list[int]] = {}
        for i, row in enumerate(rows):
            if row.is_plain:
                groups.setdefault(row.sampling, []).append(i)
            else:
                found[i] = row.choose(logits[i : i + 1])
        for sampling, members in groups.items():
            numbers = torch.tensor([rows[i].draw() for i in members], device=self.device)
            some = logits if len(members) == len(rows) else logits[members]
            nothing = torch.full((len(members), 1), -1, device=self.device)
            found |= dict(zip(members, sampling.choose(some, nothing, numbers).tolist()))
        return [found[i] for i in range(len(rows))]

    def accept(self, row: SlotRow, token: int) -> bool:
        """Add a token to a row; return whether the row goes on."""
        row.steps += 1
        self.generated += 1
        reason = ""
        try:
            if token in row.eos_token_ids:
                reason = "stop"
            else:
                row.history.append(token)
                if piece := row.decoder.push(token):
                    row.on_piece(piece)
                reason = "stop" if row.decoder.stopped else "length" if row.steps >= row.max_new_tokens else ""
            if reason:
                if rest := row.decoder.finish():
                    row.on_piece(rest)
                row.on_end(reason)
        except Exception as error:  # noqa: BLE001  # a fault of one text must not stop the others
            row.on_end(error)
            return False
        return not reason

    def drop(self, rows: Sequence[SlotRow], reason: str | BaseException) -> None:
        """Remove rows and tell them why."""
        for row in rows:
            self.remove(row)
            row.on_end(reason)

    def remove(self, row: SlotRow) -> None:
        """Remove a row."""
        if row not in self.rows:
            return
        index = self.rows.index(row)
        last = self.rows.pop()
        if last is not row:
            self.rows[index] = last
        if self.cache is not None:
            self.cache.leave(index)
