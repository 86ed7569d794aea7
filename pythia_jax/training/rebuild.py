"""The train state of weights that came without one: Adam's moments zero, or rebuilt.

Adam's moments after update N are sums over all gradients before it,

    m_N = sum over i < N of (1 - b1) b1^i g_(N-1-i),        v_N likewise of g²,

and forget fast: with b2 = 0.95 the last 60 gradients make up 95 % of v. So where only the weights
of a checkpoint were published, the moments can be had from the K batches before it: the same sums
over i < K, each gradient clipped as the step clips it, all taken at the weights of step N, since
those of the steps between are not there.

The weights of a sum that ends at K add up to 1 - b^K, those of the true one to 1 - b^N. So the sum
is multiplied by (1 - b^N) / (1 - b^K), and Adam's counter is set to N updates: gradients too old to
be seen count as if they were the average of those seen. For K = N nothing is multiplied, and a
constant gradient gives the true moments for every K. The other way, to leave the sum as it is and
set the counter to K, gives every new gradient more weight than it had in the run until K has grown.
`benchmarks/rebuilt_moments.py` measures both: the losses after are the same, the v of this way is
nearer to the true one where K is small.
"""

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool
from tqdm import tqdm

from pythia_jax import data
from pythia_jax.configs import RunConfig
from pythia_jax.model.parameters import Params
from pythia_jax.training import loss_scale
from pythia_jax.training.feed import GlobalBatches, read_ahead
from pythia_jax.training.optimizer import optimizer
from pythia_jax.training.step import (
    TrainState,
    init_state,
    loss_and_gradients,
    state_shardings,
)
from pythia_jax.training.telemetry import NonFiniteError

log = logging.getLogger(__name__)

LARGEST_SCALE = 2.0**20
"""Of the loss in float16, to begin with; it is halved until the gradients are finite."""


def zero_state(params: Params, step: int, config: RunConfig, mesh: Mesh) -> TrainState:
    """The state of checkpoint `step` with an optimizer that has seen nothing.

    Moments are 0 and Adam's counter and the loss scale those of a fresh start; the place in data
    and schedule is `step`. params: float32, on the mesh around us; they are given up.
    """
    make = jax.jit(
        partial(_zero_state, config=config),
        donate_argnums=0,
        out_shardings=state_shardings(config, mesh),
    )
    return make(params, jnp.int32(step))


def rebuilt_state(
    params: Params,
    step: int,
    last: int,
    config: RunConfig,
    mesh: Mesh,
    *,
    show_progress: bool = True,
) -> TrainState:
    """The state of checkpoint `step`, Adam's moments averaged over the `last` batches before it.

    Before step `last` there are only `step` batches, which the log then says. Gradients are the
    step's own, by the same precision and microbatches, at `params`, which are given up.

    Raises NonFiniteError for a batch whose gradient is no number at these weights.
    """
    if last > step:
        log.warning("moments are rebuilt from %d batches: there are no more before", step)
        last = step
    state = zero_state(params, step, config, mesh)
    if last == 0:
        return state
    batches = GlobalBatches(data.batches(config, "train"), mesh)
    bar = tqdm(
        read_ahead(batches, step - last, step),
        total=last,
        desc="rebuilding moments",
        unit="batch",
        disable=not show_progress or jax.process_index() != 0,
        dynamic_ncols=True,
    )
    return matured(shown(state, bar, step - last, config, mesh), step, last, config)


def shown(
    state: TrainState, batches: Iterable[Array], first: int, config: RunConfig, mesh: Mesh
) -> TrainState:
    """The state after its optimizer was shown the gradients of `batches`, no parameter moved.

    first: number of the first batch, for messages. The state passed in is given up. Raises
    NonFiniteError.
    """
    show = jax.jit(
        partial(_show, config=config),
        donate_argnums=0,
        out_shardings=(state_shardings(config, mesh), None),
    )
    scale = LARGEST_SCALE if config.training.precision == "float16" else None
    for number, tokens in enumerate(batches, first):
        while True:
            state, finite = show(state, tokens, None if scale is None else jnp.float32(scale))
            if finite:
                break
            if scale is None or scale <= loss_scale.SMALLEST:
                raise NonFiniteError(
                    number,
                    f"the gradient of batch {number} is no number at the weights that were loaded: "
                    "they are broken, or not of this data. With initialize_from.optimizer_state: "
                    "zero training starts without it",
                )
            scale /= 2
    return state


def matured(state: TrainState, step: int, last: int, config: RunConfig) -> TrainState:
    """Moments of `last` gradients as those after `step` updates, and Adam's counter as then."""
    counted = step - max((r for r in config.optimizer.restarts if r < step), default=0)
    by = [(1 - b**step) / (1 - b**last) for b in config.optimizer.betas]

    def grown(adam: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
        mu, nu = (
            jax.tree.map(lambda x, times=times: x * jnp.float32(times), moments)
            for times, moments in zip(by, (adam.mu, adam.nu), strict=True)
        )
        return adam._replace(count=adam.count - last + counted, mu=mu, nu=nu)

    return _change(state, optax.ScaleByAdamState, grown)


def _zero_state(params: Params, step: Array, *, config: RunConfig) -> TrainState:
    # The fresh parameters are not used, so the compiler drops them.
    state: Any = init_state(config)
    scale = None if state.loss_scale is None else loss_scale.initial(step)
    state = state.replace(step=step, params=params, loss_scale=scale)
    return _change(
        state, optax.ScaleByScheduleState, lambda schedule: schedule._replace(count=step)
    )


def _show(
    state: TrainState, tokens: Array, factor: Array | None, *, config: RunConfig
) -> tuple[TrainState, Bool[Array, ""]]:
    """The state after its optimizer saw one more gradient, as it was if that is no number.

    factor: the loss scale that the gradient is computed with.
    """
    value, gradients = loss_and_gradients(state.params, tokens, None, factor, config=config)
    finite = jnp.isfinite(value) & jnp.isfinite(optax.tree.norm(gradients))
    if factor is not None:
        gradients = loss_scale.unscaled(gradients, factor)
    # By the optimizer itself, so that whatever it does to gradients and moments is done.
    transform = optimizer(config.optimizer, config.training.steps)
    _, after = transform.update(gradients, state.opt_state, state.params)
    kept = jax.tree.map(partial(jnp.where, finite), after, state.opt_state)
    # The place in the schedule is that of the checkpoint, however many gradients were shown.
    updates = state.updates
    state = state.replace(opt_state=kept)  # type: ignore[attr-defined]
    state = _change(
        state, optax.ScaleByScheduleState, lambda schedule: schedule._replace(count=updates)
    )
    return state, finite


def _change(state: TrainState, kind: type, f: Callable[[Any], Any]) -> TrainState:
    """The state, `f` made of every part of its optimizer's that is of one kind."""
    opt_state = jax.tree.map(
        lambda part: f(part) if isinstance(part, kind) else part,
        state.opt_state,
        is_leaf=lambda part: isinstance(part, kind),
    )
    return state.replace(opt_state=opt_state)  # type: ignore[attr-defined]
