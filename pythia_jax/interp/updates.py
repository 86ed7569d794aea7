"""What one real optimizer step changed: by parameter and layer, by cause, and by training row.

The step is the run's own (`pythia_jax.training.step.train_step`). Its change of a parameter is

    -lr (m / c1) / (sqrt(v / c2) + eps)  -  lr decay p,

m and v the moments with this step's clipped gradient in them, c1 and c2 their bias corrections.
Four parts add up to it: `batch` and `momentum`, what this batch's gradient and those before it put
into m, as if nothing were clipped; `clipping`, what clipping changed of these two; `decay`. What is
left is `rounding`: parameters are float32, and so is their sum with the change.
"""

import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jaxtyping import Int
from numpy.typing import NDArray
from tqdm import tqdm

from pythia_jax import sharding
from pythia_jax.configs import ModelConfig, RunConfig, Runtime
from pythia_jax.interp import preflight
from pythia_jax.interp.gradients import per_example_gradients
from pythia_jax.interp.resuming import differences, resumed
from pythia_jax.model.gptneox import AnyArray
from pythia_jax.model.loss import token_losses
from pythia_jax.model.parameters import TABLE, Params, decay_mask, items
from pythia_jax.training.optimizer import (
    learning_rates,
    restarted,
    scale_by_adam,
)
from pythia_jax.training.pod import is_first
from pythia_jax.training.step import TrainState, jitted_train_step

log = logging.getLogger(__name__)

PARTS = ("batch", "momentum", "clipping", "decay", "rounding")
_GRADIENT_BYTES = 2**30
"""Of rows' whole gradients that exist at once, on all devices; of one row at least."""


@dataclass(frozen=True, eq=False)
class Update:
    """One step, taken apart. What is by path of the parameter is `[layers]`, or `[]` without them.

    step, loss, learning_rate: the step's, before its update. gradient_norm: before clipping. clip:
    what clipping multiplied the gradient by. gradient, change: norms of the (unclipped) gradient
    and of the change of the parameter. cosine: of the change and minus the gradient; NaN where
    one is 0. parts: norms of `PARTS`. shares: what each part is of the change, <part, change> /
    |change|²; they add up to 1, and are NaN where nothing changed.

    batch: rows of the batch. rows: those that were looked at, `[n]`. losses_before, losses_after:
    their mean losses in nats a token, `[n]`. norms, dots: of each row's part of the clipped
    gradient (those of all rows add up to it), by path `[n, layers]` or `[n]`: its norm, and its dot
    product with the change. batch_dot: that of the whole clipped gradient. after: the state of
    checkpoint `step` + 1.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    clip: float
    gradient: dict[str, NDArray]
    change: dict[str, NDArray]
    cosine: dict[str, NDArray]
    parts: dict[str, dict[str, NDArray]]
    shares: dict[str, dict[str, NDArray]]
    batch: int
    rows: NDArray[np.int64]
    losses_before: NDArray
    losses_after: NDArray
    norms: dict[str, NDArray]
    dots: dict[str, NDArray]
    batch_dot: float
    after: TrainState

    @property
    def row_norms(self) -> NDArray:
        """Norm of each row's part of the clipped gradient, all parameters together, `[n]`."""
        squares = [(v.reshape(len(v), -1) ** 2).sum(axis=1) for v in self.norms.values()]
        return np.sqrt(np.sum(squares, axis=0))

    @property
    def row_dots(self) -> NDArray:
        """Dot product of each row's part with the change, all parameters together, `[n]`."""
        return np.sum([v.reshape(len(v), -1).sum(axis=1) for v in self.dots.values()], axis=0)

    @property
    def predicted(self) -> NDArray:
        """Change of each row's mean loss by the step, at first order, nats a token, `[n]`."""
        return self.row_dots * self.batch / self.clip


