"""Is a dataset what it should be? Its structure, its token ids, and the SHA-256 of its files."""

import hashlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pythia_jax.data.indexed import Index, IndexedDataset, index_location, token_dtype
from pythia_jax.data.storage import (
    Bytes,
    PathLike,
    find_tokens,
    is_url,
    open_bytes,
    token_files,
)

log = logging.getLogger(__name__)

_CHUNK = 8 << 20  # bytes of a file looked at together: a multiple of every token's size
MOST_CHECKED = 4 << 30  # bytes of a dataset looked at before a run: some seconds
_ENTRIES = 1 << 20  # entries of an index looked at together
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


def verify(
    prefixes: Iterable[PathLike],
    hashes: PathLike | None = None,
    vocab_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    index: bool = True,
) -> list[str]:
    """What is wrong with some datasets, one line each; an empty list if nothing is.

    Looks at the index (magic, version, dtype, length, sizes, pointers, document index), at the
    shards (none missing, none too many, none of the wrong length), at the length of the tokens and
    at every token id. Memory is bounded; several files are read at once.

    Args:
        prefixes: of the datasets, as `find_tokens` takes them.
        hashes: a file of lines `name sha256` or, as sha256sum writes, `sha256  name`. Every file
            of the datasets must be in it; folders do not count. A set of shards may go by the name
            of the merged `PREFIX.bin` instead, and is then hashed from end to end.
        vocab_size: ids must be below it; by default, they must be no less than 0 and below 2^31.
        progress: called with the bytes read so far and those to read.
        index: false for preshuffled data that is kept without its `.idx`.

    Raises:
        FileNotFoundError: there is no such file of hashes.
        ValueError: a line of it is not understood.
    """
    check = _Check(hashes, vocab_size, index)
    for prefix in prefixes:
        try:
            check.add(os.fspath(prefix))
        except (OSError, ValueError) as error:
            check.wrong.append(str(error))
    return check.wrong + _run(check.jobs, progress)


def check_ids(prefixes: Iterable[PathLike], vocab_size: int, *, most: int = MOST_CHECKED) -> None:
    """Refuses token ids outside a vocabulary, in all tokens of datasets on this machine.

    Datasets of more than `most` bytes, which take minutes, and remote ones are left to the check
    of every batch as it is read.

    Raises:
        ValueError: there is such an id; the message says where.
    """
    wrong = []
    for prefix in prefixes:
        if not is_url(prefix) and find_tokens(prefix).size <= most:
            check = _Check(None, vocab_size, index=os.path.exists(index_location(prefix)))
            check.add(os.fspath(prefix))
            wrong += check.wrong + _run(check.jobs, None)
        else:
            log.info(
                "%s: token ids are checked as they are read; `pythia-jax data verify` looks at all",
                prefix,
            )
    if wrong:
        raise ValueError(f"{'; '.join(wrong)} (model.vocab_size is {vocab_size})")


def read_hashes(path: PathLike) -> dict[str, str]:
    """Name → SHA-256 from a file of `name sha256` or `sha256  name` lines."""
    found: dict[str, str] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        first, _, rest = line.strip().partition(" ")
        name, _, last = line.strip().rpartition(" ")
        if _SHA256.fullmatch(last):
            digest = last
        elif _SHA256.fullmatch(first):
            name, digest = rest.strip().removeprefix("*"), first
        else:
            raise ValueError(f"{path}:{number}: no SHA-256 and name in {line[:80]!r}")
        name = _base_name(name.strip())
        if found.setdefault(name, digest.lower()) != digest.lower():
            raise ValueError(f"{path}:{number}: {name} stands here with two hashes")
    return found


