"""Numbers counted over the training rows of a run, into a folder of files.

Counting is done in parts, each a file of its own that is written whole: so it goes on where it was
killed, and several machines may count parts of one run into one folder. What is counted is said in
`term_windows`.

Nothing here imports jax: the processes that count start quickly and take little memory.
"""

import io
import itertools
import json
import os
import re
import signal
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer

from pythia_jax.data import Batches
from pythia_jax.evaluation.sidecars import differing
from pythia_jax.evaluation.term_windows import Decode, TermCounts, count_texts, decoder, merged
from pythia_jax.files import write_whole

TASK_ROWS = 1024
"""Rows that a process counts at a time, or those of one step if they are more."""

_FILE = re.compile(r"steps-(\d+)-(\d+)\.npz")
_AHEAD = 3  # tasks of each process that are under way or waiting
_MERGE_EVERY = 64  # results held before they are added up

PathLike = str | os.PathLike[str]
Progress = Callable[[int, int], None]


def count(
    batches: Batches,
    tokenizer: Tokenizer,
    folder: PathLike,
    start: int,
    stop: int,
    *,
    about: Mapping[str, Any],
    name: str | None = None,
    every: int = 1000,
    workers: int = 1,
    clean_up: bool = False,
    progress: Progress | None = None,
) -> int:
    """Count the rows of steps `start` to `stop` (not included) into files of a folder.

    What has a file there already is not counted again, so this goes on where it was killed.

    Args:
        batches: whose rows.
        tokenizer: that they were written with.
        folder: made if need be; gets `steps-000000-001000.npz` and so on.
        about: what the counts depend on besides the steps, as JSON can hold it; kept in every file.
        name: of the run, if it has one; kept too, though runs of the same rows may share a folder.
        every: files end at multiples of it, so that counts are known up to there.
        workers: processes; 1 is this one.
        clean_up: see `count_texts`.
        progress: called with the rows counted so far, and those to be counted; after each task.

    Returns:
        How many rows were counted, those that had their files not included.

    Raises:
        ValueError: there are no such steps, or the folder holds counts of something else.
        RuntimeError: a process ended before its time.
    """
    if not 0 <= start < stop <= len(batches):
        raise ValueError(
            f"steps {start} to {stop} asked for, but {batches.name} of {batches.source} has steps "
            f"0 to {len(batches)} (the last not included)"
        )
    if every < 1 or workers < 1:
        raise ValueError(f"every {every} and workers {workers} must be at least 1")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = _left(folder, about, start, stop, every)
    to_count = sum(map(len, parts)) * batches.batch_size
    per_task = max(1, TASK_ROWS // batches.batch_size)
    tasks = [
        range(first, min(first + per_task, part.stop))
        for part in parts
        for first in range(part.start, part.stop, per_task)
    ]
    rows, found, ends = 0, list[TermCounts](), {part.stop: part for part in parts}
    for steps, counts in _counted(tasks, batches, tokenizer, clean_up, workers):
        found.append(counts)
        rows += counts.rows
        if progress is not None:
            progress(rows, to_count)
        part = ends.get(steps.stop)
        if part is not None or len(found) == _MERGE_EVERY:
            found = [merged(found)]
        if part is not None:
            _write(folder, part, found[0], about, name)
            found = []
    return rows


def _counted(
    tasks: list[range], batches: Batches, tokenizer: Tokenizer, clean_up: bool, workers: int
) -> Iterator[tuple[range, TermCounts]]:
    """Every task with its counts, in order."""
    if workers == 1 or len(tasks) < 2:
        decode = decoder(tokenizer)
        for task in tasks:
            yield task, _count_steps(batches, decode, clean_up, task)
        return
    given = (batches, tokenizer.to_str(), clean_up)
    workers = min(workers, len(tasks))
    waiting: deque[tuple[range, Future[TermCounts]]] = deque()
    # Started afresh: a fork of a process that runs threads, as JAX does, may hang.
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_process, given) as executor:
        try:
            for task in tasks:
                waiting.append((task, executor.submit(_count_in_process, task)))
                if len(waiting) > _AHEAD * workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        except BrokenProcessPool:
            raise RuntimeError(
                f"one of {workers} counting processes ended: killed for want of memory, or the "
                'script that counts does not do so under `if __name__ == "__main__":`; 1 worker '
                "starts no processes. What was counted is kept"
            ) from None
        finally:
            for _, future in waiting:
                future.cancel()


def _count_steps(batches: Batches, decode: Decode, clean_up: bool, steps: range) -> TermCounts:
    texts = (decode(row) for step in steps for row in batches[step])
    return count_texts(texts, clean_up=clean_up)


_in_process: tuple[Batches, Decode, bool]


def _start_process(batches: Batches, tokenizer: str, clean_up: bool) -> None:
    global _in_process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    _in_process = batches, decoder(Tokenizer.from_str(tokenizer)), clean_up


def _count_in_process(steps: range) -> TermCounts:
    return _count_steps(*_in_process, steps)


