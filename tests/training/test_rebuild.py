"""Adam's moments for weights that came without: zero, or from the gradients of the last batches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import random_params
from small_runs import Make, assert_same_bits

from pythia_jax import data
from pythia_jax.configs import RunConfig
from pythia_jax.model.loss import loss
from pythia_jax.sharding import make_mesh
from pythia_jax.training.rebuild import rebuilt_state, zero_state
from pythia_jax.training.step import init_state, jitted_train_step
from pythia_jax.training.telemetry import NonFiniteError

STEP, LAST = 9, 4


fresh = jax.jit(init_state, static_argnums=0)


def params_of(config: RunConfig) -> Any:
    assert config.model is not None
    return random_params(config.model)


def copied(params: Any) -> Any:
    return jax.tree.map(jnp.copy, params)


def made(config: RunConfig, params: Any, how: Any, *arguments: Any, **keywords: Any) -> Any:
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        return how(copied(params), *arguments, config, mesh, **keywords)


def rebuilt(config: RunConfig, params: Any, step: int = STEP, last: int = LAST) -> Any:
    return made(config, params, rebuilt_state, step, last, show_progress=False)


def adam(state: Any) -> Any:
    return state.opt_state[1]


def reference(config: RunConfig, params: Any, step: int, last: int) -> tuple[list, list]:
    """m and v by NumPy, in float64, from gradients that jax's own `grad` gives."""
    model, (b1, b2) = config.model, config.optimizer.betas
    assert model is not None
    m: list = [0.0] * len(jax.tree.leaves(params))
    v = list(m)
    gradient = jax.jit(jax.grad(lambda p, tokens: loss(p, tokens, model, runtime=config.runtime)))
    for age in range(last):
        tokens = jnp.asarray(data.batches(config)[step - 1 - age])
        leaves = [np.asarray(g, np.float64) for g in jax.tree.leaves(gradient(params, tokens))]
        norm = np.sqrt(sum((g**2).sum() for g in leaves))
        clipped = [g / max(1.0, (norm + 1e-6) / config.optimizer.gradient_clip) for g in leaves]
        m = [x + (1 - b1) * b1**age * g for x, g in zip(m, clipped, strict=True)]
        v = [x + (1 - b2) * b2**age * g**2 for x, g in zip(v, clipped, strict=True)]
    grown = [(1 - b**step) / (1 - b**last) for b in (b1, b2)]
    return [x * grown[0] for x in m], [x * grown[1] for x in v]


@pytest.mark.parametrize(("last", "clip"), [(1, 1e6), (LAST, 0.3), (STEP, 0.3)])
def test_rebuilt_moments_are_those_of_a_numpy_loop(make_config: Make, last: int, clip: float):
    config = make_config(optimizer={"gradient_clip": clip})
    params = params_of(config)
    state = rebuilt(config, params, last=last)
    m, v = reference(config, params, STEP, last)
    for ours, theirs in ((adam(state).mu, m), (adam(state).nu, v)):
        for x, y in zip(jax.tree.leaves(ours), theirs, strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-5 * np.abs(y).max())
    assert_same_bits(state.params, params)
    assert (int(state.step), int(state.updates), int(adam(state).count)) == (STEP, STEP, STEP + 1)


def test_a_run_whose_weights_never_moved_is_rebuilt_as_it_was(make_config: Make) -> None:
    """All there is to assume is that weights stood still; where they did, the counters are right
    too, those of a run that was restarted half-way as well."""
    optimizer = {"peak_learning_rate": 1e-30, "min_learning_rate": 0.0, "restarts": [6]}
    config = make_config(optimizer=optimizer)
    state = fresh(config)
    for step in range(STEP):
        state, _ = jitted_train_step(state, jnp.asarray(data.batches(config)[step]), config=config)
    again = rebuilt(config, state.params, last=STEP)
    assert (int(again.step), int(again.updates)) == (int(state.step), int(state.updates))
    assert int(adam(again).count) == int(adam(state).count) == 1 + STEP - 6
    for ours, theirs in ((adam(again).mu, adam(state).mu), (adam(again).nu, adam(state).nu)):
        for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6 * float(jnp.abs(y).max()))


def test_zero_moments_are_a_fresh_optimizer_further_on(make_config: Make) -> None:
    config = make_config(training={"precision": "float16"})
    params, begun = params_of(config), fresh(config)
    state = made(config, params, zero_state, STEP)
    assert_same_bits(adam(state), adam(begun))
    assert_same_bits(state.params, params)
    assert (int(state.step), int(state.updates), bool(state.halted)) == (STEP, STEP, False)
    # It grows 1000 steps from here, as it would from step 0.
    assert int(state.loss_scale.last_overflow) == STEP - 1
    assert float(state.loss_scale.scale) == float(begun.loss_scale.scale)


def test_float16_rebuilds_what_float32_does(make_config: Make) -> None:
    params = params_of(make_config())
    half, single = (
        rebuilt(make_config(training={"precision": precision}), params)
        for precision in ("float16", "float32")
    )
    for x, y in zip(jax.tree.leaves(adam(half).nu), jax.tree.leaves(adam(single).nu), strict=True):
        np.testing.assert_allclose(np.sqrt(x), np.sqrt(y), atol=0.02 * float(jnp.sqrt(y).max()))


def test_more_batches_than_there_were_are_cut_to_those_and_told(make_config: Make, caplog):
    config = make_config()
    params = params_of(config)
    state = rebuilt(config, params, step=2, last=60)
    assert "rebuilt from 2 batches" in caplog.text
    assert_same_bits(state, rebuilt(config, params, step=2, last=2))
    none = rebuilt(config, params, step=0, last=60)
    assert_same_bits(none, made(config, params, zero_state, 0))


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_weights_that_give_no_number_are_told_with_the_batch(make_config: Make, precision: str):
    config = make_config(training={"precision": precision})
    params: Any = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params_of(config))
    with pytest.raises(NonFiniteError, match=rf"batch {STEP - LAST} is no number") as caught:
        rebuilt(config, params)
    assert caught.value.step == STEP - LAST
