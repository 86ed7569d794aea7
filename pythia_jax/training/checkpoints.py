"""Checkpoints of a run, by Orbax: scheduled ones that stay, and a few only to resume from.

`checkpoints/<step>/` holds the scheduled steps (`RunConfig.checkpoint_steps`), each the whole
state or, with `archive: params`, the parameters alone. `resume/<step>/` holds whole states
between them, the newest few. A checkpoint is written under a temporary name and moved in place
when complete, and moved out of its place before it is deleted: a process killed at any moment
leaves no half of one under the name of a step. Beside each lie digests of its arrays, formed anew
when it is read: one that is damaged is named, passed over and moved aside to `<step>.damaged`,
which nothing reads and nothing deletes.

On a bucket no folder can be moved in one go. A checkpoint lies there under its own name from the
start, and counts once `commit_success.txt` is in it.
"""

import logging
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from pythia_jax.configs import RunConfig
from pythia_jax.training import provenance
from pythia_jax.training.agreement import all_say, from_first
from pythia_jax.training.bucket import AnyPath, path_of
from pythia_jax.training.digests import Digests, digests, name_of
from pythia_jax.training.step import TrainState
from pythia_jax.training.stored import DamagedError, read_about, read_state, sealed
from pythia_jax.training.streamed import shard_axes

log = logging.getLogger(__name__)

SCHEDULED, RESUME = "checkpoints", "resume"
"""Folders of a run folder that hold checkpoints."""
DELETED = ".deleted"
"""Folder inside them that old states are moved into, in one go, before they are deleted."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written. What was complete before it is untouched."""


