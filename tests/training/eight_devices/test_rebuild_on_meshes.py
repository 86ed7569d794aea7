"""Moments are rebuilt on a mesh as on one device, and lie there as those of training do."""

import jax
import numpy as np
import pytest
from small_runs import Make

from pythia_jax import sharding
from pythia_jax.configs import MeshConfig
from pythia_jax.training.rebuild import rebuilt_state
from pythia_jax.training.step import state_shardings
from pythia_jax.training.trainer import fresh_state


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
def test_every_mesh_rebuilds_the_moments_of_one_device(make_config: Make, shape: tuple) -> None:
    model = {"hidden_size": 64, "num_attention_heads": 8, "vocab_size": 104}
    config = make_config(model=model, training={"batch_size": 16})
    states = []
    for sizes in (shape, (1, 1, 1)):
        mesh_config = MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
        mesh = sharding.make_mesh(mesh_config, jax.devices()[: int(np.prod(sizes))])
        with jax.set_mesh(mesh):
            params = fresh_state(config, mesh).params
            state = rebuilt_state(params, 6, 3, config, mesh, show_progress=False)
        for array, place in zip(
            jax.tree.leaves(state), jax.tree.leaves(state_shardings(config, mesh)), strict=True
        ):
            assert array.sharding.is_equivalent_to(place, array.ndim)
        states.append(state)
    for x, y in zip(*map(jax.tree.leaves, states), strict=True):
        y = np.asarray(y)
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * np.abs(y).max())
