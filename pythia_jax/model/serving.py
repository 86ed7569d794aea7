"""Continuous batching: any number of rows in a fixed number of slots, taken again when free.

The host seats prompts, the longest first, and takes all slots on by a few tokens at a time; what is
compiled of it is in `pythia_jax.model.slots`. Widths and group sizes are rounded, so that few
programs are.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import jax
import numpy as np
from jaxtyping import UInt32

from pythia_jax import sharding
from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.model import decode, slots
from pythia_jax.model.parameters import Params
from pythia_jax.model.sampling import Sampling

Ended = Literal["eod", "stop", "length"]
MOST_STEPS = 16
"""Tokens of each row that are made between two looks at them, at most."""

PROMPT_TOKENS = 2**14
"""Of prompts run together, on each part that rows are cut into; a sixteenth of it on CPUs. What a
layer needs meanwhile grows with them."""


@dataclass(eq=False)
class Row:
    """A prompt on its way: what was made of it so far, and why it ended if it has.

    key: data of its random key, where one is used. text: what it comes to, if whoever looks at it
    sets it.
    """

    index: int
    prompt: Sequence[int]
    key: UInt32[np.ndarray, "2"] = field(default_factory=partial(np.zeros, 2, np.uint32))
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: Ended | None = None
    text: str | None = None

    def take(self, tokens: list[int], logprobs: list[float], most: int, eod: int) -> None:
        """Tokens and their log-probabilities, up to the row's end."""
        for token, logprob in zip(tokens, logprobs, strict=True):
            self.tokens.append(token)
            self.logprobs.append(logprob)
            if token == eod or len(self.tokens) == most:
                self.ended = "eod" if token == eod else "length"
                return


def serve(
    params: Params,
    config: ModelConfig,
    rows: Sequence[Row],
    chosen: Sampling,
    *,
    max_new_tokens: int,
    eod: int,
    batch_size: int,
    cache_dtype: str | None = None,
    runtime: Runtime = Runtime(),
    steps: int = MOST_STEPS,
    look: Callable[[Row], None] = lambda row: None,
) -> Iterator[Row]:
    """Rows as they end. look: called with each row that has got tokens; it may end the row.

    steps: tokens made of a row between such calls, up to `MOST_STEPS`.
    """
    waiting = deque(sorted(rows, key=lambda row: -len(row.prompt)))
    if max_new_tokens == 0:
        for row in waiting:
            row.ended = "length"
        yield from waiting
        return
    if not rows:
        return
    settings = (chosen, max_new_tokens, eod)
    batch = _Batch(params, config, waiting, settings, batch_size, cache_dtype, runtime)
    while waiting or any(batch.seats):
        for place, tokens, logprobs in batch.admit() or batch.advance(steps):
            row = batch.seats[place]
            if row is not None:
                row.take(tokens, logprobs, max_new_tokens, eod)
                look(row)
                if row.ended is not None:
                    batch.seats[place] = None
                    yield row


Made = list[tuple[int, list[int], list[float]]]
"""Slots, and the tokens and log-probabilities that were made in each."""


class _Batch:
    """The slots, who sits in them, and who waits."""

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        waiting: deque[Row],
        settings: tuple[Sampling, int, int],
        batch_size: int,
        cache_dtype: str | None,
        runtime: Runtime,
    ) -> None:
        """Room for the longest of those that wait, who is the first.

        settings: how tokens are drawn, how many at most, and which ends a document.
        """
        self.params = decode.serving(params, runtime)
        self.config, self.runtime = config, runtime
        self.waiting, self.settings = waiting, settings
        self.shards = sharding.parts_of_rows()
        chosen, most, _ = settings
        count = self._whole(min(batch_size, len(waiting)))
        self.seats: list[Row | None] = [None] * count
        self.state = slots.empty(
            config,
            count,
            _width(len(waiting[0].prompt) + most, config),
            cache_dtype or decode.dtype_of(self.params),
            chosen.repetition_penalty is not None,
        )

    def admit(self) -> Made:
        """Seat some of those that wait, if there is room, and run their prompts."""
        free = [place for place, row in enumerate(self.seats) if row is None]
        wanted = min(len(free), len(self.waiting))
        if not wanted:
            return []
        size = self._group(wanted, _width(len(self.waiting[0].prompt), self.config))
        places = free[: min(size, wanted)]
        rows = [self.waiting.popleft() for _ in places]
        for place, row in zip(places, rows, strict=True):
            self.seats[place] = row
        # Filled up with the first of them, whose place then gets the same twice.
        given = [*zip(places, rows, strict=True)]
        given += given[:1] * (size - len(rows))
        lengths = np.array([len(row.prompt) for _, row in given], np.int32)
        tokens = np.zeros((size, _width(lengths.max(), self.config)), np.int32)
        for filled, (_, row) in zip(tokens, given, strict=True):
            filled[: len(row.prompt)] = row.prompt
        self.state, new, logprobs = slots.admit(
            self.params,
            self.state,
            tokens,
            lengths,
            np.stack([row.key for _, row in given]),
            np.array([place for place, _ in given], np.int32),
            *self.settings,
            config=self.config,
            runtime=self.runtime,
        )
        made = zip(places, np.asarray(new).tolist(), np.asarray(logprobs).tolist(), strict=False)
        return [(place, [token], [logprob]) for place, token, logprob in made]

    def advance(self, steps: int) -> Made:
        """Take the seated rows on by up to so many steps, fewer if one ends and others wait."""
        self.state, new, logprobs, done = slots.advance(
            self.params,
            self.state,
            np.array([row is not None for row in self.seats]),
            steps,
            bool(self.waiting),
            *self.settings,
            config=self.config,
            room=MOST_STEPS,
        )
        new, logprobs = (np.asarray(x)[: int(done)].T.tolist() for x in (new, logprobs))
        return [*zip(range(len(self.seats)), new, logprobs, strict=True)]

    def _whole(self, rows: int) -> int:
        """Rounded up to what rows are cut into."""
        return -(-rows // self.shards) * self.shards

    def _group(self, wanted: int, width: int) -> int:
        """Prompts run together, of so many tokens each: all slots' worth, or the next lower power
        of four, of no more than `PROMPT_TOKENS`."""
        tokens = PROMPT_TOKENS // 16 if jax.default_backend() == "cpu" else PROMPT_TOKENS
        most = max(1, tokens // width) * self.shards
        if self._whole(wanted) == len(self.seats) <= most:
            return len(self.seats)
        size = self.shards
        while size * 4 <= min(wanted, most):
            size *= 4
        return size


def _width(length: int, config: ModelConfig) -> int:
    """Rounded up to a quarter of the next power of two, 16 at least; no more than the context."""
    step = max(16, (1 << (int(length) - 1).bit_length()) // 4)
    return min(-(-int(length) // step) * step, config.max_position_embeddings)
