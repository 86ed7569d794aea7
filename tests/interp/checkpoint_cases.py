"""For the tests over checkpoints: the same weights as a run, a folder of GPT-NeoX's, and a hub."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import pythia_jax as pj
from pythia_jax import configs, sharding
from pythia_jax.bridge.convert import convert
from pythia_jax.bridge.model import Model
from pythia_jax.configs import RunConfig
from pythia_jax.model.parameters import Params
from pythia_jax.training.checkpoints import Checkpoints
from pythia_jax.training.step import abstract_state
from pythia_jax.training.trainer import fresh_state

for room in ("evaluation", "bridge"):
    sys.path.append(str(Path(__file__).parents[1] / room))


def write_steps(config: RunConfig, weights: Mapping[int, Params]) -> Path:
    """A run folder with these weights at these steps."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh), Checkpoints(config, abstract_state(config, mesh)) as checkpoints:
        checkpoints.restore_newest()
        state: Any = fresh_state(config, mesh)
        for step, params in weights.items():
            at = jax.numpy.asarray(step, state.step.dtype)
            checkpoints.save(step, state.replace(step=at, params=params), resume=False)
    run = Path(config.checkpoint.directory)
    configs.save(config, run / "config.yaml")
    return run


def as_neox(run: Path, folder: Path, steps: Mapping[int, int]) -> Path:
    """`global_stepN` folders of GPT-NeoX's: N → the step of the run whose weights they hold."""
    for step, of in steps.items():
        convert(str(run), folder / f"global_step{step}", to="neox", step=of, show_progress=False)
    return folder


def as_revisions(server: Any, repo: str, folder: Path, models: Mapping[int, Model]) -> None:
    """Branches stepN of a model on the stand-in for the hub; the last is also main."""
    for step, model in models.items():
        pj.save_hf(model, folder / f"step{step}")
        files = {
            path.name: path.read_bytes()
            for path in (folder / f"step{step}").iterdir()
            if path.suffix != ".md"
        }
        for branch in (f"step{step}", "main"):
            server.add(repo, branch, files)
