"""Hugging Face folders out: safetensors, config, generation config, tokenizer.

Tensor names, orientation and layer numbering come from the table of parameters. Writing goes one
shard at a time, so beside the model there is one shard (`SHARD_BYTES`, unless told otherwise) and
the tensor that did not fit into it.
"""

import glob
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from pythia_jax.bridge.hf_config import (
    TOKENIZER_FILES,
    config_json,
    is_hf_folder,
    json_bytes,
    tokenizer_files,
)
from pythia_jax.bridge.model import Model, dtype_name
from pythia_jax.model.parameters import Parameter, Params
from pythia_jax.model.parameters import items as parameter_items

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
SHARD_BYTES = 5 * 10**9
"""A file of weights is no larger than this unless told otherwise; as transformers 4 cut them."""
_WRITTEN = re.compile(
    r"(generation_)?config\.json|model(-\d{5}-of-\d{5})?\.safetensors"
    r"|model\.safetensors\.index\.json|" + "|".join(map(re.escape, TOKENIZER_FILES))
)
"""Names of the files that an export writes, and so the only ones that it may delete."""


def tensors(params: Params, dtype: np.dtype | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor's Hugging Face name and value, in torch's orientation, one at a time."""
    for parameter, array in parameter_items(params):
        layers = array if parameter.stacked else [array]
        for layer in range(len(layers)):
            name = parameter.hf.format(layer=layer)
            yield name, _to_torch(name, parameter, layers[layer], dtype)


def _to_torch(name: str, parameter: Parameter, array: Any, dtype: np.dtype | None) -> np.ndarray:
    value = np.asarray(array)
    if dtype is not None and dtype != value.dtype:
        with np.errstate(over="ignore"):
            rounded = value.astype(dtype)
        if dtype == np.float16 and (np.isinf(rounded) & np.isfinite(value)).any():
            raise ValueError(
                f"{name} holds {np.abs(value).max():.6g}, which float16 cannot; "
                "export in bfloat16 or float32"
            )
        value = rounded
    return np.ascontiguousarray(value.T if parameter.transposed else value)


def save(
    model: Model,
    folder: Path,
    *,
    dtype: DTypeLike | None = None,
    max_shard_size: int | None = None,
) -> None:
    """Write a folder that `transformers` loads: weights, config, generation config, tokenizer.

    dtype: float32, float16 or bfloat16, by name or as a dtype; None keeps the one the weights
        were stored in.
    max_shard_size: bytes; more weights than that are cut into shards with an index. None is
        `SHARD_BYTES`.

    Written beside the target first and moved there whole; an export that was killed while it
    moved is put right by the next one. Raises ValueError for an unknown dtype, for values that
    float16 cannot hold and for the current folder, and FileExistsError if anything but a GPT-NeoX
    model, as this function writes them, lies at `folder`.
    """
    stored_as = model.stored_dtype if dtype is None else _export_dtype(dtype)
    limit = SHARD_BYTES if max_shard_size is None else max_shard_size
    if limit < 1:
        raise ValueError(f"max_shard_size {limit} is not a number of bytes above 0")
    folder = folder.resolve()
    if folder == Path.cwd():
        raise ValueError(f"{folder} is the current folder, which cannot be replaced; name another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    whole = interrupted(folder)
    if whole is not None:
        whole.rename(folder)
    _refuse_what_is_not_ours(folder)
    _remove_stale(folder)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    _discard(_replaced(folder), partial)
    partial.mkdir()
    try:
        _write_weights(model, partial, stored_as, limit)
        _write_json(partial / "config.json", config_json(model.config, stored_as, model.eod))
        generation = {"bos_token_id": model.eod, "eos_token_id": model.eod, "use_cache": True}
        _write_json(partial / "generation_config.json", generation)
        for name, content in tokenizer_files(model).items():
            (partial / name).write_bytes(content)
        _swap(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _export_dtype(dtype: DTypeLike) -> str:
    name = dtype_name(dtype)
    if name not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return name


def interrupted(folder: Path) -> Path | None:
    """Where the model of `folder` lies, if an export was killed between moving it and its own."""
    replaced = _replaced(folder.resolve())
    return replaced if not folder.exists() and is_hf_folder(replaced) else None


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def _swap(partial: Path, folder: Path) -> None:
    """Put `partial` in the place of `folder`."""
    if not folder.exists():
        partial.rename(folder)
        return
    replaced = _replaced(folder)
    folder.rename(replaced)
    try:
        partial.rename(folder)
    except BaseException:
        replaced.rename(folder)
        raise
    _discard(replaced, partial)


def _discard(replaced: Path, free: Path) -> None:
    """Delete an older model, under the name `free`: what is called `replaced` is always whole."""
    if replaced.exists():
        _refuse_what_is_not_ours(replaced)
        replaced.rename(free)
        shutil.rmtree(free, ignore_errors=True)


def _refuse_what_is_not_ours(folder: Path) -> None:
    """Raise FileExistsError unless `folder` is free, empty, or a model as we write them."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; choose another place")
    inside = sorted(folder.iterdir())
    others = [p.name for p in inside if not (_WRITTEN.fullmatch(p.name) and p.is_file())]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise FileExistsError(
            f"{folder} holds what is no part of an exported model and would be lost: "
            f"{', '.join(others[:3])}{more}; move it away or choose another place"
        )
    if inside and _model_type(folder) != "gpt_neox":
        raise FileExistsError(
            f"{folder} holds something that is not a GPT-NeoX model; choose another place"
        )


def _model_type(folder: Path) -> object:
    try:
        return json.loads((folder / "config.json").read_bytes())["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _remove_stale(folder: Path) -> None:
    """Delete what exports to `folder` whose process is gone have left half-written."""
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.partial-*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdecimal() and not _is_running(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    if os.name != "posix":
        return True  # elsewhere, signal 0 is not a question
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's, and alive
    return True


def _write_weights(model: Model, folder: Path, dtype: str, limit: int) -> None:
    """Greedy shards of up to `limit` bytes in the table's order, each written once it is full."""
    width = DTYPES[dtype].itemsize
    total = sum(array.size for _, array in parameter_items(model.params)) * width
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    size = 0

    def flush() -> None:
        nonlocal pending, size
        metadata = {"format": "pt"}
        save_file(pending, folder / f"shard-{len(shards)}.safetensors", metadata=metadata)
        shards.append(list(pending))
        pending, size = {}, 0

    for name, value in tensors(model.params, DTYPES[dtype]):
        if pending and size + value.nbytes > limit:
            flush()
        pending[name] = value
        size += value.nbytes
    flush()
    if len(shards) == 1:
        (folder / "shard-0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{i}.safetensors").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, value: Any) -> None:
    path.write_bytes(json_bytes(value))
