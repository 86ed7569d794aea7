"""Numbered samples, `[seq + 1]` tokens each, and the documents they are made of.

`Samples` is what batches are dealt from. `NeoxSamples` are those of one dataset in GPT-NeoX's
order; `BlendedSamples` are those of several, mixed by weight.

Source: GPT-NeoX v1.0, megatron/data/gpt2_dataset.py and blendable_dataset.py.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pythia_jax.data.indexed import IndexedDataset
from pythia_jax.data.sample_order import SampleOrder


class Pieces(NamedTuple):
    """Where rows come from: one entry for every run of tokens of one document in a row.

    All are int64 `[pieces]`, in reading order: row after row, left to right. An empty document
    gives no piece.
    """

    row: NDArray[np.int64]  # position in the rows asked for
    column: NDArray[np.int64]  # first token of the run within the row
    length: NDArray[np.int64]  # tokens
    source: NDArray[np.int64]  # which path of the split
    document: NDArray[np.int64]  # number of the document in that path
    offset: NDArray[np.int64]  # token of the document at which the run starts


class Samples(Protocol):
    """A numbered set of samples, each `sequence_length` + 1 tokens."""

    def __len__(self) -> int: ...

    def read(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Tokens of the samples at `indices`, `[n, seq + 1]`, in the dtype of the data.

        Indices beyond the length wrap, as GPT-NeoX's do. Rows that lie together may be a read-only
        view of the data.
        """
        ...

    def pieces(self, indices: NDArray[np.int64]) -> Pieces:
        """Which documents the samples at `indices` are made of.

        Raises:
            ValueError: documents are not known; the message says what to set.
        """
        ...

    def samples_of_document(self, document: int, source: int = 0) -> NDArray[np.int64]:
        """Numbers of the samples that hold any token of a document, ascending, below the length.

        Args:
            document: its number in its path.
            source: which path of the split.

        Raises:
            IndexError: there is no such document or path.
            ValueError: documents are not known; the message says what to set.
        """
        ...

    def __getitem__(self, index: int) -> NDArray[Any]:
        """One sample, `[seq + 1]`, in the dtype of the data; −1 is the last."""
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"sample {number} asked for, but there are {len(self)}, from 0 on")
        return np.array(self.read(np.array([number % len(self)], np.int64))[0])


@dataclass(frozen=True, eq=False)
class NeoxSamples(Samples):
    """The samples of one dataset in GPT-NeoX's order.

    Upstream checks an index against the M shuffled samples, and wraps one beyond them at M − 1,
    the length. So a blend, which may ask for more than the length, is served the last one too.
    """

    dataset: IndexedDataset
    order: SampleOrder
    in_blend: bool = False

    def __len__(self) -> int:
        return len(self.order)

    def read(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Tokens of the samples served at `indices`, `[n, seq + 1]`; indices wrap at the length."""
        spans = self._spans(indices)
        starts = self.dataset.pointers[spans.document] // self.dataset.dtype.itemsize
        tokens = self.dataset.read_spans(starts + spans.offset, spans.length)
        return tokens.reshape(-1, self.order.sequence_length + 1)

    def pieces(self, indices: NDArray[np.int64]) -> Pieces:
        """Which documents the samples served at `indices` are made of."""
        spans = self._spans(np.asarray(indices, np.int64))
        return Pieces(*(column[spans.length > 0] for column in spans))

    def samples_of_document(self, document: int, source: int = 0) -> NDArray[np.int64]:
        """Numbers of the samples that hold any token of a document, ascending.

        Looks through the whole order: about two seconds for that of the Pile.
        """
        _check_place(document, len(self.dataset), f"{self.dataset.prefix}: document")
        _check_place(source, 1, "path")
        served = len(self) + self.in_blend
        if self.dataset.sizes[document] == 0:
            return np.empty(0, np.int64)
        return self.order.samples_at(self.order.positions_of(document), served)

    def wrap(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers of the samples that are served at `indices`."""
        indices = np.asarray(indices, np.int64)
        return np.where(indices < len(self) + self.in_blend, indices, indices % len(self))

    def _spans(self, indices: NDArray[np.int64]) -> Pieces:
        """One span of tokens for every document that a sample touches, empty ones included."""
        places = self.order.spans(self.wrap(indices))
        (first, first_token), (last, last_token) = (place.T for place in places)
        counts = last - first + 1
        last_span = np.cumsum(counts) - 1
        first_span = last_span - counts + 1
        positions = np.repeat(first - first_span, counts) + np.arange(counts.sum())
        documents = self.order.document_order[positions].astype(np.int64)
        lengths = self.dataset.sizes[documents].astype(np.int64)
        lengths[last_span] = last_token + 1
        lengths[first_span] -= first_token
        offsets = np.zeros_like(lengths)
        offsets[first_span] = first_token
        row = np.repeat(np.arange(len(indices)), counts)
        column = np.cumsum(lengths) - lengths - row * (self.order.sequence_length + 1)
        return Pieces(row, column, lengths, np.zeros_like(row), documents, offsets)


@dataclass(frozen=True, eq=False)
class BlendedSamples(Samples):
    """The samples of several datasets, mixed as `blending_indices` says.

    As many as all members together have; a member asked for more than it has wraps.
    """

    members: tuple[NeoxSamples, ...]
    dataset: NDArray[np.uint8]  # [samples]: which member
    sample: NDArray[Any]  # [samples]: which of its samples, before it wraps

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Tokens of the samples at `indices`, `[n, seq + 1]`; indices wrap at the length."""
        width = self.members[0].order.sequence_length + 1
        dtype = np.result_type(*(member.dataset.dtype for member in self.members))
        tokens = np.empty((len(indices), width), dtype)
        for member, places, numbers in self._by_member(indices):
            tokens[places] = self.members[member].read(numbers)
        return tokens

    def pieces(self, indices: NDArray[np.int64]) -> Pieces:
        """Which documents the samples at `indices` are made of; the source is the member."""
        parts = []
        for member, places, numbers in self._by_member(indices):
            found = self.members[member].pieces(numbers)
            source = np.full_like(found.source, member)
            parts.append(found._replace(row=places[found.row], source=source))
        together = Pieces(*map(np.concatenate, zip(*parts, strict=True)))
        in_order = np.argsort(together.row, kind="stable")
        return Pieces(*(column[in_order] for column in together))

    def samples_of_document(self, document: int, source: int = 0) -> NDArray[np.int64]:
        """Numbers of the samples of the blend that hold any token of a document, ascending."""
        _check_place(source, len(self.members), "path")
        member = self.members[source]
        holds = np.zeros(len(member) + 1, bool)
        holds[member.samples_of_document(document)] = True
        # A member gives its samples one after the other, so these are all it gives, in order.
        numbers = np.flatnonzero(self.dataset == source)
        return numbers[holds[member.wrap(np.arange(len(numbers)))]]

    def _by_member(
        self, indices: NDArray[np.int64]
    ) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """For each member asked: places in `indices`, and the numbers of its samples there."""
        served = np.asarray(indices, np.int64) % len(self)
        dataset, sample = self.dataset[served], self.sample[served].astype(np.int64)
        for member in range(len(self.members)):
            places = np.flatnonzero(dataset == member)
            if places.size or not len(served):
                yield member, places, sample[places]


def _check_place(number: int, count: int, what: str) -> None:
    if not 0 <= number < count:
        raise IndexError(f"{what} {number} asked for, but there are {count}, from 0 on")
