"""Token datasets on disk: the memory-mapped `.bin/.idx` pair of GPT-NeoX.

`PREFIX.bin` holds the tokens of all documents back to back. `PREFIX.idx` says where each one lies;
all numbers little-endian, without padding:

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

import operator
import os
import struct
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES = {
    code: np.dtype(name)
    for code, name in enumerate(("<u1", "<i1", "<i2", "<i4", "<i8", "<f4", "<f8", "<u2"), start=1)
}
_HEADER = struct.Struct("<9sQBQQ")
_CHUNK = 1 << 20  # documents looked at together where a whole index is walked


class Header(NamedTuple):
    """What the first 34 bytes of an `.idx` file say."""

    dtype: np.dtype
    num_documents: int
    document_index_length: int

    @property
    def pointers_offset(self) -> int:
        """Byte at which the pointers start."""
        return _HEADER.size + 4 * self.num_documents

    @property
    def document_index_offset(self) -> int:
        """Byte at which the document index starts."""
        return self.pointers_offset + 8 * self.num_documents

    @property
    def file_size(self) -> int:
        """Bytes of the whole `.idx` file."""
        return self.document_index_offset + 8 * self.document_index_length


class IndexedDataset:
    """A token dataset, read in place: `dataset[i]` are the tokens of document i, `len` counts them.

    Opening reads and checks the index, never the tokens. Files are mapped on first use and again in
    every process that unpickles the dataset. Reading is safe from several threads.

    Args:
        prefix: path of the pair without suffix; `.bin` or `.idx` at its end is taken off.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file is not what the format says; the message names it and what is wrong.
    """

    def __init__(self, prefix: str | os.PathLike[str]):
        self.prefix = strip_suffix(prefix)
        for path in (self.index_path, self.tokens_path):
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path}: no such file; a dataset is a .bin and an .idx file of one prefix"
                )
        self.header = _read_header(self.index_path)
        self.num_tokens = _check_index(self)

    @property
    def index_path(self) -> Path:
        """The `.idx` file."""
        return self.prefix.with_name(self.prefix.name + ".idx")

    @property
    def tokens_path(self) -> Path:
        """The `.bin` file."""
        return self.prefix.with_name(self.prefix.name + ".bin")

    @property
    def dtype(self) -> np.dtype:
        """Type of the tokens as they lie on disk."""
        return self.header.dtype

    @cached_property
    def sizes(self) -> NDArray[np.int32]:
        """Length of every document in tokens, `[documents]`."""
        return _map(self.index_path, "<i4", len(self), _HEADER.size)

    @cached_property
    def pointers(self) -> NDArray[np.int64]:
        """Byte of `.bin` at which every document starts, `[documents]`."""
        return _map(self.index_path, "<i8", len(self), self.header.pointers_offset)

    @cached_property
    def document_index(self) -> NDArray[np.int64]:
        """The document index as it lies on disk; GPT-NeoX's order never looks at it."""
        header = self.header
        return _map(
            self.index_path, "<i8", header.document_index_length, header.document_index_offset
        )

    @cached_property
    def tokens(self) -> NDArray[Any]:
        """All tokens of all documents, `[num_tokens]`."""
        return _map(self.tokens_path, self.dtype, self.num_tokens)

    def __len__(self) -> int:
        return self.header.num_documents

    def __getitem__(self, document: int) -> NDArray[Any]:
        index = operator.index(document)
        if not -len(self) <= index < len(self):
            raise IndexError(
                f"{self.prefix}: document {index} asked for, but it has {len(self)} documents"
            )
        start = int(self.pointers[index]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.sizes[index])]

    def read_spans(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[Any]:
        """Reads many spans of tokens, put end to end.

        Args:
            starts: first token of each span, counted over the whole dataset.
            lengths: tokens of each span; 0 is fine.

        Returns:
            `[sum of lengths]`, in the dataset's dtype.
        """
        lengths_before = np.cumsum(lengths) - lengths
        positions = np.repeat(starts - lengths_before, lengths)
        positions += np.arange(positions.size)
        return self.tokens[positions]

    def __getstate__(self) -> dict[str, Any]:
        kept = ("prefix", "header", "num_tokens")
        return {name: self.__dict__[name] for name in kept}

    def __repr__(self) -> str:
        return (
            f"IndexedDataset({str(self.prefix)!r}: {len(self)} documents, "
            f"{self.num_tokens} tokens, {self.dtype.name})"
        )


def open_dataset(prefix: str | os.PathLike[str]) -> IndexedDataset:
    """Opens the dataset at a prefix; errors are those of `IndexedDataset`."""
    return IndexedDataset(prefix)


def strip_suffix(prefix: str | os.PathLike[str]) -> Path:
    """The prefix without a `.bin` or `.idx` at its end."""
    path = Path(prefix)
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype in which GPT-NeoX stores the tokens of a vocabulary (best_fitting_dtype)."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


def _map(path: Path, dtype: DTypeLike, count: int, offset: int = 0) -> NDArray[Any]:
    """Maps `count` items of a file, read-only."""
    if count == 0:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    return np.asarray(np.memmap(path, dtype, mode="r", offset=offset, shape=(count,)))


def _read_header(path: Path) -> Header:
    """Reads and checks the first bytes of an `.idx` file."""
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if not head.startswith(MAGIC):
        raise ValueError(
            f"{path}: not an index of GPT-NeoX's mmap format: it starts with {head[:9]!r}, "
            f"not {MAGIC!r}"
        )
    if len(head) < _HEADER.size:
        raise ValueError(f"{path}: ends inside its {_HEADER.size}-byte header; copy it again")
    _, version, code, documents, index_length = _HEADER.unpack(head)
    if version != VERSION:
        raise ValueError(f"{path}: format version {version}; only version {VERSION} is known")
    if code not in DTYPES:
        known = ", ".join(f"{code} {dtype.name}" for code, dtype in DTYPES.items())
        raise ValueError(f"{path}: unknown dtype code {code}; known are {known}")
    header = Header(DTYPES[code], documents, index_length)
    actual = path.stat().st_size
    if actual != header.file_size:
        raise ValueError(
            f"{path}: holds {actual} bytes, but its header ({documents} documents, document index "
            f"of {index_length}) makes {header.file_size}; truncated or damaged, copy it again"
        )
    return header


def _check_index(dataset: IndexedDataset) -> int:
    """Checks sizes, pointers and the length of `.bin`; returns the number of tokens."""
    itemsize = dataset.dtype.itemsize
    total = 0
    for first in range(0, len(dataset), _CHUNK):
        sizes = dataset.sizes[first : first + _CHUNK].astype(np.int64)
        ends = total + np.cumsum(sizes)
        pointers = dataset.pointers[first : first + _CHUNK]
        bad = np.flatnonzero((sizes < 0) | (pointers != (ends - sizes) * itemsize))
        if bad.size:
            raise ValueError(
                f"{dataset.index_path}: document {first + bad[0]} has size {sizes[bad[0]]} and "
                f"pointer {pointers[bad[0]]}, but sizes are at least 0 and pointers the bytes "
                "before; the file is damaged, copy it again"
            )
        total = int(ends[-1])
    actual = dataset.tokens_path.stat().st_size
    if actual != total * itemsize:
        raise ValueError(
            f"{dataset.tokens_path}: holds {actual} bytes, but its index promises {total} tokens "
            f"of {dataset.dtype.name}, {total * itemsize} bytes; the file is truncated, or the two "
            "files do not belong together"
        )
    return total


class IndexedDatasetWriter:
    """Writes a dataset document by document, byte for byte as GPT-NeoX's builder.

    A context manager. Everything is streamed to temporary files beside the target, which take
    their names when the block ends; if it ends with an exception they are removed and whatever
    lay at the prefix is untouched. Memory does not grow with the number of documents.

    Args:
        prefix: path of the pair without suffix; missing folders are made.
        dtype: type of the tokens on disk, one of `DTYPES`; see `token_dtype`.

    Raises:
        ValueError: the format has no code for this dtype.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: DTypeLike):
        self.prefix = strip_suffix(prefix)
        self.dtype: np.dtype[Any] = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in DTYPES.values():
            known = ", ".join(known.name for known in DTYPES.values())
            raise ValueError(f"{self.prefix}: cannot store {self.dtype.name}; choose from {known}")
        self.num_documents = 0
        self.num_tokens = 0

    def __enter__(self) -> Self:
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._tokens_file = self._temporary(".bin").open("wb")
        self._index_file = self._temporary(".idx").open("w+b")
        self._index_file.write(bytes(_HEADER.size))  # counts are known at the end
        return self

    def add(self, tokens: ArrayLike) -> None:
        """Appends one document, `[n]` tokens; n may be 0.

        Raises:
            ValueError: a token does not fit the dtype, or the document is too long.
        """
        tokens = np.asarray(tokens)
        self.add_documents(tokens, [tokens.size])

    def add_documents(self, tokens: ArrayLike, sizes: ArrayLike) -> None:
        """Appends many documents: their tokens end to end, and how many each one has."""
        values, lengths = np.asarray(tokens), np.asarray(sizes, np.int64)
        if values.ndim != 1 or lengths.sum() != values.size:
            raise ValueError(
                f"{self.prefix}: tokens of shape {values.shape} given for documents of "
                f"{lengths.sum()} tokens; give one flat sequence"
            )
        if lengths.size and not 0 <= lengths.min() <= lengths.max() <= np.iinfo(np.int32).max:
            raise ValueError(
                f"{self.prefix}: a document of {lengths.max()} tokens; the format counts to 2^31-1"
            )
        self._check_fit(values)
        self._tokens_file.write(values.astype(self.dtype).tobytes())
        self._index_file.write(lengths.astype("<i4").tobytes())
        self.num_documents += lengths.size
        self.num_tokens += values.size

    def __exit__(self, exception_type: type[BaseException] | None, *_: object) -> None:
        try:
            if exception_type is None:
                self._finish()
        finally:
            self._tokens_file.close()
            self._index_file.close()
            for suffix in (".bin", ".idx"):
                self._temporary(suffix).unlink(missing_ok=True)

    def _temporary(self, suffix: str) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}{suffix}.{os.getpid()}.tmp")

    def _check_fit(self, values: NDArray[Any]) -> None:
        if values.size == 0 or self.dtype.kind == "f":
            return
        if values.dtype.kind not in "iu":
            raise ValueError(
                f"{self.prefix}: tokens must be whole numbers of at most 64 bits, not "
                f"{values.dtype}"
            )
        low, high = int(values.min()), int(values.max())
        limits = np.iinfo(self.dtype)
        if low < limits.min or high > limits.max:
            raise ValueError(
                f"{self.prefix}: token {high if high > limits.max else low} does not fit "
                f"{self.dtype.name} ({limits.min} to {limits.max}); choose a wider dtype"
            )

    def _finish(self) -> None:
        """Completes the index, makes both files durable and gives them their names."""
        self._write_pointers_and_document_index()
        code = next(code for code, dtype in DTYPES.items() if dtype == self.dtype)
        self._index_file.seek(0)
        self._index_file.write(
            _HEADER.pack(MAGIC, VERSION, code, self.num_documents, self.num_documents + 1)
        )
        for file in (self._tokens_file, self._index_file):
            _close_durably(file)
        # An index beside foreign tokens would be worse than none, so the old one goes first.
        index_path = self.prefix.with_name(self.prefix.name + ".idx")
        index_path.unlink(missing_ok=True)
        self._temporary(".bin").replace(self.prefix.with_name(self.prefix.name + ".bin"))
        self._temporary(".idx").replace(index_path)

    def _write_pointers_and_document_index(self) -> None:
        file, count = self._index_file, self.num_documents
        offset = 0
        for first in range(0, count, _CHUNK):
            number = min(_CHUNK, count - first)
            file.seek(_HEADER.size + 4 * first)
            sizes = np.frombuffer(file.read(4 * number), "<i4").astype(np.int64)
            ends = offset + np.cumsum(sizes * self.dtype.itemsize)
            file.seek(_HEADER.size + 4 * count + 8 * first)
            file.write((ends - sizes * self.dtype.itemsize).astype("<i8").tobytes())
            offset = int(ends[-1])
        file.seek(_HEADER.size + 12 * count)
        for first in range(0, count + 1, _CHUNK):
            file.write(np.arange(first, min(first + _CHUNK, count + 1), dtype="<i8").tobytes())


def _close_durably(file: IO[bytes]) -> None:
    """Closes a file once its bytes are on the disk, so that a name never points at less."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
