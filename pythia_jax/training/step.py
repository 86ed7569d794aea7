"""The train state and the train step: one pure function that everything else calls."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from pythia_jax import sharding
from pythia_jax.configs import RunConfig
from pythia_jax.model import parameters
from pythia_jax.model.loss import loss
from pythia_jax.model.parameters import Parameter, Params, init_parameters, map_parameters
from pythia_jax.training import loss_scale
from pythia_jax.training.loss_scale import LossScale
from pythia_jax.training.optimizer import optimizer, restarted


@struct.dataclass
class TrainState:
    """All that training carries from step to step; everything float32 but the counters.

    step: batches taken so far, which is also the number of the checkpoint that this state is.
    loss_scale: of float16, else None. halted: a step gave no number and `on_nonfinite` is `stop`;
    no later step changes anything.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    loss_scale: LossScale | None
    halted: Bool[Array, ""]

    @property
    def updates(self) -> Int[Array, ""]:
        """Updates made so far: the place in the learning-rate schedule. Skipped steps make none."""
        return self.opt_state[-1].count


def init_state(config: RunConfig) -> TrainState:
    """Checkpoint 0: fresh parameters from `training.seed`, an optimizer that has seen nothing.

    On a mesh (`jax.set_mesh`, inside `jax.jit`) each device makes its own part alone.
    """
    assert config.model is not None
    params = init_parameters(config.model, jax.random.key(config.training.seed))
    return _placed(
        config,
        TrainState(
            step=jnp.zeros([], jnp.int32),
            params=params,
            opt_state=optimizer(config.optimizer, config.training.steps).init(params),
            loss_scale=loss_scale.initial() if config.training.precision == "float16" else None,
            halted=jnp.zeros([], bool),
        ),
    )


def abstract_state(config: RunConfig, mesh: Mesh | None = None) -> TrainState:
    """Shapes and dtypes of the state, without its memory; on a mesh, also where each part lies."""
    state = jax.eval_shape(partial(init_state, config))
    if mesh is None:
        return state
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        state,
        state_shardings(config, mesh),
    )


def state_shardings(config: RunConfig, mesh: Mesh) -> TrainState:
    """Where each array of the state lies on a mesh: moments as their parameter, counters whole."""
    state = abstract_state(config)
    return _by_parameter(config, state, lambda _, axes: sharding.sharding(mesh, axes))


