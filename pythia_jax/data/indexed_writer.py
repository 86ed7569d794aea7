"""Writes `.bin/.idx` datasets, byte for byte as GPT-NeoX's builder does."""

import os
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from pythia_jax.data.indexed import DTYPES, HEADER, MAGIC, VERSION
from pythia_jax.data.storage import strip_suffix

_CHUNK = 1 << 20  # documents whose pointers are worked out together


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
        self.prefix = Path(strip_suffix(prefix))
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
        self._index_file.write(bytes(HEADER.size))  # counts are known at the end
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
            HEADER.pack(MAGIC, VERSION, code, self.num_documents, self.num_documents + 1)
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
            file.seek(HEADER.size + 4 * first)
            sizes = np.frombuffer(file.read(4 * number), "<i4").astype(np.int64)
            ends = offset + np.cumsum(sizes * self.dtype.itemsize)
            file.seek(HEADER.size + 4 * count + 8 * first)
            file.write((ends - sizes * self.dtype.itemsize).astype("<i8").tobytes())
            offset = int(ends[-1])
        file.seek(HEADER.size + 12 * count)
        for first in range(0, count + 1, _CHUNK):
            file.write(np.arange(first, min(first + _CHUNK, count + 1), dtype="<i8").tobytes())


def _close_durably(file: IO[bytes]) -> None:
    """Closes a file once its bytes are on the disk, so that a name never points at less."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
