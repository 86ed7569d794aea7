"""Matrices in int8: one byte a weight and one float32 scale an output channel.

Symmetric absolute-maximum quantisation (Dettmers et al., 2022, section 2.1; no zero point): the
weights of output channel i are `scale[i] * values[i]`, `scale[i]` the largest of them over 127. A
`Quantized` stands in the tree of parameters where the float matrix stood, and the forward pass
multiplies by it: `matmul` for kernels and the unembedding, `rows` for the embedding. Nothing is
differentiated by it.

Activations are floats (weight-only), or int8 too, with a scale for each token that is found on the
way ("dynamic"; the vector-wise quantisation of the same paper, without its outliers).
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from pythia_jax import sharding
from pythia_jax.model.attention import exact
from pythia_jax.model.parameters import Parameter, Params, items, map_parameters

LARGEST = 127
"""-128 is left out, so that a matrix and its negative are quantised alike."""
_FLOAT32 = np.dtype(np.float32)
_NO_GRADIENTS = (
    "the model is in int8, which there are no gradients by: take the checkpoint that it was made "
    "from, or write it out in floats (pythia-jax convert MODEL DST)"
)
_DIGIT = 128
"""Base of the digits that `_by_digits` writes activations in."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scale"],
    meta_fields=["dynamic", "dtype"],
)
@dataclass(frozen=True)
class Quantized:
    """A matrix in int8, `values * scale[..., None]`, by output channel.

    values: `[..., out, in]`, turned round from a float kernel, as torch has it: integer products
    run along rows. scale: `[..., out]`. Of the embedding an output channel is a token. dynamic:
    whether what it is multiplied with is quantised too. dtype: the compute dtype, which `rows`
    come in.
    """

    values: Int[Array, "*layers out in"]
    scale: Float[Array, "*layers out"]
    dynamic: bool = False
    dtype: np.dtype = _FLOAT32


def quantize(
    weight: Float[np.ndarray, "*layers out in"],
) -> tuple[Int[np.ndarray, "*layers out in"], Float[np.ndarray, "*layers out"]]:
    """Values and scales of a matrix, `[..., out, in]`, each value the nearest there is.

    A channel of zeros has scale 1. Raises ValueError for numbers that are not finite.
    """
    wide = np.asarray(weight, np.float32)
    largest = np.abs(wide).max(axis=-1)
    if not np.isfinite(largest).all():
        raise ValueError("holds numbers that are not finite: there is no scale for them")
    scale = np.where(largest > 0, largest / np.float32(LARGEST), np.float32(1))
    # A subnormal scale would have lost bits that the division needs.
    scale = np.maximum(scale, np.finfo(np.float32).tiny)
    values = np.rint(wide / scale[..., None]).clip(-LARGEST, LARGEST)
    return values.astype(np.int8), scale


def shardings(params: Params, mesh: Mesh) -> Params:
    """Where each parameter lies on a mesh, those in int8 too (`parameters.shardings`)."""

    def leaf(parameter: Parameter, value: jax.Array | Quantized) -> NamedSharding | Quantized:
        if not isinstance(value, Quantized):
            return sharding.sharding(mesh, parameter.axes)
        values, scale = (sharding.sharding(mesh, part.axes) for part in parameter.int8)
        return replace(value, values=values, scale=scale)  # type: ignore[arg-type]

    return map_parameters(leaf, params)


def check_floats(params: Params) -> None:
    """Raise ValueError for a model in int8: there are no gradients by whole numbers."""
    if any(isinstance(value, Quantized) for _, value in items(params)):
        raise ValueError(_NO_GRADIENTS)


def kernel(weight: Quantized | Array) -> Float[Array, "*layers in out"]:
    """A kernel in floats, turned round as kernels are: for all but products."""
    if not isinstance(weight, Quantized):
        return weight
    return (weight.values.astype(jnp.float32) * weight.scale[..., None]).mT.astype(weight.dtype)