class Checkpoints:
    """The checkpoints of one run folder. A context manager: leaving it waits for pending writes.

    like: the state that is saved and restored: shapes, dtypes and shardings of its arrays
    (`ShapeDtypeStruct`). Restoring puts them there, whatever mesh they were saved from.

    In a run of several processes all of them make one and call it alike. What a killed process
    left half-written or half-deleted is cleared away.
    """

    def __init__(self, config: RunConfig, like: TrainState) -> None:
        self._config, self._like = config, like
        self._steps = frozenset(config.checkpoint_steps)
        self._folder = _absolute(path_of(config.checkpoint.directory))
        self._clear_deleted()
        self._managers = {
            SCHEDULED: _manager(self._folder / SCHEDULED, keep=None),
            RESUME: _manager(self._folder / RESUME, keep=config.checkpoint.keep_resume),
        }
        # What lies at steps beyond this one was left by a line of training that is given up.
        self._start: int | None = None
        self._saved: set[tuple[str, int]] = set()
        self._whole: set[int] = set()  # steps that training can go on from
        self._last_whole = time.monotonic()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        failures = []
        for name, manager in self._managers.items():
            try:
                manager.close()
            except Exception as error:
                failures.append(self._unwritten(f"{name}/", error))
        if not failures:
            self._clear_deleted(folder_too=True)
        elif kind is None:
            raise failures[0]
        else:  # what is under way already says more
            log.error("%s", failures[0])

    def restore_newest(self, stop: float = math.inf) -> tuple[int, TrainState] | None:
        """The newest step that training can go on from, and its state; None for a fresh start.

        A checkpoint that is damaged is named in a warning, and the one before it is taken; once
        one is good, the damaged are moved aside. To be called once, before anything is saved.

        stop: the step that training is to end at, for the log.

        Raises RuntimeError, with nothing moved or deleted, if what there is can not be gone on
        from: all damaged, or beyond step 0 but of parameters alone. Starting again would lose
        what they have behind them.
        """
        damaged: list[AnyPath] = []
        light: list[int] = []
        for kind, step in self._newest_first():
            path = self._folder / kind / str(step)
            try:
                about = self._read_about(path)
                if not about["whole"]:
                    light.append(step)
                    continue
                state = read_state(path, self._like, about["digests"])
            except DamagedError as error:
                log.warning("damaged, so not used, looking for an older one: %s", error)
                damaged.append(path)
                continue
            self._begin(step, whole=True)
            self._move_aside(damaged)
            self._tell(step, about, stop)
            return step, state
        if damaged:
            there = "; ".join(
                f"{kind}/ {', '.join(sorted(steps, key=int))}"
                for kind in (SCHEDULED, RESUME)
                if (steps := [path.name for path in damaged if path.parent.name == kind])
            )
            raise RuntimeError(
                f"{self._folder}: no checkpoint to go on from; all are damaged: {there}. Bring one "
                "back from a copy, or choose another checkpoint.directory to start from step 0"
            )
        if max(light, default=0) > 0:
            there = ", ".join(map(str, sorted(light)))
            raise RuntimeError(
                f"{self._folder / SCHEDULED}: holds steps {there}, but of each the parameters "
                "alone (archive: params), and resume/ beside it holds no state: training cannot go "
                "on from them. Choose another checkpoint.directory to start from step 0"
            )
        self._begin(-1, whole=False)
        return None

    def scheduled(self, step: int) -> bool:
        """Whether the config wants a checkpoint of this step kept for good."""
        return step in self._steps

    def clock_due(self) -> bool:
        """Whether it is time for a state to resume from, by this process's clock."""
        minutes = (time.monotonic() - self._last_whole) / 60
        return minutes >= self._config.checkpoint.resume_every_minutes

    def check(self) -> None:
        """Raise CheckpointError if a write in the background has failed; cheap, for every step."""
        for name, manager in self._managers.items():
            try:
                manager.check_for_errors()
            except Exception as error:
                raise self._unwritten(f"{name}/", error) from error

    def save(self, step: int, state: TrainState, *, resume: bool) -> None:
        """Save what is scheduled at `step`; with `resume`, make sure training can go on from it.

        Returns while the write goes on in the background: the arrays of `state` may be given up,
        and an error surfaces at `check`, at the next save or when the context is left. Raises
        CheckpointError.
        """
        self.check()
        archive_whole = self._config.checkpoint.archive == "state"
        archive = self.scheduled(step) and not self._is_kept(SCHEDULED, step)
        # The first archived parameters go with a whole state, or a run that is killed before
        # the clock brings one could not go on.
        wanted = resume or (self.scheduled(step) and not self._whole)
        to_resume = wanted and step not in self._whole and not (archive and archive_whole)
        if not archive and not to_resume:
            return
        found = digests(state)
        if to_resume and not self._is_kept(RESUME, step):
            self._write(RESUME, step, state, found, whole=True)
            if not self._whole:
                self._wait(RESUME)
        if archive:
            tree = state if archive_whole else {"params": state.params}
            self._write(SCHEDULED, step, tree, found, whole=archive_whole)
        if to_resume or archive_whole:
            self._whole.add(step)
            self._last_whole = time.monotonic()

    def _is_kept(self, kind: str, step: int) -> bool:
        """Whether a step lies there to stay; what a given-up line of training left is deleted."""
        if self._start is None:
            raise RuntimeError("restore_newest() comes before the first save")
        manager = self._managers[kind]
        if step not in manager.all_steps():
            return False
        if step <= self._start or (kind, step) in self._saved:
            return True
        log.info("%s/%d is of a run that was cut off; it is written anew", kind, step)
        manager.delete(step)
        return False

    def _write(self, kind: str, step: int, tree: Any, found: Digests, *, whole: bool) -> None:
        self._clear_deleted()
        names = [name_of(path) for path, _ in jax.tree.leaves_with_path(tree)]
        about = {
            **provenance.surroundings(self._config, self._sharding()),
            "step": step,
            "whole": whole,
            "digests": {name: found[name] for name in names},
        }
        by_layer = jax.tree.map(lambda x: ocp.SaveArgs(shard_axes=shard_axes(x.ndim)), tree)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(tree, save_args=by_layer),  # type: ignore[call-arg]
            surroundings=ocp.args.JsonSave(sealed(about)),  # type: ignore[call-arg]
        )
        try:
            self._managers[kind].save(step, args=args, force=True)
        except Exception as error:
            raise self._unwritten(f"{kind}/{step}", error) from error
        self._saved.add((kind, step))

    def _wait(self, kind: str) -> None:
        try:
            self._managers[kind].wait_until_finished()
        except Exception as error:
            raise self._unwritten(f"{kind}/", error) from error

    def _unwritten(self, what: str, error: Exception) -> CheckpointError:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        failure = CheckpointError(
            f"{self._folder / what}: a checkpoint could not be written ({lines[0][:500]}). Those "
            "complete before it are untouched: make room or mend the storage, and start again"
        )
        failure.__cause__ = error  # tells a peer's death from a fault of our own
        return failure

    def _newest_first(self) -> Iterator[tuple[str, int]]:
        """Folders and steps of the checkpoints there are, as process 0 sees them."""
        kinds = (RESUME, SCHEDULED)
        there = [(step, i) for i, k in enumerate(kinds) for step in self._managers[k].all_steps()]
        there.sort(key=lambda found: (-found[0], found[1]))
        flat = from_first([number for found in there for number in found])
        for step, i in zip(flat[::2], flat[1::2], strict=True):
            yield kinds[i], step

    def _read_about(self, path: AnyPath) -> dict[str, Any]:
        about, failure = {}, None
        try:
            about = read_about(path)
        except DamagedError as error:
            failure = error
        if not all_say(failure is None):
            raise failure or DamagedError(f"{path}: another process cannot read it")
        return about

    def _begin(self, step: int, *, whole: bool) -> None:
        self._start = step
        self._whole = {step} if whole else set()
        self._last_whole = time.monotonic()

    def _move_aside(self, damaged: list[AnyPath]) -> None:
        if not damaged:
            return
        if jax.process_index() == 0:
            for path in damaged:
                target, more = path.with_name(f"{path.name}.damaged"), 1
                while target.exists():
                    more += 1
                    target = path.with_name(f"{path.name}.damaged-{more}")
                path.rename(target)
                log.warning("moved aside: %s; delete it when you have no more use for it", target)
        all_say(True)  # the others look only after that
        for manager in self._managers.values():
            manager.reload()

    def _tell(self, step: int, about: dict[str, Any], stop: float) -> None:
        if step >= stop:
            log.info("already trained to step %d: %s", step, self._folder)
            return
        now = provenance.surroundings(self._config, self._sharding())
        if changed := provenance.changed_surroundings(about, now):
            was = ", ".join(changed)
            log.warning("resumed from step %d, equal to rounding only: %s", step, was)
        else:
            log.info("resumed from step %d, bit for bit", step)

    def _sharding(self) -> jax.sharding.Sharding:
        return jax.tree.leaves(self._like.params)[0].sharding

    def _clear_deleted(self, *, folder_too: bool = False) -> None:
        # Orbax may be moving another step into the folder, so the folder itself stays.
        if jax.process_index() != 0 or not isinstance(self._folder, Path):
            return
        for kind in (SCHEDULED, RESUME):
            folder = self._folder / kind / DELETED
            for path in [folder] if folder_too else folder.glob("*"):
                shutil.rmtree(path, ignore_errors=folder_too)


