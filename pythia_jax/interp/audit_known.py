"""What is known of a model's checkpoints before one is looked at: schedule, start, known faults."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from pythia_jax import suite
from pythia_jax.bridge import hub, run_in
from pythia_jax.bridge.revisions import Source, is_run, run_config
from pythia_jax.configs import RunConfig
from pythia_jax.interp.streaming import Checkpoints
from pythia_jax.training.bucket import path_of
from pythia_jax.training.checkpoints import step_folders
from pythia_jax.training.optimizer import learning_rates
from pythia_jax.training.records import read_metrics
from pythia_jax.training.stored import DamagedError, read_about

_SEED = re.compile(r"-(weight-|data-)?seed\d+$")
"""End of the names of runs from other seeds."""
_PYTHIA = "as in all of Pythia: the first update has learning rate 0 (pythia#83)"


@dataclass(frozen=True)
class Known:
    """steps: that should be there; None where no schedule is known. schedule: whose it is.

    initializer: of the distributions that step 0 was drawn from; None where it is not known.
    fresh: whether step 0 is that start at all. bad: what is known to be wrong with a step.
    unmoved: why two steps, one after the other, rightly hold the same weights; None if they do not.
    notes: what else should be known.
    """

    steps: tuple[int, ...] | None = None
    schedule: str = ""
    initializer: str | None = None
    fresh: bool = True
    bad: Callable[[int], str | None] = lambda step: None
    unmoved: Callable[[int, int], str | None] = lambda before, step: None
    notes: tuple[str, ...] = ()


def known_of(checkpoints: Checkpoints) -> Known:
    """What is known of a model, by its name or its run folder. Of pairs, nothing."""
    if not isinstance(checkpoints, str | PathLike):
        return Known()
    model = str(checkpoints)
    folder = Path(model)
    if is_run(model):
        return _of_run(path_of(model))
    if folder.exists() or not hub.is_hub_name(folder.as_posix()):
        return Known(unmoved=_first_update)
    return _of_hub(hub.hub_id(folder.as_posix()))


def _first_update(before: int, step: int) -> str | None:
    """Of GPT-NeoX's schedules."""
    return _PYTHIA if (before, step) == (0, 1) else None


def _of_hub(repo: str) -> Known:
    org, _, name = repo.partition("/")
    try:
        size = suite.lookup(_SEED.sub("", name)) if org == "EleutherAI" else None
    except ValueError:
        size = None
    if size is None:
        return Known(unmoved=_first_update)
    return Known(
        steps=suite.CHECKPOINT_STEPS,
        schedule="the suite's",
        initializer=size.initializer,
        bad=lambda step: suite.bad_revision(repo, step),
        unmoved=_first_update,
        notes=(*suite.COMMON_FAULTS, *size.known_faults),
    )


def _of_run(place: Any) -> Known:
    config, there = run_config(place), step_folders(place)
    if any(_converted(folder) for folder in there.values()):
        # The config's schedule is not theirs, and neither is its start.
        return Known(unmoved=_first_update)
    newest, last = max(there, default=0), config.training.steps
    notes = (f"the run has come to step {newest} of {last}",) if newest < last else ()
    return Known(
        steps=tuple(step for step in config.checkpoint_steps if step <= newest),
        schedule="the run's own",
        initializer=None if config.model is None else config.model.initializer,
        fresh=config.initialize_from is None,
        unmoved=_unmoved(config, place),
        notes=notes,
    )


def _converted(folder: Any) -> bool:
    try:
        return run_in.CONVERTED in read_about(folder)
    except DamagedError:
        return False  # told when it is loaded


def _unmoved(config: RunConfig, place: Any) -> Callable[[int, int], str | None]:
    """Steps between which every update was skipped, or had a learning rate of 0."""
    metrics = place / "metrics.jsonl"
    lines: Iterable[dict] = ()
    if isinstance(place, Path) and metrics.is_file():
        lines = read_metrics(metrics)
    # A skipped update always has a line.
    skipped = {int(line["step"]) for line in lines if line.get("skipped")}
    rates = learning_rates(config.optimizer, config.training.steps)

    def unmoved(before: int, step: int) -> str | None:
        why = set()
        for number in range(before, step):
            if number in skipped:
                why.add("its update was skipped")
                continue
            made = number - sum(s < number for s in skipped)
            if rates[made] > 0:
                return None
            why.add("the first update has learning rate 0")
        return " and ".join(sorted(why))

    return unmoved


def expected(known: Known) -> Callable[[Source], Iterable[int]] | None:
    """For `Stream`: the steps that there should be."""
    return None if known.steps is None else lambda source: known.steps or ()
