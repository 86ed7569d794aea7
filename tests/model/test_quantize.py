"""Matrices in int8, and products with them, beside NumPy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pythia_jax as pj
from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.model import gptneox, quantize
from pythia_jax.model.parameters import items, map_parameters
from pythia_jax.model.quantize import Quantized

RNG = np.random.default_rng(0)


def made(weight: np.ndarray, dynamic: bool = False) -> Quantized:
    return Quantized(*map(jnp.asarray, quantize.quantize(weight)), dynamic=dynamic)


def test_every_weight_is_within_half_a_step_of_its_channel() -> None:
    weight = RNG.normal(size=(3, 40, 70)).astype(np.float32) * 10.0 ** RNG.integers(
        -9, 9, (3, 40, 1)
    )
    weight[1, 7] = 0
    values, scale = quantize.quantize(weight)
    assert values.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == (3, 40)
    assert np.abs(values).max() == 127  # and -128 is never used
    error = np.abs(values * scale[..., None].astype(np.float64) - weight)
    assert (error <= 0.5001 * scale[..., None]).all()
    assert (error[1, 7] == 0).all()
    again, same = quantize.quantize(values * scale[..., None])
    np.testing.assert_array_equal(again, values)
    np.testing.assert_allclose(same, np.where(scale == 1, 1, scale), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_has_no_scale_is_refused(bad: float) -> None:
    weight = np.ones((2, 3), np.float32)
    weight[1, 1] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantize.quantize(weight)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_weight_only_products_are_those_of_the_stored_weights(count: int) -> None:
    weight = made(RNG.normal(size=(48, 96)))
    x = RNG.normal(size=(count, 3, 96)).astype(np.float32)
    x[0, 0] = 0
    x[-1, 1, 5] = 300.0  # what else is in its row is kept to some 5e-3 then
    wanted = x.astype(np.float64) @ np.asarray(quantize.kernel(weight), np.float64)
    found = np.asarray(quantize.matmul(jnp.asarray(x), weight))
    bound = np.abs(x).max(axis=-1, keepdims=True) / (127 * 128) / 2
    assert (np.abs(found - wanted) <= 1.01 * bound * np.abs(quantize.kernel(weight)).sum(0)).all()
    assert np.linalg.norm(found - wanted) < 2e-4 * np.linalg.norm(wanted)
    wide = quantize._widened(jnp.asarray(x.reshape(-1, 96)), weight.values) * weight.scale
    np.testing.assert_allclose(wide.reshape(found.shape), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("count", [1, 4])
def test_dynamic_products_round_activations_to_int8(count: int) -> None:
    weight = made(RNG.normal(size=(48, 96)), dynamic=True)
    x = RNG.normal(size=(count, 96)).astype(np.float32)
    scale = np.abs(x).max(axis=-1, keepdims=True) / 127
    rounded = np.rint(x / scale) * scale.astype(np.float64)
    wanted = rounded @ np.asarray(quantize.kernel(weight), np.float64)
    np.testing.assert_allclose(
        quantize.matmul(jnp.asarray(x), weight), wanted, rtol=1e-5, atol=1e-5
    )


def test_rows_are_those_of_the_stored_matrix_and_nan_beyond_it() -> None:
    weight = made(RNG.normal(size=(9, 4)))
    whole = np.asarray(quantize.kernel(weight)).T
    np.testing.assert_array_equal(quantize.rows(weight, jnp.array([[3, 8]])), whole[[[3, 8]]])
    assert np.isnan(jax.jit(quantize.rows)(weight, jnp.array([9, -10, -1]))).all()


CONFIG = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64,
    max_position_embeddings=16,
)  # fmt: skip


def both(dtype: str) -> tuple[dict, dict]:
    """A model in int8, and the floats that it stands for."""
    params = pj.init_parameters(CONFIG, jax.random.key(0))

    def leaf(parameter, value):
        if not parameter.path.endswith(("kernel", "embedding")):
            return value.astype(dtype)
        turned = np.asarray(value).swapaxes(-1, -2) if parameter.transposed else np.asarray(value)
        values, scale = map(jnp.asarray, quantize.quantize(turned))
        return Quantized(values, scale, dtype=jnp.dtype(dtype))

    stored = map_parameters(leaf, params)
    floats = {}
    for parameter, value in items(stored):
        if isinstance(value, Quantized):
            value = quantize.kernel(value)
            value = value if parameter.transposed else value.mT
        floats[parameter.path] = value
    return stored, map_parameters(lambda p, _: floats[p.path], params)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so_and_in_its_row(bad: float, dynamic: bool) -> None:
    weight = made(RNG.normal(size=(48, 96)), dynamic)
    x = RNG.normal(size=(3, 96)).astype(np.float32)
    x[1, 5] = bad
    finite = np.isfinite(quantize.matmul(jnp.asarray(x), weight))
    assert not finite[1].any() and finite[[0, 2]].all()


@pytest.mark.parametrize("scan", [True, False])
def test_a_model_in_int8_is_the_model_of_its_floats(scan: bool) -> None:
    stored, floats = both("float32")
    tokens = RNG.integers(0, 64, (3, 12))
    runtime = Runtime(scan_layers=scan)
    wanted = pj.forward(floats, tokens, CONFIG, runtime=runtime)
    found = pj.forward(stored, tokens, CONFIG, runtime=runtime)
    assert np.linalg.norm(found - wanted) < 2e-4 * np.linalg.norm(wanted)
    losses = [float(pj.loss(params, tokens, CONFIG)) for params in (stored, floats)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_losses_round_activations_where_the_forward_pass_does() -> None:
    stored, _ = both("float32")
    dynamic = map_parameters(
        lambda _, v: dataclasses.replace(v, dynamic=True) if isinstance(v, Quantized) else v, stored
    )
    tokens = RNG.integers(0, 64, (3, 12))
    logits = pj.forward(dynamic, tokens[:, :-1], CONFIG)
    wanted = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(pj.token_losses(dynamic, tokens, CONFIG), wanted, rtol=1e-5)
    apart = np.abs(np.asarray(pj.token_losses(stored, tokens, CONFIG)) - wanted).max()
    assert apart > 1e-4  # or the rounding is not seen here at all


def test_in_bfloat16_the_stream_is_bfloat16() -> None:
    stored, _ = both("float32")
    narrow = gptneox.cast(stored, Runtime(dtype="bfloat16"))
    assert gptneox.embed(narrow, jnp.zeros((1, 2), jnp.int32)).dtype == jnp.bfloat16
    x = jnp.ones((1, 2, 32), jnp.bfloat16)
    layer = gptneox.unstacked(narrow)["layers"][1]
    assert gptneox.dense(x, layer["attention"]["dense"]).dtype == jnp.bfloat16
    assert gptneox.unembed(narrow, x).dtype == jnp.float32


def test_unstacked_layers_are_those_of_the_stack() -> None:
    stored, _ = both("float32")
    apart = gptneox.unstacked(stored)
    assert len(apart["layers"]) == 2
    for i, layer in enumerate(apart["layers"]):
        jax.tree.map(
            lambda a, whole, i=i: np.testing.assert_array_equal(a, whole[i]),
            layer,
            stored["layers"],
        )