def step_folders(folder: AnyPath) -> dict[int, AnyPath]:
    """The steps that a run folder holds, and the folder of each; of two, one that stays."""
    folder = _absolute(folder)
    kinds = (RESUME, SCHEDULED)
    return {int(path.name): path for kind in kinds for path in steps_in(folder / kind)}


def steps_in(folder: AnyPath) -> list[AnyPath]:
    """The folders of the steps that a folder of checkpoints holds."""
    if isinstance(folder, Path):
        return [path for path in folder.glob("*") if path.name.isdigit()]
    # There a name is no sign of a whole checkpoint, and what is, Orbax knows.
    steps = ocp.utils.checkpoint_steps(folder) if folder.exists() else []
    return [folder / str(step) for step in steps]


def _absolute(folder: AnyPath) -> AnyPath:
    """As Orbax wants it."""
    return folder.absolute() if isinstance(folder, Path) else folder


def _manager(folder: AnyPath, keep: int | None) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=True,
        enable_async_checkpointing=True,
        cleanup_tmp_directories=True,
        todelete_subdir=DELETED,
        # Two managers write at once: each needs barriers of its own between processes.
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            barrier_sync_key_prefix=folder.name
        ),
        # Made in the background, folders that cannot be made leave threads behind that wait for
        # them, and keep the process from ending for ten minutes.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        # What lies beside a damaged checkpoint must not stop us from finding the others.
        lightweight_initialize=True,
    )
    return ocp.CheckpointManager(folder, options=options)
