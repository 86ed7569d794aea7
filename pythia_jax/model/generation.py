"""Generation: prompts in, continuations out, with seeds, stop strings and a look at the tokens.

What a row becomes depends on its prompt, its seed and the settings, not on its neighbours.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import jax
import numpy as np
from jaxtyping import Array, UInt32
from tokenizers import Tokenizer

from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.model.cache import DTYPES
from pythia_jax.model.parameters import Params
from pythia_jax.model.sampling import KEYS, Sampling, sampling
from pythia_jax.model.serving import MOST_STEPS, Ended, Row, serve

CHECKED_STEPS = 4
"""Steps between looks where text decides when a row ends: what is made beyond its end is lost."""


class GenerativeModel(Protocol):
    """What `generate` needs of a model; `pythia_jax.Model` is one."""

    @property
    def params(self) -> Params: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...
    @property
    def eod(self) -> int: ...


@dataclass(frozen=True)
class Continuation:
    """What came of a prompt.

    index: its place among the prompts. tokens: the new ones, the end-of-document token included
    where it was reached, a stop string not. logprobs: of each, in nats, under the model's own
    distribution: before temperature, penalty and cuts. text: the new text, up to a stop string,
    which may begin within a token; None if the model has no tokenizer.
    """

    index: int
    tokens: list[int]
    logprobs: list[float]
    ended: Ended
    text: str | None = None


def generate(
    model: GenerativeModel,
    prompts: str | Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int = 20,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    seed: int | Sequence[int] = 0,
    batch_size: int = 16,
    cache_dtype: str | None = None,
    on_tokens: Callable[[int, list[int]], object] | None = None,
    runtime: Runtime = Runtime(),
) -> list[list[int]]:
    """Continue prompts, each by up to `max_new_tokens`; the end-of-document token ends a row.

    As `continuations`, which see, when all are done: the new tokens of each prompt, in order.
    """
    found = continuations(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        stop=stop,
        seed=seed,
        batch_size=batch_size,
        cache_dtype=cache_dtype,
        on_tokens=on_tokens,
        runtime=runtime,
    )
    return [row.tokens for row in sorted(found, key=operator.attrgetter("index"))]


def continuations(
    model: GenerativeModel,
    prompts: str | Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int = 20,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    seed: int | Sequence[int] = 0,
    batch_size: int = 16,
    cache_dtype: str | None = None,
    on_tokens: Callable[[int, list[int]], object] | None = None,
    runtime: Runtime = Runtime(),
) -> Iterator[Continuation]:
    """Continue prompts; each comes when it is done, which is not in order.

    prompts: strings or lists of tokens, of unequal length. temperature 0.0 is greedy. top_k and
    top_p (Holtzman et al., 2020) keep the k most likely tokens, and the fewest whose probability
    reaches p, after the temperature. repetition_penalty (Keskar et al., 2019): above 1, tokens of
    the prompt and of what was made are less likely. stop: strings that end a row before them.
    seed: one for each prompt, or one number, of which each prompt gets its own by its place.
    batch_size: rows at a time; on a mesh, rounded up to a multiple of what rows are cut into. It
    takes memory and time alone. cache_dtype: of keys and values: `bfloat16` or `int8`, else that
    of the computation. on_tokens: called with a prompt's index and its next new tokens as they
    are made; with stop strings, once they are certain.

    On a mesh, iterate with it set (`jax.set_mesh`).

    Raises ValueError at once for an empty prompt, a token out of range, a prompt with no room
    left in the context, and impossible settings; NotFiniteError, on the way, for logits that are no
    numbers.
    """
    given = [prompts] if isinstance(prompts, str) else prompts
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    chosen = check_settings(
        model.tokenizer,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        stop=stop,
        batch_size=batch_size,
        cache_dtype=cache_dtype,
    )
    tokens = [_encode(prompt, i, model) for i, prompt in enumerate(given)]
    check_prompts(tokens, model.config, max_new_tokens)
    keys = _keys(seed, len(tokens))
    rows = [Row(i, row, key) for i, (row, key) in enumerate(zip(tokens, keys, strict=True))]
    watch = _Watch(model.tokenizer, stop, on_tokens)
    steps = CHECKED_STEPS if stop else MOST_STEPS
    if on_tokens is not None and len(rows) == 1:
        steps = 1  # Somebody reads along.
    served = serve(
        model.params,
        model.config,
        rows,
        chosen,
        max_new_tokens=max_new_tokens,
        eod=model.eod,
        batch_size=batch_size,
        cache_dtype=cache_dtype,
        runtime=runtime,
        steps=steps,
        look=watch.look,
    )
    return map(watch.done, served)


class NotFiniteError(ValueError):
    """A model gave no distribution for a token of the prompt in place `index`."""

    def __init__(self, index: int, token: int) -> None:
        self.index = index
        self.why = (
            f"the log-probability of new token {token} is no finite number: neither are the "
            "model's logits; look at its weights, or compute in a wider dtype"
        )
        super().__init__(f"prompt {index}: {self.why}")


class _Watch:
    """Looks at what is made: ends rows at stop strings, and passes tokens on as they come."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        stop: tuple[str, ...],
        on_tokens: Callable[[int, list[int]], object] | None,
    ) -> None:
        self._tokenizer, self._stop, self._on_tokens = tokenizer, stop, on_tokens
        self._told: dict[int, int] = {}

    def look(self, row: Row) -> None:
        wrong = np.flatnonzero(~np.isfinite(row.logprobs))
        if wrong.size:
            raise NotFiniteError(row.index, int(wrong[0]))
        certain = len(row.tokens)
        if self._stop:
            text = self._text(row.tokens)
            found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
            if found:
                row.ended, row.text = "stop", text[: min(found)]
                certain = self._within(row.tokens, row.text)
                del row.tokens[certain:], row.logprobs[certain:]
            elif row.ended is None and self._on_tokens is not None:
                certain = self._within(row.tokens, self._certain(text))
        told = self._told.get(row.index, 0)
        if self._on_tokens is not None and certain > told:
            self._on_tokens(row.index, row.tokens[told:certain])
            self._told[row.index] = certain

    def done(self, row: Row) -> Continuation:
        assert row.ended is not None
        self._told.pop(row.index, None)
        if row.text is None and self._tokenizer is not None:
            row.text = self._text(row.tokens)
        return Continuation(row.index, row.tokens, row.logprobs, row.ended, row.text)

    def _text(self, tokens: list[int]) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.decode(tokens)

    def _certain(self, text: str) -> str:
        """Without what a stop string may begin with, and half a character."""
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        begun = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return text[: len(text) - max(begun, default=0)]

    def _within(self, tokens: list[int], text: str) -> int:
        """How many tokens are wholly in the text, which theirs begins with."""
        count = len(tokens)
        while not text.startswith(self._text(tokens[:count])):
            count -= 1
        return count


