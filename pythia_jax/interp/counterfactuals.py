"""What training would have done without some of its rows: the ground truth for their influence.

The run is gone on with from a checkpoint, twice, on the same batches: as it was, and with the
weights of some rows changed. A row's weight multiplies its summed loss and the divisor of the batch
stays (`pythia_jax.training.step.train_step`), so a row of weight 0 is left out and no other weighs
more for it. Both runs go step by step beside each other; up to the first changed row they are one.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pythia_jax import data
from pythia_jax.configs import RunConfig
from pythia_jax.data import Batches
from pythia_jax.interp import preflight
from pythia_jax.interp.evaluation_rows import EvaluationRows
from pythia_jax.interp.resuming import differences, resumed
from pythia_jax.model.parameters import Params, items
from pythia_jax.training.feed import GlobalBatches, read_ahead
from pythia_jax.training.pod import is_first
from pythia_jax.training.step import TrainState, jitted_train_step
from pythia_jax.training.trainer import jitted_loss

log = logging.getLogger(__name__)

Weights = Mapping[tuple[int, int], float]
"""Weights of rows that are not 1, by (step, slot): the step's number and the row of its batch."""
_NAMED = 5  # rows that a message names


@dataclass(frozen=True, eq=False)
class Counterfactual:
    """Two runs from one checkpoint, `steps` steps long: the base, and the changed one.

    start: the checkpoint. weights: of the rows that were changed. base_loss, changed_loss: of each
    step's whole batch before its update, all rows counted once, in nats a token, `[steps]`.
    distance: L2 norm of the difference of all parameters after each step, `[steps]`. moved: that of
    the base run from where it began. by_parameter: the last distance, by parameter. before, base,
    changed: what `evaluate` gave at the checkpoint and at the end of each run, `[rows]`; empty
    without it. base_state, changed_state: after the last step.
    """

    start: int
    weights: dict[tuple[int, int], float]
    base_loss: NDArray[np.float64]
    changed_loss: NDArray[np.float64]
    distance: NDArray[np.float64]
    moved: float
    by_parameter: dict[str, float]
    before: NDArray[np.float64]
    base: NDArray[np.float64]
    changed: NDArray[np.float64]
    base_state: TrainState
    changed_state: TrainState

    @property
    def steps(self) -> int:
        return len(self.base_loss)

    @property
    def effect(self) -> NDArray[np.float64]:
        """Change of each evaluated row's loss by the change of weights, `[rows]`, nats a token."""
        return self.changed - self.base


def counterfactual(
    state: TrainState,
    weights: Weights,
    config: RunConfig,
    *,
    steps: int,
    evaluate: Callable[[Params], ArrayLike] | None = None,
    batches: Batches | Callable[[int], Any] | None = None,
    on_base: Callable[[TrainState], None] | None = None,
    show_progress: bool = False,
) -> Counterfactual:
    """Go on from `state` for `steps` steps, as the run did and with other weights of some rows.

    state: of a checkpoint (`resumed` has it); it is left as it is. weights: 0 drops a row, 1
    changes nothing. config: the run's. evaluate: from parameters to losses, `[rows]`. batches: the
    run's, or any function from a step's number to its batch; None reads those of `config`.
    on_base: called with each state of the base run, which is gone when it returns.

    Base steps are those of `train`, by the same compiled program. So are those of the changed run
    whose rows are not named; the others take the weights of all of their rows, also those of 1.

    On the mesh around us if there is one. Two train states exist at once, beside the one given.

    Raises ValueError for weights that change no row of these steps or name a row that is not there,
    MemoryError with the numbers for what does not fit, and RuntimeError where a run comes to a loss
    that is no number.
    """
    return compare(
        _copied(state),
        weights,
        config,
        steps=steps,
        evaluate=evaluate,
        batches=_function(config, batches, int(state.step), steps),
        on_base=on_base,
        show_progress=show_progress,
    )


