"""Hugging Face folders in.

Tensor names, orientation and layer numbering come from the table of parameters.
"""

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from pythia_jax.bridge.hf_config import read_config, read_tokenizer_files
from pythia_jax.bridge.model import Model
from pythia_jax.bridge.opened import CheckpointError
from pythia_jax.configs import ModelConfig
from pythia_jax.model.parameters import TABLE, Parameter

STORED_DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""safetensors' names of what weights may be stored in, and what each is exported in."""
_BUFFER = re.compile(r"attention\.(bias|masked_bias)$|rotary_emb\.inv_freq$")
"""Buffers of old transformers releases, stored beside the weights."""


def load(folder: Path, dtype: DTypeLike = jnp.float32) -> Model:
    """A model from a folder as `transformers` writes it (safetensors, whole or sharded).

    Raises ConfigError for the config and CheckpointError, which names every missing, surplus or
    wrongly shaped tensor, for the weights.
    """
    config = read_config(folder)
    files = _weight_files(folder)
    with ExitStack() as stack:
        slices, dtypes = {}, set()
        for path, names in files.items():
            try:
                handle = stack.enter_context(safe_open(path, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from None
            stored = set(handle.keys())
            absent = sorted(set(names or ()) - stored)
            if absent:
                raise CheckpointError(f"{path}: the index promises {absent[0]}, which is not in it")
            for name in sorted(names or stored):
                if _canonical(name) in slices:
                    there = slices[_canonical(name)][1]
                    raise CheckpointError(
                        f"{path}: {name} is the same weight as {there}, which is there already"
                    )
                slices[_canonical(name)] = (handle, name)
        _check_names(folder, config, slices)
        for handle, name in slices.values():
            dtypes.add(handle.get_slice(name).get_dtype())
        flat = {p.path: _read(p, config, slices, jnp.dtype(dtype)) for p in TABLE}
    return Model(
        params=traverse_util.unflatten_dict(flat, sep="/"),
        config=config,
        tokenizer_files=read_tokenizer_files(folder),
        stored_dtype=_stored_dtype(dtypes),
        source=str(folder),
    )


def _weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """Safetensors files and the tensors that the index, where there is one, says are in each."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return {whole: None}
    if not index.is_file():
        raise CheckpointError(f"{folder}: no model.safetensors and no model.safetensors.index.json")
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a safetensors index: {error!r}") from None
    files: dict[Path, list[str] | None] = {}
    for name, file in places:
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index}: {file!r} is not the name of a file beside it")
        names = files.setdefault(folder / file, [])
        assert names is not None
        names.append(name)
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise CheckpointError(f"{index}: shards that are not there: {', '.join(missing)}")
    return files


def _canonical(name: str) -> str:
    # transformers 5 calls the unembedding lm_head in memory, embed_out in its files.
    return "embed_out.weight" if name == "lm_head.weight" else name


def _check_names(folder: Path, config: ModelConfig, slices: dict) -> None:
    for name in [name for name in slices if _BUFFER.search(name)]:
        del slices[name]
    problems = []
    expected: dict[str, tuple[int, ...]] = {}
    for parameter in TABLE:
        shape = parameter.shape(config)[int(parameter.stacked) :]
        shape = shape[::-1] if parameter.transposed else shape
        expected.update(dict.fromkeys(parameter.hf_names(config), shape))
    for label, names in (
        ("missing", expected.keys() - slices.keys()),
        ("surplus", slices.keys() - expected.keys()),
    ):
        if names:
            shown = sorted(names)
            more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
            problems.append(f"{label}: {', '.join(shown[:8])}{more}")
    for name in sorted(expected.keys() & slices.keys()):
        handle, stored = slices[name]
        shape = tuple(handle.get_slice(stored).get_shape())
        if shape != expected[name]:
            problems.append(f"{name} has shape {shape}, config.json wants {expected[name]}")
        kind = handle.get_slice(stored).get_dtype()
        if kind not in STORED_DTYPES:
            problems.append(f"{name} holds {kind}, not floats")
    if problems:
        raise CheckpointError(
            f"{folder}: the weights do not fit config.json: {'; '.join(problems)}"
        )


def _read(parameter: Parameter, config: ModelConfig, slices: dict, dtype: np.dtype) -> Any:
    """One row of the table, its layers stacked, in our orientation and dtype."""
    out = np.empty(parameter.shape(config), dtype)
    for layer, name in enumerate(parameter.hf_names(config)):
        handle, stored = slices[name]
        value = handle.get_tensor(stored)
        target = out[layer] if parameter.stacked else out
        target[...] = value.T if parameter.transposed else value
    return jnp.asarray(out)


def _stored_dtype(found: set[str]) -> str:
    return STORED_DTYPES[next(iter(found))] if len(found) == 1 else "float32"
