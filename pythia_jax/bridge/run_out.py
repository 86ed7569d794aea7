"""Our own run folders out: any checkpoint as a step of one, written a layer at a time.

What is written holds parameters alone, as a run with `archive: params` archives them, with the
config of the model, the tokenizer and where it all came from. More steps of the same model go
beside those that are there.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from pythia_jax import __version__, configs
from pythia_jax.bridge.model import dtype_name
from pythia_jax.bridge.opened import Opened
from pythia_jax.bridge.replacing import replacing
from pythia_jax.bridge.run_in import CONVERTED
from pythia_jax.bridge.safetensors_out import DTYPES, rounded
from pythia_jax.configs import CheckpointConfig, ConfigError, DataConfig, RunConfig
from pythia_jax.files import locked, write_whole
from pythia_jax.model.parameters import Parameter
from pythia_jax.training.checkpoints import SCHEDULED, step_folders
from pythia_jax.training.stored import DamagedError, read_about
from pythia_jax.training.streamed import by_layer, save_params

BLOCK = 1 << 20
"""Bytes turned round or cast at a time: they stay in a core's cache."""

_ABOUT = """\
Of a conversion: the model is as it says, all else are defaults. What is known of the training lies
beside each checkpoint, in surroundings/metadata.
"""


def save(
    opened: Opened,
    folder: Path,
    *,
    step: int | None = None,
    dtype: DTypeLike | None = None,
) -> None:
    """Write a checkpoint as a step of a run folder, which is made, or held others of this model.

    step: None is the step that the checkpoint is of, or 0 where that is not known.
    dtype: float32, float16 or bfloat16; None keeps the one the weights are stored in.

    Until all of it is written, nothing lies under the step's name. Raises FileExistsError for a
    step that is there, and for a folder that holds anything but steps of this model that were
    converted; ValueError for a dtype and for values that it cannot hold.
    """
    name = opened.stored_dtype if dtype is None else dtype_name(dtype)
    if name not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    known = opened.step if step is None else step
    step = 0 if known is None else known
    if step < 0:
        raise ValueError(f"step {step}: steps count from 0")
    config = _run_config(opened, folder)
    about = {
        "jax": jax.__version__,
        CONVERTED: {
            "source": opened.source,
            "step": known,
            "by": f"pythia_jax {__version__}",
            "facts": _plain(opened.facts),
        },
    }
    with _place(config, folder, step) as place:
        save_params(
            place / SCHEDULED,
            step,
            opened.config,
            DTYPES[name],
            lambda parameter, piece: _piece(opened, parameter, piece, DTYPES[name]),
            about,
        )
        for file, content in opened.tokenizer_files.items():
            write_whole(place / file, content)
        if not (place / "config.yaml").exists():
            configs.save(config, place / "config.yaml", comment=_ABOUT)


def _piece(opened: Opened, parameter: Parameter, piece: int, dtype: np.dtype) -> np.ndarray:
    """One layer of a kernel, all of a vector, as it is to lie on disk."""
    if parameter.stacked and not by_layer(parameter):
        layers = opened.layers(parameter)
        return np.stack([rounded(parameter.path, opened.read(parameter, i), dtype) for i in layers])
    value = opened.read(parameter, piece)
    if value.dtype == dtype and value.flags.c_contiguous:
        return value
    out = np.empty(value.shape, dtype)
    # By the rows of what was read, which lies the other way round: three times as fast.
    turned = parameter.transposed and value.T.flags.c_contiguous
    target, value = (out.T, value.T) if turned else (out, value)
    rows = max(1, BLOCK // max(1, value[:1].nbytes))
    for first in range(0, len(value), rows):
        block = value[first : first + rows]
        target[first : first + rows] = (
            block if value.dtype == dtype else rounded(parameter.path, block, dtype)
        )
    return out


def _run_config(opened: Opened, folder: Path) -> RunConfig:
    """A config for a run folder of this model. What it was trained with is not known here."""
    return RunConfig(
        name=folder.name,
        model=opened.config,
        data=DataConfig(
            sequence_length=min(DataConfig().sequence_length, opened.config.max_position_embeddings)
        ),
        checkpoint=CheckpointConfig(directory=str(folder), archive="params"),
    )


@contextmanager
def _place(config: RunConfig, folder: Path, step: int) -> Iterator[Path]:
    """Where to write: a new folder, which takes its name at the end, or one that is there."""
    folder = folder.absolute()
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        with replacing(folder, lambda _: False) as partial:
            yield partial
        return
    _check_same_model(config, folder)
    try:
        with locked(folder / ".lock", seconds=0):
            if step in step_folders(folder):
                raise FileExistsError(
                    f"{folder} holds step {step} already; delete {folder / SCHEDULED / str(step)}, "
                    "or choose another step or folder"
                )
            try:
                yield folder
            except BaseException:
                for begun in (folder / SCHEDULED).glob(f"{step}.orbax-checkpoint-tmp*"):
                    shutil.rmtree(begun, ignore_errors=True)
                raise
    except BlockingIOError:
        raise RuntimeError(f"{folder}: another process is writing to this folder") from None


def _check_same_model(config: RunConfig, folder: Path) -> None:
    try:
        there = configs.load(folder / "config.yaml")
        steps = step_folders(folder).values()
        # Where there is no step, training may be about to save its first.
        converted = (
            all(CONVERTED in read_about(path) for path in steps) if steps else there == config
        )
    except (OSError, ConfigError, DamagedError):
        there, converted = None, False
    if there is None or there.model is None or not converted:
        raise FileExistsError(
            f"{folder} holds something else than converted checkpoints; choose another place"
        )
    if there.model != config.model:
        ours, theirs = vars(config.model), vars(there.model)
        differing = ", ".join(f"{k} {theirs[k]!r}" for k in ours if ours[k] != theirs[k])
        raise FileExistsError(
            f"{folder} holds steps of another model ({differing}); choose another place"
        )


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts as JSON keeps them."""
    return {key: list(v) if isinstance(v, tuple) else v for key, v in facts.items()}
