"""For the tests of checkpoints: a run folder opened, and states full of random bits."""

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pythia_jax import configs, sharding
from pythia_jax.bridge import Model, run_in
from pythia_jax.configs import RunConfig
from pythia_jax.training.checkpoints import Checkpoints
from pythia_jax.training.step import TrainState, abstract_state


def like(config: RunConfig, devices: Any = None) -> TrainState:
    """The state of a run as `Checkpoints` wants it described, on the config's mesh."""
    return abstract_state(config, sharding.make_mesh(config.mesh, devices or jax.devices()[:1]))


def opened(config: RunConfig) -> Checkpoints:
    """The checkpoints of a run on one device."""
    return Checkpoints(config, like(config))


def random_state(like: TrainState, step: int, seed: int = 0) -> TrainState:
    """Any bits at all in every array, the not-numbers included; only `step` is what it says."""
    rng = np.random.default_rng([seed, step])

    def fill(x: jax.ShapeDtypeStruct) -> jax.Array:
        size = int(np.prod(x.shape)) * x.dtype.itemsize
        high = 2 if x.dtype == np.bool_ else 256
        bits = rng.integers(0, high, size, np.uint8).view(x.dtype).reshape(x.shape)
        # `device_put` would compare what several processes bring, and NaN equals nothing.
        return jax.make_array_from_callback(x.shape, x.sharding, lambda index: bits[index])

    state: Any = jax.tree.map(fill, like)
    return state.replace(step=jax.device_put(np.int32(step), like.step.sharding))  # type: ignore


def folder_of(config: RunConfig) -> Path:
    return Path(config.checkpoint.directory)


def save_steps(config: RunConfig, *steps: int, resume: bool = False) -> dict[int, TrainState]:
    """Save random states at `steps` of a run that is begun or gone on with; returns them."""
    shape = like(config)
    states = {step: random_state(shape, step) for step in steps}
    with Checkpoints(config, shape) as checkpoints:
        checkpoints.restore_newest()
        for step, state in states.items():
            checkpoints.save(step, state, resume=resume)
    return states


def load(config: RunConfig, step: int | None = None, dtype: Any = np.float32) -> Model:
    """The parameters of a step of a run, the newest good one if None."""
    folder = folder_of(config)
    folder.mkdir(parents=True, exist_ok=True)
    configs.save(config, folder / "config.yaml")
    return run_in.load(folder, step, dtype)


def warnings(caplog: Any) -> str:
    """What we logged as a warning or worse; libraries may tell late of tests before this one."""
    ours = (r for r in caplog.records if r.name.startswith("pythia_jax"))
    return "\n".join(r.getMessage() for r in ours if r.levelno >= logging.WARNING)