class _Part(NamedTuple):
    start: int
    stop: int
    path: Path

    @property
    def steps(self) -> str:
        return f"steps {self.start} to {self.stop} (not included)"


def read(folder: PathLike, step: int, start: int = 0) -> TermCounts:
    """Counts of all rows of steps `start` to `step` (not included): what a checkpoint had seen.

    Raises FileNotFoundError for steps that are not counted, ValueError where the files do not end
    at a step asked for, or do not belong together.
    """
    return merged(_load(part) for part in _parts_of(folder, step, start))


def read_at(folder: PathLike, keys: ArrayLike, steps: Sequence[int]) -> NDArray[np.int64]:
    """How often the things of some keys were seen before each of some steps, `[steps, keys]`.

    keys: of `term_windows.number_key` and its like. Takes the memory of one file.

    Raises as `read`.
    """
    keys = np.asarray(keys, np.int64)
    seen = np.zeros((len(steps), len(keys)), np.int64)
    wanted = [_parts_of(folder, step, 0) for step in steps]  # what is missing is told at once
    for part in max(wanted, key=len, default=[]):
        found = _load(part).find(keys)
        for row, step in zip(seen, steps, strict=True):
            if part.stop <= step:
                row += found
    return seen


def read_about(folder: PathLike) -> tuple[dict[str, Any], str | None]:
    """What the counts of a folder depend on, as it was given to `count`, and the name of a run.

    Raises FileNotFoundError where there are none, ValueError for a damaged file.
    """
    folder = Path(folder)
    parts = _parts(folder) if folder.is_dir() else []
    if not parts:
        raise FileNotFoundError(f"{folder}: no such folder of counts")
    with _opened(parts[0]) as held:
        return json.loads(str(held["about"])), str(held["name"]) or None


def _parts(folder: Path) -> list[_Part]:
    """The files of a folder, in order. Raises ValueError where two hold the same steps."""
    names = ((_FILE.fullmatch(path.name), path) for path in folder.iterdir())
    parts = sorted(_Part(int(name[1]), int(name[2]), path) for name, path in names if name)
    for before, part in itertools.pairwise(parts):
        if part.start < before.stop:
            raise ValueError(
                f"{folder}: {before.path.name} and {part.path.name} count some steps twice; move "
                "one of them away"
            )
    return parts


def _parts_of(folder: PathLike, stop: int, start: int) -> list[_Part]:
    """The files that hold these steps and no other."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of counts")
    chosen = [part for part in _parts(folder) if part.start < stop and part.stop > start]
    at = start
    for part in [*chosen, _Part(stop, stop, folder)]:
        if part.start > at:
            raise FileNotFoundError(
                f"{folder}: steps {at} to {part.start} (not included) are not counted; count them "
                f"with --start {at} --stop {part.start}"
            )
        if part.start < start or part.stop > stop:
            raise ValueError(
                f"{folder}: {part.path.name} counts {part.steps} together, so that what was seen "
                f"between steps {start} and {stop} cannot be told; count into another folder, with "
                "--every a divisor of the steps wanted"
            )
        at = part.stop
    for part in chosen[1:]:
        _check_same(part, _about(chosen[0]), chosen[0].path.name)
    return chosen


def _left(folder: Path, about: Mapping[str, Any], start: int, stop: int, every: int) -> list[range]:
    """The parts that have no file yet, once those that have were looked at."""
    at, left = start, list[range]()
    parts = _parts(folder)
    for part in parts:
        _check_same(part, about, "asked for")
    for part in [*parts, _Part(stop, stop, folder)]:
        while at < min(part.start, stop):
            end = min(at - at % every + every, part.start, stop)
            left.append(range(at, end))
            at = end
        at = max(at, part.stop)
    return left


def _check_same(part: _Part, about: Mapping[str, Any], named: str) -> None:
    others = differing(_about(part), json.loads(json.dumps(about)))
    if others:
        raise ValueError(
            f"{part.path}: holds counts of something else than {named}: {'; '.join(others)}; keep "
            "them in folders of their own"
        )


def _load(part: _Part) -> TermCounts:
    with _opened(part) as held:
        return TermCounts(held["keys"], held["counts"], int(held["rows"]))


def _about(part: _Part) -> dict[str, Any]:
    with _opened(part) as held:
        return json.loads(str(held["about"]))


@contextmanager
def _opened(part: _Part) -> Iterator[Any]:
    try:
        with np.load(part.path, allow_pickle=False) as held:
            yield held
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{part.path}: not a whole file of counts ({error}); move it away, and count its "
            "steps again"
        ) from None


def _write(
    folder: Path, steps: range, counts: TermCounts, about: Mapping[str, Any], name: str | None
) -> None:
    content = io.BytesIO()
    np.savez_compressed(
        content,
        keys=counts.keys,
        counts=counts.counts,
        rows=np.int64(counts.rows),
        about=np.array(json.dumps(about, sort_keys=True)),
        name=np.array(name or ""),
    )
    name = f"steps-{steps.start:06d}-{steps.stop:06d}.npz"
    write_whole(folder / name, content.getvalue())
