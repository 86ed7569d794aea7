"""Hugging Face folders out: safetensors, config, generation config, tokenizer, model card.

Tensor names, orientation and layer numbering come from the table of parameters. The weights are
written as they are read, so what is in memory is one tensor, however large the shards are.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from pythia_jax.bridge import angles, card, int8, safetensors_out
from pythia_jax.bridge.hf_config import (
    TOKENIZER_FILES,
    config_json,
    json_bytes,
    published_json,
    tokenizer_files,
)
from pythia_jax.bridge.int8 import Scheme
from pythia_jax.bridge.model import dtype_name, tokenizer_of
from pythia_jax.bridge.opened import Opened
from pythia_jax.bridge.replacing import replacing
from pythia_jax.bridge.safetensors_out import DTYPES, Tensor
from pythia_jax.data.tokenize import EOD_TOKEN
from pythia_jax.model import parameters
from pythia_jax.model.parameters import TABLE, Parameter

log = logging.getLogger(__name__)

SHARD_BYTES = 5 * 10**9
"""A file of weights is no larger than this unless told otherwise; as transformers 4 cut them."""
_WRITTEN = re.compile(
    r"README\.md|(generation_)?config\.json|model(-\d{5}-of-\d{5})?\.safetensors"
    r"|model\.safetensors\.index\.json|quantization\.json|"
    + "|".join(map(re.escape, TOKENIZER_FILES))
)
"""Names of the files that an export writes, and so the only ones that it may delete."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def save(
    opened: Opened,
    folder: Path,
    *,
    dtype: DTypeLike | None = None,
    max_shard_size: int | str | None = None,
    as_pythia: bool = False,
    scheme: Scheme | None = None,
) -> None:
    """Write a folder that `transformers` loads: weights, config, tokenizer, model card.

    dtype: float32, float16 or bfloat16, by name or as a dtype; None keeps the one the weights
        were stored in.
    max_shard_size: bytes, or text such as "5GB"; more weights than that are cut into shards with
        an index, as transformers cuts them. None is `SHARD_BYTES`.
    as_pythia: the form in which EleutherAI published the suite: `config.json` with its keys and
        its exact GELU, weights in float16 unless `dtype` says otherwise. For a model trained with
        tanh GELU that is not the function that was trained, and a warning says so.
    scheme: what is rounded to int8 (`pythia_jax.bridge.int8`); None rounds nothing. What stays
        in floats is in `dtype`.

    Written beside the target first and moved there whole; an export that was killed while it
    moved is put right by the next one. Raises ValueError for an unknown dtype, for values that
    the dtype cannot hold and for the current folder, and FileExistsError if anything but a
    GPT-NeoX model, as this function writes them, lies at `folder`.
    """
    stored_as = _stored_as(opened, dtype, as_pythia)
    limit = shard_bytes(SHARD_BYTES if max_shard_size is None else max_shard_size)
    config, eod = opened.config, _end_of_document(opened, folder)
    if as_pythia and config.tanh_gelu:
        log.warning(
            "%s: exported in the published form, which says exact GELU; the model was trained with "
            "tanh GELU, so what is exported is not quite the function that was trained",
            opened.source or folder,
        )
    written_config = (published_json if as_pythia else config_json)(config, stored_as, eod)
    if scheme is not None:
        written_config["quantization_config"] = scheme.config_json()
    generation = {"use_cache": True}
    if eod is not None:
        generation = {"bos_token_id": eod, "eos_token_id": eod, "use_cache": True}
    tokenizer = tokenizer_files(opened.tokenizer_files, config)
    if "tokenizer.json" not in tokenizer:
        log.warning("%s: exported without a tokenizer, for it has none", opened.source or folder)

    def ours(there: Path) -> bool:
        known = _is_our_export(there)
        if (there / "tokenizer.json").exists() and "tokenizer.json" not in tokenizer:
            raise FileExistsError(
                f"{there} holds a tokenizer, and {opened.source or 'the model'} has none, so it "
                "would be lost; convert with --tokenizer, or choose another place"
            )
        return known

    with replacing(folder, ours) as partial:
        _write_weights(opened, partial, stored_as, limit, scheme)
        _write_json(partial / "config.json", written_config)
        _write_json(partial / "generation_config.json", generation)
        for name, content in tokenizer.items():
            (partial / name).write_bytes(content)
        difference = angles.measure(opened)
        if difference is not None:
            log.warning("%s: %s", opened.source or folder, difference.in_words())
        text = card.text(opened, written_config, difference)
        (partial / "README.md").write_text(text, encoding="utf-8")


