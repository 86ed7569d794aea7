"""Orders kept on disk, so that the Pile's is shuffled once and not by every process of every run.

An entry is a folder of three `.npy` files and a manifest, named by the SHA-256 of everything that
decides the order. So an entry is right or absent: it appears whole, by a rename, and other data has
another name. One process builds while others wait for it.

The folder is `$PYTHIA_JAX_CACHE`, else `$XDG_CACHE_HOME/pythia_jax`, else `~/.cache/pythia_jax`.
"""

import hashlib
import json
import logging
import os
import shutil
import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pythia_jax.data.indexed import Index
from pythia_jax.data.sample_order import (
    SampleOrder,
    build_sample_order,
    epochs_needed,
    samples_of,
)
from pythia_jax.files import locked

log = logging.getLogger(__name__)

FORMAT = 1  # of the entries and of what is in them: another number, another name
SMALLEST_CACHED = 1_000_000  # entries of the three arrays together; less is built at once
_ARRAYS = ("document_order", "sample_index", "shuffle")
_MANIFEST = "manifest.json"
_BLOCK = 4096  # bytes of each of the places at which an array is looked at
_BLOCKS = 64


def cached_order(
    dataset: Index,
    num_samples: int,
    sequence_length: int,
    seed: int,
    documents: range | None = None,
) -> SampleOrder:
    """`build_sample_order`, or what it built before, memory-mapped.

    An entry that is cut short, or damaged in one of the places looked at (64, spread over each
    array), is built again. Where the folder cannot be written, a warning says so and the order is
    built in memory.

    Args:
        dataset: whose documents to order.
        num_samples: how many samples are wanted (`samples_to_draw`).
        sequence_length: tokens of a sample less one.
        seed: of the shuffles.
        documents: which ones, without gaps; all by default.

    Raises:
        ValueError: no documents, too few tokens, or a number out of range.
    """
    chosen = range(len(dataset)) if documents is None else documents

    def build() -> SampleOrder:
        numbers = None
        if chosen != range(len(dataset)):
            numbers = np.arange(chosen.start, chosen.stop, dtype=np.int32)
        return build_sample_order(dataset.sizes, num_samples, sequence_length, seed, numbers)

    tokens = int(dataset.sizes[chosen.start : chosen.stop].sum(dtype=np.int64))
    epochs = epochs_needed(tokens, num_samples, sequence_length)
    entries = epochs * len(chosen) + 3 * samples_of(epochs, tokens, sequence_length)
    if entries < SMALLEST_CACHED:
        return build()
    # The number of samples matters only through that of epochs.
    decides = {
        "format": FORMAT,
        "index": dataset.content_hash(),
        "documents": [chosen.start, chosen.stop],
        "epochs": epochs,
        "sequence_length": sequence_length,
        "seed": seed,
    }
    try:
        entry = cache_folder() / "orders" / _name_of(decides)
    except RuntimeError as error:  # there is no home folder
        _warn("$PYTHIA_JAX_CACHE is not set", error)
        return build()
    found = _load(entry)
    if found is not None:
        return found
    with ExitStack() as held:
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(entry.with_suffix(".lock")))
        except OSError as error:
            _warn(entry, error)
            return build()
        found = _load(entry, tell=True)  # another process may have built it while we waited
        if found is not None:
            return found
        log.info("%s: building its order, to be kept in %s", dataset.prefix, entry)
        order = build()
        try:
            _save(order, entry, decides)
        except OSError as error:
            _warn(entry, error)
            return order
        return _load(entry) or order


def cache_folder() -> Path:
    """Where this machine keeps what can be computed again."""
    if own := os.environ.get("PYTHIA_JAX_CACHE"):
        return Path(own).expanduser()
    common = os.environ.get("XDG_CACHE_HOME")
    return (Path(common) if common else Path.home() / ".cache") / "pythia_jax"


@dataclass(frozen=True, eq=False)
class _MappedOrder(SampleOrder):
    """An order on disk, pickled as its place there."""

    entry: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return _map, (self.entry,)


def _map(entry: Path) -> SampleOrder:
    """The order of an entry, checked as far as is cheap.

    Raises:
        OSError, EOFError: a file cannot be read.
        ValueError, KeyError, TypeError: a file is not what was written.
    """
    manifest = json.loads((entry / _MANIFEST).read_bytes())
    if _name_of(manifest["decides"]) != entry.name:
        raise ValueError(f"{_MANIFEST} is of another order")
    arrays = [np.asarray(np.load(entry / f"{name}.npy", mmap_mode="r")) for name in _ARRAYS]
    for name, array in zip(_ARRAYS, arrays, strict=True):
        if _describe(array) != manifest["arrays"][name]:
            raise ValueError(f"{name}.npy is not what was written")
    decides = manifest["decides"]
    documents, index, shuffle = arrays
    length, epochs = decides["sequence_length"], decides["epochs"]
    return _MappedOrder(documents, index, shuffle, length, epochs, entry)


def _load(entry: Path, *, tell: bool = False) -> SampleOrder | None:
    """The order of an entry, or None if there is none or it is damaged."""
    if not os.path.exists(entry):
        return None
    try:
        return _map(entry)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        if tell:
            log.warning("%s: this order is damaged and is built again: %s", entry, error)
        return None


def _name_of(decides: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _warn(entry: Path | str, error: Exception) -> None:
    log.warning(
        "%s: an order cannot be kept here, so it is built in memory by every process: %s",
        entry,
        error,
    )


def _save(order: SampleOrder, entry: Path, decides: dict[str, Any]) -> None:
    """Writes an entry under another name, makes it durable and gives it its own. Needs the lock."""
    for left in entry.parent.glob(f"{entry.name}.partial*"):
        shutil.rmtree(left)  # of a process that was killed: we hold the lock
    partial = entry.with_suffix(".partial")
    partial.mkdir()
    try:
        arrays = {name: getattr(order, name) for name in _ARRAYS}
        for name, array in arrays.items():
            with (partial / f"{name}.npy").open("wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
        described = {name: _describe(array) for name, array in arrays.items()}
        with (partial / _MANIFEST).open("w") as file:
            json.dump({"decides": decides, "arrays": described}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        if entry.exists():
            shutil.rmtree(entry)
        partial.rename(entry)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _describe(array: NDArray[Any]) -> dict[str, Any]:
    """Shape, dtype and a checksum of places spread over an array; all of it would take a while."""
    content = array.reshape(-1).view(np.uint8)
    crc = 0
    for start in np.linspace(0, max(content.size - _BLOCK, 0), _BLOCKS, dtype=np.int64).tolist():
        crc = zlib.crc32(content[start : start + _BLOCK].tobytes(), crc)
    return {"shape": list(array.shape), "dtype": array.dtype.str, "crc32": crc}
