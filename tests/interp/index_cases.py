"""Small indexes: the model of the peers' goldens, over rows that pack several documents."""

from pathlib import Path
from typing import Any

import numpy as np
from peers import case, remake

import pythia_jax as pj
from pythia_jax import configs
from pythia_jax.configs import RunConfig
from pythia_jax.data import IndexedDatasetWriter
from pythia_jax.interp.build import build_index
from pythia_jax.interp.index import Index

CONFIG = remake.CONFIG
BATCH, STEPS = 4, 8
START, STOP = 2, 5
"""Steps of the indexes of most tests."""
DOCUMENTS = [1, 2, 9, 30, 5, 1, 12, 60, 3, 25] * 20
"""Tokens of each; many are shorter than a row, some longer."""


def model() -> pj.Model:
    return remake.model()


def write_corpus(prefix: Path, sizes: list[int], tokens: np.ndarray | None = None) -> None:
    """Documents of these sizes, of noise or of what is given."""
    stream = case.tokens("corpus", 1, sum(sizes))[0] if tokens is None else tokens
    with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
        for document in np.split(stream, np.cumsum(sizes)[:-1].tolist()):
            writer.add(document.astype(np.uint16))


def run(prefix: Path, data: dict[str, Any] | None = None, **training: Any) -> RunConfig:
    return configs.from_dict(
        {
            "name": "small",
            "model": {
                "hidden_size": case.HIDDEN,
                "num_hidden_layers": case.LAYERS,
                "num_attention_heads": case.HEADS,
                "vocab_size": case.VOCAB,
                "max_position_embeddings": case.POSITIONS,
            },
            "data": {"train": [str(prefix)], "sequence_length": case.SEQ, **(data or {})},
            "training": {"steps": STEPS, "batch_size": BATCH, **training},
        }
    )


def packed(folder: Path) -> RunConfig:
    """A run whose rows are made of several documents each."""
    write_corpus(folder / "corpus", DOCUMENTS)
    return run(folder / "corpus")


def golden_rows(folder: Path) -> RunConfig:
    """A run of one step, on the rows of Bergson's goldens as they lie."""
    write_corpus(folder / "rows", [case.SEQ + 1] * 4, case.tokens("rows", 4).ravel())
    return run(folder / "rows", {"order": "preshuffled"}, steps=1)


def build(config: RunConfig, out: Path, **how: Any) -> Index:
    given = {"batch": BATCH, "show_progress": False, **how}
    return build_index(given.pop("model", None) or model(), config, START, STOP, out, **given)
