"""Batches read ahead."""

import numpy as np
from small_runs import Make

from pythia_jax import data
from pythia_jax.configs import MeshConfig
from pythia_jax.sharding import make_mesh
from pythia_jax.training.feed import GlobalBatches, read_ahead


def test_batches_read_ahead_are_the_batches(make_config: Make) -> None:
    batches = data.batches(make_config())
    placed = GlobalBatches(batches, make_mesh(MeshConfig()))
    for step, tokens in zip(range(6, 20), read_ahead(placed, 6, 20), strict=True):
        np.testing.assert_array_equal(np.asarray(tokens), batches[step])
    assert list(read_ahead(placed, 20, 20)) == []
