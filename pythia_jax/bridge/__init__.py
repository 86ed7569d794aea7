"""Weights in and out: one `load` for every kind of checkpoint, `save_hf` for export."""

import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pythia_jax import suite
from pythia_jax.bridge import hf_config, hf_in, hf_out, run
from pythia_jax.bridge.model import Model, dtype_name
from pythia_jax.bridge.opened import CheckpointError
from pythia_jax.data.storage import is_url
from pythia_jax.training.bucket import path_of

__all__ = ["CheckpointError", "Model", "load", "save_hf"]

DTYPES = ("float16", "bfloat16", "float32", "float64")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    step: int | None = None,
    dtype: DTypeLike = jnp.float32,
    cache_dir: str | Path | None = None,
) -> Model:
    """A model from a Hugging Face folder or from one of our run folders, on gs:// buckets too.

    step: which checkpoint of a run folder; None is the newest. dtype: of the parameters returned,
    16, 32 or, with JAX_ENABLE_X64 set, 64 bits wide. revision, cache_dir: of a model on the hub
    and of the folder for downloads; models are not fetched from the hub yet, so with a folder
    revision is an error and cache_dir means nothing.

    Raises FileNotFoundError where there is nothing to load, ValueError for arguments that do not
    go together, ConfigError and CheckpointError for what is there and cannot be used.
    """
    _check_dtype(dtype)
    if is_url(path_or_id):
        if revision is not None:
            raise ValueError(f"{path_or_id}: revision is of models on the hub; choose a step")
        return run.load(path_of(path_or_id), step, dtype)
    folder = Path(path_or_id)
    if not folder.is_dir():
        raise FileNotFoundError(_why_there_is_nothing(folder, revision, step))
    if revision is not None:
        raise ValueError(
            f"{folder}: revision {revision!r} is of models on the hub, and this is a folder; drop "
            "it, or choose a checkpoint of a run folder with step"
        )
    if hf_config.is_hf_folder(folder):
        if step is not None:
            raise ValueError(f"{folder}: a Hugging Face folder holds one checkpoint; drop step")
        return hf_in.load(folder, dtype)
    if run.is_run_folder(folder):
        return run.load(folder, step, dtype)
    raise FileNotFoundError(
        f"{folder}: neither a Hugging Face folder (config.json) nor a run folder (config.yaml)"
    )


def _check_dtype(dtype: DTypeLike) -> None:
    name = dtype_name(dtype)
    if name not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: parameters come in one of {', '.join(DTYPES)}")
    if name == "float64" and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            "dtype float64: JAX would silently make it float32; set JAX_ENABLE_X64=1 in the "
            'environment, or jax.config.update("jax_enable_x64", True) before loading'
        )


def _why_there_is_nothing(path: Path, revision: str | None, step: int | None) -> str:
    if path.exists():
        return f"{path} is a file; a Hugging Face folder or a run folder is wanted"
    moved = hf_out.interrupted(path)
    if moved is not None:
        return (
            f"{path}: an export was killed as it was replacing this folder; what it held is whole "
            f"in {moved}. Move that back to {path}, or export again"
        )
    name = path.as_posix()
    try:
        name, certain = suite.hub_id(name), True
    except ValueError:
        certain = False
    if certain or _HUB_ID.fullmatch(name):
        wanted = revision if revision is not None or step is None else f"step{step}"
        at = "" if wanted is None else f" --revision {wanted}"
        target = name.rpartition("/")[2] + ("" if wanted is None else f"-{wanted}")
        return (
            f"{path}: there is no such folder, and loading from the hub is not supported yet. For "
            f"{name} on the hub, get the folder with `hf download {name}{at} --local-dir {target}` "
            "(or huggingface_hub.snapshot_download), then load that"
        )
    return f"{path}: there is no such folder (a Hugging Face folder or a run folder is wanted)"


def save_hf(
    model: Model,
    folder: str | Path,
    *,
    dtype: DTypeLike | None = None,
    max_shard_size: int | None = None,
) -> None:
    """Write a folder that `transformers` loads; see `pythia_jax.bridge.hf_out.save`."""
    hf_out.save(model, Path(folder), dtype=dtype, max_shard_size=max_shard_size)
