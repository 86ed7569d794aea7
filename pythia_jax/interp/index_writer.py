"""Writing a gradient index: chunk after chunk, by one process or several, and on after a stop.

While it is built an index is `NAME.building`; it gets its name when it is whole. Every process has
a record there of the chunks whose rows it has written, which it adds to when they are on disk.
"""

import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pythia_jax.files import locked, write_whole
from pythia_jax.interp import index
from pythia_jax.interp.index import CHECKS, GRADIENTS, PROVENANCE, ROWS, read_provenance

log = logging.getLogger(__name__)

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


@contextmanager
def alone(out: Path, process: int) -> Iterator[None]:
    """Keep other runs from building the same index.

    Raises RuntimeError if one does, FileNotFoundError if there is no folder to put it in.
    """
    if process:
        yield
        return
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.parent} to put it in")
    lock = out.with_name(f".{out.name}.lock")
    try:
        with locked(lock, seconds=0):
            try:
                yield
            finally:
                if not index.unfinished(out).exists():
                    lock.unlink()
    except BlockingIOError:
        raise RuntimeError(f"{out}: another process is building this index") from None


def saved(out: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was `computed` of the index that is there, finished or not; None if there is none.

    settings: those asked for, which must be its own.

    Raises FileExistsError for another index, naming the settings that differ, or what is none.
    """
    building = index.unfinished(out)
    for folder in (out, building):
        if (folder / PROVENANCE).exists():
            told = read_provenance(folder)
            differing = _differing(told["settings"], settings)
            if differing:
                raise FileExistsError(
                    f"{folder} holds another index: {'; '.join(differing)}. Ask for the same to "
                    "go on with it, or name another folder"
                )
            return told["computed"]
    for folder in (out, building):
        if folder.exists() and not (folder.is_dir() and _ours(folder)):
            raise FileExistsError(f"{folder}: there already, and no gradient index; name another")
    return None


def enter(
    out: Path,
    rows: NDArray[Any],
    row_bytes: int,
    about: Mapping[str, Any],
    files: Mapping[str, bytes],
    *,
    process: int,
    processes: int,
    agree: Callable[[int], int],
) -> IndexWriter:
    """Begin an index, or go on with the one begun.

    about: its settings, and what it is computed with. files: what else it holds. agree: the least
    of the numbers that the processes give; each waits for the others.
    """
    building = index.unfinished(out)
    if process == 0 and not (building / PROVENANCE).exists():
        _begin(building, rows, row_bytes, about, files)
    agree(0)
    records = {path: _read_record(path) for path in building.glob(_RECORD.format("*"))}
    done = agree(min(records.values(), default=0))
    writer = IndexWriter(building, row_bytes, process, done)
    writer._record(done)
    if process == 0:  # those of a time when there were more processes
        for path in set(records) - {building / _RECORD.format(i) for i in range(processes)}:
            path.unlink()
    return writer


def finish(out: Path, *, process: int, agree: Callable[[int], int]) -> None:
    """Give a whole index its name."""
    building = index.unfinished(out)
    agree(0)
    if process == 0:
        for path in building.glob(_RECORD.format("*")):
            path.unlink()
        building.rename(out)
        _sync(out.parent)
    agree(0)


def _begin(
    building: Path,
    rows: NDArray[Any],
    row_bytes: int,
    about: Mapping[str, Any],
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
    # Last: where it is, the others are.
    write_whole(building / PROVENANCE, json.dumps(about, indent=1).encode() + b"\n")
    _sync(building)


def _ours(folder: Path) -> bool:
    """Whether a folder without provenance is empty, or the beginning of an index cut off."""
    names = {path.name for path in folder.iterdir()}
    return not names or (folder.name.endswith(index.UNFINISHED) and GRADIENTS in names)


def _read_record(path: Path) -> int:
    try:
        return int(json.loads(path.read_bytes())["chunks"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to begin anew") from None


def _differing(before: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs, key by key, those within a section too."""
    wanted = json.loads(json.dumps(wanted))
    differing = []
    for key in dict.fromkeys([*before, *wanted]):
        was, now = before.get(key), wanted.get(key)
        if was == now:
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            differing += [f"{key}.{inner}" for inner in _differing(was, now)]
        else:
            differing.append(f"{key} was {was!r}, is {now!r}")
    return differing


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
