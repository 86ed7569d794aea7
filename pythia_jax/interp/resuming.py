"""A run gone on with from one of its checkpoints: its state there, and the batches that follow."""

import dataclasses
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax

from pythia_jax import data, sharding
from pythia_jax.bridge.run_in import is_run_folder
from pythia_jax.bridge.start import prepare
from pythia_jax.configs import ConfigError, InitializeConfig, RunConfig
from pythia_jax.data.storage import is_url
from pythia_jax.interp import preflight
from pythia_jax.training.bucket import path_of
from pythia_jax.training.checkpoints import step_folders
from pythia_jax.training.digests import changed, digests
from pythia_jax.training.feed import GlobalBatches
from pythia_jax.training.step import TrainState, abstract_state
from pythia_jax.training.stored import DamagedError, read_about
from pythia_jax.training.trainer import keep_compiled, on_devices

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Resumed:
    """A run at one of its checkpoints, on the mesh around us.

    config: as it computes here. state: of checkpoint `step`. batches: of all its steps. model: what
    it was read from.
    """

    config: RunConfig
    state: TrainState
    batches: GlobalBatches
    step: int
    model: str


@contextmanager
def resumed(
    model: str,
    config: RunConfig,
    step: int,
    *,
    steps: int = 1,
    optimizer_state: str = "checkpoint",
    revision: str | None = None,
    show_progress: bool = True,
) -> Iterator[Resumed]:
    """The run of `config` at checkpoint `step` of `model`, inside of its mesh.

        with resumed("runs/small", config, 3000) as run:
            metagradient(run.state, run.batches, query_loss, steps=20, config=run.config)

    model: a run folder, or whatever `pj.load` takes. steps: how many are to be trained from there.
    optimizer_state: as in `initialize_from`: `checkpoint`, `rebuild:K` or `zero`. revision: of a
    model on the hub.

    Raises ConfigError for steps that the run does not have and a model that has no such state,
    FileNotFoundError where there is no such model, checkpoint or data, and MemoryError with the
    numbers where the state does not fit.
    """
    last = config.training.steps
    if not 0 <= step < step + steps <= last:
        asked = f"step {step} is" if steps == 1 else f"steps {step} to {step + steps - 1} are"
        raise ConfigError(
            f"{asked} no part of the run, which has {last} steps (training.steps), from 0 on"
        )
    source = InitializeConfig(
        model=model, revision=revision, step=step, optimizer_state=optimizer_state
    )
    # In a folder that holds no checkpoint to go on from, or that would be taken.
    with tempfile.TemporaryDirectory() as empty:
        checkpoint = dataclasses.replace(config.checkpoint, directory=f"{empty}/run")
        asked = dataclasses.replace(config, initialize_from=source, checkpoint=checkpoint)
        filled, initial = prepare(asked, show_progress=show_progress)
    assert initial is not None
    filled = dataclasses.replace(filled, checkpoint=config.checkpoint)
    mesh = sharding.make_mesh(filled.mesh)
    filled = on_devices(filled, mesh)
    keep_compiled()
    batches = GlobalBatches(data.batches(filled, "train"), mesh)
    preflight.check_memory("a train state of this model", (1, abstract_state(filled, mesh)))
    with jax.set_mesh(mesh):
        yield Resumed(filled, initial(filled, mesh), batches, step, model)


def differences(model: str, step: int, state: TrainState) -> list[str] | None:
    """Names of the arrays in which a state is not, to the bit, checkpoint `step` of a run folder.

    None where there is no such checkpoint, or it is damaged. Of one that holds parameters alone,
    these are compared. All processes call this together.
    """
    if not is_url(model) and not is_run_folder(Path(model)):
        return None
    folders = step_folders(path_of(model))
    if step not in folders:
        return None
    try:
        saved = read_about(folders[step])["digests"]
    except DamagedError as error:
        log.warning("%s: so it is not compared", error)
        return None
    found = digests(state)
    return changed(saved, {name: found[name] for name in saved if name in found})


def told(step: int, differing: list[str] | None) -> str:
    """What `differences` found, in words; empty where nothing was compared."""
    if differing is None:
        return ""
    if not differing:
        return f"equal, bit for bit, to the run's own checkpoint {step}"
    more = f" and {len(differing) - 2} more" if len(differing) > 2 else ""
    return (
        f"NOT the run's own checkpoint {step} to the bit ({', '.join(differing[:2])}{more} "
        "differ): other devices, another version of JAX or other settings round otherwise"
    )
