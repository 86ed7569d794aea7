"""Hugging Face folders in and out: safetensors, config, generation config, tokenizer.

Tensor names, orientation and layer numbering come from the table of parameters. Reading goes one
row of that table at a time, so beside the model being built there is one parameter, its layers
stacked. Writing goes one shard at a time, so beside the model there is one shard (`SHARD_BYTES`,
unless told otherwise) and the tensor that did not fit into it.
"""

import glob
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pythia_jax.bridge.model import Model, dtype_name
from pythia_jax.configs import ConfigError, ModelConfig
from pythia_jax.data.tokenize import EOD_TOKEN
from pythia_jax.model.parameters import TABLE, Parameter, Params
from pythia_jax.model.parameters import items as parameter_items

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
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
COPIED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "intermediate_size",
    "max_position_embeddings",
    "layer_norm_eps",
    "use_parallel_residual",
)
"""Fields of `config.json` that mean the same in `ModelConfig`."""
STORED_DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""safetensors' names of what weights may be stored in, and what each is exported in."""
_BUFFER = re.compile(r"attention\.(bias|masked_bias)$|rotary_emb\.inv_freq$")
"""Buffers of old transformers releases, stored beside the weights."""


class CheckpointError(ValueError):
    """Weights that are missing, misshapen or unreadable: the message names them all."""


def is_hf_folder(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def read_config(folder: Path) -> ModelConfig:
    """The model that a `config.json` describes, in any of the forms transformers has written.

    Raises ConfigError for another architecture or a value this model cannot take.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder}: no config.json; is this a Hugging Face folder?") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    if raw.get("model_type") != "gpt_neox":
        raise ConfigError(
            f"{path}: model_type is {raw.get('model_type')!r}; only 'gpt_neox' is known here"
        )
    if raw.get("tie_word_embeddings"):
        raise ConfigError(f"{path}: tie_word_embeddings is true; Pythia's embeddings are not tied")
    if raw.get("attention_bias") is False:
        raise ConfigError(f"{path}: attention_bias is false; this model has attention biases")
    # transformers 5 nests the rotary fields, 4.4x wrote them flat under new names.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"{path}: rope_parameters: {rope!r} should be a JSON object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"{path}: rotary scaling {kind!r} is not supported")

    def first(*candidates: Any) -> Any:
        return next((value for value in candidates if value is not None), None)

    rotary_pct = first(
        raw.get("rotary_pct"), rope.get("partial_rotary_factor"), raw.get("partial_rotary_factor")
    )
    base = first(raw.get("rotary_emb_base"), rope.get("rope_theta"), raw.get("rope_theta"))
    fields = {name: raw[name] for name in COPIED if name in raw}
    fields["hidden_act"] = raw.get("hidden_act", "gelu")
    if rotary_pct is not None:
        fields["rotary_pct"] = rotary_pct
    if base is not None:
        fields["rotary_emb_base"] = base
    if "vocab_size" not in fields:
        raise ConfigError(f"{path}: vocab_size is missing")
    try:
        return ModelConfig.from_dict(fields)
    except (ConfigError, OverflowError) as error:
        raise ConfigError(f"{path}: {error}") from None


def config_json(config: ModelConfig, dtype: str, eod: int) -> dict[str, Any]:
    """`config.json` with both the old and the new names of the rotary and dtype fields."""
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "rotary_pct": config.rotary_pct,
        "rotary_emb_base": config.rotary_emb_base,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rotary_emb_base,
            "partial_rotary_factor": config.rotary_pct,
        },
        "use_parallel_residual": config.use_parallel_residual,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "classifier_dropout": 0.1,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": eod,
        "eos_token_id": eod,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


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
        tokenizer_files=_read_tokenizer_files(folder),
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


def _read_tokenizer_files(folder: Path) -> dict[str, bytes]:
    paths = [folder / name for name in TOKENIZER_FILES]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


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


def tokenizer_files(model: Model) -> dict[str, bytes]:
    """The tokenizer's files: those it came with, the rest as the hub has them for Pythia."""
    files = dict(model.tokenizer_files)
    if "tokenizer.json" not in files:
        return files
    if model.tokenizer is None or model.tokenizer.token_to_id(EOD_TOKEN) is None:
        return files
    special = {"bos_token": EOD_TOKEN, "eos_token": EOD_TOKEN, "unk_token": EOD_TOKEN}
    if model.tokenizer.token_to_id("<|padding|>") is None:
        # transformers would add its default, <|padding|>, with an id that the model does not have.
        special["pad_token"] = EOD_TOKEN
    config = {
        "add_prefix_space": False,
        **special,
        "tokenizer_class": "GPTNeoXTokenizer",
        "model_max_length": model.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    files.setdefault("tokenizer_config.json", _json_bytes(config))
    files.setdefault("special_tokens_map.json", _json_bytes(special))
    return files


def _write_weights(model: Model, folder: Path, dtype: str, limit: int) -> None:
    """Greedy shards of up to `limit` bytes in the table's order, each written once it is full."""
    width = DTYPES[dtype].itemsize
    total = sum(array.size for _, array in parameter_items(model.params)) * width
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    size = 0

    def flush() -> None:
        nonlocal pending, size
        path = folder / f"shard-{len(shards)}.safetensors"
        path.touch()
        mode = path.stat().st_mode
        save_file(pending, path, metadata={"format": "pt"})
        path.chmod(mode)  # safetensors leaves it to its owner alone
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


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _write_json(path: Path, value: Any) -> None:
    path.write_bytes(_json_bytes(value))