def train_step(
    state: TrainState,
    tokens: Int[Array, "batch seq+1"],
    weights: Float[Array, " batch"] | None = None,
    *,
    config: RunConfig,
) -> tuple[TrainState, dict[str, Array]]:
    """One step on one batch: checkpoint t to checkpoint t + 1.

    weights multiply each row's summed loss; the divisor stays batch x seq.

    A loss or gradient that is no finite number makes no update. In float16 that is an overflow,
    which lowers the loss scale; otherwise, `on_nonfinite` decides whether the batch is skipped or
    the state halts.

    Returns the new state and the metrics `loss` (nats, before the update), `grad_norm` (global,
    before clipping), `updates` (made before this step), `updated`, `halted` and, in float16,
    `loss_scale` (that of this step).
    """
    scale = state.loss_scale
    factor = None if scale is None else scale.scale
    state = state.replace(opt_state=restarted(config.optimizer, state.opt_state, state.step))  # type: ignore
    value, gradients = loss_and_gradients(state.params, tokens, weights, factor, config=config)
    finite = jnp.isfinite(value) & jnp.isfinite(optax.tree.norm(gradients))
    fatal = ~finite
    if scale is not None:
        fatal = loss_scale.exhausted(scale, ~finite)
        before, scale = scale, loss_scale.after(scale, ~finite, state.step)
        # Upstream takes the scale after the step: where it doubles, the gradient counts half.
        divisor = scale if config.training.doubled_scale_quirk else before
        gradients = loss_scale.unscaled(gradients, divisor.scale)
    halted = state.halted | (fatal if config.training.on_nonfinite == "stop" else False)
    metrics = {
        "loss": value,
        "grad_norm": optax.tree.norm(gradients),
        "updates": state.updates,
        "updated": finite & ~halted,
        "halted": halted,
    }
    if factor is not None:
        metrics["loss_scale"] = factor
    transform = optimizer(config.optimizer, config.training.steps)
    updates, opt_state = transform.update(gradients, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    changed = (params, opt_state)
    params, opt_state = _where(metrics["updated"], changed, (state.params, state.opt_state))
    state = TrainState(
        step=state.step + ~halted,
        params=params,
        opt_state=opt_state,
        loss_scale=_where(halted, state.loss_scale, scale),
        halted=halted,
    )
    return _placed(config, state), metrics


def loss_and_gradients(
    params: Params,
    tokens: jax.Array,
    weights: jax.Array | None,
    scale: jax.Array | None = None,
    *,
    config: RunConfig,
) -> tuple[jax.Array, Params]:
    """Mean loss and its gradient over the batch, by `gradient_accumulation` microbatches.

    Microbatches are taken in the order of the rows, as GPT-NeoX's sampler deals them out. scale
    multiplies the gradient, not the loss returned. It enters with the weights: float16 would
    flush a cotangent that is first divided by the number of tokens.
    """
    assert config.model is not None
    value_and_grad = jax.value_and_grad(partial(loss, config=config.model, runtime=config.runtime))
    parts = config.training.gradient_accumulation
    factor = jnp.float32(1 / parts) if scale is None else scale / parts
    if parts == 1 and scale is None:
        value, gradients = value_and_grad(params, tokens, weights=weights)
        return value, _like_parameters(gradients)
    weights = factor * (jnp.ones(tokens.shape[0]) if weights is None else weights)

    def add(total: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        value, gradients = value_and_grad(params, part[0], weights=part[1])
        return jax.tree.map(jnp.add, total, (value, _like_parameters(gradients))), None

    zeros = (jnp.zeros([]), _like_parameters(jax.tree.map(jnp.zeros_like, params)))
    (value, gradients), _ = jax.lax.scan(add, zeros, microbatches((tokens, weights), parts))
    return value if scale is None else value / scale, gradients


def microbatches(batch: Any, parts: int) -> Any:
    """Arrays `[batch, …]` as `[parts, batch / parts, …]`, each part over all devices."""

    def split(x: jax.Array) -> jax.Array:
        axes = ("layers", "batch", *["seq"] * (x.ndim - 1))  # parts are taken one by one, as layers
        return sharding.constrain(x.reshape(parts, -1, *x.shape[1:]), axes)

    return jax.tree.map(split, batch)


jitted_train_step = jax.jit(train_step, static_argnames="config", donate_argnames="state")
"""`train_step`, compiled once a config and mesh; the state passed in is given up."""


def _by_parameter(config: RunConfig, state: TrainState, f: Any) -> TrainState:
    """`f(array, logical axes)` of every array: counters have no axes."""

    def whole(x: Any) -> Any:
        return f(x, ())

    def like_parameters(x: Any, parameter: Parameter) -> Any:
        return f(x, parameter.axes)

    table = parameters.tree(lambda p: p)
    opt_state = optax.tree.map_params(
        optimizer(config.optimizer, config.training.steps),
        like_parameters,
        state.opt_state,
        table,
        transform_non_params=whole,
    )
    counters = jax.tree.map(whole, state.replace(params=None, opt_state=None))  # type: ignore
    params = jax.tree.map(like_parameters, state.params, table)
    return counters.replace(params=params, opt_state=opt_state)


def _placed(config: RunConfig, state: TrainState) -> TrainState:
    return _by_parameter(config, state, sharding.constrain)


def _like_parameters(gradients: Params) -> Params:
    return map_parameters(lambda p, x: sharding.constrain(x, p.axes), gradients)


def _where(condition: jax.Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(partial(jnp.where, condition), yes, no)
