"""Remote files read by byte ranges through TensorStore's key-value stores.

Ranges that lie near each other are asked for together, long ones in pieces, many at a time. What
fails in passing (503, 429, dropped connections, silence) is asked for again, by TensorStore at once
and by us with growing pauses; an expired link is renewed. What fails for good is one error that
names the file.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from pythia_jax.data import links
from pythia_jax.data.links import IN_FLIGHT, PassingFault, Refused
from pythia_jax.data.storage import check_ranges, check_shard_sizes, copy_spans, cut_at_borders

NEAR = 32 * 1024  # bytes: a gap cheaper to read than a request of its own
LONGEST = 1 << 20  # bytes of one request; a longer range is read as several at once


class _Request(NamedTuple):
    file: int
    start: int
    length: int
    filled: int  # where its bytes go


class RemoteFiles:
    """Remote files laid end to end. Opening asks for their lengths, no more.

    Args:
        name: what to call them together in a message.
        locations: URLs of a scheme in `pythia_jax.data.links`.
        sizes: bytes of each, where known.

    Raises:
        FileNotFoundError: one is missing; it is named.
        PermissionError: one may not be read.
        ConnectionError: a server does not answer.
        ValueError: lengths that no shard set has, a server that serves no ranges, a bad URL.
    """

    def __init__(
        self, name: str, locations: Sequence[str], sizes: Sequence[int | None] | None = None
    ):
        self.name = name
        self.locations = tuple(locations)
        self._begin()
        self.sizes: tuple[int, ...] = ()
        self.sizes = self._find_sizes(sizes or [None] * len(locations))
        check_shard_sizes(self.locations, self.sizes)
        self.size = sum(self.sizes)

    def _begin(self) -> None:
        self._locks = [threading.Lock() for _ in self.locations]
        self._links: dict[int, tuple[links.Link, ts.KvStore]] = {}

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes `start` to `stop`, `[stop - start]`."""
        return self.read_ranges(np.array([start]), np.array([stop - start]))

    def read_ranges(
        self, starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.uint8]:
        """Many ranges put end to end, `[sum of lengths]`; memory for at most twice what is read."""
        starts, lengths = check_ranges(self.name, self.size, starts, lengths)
        some = lengths > 0
        if not some.any():
            return np.empty(0, np.uint8)
        starts, lengths = starts[some], lengths[some]
        merged_starts, merged_lengths, where = merge_near(starts, lengths)
        read = self._fetch(merged_starts, merged_lengths)
        offsets = (np.cumsum(merged_lengths) - merged_lengths - merged_starts)[where] + starts
        if read.size == lengths.sum() and np.array_equal(offsets, np.cumsum(lengths) - lengths):
            return read
        return copy_spans(read, offsets, lengths)

    def _fetch(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Ranges put end to end, as they are asked of the servers."""
        requests = _cut_long(*cut_at_borders(starts, lengths, self.sizes))
        self._resolve({request.file for request in requests})
        read = np.empty(int(lengths.sum()), np.uint8)
        asked: deque[tuple[_Request, ts.KvStore, Any]] = deque()

        def finish() -> None:
            request, store, future = asked.popleft()
            value = self._answer(request, store, future)
            into = read[request.filled : request.filled + request.length]
            into[:] = np.frombuffer(value, np.uint8)

        try:
            for request in requests:
                if len(asked) >= IN_FLIGHT:
                    finish()
                store = self._store(request.file)
                asked.append((request, store, _ask(store, request.start, request.length)))
            while asked:
                finish()
        finally:
            for _, _, future in asked:
                future.cancel()
        return read

    def _answer(self, request: _Request, store: ts.KvStore, future: Any) -> bytes:
        """Waits for one range; asks again after a passing fault, and for a new link if need be."""
        location = self.locations[request.file]
        made_link = False
        failures = 0
        while True:
            try:
                return _result(location, future, request.length)
            except Refused as error:
                if made_link or not _may_expire(location):
                    raise links.refusal(location, error.status, error.detail) from None
                store, made_link = self._renewed(request.file, store)
            except PassingFault as fault:
                made_link = False
                failures += 1
                links.pause(location, fault, failures)
            future = _ask(store, request.start, request.length)

    def _resolve(self, files: set[int]) -> None:
        """Resolves the links of all these files that have none yet, many at once."""
        new = [file for file in files if file not in self._links]
        if len(new) > 1:
            with ThreadPoolExecutor(16) as pool:
                list(pool.map(self._store, new))

    def _store(self, file: int) -> ts.KvStore:
        """The key-value store of a file, by its link as last resolved."""
        found = self._links.get(file)
        return self._renewed(file, None)[0] if found is None else found[1]

    def _renewed(self, file: int, failed: ts.KvStore | None) -> tuple[ts.KvStore, bool]:
        """A store other than the one that failed, and whether its link had to be made now.

        Raises:
            ValueError: the file is not what it was when it was opened.
        """
        with self._locks[file]:
            old = self._links.get(file)
            if old is not None and old[1] is not failed:
                return old[1], False
            link = links.resolve(self.locations[file])
            known = self.sizes[file] if self.sizes else link.size
            version = old[0].version if old is not None else link.version
            if link.version != version or link.size not in (None, known):
                raise ValueError(
                    f"{self.locations[file]}: changed while it was being read; open it again"
                )
            try:
                store = ts.KvStore.open(link.spec, context=links.context()).result()
            except ValueError as error:
                raise ValueError(f"{self.locations[file]}: {error}") from None
            self._links[file] = (link, store)
            return store, True

    def _find_sizes(self, known: Sequence[int | None]) -> tuple[int, ...]:
        """Length of every file, of many at once."""
        first = known[0] if known[0] is not None else self._find_size(0, None)
        with ThreadPoolExecutor(16) as pool:
            futures = [
                pool.submit(self._find_size, file, first) if size is None else None
                for file, size in enumerate(known)
                if file
            ]
            rest = [
                known[file] if future is None else future.result()
                for file, future in enumerate(futures, start=1)
            ]
        return (first, *(int(size) for size in rest if size is not None))

    def _find_size(self, file: int, likely: int | None) -> int:
        """Length of a file as its link tells it, or else by asking which bytes it has."""
        self._store(file)
        size = self._links[file][0].size
        if size is not None:
            return size

        def has(positions: Sequence[int]) -> list[bool]:
            return self._has_bytes(file, positions)

        if likely and has([likely - 1, likely]) == [True, False]:
            return likely
        return search_size(has)

    def _has_bytes(self, file: int, positions: Sequence[int]) -> list[bool]:
        """Whether a file goes on to these positions; TensorStore does not tell an object's size."""
        store = self._store(file)
        futures = [_ask(store, position, 1) for position in positions]

        def answer(position: int, future: Any) -> bool:
            try:
                self._answer(_Request(file, position, 1, 0), store, future)
            except _BeyondTheEnd:
                return False
            return True

        return [answer(*each) for each in zip(positions, futures, strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "locations": self.locations, "sizes": self.sizes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.size = sum(self.sizes)
        self._begin()

    def __repr__(self) -> str:
        return f"RemoteFiles({self.name!r}, {len(self.locations)} files, {self.size} bytes)"


class _BeyondTheEnd(ValueError):
    """A range that ends after the last byte."""


def merge_near(
    starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Ranges put together where at most `NEAR` bytes lie between them.

    Returns:
        Starts and lengths of the merged ranges, ascending, and which of them holds each range.
    """
    order = np.argsort(starts, kind="stable")
    sorted_starts = starts[order]
    stops = np.maximum.accumulate(sorted_starts + lengths[order])
    begins = np.concatenate([[True], sorted_starts[1:] > stops[:-1] + NEAR])
    first = np.flatnonzero(begins)
    last = np.concatenate([first[1:], [len(starts)]]) - 1
    where = np.empty(len(starts), np.int64)
    where[order] = np.cumsum(begins) - 1
    return sorted_starts[first], stops[last] - sorted_starts[first], where


def search_size(has: Callable[[Sequence[int]], list[bool]]) -> int:
    """Length of something of which one can only ask whether it has bytes at some positions.

    Asks for doubling positions first, then for fifteen at a time between the last there is and the
    first there is not: about ten rounds for 30 GB.
    """
    low, high = 0, 1 << 50  # bytes below `low` are there, those from `high` on are not
    positions = [(1 << power) - 1 for power in range(50)]
    while low < high:
        for position, there in zip(positions, has(positions), strict=True):
            low, high = (max(low, position + 1), high) if there else (low, min(high, position))
        positions = sorted({low + (high - low) * k // 16 for k in range(16)})
    return low


def _ask(store: ts.KvStore, start: int, length: int) -> Any:
    return store.read("", byte_range=slice(start, start + length))


def _result(location: str, future: Any, length: int) -> bytes:
    """What a request gave, its faults sorted into passing, refused and lasting ones."""
    try:
        found = future.result(timeout=links.TIMEOUT_S)
    except TimeoutError:
        future.cancel()
        raise PassingFault(f"no answer in {links.TIMEOUT_S:g} s") from None
    except (ValueError, NotImplementedError) as error:  # by the kind of fault
        detail = str(error)
        if detail.startswith("OUT_OF_RANGE"):
            raise _BeyondTheEnd(
                f"{location}: the server gave fewer or other bytes than it was asked for "
                f"({detail[:200]}); the file is shorter than when it was opened, or the server "
                "serves ranges wrongly"
            ) from None
        if "was ignored by server" in detail:
            raise ValueError(
                f"{location}: the server does not serve byte ranges, it answered with the whole "
                "file; download it, or put it on a server that does"
            ) from None
        raise links.fault_of(location, error) from None
    if found.state == "missing":
        raise Refused(404, "")
    if len(found.value) != length:
        raise _BeyondTheEnd(
            f"{location}: the server gave {len(found.value)} bytes where {length} were asked for"
        )
    return found.value


def _may_expire(location: str) -> bool:
    """Whether a file is reached by a link that has to be resolved."""
    return location.partition("://")[0].lower() in ("http", "https", "hf")


def _cut_long(
    file: NDArray[np.int64], start: NDArray[np.int64], length: NDArray[np.int64]
) -> list[_Request]:
    """Requests of at most `LONGEST` bytes for ranges within files, put end to end."""
    counts = -(-length // LONGEST)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(start, counts) + within * LONGEST
    lengths = np.minimum(np.repeat(length, counts) - within * LONGEST, LONGEST)
    filled = np.cumsum(lengths) - lengths
    columns = (np.repeat(file, counts), starts, lengths, filled)
    return [_Request(*each) for each in zip(*(c.tolist() for c in columns), strict=True)]