def counterfactual_of(
    model: str,
    config: RunConfig,
    weights: Weights,
    *,
    step: int,
    steps: int,
    rows: EvaluationRows,
    optimizer_state: str = "checkpoint",
    revision: str | None = None,
    show_progress: bool = True,
) -> tuple[Counterfactual, dict[int, list[str]]]:
    """`counterfactual` of a run folder, or of any model with a config, on the mesh of that.

    model, config, step, optimizer_state, revision: as `resuming.resumed` takes them. rows: what the
    loss is measured on.

    Returns the result, and of each checkpoint that the run folder holds of the steps trained, the
    names of the arrays in which the base run differs from it, to the bit.

    Raises as `counterfactual` and `resumed` do, before anything is trained where it can.
    """
    compared: dict[int, list[str]] = {}

    def look(state: TrainState) -> None:
        found = differences(model, int(state.step), state)
        if found is not None:
            compared[int(state.step)] = found

    check_weights(config, weights, step, steps)
    with resumed(
        model,
        config,
        step,
        steps=steps,
        optimizer_state=optimizer_state,
        revision=revision,
        show_progress=show_progress,
    ) as run:
        feed = read_ahead(run.batches, step, step + steps)
        made = run.config.model
        assert made is not None
        found = compare(
            run.state,
            weights,
            run.config,
            steps=steps,
            evaluate=lambda params: rows.losses(params, made),
            batches=lambda _: next(feed),
            on_base=look,
            show_progress=show_progress,
        )
    return found, compared


def check_weights(
    config: RunConfig, weights: Weights, start: int, steps: int, *, tell: bool = False
) -> dict[tuple[int, int], float]:
    """Those of the weights that are of rows of these steps. tell: log that there are others.

    Raises ValueError for none, for a row that batches do not have, and one that is not finite.
    """
    size = config.training.batch_size
    inside = {
        (int(step), int(slot)): float(weight)
        for (step, slot), weight in weights.items()
        if start <= step < start + steps
    }
    for (step, slot), weight in inside.items():
        if not 0 <= slot < size:
            raise ValueError(f"step {step}, slot {slot}: a batch has rows 0 to {size - 1}")
        if not np.isfinite(weight):
            raise ValueError(f"step {step}, slot {slot}: a weight of {weight} is no finite number")
    outside = [place for place in weights if not start <= place[0] < start + steps]
    span = f"steps {start} to {start + steps} (not included)"
    if not inside:
        there = sorted({step for step, _ in weights})
        named = f"; they are of steps {there[0]} to {there[-1]}" if there else ""
        raise ValueError(
            f"none of the {len(weights)} rows given is of {span}, so nothing would change{named}"
        )
    if outside and tell:
        names = ", ".join(f"({step}, {slot})" for step, slot in sorted(outside)[:_NAMED])
        more = " …" if len(outside) > _NAMED else ""
        log.warning(
            "%d of the %d rows given are not of %s and change nothing: (step, slot) %s%s",
            len(outside),
            len(weights),
            span,
            names,
            more,
        )
    return inside


def compare(
    base: TrainState,
    weights: Weights,
    config: RunConfig,
    *,
    steps: int,
    evaluate: Callable[[Params], ArrayLike] | None,
    batches: Callable[[int], Any],
    on_base: Callable[[TrainState], None] | None,
    show_progress: bool,
) -> Counterfactual:
    """`counterfactual`, which gives up the state it is given."""
    start = int(base.step)
    inside = check_weights(config, weights, start, steps, tell=True)
    evaluate = evaluate or (lambda params: np.zeros(0))
    before = _values(evaluate, base.params, f"at checkpoint {start}")
    first_params = jax.tree.map(jnp.copy, base.params)
    changed: TrainState | None = None
    losses, distances = [], []
    for step in _bar(range(start, start + steps), show_progress):
        tokens = batches(step)
        if step == start:
            preflight.check_memory(
                "a changed run beside the base run",
                (1, base),
                program=partial(_step_program, base, tokens, config),
            )
        given = _row_weights(inside, step, config.training.batch_size)
        if given is None:
            if changed is not None:
                changed, after = jitted_train_step(changed, tokens, config=config)
            base, metrics = jitted_train_step(base, tokens, config=config)
            after = metrics if changed is None else after
            losses.append((float(metrics["loss"]), float(after["loss"])))
        else:
            changed = _copied(base) if changed is None else changed
            # Of the changed run the step itself tells the weighted loss.
            both = (base.params, changed.params)
            pair = [float(jitted_loss(of, tokens, config=config)) for of in both]
            losses.append((pair[0], pair[1]))
            base, metrics = jitted_train_step(base, tokens, config=config)
            changed, after = jitted_train_step(changed, tokens, given, config=config)
        for name, found in (("base", metrics), ("changed", after)):
            _check_step(step, name, found)
        if on_base is not None:
            on_base(base)
        distances.append(0.0 if changed is None else float(_distance(base.params, changed.params)))
    assert changed is not None
    apart = {p.path: float(v) for p, v in items(_distances(base.params, changed.params))}
    base_loss, changed_loss = np.array(losses).T
    end = f"after step {start + steps - 1} of the"
    return Counterfactual(
        start=start,
        weights=inside,
        base_loss=base_loss,
        changed_loss=changed_loss,
        distance=np.array(distances),
        moved=float(_distance(base.params, first_params)),
        by_parameter=apart,
        before=before,
        base=_values(evaluate, base.params, f"{end} base run"),
        changed=_values(evaluate, changed.params, f"{end} changed run"),
        base_state=base,
        changed_state=changed,
    )


