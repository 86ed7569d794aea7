"""Safetensors files of arrays of several dtypes, written whole and read by their places.

The library knows no bfloat16 of NumPy's, and reads through a memory map of its own. The format:
eight bytes, the length of a JSON header; the header; the arrays, one after the other.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pythia_jax.files import written_whole

DTYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype("<i4"),
}
_CODES = {dtype.name: code for code, dtype in DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # of the library


@dataclass(frozen=True)
class Place:
    """Where an array lies in a file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int


def write(
    path: str | os.PathLike[str], arrays: Mapping[str, NDArray], metadata: Mapping[str, str]
) -> None:
    """Write arrays to a file, which has its name when it is whole and on the disk."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        code = _CODES[array.dtype.name]
        header[name] = {"dtype": code, "shape": array.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with written_whole(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            # Little-endian on every machine; bfloat16, which NumPy cannot turn round, as numbers.
            whole = np.ascontiguousarray(array).view(f"u{array.itemsize}")
            file.write(whole.astype(f"<u{array.itemsize}", copy=False).data)


def read(path: Path) -> tuple[dict[str, Place], dict[str, str]]:
    """What a file holds, and its metadata, without reading the arrays.

    Raises FileNotFoundError, and ValueError for one that is cut off or no such file.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, _HEADER_LIMIT)))
        metadata = header.pop("__metadata__", {})
        places = {
            name: Place(
                DTYPES[about["dtype"]], tuple(about["shape"]), 8 + length + about["data_offsets"][0]
            )
            for name, about in header.items()
        }
        ends = [p.start + prod(p.shape) * p.dtype.itemsize for p in places.values()]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: no safetensors file, or cut off ({error})") from None
    if size != max(ends, default=8 + length):
        raise ValueError(f"{path}: is {size:,} bytes, and {max(ends, default=0):,} by its header")
    return places, metadata


def mapped(path: Path, place: Place) -> NDArray:
    """An array of a file, mapped into memory."""
    if not prod(place.shape):
        return np.zeros(place.shape, place.dtype)
    return np.memmap(path, place.dtype, "r", place.start, place.shape)
