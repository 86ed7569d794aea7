"""What went wrong in a step that gave no number: the step, its batch, the norms in each layer.

The state has not been touched by it, and a batch is a function of its step, so the step is
computed once more and looked at.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pythia_jax.configs import RunConfig
from pythia_jax.files import write_whole
from pythia_jax.model import parameters
from pythia_jax.training.agreement import all_say
from pythia_jax.training.feed import GlobalBatches
from pythia_jax.training.pod import is_first
from pythia_jax.training.run_files import RunFiles
from pythia_jax.training.step import TrainState, loss_and_gradients
from pythia_jax.training.telemetry import NonFiniteError


@contextmanager
def diagnosed(
    config: RunConfig, batches: GlobalBatches, state: Callable[[], TrainState], files: RunFiles
) -> Iterator[None]:
    """Around training: a step that halted the state is written down before its error goes on.

    state: gives the state as it is when asked.
    """
    try:
        yield
    except NonFiniteError as error:
        halted = state()
        if not halted.halted:
            raise
        name = f"nonfinite-{error.step}.json"
        write_report(files.folder / name, error.step, halted, config, batches)
        where = files.place / name
        raise NonFiniteError(error.step, f"{error}. What the step held is in {where}") from None


def write_report(
    path: Path, step: int, state: TrainState, config: RunConfig, batches: GlobalBatches
) -> None:
    """Write down a step; one process does so, with the numbers of all.

    It holds the loss of the step, a digest of its batch, and for each parameter the norms of its
    values and of its gradient, layer by layer.
    """
    tokens = batches[step]
    scale = None if state.loss_scale is None else state.loss_scale.scale
    loss, norms, gradient_norms = _norms(state.params, tokens, scale, config=config)
    found = {
        "step": step,
        "loss": _number(loss),
        "parameter_norms": jax.tree.map(_numbers, norms),
        "gradient_norms": jax.tree.map(_numbers, gradient_norms),
    }
    if is_first():
        found["batch_sha256"] = batches.digest(step)
        write_whole(path, json.dumps(found, indent=1).encode())
    # The others would end, and the pod with them, before it is written.
    all_say(True)


@partial(jax.jit, static_argnames="config")
def _norms(
    params: Any, tokens: jax.Array, scale: jax.Array | None, *, config: RunConfig
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    loss, gradients = loss_and_gradients(params, tokens, None, scale, config=config)

    def norms(tree: Any) -> dict[str, jax.Array]:
        """By path; of the layers' parameters one a layer."""
        return {
            p.path: jnp.sqrt(jnp.sum(x * x, axis=tuple(range(int(p.stacked), x.ndim))))
            for p, x in parameters.items(tree)
        }

    return loss, norms(params), norms(gradients)


def _numbers(values: jax.Array) -> Any:
    return [_number(value) for value in np.asarray(values)] if values.ndim else _number(values)


def _number(value: Any) -> float | str:
    """JSON has no NaN and no infinity; they are written as text."""
    number = float(value)
    return number if math.isfinite(number) else str(number)
