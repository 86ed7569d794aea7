"""Exact influence through training: the derivative of what a model does by the weight of a row.

Training is `pythia_jax.training.step.train_step`: clipping, Adam, weight decay, schedule, gradient
accumulation and all. K steps of it are taken forward, then gone through backward; of the states
between, only about 2 √K exist at a time, and the others are computed again (Griewank, 1992).
Engstrom et al. (2025) go through training in the same way.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pythia_jax.configs import RunConfig, Runtime
from pythia_jax.data import Batches
from pythia_jax.interp import preflight
from pythia_jax.interp.curvature import known, twice_differentiable
from pythia_jax.model.gptneox import AnyArray, check_tokens
from pythia_jax.model.parameters import Params
from pythia_jax.training.feed import GlobalBatches
from pythia_jax.training.step import TrainState, train_step

log = logging.getLogger(__name__)

Steps = (
    Int[AnyArray, "step batch seq+1"]
    | Sequence[Any]
    | Batches
    | GlobalBatches
    | Callable[[int], Any]
)
QueryLoss = Callable[[Params], Float[Array, "*queries"]]


def metagradient(
    state: TrainState,
    batches: Steps,
    query_loss: QueryLoss,
    *,
    steps: int,
    config: RunConfig,
    runtime: Runtime | None = None,
) -> Float[Array, "*queries step batch"]:
    """d query_loss(parameters after `steps` optimizer steps) / d weight of every row trained on.

    The weight of a row multiplies its summed loss, as `train_step`'s `weights` do, and is 1; the
    divisor of the batch stays. So a row left out changes the query's loss by about minus its
    influence, and a row that helps has a negative one.

    state: where training begins (`resumed` has one). batches: those of its next steps,
    `[step, batch, seq + 1]`; or `data.batches(config)`, or any function from a step's number to its
    batch.
    query_loss: from parameters to a loss, or to `[queries]` of them; each query costs a backward
    pass through training of its own, and holds a state. config: the run's.
    runtime: how to compute, in place of the run's own; attention that was left open is `xla`.

    The train step holds a gradient already, and is differentiated in reverse once more; therefore
    the loss is computed in its `remat` form. A step costs about five training steps and, a query,
    about three more. A step that the run skipped (`on_nonfinite: skip`) has no influence. Where
    Adam has never seen a gradient (the embedding of a token that did not occur), the square root of
    its second moment has no derivative, and none is needed; it is taken just beside 0.

    Returns influences in nats a unit of weight, `[step, batch]` or `[queries, step, batch]`.

    Raises ValueError for batches that do not fit, a precision or an attention kernel that has no
    second derivatives, a step that stopped the run, and an influence that is not finite; with
    the numbers, and before the first step, MemoryError for what does not fit.
    """
    run = _Run(**vars(config), how=_runtime(config, runtime))
    tokens = _stacked(state, batches, steps, config)
    queries = _count(query_loss, state.params)
    cut, active = _segmented(tokens)
    preflight.check_memory(
        f"a metagradient through {steps} steps",
        (len(cut), state),
        (queries, state.params),
        program=partial(_backward_program, state, cut, active, query_loss, run),
        advice="take fewer queries at once, or cut the model over more devices (mesh.fsdp)",
    )
    starts, final, updated = _forward(state, cut, active, config=run)
    _check_updated(state, updated, steps, config)
    values, cotangents = _query_gradients(query_loss, final.params)
    del final
    influence = _backward(starts, cut, active, cotangents, config=run)[:, :steps]
    influence = influence if values.ndim else influence[0]
    _check_finite(state, influence)
    return influence


def trained(
    state: TrainState,
    batches: Steps,
    weights: Float[AnyArray, "step batch"],
    config: RunConfig,
    *,
    runtime: Runtime | None = None,
) -> TrainState:
    """The state after a train step on each of the batches, with these weights of their rows.

    What `metagradient` is the derivative of, for checks of it: a weight of 0 leaves a row out.
    Arguments are as there.

    Raises ValueError for batches or weights that do not fit.
    """
    run = _Run(**vars(config), how=_runtime(config, runtime))
    tokens = _stacked(state, batches, len(weights), config)
    if np.shape(weights) != tokens.shape[:2]:
        raise ValueError(
            f"weights of shape {np.shape(weights)}: one a row, {tokens.shape[:2]}, are wanted"
        )
    return _trained(state, tokens, jnp.asarray(weights), config=run)


@dataclass(frozen=True)
class _Run(RunConfig, where=""):
    """A run's config that computes in another way."""

    how: Runtime = Runtime()

    @property
    def runtime(self) -> Runtime:
        return self.how


