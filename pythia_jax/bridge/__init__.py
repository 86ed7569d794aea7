"""Weights in and out: one `load` for every kind of checkpoint, `save_hf` for export."""

from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from pythia_jax.bridge import hf, run
from pythia_jax.bridge.hf import CheckpointError
from pythia_jax.bridge.model import Model

__all__ = ["CheckpointError", "Model", "load", "save_hf"]


def load(
    path_or_id: str | Path, *, step: int | None = None, dtype: DTypeLike = jnp.float32
) -> Model:
    """A model from a Hugging Face folder or from one of our run folders.

    step: which checkpoint of a run folder; None is the newest. dtype: of the parameters returned.

    Raises FileNotFoundError where there is nothing to load, ConfigError and CheckpointError for
    what is there and cannot be used.
    """
    folder = Path(path_or_id)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: there is no such folder (a Hugging Face folder or a run folder is wanted)"
        )
    if hf.is_hf_folder(folder):
        if step is not None:
            raise ValueError(f"{folder}: a Hugging Face folder holds one checkpoint; drop step")
        return hf.load(folder, dtype)
    if run.is_run_folder(folder):
        return run.load(folder, step, dtype)
    raise FileNotFoundError(
        f"{folder}: neither a Hugging Face folder (config.json) nor a run folder (config.yaml)"
    )


def save_hf(
    model: Model,
    folder: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: int | None = None,
) -> None:
    """Write a folder that `transformers` loads; see `pythia_jax.bridge.hf.save`."""
    hf.save(model, Path(folder), dtype=dtype, max_shard_size=max_shard_size)
