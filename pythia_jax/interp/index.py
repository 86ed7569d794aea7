"""A gradient index on disk: one row of numbers for each sequence, or document, of training.

A folder in Bergson's format (`pythia_jax.interp.bergson`), with what it has no place for beside it:

    gradients.bin      [rows, numbers] in C order, float32, bfloat16 or float16, little-endian
    rows.npy           `ROW` [rows]: which tokens of training a row is of
    crc32.npy          uint32 [rows]: the CRC-32 of each row's bytes
    provenance.json    settings (all that decides the numbers), computed (what they came from)
    run.yaml           the run whose batches they are

A row holds the linear modules of the layers, layer by layer, in the order of `LINEAR`: of each,
P_L G P_Rᵀ, `[p (out), p (in)]`, or, without a projection, G, `[out, in]` as in torch. G is the
gradient of the summed losses, in nats, *of* the row's tokens (token t is the target of position
t - 1); a document's reaches back into what stands before it in its sequence.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pythia_jax.configs import ModelConfig
from pythia_jax.data import Batches
from pythia_jax.data.preshuffled import DocumentsUnknown
from pythia_jax.data.samples import Pieces
from pythia_jax.interp import training_rows
from pythia_jax.interp.collecting import LINEAR
from pythia_jax.interp.projection import Projection, module_name
from pythia_jax.interp.result_folder import PROVENANCE, read_provenance
from pythia_jax.model.parameters import TABLE

GRADIENTS, ROWS, CHECKS = "gradients.bin", "rows.npy", "crc32.npy"
INFO = "info.json"
KIND = "gradient index"
UNFINISHED = ".building"
"""What is added to the name of an index while it is being built."""
PRECISIONS = {
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype("<f2"),
}
ROW = np.dtype(
    [
        ("step", "<i4"),
        ("slot", "<i4"),
        ("start", "<i4"),
        ("stop", "<i4"),
        ("source", "<i4"),
        ("documents", "<i4"),
        ("document", "<i8"),
        ("offset", "<i8"),
    ]
)
"""Which tokens a row is of: `start` to `stop` (not included) of slot `slot` of the batch of `step`.

source, document, offset: the path of the split, its document and the token of that at `start`;
documents: how many there are from `start` to `stop`. -1, and 0 documents, where they are not known.
"""


@dataclass(frozen=True, eq=False)
class Index:
    """A finished index, mapped into memory and not read.

    modules: name in torch (`layers.0.attention.dense`) → the columns of its numbers. provenance:
    `settings` and `computed`.
    """

    folder: Path
    rows: NDArray[Any]
    gradients: NDArray[Any]
    modules: Mapping[str, slice]
    shapes: Mapping[str, tuple[int, int]]
    provenance: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.rows)

    def by_module(self, name: str) -> NDArray[Any]:
        """The gradients of one module, `[rows, p (out), p (in)]` or `[rows, out, in]`, mapped.

        Raises ValueError for a name that the index does not have.
        """
        if name not in self.modules:
            raise ValueError(
                f"{self.folder}: there is no module {name!r}; there are {', '.join(self.modules)}"
            )
        return self.gradients[:, self.modules[name]].reshape(len(self), *self.shapes[name])

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.provenance["settings"]

    @cached_property
    def model_config(self) -> ModelConfig:
        """Of the model that the gradients are of."""
        return ModelConfig(**self.settings["model"])

    @property
    def projection(self) -> Projection | None:
        told = self.settings["projection"]
        return None if told is None else Projection(**told)

    @property
    def data(self) -> str:
        """Of which rows of training it is, as a table of hits tells it."""
        return training_rows.label(self.settings["rows"], *self.settings["steps"])

    def name_of(self, row: int) -> str:
        """Which row this is, in words."""
        return described(self.rows[row])


def described(row: Any, documents: Sequence[int] = ()) -> str:
    """A row of `ROW` in words; documents: the numbers of all of a row's, where they are known."""
    words, count = f"step {row['step']}, slot {row['slot']}", int(row["documents"])
    if len(documents) > 1:
        words += f", documents {', '.join(map(str, documents))}"
    elif count:
        words += f", document {row['document']}" + (f" and {count - 1} more" if count > 1 else "")
    return f"{words}, tokens {row['start']}:{row['stop']}"