@partial(jax.jit, static_argnames="config")
def _trained(
    state: TrainState, tokens: jax.Array, weights: jax.Array, *, config: RunConfig
) -> TrainState:
    def step(state: TrainState, xs: tuple) -> tuple[TrainState, None]:
        return train_step(state, *xs, config=config)[0], None

    return jax.lax.scan(step, state, (tokens, weights))[0]


def _advance(
    state: TrainState, xs: tuple[jax.Array, jax.Array], config: RunConfig
) -> tuple[TrainState, jax.Array]:
    """One step, unless it only fills up a segment; and whether it made an update."""
    tokens, active = xs

    def step(state: TrainState) -> tuple[TrainState, jax.Array]:
        after, metrics = train_step(state, tokens, jnp.ones(tokens.shape[0]), config=config)
        return after, metrics["updated"]

    return jax.lax.cond(active, step, lambda s: (s, jnp.zeros([], bool)), state)


@partial(jax.jit, static_argnames="config")
def _forward(
    state: TrainState, tokens: jax.Array, active: jax.Array, *, config: RunConfig
) -> tuple[TrainState, TrainState, Bool[Array, "segment step"]]:
    """The states at the beginnings of segments, the last one of all, and which steps updated."""

    def segment(start: TrainState, xs: tuple) -> tuple[TrainState, tuple]:
        end, updated = jax.lax.scan(partial(_advance, config=config), start, xs)
        return end, (start, updated)

    final, (starts, updated) = jax.lax.scan(segment, state, (tokens, active))
    return starts, final, updated


@partial(jax.jit, static_argnames="config")
def _backward(
    starts: TrainState,
    tokens: jax.Array,
    active: jax.Array,
    cotangents: Params,
    *,
    config: RunConfig,
) -> Float[Array, "queries step batch"]:
    """Influences, from the queries' gradients by the last parameters, `[queries, …]` each."""

    def segment(cotangent: Any, xs: tuple) -> tuple[Any, jax.Array]:
        start, tokens, active = xs

        def note(state: TrainState, xs: tuple) -> tuple[TrainState, tuple]:
            after, updated = _advance(state, xs, config)
            return after, (state, updated)

        _, (states, updated) = jax.lax.scan(note, start, (tokens, active))
        steps = (states, tokens, updated)
        return jax.lax.scan(partial(_pull, config=config), cotangent, steps, reverse=True)

    zeros = jax.tree.map(jnp.zeros_like, cotangents)
    xs = (starts, tokens, active)
    _, influence = jax.lax.scan(segment, (cotangents, zeros, zeros), xs, reverse=True)
    queries, batch = influence.shape[2:]
    return jnp.moveaxis(influence.reshape(-1, queries, batch), 0, 1)


def _pull(cotangent: Any, xs: tuple, config: RunConfig) -> tuple[Any, jax.Array]:
    """Back through one step: the queries' gradients by the state before, and by its rows' weights.

    Both are those by (parameters, first moments, second moments), with a leading axis of queries.
    """
    state, tokens, updated = xs
    weights = jnp.ones(tokens.shape[0], jax.tree.leaves(cotangent)[0].dtype)

    def through(cotangent: Any) -> tuple[Any, jax.Array]:
        def step(moving: Any, weights: jax.Array) -> Any:
            return _moving(train_step(_joined(state, moving), tokens, weights, config=config)[0])

        params, mean, square = _moving(state)
        # Far below Adam's eps, far above the smallest number: the square root at 0 has no
        # derivative, and 0 x infinity would make a NaN of what is 0.
        smallest = max((config.optimizer.eps * 1e-7) ** 2, 1e-34)
        square = jax.tree.map(lambda v: jnp.maximum(v, smallest), square)
        _, pull = jax.vjp(step, (params, mean, square), weights)
        return jax.lax.map(pull, cotangent)

    def past(cotangent: Any) -> tuple[Any, jax.Array]:
        queries = jax.tree.leaves(cotangent)[0].shape[0]
        return cotangent, jnp.zeros((queries, tokens.shape[0]), weights.dtype)

    return jax.lax.cond(updated, through, past, cotangent)


def _moving(state: TrainState) -> tuple[Params, Any, Any]:
    """What of a state has a derivative: parameters and Adam's moments."""
    _, adam, *_ = state.opt_state
    return state.params, adam.mu, adam.nu


def _joined(state: TrainState, moving: tuple[Params, Any, Any]) -> TrainState:
    clip, adam, *rest = state.opt_state
    params, mean, square = moving
    opt_state = (clip, adam._replace(mu=mean, nu=square), *rest)
    return state.replace(params=params, opt_state=opt_state)  # type: ignore


