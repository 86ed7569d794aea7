"""Checkpoints of a run, by Orbax: scheduled ones that stay, and a few only to resume from.

`checkpoints/<step>/` holds the scheduled steps (`RunConfig.checkpoint_steps`), each the whole
state or, with `archive: params`, the parameters alone. `resume/<step>/` holds whole states
between them, the newest few. A checkpoint is written under a temporary name and moved in place
when complete: a process killed at any moment leaves the earlier ones as they were.
"""

import logging
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.typing import DTypeLike

from pythia_jax.configs import ConfigError, RunConfig
from pythia_jax.model import parameters
from pythia_jax.model.parameters import Params
from pythia_jax.training.step import TrainState, abstract_state

log = logging.getLogger(__name__)


def surroundings() -> dict[str, Any]:
    """What the last bits of a run depend on, besides its config."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "jax": jax.__version__,
        "platform": jax.default_backend(),
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
    }


class Checkpoints:
    """The checkpoints of one run folder. A context manager: leaving it waits for pending writes."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        # Orbax wants absolute paths.
        folder = Path(config.checkpoint.directory).absolute()
        self._scheduled = _manager(folder / "checkpoints", keep=None)
        self._resume = _manager(folder / "resume", keep=config.checkpoint.keep_resume)
        self._last_full = time.monotonic()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._scheduled.close()
        self._resume.close()

    def due(self, step: int) -> bool:
        """Whether something should be saved at this step: it is scheduled, or time has passed."""
        return step in self._config.checkpoint_steps or self._resume_due()

    def _resume_due(self) -> bool:
        minutes = (time.monotonic() - self._last_full) / 60
        return minutes >= self._config.checkpoint.resume_every_minutes

    def save(self, step: int, state: TrainState, *, leaving: bool = False) -> None:
        """Save what is due at `step`; when `leaving`, make sure that training can go on from it.

        Returns while the write goes on in the background; an error in it surfaces at the next
        save or when the context is left.
        """
        whole = self._config.checkpoint.archive == "state"
        scheduled = step in self._config.checkpoint_steps
        if scheduled and step not in self._scheduled.all_steps():
            self._write(self._scheduled, step, state if whole else {"params": state.params})
        full = scheduled and whole
        if not full and (leaving or self._resume_due()) and step not in self._resume.all_steps():
            self._write(self._resume, step, state)
            full = True
        if full:
            self._last_full = time.monotonic()

    def _write(self, manager: ocp.CheckpointManager, step: int, tree: Any) -> None:
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(tree),  # type: ignore[call-arg]
            surroundings=ocp.args.JsonSave(surroundings()),  # type: ignore[call-arg]
        )
        manager.save(step, args=args, force=True)

    def newest(self) -> int | None:
        """The newest step that training can resume from, or None."""
        steps = list(self._resume.all_steps())
        if self._config.checkpoint.archive == "state":
            steps += self._scheduled.all_steps()
        return max(steps, default=None)

    def restore(self, step: int) -> TrainState:
        """The whole state of a step; says how exactly the run goes on from it."""
        manager = self._resume if step in self._resume.all_steps() else self._scheduled
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
            abstract_state(self._config),
        )
        args = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(  # type: ignore[call-arg]
                item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
            ),
            surroundings=ocp.args.JsonRestore(),  # type: ignore[call-arg]
        )
        found = manager.restore(step, args=args)
        now = surroundings()
        changed = [key for key in now if found["surroundings"].get(key) != now[key]]
        if changed:
            was = ", ".join(f"{k} {found['surroundings'].get(k)} -> {now[k]}" for k in changed)
            log.warning("resumed from step %d, equal to rounding only: %s", step, was)
        else:
            log.info("resumed from step %d, bit for bit", step)
        return found["state"]


def load_params(
    folder: Path, config: RunConfig, step: int | None, dtype: DTypeLike
) -> tuple[int, Params]:
    """The parameters alone of a step of a run folder (the newest if None), in `dtype`.

    Raises FileNotFoundError, naming the steps there are, for one that is not there.
    """
    assert config.model is not None
    folder = folder.absolute()
    places = {
        int(path.name): path
        for kind in ("resume", "checkpoints")
        for path in (folder / kind).glob("*")
        if path.name.isdigit()
    }
    if not places:
        raise FileNotFoundError(f"{folder}: no checkpoint in it yet")
    step = max(places) if step is None else step
    if step not in places:
        there = ", ".join(map(str, sorted(places)))
        raise FileNotFoundError(f"{folder}: no checkpoint of step {step}; there are {there}")
    target = {"params": parameters.abstract(config.model, dtype)}
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    restore_args = jax.tree.map(
        lambda x: ocp.ArrayRestoreArgs(sharding=device, dtype=jnp.dtype(x.dtype)), target
    )
    with ocp.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.restore(
            places[step] / "state",
            args=ocp.args.PyTreeRestore(  # type: ignore[call-arg]
                item=target, restore_args=restore_args, partial_restore=True
            ),
        )
    return step, found["params"]


def check_same_run(saved: RunConfig, wanted: RunConfig, folder: Path) -> None:
    """Refuse to go on in a folder whose run computed something else.

    Raises ConfigError that names each key that decides the run and differs.
    """
    differing = []
    for section in ("model", "data", "optimizer", "training"):
        before, after = getattr(saved, section), getattr(wanted, section)
        for key in before.__dataclass_fields__:
            free = section == "training" and key in ("attention", "remat", "on_nonfinite")
            if not free and getattr(before, key) != getattr(after, key):
                was, now = getattr(before, key), getattr(after, key)
                differing.append(f"{section}.{key} was {was!r}, is {now!r}")
    if differing:
        raise ConfigError(
            f"{folder} holds a run of another config: {'; '.join(differing)}. Set the old values "
            "to go on with it, or choose another checkpoint.directory"
        )


def _manager(folder: Path, keep: int | None) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=True, enable_async_checkpointing=True
    )
    return ocp.CheckpointManager(folder, options=options)