class _Job:
    """One file, or several end to end, to be read once from start to end."""

    def __init__(self, name: str, content: Bytes, sha256: str | None, ids: "_Ids | None" = None):
        self.name, self.content, self.sha256, self.ids = name, content, sha256, ids

    def run(self, advance: Callable[[int], None]) -> list[str]:
        digest = hashlib.sha256()
        size = self.content.size
        try:
            for start in range(0, size, _CHUNK):
                chunk = self.content.read(start, min(start + _CHUNK, size))
                if self.sha256 is not None:
                    digest.update(np.ascontiguousarray(chunk).data)
                if self.ids is not None:
                    self.ids.look(start, chunk)
                advance(chunk.size)
        except (OSError, ValueError) as error:
            return [str(error)]
        wrong = [] if self.ids is None else self.ids.wrong()
        if self.sha256 is not None and digest.hexdigest() != self.sha256:
            wrong.append(
                f"{self.name}: its SHA-256 is {digest.hexdigest()}, not {self.sha256}; "
                "copy it again"
            )
        return wrong


class _Ids:
    """Looks for token ids outside the vocabulary in one file of a dataset.

    A token that a shard border cuts in two is in neither file whole; `_Check` looks at those.
    """

    def __init__(self, name: str, first_byte: int, dtype: np.dtype, limit: int):
        self.name, self.first_byte, self.dtype, self.limit = name, first_byte, dtype, limit
        self.lead = -first_byte % dtype.itemsize
        self.rest = np.empty(0, np.uint8)  # of a chunk: the first bytes of a token cut in two
        self.count, self.example = 0, (0, 0)

    def look(self, start: int, chunk: NDArray[np.uint8]) -> None:
        """Looks at the chunk that begins at byte `start` of the file; chunks come in order."""
        if start:
            chunk = np.concatenate([self.rest, chunk])
            begin = start - len(self.rest)
        else:
            chunk, begin = chunk[self.lead :], self.lead
        whole = len(chunk) // self.dtype.itemsize * self.dtype.itemsize
        self.rest = chunk[whole:].copy()
        tokens = np.require(chunk[:whole], requirements="A").view(self.dtype)
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self.limit):
            bad = np.flatnonzero((tokens < 0) | (tokens >= self.limit))
            if not self.count:
                place = (self.first_byte + begin) // self.dtype.itemsize + int(bad[0])
                self.example = (int(tokens[bad[0]]), place)
            self.count += bad.size

    def wrong(self) -> list[str]:
        if not self.count:
            return []
        token, place = self.example
        return [
            f"{self.name}: {self.count} token ids are not 0 to {self.limit - 1}, the first of them "
            f"{token} at token {place} of the dataset"
        ]