@partial(jax.jit, static_argnums=0)
def _query_gradients(query_loss: QueryLoss, params: Params) -> tuple[jax.Array, Params]:
    """The queries' losses, and their gradients with a leading axis, made one by one."""
    values, pull = jax.vjp(query_loss, params)
    units = jnp.eye(values.size, dtype=values.dtype).reshape(-1, *values.shape)
    return values, jax.lax.map(lambda unit: pull(unit)[0], units)


def _backward_program(
    state: TrainState,
    tokens: jax.Array,
    active: jax.Array,
    query_loss: QueryLoss,
    config: RunConfig,
) -> Any:
    """`_backward`, compiled before there is anything to call it with: it wants the most memory."""
    forward = _forward.lower(state, tokens, active, config=config).compile()
    starts, final, _ = preflight.results(forward)
    queries = _query_gradients.lower(query_loss, final.params).compile()
    cotangents = preflight.results(queries)[1]
    return _backward.lower(starts, tokens, active, cotangents, config=config).compile()


def _segmented(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Batches as `[segment, step, batch, seq + 1]`, filled up at the end, and which are real."""
    steps = tokens.shape[0]
    length = math.isqrt(steps - 1) + 1
    segments = -(-steps // length)
    filling = segments * length - steps
    tokens = jnp.pad(tokens, [(0, filling), (0, 0), (0, 0)])
    active = np.arange(segments * length) < steps
    return (
        tokens.reshape(segments, length, *tokens.shape[1:]),
        jnp.asarray(active.reshape(segments, length)),
    )


def _runtime(config: RunConfig, given: Runtime | None) -> Runtime:
    if given is None and config.training.precision == "float16":
        raise ValueError(
            "training.precision float16 is too narrow for second derivatives; pass "
            "runtime=Runtime(dtype='float32') to go through the same steps in float32"
        )
    runtime = twice_differentiable(config.runtime if given is None else given)
    return replace(runtime, loss="remat")


def _stacked(state: TrainState, batches: Steps, steps: int, config: RunConfig) -> jax.Array:
    """The batches of the next `steps` steps, as one array."""
    if steps < 1:
        raise ValueError(f"steps = {steps}: at least 1 is wanted")
    first = known(state.step)
    if isinstance(batches, Batches | GlobalBatches):
        batches = batches.__getitem__
    if callable(batches):
        if first is None:
            raise ValueError(
                "inside jax.jit the state's step is not known, so batches have to be an array"
            )
        tokens = np.stack([batches(int(first) + i) for i in range(steps)])
    elif len(batches) != steps:
        raise ValueError(f"{len(batches)} batches for {steps} steps")
    else:
        tokens: Any = batches if hasattr(batches, "shape") else np.stack([*batches])
    shape = np.shape(tokens)
    parts = config.training.gradient_accumulation
    if len(shape) != 3 or shape[1] % parts:
        raise ValueError(
            f"batches of shape {shape}: [step, batch, seq + 1] are wanted, of rows that "
            f"training.gradient_accumulation ({parts}) divides"
        )
    if first is not None and first + steps > config.training.steps:
        raise ValueError(
            f"{steps} steps from step {first} on: the run ends at {config.training.steps} "
            "(training.steps), and so does its learning rate"
        )
    assert config.model is not None
    check_tokens(tokens.reshape(-1, shape[2]), config.model)
    return jnp.asarray(tokens)


def _count(query_loss: QueryLoss, params: Params) -> int:
    """How many queries these are."""
    out = jax.eval_shape(query_loss, params)
    if not hasattr(out, "ndim") or out.ndim > 1 or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(f"query_loss gives {out}: one number, or [queries] of them, are wanted")
    return out.size


def _check_updated(state: TrainState, updated: jax.Array, steps: int, config: RunConfig) -> None:
    """Say which steps made no update; refuse them where the run would have ended there."""
    made, first = known(updated), known(state.step)
    if made is None or first is None or made.ravel()[:steps].all():
        return
    missed = first + np.flatnonzero(~made.ravel()[:steps])
    if config.training.on_nonfinite == "stop":
        raise ValueError(
            f"step {missed[0]} made no update: its loss or gradient was not finite, or the state "
            "had halted before (training.on_nonfinite: stop), so there is no training to go through"
        )
    log.warning("no update was made at steps %s: their rows have no influence", missed.tolist())


def _check_finite(state: TrainState, influence: jax.Array) -> None:
    values, first = known(influence), known(state.step)
    if values is None or np.isfinite(values).all():
        return
    step, row = np.argwhere(~np.isfinite(values))[-1][-2:]
    raise ValueError(
        f"the influence of row {row} of step {step + (first or 0)} is not finite, nor any before "
        "it: the query's loss is not, or a gradient there is exactly 0 or overflowed"
    )
