"""Every mesh of eight devices computes what one device does."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from small_runs import Make

from pythia_jax import data, sharding
from pythia_jax.configs import MeshConfig, ModelConfig, RunConfig, Runtime
from pythia_jax.model import parameters
from pythia_jax.model.gptneox import forward
from pythia_jax.model.loss import loss, token_losses
from pythia_jax.training.feed import GlobalBatches
from pythia_jax.training.step import jitted_train_step, state_shardings
from pythia_jax.training.trainer import fresh_state, held_out_loss

MODEL: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 8, "vocab_size": 104}
MESHES = [(8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2)]
OTHERS = [(4, 2, 1), (2, 4, 1), (4, 1, 2), (1, 4, 2), (2, 1, 4), (1, 1, 8)]
ALL = [*MESHES, *(pytest.param(shape, marks=pytest.mark.slow) for shape in OTHERS)]
STEPS = 20


def mesh_of(shape: tuple[int, ...], slices: int = 1) -> Mesh:
    data, fsdp, tensor = shape
    config = MeshConfig(data=data, fsdp=fsdp, tensor=tensor, slices=slices)
    return sharding.make_mesh(config, jax.devices()[: slices * data * fsdp * tensor])


def run(config: RunConfig, mesh: Mesh) -> tuple[list[float], Any]:
    """Losses of 20 steps, and the state after them."""
    batches = GlobalBatches(data.batches(config), mesh)
    losses = []
    with jax.set_mesh(mesh):
        state = fresh_state(config, mesh)
        for step in range(STEPS):
            state, metrics = jitted_train_step(state, batches[step], config=config)
            losses.append(float(metrics["loss"]))
        losses.append(held_out_loss(state.params, config, batches, STEPS))
    return losses, state


@pytest.fixture
def config(make_config: Make) -> RunConfig:
    return make_config(
        model=MODEL,
        training={"batch_size": 16, "gradient_accumulation": 2, "remat": "full"},
    )


ONE_DEVICE: list[tuple[list[float], Any]] = []


@pytest.fixture
def one_device(config: RunConfig) -> tuple[list[float], Any]:
    """Computed once: the data lies elsewhere in each test, but is the same."""
    if not ONE_DEVICE:
        ONE_DEVICE.append(run(config, mesh_of((1, 1, 1))))
    return ONE_DEVICE[0]


@pytest.mark.parametrize("shape", ALL)
def test_twenty_steps_are_those_of_one_device(
    shape: tuple[int, ...], config: RunConfig, one_device: tuple[list[float], Any]
) -> None:
    losses, state = run(config, mesh_of(shape))
    np.testing.assert_allclose(losses, one_device[0], rtol=0, atol=1e-5)
    # No array strays from its place over the steps.
    places = state_shardings(config, mesh_of(shape))
    jax.tree.map(lambda x, place: _same_place(x, place), state, places)


def _same_place(x: jax.Array, place: jax.sharding.Sharding) -> None:
    assert x.sharding.is_equivalent_to(place, x.ndim)


def test_slices_are_a_mesh_axis_like_the_others(
    config: RunConfig, one_device: tuple[list[float], Any]
) -> None:
    losses, _ = run(config, mesh_of((1, 2, 2), slices=2))
    np.testing.assert_allclose(losses, one_device[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [*MESHES, *OTHERS])
def test_batches_are_the_same_to_the_bit(shape: tuple[int, ...], config: RunConfig) -> None:
    batches = data.batches(config)
    placed = GlobalBatches(batches, mesh_of(shape))
    for step in (0, 7):
        np.testing.assert_array_equal(np.asarray(placed[step]), batches[step])


@pytest.mark.parametrize("shape", [(1, 4, 2), pytest.param((8, 1, 1), marks=pytest.mark.slow)])
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize("form", ["fused", "remat"])
def test_logits_and_gradients_are_those_of_one_device(
    shape: tuple[int, ...], dtype: str, limit: float, form: Any
) -> None:
    model = ModelConfig(num_hidden_layers=2, max_position_embeddings=64, **MODEL)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (8, 50)).astype(np.int32)
    weights = np.linspace(0.5, 2.0, 8)
    runtime = Runtime(loss=form, loss_chunk=16)
    with jax.enable_x64(True):
        drawn = parameters.init_parameters(model, jax.random.key(0), jnp.float64)
        params = jax.tree.map(lambda p: (p + 0.01).astype(dtype), drawn)

        def everything(params: Any, tokens: jax.Array, weights: jax.Array) -> Any:
            of = partial(loss, config=model, runtime=runtime)
            value, gradients = jax.value_and_grad(of)(params, tokens, weights=weights)
            each = token_losses(params, tokens, model, runtime=runtime)
            return gradients, value, each, forward(params, tokens[:, :-1], model, runtime=runtime)

        want = jax.device_get(jax.jit(everything)(params, tokens, weights))
        mesh = mesh_of(shape)
        with jax.set_mesh(mesh):
            cut = jax.device_put(params, parameters.shardings(mesh))
            rows = jax.device_put(tokens, sharding.sharding(mesh, ("batch", "seq")))
            found = jax.device_get(jax.jit(everything)(cut, rows, weights))

    def compare(a: np.ndarray, b: np.ndarray) -> None:
        assert a.dtype == b.dtype == np.dtype(dtype)
        assert np.linalg.norm(a - b) <= limit * np.linalg.norm(a)

    jax.tree.map(compare, want, found)


def test_no_device_ever_holds_the_whole_model(config: RunConfig) -> None:
    mesh = mesh_of((1, 4, 2))
    with jax.set_mesh(mesh):
        state = fresh_state(config, mesh)
    kernels = [x for p, x in parameters.items(state.params) if p.path.endswith(("kernel", "ing"))]
    assert all(x.addressable_shards[0].data.size * 8 == x.size for x in kernels)
    moments = jax.tree.leaves(state.opt_state)
    assert sum(x.addressable_shards[0].data.size for x in moments) < 0.2 * sum(
        x.size for x in moments
    )


def test_fresh_parameters_do_not_depend_on_the_mesh(config: RunConfig) -> None:
    states = []
    for shape in ((1, 1, 1), (1, 8, 1), (2, 2, 2)):
        with jax.set_mesh(mesh_of(shape)):
            states.append(jax.device_get(fresh_state(config, mesh_of(shape)).params))
    for state in states[1:]:
        jax.tree.map(np.testing.assert_array_equal, states[0], state)


def test_accumulation_changes_nothing_but_rounding(
    config: RunConfig, one_device: tuple[list[float], Any]
) -> None:
    whole = dataclasses.replace(
        config, training=dataclasses.replace(config.training, gradient_accumulation=1)
    )
    losses, _ = run(whole, mesh_of((2, 2, 2)))
    np.testing.assert_allclose(losses, one_device[0], rtol=0, atol=1e-5)
