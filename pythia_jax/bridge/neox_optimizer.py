"""GPT-NeoX's optimizer states in: float32 weights, Adam's moments and counters, as a train state.

The moments of a row-parallel bias. GPT-NeoX keeps n copies b_1 … b_n of it, one a rank, and adds
them; here there is B = b_1 + … + b_n. A sum hands its gradient on whole, dL/db_r = dL/dB, so that m
and v of every copy are the m and v of B, and B has their mean. Each copy takes Adam's step by them,
and so B takes n such steps at once: that is `optimizer.row_parallel_bias_multiple: n`.
"""

import dataclasses
import logging
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pythia_jax.bridge.neox_groups import KINDS, ZERO_FILE, Groups, groups_of
from pythia_jax.bridge.neox_in import (
    NeoxFolder,
    added,
    check,
    look_into,
    merged,
    numbered_files,
)
from pythia_jax.bridge.opened import CheckpointError, Opened
from pythia_jax.configs import ModelConfig, RunConfig
from pythia_jax.model.parameters import Parameter
from pythia_jax.training import loss_scale
from pythia_jax.training.loss_scale import LossScale
from pythia_jax.training.optimizer import scale_by_adam
from pythia_jax.training.step import TrainState, abstract_state, state_shardings

log = logging.getLogger(__name__)


def has_train_state(folder: Path) -> bool:
    """Whether a GPT-NeoX folder holds an optimizer state. Raises as `open_folder` does."""
    found = look_into(folder)
    return bool(numbered_files(found.path, ZERO_FILE)) or bool(found.client.get("optimizer"))


def train_state(folder: Path, config: RunConfig) -> TrainState:
    """The state from which the run in `folder` would have gone on, on the mesh around us if any.

    It is that of a run that was never stopped. ZeRO-1's elastic checkpoints hold no counter of
    Adam's, which is then taken to be that of all updates made; what really happened when such a run
    was restarted is `optimizer.restarts`. Beside the state there is one parameter in memory, its
    layers stacked.

    Raises CheckpointError where there is no optimizer state, or one of a form that is not known,
    and whatever `neox_in.open_folder` raises.
    """
    assert config.model is not None
    found = look_into(folder)
    check(found, config.model)
    _compare_multiple(found, config)
    groups, about = groups_of(found, config.model)
    trees = {}
    for kind in KINDS:
        read = partial(_read, found, config.model, groups, kind)
        whole = Opened(config=config.model, read=read, stored_dtype="float32", source=kind)
        trees[kind] = whole.params(jnp.float32)
    step, updates = _counters(found)
    like: Any = abstract_state(config)
    places: Any = like
    mesh = jax.sharding.get_mesh()
    if not mesh.empty:
        places = state_shardings(config, mesh)

    def scalar(value: Any, abstract: Any, place: Any) -> jax.Array:
        array = jnp.asarray(value, abstract.dtype)
        return array if mesh.empty else jax.device_put(array, place)

    def filled(part: Any, place: Any) -> Any:
        if isinstance(part, optax.ScaleByAdamState):
            count = _adam_count(config, about, step, updates)
            return part._replace(
                count=scalar(count, part.count, place.count),
                mu=trees["exp_avg"],
                nu=trees["exp_avg_sq"],
            )
        if isinstance(part, optax.ScaleByScheduleState):
            return part._replace(count=scalar(updates, part.count, place.count))
        return part

    opt_state = tuple(map(filled, like.opt_state, places.opt_state))
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(opt_state)):
        raise AssertionError("the optimizer has a state that is not filled in here")
    scale = None
    if like.loss_scale is not None:
        scale = jax.tree.map(scalar, _loss_scale(about, step), like.loss_scale, places.loss_scale)
    return TrainState(
        step=scalar(step, like.step, places.step),
        params=trees["fp32"],
        opt_state=opt_state,
        loss_scale=scale,
        halted=scalar(False, like.halted, places.halted),
    )


def _compare_multiple(found: NeoxFolder, config: RunConfig) -> None:
    """Tell where row-parallel biases will not move as far as they did in the run."""
    assert config.model is not None
    there = found.model_parallel if config.model.use_parallel_residual else 1
    here = config.optimizer.row_parallel_bias_multiple
    if here != there:
        log.warning(
            "%s was trained by %d model-parallel ranks, whose row-parallel biases move %d times as "
            "far as one; here it is optimizer.row_parallel_bias_multiple: %d. Set it to %d to go "
            "on as there",
            found.path,
            found.model_parallel,
            there,
            here,
            there,
        )


def _read(
    found: NeoxFolder,
    config: ModelConfig,
    groups: Groups,
    kind: str,
    parameter: Parameter,
    layer: int,
) -> np.ndarray:
    name = parameter.neox_names(config)[layer]
    parts = []
    for rank in range(found.model_parallel):
        pieces, start, shape = groups[name, rank]
        size = int(np.prod(shape))
        parts.append(pieces[kind].read(start, start + size).reshape(shape))
    value = merged(parameter, parts, add=kind == "fp32" and added(parameter, config))
    return value.T if parameter.transposed else value


def _counters(found: NeoxFolder) -> tuple[int, int]:
    """Batches taken, and updates made of them."""
    step, schedule = found.step, found.client.get("lr_scheduler")
    updates = schedule.get("num_iters") if isinstance(schedule, dict) else None
    if updates is None:
        taken, skipped = found.client.get("global_steps"), found.client.get("skipped_steps")
        updates = None if taken is None or skipped is None else taken - skipped
    if step is None or updates is None or not 0 <= updates <= step:
        raise CheckpointError(
            f"{found.path}: step {step} with {updates} updates: mp_rank_00_model_states.pt should "
            "tell both (iteration; lr_scheduler's num_iters, or global_steps and skipped_steps)"
        )
    return step, updates


def _adam_count(config: RunConfig, about: dict[str, Any], step: int, updates: int) -> int:
    """Adam's counter as the checkpoint has it, or, where it has none, as it must have been."""
    if about["step"] is not None:
        return about["step"]
    first = int(scale_by_adam(config.optimizer).init({}).count)  # type: ignore[attr-defined]
    since = max((at for at in config.optimizer.restarts if at <= step), default=0)
    return first + min(updates, step - since)


def _loss_scale(about: dict[str, Any], step: int) -> LossScale:
    """float16's scale. DeeperSpeed's own count of steps may have begun later than the run."""
    begun = loss_scale.initial(step)
    if about["cur_scale"] is None or not about["dynamic"]:
        log.warning("the checkpoint tells no dynamic loss scale: it begins anew")
        return begun
    last = begun.last_overflow
    if about["cur_iter"] is not None and about["last_overflow_iter"] is not None:
        last = step - (about["cur_iter"] - about["last_overflow_iter"])
    hysteresis = about["cur_hysteresis"]
    return dataclasses.replace(
        begun,
        scale=about["cur_scale"],
        hysteresis=begun.hysteresis if hysteresis is None else hysteresis,
        last_overflow=last,
    )
