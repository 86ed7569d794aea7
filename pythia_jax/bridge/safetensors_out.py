"""Safetensors files written as their tensors are read.

The library writes only from memory. Names, shapes and dtypes are known beforehand, so the header
can go first and each tensor to its place behind it, in any order: in memory is what is being read.
The bytes are those that `safetensors.numpy.save_file` writes for the same tensors.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}
_THREADS = 4
BLOCK = 1 << 20
"""Bytes turned round or cast at a time: they stay in a core's cache."""
_STRIP = 16
"""Columns."""
_FLUSHED = 1 << 27
"""Bytes of a file after which what was written goes to the disk, and out of the system's cache."""


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written. `read` gives its values when asked, in any float dtype.

    dtype: its own, whatever that of the file; of int8, `read` gives just that.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    dtype: str | None = None

    def stored_as(self, dtype: str) -> np.dtype:
        """Its dtype in a file of `dtype`."""
        return np.dtype(self.dtype) if self.dtype else DTYPES[dtype]

    def size(self, dtype: str) -> int:
        """Its bytes in a file of `dtype`."""
        return prod(self.shape) * self.stored_as(dtype).itemsize


def write(path: Path, tensors: Sequence[Tensor], dtype: str) -> None:
    """Write a file of tensors in `dtype`: float32, float16 or bfloat16; or each in its own.

    Several are read at once, in the order of their names, as long as together they are no larger
    than the largest of them.

    Raises ValueError for values that `dtype` cannot hold and for a shape other than was promised.
    """
    tensors = sorted(tensors, key=lambda tensor: tensor.name)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # As the library lays them out: wide ones first, so that each is aligned.
    for tensor in sorted(tensors, key=lambda tensor: -tensor.stored_as(dtype).itemsize):
        start, end = end, end + tensor.size(dtype)
        header[tensor.name] = {
            "dtype": _CODES[tensor.stored_as(dtype).name],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        file.truncate(data + end)
        waiting: deque[tuple[Future, int]] = deque()
        in_flight, limit = 0, max((tensor.size(dtype) for tensor in tensors), default=0)
        with ThreadPoolExecutor(_THREADS) as pool:
            unflushed = 0
            for tensor in tensors:
                size = tensor.size(dtype)
                while waiting and in_flight + size > limit:
                    done, freed = waiting.popleft()
                    done.result()
                    in_flight -= freed
                place = data + header[tensor.name]["data_offsets"][0]
                kind = tensor.stored_as(dtype)
                waiting.append((pool.submit(_copy, tensor, kind, file.fileno(), place), size))
                in_flight += size
                unflushed += size
                if unflushed >= _FLUSHED:
                    waiting.append((pool.submit(_flush, file.fileno()), 0))
                    unflushed = 0
            for done, _ in waiting:
                done.result()


def _copy(tensor: Tensor, dtype: np.dtype, file: int, place: int) -> None:
    """Read a tensor and write its bytes, some rows of it at a time."""
    value = tensor.read()
    if value.shape != tensor.shape:
        raise ValueError(f"{tensor.name} has shape {value.shape}, {tensor.shape} was expected")
    if value.dtype == dtype and value.flags.c_contiguous:
        _write(value, file, place)
        return
    row = max(1, prod(value.shape[1:])) * dtype.itemsize
    step = max(1, BLOCK // row)
    for first in range(0, len(value), step):
        block = value[first : first + step]
        _write(rounded(tensor.name, block, dtype), file, place + first * row)


def rounded(name: str, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Contiguous, in `dtype`. Raises ValueError for values that it cannot hold."""
    with np.errstate(over="ignore"):
        if value.ndim == 2 and value.strides[0] < value.strides[1]:
            # NumPy turns narrow strips round some five times as fast as the whole.
            out = np.empty(value.shape, dtype)
            for first in range(0, value.shape[1], _STRIP):
                out[:, first : first + _STRIP] = value[:, first : first + _STRIP]
        else:
            out = value.astype(dtype, order="C")
    if value.dtype != dtype and not np.isfinite(out).all():
        lost = np.isfinite(value) & ~np.isfinite(out)
        if lost.any():
            wider = "bfloat16 or float32" if dtype == np.float16 else "float32"
            raise ValueError(
                f"{name} holds {np.abs(value[lost]).max():.6g}, which {dtype.name} cannot; "
                f"export in {wider}"
            )
    return out


def _flush(file: int) -> None:
    """Have what was written on the disk, and its memory free for what comes next.

    Else a large export fills the cache with pages that nobody reads soon, each of them new memory.
    """
    os.fsync(file)
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def _write(value: np.ndarray, file: int, place: int) -> None:
    # Little-endian on every machine; bfloat16, which NumPy cannot turn round, as whole numbers.
    whole = value.view(f"u{value.itemsize}").astype(f"<u{value.itemsize}", copy=False)
    rest = whole.reshape(-1).view(np.uint8).data
    while rest:
        written = os.pwrite(file, rest, place)
        rest, place = rest[written:], place + written
