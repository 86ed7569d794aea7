"""Reading a dump of activations (`pythia_jax.interp.dump`).

A folder of safetensors files, some rows of one step in each, `step-000123-rows-0-256.safetensors`:

    resid_post.3    [rows, positions, hidden]: site and layer, axes as `model.sites.SITES` has them
    ln_final        of a site without layers
    tokens          int32 [rows, seq + 1]: the training row; the model saw all but the last
    slots           int32 [rows]: which rows of the batch these are
    positions       int32 [positions]: which places of the row

and beside them index.json (which rows are in which file; it is there when all are), provenance.json
(settings: all that decides the numbers; computed: what they came from) and run.yaml.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike, NDArray

from pythia_jax.interp import tensor_files
from pythia_jax.interp.result_folder import PROVENANCE, read_provenance

INDEX = "index.json"
KIND = "dump of activations"
KEY = np.dtype([("step", "<i4"), ("slot", "<i4")])


@dataclass(frozen=True, eq=False)
class Part:
    """The rows of one file, mapped into memory.

    values: by name, `[rows, …]`. first: the number of the first of them in the dump.
    """

    first: int
    step: int
    slots: Int[NDArray, " rows"]
    tokens: Int[NDArray, "rows seq+1"]
    values: dict[str, NDArray]


@dataclass(frozen=True, eq=False)
class Dump:
    """A finished dump. Rows are numbered in the order of training: by step, then by slot.

    keys: step and slot of each row. positions: which places of a row are there. shapes: of one row
    of each name. provenance: `settings` and `computed`.
    """

    folder: Path
    keys: NDArray[Any]
    positions: Int[NDArray, " positions"]
    shapes: dict[str, tuple[int, ...]]
    provenance: dict[str, Any]
    files: list[tuple[str, int, int]]  # name, first row, rows

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[Part]:
        """File by file. Raises ValueError for one that is damaged."""
        return (self._part(number) for number in range(len(self.files)))

    def number(self, step: int, slot: int) -> int:
        """The number of a row. Raises KeyError where it is not in the dump."""
        key = np.array((step, slot), KEY)
        found = int(np.searchsorted(self.keys, key))
        if found == len(self) or self.keys[found] != key:
            raise KeyError(f"{self.folder}: there is no row of step {step}, slot {slot}")
        return found

    def row(self, step: int, slot: int) -> dict[str, NDArray]:
        """All that is there of one row by name, with its `tokens`. Raises KeyError."""
        number = self.number(step, slot)
        part = self._part(self._file_of(number))
        place = number - part.first
        values = {name: np.array(value[place]) for name, value in part.values.items()}
        return {**values, "tokens": np.array(part.tokens[place])}

    def read(self, name: str, rows: slice | ArrayLike = slice(None)) -> NDArray:
        """Some rows of one name (or `tokens`), `[n, …]`, in the order asked for.

        rows: a slice, or numbers of rows.

        Raises ValueError for a name that is not there, IndexError for a row that is not.
        """
        if name != "tokens" and name not in self.shapes:
            raise ValueError(
                f"{self.folder}: there is no {name!r}; there are {', '.join(self.shapes)}, tokens"
            )
        numbers = np.arange(len(self))
        if isinstance(rows, slice):
            numbers = numbers[rows]
        else:
            chosen = np.asarray(rows)
            numbers = np.atleast_1d(numbers[chosen] if chosen.size else numbers[:0])
        of_file = np.searchsorted(self._firsts, numbers, side="right") - 1
        out: NDArray | None = None
        for file in np.unique(of_file) if len(numbers) else [0]:
            part = self._part(int(file))
            value = part.tokens if name == "tokens" else part.values[name]
            if out is None:
                out = np.empty((len(numbers), *value.shape[1:]), value.dtype)
            here = of_file == file
            out[here] = value[numbers[here] - part.first]
        assert out is not None
        return out

    @cached_property
    def _firsts(self) -> NDArray[np.int64]:
        return np.array([first for _, first, _ in self.files])

    def _file_of(self, number: int) -> int:
        return int(np.searchsorted(self._firsts, number, side="right")) - 1

    def _part(self, file: int) -> Part:
        name, first, count = self.files[file]
        path = self.folder / name
        if not path.exists():
            raise ValueError(f"{path}: is gone; give the command that made the dump again")
        places, metadata = tensor_files.read(path)
        arrays = {key: tensor_files.mapped(path, place) for key, place in places.items()}
        own = [arrays.pop(key) for key in ("slots", "tokens", "positions")]
        if len(own[0]) != count or metadata.get("step") != str(self.keys["step"][first]):
            raise ValueError(f"{path}: holds other rows than {INDEX} says")
        return Part(first, int(metadata["step"]), own[0], own[1], arrays)


def open_dump(folder: str | os.PathLike[str]) -> Dump:
    """A finished dump.

    Raises FileNotFoundError where there is none, or one that is not finished; ValueError for one
    that is damaged.
    """
    folder = Path(folder)
    if not (folder / INDEX).exists():
        if (folder / PROVENANCE).exists():
            raise FileNotFoundError(
                f"{folder}: this dump is not finished; give the command that makes it again, and "
                "it goes on"
            )
        raise FileNotFoundError(f"{folder}: holds no {KIND} (no {INDEX})")
    try:
        told = json.loads((folder / INDEX).read_bytes())
        counts = [len(file["slots"]) for file in told["files"]]
        keys = np.zeros(sum(counts), KEY)
        files, first = [], 0
        for file, count in zip(told["files"], counts, strict=True):
            keys["step"][first : first + count] = file["step"]
            keys["slot"][first : first + count] = file["slots"]
            files.append((file["file"], first, count))
            first += count
        shapes = {name: tuple(shape) for name, shape in told["row_shapes"].items()}
        positions = np.array(told["positions"], np.int32)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / INDEX} is damaged: {error}") from None
    provenance = read_provenance(folder, KIND)
    return Dump(folder, keys, positions, shapes, provenance, files)