class _Check:
    """Looks at what datasets are made of, and gathers which files have to be read for the rest."""

    def __init__(self, hashes: PathLike | None, vocab_size: int | None, index: bool):
        self.hashes, self.vocab_size, self.index = hashes, vocab_size, index
        self.expected = None if hashes is None else read_hashes(hashes)
        self.limit = 2**31 if vocab_size is None else vocab_size
        self.wrong: list[str] = []
        self.jobs: list[_Job] = []

    def add(self, prefix: str) -> None:
        if self.index:
            dataset = IndexedDataset(prefix)
            self.wrong += _wrong_in_index(dataset)
            tokens, dtype = dataset.data, dataset.dtype
        else:
            tokens, dtype = find_tokens(prefix), token_dtype(self.vocab_size or 0)
        if dtype.kind not in "iu":
            self.wrong.append(f"{prefix}: holds {dtype.name}, not token ids")
        if tokens.size % dtype.itemsize:
            self.wrong.append(f"{tokens.name}: {tokens.size} bytes are no whole {dtype.name}")
        names = token_files(prefix)
        self._add_files(names, tokens, dtype)
        if self.expected is not None:
            self._add_hashes(prefix, names, tokens, self.expected)

    def _add_files(self, names: list[str], tokens: Bytes, dtype: np.dtype) -> None:
        """Every file once, for its hash and its token ids together."""
        # An unsigned type without room for a wrong id need not be looked at.
        look = dtype.kind == "i" or (dtype.kind == "u" and np.iinfo(dtype).max >= self.limit)
        border, last_place = 0, -1
        for name in names:
            content = tokens if len(names) == 1 else open_bytes(name)
            ids = _Ids(name, border, dtype, self.limit) if look else None
            sha256 = (self.expected or {}).get(_base_name(name))
            if ids is not None or sha256 is not None:
                self.jobs.append(_Job(name, content, sha256, ids))
            border += content.size
            place = border // dtype.itemsize
            if look and border % dtype.itemsize and border < tokens.size and place != last_place:
                self._look_at_border(tokens, place, dtype)
                last_place = place

    def _look_at_border(self, tokens: Bytes, place: int, dtype: np.dtype) -> None:
        """The one token that the border of two shards cuts in two."""
        start = place * dtype.itemsize
        token = int(np.frombuffer(tokens.read(start, start + dtype.itemsize).tobytes(), dtype)[0])
        if not 0 <= token < self.limit:
            self.wrong.append(
                f"{tokens.name}: token id {token} at token {place} of the dataset, on the border "
                f"of two shards, is not 0 to {self.limit - 1}"
            )

    def _add_hashes(
        self, prefix: str, names: list[str], tokens: Bytes, expected: dict[str, str]
    ) -> None:
        """The hash of the index and of merged shards; files of which no hash is known are wrong."""
        unknown = [name for name in names if _base_name(name) not in expected]
        location = index_location(prefix)
        merged = f"{_base_name(location).removesuffix('.idx')}.bin"
        if len(names) > 1 and merged in expected:
            self.jobs.append(_Job(f"{merged}, as its shards make it", tokens, expected[merged]))
            unknown = []
        if self.index and _base_name(location) in expected:
            self.jobs.append(_Job(location, open_bytes(location), expected[_base_name(location)]))
        elif self.index:
            unknown.append(location)
        if unknown:
            more = f" and {len(unknown) - 1} more of its files" if len(unknown) > 1 else ""
            self.wrong.append(f"{unknown[0]}{more}: {self.hashes} has no hash to compare with")


def _wrong_in_index(index: Index) -> list[str]:
    """What opening an index does not look at: the document index, and a remote one's pointers."""
    offset, itemsize, before = index.header.pointers_offset, index.dtype.itemsize, 0
    for first in range(0, len(index), _ENTRIES):
        sizes = index.sizes[first : first + _ENTRIES].astype(np.int64)
        ends = before + np.cumsum(sizes)
        pointers = index.read_entries("<i8", offset + 8 * first, len(sizes))
        bad = np.flatnonzero(pointers != (ends - sizes) * itemsize)
        if bad.size:
            return [
                f"{index.index_path}: the pointer of document {first + bad[0]} is "
                f"{pointers[bad[0]]}, but the documents before it take "
                f"{(ends - sizes)[bad[0]] * itemsize} bytes"
            ]
        before = int(ends[-1])
    offset, length = index.header.document_index_offset, index.header.document_index_length
    last = 0
    for first in range(0, length, _ENTRIES):
        starts = index.read_entries("<i8", offset + 8 * first, min(_ENTRIES, length - first))
        rises = np.diff(starts, prepend=last)
        if np.any(rises < 0) or (first == 0 and starts[0] != 0):
            last = -1
            break
        last = int(starts[-1])
    if length == 0 or last != len(index):
        return [
            f"{index.index_path}: its document index does not go from 0 up to {len(index)}, the "
            "number of its sequences"
        ]
    return []


def _run(jobs: list[_Job], progress: Callable[[int, int], None] | None) -> list[str]:
    total, done, lock = sum(job.content.size for job in jobs), 0, threading.Lock()

    def advance(number: int) -> None:
        nonlocal done
        with lock:
            done += number
            if progress is not None:
                progress(done, total)

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return [line for lines in pool.map(lambda job: job.run(advance), jobs) for line in lines]


def _base_name(location: str) -> str:
    path = location.partition("?")[0] if is_url(location) else location
    return path.replace("\\", "/").rpartition("/")[2]
