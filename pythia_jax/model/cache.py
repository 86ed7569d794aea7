"""The key/value cache of one layer, and how one query a row reads it.

Slot i is position i: a row needs neither padding on the left nor a mask of its own. What lies
beyond its position is not visible to it, and is overwritten when the row gets there. Heads stand
before slots, so that each head's keys lie together, as products read them.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pythia_jax import sharding
from pythia_jax.configs import ModelConfig
from pythia_jax.model.attention import exact
from pythia_jax.model.quantize import LARGEST, whole_numbers

AnyArray = Array | np.ndarray

AXES = ("batch", "heads", "seq", "head")
DTYPES = ("bfloat16", "int8")
"""What a cache may be kept in, beside the dtype of the computation."""


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=[])
@dataclass(frozen=True)
class Cached:
    """Keys or values of a layer, `[batch, heads, slots, head]`.

    scale: float32 `[batch, heads, slots]`, of each row, head and slot where values are int8: they
    stand for `values * scale[..., None]`. Elsewhere None.
    """

    values: Array
    scale: Float[Array, "batch heads slots"] | None


Layer = tuple[Cached, Cached]
"""Keys, rotated, and values."""
Cache = tuple[Layer, ...]


def empty(config: ModelConfig, batch: int, slots: int, dtype: str) -> Cache:
    """A cache of all layers, nothing in it yet. dtype: of the computation, or of `DTYPES`."""
    shape = (batch, config.num_attention_heads, slots, config.head_size)

    def side() -> Cached:
        scale = jnp.zeros(shape[:-1], jnp.float32) if dtype == "int8" else None
        return _placed(Cached(jnp.zeros(shape, dtype), scale))

    return tuple((side(), side()) for _ in range(config.num_hidden_layers))


def put(
    cached: Cached,
    new: Float[Array, "batch heads head"],
    position: Int[Array, " batch"] | Int[Array, ""],
) -> Cached:
    """One slot a row. position: each row's own, or one for all, which is written as a slice."""

    def write(into: jax.Array, value: jax.Array) -> jax.Array:
        if position.ndim == 0:
            return jax.lax.dynamic_update_slice_in_dim(into, value[:, :, None], position, axis=2)
        return into.at[jnp.arange(len(value)), :, position].set(value)

    return _placed(jax.tree.map(write, cached, _stored(new, cached)))


def fill(
    layer: Layer,
    keys: Float[Array, "some heads width head"],
    values: Float[Array, "some heads width head"],
    rows: Int[AnyArray, " some"],
) -> Layer:
    """A layer with the first `width` slots of some rows filled.

    A row may be named twice, with the same content.
    """

    def filled(cached: Cached, new: Array) -> Cached:
        def write(into: jax.Array, value: jax.Array) -> jax.Array:
            return into.at[rows, :, : value.shape[2]].set(value)

        return _placed(jax.tree.map(write, cached, _stored(new, cached)))

    return filled(layer[0], keys), filled(layer[1], values)


def attend(
    q: Float[Array, "batch heads head"],
    keys: Cached,
    values: Cached,
    visible: Bool[Array, "batch slots"] | Bool[Array, "1 slots"],
) -> Float[Array, "batch heads head"]:
    """Softmax attention of one query a row over the visible slots, scaled by 1/sqrt(head)."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    q = q * (q.shape[-1] ** -0.5)
    product = partial(jnp.einsum, preferred_element_type=wide, precision=exact(q))
    scores = product("bhd,bhkd->bhk", q, keys.values.astype(q.dtype))
    if keys.scale is not None:
        scores = scores * keys.scale
    scores = jnp.where(visible[:, None], scores, jnp.finfo(wide).min)
    pattern = jax.nn.softmax(scores, axis=-1)
    if values.scale is not None:
        pattern = pattern * values.scale
    return product("bhk,bhkd->bhd", pattern.astype(q.dtype), values.values.astype(q.dtype)).astype(
        q.dtype
    )


def _stored(x: jax.Array, like: Cached) -> Cached:
    """`[…, head]` in what `like` is kept in."""
    if like.scale is None:
        return Cached(x.astype(like.values.dtype), None)
    whole, scale = whole_numbers(x, LARGEST)
    return Cached(whole.astype(jnp.int8), scale[..., 0])


def _placed(cached: Cached) -> Cached:
    return jax.tree.map(lambda x: sharding.constrain(x, AXES[: x.ndim]), cached)
