"""The next token: the likeliest, or drawn.

In the order of transformers' `generate`: repetition penalty, temperature, top-k, top-p.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

KEYS = "threefry2x32"
"""The generator of random keys, whatever JAX is set to: a seed's text stays the same."""

_COLDEST = 1e-37
"""Below, float32 divides by 0."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_p", "repetition_penalty"],
    meta_fields=["top_k"],
)
@dataclass(frozen=True)
class Sampling:
    """How a token is chosen; None leaves a part out. Made by `sampling`, which checks it.

    temperature: None takes the likeliest token. To `jax.jit` the numbers are arguments; which of
    them there are, and top_k, decide the program.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None


def sampling(
    temperature: float, top_k: int | None, top_p: float | None, repetition_penalty: float
) -> Sampling:
    """The settings as `continuations` takes them; what changes nothing is left out.

    Raises ValueError for what cannot be.
    """
    for name, value, holds, need in (
        (
            "temperature",
            temperature,
            math.isfinite(temperature) and (temperature == 0 or temperature >= _COLDEST),
            f"0 (greedy), or finite and at least {_COLDEST:g}",
        ),
        ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "more than 0 and at most 1"),
        (
            "repetition_penalty",
            repetition_penalty,
            math.isfinite(repetition_penalty) and repetition_penalty > 0,
            "more than 0, and finite; 1 is none",
        ),
    ):
        if not holds:
            raise ValueError(f"{name} must be {need}, and not {value}")
    penalty = None if repetition_penalty == 1 else repetition_penalty
    if temperature == 0:
        return Sampling(repetition_penalty=penalty)
    return Sampling(temperature, top_k, None if top_p == 1 else top_p, penalty)


def draw(
    logits: Float[Array, "batch vocab"],
    seen: Bool[Array, "batch vocab"] | None,
    keys: UInt32[Array, "batch 2"] | None,
    chosen: Sampling,
) -> tuple[Int[Array, " batch"], Float[Array, " batch"]]:
    """One token a row, and its log-probability in nats under the logits as they came.

    seen: the tokens of each row so far, for the repetition penalty. keys: data of a random key
    for each row, unless the likeliest token is taken.
    """
    scores = processed(logits, seen, chosen)
    if chosen.temperature is None:
        token = likeliest(scores)
    else:
        assert keys is not None
        token = jax.vmap(jax.random.categorical)(jax.random.wrap_key_data(keys, impl=KEYS), scores)
    taken = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token.astype(jnp.int32), taken - jax.nn.logsumexp(logits, axis=-1)


def likeliest(logits: Float[Array, "*rows vocab"]) -> Int[Array, "*rows"]:
    """The first of the largest, as `argmax` gives it, of which XLA makes a slow loop on CPUs. Where
    a logit is NaN, so is every log-probability, and the token means nothing."""
    vocab = logits.shape[-1]
    is_largest = logits == logits.max(axis=-1, keepdims=True)
    first = jnp.where(is_largest, jnp.arange(vocab, dtype=jnp.int32), vocab - 1)
    return first.min(axis=-1)


def processed(
    logits: Float[Array, "batch vocab"],
    seen: Bool[Array, "batch vocab"] | None,
    chosen: Sampling,
) -> Float[Array, "batch vocab"]:
    """Logits of the distribution that is drawn from; minus infinity for what is cut away."""
    if chosen.repetition_penalty is not None:
        assert seen is not None
        logits = jnp.where(seen, _penalised(logits, chosen.repetition_penalty), logits)
    if chosen.temperature is None:
        return logits
    # The shift changes no probability; without it a low temperature would overflow.
    logits = (logits - logits.max(axis=-1, keepdims=True)) / chosen.temperature
    if chosen.top_k is not None:
        logits = _cut(logits, jnp.ones_like(logits), chosen.top_k)
    if chosen.top_p is not None:
        logits = _cut(logits, jax.nn.softmax(logits), chosen.top_p)
    return logits


def _penalised(logits: jax.Array, penalty: float) -> jax.Array:
    """Less likely by a factor, whichever sign the logit has (Keskar et al., 2019, section 4.1)."""
    return jnp.where(logits > 0, logits / penalty, logits * penalty)


def _cut(
    logits: Float[Array, "batch vocab"], weights: Float[Array, "batch vocab"], enough: float
) -> Float[Array, "batch vocab"]:
    """Cut away each token of which those likelier have weights that sum to `enough` or more.

    logits: 0 and less. Weights of 1 make it top-k; probabilities, top-p (Holtzman et al., 2020,
    section 3.1). The last logit that stays is found by halving: as whole numbers, the bits of
    positive floats keep their order, and 31 sums over the vocabulary are much faster than sorting
    it.
    """
    far = jax.lax.bitcast_convert_type(jnp.abs(logits).astype(jnp.float32), jnp.int32)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        likelier = jnp.sum(weights, axis=-1, keepdims=True, where=far < middle)
        stays = likelier < enough
        return jnp.where(stays, middle, low), jnp.where(stays, high, middle)

    nearest = jnp.zeros_like(far[:, :1])
    beyond = jnp.full_like(nearest, 2**31 - 1)
    last, _ = jax.lax.fori_loop(0, 31, halve, (nearest, beyond))
    return jnp.where(far <= last, logits, -jnp.inf)