def _step_program(state: TrainState, tokens: Any, config: RunConfig) -> Any:
    return jitted_train_step.lower(state, tokens, config=config).compile()


def _copied(state: TrainState) -> TrainState:
    """A state that a train step may give up."""
    return jax.tree.map(jnp.copy, state)


def _function(
    config: RunConfig, batches: Batches | Callable[[int], Any] | None, start: int, steps: int
) -> Callable[[int], Any]:
    """What gives the batch of a step, on the mesh around us if it is the run's."""
    last = config.training.steps
    if not 1 <= steps <= last - start:
        raise ValueError(
            f"{steps} steps from step {start}: at least 1 is wanted, and the run ends at {last} "
            "(training.steps)"
        )
    batches = data.batches(config) if batches is None else batches
    if not isinstance(batches, Batches):
        return batches
    mesh = jax.sharding.get_mesh()
    return (batches if mesh.empty else GlobalBatches(batches, mesh)).__getitem__


def _row_weights(
    inside: Mapping[tuple[int, int], float], step: int, size: int
) -> Float[NDArray, " batch"] | None:
    """The weights of a step's rows; None where nothing was said of them."""
    of_step = {slot: weight for (at, slot), weight in inside.items() if at == step}
    if not of_step:
        return None
    weights = np.ones(size, np.float32)
    weights[list(of_step)] = list(of_step.values())
    return weights


def _bar(steps: range, show: bool) -> Iterator[int]:
    with logging_redirect_tqdm():
        bar = tqdm(steps, desc="base and changed", unit="step", disable=not show or not is_first())
        yield from preflight.timed(bar, len(steps), "the steps that are left")


def _values(
    evaluate: Callable[[Params], ArrayLike], params: Params, when: str
) -> NDArray[np.float64]:
    found = np.atleast_1d(np.asarray(evaluate(params), np.float64))
    if found.ndim != 1:
        raise ValueError(f"evaluate gave shape {found.shape}: one number a row, [rows], is wanted")
    if not np.isfinite(found).all():
        row = int(np.flatnonzero(~np.isfinite(found))[0])
        raise RuntimeError(f"{when}: the loss of evaluation row {row} is {found[row]}")
    return found


def _check_step(step: int, name: str, metrics: Mapping[str, Any]) -> None:
    if bool(metrics["halted"]):
        raise RuntimeError(
            f"step {step} of the {name} run: its loss or gradient is no finite number, and there "
            "training stops (training.on_nonfinite: stop)"
        )
    if not bool(metrics["updated"]):
        log.warning("step %d of the %s run made no update: its gradient is not finite", step, name)


@jax.jit
def _distances(a: Params, b: Params) -> Params:
    return jax.tree.map(lambda x, y: optax.tree.norm(x - y), a, b)


@jax.jit
def _distance(a: Params, b: Params) -> Float[Array, ""]:
    return optax.tree.norm(optax.tree.sub(a, b))