def update(
    state: TrainState,
    tokens: Int[AnyArray, "batch seq+1"],
    config: RunConfig,
    *,
    rows: int | None = None,
    show_progress: bool = False,
) -> Update:
    """Make one train step on a batch, and take it apart.

    state: of a checkpoint (`resumed` has it); it is left as it is. tokens: the batch that the step
    takes. config: the run's. rows: only so many of the batch's rows, evenly spread, are looked at
    one by one; None is all.

    A row's gradient is formed whole, a few rows at a time; all of them take about as long as two
    steps of training. Of a run in float16 they are computed in float32, since unscaled they would
    vanish. On the mesh around us if there is one.

    Raises ValueError for a step that made no update, and a row whose gradient is not finite, and
    MemoryError with the numbers for what does not fit.
    """
    batch, tokens = tokens.shape[0], jnp.asarray(tokens)
    if rows is not None and rows < 1:
        raise ValueError(f"rows {rows}: at least 1 is wanted")
    step = int(state.step)
    preflight.check_memory(
        "the state after a step, and what it changed,",
        (1, state),
        (1, state.params),
        program=lambda: jitted_train_step.lower(state, tokens, config=config).compile(),
    )
    # By the program that training runs: another may round otherwise.
    after, metrics = jitted_train_step(jax.tree.map(jnp.copy, state), tokens, config=config)
    if not bool(metrics["updated"]):
        raise ValueError(
            f"step {step} makes no update: its loss or gradient is no finite number, or the run "
            "had halted before"
        )
    # As `training.optimizer.clip_by_global_norm` has it.
    excess = (metrics["grad_norm"] + 1e-6) / config.optimizer.gradient_clip
    factor = 1 / jnp.maximum(excess, 1.0)
    change, tables, batch_dot = _taken_apart(state, after, factor, config=config)
    count = batch if rows is None else min(rows, batch)
    chosen = np.arange(count) * batch // count
    by_row = _by_row(state.params, after.params, change, tokens, chosen, config, show_progress)
    clip = float(factor)
    for name in ("norms", "dots"):
        by_row[name] = {path: clip * value for path, value in by_row[name].items()}
    rates = learning_rates(config.optimizer, config.training.steps)
    return Update(
        step=step,
        loss=float(metrics["loss"]),
        learning_rate=float(rates[int(metrics["updates"])]),
        gradient_norm=float(metrics["grad_norm"]),
        clip=clip,
        **jax.tree.map(np.asarray, tables),
        batch=batch,
        rows=chosen,
        batch_dot=float(batch_dot),
        after=after,
        **by_row,
    )


def update_of(
    model: str,
    config: RunConfig,
    *,
    step: int,
    rows: int | None = None,
    optimizer_state: str = "checkpoint",
    revision: str | None = None,
    show_progress: bool = True,
) -> tuple[Update, list[str] | None]:
    """`update` of a run folder's checkpoint on its own batch, on the mesh of the config.

    Arguments and errors are those of `update` and `resuming.resumed`. Returns also the names of
    the arrays in which the state after is not the run's own next checkpoint, to the bit; None where
    there is none to compare with.
    """
    with resumed(
        model,
        config,
        step,
        optimizer_state=optimizer_state,
        revision=revision,
        show_progress=show_progress,
    ) as run:
        found = update(
            run.state, run.batches[step], run.config, rows=rows, show_progress=show_progress
        )
        return found, differences(model, step + 1, found.after)


@partial(jax.jit, static_argnames="config")
def _taken_apart(
    state: TrainState, after: TrainState, factor: jax.Array, *, config: RunConfig
) -> tuple[Params, dict[str, Any], jax.Array]:
    """The change, what is told of it by parameter, and its dot with the clipped gradient.

    factor: what the gradient was multiplied by where it was clipped.
    """
    clipped = _clipped_gradient(state, after, config)
    gradient = optax.tree.scale(1 / factor, clipped)
    change: Any = optax.tree.sub(after.params, state.params)
    parts = _parts(state, gradient, clipped, config)
    parts["rounding"] = optax.tree.sub(change, optax.tree.add(*parts.values()))
    moved = traverse_util.flatten_dict(change, sep="/")

    def each(f: Any, tree: Params) -> dict[str, jax.Array]:
        flat = traverse_util.flatten_dict(tree, sep="/")
        return {p.path: f(flat[p.path], moved[p.path], p.path) for p in TABLE}

    def norm(x: jax.Array, _: jax.Array, path: str) -> jax.Array:
        return jnp.sqrt(_dot(x, x, path))

    def share(x: jax.Array, change: jax.Array, path: str) -> jax.Array:
        return _dot(x, change, path) / _dot(change, change, path)

    def cosine(x: jax.Array, change: jax.Array, path: str) -> jax.Array:
        lengths = norm(x, x, path) * norm(change, change, path)
        return -_dot(x, change, path) / lengths

    tables = {
        "gradient": each(norm, gradient),
        "change": each(norm, change),
        "cosine": each(cosine, gradient),
        "parts": {name: each(norm, parts[name]) for name in PARTS},
        "shares": {name: each(share, parts[name]) for name in PARTS},
    }
    return change, tables, jnp.asarray(optax.tree.vdot(clipped, change))


def _clipped_gradient(state: TrainState, after: TrainState, config: RunConfig) -> Any:
    """That which the step gave to Adam, read off the first moments.

    Computed again, by another program, it would round otherwise. Where a gradient is rounding alone
    (a bias of keys: it moves all scores of a query alike) Adam would make another change of it.
    """
    b1 = config.optimizer.betas[0]
    moments = (of.opt_state[1].mu for of in (after, state))
    return jax.tree.map(lambda now, was: (now - b1 * was) / (1 - b1), *moments)


