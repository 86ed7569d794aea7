"""A small run: real data on disk, a model of two layers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pythia_jax import configs
from pythia_jax.configs import RunConfig
from pythia_jax.data import IndexedDatasetWriter


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., RunConfig]:
    """`make_config(name, section={key: value})`: a run config in a folder of that name."""
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(tmp_path / "corpus", np.dtype(np.uint16)) as writer:
        for _ in range(60):
            # Low ids are frequent, so that there is something to learn in a few steps.
            size = rng.integers(5, 120)
            writer.add((97 * rng.random(size) ** 4).astype(np.uint16))

    def make(name: str = "run", **sections: dict) -> RunConfig:
        values = {
            "name": name,
            "model": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "vocab_size": 97,
                "max_position_embeddings": 32,
            },
            "data": {
                "train": [str(tmp_path / "corpus")],
                "validation": [str(tmp_path / "corpus")],
                "sequence_length": 32,
            },
            "optimizer": {"warmup_fraction": 0.1, "peak_learning_rate": 1e-2},
            "training": {"steps": 20, "batch_size": 4, "precision": "float32", "remat": "none"},
            "checkpoint": {
                "directory": str(tmp_path / name),
                "every": 5,
                "extra_steps": [0, 1, 2, 4],
            },
            "evaluation": {"every": 8, "steps": 2},
            "logging": {"every": 1},
        }
        for section, changes in sections.items():
            values[section] = {**values[section], **changes}  # type: ignore[dict-item]
        return configs.from_dict(values)

    return make
