"""Hugging Face folders in: safetensors or `pytorch_model.bin`, whole or sharded.

Tensor names, orientation and layer numbering come from the table of parameters. Opening reads
headers only; each tensor is then read by itself, into memory of its own, and no file stays open or
mapped: mapped pages would count as memory in use.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from pythia_jax.bridge import card_in, torch_files
from pythia_jax.bridge.hf_config import read_config, read_tokenizer_files
from pythia_jax.bridge.int8 import read_dynamic, scale_name
from pythia_jax.bridge.model import Model
from pythia_jax.bridge.opened import CheckpointError, Int8, Opened
from pythia_jax.configs import ModelConfig
from pythia_jax.model.parameters import TABLE, Parameter

EXPORTED = {
    "float64": "float32",
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
}
"""What weights may be stored in, and what each is exported in."""
_SAFETENSORS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SAFETENSORS |= {"I8": "int8"}
_LARGEST_HEADER = 100_000_000
"""Bytes; the library takes no larger one (safetensors, src/tensor.rs)."""
_BUFFER = re.compile(r"attention\.(bias|masked_bias)$|rotary_emb\.inv_freq$")
"""Buffers of old transformers releases, stored beside the weights."""


@dataclass(frozen=True)
class _Tensor:
    """A tensor that has not been read. dtype: numpy's name where it has one, else the file's."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def open_folder(folder: Path) -> Opened:
    """A folder as `transformers` writes it. Where both kinds of weights lie, safetensors are read.

    Names, shapes and dtypes are checked against config.json now, from the files' headers.

    Raises ConfigError for the config and CheckpointError, which names every missing, surplus or
    wrongly shaped tensor, for the weights.
    """
    config = read_config(folder)
    dynamic = read_dynamic(folder)
    tensors: dict[str, _Tensor] = {}
    for path, names in _weight_files(folder).items():
        _collect(tensors, path, names)
    scales = set() if dynamic is None else _scales(folder, tensors)
    _check(folder, config, tensors, scales)

    def stored(parameter: Parameter, layer: int) -> np.ndarray:
        return tensors[parameter.hf_names(config)[layer]].read()

    def scale(parameter: Parameter, layer: int) -> np.ndarray:
        value = tensors[scale_name(parameter.hf_names(config)[layer])].read()
        return value[:, 0].astype(np.float32)

    def read(parameter: Parameter, layer: int) -> np.ndarray:
        value = stored(parameter, layer)
        if value.dtype == np.int8:
            value = value * scale(parameter, layer)[:, None]
        return value.T if parameter.transposed else value

    paths = {p.path for p in TABLE if scale_name(p.hf_names(config)[0]) in scales}
    int8 = Int8(frozenset(paths), bool(dynamic), stored, scale) if paths else None
    floats = {tensors[n].dtype for n in tensors if n not in scales} - {"int8"}
    found = {EXPORTED[dtype] for dtype in floats}
    return Opened(
        config=config,
        read=read,
        stored_dtype=found.pop() if len(found) == 1 else "float32",
        source=str(folder),
        tokenizer_files=read_tokenizer_files(folder),
        facts=card_in.facts_of(folder),
        int8=int8,
    )


def load(folder: Path, dtype: DTypeLike = jnp.float32) -> Model:
    """The whole model in memory; raises as `open_folder` does."""
    return open_folder(folder).model(dtype)


def _weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """Files with weights and the tensors that the index, where there is one, says are in each."""
    looked_for = []
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = f"{whole}.index.json"
        if (folder / whole).is_file():
            return {folder / whole: None}
        if (folder / index).is_file():
            return _indexed(folder / index)
        looked_for += [whole, index]
    raise CheckpointError(f"{folder}: no weights: there is no {', no '.join(looked_for)}")


def _indexed(index: Path) -> dict[Path, list[str] | None]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not an index of weights: {error!r}") from None
    files: dict[Path, list[str] | None] = {}
    for name, file in places:
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index}: {file!r} is not the name of a file beside it")
        names = files.setdefault(index.parent / file, [])
        assert names is not None
        names.append(name)
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise CheckpointError(f"{index}: shards that are not there: {', '.join(missing)}")
    return files


def _collect(tensors: dict[str, _Tensor], path: Path, names: list[str] | None) -> None:
    """Add the tensors of one file, under the names that the table of parameters has for them."""
    stored = _torch_tensors(path) if path.suffix == ".bin" else _safetensors(path)
    absent = sorted(name for name in set(names or ()) - stored.keys() if not _BUFFER.search(name))
    if absent:
        raise CheckpointError(f"{path}: the index promises what is not in it: {', '.join(absent)}")
    for name in sorted(stored):
        known = _canonical(name)
        if _BUFFER.search(name):
            continue
        if known in tensors:
            raise CheckpointError(
                f"{path}: {name} is the same weight as {tensors[known].name}, which is there "
                "already"
            )
        tensors[known] = stored[name]