def _parts(
    state: TrainState, gradient: Params, clipped: Params, config: RunConfig
) -> dict[str, Params]:
    """The change by its causes, `PARTS` without the last, each a tree of parameters."""
    settings = config.optimizer
    _, adam, *_ = restarted(settings, state.opt_state, state.step)
    transform = scale_by_adam(settings)
    rate = jnp.asarray(learning_rates(settings, config.training.steps))[state.updates]

    def moves(gradient: Params, before: Any) -> Params:
        updates, _ = transform.update(gradient, before, state.params)
        return optax.tree.scale(-rate, updates)

    # Without the first moments of before, Adam moves by what this gradient puts into them.
    empty = adam._replace(mu=optax.tree.zeros_like(adam.mu))
    whole, own = moves(gradient, adam), moves(gradient, empty)
    decay = jax.tree.map(
        lambda p, yes: -rate * settings.weight_decay * p if yes else jnp.zeros_like(p),
        state.params,
        decay_mask(),
    )
    return {
        "batch": own,
        "momentum": optax.tree.sub(whole, own),
        "clipping": optax.tree.sub(moves(clipped, adam), whole),
        "decay": decay,
    }


def _dot(x: jax.Array, y: jax.Array, path: str, kept: int = 0) -> jax.Array:
    """Dot product over all axes but the first `kept`, and that of layers."""
    kept += path.startswith("layers/")
    return (x * y).sum(axis=tuple(range(kept, x.ndim)))


def _by_row(
    params: Params,
    after: Params,
    change: Params,
    tokens: jax.Array,
    chosen: NDArray[np.int64],
    config: RunConfig,
    show_progress: bool,
) -> dict[str, Any]:
    """Of each row chosen: losses, and norms and dots of its part of the unclipped gradient."""
    parts = sharding.parts_of_rows()
    program, together = _compiled(params, after, change, tokens, len(chosen), parts, config)
    found = []
    with tqdm(
        total=len(chosen), desc="rows", unit="row", disable=not show_progress or not is_first()
    ) as bar:
        firsts = range(0, len(chosen), together)
        for first in preflight.timed(firsts, len(firsts), "the rows that are left"):
            numbers = chosen[first : first + together]
            filled = np.resize(numbers, together).astype(np.int32)
            count = len(numbers)
            made = program(params, after, change, tokens, filled)
            made = jax.tree.map(lambda x, count=count: np.asarray(x)[:count], made)
            _check_rows(made, numbers)
            found.append(made)
            bar.update(len(numbers))
    return jax.tree.map(lambda *x: np.concatenate(x), *found)


def _compiled(
    params: Params,
    after: Params,
    change: Params,
    tokens: jax.Array,
    rows: int,
    parts: int,
    config: RunConfig,
) -> tuple[Any, int]:
    """The program for as many rows as fit, and how many these are."""
    runtime = config.runtime
    if runtime.dtype == "float16":
        log.info("rows' gradients are computed in float32: unscaled they would vanish in float16")
        runtime = replace(runtime, dtype="float32", attention="auto")
    each = sum(leaf.size for leaf in jax.tree.leaves(params)) * 4
    together = max(1, min(_GRADIENT_BYTES // each, rows) // parts) * parts
    while True:
        numbers = jax.ShapeDtypeStruct((together,), jnp.int32)
        program = _rows.lower(
            params, after, change, tokens, numbers, config=config.model, runtime=runtime
        ).compile()
        memory = preflight.memory_of(program)
        if memory.fits:
            return program, together
        if together == parts:
            raise preflight.refusal(memory, f"the gradient of {together} rows of the batch")
        together = max(1, together // parts // 2) * parts


@partial(jax.jit, static_argnames=("config", "runtime"))
def _rows(
    params: Params,
    after: Params,
    change: Params,
    tokens: jax.Array,
    numbers: jax.Array,
    *,
    config: ModelConfig,
    runtime: Runtime,
) -> dict[str, Any]:
    """What is told of some rows of the batch, `[n, …]`."""
    batch, seq = tokens.shape[0], tokens.shape[1] - 1
    some = sharding.constrain(tokens[numbers], ("batch", "seq"))
    gradients = per_example_gradients(params, some, config, runtime=runtime)
    norms, dots, moved = {}, {}, {p.path: x for p, x in items(change)}
    for parameter, value in items(gradients):
        path, part = parameter.path, value / (batch * seq)
        norms[path] = jnp.sqrt(_dot(part, part, path, kept=1))
        dots[path] = _dot(part, moved[path][None], path, kept=1)
    losses = [
        token_losses(of, some, config, runtime=runtime).mean(axis=1) for of in (params, after)
    ]
    made = {"losses_before": losses[0], "losses_after": losses[1], "norms": norms, "dots": dots}
    # Whole on every device, so that each process can read it.
    return jax.tree.map(lambda x: sharding.constrain(x, ("layers",) * x.ndim), made)


def _check_rows(made: dict[str, Any], numbers: NDArray[np.int64]) -> None:
    for value in jax.tree.leaves(made):
        bad = np.flatnonzero(~np.isfinite(value.reshape(len(value), -1)).all(axis=1))
        if bad.size:
            raise ValueError(
                f"row {numbers[bad[0]]} of the batch: its loss or gradient is no finite number"
            )
