"""Where bytes lie: a file or a set of shards, on this machine or remote, read as one run of bytes.

A location is a path, or a URL of a scheme in `pythia_jax.data.remote`. The tokens of a dataset lie
in `PREFIX.bin`, or in shards `PREFIX-00000-of-00082.bin` … `PREFIX-00082-of-00082.bin` as Pythia's
are published: the number after "of" is that of the last shard. All but the last have one length,
which need be no multiple of a row, nor even of a token.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

PathLike = str | os.PathLike[str]
"""A path or a URL. A URL stays a string: pathlib would make one slash of its two."""

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_SHARD = re.compile(r"-(\d{5,})-of-(\d{5,})$")
_MOST_SHARDS = 100_000
_JOINED_ITEMS = 64  # mean length from which copying span by span beats gathering item by item
_GATHERED_ITEMS = 1 << 16


class Bytes(Protocol):
    """A run of bytes of known length. Safe to share between threads and to pickle."""

    @property
    def name(self) -> str:
        """What to call it in a message."""
        ...

    @property
    def size(self) -> int:
        """Its length in bytes."""
        ...

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes `start` to `stop` (not included), `[stop - start]`; may be a read-only view."""
        ...

    def read_ranges(
        self, starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.uint8]:
        """Many ranges put end to end in the order asked for, `[sum of lengths]`.

        A read-only view, perhaps, where they lie together.
        """
        ...


def open_bytes(location: PathLike) -> Bytes:
    """One file, local or remote.

    Raises:
        FileNotFoundError: there is none.
    """
    return _open_files(os.fspath(location), {os.fspath(location): None})


def find_tokens(prefix: PathLike) -> Bytes:
    """The tokens of a dataset: `PREFIX.bin`, or the shards of PREFIX as if they were one file.

    Args:
        prefix: PREFIX, `PREFIX.bin`, or the first shard's name with or without `.bin`. Where both
            a `.bin` and shards lie at PREFIX, only the shard's name means the shards. An http
            server cannot be asked what it holds, so shards there must be named by the first.

    Raises:
        FileNotFoundError: there is neither, or a shard is missing; it is named.
        ValueError: a shard too many, or one of the wrong length; it is named.
    """
    files = _token_files(strip_suffix(prefix))
    first = next(iter(files))
    name = first if len(files) == 1 else f"{first} and the {len(files) - 1} shards after it"
    try:
        return _open_files(name, files)
    except FileNotFoundError as error:
        if len(files) == 1 and is_url(first):
            raise FileNotFoundError(
                f"{error}; shards that cannot be listed go by the name of the first, "
                f"{shard_name(strip_suffix(prefix), 0, 82)} for example"
            ) from None
        raise


def token_files(prefix: PathLike) -> list[str]:
    """The files that `find_tokens` reads, in order."""
    return list(_token_files(strip_suffix(prefix)))


def _token_files(prefix: str) -> dict[str, int | None]:
    """Those files, with their sizes where a listing told them."""
    base, last = split_shard_name(prefix)
    if last is not None:
        return _checked_set(base, last, _shards_at(base))
    whole = with_suffix(prefix, ".bin")
    found = _shards_at(prefix, also=whole)
    if found is None or whole in found:
        return {whole: (found or {}).get(whole)}
    sets = sorted({shard_number(name)[1] for name in found})
    if not sets:
        raise FileNotFoundError(
            f"{whole}: no such file, and no shards {with_suffix(prefix, '-00000-of-NNNNN.bin')}; "
            "name a dataset by what its files have in common"
        )
    if len(sets) > 1:
        raise ValueError(
            f"{prefix}: shards of several sets, numbered to {', '.join(map(str, sets))}; name the "
            f"first shard of the one you mean, such as {shard_name(prefix, 0, sets[0])}"
        )
    return _checked_set(prefix, sets[0], found)


def is_url(location: PathLike) -> bool:
    """Whether a location is a URL and not a path."""
    return _URL.match(os.fspath(location)) is not None


def with_suffix(prefix: PathLike, suffix: str) -> str:
    """A location with more at its end, before the query of an http URL if it has one."""
    prefix = os.fspath(prefix)
    if prefix.lower().startswith(("http://", "https://")):
        path, mark, query = prefix.partition("?")
        return path + suffix + mark + query
    return prefix + suffix


def strip_suffix(prefix: PathLike) -> str:
    """A location without a `.bin` or `.idx` at its end; `~` is the home folder."""
    prefix = os.fspath(prefix)
    if not is_url(prefix):
        prefix = os.path.expanduser(prefix)
    for suffix in (".bin", ".idx"):
        path, mark, query = prefix.partition("?") if is_url(prefix) else (prefix, "", "")
        if path.endswith(suffix):
            return path.removesuffix(suffix) + mark + query
    return prefix