def in_floats(
    x: Float[Array, "*rows in"], weight: Quantized | Array
) -> tuple[Float[Array, "*rows in"], Float[Array, "in out"]]:
    """x and a kernel whose product in floats is what `matmul` gives: x is rounded as `dynamic`
    says."""
    if isinstance(weight, Quantized) and weight.dynamic:
        x = _rounded(x)
    return x, kernel(weight)


@jax.custom_jvp
def _rounded(x: jax.Array) -> jax.Array:
    whole, scale = whole_numbers(x, LARGEST)
    return (whole * scale).astype(x.dtype)


def whole_rows(weight: Quantized) -> Quantized:
    """An embedding or unembedding, `[vocab, in]`, cut by tokens alone."""
    values = sharding.constrain(weight.values, ("vocab", "stream"))
    return replace(weight, values=values, scale=sharding.constrain(weight.scale, ("vocab",)))


def rows(weight: Quantized, index: Int[Array, "*rows"]) -> Float[Array, "*rows in"]:
    """Output channels by number; NaN for a number that there is none of."""
    weight = whole_rows(weight)
    inside = (index >= 0) & (index < weight.values.shape[0])
    values = jnp.take(weight.values, index, axis=0, mode="clip").astype(jnp.float32)
    scale = jnp.where(inside, jnp.take(weight.scale, index, axis=0, mode="clip"), jnp.nan)
    return (values * scale[..., None]).astype(weight.dtype)


@jax.custom_jvp
def matmul(x: Float[Array, "*rows in"], weight: Quantized) -> Float[Array, "*rows out"]:
    """`x @ W.T`, float32. W is exactly what is stored; x is rounded as `dynamic` says.

    Weight-only, x is rounded to 1 / 32512 of the largest in its row on CPUs, which multiply int8
    far faster than they widen it, and not at all elsewhere, where the compiler widens the weights
    on their way to the product.

    Raises ValueError where it is differentiated: rounding has a derivative of 0.
    """
    flat = x.reshape(-1, x.shape[-1])
    if weight.dynamic:
        product = _by_digits(flat, weight.values, digits=1)
    else:
        product = jax.lax.platform_dependent(
            flat, weight.values, cpu=partial(_by_digits, digits=2), default=_widened
        )
    return (product * weight.scale).reshape(*x.shape[:-1], -1)


def _widened(x: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.einsum(
        "ri,oi->ro",
        x,
        values.astype(x.dtype),
        precision=exact(x),
        preferred_element_type=jnp.float32,
    )


def _by_digits(x: jax.Array, values: jax.Array, *, digits: int) -> jax.Array:
    """A product of integers: each row of x as int8 digits of base 128, one or two, and a scale.

    Digits are rows of their own, so that one product reads the weights once. Sums are exact: of
    `in` summands of at most 127² each, up to 133,000 fit int32.
    """
    whole, scale = whole_numbers(x, LARGEST * _DIGIT ** (digits - 1))
    high = jnp.round(whole / _DIGIT ** (digits - 1))
    parts = [high, whole - high * _DIGIT][:digits]
    # One row alone is multiplied without the integer instructions, and slower than two.
    if len(x) * digits == 1:
        parts.append(jnp.zeros_like(whole))
    stacked = jnp.concatenate(parts).astype(jnp.int8)
    sums = jax.lax.dot_general(
        stacked, values, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
    ).astype(jnp.float32)
    if digits == 1:
        return sums[: len(x)] * scale
    return (sums[: len(x)] * _DIGIT + sums[len(x) :]) * scale


def whole_numbers(x: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Whole numbers up to `most` and a scale for each row of x, both float32.

    Of a row with a number that is not finite the scale is none, and so is what it multiplies.
    """
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(axis=-1, keepdims=True) / most
    scale = jnp.where(scale == 0, 1, scale)
    return jnp.round(x / scale), jnp.where(jnp.isfinite(scale), scale, jnp.nan)


@_rounded.defjvp
@matmul.defjvp
def _refused(primals: tuple, tangents: tuple) -> tuple:
    raise ValueError(_NO_GRADIENTS)
