"""Generation with a key/value cache, compiled whole: one prefill, then a loop of single tokens.

Prompts of unequal length stand left-aligned in one array. Slot i of the cache is position i, so a
row needs neither padding on the left nor a mask of its own: what lies beyond its position is not
visible to it, and is overwritten when the row gets there.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tokenizers import Tokenizer

from pythia_jax import sharding
from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.model import attention
from pythia_jax.model.gptneox import (
    AnyArray,
    block,
    cast,
    embed,
    hidden_states,
    layer_norm,
    run_layers,
    unembed,
)
from pythia_jax.model.parameters import Params
from pythia_jax.model.sites import Hooks

Cache = Float[Array, "layer batch slots heads head"]


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


def generate(
    model: GenerativeModel,
    prompts: str | Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int = 20,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    runtime: Runtime = Runtime(),
) -> list[list[int]]:
    """Continue prompts, each by up to `max_new_tokens`; the end-of-document token ends a row.

    prompts: strings or lists of tokens, of unequal length. temperature 0.0 is greedy. top_k and
    top_p (Holtzman et al., 2020) keep the k most likely tokens, and the fewest whose probability
    reaches p, after the temperature. The same seed gives the same text.

    Returns the new tokens of each row, the end-of-document token included where it was reached.
    Raises ValueError for an empty prompt, a token out of range, a prompt with no room left in
    the context, and impossible settings.
    """
    config = model.config
    rows = [_encode(prompt, i, model) for i, prompt in enumerate(_as_list(prompts))]
    _check(rows, config, max_new_tokens, temperature, top_k, top_p, seed)
    if not rows or max_new_tokens == 0:
        return [[] for _ in rows]
    lengths = np.array([len(row) for row in rows], np.int32)
    # Lengths are rounded up, so that few programs are compiled.
    width = min(_round_up(int(lengths.max())), config.max_position_embeddings)
    tokens = np.zeros((len(rows), width), np.int32)
    for row, filled in zip(rows, tokens, strict=True):
        filled[: len(row)] = row
    new = _generate(
        model.params,
        tokens,
        lengths,
        jax.random.key(seed),
        jnp.float32(temperature),
        jnp.float32(1.0 if top_p is None else top_p),
        config=config,
        runtime=runtime,
        max_new_tokens=max_new_tokens,
        eod=model.eod,
        sampling=("greedy" if temperature == 0 else "sample", top_k, top_p is not None),
    )
    return [_until_eod(row, model.eod) for row in np.asarray(new).tolist()]


def _as_list(prompts: str | Sequence[str | Sequence[int]]) -> Sequence[str | Sequence[int]]:
    return [prompts] if isinstance(prompts, str) else prompts


def _encode(prompt: str | Sequence[int], row: int, model: GenerativeModel) -> list[int]:
    if not isinstance(prompt, str):
        try:
            return [operator.index(token) for token in prompt]
        except TypeError:
            raise ValueError(
                f"prompt {row}: {prompt!r} is neither text nor a list of token ids"
            ) from None
    if model.tokenizer is None:
        raise ValueError(f"prompt {row} is text, and the model has no tokenizer; pass token lists")
    return model.tokenizer.encode(prompt).ids


def _check(
    rows: list[list[int]],
    config: ModelConfig,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> None:
    for name, holds, need in (
        ("max_new_tokens", max_new_tokens >= 0, "at least 0"),
        ("temperature", temperature >= 0, "at least 0"),
        ("top_k", top_k is None or top_k >= 1, "at least 1"),
        ("seed", 0 <= seed < 2**32, "from 0 to 2**32 - 1"),
        ("top_p", top_p is None or 0 < top_p <= 1, "more than 0 and at most 1"),
    ):
        if not holds:
            raise ValueError(f"{name} must be {need}")
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompt {i} is empty; give at least one token")
        wrong = [token for token in row if not 0 <= token < config.vocab_size]
        if wrong:
            raise ValueError(
                f"prompt {i}: token {wrong[0]} is not in the vocabulary of {config.vocab_size}"
            )
        if len(row) + max_new_tokens > config.max_position_embeddings:
            raise ValueError(
                f"prompt {i}: {len(row)} tokens and {max_new_tokens} new ones do not fit the "
                f"context of {config.max_position_embeddings}"
            )


def _round_up(length: int) -> int:
    """The next multiple of an eighth of the next power of two, and of 16 at least."""
    step = max(16, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step


def _until_eod(row: list[int], eod: int) -> list[int]:
    return row[: row.index(eod) + 1] if eod in row else row


@functools.partial(
    jax.jit, static_argnames=("config", "runtime", "max_new_tokens", "eod", "sampling")
)
def _generate(
    params: Params,
    tokens: Int[AnyArray, "batch width"],
    lengths: Int[AnyArray, " batch"],
    key: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    *,
    config: ModelConfig,
    runtime: Runtime,
    max_new_tokens: int,
    eod: int,
    sampling: tuple[str, int | None, bool],
) -> Int[Array, "batch new"]:
    """New tokens; after a row's end-of-document token, more of the same."""
    slots = min(tokens.shape[1] + max_new_tokens, config.max_position_embeddings)
    hidden, keys, values = prefill(params, tokens, config, runtime, slots)
    params = cast(params, runtime)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]

    def pick(hidden: jax.Array, step: jax.Array) -> jax.Array:
        own = jax.random.fold_in(key, step)
        return sample(unembed(params, hidden), own, temperature, top_p, sampling)

    new = jnp.full((tokens.shape[0], max_new_tokens), eod, jnp.int32)
    first = pick(last, jnp.int32(0))

    def unfinished(carry: tuple) -> jax.Array:
        step, _, ended, *_ = carry
        return (step < max_new_tokens) & ~ended.all()

    def advance(carry: tuple) -> tuple:
        step, token, ended, new, keys, values = carry
        hidden, keys, values = decode_step(
            params, token, lengths + step - 1, keys, values, config, runtime
        )
        token = jnp.where(ended, eod, pick(hidden, step))
        new = new.at[:, step].set(token)
        return step + 1, token, ended | (token == eod), new, keys, values

    start = (jnp.int32(1), first, first == eod, new.at[:, 0].set(first), keys, values)
    made = jax.lax.while_loop(unfinished, advance, start)[3]
    return sharding.constrain(made, ("seq", "seq"))  # to every device, and so to every process