def _canonical(name: str) -> str:
    # transformers 5 calls the unembedding lm_head in memory, embed_out in its files.
    return re.sub(r"^lm_head\.", "embed_out.", name)


def _safetensors(path: Path) -> dict[str, _Tensor]:
    """Its tensors, to be read by their places in the file, without the library's memory map.

    The library checks the file: its header, and that the data is all there.
    """
    try:
        with safe_open(path, framework="numpy") as checked, path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            stored: dict[str, dict] = {name: header[name] for name in checked.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {_why_not(path, error)}") from None

    def tensor(name: str) -> _Tensor:
        about = stored[name]
        start, shape = 8 + size + about["data_offsets"][0], tuple(about["shape"])
        kind = str(about["dtype"])
        dtype = _SAFETENSORS.get(kind, kind)
        return _Tensor(name, shape, dtype, lambda: _read(path, name, start, shape, dtype))

    return {name: tensor(name) for name in stored}


def _why_not(path: Path, error: Exception) -> str:
    """What is wrong with a file that the library refuses: most often it is not all there."""
    have = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
        size = int.from_bytes(start[:8], "little")
        file.seek(8)
        raw = file.read(size) if size <= _LARGEST_HEADER else b""
    if start.startswith(torch_files.LFS_POINTER):
        return "a Git LFS pointer, not the file itself; get it with `git lfs pull`"
    if have < 8:
        return f"cut off: it has {have} bytes, not even a header; get it again"
    if size <= _LARGEST_HEADER and have < 8 + size:
        return f"cut off: it has {have:,} bytes of more than {8 + size:,}; get it again"
    try:
        header = json.loads(raw)
        ends = [item["data_offsets"][1] for name, item in header.items() if name != "__metadata__"]
        whole = 8 + size + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        whole = 0  # its header is none, of which the library tells
    if have < whole:
        return f"cut off: it has {have:,} of {whole:,} bytes; get it again"
    return f"not a readable safetensors file: {error}"


def _read(path: Path, name: str, start: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    kind = jnp.dtype(dtype)
    count = int(np.prod(shape, dtype=np.int64))
    raw = np.fromfile(path, np.dtype(f"u{kind.itemsize}"), count, offset=start)
    if raw.size != count:
        raise CheckpointError(f"{path}: ends in the middle of {name}: it changed while it was read")
    return raw.view(kind).reshape(shape)


def _torch_tensors(path: Path) -> dict[str, _Tensor]:
    tree = torch_files.open_torch(path)
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: holds a {type(tree).__name__}, not tensors by name")
    tensors = {}
    for name, value in tree.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: {name!r} is no name of a tensor")
        if not isinstance(value, torch_files.TorchTensor):
            raise CheckpointError(f"{path}: {name!r} is a {type(value).__name__}, not a tensor")
        tensors[name] = _Tensor(name, tuple(value.shape), value.dtype.name, value.read)
    return tensors


def _scales(folder: Path, tensors: dict[str, _Tensor]) -> set[str]:
    """Names of the tensors that are to hold scales, of all that are int8."""
    scales = {scale_name(name) for name, tensor in tensors.items() if tensor.dtype == "int8"}
    if not scales:
        raise CheckpointError(
            f"{folder}: config.json has a quantization_config, and none of the weights is int8"
        )
    return scales


def _check(
    folder: Path, config: ModelConfig, tensors: dict[str, _Tensor], scales: set[str]
) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for parameter in TABLE:
        shape = parameter.shape(config)[int(parameter.stacked) :]
        shape = shape[::-1] if parameter.transposed else shape
        names = parameter.hf_names(config)
        expected.update(dict.fromkeys(names, shape))
        # Of layers that are stacked, all or none.
        with_scales = [scale_name(name) for name in names]
        if len(shape) == 2 and not scales.isdisjoint(with_scales):
            expected.update(dict.fromkeys(with_scales, (shape[0], 1)))
    problems = []
    for label, names in (
        ("missing", expected.keys() - tensors.keys()),
        ("surplus", tensors.keys() - expected.keys()),
    ):
        if names:
            problems.append(f"{label}: {', '.join(sorted(names))}")
    for name in sorted(expected.keys() & tensors.keys()):
        tensor = tensors[name]
        if tensor.shape != expected[name]:
            problems.append(f"{name} has shape {tensor.shape}, config.json wants {expected[name]}")
        is_int8 = tensor.dtype == "int8" and scale_name(name) in expected
        if tensor.dtype not in EXPORTED and not is_int8:
            problems.append(f"{name} holds {tensor.dtype}, not floats")
        if tensor.dtype != "int8" and scale_name(name) in expected:
            problems.append(f"{name} holds {tensor.dtype}, and has a scale, which is for int8")
    if problems:
        raise CheckpointError(
            f"{folder}: the weights do not fit config.json: {'; '.join(problems)}"
        )
