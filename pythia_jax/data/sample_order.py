"""GPT-NeoX v1.0's order of training samples: documents → samples → shuffles.

All epochs are put into one sequence of documents and shuffled together; that sequence, read as one
stream of tokens, is cut into samples of `sequence_length` + 1 tokens, each starting on the last
token of the one before; and the samples are shuffled. Both shuffles come, in this order, from one
legacy NumPy `RandomState(seed)`.

Source: GPT-NeoX v1.0, megatron/data/gpt2_dataset.py (_build_index_mappings), helpers.cpp
(build_sample_idx) and data_utils.py (numbers of samples).
"""

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_CHUNK = 1 << 18  # entries of an order looked at together, so that they stay in the cache
SAMPLE_MARGIN = 1.005  # upstream asks for 0.5 % more samples than it means to serve


@dataclass(frozen=True)
class SplitSizes:
    """How many batches a run takes from each split (data_utils.py).

    Upstream evaluates every so many steps and once more at the end, and once on the test split.
    """

    train: int
    validation: int
    test: int

    @classmethod
    def of_run(cls, steps: int, evaluate_every: int, evaluation_steps: int) -> "SplitSizes":
        """Batches for a run of `steps`, evaluated every so many steps on so many batches."""
        evaluations = steps // evaluate_every + 1
        return cls(steps, evaluations * evaluation_steps, evaluation_steps)


def samples_to_draw(num_batches: int, batch_size: int, weight: float = 1.0) -> int:
    """Samples GPT-NeoX asks one path for: its share of the batches and 0.5 % more, in float64.

    The number matters only through the number of epochs that it takes.
    """
    return math.ceil(num_batches * batch_size * weight * SAMPLE_MARGIN)


