"""Batches as a pure function of the step: `batches(config)[step]` → int32 `[batch, seq + 1]`.

There is no iterator and no state. Any process may ask for any rows of any step, in any order, and
gets what a single process would have got. Row r of step t is sample t · batch_size + r of the
split's order, as GPT-NeoX's sequential sampler deals them over ranks and micro-steps.

Where samples come from is a `Samples`; `Batches` only counts. Source: GPT-NeoX v1.0,
megatron/data/data_utils.py and samplers.py.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pythia_jax.configs import RunConfig
from pythia_jax.data.indexed import IndexedDataset, open_dataset
from pythia_jax.data.sample_order import (
    SampleOrder,
    SplitSizes,
    build_sample_order,
    samples_to_draw,
)

SPLITS = {"train": "train", "validation": "valid", "test": "test"}  # ours → upstream's
_ROWS_AT_ONCE = 64  # keeps the positions of a gather inside the processor's cache


class Samples(Protocol):
    """A numbered set of samples, each `sequence_length` + 1 tokens."""

    def __len__(self) -> int: ...

    def read(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Tokens of the samples at `indices`, `[n, seq + 1]`, in the dtype of the data."""
        ...


@dataclass(frozen=True, eq=False)
class NeoxSamples:
    """The samples of one dataset in GPT-NeoX's order."""

    dataset: IndexedDataset
    order: SampleOrder

    def __len__(self) -> int:
        return len(self.order)

    def read(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Tokens of the samples served at `indices`, `[n, seq + 1]`; indices wrap at the length."""
        width = self.order.sequence_length + 1
        tokens = np.empty((len(indices), width), self.dataset.dtype)
        for first in range(0, len(indices), _ROWS_AT_ONCE):
            block = slice(first, first + _ROWS_AT_ONCE)
            starts, lengths = self._token_spans(indices[block])
            tokens[block] = self.dataset.read_spans(starts, lengths).reshape(-1, width)
        return tokens

    def _token_spans(
        self, indices: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """One span of the dataset for every document that a sample touches, sample by sample."""
        (first, first_token), (last, last_token) = (place.T for place in self.order.spans(indices))
        counts = last - first + 1
        last_span = np.cumsum(counts) - 1
        first_span = last_span - counts + 1
        positions = np.repeat(first - first_span, counts) + np.arange(counts.sum())
        documents = self.order.document_order[positions]
        starts = self.dataset.pointers[documents] // self.dataset.dtype.itemsize
        lengths = self.dataset.sizes[documents].astype(np.int64)
        lengths[last_span] = last_token + 1
        lengths[first_span] -= first_token
        starts[first_span] += first_token
        return starts, lengths


@dataclass(frozen=True, eq=False)
class Batches:
    """The batches of one split: `batches[step]`, `len(batches)`, `batches.read(step, rows)`.

    Steps and rows count from 0. Safe to share between threads and to pickle.
    """

    name: str  # as upstream names the split's files: train_0, valid_0, test_0
    source: str  # where the tokens lie, for messages
    samples: Samples
    num_batches: int
    batch_size: int
    vocab_size: int | None = None

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, step: int) -> NDArray[np.int32]:
        return self.read(step, slice(None))

    def __iter__(self) -> Iterator[NDArray[np.int32]]:
        return map(self.__getitem__, range(len(self)))

    def read(self, step: int, rows: slice | ArrayLike) -> NDArray[np.int32]:
        """Only these rows of a step, `[n, seq + 1]`, in the order asked for.

        Args:
            step: from 0 to `len(self)` − 1.
            rows: a slice, or the numbers of rows of the batch.

        Raises:
            IndexError: the split has no such step, or the batch no such row.
            ValueError: the data holds an id that the model's vocabulary does not.
        """
        step = operator.index(step)
        if not 0 <= step < len(self):
            raise IndexError(
                f"{self.name}: step {step} asked for, but it has {len(self)} steps, from 0 on"
            )
        tokens = self.samples.read(step * self.batch_size + self._row_numbers(rows))
        self._check_ids(tokens, step)
        return tokens.astype(np.int32)

    def _row_numbers(self, rows: slice | ArrayLike) -> NDArray[np.int64]:
        numbers = np.arange(self.batch_size, dtype=np.int64)
        if isinstance(rows, slice):
            return numbers[rows]
        rows = np.asarray(rows)
        if rows.size == 0:
            return numbers[:0]
        try:
            return np.ravel(numbers[rows])
        except IndexError as error:
            raise IndexError(
                f"{self.name}: rows {rows} asked for, but a batch has rows 0 to "
                f"{self.batch_size - 1} ({error})"
            ) from None

    def _check_ids(self, tokens: NDArray[Any], step: int) -> None:
        # Out of range, a gather on an accelerator clamps or wraps and trains on something else.
        limit = self.vocab_size or 2**31
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < limit:
            wrong = int(tokens.min()) if tokens.min() < 0 else int(tokens.max())
            raise ValueError(
                f"{self.source}: token id {wrong} in step {step} of {self.name}, but ids go from "
                f"0 to {limit - 1}; the data and model.vocab_size are not of one tokenizer"
            )


def batches(config: RunConfig, split: str = "train") -> Batches:
    """The batches of a run's split, in GPT-NeoX v1.0's order.

    Every split has an order of its own, from its own number of samples and the one `data.seed`:
    where both take one epoch of one path, validation batch k is training batch k, as it was for
    Pythia on the Pile.

    Args:
        config: a run; its sections data, training and evaluation, and the vocabulary of its model
            if it has one.
        split: `train` (training.steps batches), `validation` (evaluation.steps batches every
            evaluation.every steps and once more at the end) or `test` (evaluation.steps batches).

    Raises:
        ValueError: the split is unknown or has no data, or the data cannot serve this config.
        FileNotFoundError: the data is not where the config says.
    """
    prefix = _only_path(config, split)
    dataset = open_dataset(prefix)
    vocab_size = config.model.vocab_size if config.model is not None else None
    _check_dtype(dataset, vocab_size)
    training, evaluation = config.training, config.evaluation
    sizes = SplitSizes.of_run(training.steps, evaluation.every, evaluation.steps)
    num_batches = getattr(sizes, split)
    try:
        order = build_sample_order(
            dataset.sizes,
            samples_to_draw(num_batches, training.batch_size),
            config.data.sequence_length,
            config.data.seed,
        )
    except ValueError as error:
        raise ValueError(f"{prefix} (data.{split}): {error}") from None
    return Batches(
        name=f"{SPLITS[split]}_0",
        source=str(prefix),
        samples=NeoxSamples(dataset, order),
        num_batches=num_batches,
        batch_size=training.batch_size,
        vocab_size=vocab_size,
    )


def _only_path(config: RunConfig, split: str) -> str:
    """The one prefix that a split reads; what is not there yet is refused."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; the splits are {', '.join(SPLITS)}")
    data = config.data
    if data.order != "neox":
        raise ValueError(f"data.order: {data.order!r} is not supported yet; use 'neox'")
    if data.split is not None:
        raise ValueError(
            f"data.split: {data.split!r} is not supported yet; name data.validation and data.test"
        )
    paths = getattr(data, split)
    if not paths:
        raise ValueError(f"data.{split} names no dataset; give it the prefix of a .bin/.idx pair")
    if len(paths) > 1:
        raise ValueError(
            f"data.{split}: {len(paths)} paths given; blending is not supported yet, give one"
        )
    return paths[0]


def _check_dtype(dataset: IndexedDataset, vocab_size: int | None) -> None:
    """Refuses data that cannot be token ids of the model, from its dtype alone."""
    if dataset.dtype.kind not in "iu":
        raise ValueError(f"{dataset.prefix}: holds {dataset.dtype.name}, not token ids")
    if vocab_size is not None and np.iinfo(dataset.dtype).max < vocab_size - 1:
        raise ValueError(
            f"{dataset.prefix}: its {dataset.dtype.name} cannot hold every id of "
            f"model.vocab_size {vocab_size}; tokenize for this vocabulary"
        )
