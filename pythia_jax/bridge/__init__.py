"""Weights in and out: one `load` for every kind of checkpoint, `save_hf` for export."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pythia_jax.bridge import hf_config, hf_out, run_in
from pythia_jax.bridge.convert import open_any
from pythia_jax.bridge.model import Model, dtype_name
from pythia_jax.bridge.opened import CheckpointError, Opened, from_model
from pythia_jax.configs import ModelConfig
from pythia_jax.data.storage import is_url
from pythia_jax.training.bucket import path_of

__all__ = ["CheckpointError", "Model", "Opened", "load", "open_any", "save_hf"]

DTYPES = ("float16", "bfloat16", "float32", "float64")


def load(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    step: int | None = None,
    dtype: DTypeLike = jnp.float32,
    cache_dir: str | Path | None = None,
    config: ModelConfig | None = None,
) -> Model:
    """A model in memory, from wherever it lies, on the mesh around us if there is one.

    path_or_id: a Hugging Face folder, a GPT-NeoX folder, a run folder (gs:// too), or the name of
        a model on the hub: `EleutherAI/pythia-70m`, `70m`, `pythia-19m`.
    revision: of a model on the hub. step: which checkpoint of a run folder (None is the newest that
        is good), of GPT-NeoX's, or of a model on the hub, revision `stepN`.
    dtype: of the parameters returned, 16, 32 or, with JAX_ENABLE_X64 set, 64 bits wide.
    cache_dir: for downloads; None is huggingface_hub's. config: the model of a GPT-NeoX folder that
        does not tell.

    Raises FileNotFoundError where there is nothing to load, ValueError for arguments that do not
    go together, ConfigError and CheckpointError for what is there and cannot be used.
    """
    _check_dtype(dtype)
    plain = revision is None and config is None
    if plain and (is_url(path_or_id) or _is_run(Path(path_or_id))):
        return run_in.load(path_of(path_or_id), step, dtype)
    opened = open_any(path_or_id, revision=revision, step=step, config=config, cache_dir=cache_dir)
    return opened.model(dtype)


def _is_run(folder: Path) -> bool:
    # In the order of open_any.
    return run_in.is_run_folder(folder) and not hf_config.is_hf_folder(folder)


def _check_dtype(dtype: DTypeLike) -> None:
    name = dtype_name(dtype)
    if name not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: parameters come in one of {', '.join(DTYPES)}")
    if name == "float64" and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            "dtype float64: JAX would silently make it float32; set JAX_ENABLE_X64=1 in the "
            'environment, or jax.config.update("jax_enable_x64", True) before loading'
        )


def save_hf(
    model: Model,
    folder: str | Path,
    *,
    dtype: DTypeLike | None = None,
    max_shard_size: int | str | None = None,
    as_pythia: bool = False,
) -> None:
    """Write a folder that `transformers` loads; see `pythia_jax.bridge.hf_out.save`."""
    hf_out.save(
        from_model(model),
        Path(folder),
        dtype=dtype,
        max_shard_size=max_shard_size,
        as_pythia=as_pythia,
    )
