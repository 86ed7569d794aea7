"""Scores of training rows on disk: a CSV as upstream's, and beside it what it is of.

A line is `index,score`, without a header: the row's place in the order of training, from 0, and the
fraction of its continuation that was recited. Source: EleutherAI/pythia,
predictable-memorization/eval_memorization.py, and eda.ipynb, which reads such files.

`NAME.csv.json` holds `settings`, all that decides the scores, and `computed`, what they were
computed on. A run that goes on with a file must have the same settings.
"""

import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pythia_jax.evaluation import sidecars
from pythia_jax.evaluation.sidecars import beside, differing
from pythia_jax.files import locked, write_whole

log = logging.getLogger(__name__)

_PARTS = ("settings", "computed")
_LINE = 64  # more bytes than a line has


@dataclass(frozen=True)
class Scores:
    """Scores read back, and their rows' places in the order of training, ascending; both `[n]`."""

    index: NDArray[np.int64]
    score: NDArray[np.float64]

    @property
    def memorized(self) -> NDArray[np.int64]:
        """Places of the rows recited whole."""
        return self.index[self.score == 1.0]


def read_about(path: Path) -> dict[str, Any] | None:
    """What a CSV is of; None for one that came alone, as upstream's do.

    Raises ValueError if the file that says so is damaged.
    """
    told = sidecars.read(path)
    if told is not None and not all(isinstance(told.get(key), dict) for key in _PARTS):
        raise sidecars.damaged(path, f"it has not both of {' and '.join(_PARTS)}")
    return told


def read(*paths: str | os.PathLike[str]) -> Scores:
    """The scores of CSV files, ours or upstream's, one of each rank, in any order.

    Raises FileNotFoundError, and ValueError for what is no such file, with its place, or where a
    row is scored twice.
    """
    parts = [_read_one(Path(path)) for path in paths]
    index = np.concatenate([part[0] for part in parts]) if parts else np.zeros(0, np.int64)
    score = np.concatenate([part[1] for part in parts]) if parts else np.zeros(0)
    order = np.argsort(index, kind="stable")
    index, score = index[order], score[order]
    twice = index[:-1][np.diff(index) == 0]
    if twice.size:
        raise ValueError(f"{', '.join(map(str, paths))}: row {twice[0]} is scored twice")
    return Scores(index, score)


def _read_one(path: Path) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    source: Any = path
    if beside(path).exists():
        # Of ours, a line without an end is one that a kill cut off; upstream's last has none.
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _LINE))
            tail = file.read()
            cut = size - len(tail) + tail.rfind(b"\n") + 1
            if cut < size:
                file.seek(0)
                source = io.BytesIO(file.read(cut))
    columns = [("index", np.int64), ("score", np.float64)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*input contained no data")
        try:
            table = np.loadtxt(source, columns, delimiter=",", comments=None, ndmin=1)
        except ValueError as error:
            raise ValueError(f"{path}: not lines of `index,score`: {error}") from None
    wrong = np.flatnonzero((table["index"] < 0) | ~((table["score"] >= 0) & (table["score"] <= 1)))
    if wrong.size:
        raise ValueError(
            f"{path}, line {wrong[0] + 1}: {table[wrong[0]]} is no row from 0 on and a score "
            "from 0 to 1"
        )
    return table["index"], table["score"]


def _parsed(line: bytes) -> tuple[int, float]:
    index, score = line.split(b",")
    place, fraction = int(index), float(score)
    if place < 0 or not 0 <= fraction <= 1:
        raise ValueError(line)
    return place, fraction


class ScoreFile:
    """A CSV being written, whole blocks of rows at a time; after a kill at most one is lost."""

    def __init__(self, file: IO[bytes], start: int, done: int) -> None:
        self.next_row = start + done
        self._file = file

    def append(self, scores: list[str]) -> None:
        """Add the scores of the rows that follow, as they are to be written; they are on disk
        when this returns."""
        lines = [f"{row},{score}\n" for row, score in enumerate(scores, self.next_row)]
        self._file.write("".join(lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.next_row += len(scores)


@contextmanager
def opened(
    path: Path,
    settings: Mapping[str, Any],
    computed: Mapping[str, Any],
    *,
    rows: range,
    block: int,
) -> Iterator[ScoreFile]:
    """A CSV to write scores of `rows` to, a new one or one to go on with.

    What a kill cut off goes, up to a whole number of blocks of rows: so the rows that follow are
    computed in the company that they would have had.

    Raises FileExistsError if the file holds something else, ValueError if it is damaged,
    RuntimeError if another process is writing to it.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent} to write it in")
    try:
        with locked(path.with_name(f".{path.name}.lock"), seconds=0):
            _enter(path, settings, computed)
            with path.open("a+b") as file:
                yield ScoreFile(file, rows.start, _kept(path, file, rows, block))
    except BlockingIOError:
        raise RuntimeError(f"{path}: another process is writing to this file") from None


def _enter(path: Path, settings: Mapping[str, Any], computed: Mapping[str, Any]) -> None:
    """Say beside the CSV what it is of, or hold it against what is said there."""
    wanted = json.loads(json.dumps({"settings": settings, "computed": computed}))
    if path.exists() and path.stat().st_size:
        saved = read_about(path)
        if saved is None:
            raise FileExistsError(
                f"{path} is there, and no {beside(path).name} says what it is of; name another file"
            )
        others = differing(saved["settings"], wanted["settings"])
        if others:
            raise FileExistsError(
                f"{path} holds other scores: {'; '.join(others)}, by {beside(path).name}. Ask "
                "for the same to go on with it, or name another file"
            )
        changed = differing(saved["computed"], wanted["computed"])
        if changed:
            log.warning("%s: went on otherwise than begun: %s", path, "; ".join(changed))
        return
    write_whole(beside(path), json.dumps(wanted, indent=1).encode() + b"\n")


def _kept(path: Path, file: IO[bytes], rows: range, block: int) -> int:
    """How many rows a file holds, when what a kill left of a block has been cut off."""
    size = file.seek(0, os.SEEK_END)
    at = max(0, size - _LINE * (block + 1))
    file.seek(at)
    tail = file.read()
    whole = tail[: tail.rfind(b"\n") + 1]
    lines = whole.splitlines(keepends=True)
    end = at + len(whole)
    done = 0
    if lines:
        file.seek(0)
        try:
            first, last = (_parsed(line)[0] for line in (file.readline(), lines[-1]))
        except ValueError:
            first, last = -1, -1
        if first != rows.start or last < first:
            raise ValueError(
                f"{path} is damaged: it does not go from row {rows.start} on in lines of "
                "`index,score`; move it away to begin anew"
            )
        done = last - first + 1
    surplus = done % block
    if surplus and done < len(rows):
        end -= sum(map(len, lines[-surplus:]))
        done -= surplus
    if end < size:
        log.info("%s: cut at row %d, after which a stop left less than a block", path, done)
        file.truncate(end)
    return done
