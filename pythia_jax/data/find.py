"""Looking back from tokens to the steps that saw them: batches scanned in the order of training.

Rows are scanned as the model saw them, so a sequence is found wherever it stands in a row, across
the borders of documents too. What only the end of one row and the start of another would make was
never seen as a whole, and is not found.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pythia_jax.data.batches import Batches
from pythia_jax.data.preshuffled import PreshuffledSamples
from pythia_jax.data.samples import BlendedSamples, NeoxSamples, Samples

_THREADS = 8  # steps read at once: more than cores, since reading is waiting
_AHEAD = 2 * _THREADS  # steps in memory at most


class Match(NamedTuple):
    """Where training saw a sequence; all three count from 0."""

    step: int
    row: int  # of the step's batch
    position: int  # of the sequence's first token in the row of sequence_length + 1


def find(
    batches: Batches,
    sequence: ArrayLike,
    start: int = 0,
    stop: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Generator[Match]:
    """Every place at which steps `start` to `stop` (not included) hold a sequence of tokens.

    Matches come by step, row and position, each as soon as its step and those before are scanned;
    they may overlap. Several steps are read at once, a few in memory.

    Args:
        batches: the batches of a split.
        sequence: token ids, `[n]`.
        start: first step.
        stop: the step after the last; the end of the split by default.
        progress: called after every step with the number of steps scanned so far.

    Raises:
        ValueError: there is nothing to search for, no row can hold it, or no such steps.
    """
    stop = len(batches) if stop is None else stop
    if not 0 <= start < stop <= len(batches):
        raise ValueError(
            f"steps {start} to {stop} asked for, but {batches.name} of {batches.source} has steps "
            f"0 to {len(batches)} (the last not included)"
        )
    wanted = _checked(sequence, batches)
    return _scan(batches, wanted, range(start, stop), progress or (lambda _: None))


def positions_of(sequence: NDArray[Any], rows: NDArray[Any]) -> NDArray[np.int64]:
    """Where a sequence `[n]` starts in rows `[batch, width]`: `[k, 2]` of (row, position)."""
    width = rows.shape[1]
    # Byte-pair encoders number their merges from frequent to rare, so the greatest id is likely to
    # leave the fewest places to look at.
    rarest = int(np.argmax(sequence))
    found = np.flatnonzero(rows.ravel() == sequence[rarest])  # one axis: NumPy's fast path
    row, position = found // width, found % width - rarest
    inside = (position >= 0) & (position <= width - len(sequence))
    row, position = row[inside], position[inside]
    for offset, token in enumerate(sequence):
        if row.size == 0:
            break
        same = rows[row, position + offset] == token
        row, position = row[same], position[same]
    return np.stack([row, position], axis=1)


def _checked(sequence: ArrayLike, batches: Batches) -> NDArray[np.int32]:
    wanted = np.asarray(sequence)
    if wanted.ndim != 1 or wanted.size == 0 or wanted.dtype.kind not in "iu":
        raise ValueError(f"cannot search for {sequence!r}: give at least one token id")
    limit = batches.vocab_size or 2**31
    if not 0 <= wanted.min() <= wanted.max() < limit:
        wrong = int(wanted.min()) if wanted.min() < 0 else int(wanted.max())
        raise ValueError(f"no data holds token id {wrong}: ids go from 0 to {limit - 1}")
    width = batches.read(0, [0]).shape[1]
    if wanted.size > width:
        raise ValueError(
            f"the sequence has {wanted.size} tokens, but a row has {width}, so none can hold it; "
            "search for a part of it"
        )
    return wanted.astype(np.int32)  # as batches are: comparing mixed types would copy them


def _scan(
    batches: Batches, wanted: NDArray[np.int32], steps: range, progress: Callable[[int], None]
) -> Generator[Match]:
    def look(step: int) -> tuple[int, NDArray[np.int64]]:
        return step, positions_of(wanted, batches[step])

    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="find")
    try:
        ahead = iter(steps)
        waiting = deque(pool.submit(look, step) for step in islice(ahead, _AHEAD))
        while waiting:
            step, places = waiting.popleft().result()
            waiting.extend(pool.submit(look, later) for later in islice(ahead, 1))
            for row, position in places.tolist():
                yield Match(step, row, position)
            progress(step - steps.start + 1)
    finally:
        pool.shutdown(cancel_futures=True)  # a search broken off reads no further


class Sighting(NamedTuple):
    """A run of a document's tokens in a row that training saw."""

    step: int
    row: int
    position: int  # of the run in the row
    offset: int  # of the run in the document
    length: int  # tokens


def epochs(samples: Samples, source: int = 0) -> int:
    """How often a split's order holds each document of a path: the epochs it draws from."""
    if isinstance(samples, PreshuffledSamples):
        samples = samples.original
    if isinstance(samples, BlendedSamples):
        samples = samples.members[source]
    assert isinstance(samples, NeoxSamples)
    return samples.order.epochs


def sightings(batches: Batches, document: int, source: int = 0) -> Iterator[Sighting]:
    """Every run of a document's tokens that a split's batches hold, in the order of training.

    Args:
        batches: the batches of a split.
        document: its number in its path.
        source: which path of the split.

    Raises:
        IndexError: there is no such document or path.
        ValueError: documents are not known; the message says what to set.
    """
    for step, row in batches.steps_of_document(document, source).tolist():
        pieces = batches.pieces(step, [row])
        for i in np.flatnonzero((pieces.document == document) & (pieces.source == source)):
            place = (pieces.column[i], pieces.offset[i], pieces.length[i])
            yield Sighting(step, row, *map(int, place))