def _end_of_document(opened: Opened, folder: Path) -> int | None:
    """Id of `<|endoftext|>`: of the tokenizer that goes with the weights, else that of Pythia's."""
    tokenizer = tokenizer_of(opened.tokenizer_files)
    known = 0 if tokenizer is None else tokenizer.token_to_id(EOD_TOKEN)
    if known is None:
        log.warning(
            "%s: its tokenizer has no %s, so the export names no token that ends a text "
            "(eos_token_id is null): generation goes on to its limit",
            opened.source or folder,
            EOD_TOKEN,
        )
    return known


def _stored_as(opened: Opened, dtype: DTypeLike | None, as_pythia: bool) -> str:
    if dtype is None:
        return "float16" if as_pythia else opened.stored_dtype
    name = dtype_name(dtype)
    if name not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return name


def shard_bytes(size: int | str) -> int:
    """Bytes of a size such as 5000000000, "5GB" or "500 MiB". Raises ValueError for others."""
    # A number alone is bytes; a fraction wants a unit.
    form = r"\s*(\d+|\d+\.\d+(?=\s*[KMGT]))\s*([KMGT]i?)?B?\s*"
    found = re.fullmatch(form, str(size), re.IGNORECASE)
    unit = (found[2] or "").capitalize() if found else ""
    count = int(float(found[1]) * _UNITS[unit]) if found else 0
    if count < 1:
        raise ValueError(
            f"max_shard_size (--max-shard-size) {size!r} is not a size above 0: give bytes, or "
            "text such as 5GB"
        )
    return count


def _tensors(
    opened: Opened, parameter: Parameter, layer: int, scheme: Scheme | None
) -> list[Tensor]:
    """A layer of a parameter as torch holds it: one tensor, or its values and scales."""
    shape = parameter.shape(opened.config)[int(parameter.stacked) :]

    def read() -> np.ndarray:
        value = opened.read(parameter, layer)
        return value.T if parameter.transposed else value

    tensor = Tensor(
        parameter.hf.format(layer=layer), shape[::-1] if parameter.transposed else shape, read
    )
    return int8.tensors(tensor) if scheme and scheme.covers(parameter) else [tensor]


def _write_weights(
    opened: Opened, folder: Path, dtype: str, limit: int, scheme: Scheme | None
) -> None:
    tensors = [
        tensor
        for parameter in TABLE
        for layer in opened.layers(parameter)
        for tensor in _tensors(opened, parameter, layer, scheme)
    ]
    shards = _shards(tensors, dtype, limit)
    if len(shards) == 1:
        safetensors_out.write(folder / "model.safetensors", shards[0], dtype)
        return
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        safetensors_out.write(folder / file, shard, dtype)
        weight_map.update((tensor.name, file) for tensor in shard)
    count = parameters.count(opened.config)
    total = sum(tensor.size(dtype) for tensor in tensors)
    index = {
        "metadata": {"total_parameters": count, "total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }
    _write_json(folder / "model.safetensors.index.json", index)


def _shards(tensors: list[Tensor], dtype: str, limit: int) -> list[list[Tensor]]:
    """Greedy shards of up to `limit` bytes; a tensor larger than that is one by itself.

    Cut as transformers 5 cuts them (huggingface_hub's serialization/_base.py), in its order.
    """
    shards, current, held = [], [], 0
    for tensor in sorted(tensors, key=_place):
        size = tensor.size(dtype)
        if size > limit:
            shards.append([tensor])
            continue
        if held + size > limit:
            shards.append(current)
            current, held = [], 0
        current.append(tensor)
        held += size
    return [*shards, current] if current else shards


def _place(tensor: Tensor) -> tuple:
    """Sorts by name, numbers as numbers, the unembedding last: in memory it is called lm_head."""
    parts = [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in tensor.name.split(".")]
    return tensor.name.startswith("embed_out"), parts


def _is_our_export(folder: Path) -> bool:
    """Whether a folder holds a model as we write them; FileExistsError tells what else it has."""
    others = [p.name for p in sorted(folder.iterdir()) if not _is_ours(p)]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise FileExistsError(
            f"{folder} holds what is no part of an exported model and would be lost: "
            f"{', '.join(others[:3])}{more}; move it away or choose another place"
        )
    if _model_type(folder) != "gpt_neox":
        raise FileExistsError(
            f"{folder} holds something that is not a GPT-NeoX model; choose another place"
        )
    return True


def _is_ours(path: Path) -> bool:
    if not (_WRITTEN.fullmatch(path.name) and path.is_file()):
        return False
    return path.name != "README.md" or card.is_ours(path.read_bytes())


def _model_type(folder: Path) -> object:
    try:
        return json.loads((folder / "config.json").read_bytes())["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _write_json(path: Path, value: Any) -> None:
    path.write_bytes(json_bytes(value))
