"""A small run over random documents, for tests that go on with one."""

from pathlib import Path
from typing import Any

import numpy as np

from pythia_jax import configs
from pythia_jax.configs import RunConfig
from pythia_jax.data import IndexedDatasetWriter

SEQ, BATCH = 16, 4


def run_config(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    """Of a run in `folder`/run of 8 steps, its data made if need be."""
    corpus = folder / "corpus"
    if not corpus.with_suffix(".idx").exists():
        rng = np.random.default_rng(0)
        with IndexedDatasetWriter(corpus, np.dtype(np.uint16)) as writer:
            for _ in range(40):
                size = rng.integers(5, 60)
                # Low ids are frequent, so that there is something to learn in a few steps.
                writer.add((61 * rng.random(size) ** 4).astype(np.uint16))
    values: dict[str, Any] = {
        "name": "run",
        "model": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 61,
            "max_position_embeddings": SEQ,
        },
        "data": {"train": [str(corpus)], "sequence_length": SEQ},
        "optimizer": {"warmup_fraction": 0.1, "peak_learning_rate": 1e-2},
        "training": {"steps": 8, "batch_size": BATCH, "precision": "float32", "remat": "none"},
        "checkpoint": {"directory": str(folder / "run"), "every": 3, "extra_steps": [4]},
        "logging": {"every": 1},
    }
    for section, changes in sections.items():
        values[section] = {**values[section], **changes}
    return configs.from_dict(values)
