"""Token datasets as they lie: the `.bin/.idx` pair of GPT-NeoX, read in place.

`PREFIX.bin` holds the tokens of all documents back to back; it may lie in shards, and anywhere
(`pythia_jax.data.storage`). `PREFIX.idx` says where each document lies; all numbers little-endian,
without padding:

    bytes        content
    9            magic `MMIDIDX\\0\\0`
    8            version, 1
    1            dtype code (`DTYPES`)
    8            number of documents N ("sequences" upstream, which writes one a document)
    8            length of the document index D, N + 1
    4 N          sizes, int32, in tokens
    8 N          pointers, int64, in bytes: where each document starts in `.bin`
    8 D          document index, int64: the sequence at which each document starts

Source: GPT-NeoX v1.0, megatron/data/indexed_dataset.py, MMapIndexedDataset.
"""

import hashlib
import operator
import struct
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pythia_jax.data.storage import (
    Bytes,
    LocalFiles,
    PathLike,
    check_ranges,
    copy_spans,
    find_tokens,
    open_bytes,
    split_shard_name,
    strip_suffix,
    with_suffix,
)

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES = {
    code: np.dtype(name)
    for code, name in enumerate(("<u1", "<i1", "<i2", "<i4", "<i8", "<f4", "<f8", "<u2"), start=1)
}
HEADER = struct.Struct("<9sQBQQ")
_CHUNK = 1 << 20  # documents looked at together where a whole index is walked


class Header(NamedTuple):
    """What the first 34 bytes of an `.idx` file say."""

    dtype: np.dtype
    num_documents: int
    document_index_length: int

    @property
    def pointers_offset(self) -> int:
        """Byte at which the pointers start."""
        return HEADER.size + 4 * self.num_documents

    @property
    def document_index_offset(self) -> int:
        """Byte at which the document index starts."""
        return self.pointers_offset + 8 * self.num_documents

    @property
    def file_size(self) -> int:
        """Bytes of the whole `.idx` file."""
        return self.document_index_offset + 8 * self.document_index_length


class Index:
    """An `.idx` file: how long the documents of a dataset are and where they start.

    On this machine it is mapped, and checked whole when opened. A remote one has its sizes read
    when they are first asked for, and its pointers worked out from them, which saves two thirds of
    the file; only the last pointer is read, and must agree.

    Args:
        prefix: of the dataset, as `find_tokens` takes it. The `.bin` is not looked at.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not what the format says; the message names it and what is wrong.
    """

    def __init__(self, prefix: PathLike):
        self.prefix = strip_suffix(prefix)
        try:
            self._index = open_bytes(index_location(self.prefix))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error}; a dataset is a .bin and an .idx file of one prefix"
            ) from None
        self.header = read_header(self._index)
        self.num_tokens = _check_index(self) if self._is_local else _end_of_last(self)

    @property
    def index_path(self) -> str:
        """Where the `.idx` file is."""
        return self._index.name

    @property
    def dtype(self) -> np.dtype:
        """Type of the tokens as they lie in `.bin`."""
        return self.header.dtype

    @property
    def _is_local(self) -> bool:
        return isinstance(self._index, LocalFiles)

    @cached_property
    def sizes(self) -> NDArray[np.int32]:
        """Length of every document in tokens, `[documents]`.

        Raises:
            ValueError: sizes just read from afar are negative, or are not what the pointers say.
        """
        sizes = self.read_entries("<i4", HEADER.size, len(self))
        if not self._is_local:
            _check_sizes(self, sizes)
        return sizes

    @cached_property
    def pointers(self) -> NDArray[np.int64]:
        """Byte of `.bin` at which every document starts, `[documents]`."""
        if self._is_local:
            return self.read_entries("<i8", self.header.pointers_offset, len(self))
        pointers = np.zeros(len(self), np.int64)
        np.cumsum(self.sizes[:-1], out=pointers[1:])
        pointers *= self.dtype.itemsize
        return pointers

    @cached_property
    def document_index(self) -> NDArray[np.int64]:
        """The document index as it lies on disk; GPT-NeoX's order never looks at it."""
        return self.read_entries(
            "<i8", self.header.document_index_offset, self.header.document_index_length
        )

    def content_hash(self) -> str:
        """SHA-256 of all that the index says of its documents: their dtype, number and sizes.

        Equal wherever the dataset lies, in one file or in shards. Half a second for the Pile's 210
        million documents, once their sizes are in memory.
        """
        digest = hashlib.sha256(f"{self.dtype.str} {len(self)} ".encode())
        for first in range(0, len(self), _CHUNK):
            digest.update(np.ascontiguousarray(self.sizes[first : first + _CHUNK], "<i4").data)
        return digest.hexdigest()

    def __len__(self) -> int:
        return self.header.num_documents

    def read_entries(self, dtype: str, offset: int, count: int) -> NDArray[Any]:
        """So many numbers of the `.idx` file as they lie from byte `offset` on."""
        stop = offset + count * np.dtype(dtype).itemsize
        return self._index.read(offset, stop).view(dtype)

    def _span(self, document: int) -> tuple[int, int]:
        """First token and length of a document, without reading the sizes of all the others."""
        index = operator.index(document)
        if not -len(self) <= index < len(self):
            raise IndexError(
                f"{self.prefix}: document {index} asked for, but it has {len(self)} documents"
            )
        index %= len(self)
        if self._is_local or "sizes" in self.__dict__:
            pointer, size = int(self.pointers[index]), int(self.sizes[index])
        else:
            starts = [self.header.pointers_offset + 8 * index, HEADER.size + 4 * index]
            read = self._index.read_ranges(np.array(starts), np.array([8, 4]))
            pointer, size = struct.unpack("<qi", read.tobytes())
        return pointer // self.dtype.itemsize, size

    def __getstate__(self) -> dict[str, Any]:
        cached = ("sizes", "pointers", "document_index")
        return {name: value for name, value in self.__dict__.items() if name not in cached}

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.prefix!r}: {len(self)} documents, "
            f"{self.num_tokens} tokens, {self.dtype.name})"
        )


