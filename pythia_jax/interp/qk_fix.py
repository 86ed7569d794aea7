"""The QK fix of AtP*: effects of queries and keys by way of the attention pattern.

A query or key acts on the model through softmax alone, and where softmax saturates its gradient
says nothing of what a patched one would do. So the pattern is recomputed with the patched value,
and only what follows the pattern is taken to be linear. Source: Kramár et al., 2024
(arXiv 2403.00745, section 3.1.1).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pythia_jax.configs import ModelConfig
from pythia_jax.model import attention

Heads = Float[Array, "batch seq heads head"]
Gradient = Float[Array, "batch heads query key"]
Effects = tuple[Float[Array, "batch seq heads"], Float[Array, "batch heads"]]


def of_queries(
    q: Heads, k: Heads, patched: Heads, gradient: Gradient, config: ModelConfig
) -> Effects:
    """Effect of patching each query of one layer alone, and of patching all of them at once.

    q, k: unrotated, of the corrupt run; patched: the clean queries. gradient: of the metric at the
    corrupt pattern. Rows of a pattern do not know of each other: the effect of all is the sum.
    """
    new, old = (_softmax(_scores(queries, k, config)) for queries in (patched, q))
    each = ((new - old) * gradient).sum(axis=-1).transpose(0, 2, 1)
    return each, each.sum(axis=1)


def of_keys(q: Heads, k: Heads, patched: Heads, gradient: Gradient, config: ModelConfig) -> Effects:
    """Effect of patching each key of one layer alone, and of patching all of them at once.

    As `of_queries`, with the clean keys. A patched key changes one column of scores. In a row of
    the pattern it moves its own probability from p to p', and all others keep their proportions, so
    the effect is (p' - p) (its gradient - the mean gradient of the others, by their probabilities):
    no pattern is formed for each key.
    """
    old, new = (_scores(q, keys, config) for keys in (k, patched))
    pattern = _softmax(old)
    jointly = ((_softmax(new) - pattern) * gradient).sum(axis=(-2, -1))
    others, mean = _all_but_one(old, gradient)
    moved = jax.nn.sigmoid(new - others) - jax.nn.sigmoid(old - others)
    each = jnp.where(_visible(old), moved * (gradient - mean), 0).sum(axis=-2)
    return each.transpose(0, 2, 1), jointly


def _scores(q: Heads, k: Heads, config: ModelConfig) -> Float[Array, "batch heads query key"]:
    positions = np.arange(q.shape[1])
    q, k = (attention.rotate(x, positions, config) for x in (q, k))
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum(
        "bqhd,bkhd->bhqk",
        q * config.head_size**-0.5,
        k,
        preferred_element_type=wide,
        precision=attention.exact(q),
    )
    return jnp.where(_visible(scores), scores, jnp.finfo(wide).min)


def _softmax(scores: jax.Array) -> jax.Array:
    return jax.nn.softmax(scores, axis=-1)


def _visible(scores: jax.Array) -> np.ndarray:
    return np.tril(np.ones(scores.shape[-2:], bool))


def _all_but_one(scores: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For each entry of the last axis, of all others: the logarithm of the sum of exponentials of
    their scores, and the mean of their values weighted by these.

    Built up from both ends, with nothing subtracted: of a head that looks at one key alone, a
    difference would keep no digit of what the others have.
    """

    def join(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        mean = b[1] + (a[1] - b[1]) * jax.nn.sigmoid(a[0] - b[0])
        return jnp.logaddexp(a[0], b[0]), mean

    last = scores.ndim - 1
    edge = jnp.full((*scores.shape[:-1], 1), jnp.finfo(scores.dtype).min)
    edges = (edge, jnp.zeros_like(edge))

    def one_side(reverse: bool) -> tuple[jax.Array, ...]:
        whole = jax.lax.associative_scan(join, (scores, values), reverse=reverse, axis=last)
        if reverse:
            parts = [(x[..., 1:], none) for x, none in zip(whole, edges, strict=True)]
        else:
            parts = [(none, x[..., :-1]) for x, none in zip(whole, edges, strict=True)]
        return tuple(jnp.concatenate(part, axis=-1) for part in parts)

    others, mean = join(one_side(reverse=False), one_side(reverse=True))
    return others, mean