def shard_name(prefix: PathLike, number: int, last: int) -> str:
    """`PREFIX-00003-of-00082.bin`."""
    return with_suffix(prefix, f"-{number:05d}-of-{last:05d}.bin")


def split_shard_name(prefix: str) -> tuple[str, int | None]:
    """A prefix that names the first shard of a set as (prefix of the set, number of its last).

    Raises:
        ValueError: it names another shard.
    """
    path, mark, query = prefix.partition("?") if is_url(prefix) else (prefix, "", "")
    match = _SHARD.search(path)
    if match is None:
        return prefix, None
    base, number, last = path[: match.start()] + mark + query, int(match[1]), int(match[2])
    if number != 0:
        raise ValueError(
            f"{prefix}: one shard of a set; the set goes by the name of its first shard, "
            f"{shard_name(base, 0, last)}"
        )
    return base, last


def shard_number(name: str) -> tuple[int, int]:
    """(number of a shard, number of the last) from its name."""
    match = _SHARD.search(strip_suffix(name))
    if match is None:
        raise ValueError(f"{name}: not the name of a shard")
    return int(match[1]), int(match[2])


class FileRanges(NamedTuple):
    """Ranges of a run of bytes, cut where one file ends and the next begins; `[k]` each."""

    file: NDArray[np.int64]
    start: NDArray[np.int64]  # within that file
    length: NDArray[np.int64]


