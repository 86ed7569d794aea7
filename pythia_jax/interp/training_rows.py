"""The training rows that an index, a dump or factors are of: which they are, and whose data's.

All that goes over the exact rows of some steps asks here, so that the same steps and the same
sample are the same rows everywhere.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import yaml
from jaxtyping import Int
from numpy.typing import NDArray

from pythia_jax import configs, sharding
from pythia_jax.configs import ModelConfig, RunConfig
from pythia_jax.data import Batches
from pythia_jax.data.storage import is_url
from pythia_jax.training.provenance import data_identity

TOKENS = 2**14
"""Tokens that a device computes with at once, if nobody says how many rows; on a CPU an eighth."""
_ROWS_HASHED = 64
_DIGITS = 16  # of a digest, in a label
_LABEL = re.compile(r"(\d+):(\d+):[0-9a-f]+")


def check(
    config: RunConfig,
    served: Batches,
    model: ModelConfig,
    start: int,
    stop: int,
    sample: int | None = None,
) -> None:
    """Refuse, with ValueError, steps that the run has not, a sample of nothing, and rows that are
    longer than the model's positions."""
    if not 0 <= start < stop <= len(served):
        raise ValueError(
            f"steps {start}:{stop} (half-open) are not steps of {served.name}, which has "
            f"{len(served):,}, from 0 on"
        )
    if sample is not None and sample < 1:
        raise ValueError(f"rows {sample}: must be at least 1")
    seq, positions = config.data.sequence_length, model.max_position_embeddings
    if seq > positions:
        raise ValueError(
            f"data.sequence_length {seq}: the model has {positions} positions; give the config of "
            "the run that it is of"
        )


def sampled(
    steps: range, batch_size: int, sample: int | None = None
) -> Iterator[tuple[int, Int[NDArray, " rows"]]]:
    """Each step with the slots of its rows that are wanted, in order.

    sample: so many rows, evenly spread over the steps; None is all.
    """
    everything = len(steps) * batch_size
    count = everything if sample is None else min(sample, everything)
    numbers = np.arange(count) * everything // count
    ends = np.searchsorted(numbers, np.arange(1, len(steps)) * batch_size)
    for step, of_step in zip(steps, np.split(numbers, ends), strict=True):
        yield step, of_step % batch_size


def together(asked: int | None, rows: int, seq: int) -> int:
    """How many of `rows` rows are computed at once: those asked for, or as many as go by tokens.

    Over all devices of the mesh around us. Raises ValueError for what it cannot cut.
    """
    parts = sharding.parts_of_rows()
    if asked is not None and (asked < 1 or asked % parts):
        raise ValueError(
            f"{asked} rows together (batch): they are cut over {parts} devices; give a multiple "
            "of that"
        )
    tokens = TOKENS // 8 if jax.default_backend() == "cpu" else TOKENS
    return asked or min(max(1, tokens // seq), -(-rows // parts)) * parts


def identity(
    config: RunConfig, served: Batches, start: int, stop: int, sample: int | None
) -> dict[str, Any]:
    """What tells, beside a result, which rows it is of, wherever their data lies."""
    found = data_identity(_train_only(config))
    return {
        "data": {"train": found["train"], "transform": found.get("transform")},
        "rows": digest(served, start, stop),
        "steps": [start, stop],
        "sample": sample,
    }


def digest(served: Batches, start: int, stop: int) -> str:
    """SHA-256 of what the batches of steps are: their number, and 64 rows from the first on."""
    size = served.batch_size
    some = np.unique(np.linspace(start * size, stop * size - 1, _ROWS_HASHED, dtype=np.int64))
    found = hashlib.sha256(f"{start} {stop} {size} ".encode())
    for step, row in zip(*np.divmod(some, size), strict=True):
        found.update(served.read(int(step), [int(row)]).astype("<i4").tobytes())
    return found.hexdigest()


def label(rows: str, start: int, stop: int) -> str:
    """A digest of rows in a few letters, for a column of a table: `2990:3000:9f86d081884c7d65`."""
    return f"{start}:{stop}:{rows[:_DIGITS]}"


def has_label(served: Batches, told: str) -> bool:
    """Whether the rows of a run are those of a label. Raises ValueError for what is none."""
    match = _LABEL.fullmatch(told)
    if match is None:
        raise ValueError(f"{told!r} does not tell of which data the rows are")
    start, stop = int(match[1]), int(match[2])
    return start < stop <= len(served) and told == label(digest(served, start, stop), start, stop)


def run_file(config: RunConfig) -> bytes:
    """The run, to be kept beside a result, by which its training rows are found again."""
    return yaml.safe_dump(configs.to_dict(_train_only(config)), sort_keys=False).encode()


def _train_only(config: RunConfig) -> RunConfig:
    """The run without the splits that are not read here, its paths good from anywhere."""

    def placed(path: str) -> str:
        return path if is_url(path) else os.path.abspath(path)

    data = config.data
    if data.split is None:
        data = dataclasses.replace(
            data, validation=(), validation_weights=(), test=(), test_weights=()
        )
    documents = None if data.documents is None else placed(data.documents)
    data = dataclasses.replace(data, train=tuple(map(placed, data.train)), documents=documents)
    return dataclasses.replace(config, data=data)
