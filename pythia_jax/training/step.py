"""The train state and the train step: one pure function that everything else calls."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from pythia_jax.configs import RunConfig
from pythia_jax.model.loss import loss
from pythia_jax.model.parameters import Params, init_parameters
from pythia_jax.training.optimizer import optimizer


@struct.dataclass
class TrainState:
    """All that training carries from step to step; everything float32 but the counters.

    step: batches taken so far, which is also the number of the checkpoint that this state is.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any


def init_state(config: RunConfig) -> TrainState:
    """Checkpoint 0: fresh parameters from `training.seed`, an optimizer that has seen nothing."""
    assert config.model is not None
    params = init_parameters(config.model, jax.random.key(config.training.seed))
    opt_state = optimizer(config.optimizer, config.training.steps).init(params)
    return TrainState(step=jnp.zeros([], jnp.int32), params=params, opt_state=opt_state)


def abstract_state(config: RunConfig) -> TrainState:
    """Shapes and dtypes of the state, without its memory."""
    return jax.eval_shape(partial(init_state, config))


def train_step(
    state: TrainState,
    tokens: Int[Array, "batch seq+1"],
    weights: Float[Array, " batch"] | None = None,
    *,
    config: RunConfig,
) -> tuple[TrainState, dict[str, Array]]:
    """One step on one batch: checkpoint t to checkpoint t + 1.

    weights multiply each row's summed loss; the divisor stays batch x seq.

    Returns the new state and the metrics `loss` (nats, before the update) and `grad_norm`
    (global, before clipping).
    """
    value, gradients = loss_and_gradients(state.params, tokens, weights, config=config)
    transform = optimizer(config.optimizer, config.training.steps)
    updates, opt_state = transform.update(gradients, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    metrics = {"loss": value, "grad_norm": optax.tree.norm(gradients)}
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics


def loss_and_gradients(
    params: Params, tokens: jax.Array, weights: jax.Array | None, *, config: RunConfig
) -> tuple[jax.Array, Params]:
    """Mean loss and its gradient over the batch, by `gradient_accumulation` microbatches.

    Microbatches are taken in the order of the rows, as GPT-NeoX's sampler deals them out.
    """
    assert config.model is not None
    value_and_grad = jax.value_and_grad(partial(loss, config=config.model, runtime=config.runtime))
    parts = config.training.gradient_accumulation
    if parts == 1:
        return value_and_grad(params, tokens, weights=weights)
    weights = jnp.ones(tokens.shape[0]) if weights is None else weights

    def add(total: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, value_and_grad(params, part[0], weights=part[1])), None

    split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), (tokens, weights))
    zeros = (jnp.zeros([]), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, zeros, split)
    return jax.tree.map(lambda x: x / parts, total)


jitted_train_step = jax.jit(train_step, static_argnames="config", donate_argnames="state")
"""`train_step`, compiled once a config; the state passed in is given up."""
