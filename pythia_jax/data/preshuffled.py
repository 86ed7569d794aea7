"""Preshuffled data: rows of sequence_length + 1 tokens, already in the order of training.

EleutherAI published the Pile as Pythia saw it this way: step t is rows 1024 t … 1024 t + 1023 of
one long file, cut into shards. A row needs no index to be found. It is its own "document", so the
true documents are known only from the index of the data before it was shuffled.
"""

import hashlib
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pythia_jax.data.indexed import (
    HEADER,
    Index,
    IndexedDataset,
    index_location,
    read_header,
    token_dtype,
)
from pythia_jax.data.order_cache import cached_order
from pythia_jax.data.sample_order import samples_to_draw
from pythia_jax.data.samples import NeoxSamples, Pieces, Samples
from pythia_jax.data.storage import Bytes, find_tokens, open_bytes

_ROWS_HASHED = 64  # by which a dataset is known again
_SIZES_BLOCK = 1024  # sizes of an index looked at together
_SIZES_BLOCKS = 16  # places at which they are looked at


class DocumentsUnknown(ValueError):
    """Asked which documents a row is made of, where nothing says so."""


class PreshuffledSamples(Samples):
    """The rows of a preshuffled dataset as they lie: sample i is row i.

    An `.idx` beside the tokens is not needed. Where there is one, it gives their type, and its
    sizes must be those of rows.

    Args:
        prefix: of the tokens: one `.bin` or a shard set, local or remote.
        sequence_length: tokens of a row less one.
        seed: of the order that the rows were once put in; only documents need it.
        documents_prefix: of the `.idx` of the data before it was shuffled, whose `.bin` is not
            needed.
        vocab_size: ids must fit the type of the tokens. Without an index it decides that type:
            uint16 if the vocabulary has fewer than 65500 entries or is not known, else int32.

    Raises:
        FileNotFoundError: there are no such tokens.
        ValueError: the tokens are not whole rows, or the index is not one of such rows.
    """

    def __init__(
        self,
        prefix: str,
        sequence_length: int,
        seed: int = 1234,
        documents_prefix: str | None = None,
        vocab_size: int | None = None,
    ):
        self.prefix = prefix
        self.sequence_length = sequence_length
        self.seed = seed
        self.documents_prefix = documents_prefix
        self.tokens = find_tokens(prefix)
        found = _dtype_of_index(prefix, sequence_length + 1, self.tokens.size)
        self.dtype = token_dtype(vocab_size or 0) if found is None else found
        if vocab_size is not None and np.iinfo(self.dtype).max < vocab_size - 1:
            raise ValueError(
                f"{prefix}: its {self.dtype.name} cannot hold every id of model.vocab_size "
                f"{vocab_size}; tokenize for this vocabulary"
            )
        self.row_bytes = (sequence_length + 1) * self.dtype.itemsize
        self.num_rows, rest = divmod(self.tokens.size, self.row_bytes)
        if rest or not self.num_rows:
            raise ValueError(
                f"{self.tokens.name}: {self.tokens.size:,} bytes are not whole rows of "
                f"{sequence_length + 1:,} {self.dtype.name} tokens ({self.row_bytes:,} bytes): "
                f"{self.num_rows:,} rows and {rest:,} bytes more; check data.sequence_length, and "
                "that no file is cut short"
            )
        if found is None and self.dtype.itemsize == 2:
            self._check_width_of_tokens()

    def _check_width_of_tokens(self) -> None:
        """Refuses what read as uint16 shows the upper halves of int32 ids, nearly all zeros."""
        some = self.tokens.read(0, min(self.tokens.size, 1 << 12)).view(self.dtype)
        if len(some) >= 64 and some[1::2].max() < 64 < some[::2].max():
            raise ValueError(
                f"{self.tokens.name}: every other number in it is near 0, as in int32 tokens read "
                "as uint16; set model.vocab_size, or put the .idx beside the tokens"
            )

    def __len__(self) -> int:
        return self.num_rows

    def read(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Tokens of these rows, `[n, seq + 1]`, in the type of the data; there is no wrapping."""
        indices = self._checked(indices)
        # Rows that follow each other are one range.
        first = np.flatnonzero(np.diff(indices, prepend=-2) != 1)
        counts = np.diff(first, append=len(indices))
        ranges = indices[first] * self.row_bytes, counts * self.row_bytes
        tokens = self.tokens.read_ranges(*ranges).view(self.dtype)
        return tokens.reshape(len(indices), self.sequence_length + 1)

    def pieces(self, indices: NDArray[np.int64]) -> Pieces:
        """Which documents of `documents_prefix` these rows are made of."""
        return self.original.pieces(self._checked(indices))

    def samples_of_document(self, document: int, source: int = 0) -> NDArray[np.int64]:
        """Numbers of the rows that hold any token of a document of `documents_prefix`."""
        found = self.original.samples_of_document(document, source)
        return found[found < len(self)]

    def content_hash(self) -> str:
        """SHA-256 of what the rows are, with 64 of them spread over the data, wherever it lies."""
        some = np.unique(np.linspace(0, len(self) - 1, _ROWS_HASHED, dtype=np.int64))
        digest = hashlib.sha256(f"{self.dtype.str} {len(self)} {self.row_bytes} ".encode())
        digest.update(self.read(some).tobytes())
        return digest.hexdigest()

    @cached_property
    def original(self) -> NeoxSamples:
        """The samples of the data before it was shuffled; its sample i became row i.

        Drawn for the rows of the file as upstream draws for a run: for Pythia's 146,432,000 rows,
        147,164,160 samples.

        Raises:
            DocumentsUnknown: no `documents_prefix` was given.
            FileNotFoundError: there is no such index.
            ValueError: the index is damaged, or such documents cannot have made these rows.
        """
        if self.documents_prefix is None:
            raise DocumentsUnknown(
                f"{self.prefix}: a row of preshuffled data does not say which documents it is made "
                "of; set data.documents to the prefix of the .idx of the data before it was "
                "shuffled"
            )
        where = f"{self.documents_prefix} (data.documents)"
        # Tokens are never read from it, so that it need have none.
        documents = cast(IndexedDataset, Index(self.documents_prefix))
        wanted = samples_to_draw(1, len(self))
        try:
            order = cached_order(documents, wanted, self.sequence_length, self.seed)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if len(order) < len(self):
            raise ValueError(
                f"{where}: makes {len(order):,} samples, but {self.prefix} has {len(self):,} rows; "
                "these are not the documents that it was made from"
            )
        return NeoxSamples(documents, order)

    def _checked(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        indices = np.asarray(indices, np.int64)
        wrong = indices[(indices < 0) | (indices >= len(self))]
        if wrong.size:
            raise IndexError(
                f"{self.prefix}: row {wrong[0]} asked for, but there are {len(self)}, from 0 on"
            )
        return indices


def holds_rows(index: Index, width: int) -> bool:
    """Whether all documents of a dataset have `width` tokens, as those of preshuffled data have.

    Seen by their total and at places spread over the sizes: all the 146 million of Pythia's would
    be 586 MB to read, and they may lie far away.
    """
    if len(index) == 0 or index.num_tokens != len(index) * width:
        return False
    return bool((_some_sizes(open_bytes(index.index_path), len(index)) == width).all())


def _some_sizes(index: Bytes, count: int) -> NDArray[np.int32]:
    """Blocks of the `count` sizes in an `.idx`, from the first to the last."""
    blocks = np.unique(np.linspace(0, max(count - _SIZES_BLOCK, 0), _SIZES_BLOCKS, dtype=np.int64))
    lengths = np.minimum(count - blocks, _SIZES_BLOCK)
    return index.read_ranges(HEADER.size + 4 * blocks, 4 * lengths).view("<i4")


def _dtype_of_index(prefix: str, width: int, token_bytes: int) -> np.dtype | None:
    """The type of tokens that the `.idx` of a prefix names; None where there is no such file.

    Raises:
        ValueError: it is not the index of rows of `width` tokens, or not of token ids.
    """
    location = index_location(prefix)
    try:
        index = open_bytes(location)
    except FileNotFoundError:
        return None
    header = read_header(index)
    if header.dtype.kind not in "iu":
        raise ValueError(f"{location}: of {header.dtype.name}, not token ids")
    rows, sizes = header.num_documents, _some_sizes(index, header.num_documents)
    if rows * width * header.dtype.itemsize != token_bytes or np.any(sizes != width):
        odd = sizes[sizes != width]
        found = f"one of {odd[0]:,} tokens" if odd.size else f"{rows:,} in {token_bytes:,} bytes"
        raise ValueError(
            f"{location}: its documents are not rows of {width:,} tokens (sequence_length + 1): "
            f"there are {found}; is it preshuffled data, and of this data.sequence_length?"
        )
    return header.dtype
