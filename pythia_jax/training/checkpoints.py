"""Checkpoints of a run, by Orbax: scheduled ones that stay, and a few only to resume from.

`checkpoints/<step>/` holds the scheduled steps (`RunConfig.checkpoint_steps`), each the whole
state or, with `archive: params`, the parameters alone. `resume/<step>/` holds whole states
between them, the newest few. A checkpoint is written under a temporary name and moved in place
when complete, and moved out of its place before it is deleted: a process killed at any moment
leaves no half of one under the name of a step.
"""

import logging
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.typing import DTypeLike

from pythia_jax.configs import RunConfig
from pythia_jax.model import parameters
from pythia_jax.model.parameters import Params
from pythia_jax.training import provenance
from pythia_jax.training.step import TrainState, abstract_state

log = logging.getLogger(__name__)

DELETED = ".deleted"
"""Folder inside resume/ that old states are moved into, in one go, before they are deleted."""


class Checkpoints:
    """The checkpoints of one run folder. A context manager: leaving it waits for pending writes.

    What a killed process left half-written or half-deleted is cleared away.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._steps = frozenset(config.checkpoint_steps)
        # Orbax wants absolute paths.
        folder = Path(config.checkpoint.directory).absolute()
        self._deleted = folder / "resume" / DELETED
        self._clear_deleted()
        self._scheduled = _manager(folder / "checkpoints", keep=None)
        self._resume = _manager(folder / "resume", keep=config.checkpoint.keep_resume)
        self._is_whole: dict[int, bool] = {}  # of scheduled steps, as far as looked at
        self._can_resume = self._newest_whole() is not None
        self._last_full = time.monotonic()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._scheduled.close()
        self._resume.close()
        shutil.rmtree(self._deleted, ignore_errors=True)

    def due(self, step: int) -> bool:
        """Whether something should be saved at this step: it is scheduled, or time has passed."""
        return step in self._steps or self._resume_due()

    def _resume_due(self) -> bool:
        minutes = (time.monotonic() - self._last_full) / 60
        return minutes >= self._config.checkpoint.resume_every_minutes

    def save(self, step: int, state: TrainState, *, leaving: bool = False) -> None:
        """Save what is due at `step`; when `leaving`, make sure that training can go on from it.

        Returns while the write goes on in the background; an error in it surfaces at the next
        save or when the context is left.
        """
        scheduled = step in self._steps
        archive_whole = self._config.checkpoint.archive == "state"
        there = step in self._scheduled.all_steps()
        whole = scheduled and (self._whole(step) if there else archive_whole)
        # The first archived parameters go with a whole state, or a run that is killed before
        # the clock brings one could not go on.
        wanted = leaving or self._resume_due() or (scheduled and not self._can_resume)
        if wanted and not whole and step not in self._resume.all_steps():
            self._write(self._resume, step, state, whole=True)
            if not self._can_resume:
                self._resume.wait_until_finished()
            whole = True
        if scheduled and not there:
            tree = state if archive_whole else {"params": state.params}
            self._write(self._scheduled, step, tree, whole=archive_whole)
            self._is_whole[step] = archive_whole
        if whole:
            self._can_resume = True
            self._last_full = time.monotonic()

    def _write(self, manager: ocp.CheckpointManager, step: int, tree: Any, *, whole: bool) -> None:
        self._clear_deleted()
        about = {**provenance.surroundings(self._config), "whole": whole}
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(tree),  # type: ignore[call-arg]
            surroundings=ocp.args.JsonSave(about),  # type: ignore[call-arg]
        )
        manager.save(step, args=args, force=True)

    def _clear_deleted(self) -> None:
        # Orbax may be moving another step into the folder, so the folder itself stays.
        for path in self._deleted.glob("*"):
            shutil.rmtree(path)

    def newest(self) -> int | None:
        """The newest step that training can resume from; None where nothing was saved yet.

        Raises RuntimeError if there are checkpoints beyond step 0, but of parameters alone:
        starting again would lose what they have behind them.
        """
        newest, scheduled = self._newest_whole(), self._scheduled.all_steps()
        if newest is None and max(scheduled, default=0) > 0:
            there = ", ".join(map(str, sorted(scheduled)))
            raise RuntimeError(
                f"{self._scheduled.directory}: holds steps {there}, but of each the parameters "
                "alone (archive: params), and resume/ beside it holds no state: training cannot go "
                "on from them. Choose another checkpoint.directory to start from step 0"
            )
        return newest

    def _newest_whole(self) -> int | None:
        resume, scheduled = self._resume.all_steps(), self._scheduled.all_steps()
        steps = sorted({*resume, *scheduled}, reverse=True)
        return next((step for step in steps if step in resume or self._whole(step)), None)

    def _whole(self, step: int) -> bool:
        """Whether a scheduled checkpoint holds the whole state, whatever `archive` says now."""
        if step not in self._is_whole:
            self._is_whole[step] = _about(self._scheduled, step).get("whole", False)
        return self._is_whole[step]

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
            )
        )
        state = manager.restore(step, args=args)["state"]
        now = provenance.surroundings(self._config)
        if changed := provenance.changed_surroundings(_about(manager, step), now):
            was = ", ".join(changed)
            log.warning("resumed from step %d, equal to rounding only: %s", step, was)
        else:
            log.info("resumed from step %d, bit for bit", step)
        return state


def _about(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """What was saved beside a state: the surroundings it was computed in, whether it is whole."""
    args = ocp.args.Composite(surroundings=ocp.args.JsonRestore())  # type: ignore[call-arg]
    return manager.restore(step, args=args)["surroundings"]


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


def _manager(folder: Path, keep: int | None) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=True,
        enable_async_checkpointing=True,
        cleanup_tmp_directories=True,
        todelete_subdir=DELETED,
    )
    return ocp.CheckpointManager(folder, options=options)