def cut_at_borders(
    starts: NDArray[np.int64], lengths: NDArray[np.int64], sizes: Sequence[int]
) -> FileRanges:
    """Cuts ranges at the ends of files, all but the last of which hold `sizes[0]` bytes."""
    if len(sizes) == 1:
        return FileRanges(np.zeros_like(starts), starts, lengths)
    first = np.minimum(starts // sizes[0], len(sizes) - 1)
    last = np.minimum((starts + np.maximum(lengths, 1) - 1) // sizes[0], len(sizes) - 1)
    counts = last - first + 1
    before = np.cumsum(counts) - counts
    file = np.repeat(first - before, counts) + np.arange(counts.sum())
    edge = file * sizes[0]
    start = np.maximum(np.repeat(starts, counts), edge)
    stop = np.minimum(np.repeat(starts + lengths, counts), edge + np.array(sizes)[file])
    return FileRanges(file, start - edge, stop - start)


def check_ranges(
    name: str,
    size: int,
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    unit: str = "bytes",
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ranges as int64, refused where they leave what there is.

    Raises:
        IndexError: one starts before the first byte (or token) or ends after the last.
    """
    starts, lengths = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
    inside = (starts >= 0) & (lengths >= 0) & (lengths <= size) & (starts <= size - lengths)
    if not inside.all():
        bad = int(np.argmin(inside))
        raise IndexError(
            f"{name}: {lengths[bad]} {unit} from {starts[bad]} on asked for, but it holds {size}"
        )
    return starts, lengths


def copy_spans(
    source: NDArray[Any], starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[Any]:
    """Spans of an array put end to end, `[sum of lengths]`; they must lie within it.

    A view where they lie together: as rows of preshuffled data do.
    """
    if starts.size:
        first = np.flatnonzero(np.append(True, starts[1:] != starts[:-1] + lengths[:-1]))
        starts, lengths = starts[first], np.add.reduceat(lengths, first)
    if starts.size == 1:
        return source[starts[0] : starts[0] + lengths[0]]
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if ends.size else 0
    if total >= _JOINED_ITEMS * ends.size:
        content = source.view(np.uint8).data
        firsts = (starts * source.itemsize).tolist()
        stops = ((starts + lengths) * source.itemsize).tolist()
        parts = [content[first:stop] for first, stop in zip(firsts, stops, strict=True)]
        return np.frombuffer(bytearray().join(parts), source.dtype)
    copied = np.empty(total, source.dtype)
    before = ends - lengths
    # In blocks, so that the positions stay in the processor's cache.
    cuts = np.searchsorted(ends, np.arange(0, total, _GATHERED_ITEMS))
    for first, stop in pairwise([*cuts.tolist(), ends.size]):
        block = slice(first, stop)
        positions = np.repeat(starts[block] - before[block], lengths[block])
        filled = int(before[first]) if first < stop else 0
        positions += np.arange(filled, filled + positions.size)
        copied[filled : filled + positions.size] = source[positions]
    return copied


class LocalFiles:
    """Files of this machine laid end to end, memory-mapped when first read in each process."""

    def __init__(self, name: str, paths: Sequence[str]):
        self.name = name
        self.paths = tuple(paths)
        self.sizes = tuple(_file_size(path) for path in self.paths)
        check_shard_sizes(self.paths, self.sizes)
        self.size = sum(self.sizes)
        self._maps: dict[int, NDArray[np.uint8]] = {}

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes `start` to `stop`, `[stop - start]`: a view where they lie in one file."""
        starts, lengths = check_ranges(
            self.name, self.size, np.array([start]), np.array([stop - start])
        )
        pieces = cut_at_borders(starts, lengths, self.sizes)
        views = [
            self.map_of(file)[first : first + length]
            for file, first, length in zip(*(column.tolist() for column in pieces), strict=True)
        ]
        return views[0] if len(views) == 1 else np.concatenate(views)

    def read_ranges(
        self, starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.uint8]:
        """Many ranges put end to end, `[sum of lengths]`."""
        starts, lengths = check_ranges(self.name, self.size, starts, lengths)
        if len(self.paths) == 1:
            return copy_spans(self.map_of(0), starts, lengths)
        pieces = cut_at_borders(starts, lengths, self.sizes)
        maps = {file: self.map_of(file).data for file in np.unique(pieces.file).tolist()}
        parts = [
            maps[file][first : first + length]
            for file, first, length in zip(*(column.tolist() for column in pieces), strict=True)
        ]
        return np.frombuffer(bytearray().join(parts), np.uint8)

    def map_of(self, file: int) -> NDArray[np.uint8]:
        """One of the files, mapped read-only."""
        found = self._maps.get(file)
        if found is None:
            size = self.sizes[file]
            # An empty file cannot be mapped; two threads that map one at once do no harm.
            found = np.empty(0, np.uint8)
            if size:
                found = np.asarray(np.memmap(self.paths[file], np.uint8, mode="r", shape=(size,)))
            self._maps[file] = found
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def __repr__(self) -> str:
        return f"LocalFiles({self.name!r}, {len(self.paths)} files, {self.size} bytes)"


def check_shard_sizes(names: Sequence[str], sizes: Sequence[int]) -> None:
    """Refuses a set in which a shard but the last has another length, or the last a greater one."""
    if len(sizes) < 2:
        return
    usual, _ = Counter(sizes[:-1]).most_common(1)[0]
    for name, size in zip(names[:-1], sizes[:-1], strict=True):
        if size != usual:
            raise ValueError(
                f"{name}: holds {size} bytes, but the other shards {usual}, and all but the last "
                "have one length; copy it again"
            )
    if sizes[-1] > usual or usual == 0:
        raise ValueError(
            f"{names[-1]}: the last shard holds {sizes[-1]} bytes and those before it {usual}, but "
            "it cannot be the longest; one of them is truncated or of another set"
        )


def _open_files(name: str, files: dict[str, int | None]) -> Bytes:
    if not is_url(name):
        return LocalFiles(name, list(files))
    from pythia_jax.data.remote import RemoteFiles  # TensorStore takes a while to import

    return RemoteFiles(name, list(files), list(files.values()))


def _file_size(path: str) -> int:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    return os.path.getsize(path)


def _shards_at(prefix: str, also: str | None = None) -> dict[str, int | None] | None:
    """All shards of a prefix, and `also` if it is there, with sizes; None where nobody can list."""
    present: dict[str, int | None] | None
    if is_url(prefix):
        from pythia_jax.data.links import list_files

        present = list_files(prefix)
        if present is None:
            return None
    else:
        folder, stem = os.path.split(prefix)
        names = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
        present = {prefix + name[len(stem) :]: None for name in names if name.startswith(stem)}
    return {
        name: size
        for name, size in present.items()
        if name == also
        or (
            name.startswith(prefix)
            and name.endswith(".bin")
            and _SHARD.fullmatch(name[len(prefix) : -len(".bin")])
        )
    }


def _checked_set(
    prefix: str, last: int, found: dict[str, int | None] | None
) -> dict[str, int | None]:
    """The shards of one set in order, once none is missing and none too many."""
    if last >= _MOST_SHARDS:
        raise ValueError(f"{shard_name(prefix, 0, last)}: no set has {last + 1} shards")
    names = [shard_name(prefix, number, last) for number in range(last + 1)]
    if found is None:
        return dict.fromkeys(names)
    missing = [name for name in names if name not in found]
    if missing:
        raise FileNotFoundError(
            f"{missing[0]}: no such file; {len(missing)} of the {len(names)} shards of {prefix} "
            f"are missing{_and_more(missing)}"
        )
    surplus = sorted(
        name for name in found if shard_number(name)[1] == last and shard_number(name)[0] > last
    )
    if surplus:
        raise ValueError(
            f"{surplus[0]}: a shard too many, for the last is number {last}; is the set of "
            f"{prefix} one set?"
        )
    return {name: found[name] for name in names}


def _and_more(missing: list[str]) -> str:
    if len(missing) == 1:
        return ""
    numbers = [str(shard_number(name)[0]) for name in missing]
    return f": {', '.join(numbers[:10])}{' …' if len(numbers) > 10 else ''}"