def open_index(folder: str | os.PathLike[str]) -> Index:
    """A finished index.

    Raises FileNotFoundError where there is none, or one that is not finished; ValueError for one
    that is damaged.
    """
    folder = Path(folder)
    if not (folder / PROVENANCE).exists():
        building = unfinished(folder)
        if (building / PROVENANCE).exists():
            raise FileNotFoundError(
                f"{folder}: this index is not finished ({building} holds what there is of it); "
                "give the command that builds it again, and it goes on"
            )
        raise FileNotFoundError(f"{folder}: holds no gradient index (no {PROVENANCE})")
    provenance = read_provenance(folder, KIND)
    settings = provenance["settings"]
    try:
        rows = np.load(folder / ROWS, mmap_mode="r")
        modules, shapes = layout(
            ModelConfig(**settings["model"]),
            None if settings["projection"] is None else Projection(**settings["projection"]),
        )
        dtype = PRECISIONS[settings["precision"]]
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{folder} is damaged: {error}") from None
    numbers = width(modules)
    if rows.dtype != ROW or rows.ndim != 1:
        raise ValueError(f"{folder / ROWS}: is no list of rows of an index")
    wanted = len(rows) * numbers * dtype.itemsize
    size = (folder / GRADIENTS).stat().st_size if (folder / GRADIENTS).exists() else 0
    if size != wanted:
        raise ValueError(
            f"{folder / GRADIENTS} is damaged: {size:,} bytes, but {len(rows):,} rows of "
            f"{numbers:,} numbers ({dtype.name}) take {wanted:,}; restore it, or build it again"
        )
    gradients = np.memmap(folder / GRADIENTS, dtype, "r", shape=(len(rows), numbers))
    return Index(folder, rows, gradients, modules, shapes, provenance)


def unfinished(folder: Path) -> Path:
    """Where an index is while it is being built."""
    return folder.with_name(folder.name + UNFINISHED)


def layout(
    config: ModelConfig, projection: Projection | None
) -> tuple[dict[str, slice], dict[str, tuple[int, int]]]:
    """The columns of each module, and the shape of its block, in the order of a row."""
    widths = {p.path: p.shape(config)[-2:] for p in TABLE}
    modules, shapes, at = {}, {}, 0
    for layer in range(config.num_hidden_layers):
        for module in LINEAR:
            name = module_name(module, layer)
            if projection is None:
                shapes[name] = widths[f"{module}/kernel"][::-1]
            else:
                shapes[name] = (projection.dimension, projection.dimension)
            size = shapes[name][0] * shapes[name][1]
            modules[name] = slice(at, at + size)
            at += size
    return modules, shapes


def width(modules: Mapping[str, slice]) -> int:
    """Numbers of a row."""
    return max(columns.stop for columns in modules.values())


def table(
    served: Batches, length: int, steps: range, unit: str, sample: int | None = None
) -> NDArray[Any]:
    """The rows of an index over the batches of `steps`, as `ROW`, in order.

    length: tokens of a sequence. sample: so many sequences, evenly spread over the steps; None is
    all. By document, a row is what one document has of one sequence, and what has no loss (a
    sequence's first token, alone) has no row.

    Raises ValueError for documents that are asked for and not known, or of rows that
    `data.transform` changes; IndexError for steps that there are not.
    """
    transform = served.transform
    changed = transform is not None and transform.begins_at < steps.stop
    if transform is not None and changed and unit == "document":
        raise ValueError(
            f"data.transform, {transform.name}, changes rows from step {transform.begins_at} on, "
            "and where their documents are then is not known: use unit sequence (--unit sequence)"
        )
    made = []
    for step, slots in training_rows.sampled(steps, served.batch_size, sample):
        try:
            pieces = None if changed else served.pieces(step, slots)
        except DocumentsUnknown:
            if unit == "document":
                raise
            pieces = None
        if unit == "document":
            assert pieces is not None
            rows = _documents(pieces, slots)
        else:
            rows = _sequences(pieces, slots, length)
        rows["step"] = step
        made.append(rows)
    return np.concatenate(made)


def _documents(pieces: Pieces, slots: NDArray[np.int64]) -> NDArray[Any]:
    found = np.zeros(len(pieces.row), ROW)
    found["slot"], found["documents"] = slots[pieces.row], 1
    found["start"], found["stop"] = pieces.column, pieces.column + pieces.length
    for field in ("source", "document", "offset"):
        found[field] = getattr(pieces, field)
    # The first token of a row is the target of nothing.
    return found[found["stop"] > 1]


def _sequences(pieces: Pieces | None, slots: NDArray[np.int64], length: int) -> NDArray[Any]:
    found = np.zeros(len(slots), ROW)
    found["slot"], found["stop"] = slots, length
    found["source"] = found["document"] = found["offset"] = -1
    if pieces is not None:
        rows, first, counts = np.unique(pieces.row, return_index=True, return_counts=True)
        found["documents"][rows] = counts
        for field in ("source", "document", "offset"):
            found[field][rows] = getattr(pieces, field)[first]
    return found
