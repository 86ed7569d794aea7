"""Training: from a config to a run folder, and on from wherever an earlier attempt got to."""

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax

from pythia_jax import data
from pythia_jax.configs import ConfigError, RunConfig
from pythia_jax.data.verify import check_ids
from pythia_jax.files import locked
from pythia_jax.model.loss import loss
from pythia_jax.model.parameters import Params
from pythia_jax.training.checkpoints import Checkpoints
from pythia_jax.training.feed import read_ahead
from pythia_jax.training.optimizer import learning_rate
from pythia_jax.training.provenance import enter_run
from pythia_jax.training.step import TrainState, init_state, jitted_train_step
from pythia_jax.training.telemetry import Telemetry, plot_loss

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """Where training got to. state: of checkpoint `step`. resumed_from: None for a fresh start."""

    folder: Path
    step: int
    state: TrainState
    resumed_from: int | None


def train(
    config: RunConfig, *, stop_at: int | None = None, show_progress: bool = True
) -> TrainResult:
    """Train to `training.steps`, going on from the run folder's newest checkpoint if it has one.

    stop_at: leave at this step, with everything saved to go on from it.

    Writes checkpoints, metrics.jsonl, TensorBoard events, config.yaml, data.json, tokenizer.json
    and loss.png into `checkpoint.directory`. Raises ConfigError if the folder holds another run,
    RuntimeError if it holds checkpoints but none to go on from, and NonFiniteError if the loss
    stops being a number.
    """
    if stop_at is not None and stop_at < 0:
        raise ValueError(f"stop_at: {stop_at} is no step of a run; they count from 0")
    if config.model is None:
        raise ConfigError("model: missing; a training run needs one (for example size: 70m)")
    folder = Path(config.checkpoint.directory)
    last = config.training.steps
    stop = last if stop_at is None else min(stop_at, last)
    batches = data.batches(config, "train")
    validation = data.batches(config, "validation") if config.data.has("validation") else None
    check_data(config)
    schedule = learning_rate(config.optimizer, config.training.steps)

    with run_folder(config), Checkpoints(config) as checkpoints:
        resumed = checkpoints.newest()
        state = jitted_init(config) if resumed is None else checkpoints.restore(resumed)
        start = 0 if resumed is None else resumed
        feed = read_ahead(batches, start, stop)
        with Telemetry(config, start, schedule, show_progress) as telemetry:
            for step in range(start, stop + 1):
                # Before the checkpoint: none is written of a loss that is no number.
                if validation is not None and evaluation_due(config, step):
                    telemetry.flush()
                    value = held_out_loss(state.params, config, validation, step)
                    telemetry.write(step, {"validation_loss": value})
                    telemetry.restart_clock()
                if checkpoints.due(step) or step == stop:
                    telemetry.flush()
                    checkpoints.save(step, state, leaving=step == stop)
                    telemetry.restart_clock()
                if step >= stop:
                    break
                asked = time.perf_counter()
                tokens = next(feed)
                waited = time.perf_counter() - asked
                state, metrics = jitted_train_step(state, tokens, config=config)
                telemetry.step(step, metrics, waited)
        plot_loss(folder, config.name)
    return TrainResult(folder, max(start, stop), state, resumed)


jitted_init = jax.jit(init_state, static_argnums=0)


def evaluation_due(config: RunConfig, step: int) -> bool:
    """Every `evaluation.every` steps, and at the end."""
    if config.evaluation.steps == 0 or step == 0:
        return False
    return step % config.evaluation.every == 0 or step == config.training.steps


def held_out_loss(params: Params, config: RunConfig, batches: data.Batches, step: int) -> float:
    """Mean loss in nats over the validation batches that belong to checkpoint `step`.

    As upstream, each evaluation takes the `evaluation.steps` batches after those of the one
    before it; which they are depends on the step alone.
    """
    first = (step - 1) // config.evaluation.every * config.evaluation.steps
    chosen = range(first, first + config.evaluation.steps)
    values = [jitted_loss(params, batches[i], config=config) for i in chosen]
    return sum(map(float, values)) / len(values)


@partial(jax.jit, static_argnames="config")
def jitted_loss(params: Params, tokens: jax.Array, *, config: RunConfig) -> jax.Array:
    assert config.model is not None
    return loss(params, tokens, config.model, runtime=config.runtime)


def check_data(config: RunConfig) -> None:
    """Refuse data that holds ids outside the vocabulary, before anything is computed on it.

    Raises ValueError; large and remote data are checked batch by batch instead.
    """
    assert config.model is not None
    paths = dict.fromkeys([*config.data.train, *config.data.validation])
    check_ids(paths, config.model.vocab_size)


@contextmanager
def run_folder(config: RunConfig) -> Iterator[None]:
    """Make or take over the run folder, and keep every other process out of it."""
    folder = Path(config.checkpoint.directory)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder / ".lock", wait=False))
        except BlockingIOError:
            raise RuntimeError(f"{folder}: another process is training in this folder") from None
        enter_run(config, folder)
        yield
