"""float16's loss scale: the sequence of GPT-NeoX, and what a step does with it."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import Make, assert_same_bits

from pythia_jax import data
from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.model import parameters
from pythia_jax.model.loss import loss
from pythia_jax.training import loss_scale
from pythia_jax.training.step import init_state, jitted_train_step


class DynamicLossScaler:
    """DeeperSpeed's bookkeeping, said again in plain Python from its description."""

    def __init__(self) -> None:
        self.scale, self.hysteresis, self.last, self.iteration = 4096.0, 2, -1, 0

    def update(self, overflow: bool) -> None:
        if overflow:
            if self.hysteresis == 1:
                if self.scale == 1:
                    raise OverflowError
                self.scale = max(self.scale / 2, 1)
            else:
                self.hysteresis -= 1
            self.last = self.iteration
        elif (self.iteration - self.last) % 1000 == 0:
            self.hysteresis = 2
            self.scale *= 2
        self.iteration += 1


def scales(overflows: np.ndarray) -> np.ndarray:
    """The scale after each step, by our function in one scan."""

    def step(state: tuple, overflow: jax.Array) -> tuple:
        scale, number = state
        scale = loss_scale.after(scale, overflow, number)
        return (scale, number + 1), (scale.scale, scale.hysteresis)

    start = (loss_scale.initial(), jnp.int32(0))
    return np.asarray(jax.lax.scan(step, start, jnp.asarray(overflows))[1][0])


@pytest.mark.parametrize("rate", [0.0, 0.0005, 0.002, 0.01])
def test_scale_follows_upstream_over_made_up_overflows(rate: float) -> None:
    overflows = np.random.default_rng(7).random(20_000) < rate
    upstream, expected = DynamicLossScaler(), []
    try:
        for overflow in overflows:
            upstream.update(bool(overflow))
            expected.append(upstream.scale)
    except OverflowError:
        pass
    np.testing.assert_array_equal(scales(overflows)[: len(expected)], expected)
    assert len(expected) > 1000


def test_scale_doubles_first_at_the_thousandth_step_and_halves_at_the_second_overflow() -> None:
    calm = scales(np.zeros(2001, bool))
    assert list(calm[[0, 998, 999, 1998, 1999, 2000]]) == [4096, 4096, 8192, 8192, 16384, 16384]
    rough = np.zeros(1010, bool)
    rough[[3, 5, 6]] = True
    found = scales(rough)
    assert list(found[[2, 3, 4, 5, 6, 7]]) == [4096, 4096, 4096, 2048, 1024, 1024]
    # A thousand steps after the last overflow it grows, and one overflow is forgiven again.
    assert list(found[[1005, 1006]]) == [1024, 2048]


def test_an_overflow_at_scale_one_exhausts_it() -> None:
    state = loss_scale.LossScale(jnp.float32(1), jnp.int32(1), jnp.int32(0))
    assert loss_scale.exhausted(state, jnp.asarray(True))
    assert not loss_scale.exhausted(state, jnp.asarray(False))
    assert not loss_scale.exhausted(state.replace(hysteresis=2), jnp.asarray(True))  # type: ignore
    assert not loss_scale.exhausted(loss_scale.initial(), jnp.asarray(True))


def test_an_overflow_takes_its_batch_and_nothing_else(make_config: Make) -> None:
    config = make_config(training={"precision": "float16"})
    batches, state = data.batches(config), init_state(config)
    state, first = jitted_train_step(state, jnp.asarray(batches[0]), config=config)
    assert first["updated"] and first["loss_scale"] == 4096
    # A scale so large that float16 overflows.
    large = state.loss_scale.replace(scale=jnp.float32(2.0**40), hysteresis=jnp.int32(1))
    before = jax.device_get(state)
    state = state.replace(loss_scale=large)
    state, second = jitted_train_step(state, jnp.asarray(batches[1]), config=config)
    assert not second["updated"] and not second["halted"] and second["loss_scale"] == 2.0**40
    assert state.loss_scale.scale == 2.0**39 and state.loss_scale.last_overflow == 1
    assert state.step == 2 and state.updates == 1
    assert_same_bits(state.params, before.params)
    assert_same_bits(state.opt_state, before.opt_state)
    # At scale 1 it is the end, as upstream raises there.
    large = state.loss_scale.replace(scale=jnp.float32(1), hysteresis=jnp.int32(1))
    nan = jax.tree.map(lambda p: p * jnp.nan, state.params)
    hopeless = state.replace(loss_scale=large, params=nan)
    _, third = jitted_train_step(hopeless, jnp.asarray(batches[2]), config=config)
    assert third["halted"] and not third["updated"]


def test_where_the_scale_doubles_the_gradient_counts_half(make_config: Make) -> None:
    config = make_config(training={"precision": "float16"}, optimizer={"warmup_fraction": 0.0})
    tokens = jnp.asarray(data.batches(config)[0])
    norms = []
    for last in (0, -1):  # the thousandth step after the last overflow, or not yet
        state = init_state(config).replace(step=jnp.int32(999))  # type: ignore[attr-defined]
        scale = state.loss_scale.replace(last_overflow=jnp.int32(last))
        _, metrics = jitted_train_step(state.replace(loss_scale=scale), tokens, config=config)
        norms.append(float(metrics["grad_norm"]))
    assert norms[1] == norms[0] / 2


def test_float16_gradients_are_float32s_to_its_precision_at_a_real_batch() -> None:
    """65,536 tokens: divided by their number first, the gradient of the loss would flush to 0."""
    model = ModelConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=512,
        max_position_embeddings=2048,
    )
    params = parameters.init_parameters(model, jax.random.key(0))
    params = {**params, "embed_out": jax.tree.map(lambda p: 3 * p, params["embed_out"])}
    tokens = np.random.default_rng(0).integers(0, 512, (32, 2049)).astype(np.int32)

    @partial(jax.jit, static_argnames="runtime")
    def gradients(params: dict, scale: jax.Array, runtime: Runtime) -> dict:
        of = partial(loss, config=model, weights=jnp.full(32, scale), runtime=runtime)
        return jax.tree.map(lambda g: g / scale, jax.grad(of)(params, tokens))

    exact = gradients(params, jnp.float32(1), Runtime(dtype="float32"))
    half = gradients(params, jnp.float32(4096), Runtime(dtype="float16"))
    naive = gradients(params, jnp.float32(1), Runtime(dtype="float16"))

    def error(found: dict, path: str) -> float:
        a, b = (dict(_flat(tree))[path] for tree in (exact, found))
        return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a))

    for path in ("embed_out/kernel", "layers/mlp/dense_4h_to_h/kernel", "embed_in/embedding"):
        assert error(half, path) < 5e-3, path
    assert error(naive, "embed_in/embedding") > 0.05  # what the scale is for


def _flat(params: dict) -> list:
    return [(p.path, value) for p, value in parameters.items(params)]


def test_float16_trains(make_config: Make) -> None:
    config = make_config(training={"precision": "float16"})
    wide = dataclasses.replace(
        config, training=dataclasses.replace(config.training, precision="float32")
    )
    batches = data.batches(config)
    losses = []
    for each in (config, wide):
        state = init_state(each)
        for step in range(20):
            state, metrics = jitted_train_step(state, jnp.asarray(batches[step]), config=each)
            losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[:20], losses[20:], rtol=5e-3)
    assert losses[19] < losses[0] - 0.1
