"""Sinks: statistics of a dense layer's gradient, formed where the backward pass goes by.

A sink stands beside a layer's kernel and bias in the tree of parameters. Its `zero` adds nothing
to the output; the derivative with respect to it is *defined* to be a statistic of the layer's
inputs and of the cotangents of its outputs: the gradient of each row, its projection, its squared
norm, a Kronecker factor. So a statistic comes out of `jax.vjp` as any gradient does, through scan,
rematerialisation, jit and a sharded mesh, and no other trace of the gradient is kept.

The layer's own kernel and bias get no gradient where there is a sink, and second derivatives do
not go through it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float, Int

from pythia_jax.model.attention import exact
from pythia_jax.model.parameters import Params

Statistic = Callable[[jax.Array, jax.Array, Any], Any]
"""`statistic(inputs [batch, seq, in], cotangents [batch, seq, out], aux)` → a tree of arrays."""
Affine = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@partial(jax.tree_util.register_dataclass, data_fields=["zero", "aux"], meta_fields=["statistic"])
@dataclass(frozen=True)
class Sink:
    """What to make of one dense layer's gradient.

    zero: arrays shaped and typed as the statistic is. aux: what the statistic is given besides
    inputs and cotangents. Over stacked layers both have a leading layer axis.
    """

    zero: Any
    aux: Any
    statistic: Statistic


@dataclass(frozen=True)
class Units:
    """What gradients are summed over: whole rows, the parts of a row, or single positions.

    count: parts of a row; None is the row whole. each: every position is a unit of its own.
    Otherwise `slots`, `[…, seq]`, name the part of each position; one that is outside of
    0 … count - 1 belongs to none.
    """

    count: int | None = None
    each: bool = False

    def products(
        self,
        inputs: Float[Array, "*rows seq in"],
        cotangents: Float[Array, "*rows seq out"],
        slots: Int[Array, "*rows seq"] | None = None,
    ) -> Float[Array, "*units in out"]:
        """Gradient of a kernel by unit, at least float32."""
        sums = partial(
            jnp.einsum,
            precision=exact(inputs),
            preferred_element_type=jnp.promote_types(inputs.dtype, jnp.float32),
        )
        if self.each:
            return sums("...si,...so->...sio", inputs, cotangents)
        if self.count is None:
            return sums("...si,...so->...io", inputs, cotangents)
        return sums("...su,...si,...so->...uio", self._member(slots, inputs), inputs, cotangents)

    def projections(
        self,
        inputs: Float[Array, "*rows seq in"],
        cotangents: Float[Array, "*rows seq out"],
        sides: Mapping[str, Any],
        slots: Int[Array, "*rows seq"] | None = None,
    ) -> Float[Array, "*units p p"]:
        """P_L G P_Rᵀ, G `[out, in]` a kernel's gradient, by unit, at least float32.

        sides: `left [out, p]` and `right [in, p]`. No G is formed.
        """
        left, right = projected(cotangents, sides["left"]), projected(inputs, sides["right"])
        return self.products(left, right, slots)

    def sums(
        self,
        cotangents: Float[Array, "*rows seq out"],
        slots: Int[Array, "*rows seq"] | None = None,
    ) -> Float[Array, "*units out"]:
        """Gradient of a bias by unit, at least float32."""
        cotangents = cotangents.astype(jnp.promote_types(cotangents.dtype, jnp.float32))
        if self.each:
            return cotangents
        if self.count is None:
            return cotangents.sum(axis=-2)
        member = self._member(slots, cotangents)
        return jnp.einsum("...su,...so->...uo", member, cotangents, precision=exact(cotangents))

    def _member(self, slots: jax.Array | None, like: jax.Array) -> jax.Array:
        assert slots is not None and self.count is not None
        return jax.nn.one_hot(slots, self.count, dtype=like.dtype)


def projected(
    x: Float[Array, "*rows width"], side: Float[Array, "width p"]
) -> Float[Array, "*rows p"]:
    """`x @ side`, at least float32."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    side = jnp.asarray(side, x.dtype)
    return jnp.matmul(x, side, precision=exact(x), preferred_element_type=wide)


def inserted(params: Params, sinks: Mapping[str, Sink]) -> Params:
    """The tree with a sink beside the kernel of each module named, `layers/mlp/dense_h_to_4h`."""
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    for module, sink in sinks.items():
        if f"{module}/kernel" not in flat:
            raise ValueError(f"there is no dense layer {module!r} to put a sink beside")
        flat[f"{module}/sink"] = sink
    return traverse_util.unflatten_dict(flat, sep="/")


def dense(
    affine: Affine, x: Float[Array, "batch seq in"], weights: Params
) -> Float[Array, "batch seq out"]:
    """`affine(x, kernel, bias)`, whose backward pass fills the sink in `weights`."""
    sink = weights["sink"]
    return _dense(
        affine, sink.statistic, x, weights["kernel"], weights["bias"], sink.zero, sink.aux
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dense(
    affine: Affine,
    statistic: Statistic,
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    zero: Any,
    aux: Any,
) -> jax.Array:
    return affine(x, kernel, bias)


def _forward(
    affine: Affine,
    statistic: Statistic,
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    zero: Any,
    aux: Any,
) -> tuple[jax.Array, tuple]:
    return affine(x, kernel, bias), (x, kernel, aux)


def _backward(affine: Affine, statistic: Statistic, kept: tuple, cotangent: jax.Array) -> tuple:
    x, kernel, aux = kept
    rows = cotangent.reshape(-1, cotangent.shape[-1])
    dx = jnp.matmul(rows, kernel.T, precision=exact(rows)).reshape(x.shape)
    return dx, None, None, statistic(x, cotangent, aux), None


_dense.defvjp(_forward, _backward)
