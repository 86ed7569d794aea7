"""A fixed number of slots, each with a row that is being continued: what is compiled of generation.

`admit` runs prompts and seats them in free slots; `advance` takes all slots on by some tokens. Both
give the state back in the memory that it came in. What they tell is on every device, and so in
every process.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from pythia_jax import sharding
from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.model import cache, decode, gptneox
from pythia_jax.model.cache import AnyArray, Cache
from pythia_jax.model.parameters import Params
from pythia_jax.model.sampling import KEYS, Sampling, draw


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["caches", "token", "position", "drawn", "live", "keys", "seen"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Slots:
    """token: the last one drawn, which is not in the cache yet; position: where it belongs.
    drawn: how many tokens were. live: whether there is a row that has not ended. keys: data of
    each row's random key. seen: tokens of the prompt and drawn, if repeating them is penalised.
    """

    caches: Cache
    token: Int[Array, " batch"]
    position: Int[Array, " batch"]
    drawn: Int[Array, " batch"]
    live: Bool[Array, " batch"]
    keys: UInt32[Array, "batch 2"]
    seen: Bool[Array, "batch vocab"] | None


@partial(jax.jit, static_argnames=("config", "batch", "slots", "dtype", "penalised"))
def empty(config: ModelConfig, batch: int, slots: int, dtype: str, penalised: bool) -> Slots:
    """Nobody is there. slots: positions of each row. dtype: of the cache (`cache.empty`)."""
    state = Slots(
        caches=cache.empty(config, batch, slots, dtype),
        token=jnp.zeros(batch, jnp.int32),
        position=jnp.zeros(batch, jnp.int32),
        drawn=jnp.zeros(batch, jnp.int32),
        live=jnp.zeros(batch, bool),
        keys=jnp.zeros((batch, 2), jnp.uint32),
        seen=jnp.zeros((batch, config.vocab_size), bool) if penalised else None,
    )
    return _settled(state)


@partial(jax.jit, static_argnames=("config", "runtime"), donate_argnames="state")
def admit(
    params: Params,
    state: Slots,
    tokens: Int[AnyArray, "some width"],
    lengths: Int[AnyArray, " some"],
    keys: UInt32[AnyArray, "some 2"],
    rows: Int[AnyArray, " some"],
    sampling: Sampling,
    most: int,
    eod: int,
    *,
    config: ModelConfig,
    runtime: Runtime,
) -> tuple[Slots, Int[Array, " some"], Float[Array, " some"]]:
    """Run prompts, and draw the first token of each.

    rows: the slots that they go to; one may be named twice, with the same prompt. most: new tokens
    of a row. Returns tokens and their log-probabilities beside the state.
    """
    hidden, caches = decode.prefill(params, tokens, state.caches, rows, config, runtime)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    seen = None if state.seen is None else _marked(tokens, lengths, config)
    token, logprob = _draw(params, last, jnp.zeros_like(lengths), jnp.asarray(keys), seen, sampling)
    if state.seen is not None and seen is not None:
        seen = state.seen.at[rows].set(seen.at[jnp.arange(len(rows)), token].set(True))
    state = Slots(
        caches=caches,
        token=state.token.at[rows].set(token),
        position=state.position.at[rows].set(lengths),
        drawn=state.drawn.at[rows].set(1),
        live=state.live.at[rows].set((token != eod) & (most > 1)),
        keys=state.keys.at[rows].set(keys),
        seen=seen,
    )
    return _settled(state), _told(token), _told(logprob)


@partial(jax.jit, static_argnames=("config", "room"), donate_argnames="state")
def advance(
    params: Params,
    state: Slots,
    seated: Bool[AnyArray, " batch"],
    steps: int,
    waiting: bool,
    sampling: Sampling,
    most: int,
    eod: int,
    *,
    config: ModelConfig,
    room: int,
) -> tuple[Slots, Int[Array, "room batch"], Float[Array, "room batch"], Int[Array, ""]]:
    """Take every live row on by up to `steps` tokens, at most `room`.

    It ends sooner when all rows have ended or, if others are waiting, one has. seated: the slots
    whose rows are still wanted.

    Returns, beside the state, tokens and log-probabilities by step, and how many steps were done.
    A row's last token is its end-of-document, or its `most`-th; what follows means nothing.
    """
    began = state.live & seated
    batch = len(state.token)
    start = (
        jnp.int32(0),
        replace(state, live=began),
        jnp.zeros((room, batch), jnp.int32),
        jnp.zeros((room, batch), jnp.float32),
    )

    def going(carry: tuple) -> jax.Array:
        done, state, _, _ = carry
        free = (began & ~state.live).any()
        return (done < steps) & state.live.any() & ~(waiting & free)

    def one(carry: tuple) -> tuple:
        done, state, tokens, logprobs = carry
        hidden, caches = decode.step(params, state.token, state.position, state.caches, config)
        token, logprob = _draw(params, hidden, state.drawn, state.keys, state.seen, sampling)
        # Of a row that has ended nothing moves.
        drawn = state.drawn + state.live
        seen = state.seen
        if seen is not None:
            seen = seen.at[jnp.arange(batch), token].set(True)
        state = Slots(
            caches=caches,
            token=jnp.where(state.live, token, state.token),
            position=state.position + state.live,
            drawn=drawn,
            live=state.live & (token != eod) & (drawn < most),
            keys=state.keys,
            seen=seen,
        )
        return done + 1, _settled(state), tokens.at[done].set(token), logprobs.at[done].set(logprob)

    done, state, tokens, logprobs = jax.lax.while_loop(going, one, start)
    return state, _told(tokens), _told(logprobs), done


def _marked(
    tokens: Int[AnyArray, "some width"], lengths: Int[AnyArray, " some"], config: ModelConfig
) -> Bool[Array, "some vocab"]:
    """The tokens that stand in each prompt."""
    # Past its end the last is repeated: nothing is marked that is not in it.
    places = jnp.minimum(jnp.arange(tokens.shape[1]), lengths[:, None] - 1)
    inside = jnp.take_along_axis(jnp.asarray(tokens), places, axis=1)
    none = jnp.zeros((len(tokens), config.vocab_size), bool)
    return none.at[jnp.arange(len(tokens))[:, None], inside].set(True)


def _draw(
    params: Params,
    hidden: Float[Array, "some hidden"],
    drawn: Int[Array, " some"],
    keys: UInt32[Array, "some 2"],
    seen: Bool[Array, "some vocab"] | None,
    sampling: Sampling,
) -> tuple[Int[Array, " some"], Float[Array, " some"]]:
    """A token a row: the random key of its n-th comes from the row's own and n."""
    logits = sharding.constrain(gptneox.unembed(params, hidden), ("batch", "stream"))
    if sampling.temperature is not None:
        own = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys, impl=KEYS), drawn)
        keys = jax.random.key_data(own)
    return draw(logits, seen, keys, sampling)


def _settled(state: Slots) -> Slots:
    """The state where it always lies, so that it can be given back in the same memory."""

    def place(x: jax.Array) -> jax.Array:
        return sharding.constrain(x, ("batch", "stream")[: x.ndim])

    small = {
        name: jax.tree.map(place, value) for name, value in vars(state).items() if name != "caches"
    }
    return replace(state, **small)


def _told(x: jax.Array) -> jax.Array:
    return sharding.constrain(x, ("seq", "stream")[: x.ndim])
