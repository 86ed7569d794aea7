"""Sums over a stream of batches of what one backward pass says of each linear module.

Statistics of `pythia_jax.interp.collecting.collect`; each is called for one module of one layer.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pythia_jax import sharding
from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.interp.collecting import collect
from pythia_jax.model.attention import exact
from pythia_jax.model.gptneox import AnyArray, check_tokens, hidden_states, unembed
from pythia_jax.model.parameters import Params
from pythia_jax.model.sinks import Statistic, Units

Rows = Int[AnyArray, "batch seq+1"]


def sample_labels(
    params: Params,
    tokens: Rows,
    config: ModelConfig,
    key: jax.Array,
    *,
    runtime: Runtime = Runtime(),
) -> Int[Array, "batch seq"]:
    """A next token for every position, drawn from the model given the true tokens before it.

    The logits of `runtime.loss_chunk` positions exist at a time; what is drawn does not depend on
    how many those are.
    """
    hidden, _ = hidden_states(params, jnp.asarray(tokens[:, :-1]), config, runtime=runtime)
    batch, seq, _ = hidden.shape

    def draw(given: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, position = given
        own = jax.random.fold_in(key, position)
        return jax.random.categorical(own, unembed(params, x)).astype(jnp.int32)

    length = max(1, min(seq, runtime.loss_chunk // batch))
    drawn = jax.lax.map(draw, (hidden.swapaxes(0, 1), jnp.arange(seq)), batch_size=length)
    return sharding.constrain(drawn.swapaxes(0, 1), ("batch", "seq"))


def summed(
    params: Params,
    batches: Iterable[Rows],
    config: ModelConfig,
    statistic: Statistic,
    *,
    modules: tuple[str, ...],
    aux: Any = None,
    key: jax.Array | None = None,
    runtime: Runtime = Runtime(),
) -> tuple[dict[str, Any], int, int]:
    """What `collect` gives, summed over batches; and how many rows and tokens there were.

    key: draws labels from the model; None keeps those of the data.

    Raises ValueError for tokens that do not fit, and where there is no batch.
    """
    collected = partial(
        _collected, statistic=statistic, config=config, modules=modules, runtime=runtime
    )
    total, rows, tokens = None, 0, 0
    for number, batch in enumerate(batches):
        check_tokens(batch, config)
        own = None if key is None else jax.random.fold_in(key, number)
        part = collected(params, jnp.asarray(batch), aux, own)
        # One at a time: each part is as large as the sums.
        total = jax.block_until_ready(part if total is None else _added(total, part))
        rows, tokens = rows + batch.shape[0], tokens + batch.shape[0] * (batch.shape[1] - 1)
    if total is None:
        raise ValueError("there is no batch to fit factors to")
    return total, rows, tokens


@partial(jax.jit, donate_argnums=0)
def _added(total: Any, part: Any) -> Any:
    return jax.tree.map(jnp.add, total, part)


@partial(jax.jit, static_argnames=("statistic", "config", "modules", "runtime"))
def _collected(
    params: Params,
    tokens: jax.Array,
    aux: Any,
    key: jax.Array | None,
    *,
    statistic: Statistic,
    config: ModelConfig,
    modules: tuple[str, ...],
    runtime: Runtime,
) -> dict[str, Any]:
    labels = None if key is None else sample_labels(params, tokens, config, key, runtime=runtime)
    return collect(
        params,
        tokens,
        config,
        statistic,
        modules=modules,
        aux=aux,
        labels=labels,
        runtime=runtime,
    )


def covariances(inputs: jax.Array, cotangents: jax.Array, _: None) -> dict[str, jax.Array]:
    """Σ a aᵀ, Σ a and Σ g gᵀ over tokens.

    The column of the bias is by itself, for a width + 1 could not be cut evenly over devices.
    """
    return {
        "activation": _spread(_outer(inputs), 0),
        "activation_sum": Units().sums(inputs).sum(axis=0),
        "gradient": _spread(_outer(cotangents), 0),
    }


def _outer(x: jax.Array) -> jax.Array:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("bsi,bsj->ij", x, x, precision=exact(x), preferred_element_type=wide)


def squares(inputs: jax.Array, cotangents: jax.Array, _: None) -> dict[str, jax.Array]:
    """Sums over rows of the squared gradients of kernel and bias."""
    kernel, bias = Units().products(inputs, cotangents), Units().sums(cotangents)
    return {"kernel": (kernel**2).sum(axis=0), "bias": (bias**2).sum(axis=0)}


def squares_in_basis(inputs: jax.Array, cotangents: jax.Array, aux: Any) -> dict[str, jax.Array]:
    """Σ (Q_Aᵀ G Q_S)² over rows, `[in + 1, out]`."""
    kernel, bias = Units().products(inputs, cotangents), Units().sums(cotangents)
    product = partial(jnp.einsum, precision=exact(kernel))
    turned = product("bio,ik->bko", kernel, aux["kernel"])
    turned = turned + bias[:, None] * aux["bias"][:, None]
    turned = product("bko,op->bkp", turned, aux["gradient"])
    return {"squares": _spread((turned**2).sum(axis=0), 1)}


def projected_moments(inputs: jax.Array, cotangents: jax.Array, sides: Any) -> dict[str, jax.Array]:
    """Σ φ φᵀ over rows, φ being P_L G P_Rᵀ, its rows one after another."""
    rows = Units().projections(inputs, cotangents, sides)
    rows = rows.reshape(rows.shape[0], -1)
    return {"projected": jnp.matmul(rows.T, rows, precision=exact(rows))}


def _spread(x: jax.Array, axis: int) -> jax.Array:
    """`x` cut along an axis over `fsdp`, where that goes."""
    mesh = sharding.current()
    if mesh is None or x.shape[axis] % mesh.shape["fsdp"]:
        return x
    return sharding.constrain(x, ["hidden" if i == axis else "stream" for i in range(x.ndim)])