def _encode(prompt: str | Sequence[int], row: int, model: GenerativeModel) -> list[int]:
    if not isinstance(prompt, str):
        try:
            if isinstance(prompt, bytes | bytearray):
                raise TypeError
            return [operator.index(token) for token in prompt]
        except TypeError:
            raise ValueError(
                f"prompt {row}: {prompt!r} is neither text nor a list of token ids"
            ) from None
    if model.tokenizer is None:
        raise ValueError(f"prompt {row} is text, and the model has no tokenizer; pass token lists")
    try:
        return encoded(prompt, model.tokenizer)
    except ValueError as error:
        raise ValueError(f"prompt {row}: {error}") from None


def encoded(text: str, tokenizer: Tokenizer) -> list[int]:
    """Its tokens. Raises ValueError for half of a surrogate pair, which is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape one, bytes of a shell be one
        raise ValueError(
            f"prompt is no text: {error.object[error.start]!r} is a lone surrogate"
        ) from None
    return tokenizer.encode(text).ids


def check_settings(
    tokenizer: Tokenizer | None,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float,
    stop: Sequence[str],
    batch_size: int,
    cache_dtype: str | None,
) -> Sampling:
    """How tokens are drawn. Raises ValueError for settings of `continuations` that cannot be."""
    chosen = sampling(temperature, top_k, top_p, repetition_penalty)
    for name, value, holds, need in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "at least 0"),
        ("batch_size", batch_size, batch_size >= 1, "at least 1"),
        ("stop", list(stop), all(stop), "strings that are not empty"),
        (
            "cache_dtype",
            cache_dtype,
            cache_dtype in (None, *DTYPES),
            f"one of {', '.join(DTYPES)}, or None for that of the computation",
        ),
    ):
        if not holds:
            raise ValueError(f"{name} must be {need}, and not {value}")
    if stop and tokenizer is None:
        raise ValueError("stop strings are found in text, and the model has no tokenizer")
    return chosen


def check_prompts(
    prompts: Sequence[Sequence[int]], config: ModelConfig, max_new_tokens: int
) -> None:
    """Raise ValueError, which names it by its place, for a prompt as `check_prompt` does."""
    for i, tokens in enumerate(prompts):
        try:
            check_prompt(tokens, config, max_new_tokens)
        except ValueError as error:
            raise ValueError(f"prompt {i}: {error}") from None


def check_prompt(tokens: Sequence[int], config: ModelConfig, max_new_tokens: int) -> None:
    """Raise ValueError for a prompt that is empty, not of the vocabulary, or too long."""
    if not len(tokens):
        raise ValueError("it is empty; give at least one token")
    wrong = next((token for token in tokens if not 0 <= token < config.vocab_size), None)
    if wrong is not None:
        raise ValueError(f"token {wrong} is not in the vocabulary of {config.vocab_size}")
    if len(tokens) + max_new_tokens > config.max_position_embeddings:
        raise ValueError(
            f"{len(tokens)} tokens and {max_new_tokens} new ones do not fit the context of "
            f"{config.max_position_embeddings}"
        )


def _keys(seed: int | Sequence[int], count: int) -> UInt32[np.ndarray, "count 2"]:
    """Data of each prompt's random key: that of its seed, or of the one seed and its place."""
    alone = np.ndim(seed) == 0
    seeds = np.atleast_1d(np.asarray(seed))
    if seeds.size and (seeds.dtype.kind not in "iu" or seeds.min() < 0 or seeds.max() >= 2**32):
        raise ValueError("seed must be from 0 to 2**32 - 1, a whole number, or one for each prompt")
    if not alone and seeds.shape != (count,):
        raise ValueError(f"seed: {len(seeds)} of them for {count} prompts; give one for each")
    # Filled up, so that few programs are compiled.
    places = np.arange(1 << max(count - 1, 0).bit_length(), dtype=np.uint32)
    padded = np.resize(seeds.astype(np.uint32), places.shape)
    return np.asarray(_key_data(padded, places, alone))[:count]


@partial(jax.jit, static_argnames="alone")
def _key_data(
    seeds: UInt32[np.ndarray, " some"], places: UInt32[np.ndarray, " some"], alone: bool
) -> UInt32[Array, "some 2"]:
    keys = jax.vmap(partial(jax.random.key, impl=KEYS))(seeds)
    if alone:
        keys = jax.vmap(jax.random.fold_in)(keys, places)
    return jax.random.key_data(keys)
