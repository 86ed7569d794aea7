"""One backward pass that leaves statistics of the linear layers, and no gradient of parameters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Float, Int

from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.model.gptneox import AnyArray, check_rows, hidden_states
from pythia_jax.model.loss import hidden_gradient
from pythia_jax.model.parameters import TABLE, Params
from pythia_jax.model.quantize import check_floats
from pythia_jax.model.sinks import Sink, Statistic
from pythia_jax.model.sites import site_shape

LINEAR = (
    "layers/attention/query_key_value",
    "layers/attention/dense",
    "layers/mlp/dense_h_to_4h",
    "layers/mlp/dense_4h_to_h",
)
"""The linear modules of the layers, in the order in which a layer has them."""


def collect(
    params: Params,
    tokens: Int[AnyArray, "batch seq+1"],
    config: ModelConfig,
    statistic: Statistic,
    *,
    modules: Sequence[str] = LINEAR,
    aux: Mapping[str, Any] | None = None,
    loss_weights: Float[AnyArray, "batch seq"] | None = None,
    labels: Int[AnyArray, "batch seq"] | None = None,
    runtime: Runtime = Runtime(),
) -> dict[str, Any]:
    """What `statistic` makes of each linear module's gradient, in one backward pass.

    The pass is that of Σ loss_weights x cross-entropy in nats (weights of 1 where none are
    given). statistic: `(inputs [batch, seq, in], cotangents [batch, seq, out], aux)` → a tree of
    arrays; called for each module, inside the scan over layers. Inputs and cotangents are in the
    compute dtype: accumulate in float32 (`preferred_element_type`).
    aux: {module: tree}, each array with a leading layer axis, of which the statistic gets one
    layer's; None for a module without. labels replace the next tokens.

    No gradient of parameters is formed, and of a statistic that reduces what it makes, no more
    than one module's of one layer exists at a time. First derivatives only.

    Returns {module: the statistic's tree with a leading layer axis}.

    Raises ValueError for an unknown module, shapes that do not fit.
    """
    statistics = {module: (statistic, (aux or {}).get(module)) for module in modules}
    unknown = [module for module in aux or {} if module not in statistics]
    if unknown:
        raise ValueError(f"aux for {unknown[0]!r}, which is not among the modules collected")
    done = backward(
        params,
        tokens,
        config,
        statistics,
        loss_weights=loss_weights,
        labels=labels,
        runtime=runtime,
    )
    return done.pull(done.d_hidden)["sinks"]


class Backward(NamedTuple):
    """A forward pass, the loss's gradient by its last hidden states, and the way back.

    hidden, d_hidden: `[batch, seq, hidden]`. pull: from such a gradient to what was watched,
    `{"sinks": {module: tree}, "norms": {path: array}, "embed": [batch, seq, hidden]}`; it can be
    called more than once. labels, weights: `[batch, seq]`, as they entered the loss.
    """

    hidden: jax.Array
    d_hidden: jax.Array
    pull: Callable[[jax.Array], dict[str, Any]]
    labels: jax.Array
    weights: jax.Array


def backward(
    params: Params,
    tokens: AnyArray,
    config: ModelConfig,
    statistics: Mapping[str, tuple[Statistic, Any]],
    *,
    norms: Mapping[str, jax.Array] | None = None,
    embed: bool = False,
    loss_weights: AnyArray | None = None,
    labels: AnyArray | None = None,
    runtime: Runtime = Runtime(),
) -> Backward:
    """The forward pass, and the loss's part of the backward pass.

    statistics: module → (statistic, aux). norms: arrays that take the place of LayerNorms'
    parameters and are differentiated; a batch axis makes of one gradient each row's. embed:
    whether to differentiate the site `embed`.
    """
    check_rows(tokens, config)
    check_floats(params)
    tokens, labels, weights = _targets(tokens, labels, loss_weights, params, runtime)
    batch, seq = tokens.shape
    dtype = jnp.dtype(runtime.dtype or params["embed_in"]["embedding"].dtype)
    sinks = {
        module: _sink(module, statistic, aux, (batch, seq), config, dtype)
        for module, (statistic, aux) in statistics.items()
    }
    wide = jnp.promote_types(dtype, jnp.float32)
    watched = {
        "sinks": {module: sink.zero for module, sink in sinks.items()},
        "norms": dict(norms or {}),
        "embed": jnp.zeros(site_shape("embed", config, batch, seq), wide) if embed else None,
    }

    def run(watched: dict[str, Any]) -> jax.Array:
        flat = {**traverse_util.flatten_dict(params, sep="/"), **watched["norms"]}
        hidden, _ = hidden_states(
            traverse_util.unflatten_dict(flat, sep="/"),
            tokens,
            config,
            taps={"embed": watched["embed"]} if embed else None,
            watched={
                module: Sink(watched["sinks"][module], sink.aux, sink.statistic)
                for module, sink in sinks.items()
            },
            runtime=runtime,
        )
        return hidden

    hidden, pull = jax.vjp(run, watched)
    kernel = params["embed_out"]["kernel"]
    d_hidden = hidden_gradient(hidden, kernel, weights, labels, runtime.loss_chunk)
    return Backward(hidden, d_hidden, lambda cotangent: pull(cotangent)[0], labels, weights)


def _targets(
    tokens: AnyArray,
    labels: AnyArray | None,
    weights: AnyArray | None,
    params: Params,
    runtime: Runtime,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Inputs, labels and weights, `[batch, seq]` each."""
    inputs = jnp.asarray(tokens[:, :-1])
    dtype = runtime.dtype or params["embed_in"]["embedding"].dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    labels = jnp.asarray(tokens[:, 1:] if labels is None else labels)
    weights = jnp.ones(inputs.shape, wide) if weights is None else jnp.asarray(weights, wide)
    for name, array in (("labels", labels), ("loss_weights", weights)):
        if array.shape != inputs.shape:
            raise ValueError(f"{name} of shape {array.shape}: {inputs.shape} is wanted")
    return inputs, labels, weights


def _sink(
    module: str,
    statistic: Statistic,
    aux: Any,
    rows: tuple[int, int],
    config: ModelConfig,
    dtype: jnp.dtype,
) -> Sink:
    if module not in LINEAR:
        raise ValueError(f"there is no linear module {module!r}: choose from {', '.join(LINEAR)}")
    layers = config.num_hidden_layers
    wrong = [a.shape for a in jax.tree.leaves(aux) if jnp.ndim(a) < 1 or jnp.shape(a)[0] != layers]
    if wrong:
        raise ValueError(
            f"aux of {module!r} has shape {wrong[0]}: {layers} layers are wanted first"
        )
    _, width_in, width_out = next(p for p in TABLE if p.path == f"{module}/kernel").shape(config)
    shapes = [jax.ShapeDtypeStruct((*rows, width), dtype) for width in (width_in, width_out)]
    of_layer = jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a)[1:], a.dtype), aux)
    made = jax.eval_shape(statistic, *shapes, of_layer)
    zero = jax.tree.map(lambda a: jnp.zeros((layers, *a.shape), a.dtype), made)
    return Sink(zero, aux, statistic)
