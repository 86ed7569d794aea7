"""What training sees, worked out token by token in plain Python: slow, and easy to believe."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pythia_jax.configs import DataConfig, EvaluationConfig, RunConfig, TrainingConfig
from pythia_jax.data import IndexedDatasetWriter

Documents = Sequence[Sequence[int]]


class Seen(NamedTuple):
    """One token of a row, and where it comes from."""

    token: int
    source: int
    document: int
    offset: int


Sample = list[Seen]


def corpus(seed: int, documents: int, longest: int, vocabulary: int = 50) -> list[list[int]]:
    """Random documents, some of them empty or of one token, with no end-of-document token at all.

    Token 0, the end of a document in Pythia's vocabulary, stands nowhere.
    """
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, longest + 1, documents)
    return [rng.integers(1, vocabulary, size).tolist() for size in sizes]


def write(prefix: Path, documents: Documents, dtype: str = "uint16") -> str:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add(np.array(document, np.int64))
    return str(prefix)


def config(
    sequence_length: int = 7, steps: int = 9, batch_size: int = 4, seed: int = 3, **data: object
) -> RunConfig:
    settings: dict = {"sequence_length": sequence_length, "seed": seed, **data}
    return RunConfig(
        data=DataConfig(**settings),
        training=TrainingConfig(steps=steps, batch_size=batch_size),
        evaluation=EvaluationConfig(every=4, steps=2),
    )


def one_path(
    documents: Documents,
    wanted: int,
    sequence_length: int,
    seed: int,
    source: int = 0,
    chosen: Sequence[int] | None = None,
) -> list[Sample]:
    """All shuffled samples of one dataset. GPT-NeoX counts one less as the length, `served`."""
    chosen = range(len(documents)) if chosen is None else chosen
    tokens = sum(len(documents[number]) for number in chosen)
    epochs = 1
    while (epochs * tokens - 1) // sequence_length < wanted:
        epochs += 1
    order = np.array(list(chosen) * epochs, np.int32)
    rng = np.random.RandomState(seed)
    rng.shuffle(order)
    stream = [
        Seen(token, source, int(number), offset)
        for number in order
        for offset, token in enumerate(documents[number])
    ]
    count = (epochs * tokens - 1) // sequence_length
    shuffle = np.arange(count, dtype=np.uint32)
    rng.shuffle(shuffle)
    starts = [int(j) * sequence_length for j in shuffle]
    return [stream[start : start + sequence_length + 1] for start in starts]


def blended(members: Sequence[list[Sample]], weights: Sequence[float]) -> list[Sample]:
    """The samples of several datasets, dealt so that each keeps up with its weight.

    A number that a member has no sample for wraps at its length, one less than it has samples.
    """
    size, taken, samples = sum(len(member) - 1 for member in members), [0] * len(members), []
    shares = (np.array(weights) / np.sum(weights)).tolist()
    for i in range(size):
        errors = [share * max(i, 1) - count for share, count in zip(shares, taken, strict=True)]
        chosen = errors.index(max(errors))
        member, number = members[chosen], taken[chosen]
        samples.append(member[number if number < len(member) else number % (len(member) - 1)])
        taken[chosen] += 1
    return samples


def served(samples: list[Sample]) -> list[Sample]:
    """What one dataset gives when it is not blended: all but the last of its shuffled samples."""
    return samples[:-1]


def rows_of(samples: list[Sample], steps: int, batch_size: int) -> list[list[Sample]]:
    """Batches, `[step][row]`."""
    return [
        [samples[(step * batch_size + row) % len(samples)] for row in range(batch_size)]
        for step in range(steps)
    ]


@dataclass
class Case:
    """A run's configuration, and what its training split must be."""

    config: RunConfig
    documents: list[list[list[int]]]  # of every path
    batches: list[list[Sample]]


class Run(NamedTuple):
    """Consecutive tokens of one document in a row, as the columns of `Pieces`."""

    row: int
    column: int
    length: int
    source: int
    document: int
    offset: int


def runs(rows: Sequence[Sample]) -> list[Run]:
    """Which documents rows are made of, token by token."""
    found: list[Run] = []
    for number, row in enumerate(rows):
        for column, seen in enumerate(row):
            last = found[-1] if column else None
            place = (number, seen.source, seen.document, seen.offset)
            if last and place == (number, last.source, last.document, last.offset + last.length):
                found[-1] = last._replace(length=last.length + 1)
            else:
                found.append(Run(number, column, 1, *place[1:]))
    return found


def wanted(steps: int, batch_size: int, weight: float = 1.0) -> int:
    return math.ceil(steps * batch_size * weight * 1.005)


def case(kind: str, folder: Path) -> Case:
    """A corpus of one of the `KINDS`, written to a folder."""
    settings = config()
    length, seed = settings.data.sequence_length, settings.data.seed
    steps, batch = settings.training.steps, settings.training.batch_size
    if kind == "two paths":
        documents = [corpus(1, 30, 20), corpus(2, 25, 9)]
        paths = [write(folder / f"path{i}", d) for i, d in enumerate(documents)]
        weights = [0.7, 0.3]
        members = [
            one_path(d, wanted(steps, batch, weight), length, seed, source)
            for source, (d, weight) in enumerate(zip(documents, weights, strict=True))
        ]
        settings = config(train=tuple(paths), train_weights=tuple(weights))
        return Case(settings, documents, rows_of(blended(members, weights), steps, batch))
    number = {"one epoch": 60, "several epochs": 9, "split": 80}[kind]
    documents = corpus(number, number, 20)
    path = write(folder / "corpus", documents)
    if kind == "split":
        training = range(round(0.8 * number))  # documents, of the weights 80, 10, 10
        samples = one_path(documents, steps * batch, length, seed, chosen=training)
        settings = config(train=(path,), split="80,10,10")
    else:
        samples = one_path(documents, wanted(steps, batch), length, seed)
        settings = config(train=(path,))
    return Case(settings, [documents], rows_of(served(samples), steps, batch))


KINDS = ("one epoch", "several epochs", "two paths", "split")