def greedy(
    params: Params,
    prompts: Int[AnyArray, "batch prompt"],
    config: ModelConfig,
    *,
    new_tokens: int,
    never: int | None = None,
    runtime: Runtime = Runtime(),
) -> Int[Array, "batch new"]:
    """The likeliest tokens after prompts of one length, which all go on in step; for `jax.jit`.

    never: a token that is not picked, however likely. On a mesh each device has its own rows.
    """
    width = prompts.shape[1]
    params = cast(params, runtime)
    hidden, keys, values = prefill(params, prompts, config, runtime, width + new_tokens)
    cache = ("layers", "batch", "seq", "heads", "head")
    keys, values = (sharding.constrain(x, cache) for x in (keys, values))

    def pick(hidden: jax.Array) -> jax.Array:
        logits = sharding.constrain(unembed(params, hidden), ("batch", "vocab"))
        if never is not None:
            logits = logits.at[:, never].set(-jnp.inf)
        return sharding.constrain(logits.argmax(axis=-1).astype(jnp.int32), ("batch",))

    def advance(carry: tuple, position: jax.Array) -> tuple[tuple, jax.Array]:
        token, keys, values = carry
        hidden, keys, values = decode_step(params, token, position, keys, values, config, runtime)
        token = pick(hidden)
        return (token, keys, values), token

    first = pick(hidden[:, -1])
    positions = jnp.arange(width, width + new_tokens - 1)
    _, later = jax.lax.scan(advance, (first, keys, values), positions)
    return jnp.concatenate([first[:, None], later.T], axis=1)


def prefill(
    params: Params,
    tokens: Int[AnyArray, "batch width"],
    config: ModelConfig,
    runtime: Runtime,
    slots: int,
) -> tuple[Float[Array, "batch width hidden"], Cache, Cache]:
    """Run the prompts; final hidden states, and a cache with `slots` positions.

    Keys are cached unrotated as the site `attn.k` gives them, and rotated here.
    """
    hidden, captured = hidden_states(
        params, tokens, config, capture=("attn.k", "attn.v"), runtime=runtime
    )
    positions = np.arange(tokens.shape[1])
    keys = jax.vmap(lambda k: attention.rotate(k, positions, config))(captured["attn.k"])
    room = [(0, 0), (0, 0), (0, slots - tokens.shape[1]), (0, 0), (0, 0)]
    return hidden, jnp.pad(keys, room), jnp.pad(captured["attn.v"], room)


def decode_step(
    params: Params,
    token: Int[Array, " batch"],
    position: Int[Array, " batch"] | Int[Array, ""],
    keys: Cache,
    values: Cache,
    config: ModelConfig,
    runtime: Runtime,
) -> tuple[Float[Array, "batch hidden"], Cache, Cache]:
    """One token a row: final hidden state, and the cache grown by it.

    position: each row's own, or one for all of them, which is written to the cache as a slice.
    `params` are already in the compute dtype.
    """
    batch = token.shape[0]
    rows = jnp.arange(batch)
    x = embed(params, token)[:, None]
    visible = jnp.arange(keys.shape[2])[None] <= position[..., None]

    def put(cache: jax.Array, new: jax.Array) -> jax.Array:
        if position.ndim == 0:
            return jax.lax.dynamic_update_slice_in_dim(cache, new, position, axis=1)
        return cache.at[rows, position].set(new[:, 0])

    site = Hooks((), None, None, config, batch, 1).at()

    def layer(x: jax.Array, scanned: tuple) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        weights, k_cache, v_cache = scanned
        grown = []

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            q, k = (attention.rotate(a, position[..., None], config) for a in (q, k))
            grown.extend((put(k_cache, k), put(v_cache, v)))
            return attention.attend_cached(q, grown[0], grown[1], visible)

        x = block(weights, x, config, attend, site)
        return x, (grown[0], grown[1])

    run = run_layers(layer, Runtime(scan_layers=runtime.scan_layers), config.num_hidden_layers)
    x, (keys, values) = run(x, (params["layers"], keys, values))
    x = layer_norm(x, params["final_layer_norm"], config.layer_norm_eps)
    return x[:, 0], keys, values


def sample(
    logits: Float[Array, "batch vocab"],
    key: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    sampling: tuple[str, int | None, bool],
) -> Int[Array, " batch"]:
    """One token a row: the likeliest, or drawn after temperature, top-k and top-p."""
    kind, top_k, nucleus = sampling
    if kind == "greedy":
        return logits.argmax(axis=-1).astype(jnp.int32)
    logits = logits / temperature
    lowest = jnp.finfo(logits.dtype).min
    if top_k is not None:
        kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, lowest, logits)
    if nucleus:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(ordered, axis=-1)
        # A token stays if those likelier than it have not reached p yet.
        before = jnp.cumsum(probability, axis=-1) - probability
        kept = jnp.where(before < top_p, ordered, jnp.inf)
        logits = jnp.where(logits < kept.min(axis=-1, keepdims=True), lowest, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