class IndexedDataset(Index):
    """A token dataset, read in place: `dataset[i]` are the tokens of document i, `len` counts them.

    Opening reads and checks the index, never the tokens. Files are mapped on first use and again in
    every process that unpickles the dataset. Reading is safe from several threads.

    Args:
        prefix: of the dataset, local or remote, one file or shards, as `find_tokens` takes it.

    Raises:
        FileNotFoundError: the `.idx`, the `.bin` or a shard is missing.
        ValueError: a file is not what the format says; the message names it and what is wrong.
    """

    def __init__(self, prefix: PathLike):
        super().__init__(prefix)
        self.data: Bytes = find_tokens(prefix)
        promised = self.num_tokens * self.dtype.itemsize
        if self.data.size != promised:
            raise ValueError(
                f"{self.data.name}: holds {self.data.size} bytes, but its index promises "
                f"{self.num_tokens} tokens of {self.dtype.name}, {promised} bytes; a file is "
                "truncated, or tokens and index do not belong together"
            )

    @property
    def tokens(self) -> NDArray[Any]:
        """All tokens of all documents, `[num_tokens]`, mapped.

        Raises:
            ValueError: they lie in shards or remote, where only `read_spans` reads them.
        """
        if not self._is_one_map:
            raise ValueError(
                f"{self.data.name}: not one file of this machine, so its tokens are no array; "
                "read_spans reads them where they lie"
            )
        assert isinstance(self.data, LocalFiles)
        return self.data.map_of(0).view(self.dtype)

    @property
    def _is_one_map(self) -> bool:
        return isinstance(self.data, LocalFiles) and len(self.data.paths) == 1

    def __getitem__(self, document: int) -> NDArray[Any]:
        start, size = self._span(document)
        itemsize = self.dtype.itemsize
        if self._is_one_map:
            return self.tokens[start : start + size]
        read = self.data.read(start * itemsize, (start + size) * itemsize)
        return np.require(read, requirements="A").view(self.dtype)

    def read_spans(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[Any]:
        """Reads many spans of tokens, put end to end.

        Args:
            starts: first token of each span, counted over the whole dataset.
            lengths: tokens of each span; 0 is fine.

        Returns:
            `[sum of lengths]`, in the dataset's dtype; a read-only view, perhaps, where they lie
            together.

        Raises:
            IndexError: a span leaves the dataset.
        """
        starts, lengths = check_ranges(self.prefix, self.num_tokens, starts, lengths, "tokens")
        if self._is_one_map:
            return copy_spans(self.tokens, starts, lengths)
        itemsize = self.dtype.itemsize
        return self.data.read_ranges(starts * itemsize, lengths * itemsize).view(self.dtype)


def open_dataset(prefix: PathLike) -> IndexedDataset:
    """Opens the dataset at a prefix; errors are those of `IndexedDataset`."""
    return IndexedDataset(prefix)


def index_location(prefix: PathLike) -> str:
    """The `.idx` of a dataset; a shard set has one, named as if it were one file."""
    base, _ = split_shard_name(strip_suffix(prefix))
    return with_suffix(base, ".idx")


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype in which GPT-NeoX stores the tokens of a vocabulary (best_fitting_dtype)."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


def read_header(index: Bytes) -> Header:
    """Reads and checks the first bytes of an `.idx` file."""
    head = index.read(0, min(HEADER.size, index.size)).tobytes()
    if not head.startswith(MAGIC):
        raise ValueError(
            f"{index.name}: not an index of GPT-NeoX's mmap format: it starts with {head[:9]!r}, "
            f"not {MAGIC!r}"
        )
    if len(head) < HEADER.size:
        raise ValueError(f"{index.name}: ends inside its {HEADER.size}-byte header; copy it again")
    _, version, code, documents, index_length = HEADER.unpack(head)
    if version != VERSION:
        raise ValueError(f"{index.name}: format version {version}; only version {VERSION} is known")
    if code not in DTYPES:
        known = ", ".join(f"{code} {dtype.name}" for code, dtype in DTYPES.items())
        raise ValueError(f"{index.name}: unknown dtype code {code}; known are {known}")
    header = Header(DTYPES[code], documents, index_length)
    if index.size != header.file_size:
        raise ValueError(
            f"{index.name}: holds {index.size} bytes, but its header ({documents} documents, "
            f"document index of {index_length}) makes {header.file_size}; truncated or damaged, "
            "copy it again"
        )
    return header


def _check_index(index: Index) -> int:
    """Checks every size and pointer; returns the number of tokens."""
    itemsize = index.dtype.itemsize
    total = 0
    for first in range(0, len(index), _CHUNK):
        sizes = index.sizes[first : first + _CHUNK].astype(np.int64)
        ends = total + np.cumsum(sizes)
        pointers = index.pointers[first : first + _CHUNK]
        bad = np.flatnonzero((sizes < 0) | (pointers != (ends - sizes) * itemsize))
        if bad.size:
            raise ValueError(
                f"{index.index_path}: document {first + bad[0]} has size {sizes[bad[0]]} and "
                f"pointer {pointers[bad[0]]}, but sizes are at least 0 and pointers the bytes "
                "before; the file is damaged, copy it again"
            )
        total = int(ends[-1])
    return total


def _end_of_last(index: Index) -> int:
    """Tokens of a remote dataset, from the last size and pointer alone."""
    if len(index) == 0:
        return 0
    itemsize = index.dtype.itemsize
    (pointer,) = index.read_entries("<i8", index.header.document_index_offset - 8, 1).tolist()
    (size,) = index.read_entries("<i4", index.header.pointers_offset - 4, 1).tolist()
    if size < 0 or pointer < 0 or pointer % itemsize:
        raise ValueError(
            f"{index.index_path}: its last document has size {size} and pointer {pointer}; the "
            "file is damaged, copy it again"
        )
    return pointer // itemsize + size


def _check_sizes(index: Index, sizes: NDArray[np.int32]) -> None:
    """Checks sizes read from afar against the number of tokens that the last pointer gave."""
    if len(sizes) and sizes.min() < 0:
        bad = int(np.argmax(sizes < 0))
        raise ValueError(
            f"{index.index_path}: document {bad} has size {sizes[bad]}; the file is damaged, copy "
            "it again"
        )
    total = int(sizes.sum(dtype=np.int64))
    if total != index.num_tokens:
        raise ValueError(
            f"{index.index_path}: its sizes make {total} tokens, its last pointer "
            f"{index.num_tokens}; the file is damaged, copy it again"
        )