def epochs_needed(tokens_per_epoch: int, num_samples: int, sequence_length: int) -> int:
    """The least number E ≥ 1 of epochs with floor((E · tokens − 1) / sequence_length) ≥ samples.

    Raises:
        ValueError: one epoch does not hold a single sample.
    """
    if tokens_per_epoch <= sequence_length:
        raise ValueError(
            f"the documents hold {tokens_per_epoch} tokens, but one sample takes "
            f"{sequence_length + 1} (sequence_length + 1); give more text or shorten the sequence"
        )
    return max(1, -(-(num_samples * sequence_length + 1) // tokens_per_epoch))


def samples_of(epochs: int, tokens_per_epoch: int, sequence_length: int) -> int:
    """Samples M that so many epochs make; GPT-NeoX serves M − 1 of them.

    Raises:
        ValueError: none would be served.
    """
    total = (epochs * tokens_per_epoch - 1) // sequence_length
    if total < 2:
        raise ValueError(
            f"the documents hold {tokens_per_epoch} tokens, which make one sample of "
            f"sequence_length {sequence_length}, and GPT-NeoX never serves the last one; "
            "give more text or shorten the sequence"
        )
    return total


@dataclass(frozen=True, eq=False)
class SampleOrder:
    """Which tokens every sample takes, and in which order samples are served.

    Sample j runs from place `sample_index[j]` to place `sample_index[j + 1]`, both included, where
    a place is (position in `document_order`, token in that document). The i-th sample served is
    j = `shuffle[i]`.

    The length is one less than the number M of samples: upstream takes the lesser of M − 1 and
    M, so its last shuffled sample is never served. Lookups wrap around at the length.
    """

    document_order: NDArray[np.int32]  # [epochs · documents]
    sample_index: NDArray[Any]  # [M + 1, 2], int32, or int64 for 2^31 positions and more
    shuffle: NDArray[Any]  # [M], uint32, or int64 for 2^32 - 2 samples and more
    sequence_length: int
    epochs: int

    def __len__(self) -> int:
        return len(self.shuffle) - 1

    def spans(self, indices: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First and last place of the samples served at `indices`, two arrays `[n, 2]`.

        Indices go up to M − 1, one beyond the length: what is beyond wraps is the caller's to say.
        """
        sample = self.shuffle[np.asarray(indices, np.int64)].astype(np.int64)
        first, last = self.sample_index[sample], self.sample_index[sample + 1]
        return first.astype(np.int64), last.astype(np.int64)

    def positions_of(self, document: int) -> NDArray[np.int64]:
        """Where a document stands in `document_order`, once an epoch."""
        return _where(self.document_order, lambda documents: documents == document)

    def samples_at(self, positions: NDArray[np.int64], served: int) -> NDArray[np.int64]:
        """Which of the first `served` samples touch documents at these positions, ascending.

        The documents must not be empty.
        """
        starts = self.sample_index[:, 0]
        touched = np.zeros(len(self.shuffle), bool)
        for position in positions.tolist():
            # The sample before the first that starts at or after a position may end in it.
            first = bisect.bisect_left(starts, position) - 1
            touched[max(first, 0) : bisect.bisect_right(starts, position)] = True
        return _where(self.shuffle[:served], lambda samples: touched[samples])


def build_sample_order(
    sizes: NDArray[np.integer],
    num_samples: int,
    sequence_length: int,
    seed: int,
    documents: NDArray[np.integer] | None = None,
) -> SampleOrder:
    """Builds GPT-NeoX's order for one dataset.

    Args:
        sizes: length of every document of the dataset in tokens.
        num_samples: how many samples are wanted (`samples_to_draw`).
        sequence_length: tokens of a sample less one.
        seed: of the two shuffles.
        documents: which documents to use; all by default.

    Raises:
        ValueError: no documents, too few tokens, or a number out of range.
    """
    if num_samples < 0 or sequence_length < 1:
        raise ValueError(
            f"cannot make {num_samples} samples of sequence_length {sequence_length}; "
            "at least 0 samples of sequence_length 1"
        )
    if documents is None:
        documents = np.arange(len(sizes), dtype=np.int32)
        tokens_per_epoch = int(sizes.sum(dtype=np.int64))
    else:
        tokens_per_epoch = int(sizes[documents].sum(dtype=np.int64))
    epochs = epochs_needed(tokens_per_epoch, num_samples, sequence_length)
    total = samples_of(epochs, tokens_per_epoch, sequence_length)
    rng = np.random.RandomState(seed)
    document_order = np.tile(documents.astype(np.int32, copy=False), epochs)
    del documents
    rng.shuffle(document_order)
    sample_index = _sample_index(sizes, document_order, total, sequence_length)
    shuffle = np.arange(total, dtype=np.uint32 if total < 2**32 - 2 else np.int64)
    rng.shuffle(shuffle)
    return SampleOrder(document_order, sample_index, shuffle, sequence_length, epochs)


def _sample_index(
    sizes: NDArray[np.integer],
    document_order: NDArray[np.int32],
    num_samples: int,
    sequence_length: int,
) -> NDArray[Any]:
    """Where each sample starts: `[num_samples + 1, 2]` of (position, token in the document).

    Sample i starts at token i · sequence_length of the stream: in the first document that ends
    after it. Empty documents end where they start, so they are never it, except in the first row,
    which upstream sets to (0, 0) without looking.
    """
    sizes = np.require(sizes, requirements="A")  # gathers are slow in an index file as it lies
    fits = len(document_order) <= np.iinfo(np.int32).max
    index = np.empty((num_samples + 1, 2), np.int32 if fits else np.int64)
    tokens = samples = 0  # that lie, and that start, before the documents at hand
    for first in range(0, len(document_order), _CHUNK):
        lengths = sizes[document_order[first : first + _CHUNK]]
        ends = np.cumsum(lengths, dtype=np.int64)
        ends += tokens
        starting = (ends + (sequence_length - 1)) // sequence_length  # before each end
        document = np.repeat(np.arange(len(lengths)), np.diff(starting, prepend=samples))
        part = slice(samples, int(starting[-1]))
        index[part, 0] = document + first
        starts = ends - lengths
        index[part, 1] = np.arange(part.start, part.stop) * sequence_length - starts[document]
        tokens, samples = int(ends[-1]), part.stop
    index[0] = 0
    return index


def _where(
    values: NDArray[Any], holds: Callable[[NDArray[Any]], NDArray[np.bool_]]
) -> NDArray[np.int64]:
    """Indices at which something holds, a chunk at a time, for arrays as long as a dataset."""
    found = [
        first + np.flatnonzero(holds(values[first : first + _CHUNK]))
        for first in range(0, len(values), _CHUNK)
    ]
    return np.concatenate(found) if found else np.empty(0, np.int64)
