"""Writing a gradient index: chunk after chunk, by one process or several, and on after a stop.

While it is built an index is `NAME.building`; it gets its name when it is whole. Every process has
a record there of the chunks whose rows it has written, which it adds to when they are on disk.
"""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from pythia_jax.files import write_whole
from pythia_jax.interp import index
from pythia_jax.interp.index import CHECKS, GRADIENTS, KIND, ROWS
from pythia_jax.interp.result_folder import PROVENANCE, begun, write_provenance
from pythia_jax.training.agreement import all_say, from_first
from pythia_jax.training.pod import is_first

_RECORD = "progress-{}.json"


class IndexWriter:
    """An index being built, by one process of those that build it.

    folder: `NAME.building`. done: chunks that are on disk.
    """

    def __init__(self, folder: Path, row_bytes: int, process: int, done: int) -> None:
        self.folder, self.done = folder, done
        self._row_bytes, self._process = row_bytes, process
        self._gradients = (folder / GRADIENTS).open("r+b")
        self._checks = (folder / CHECKS).open("r+b")
        self._checks_at = np.load(folder / CHECKS, mmap_mode="r").offset

    def write(self, chunk: int, parts: list[tuple[int, NDArray[Any]]]) -> None:
        """Rows of the chunk that follows: each part, `[n, numbers]`, with its first row.

        They are on disk when this returns, and counted as done. After a chunk that failed, those
        that follow are left alone.
        """
        if chunk != self.done:
            return
        for first, rows in parts:
            rows = np.ascontiguousarray(rows)
            octets = rows.view(np.uint8).reshape(len(rows), -1)
            checks = np.array([zlib.crc32(row.data) for row in octets], "<u4")
            for file, at, content in (
                (self._gradients, first * self._row_bytes, octets),
                (self._checks, self._checks_at + first * checks.itemsize, checks),
            ):
                file.seek(at)
                file.write(content.data)
        for file in (self._gradients, self._checks):
            file.flush()
            os.fsync(file.fileno())
        self._record(chunk + 1)

    def _record(self, done: int) -> None:
        told = json.dumps({"chunks": done}).encode()
        write_whole(self.folder / _RECORD.format(self._process), told)
        self.done = done

    def close(self) -> None:
        self._gradients.close()
        self._checks.close()


def saved(out: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was `computed` of the index that is there, finished or not; None if there is none.

    settings: those asked for, which must be its own. Raises as `result_folder.begun` does.
    """
    building = index.unfinished(out)
    folders = [out, building]
    if (building / GRADIENTS).exists() and not (building / PROVENANCE).exists():
        folders = [out]  # a beginning that was cut off: it is begun anew
    found = [begun(folder, settings, KIND) for folder in folders]
    return next((computed for computed in found if computed is not None), None)


def enter(
    out: Path,
    rows: NDArray[Any],
    row_bytes: int,
    settings: Mapping[str, Any],
    computed: Mapping[str, Any],
    files: Mapping[str, bytes],
) -> IndexWriter:
    """Begin an index, or go on with the one begun. All processes call this together.

    settings, computed: what its provenance tells. files: what else it holds.
    """
    building = index.unfinished(out)
    all_say(True)  # each has looked, before the first begins
    if is_first() and not (building / PROVENANCE).exists():
        _begin(building, rows, row_bytes, files)
        write_provenance(building, settings, computed)  # last: where it is, the others are
        _sync(building)
    all_say(True)
    records = {path: _read_record(path) for path in building.glob(_RECORD.format("*"))}
    done = from_first([min(records.values(), default=0)])[0]
    writer = IndexWriter(building, row_bytes, jax.process_index(), done)
    writer._record(done)
    if is_first():  # those of a time when there were more processes
        now = {building / _RECORD.format(i) for i in range(jax.process_count())}
        for path in set(records) - now:
            path.unlink()
    return writer


def finish(out: Path) -> None:
    """Give a whole index its name. All processes call this together."""
    building = index.unfinished(out)
    all_say(True)
    if is_first():
        for path in building.glob(_RECORD.format("*")):
            path.unlink()
        building.rename(out)
        _sync(out.absolute().parent)
    all_say(True)


def _begin(
    building: Path,
    rows: NDArray[Any],
    row_bytes: int,
    files: Mapping[str, bytes],
) -> None:
    building.mkdir(parents=True, exist_ok=True)
    for path in building.iterdir():  # of a beginning that was cut off
        path.unlink()
    with (building / GRADIENTS).open("wb") as file:
        file.truncate(len(rows) * row_bytes)
    np.save(building / CHECKS, np.zeros(len(rows), "<u4"))
    np.save(building / ROWS, rows)
    for name, content in files.items():
        write_whole(building / name, content)
    _sync(building / ROWS)


def _read_record(path: Path) -> int:
    try:
        return int(json.loads(path.read_bytes())["chunks"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to begin anew") from None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
