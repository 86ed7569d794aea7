"""Rotary angles in half precision: those of GPT-NeoX v1.0, in the forward pass and in decoding."""

from dataclasses import replace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from reference import TINY, distance, hf_model, random_params, random_tokens

from pythia_jax.configs import ConfigError, ModelConfig, Runtime
from pythia_jax.model import attention, cache, decode
from pythia_jax.model.gptneox import forward, hidden_states

TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16}
NUMPY = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
HALVES = list(TORCH)


def torch_tables(size: int, base: float, positions: int, precision: str) -> tuple:
    """Cosines and sines by torch's own half arithmetic, in the order of GPT-NeoX v1.0."""
    half = TORCH[precision]
    frequencies = (1.0 / (base ** (torch.arange(0, size, 2).float() / size))).to(half)
    angles = torch.arange(positions).to(half)[:, None] * frequencies[None, :]
    if precision == "bfloat16":
        return angles.float().cos().to(half), angles.float().sin().to(half)
    return angles.cos(), angles.sin()


def test_float16_frequencies_are_the_recorded_ones():
    # The cosine of the first position is that of the frequency itself.
    recorded = [
        1,
        0.316162109375,
        0.0999755859375,
        0.0316162109375,
        0.01000213623046875,
        0.003162384033203125,
        0.0010004043579101562,
        0.0003161430358886719,
    ]
    _, sines = attention.rotary_table(16, 10000.0, 2, "float16")
    np.testing.assert_array_equal(sines[1], np.sin(recorded).astype(np.float16))


@pytest.mark.parametrize("size", [2, 8, 16, 20, 32, 64])
@pytest.mark.parametrize("precision", HALVES)
def test_tables_equal_those_of_torch_in_half_precision(precision, size):
    ours = attention.rotary_table(size, 10000.0, 2048, precision)
    for mine, theirs in zip(ours, torch_tables(size, 10000.0, 2048, precision), strict=True):
        theirs = theirs.float().numpy()
        assert mine.dtype == np.float32
        # Where float32's sine lies half-way between two halves, its last bit decides.
        assert (mine != theirs).sum() <= 5
        assert np.abs(mine - theirs).max() <= 2.0**-11


@pytest.mark.parametrize(
    ("precision", "worst"), [("float16", [0.0, 0.37, 0.10, 0.044]), ("bfloat16", [4.0, 3.4, 1.0])]
)
def test_on_and_off_differ_by_the_rounding_of_the_angles(precision, worst):
    """What a pair of dimensions is turned by, read off the rotation itself."""
    config = ModelConfig(64, 1, 1, vocab_size=8, rotary_pct=0.25)
    half = replace(config, rotary_precision=precision)
    positions, dtype = np.arange(2048), NUMPY[precision]
    x = np.zeros((1, 2048, 1, 64), np.float32)
    x[..., :8] = 1  # one of each pair

    def turned(config: ModelConfig) -> np.ndarray:
        y = np.asarray(attention.rotate(jnp.asarray(x), positions, config), np.float64)[0, :, 0]
        return y[:, :8] + 1j * y[:, 8:16]

    frequencies = 10000.0 ** (-np.arange(8) / 8)
    rounded = frequencies.astype(np.float32).astype(dtype).astype(np.float64)
    places = positions.astype(np.float32).astype(dtype).astype(np.float64)
    angles = np.outer(places, rounded).astype(dtype).astype(np.float64)
    off = angles - np.outer(positions, frequencies)
    np.testing.assert_allclose(np.abs(off).max(0)[: len(worst)], worst, rtol=0.03)
    # Halves hold cosines to one part in 2048 or 256.
    grain = 2e-3 if precision == "float16" else 2e-2
    difference = turned(half) / turned(config)
    assert np.abs(difference - np.exp(1j * off)).max() < grain
    assert np.abs(difference - 1).max() > 20 * grain


def with_tables(model, config: ModelConfig):
    """transformers' model, its rotary tables replaced by torch's half-precision ones."""
    tables = torch_tables(
        config.rotary_size,
        config.rotary_emb_base,
        config.max_position_embeddings,
        config.rotary_precision,
    )
    whole = [torch.cat([t, t], dim=-1).float() for t in tables]
    model.gpt_neox.rotary_emb.forward = lambda x, position_ids: tuple(
        t[position_ids] for t in whole
    )
    return model


@pytest.mark.parametrize("precision", HALVES)
def test_logits_are_those_of_transformers_under_the_same_angles(precision):
    off = replace(TINY, max_position_embeddings=512, rotary_pct=1.0)
    on = replace(off, rotary_precision=precision)
    params, tokens = random_params(off, 3), random_tokens(off, 2, 500)
    theirs = []
    for model in (hf_model(params, off), with_tables(hf_model(params, off), on)):
        with torch.no_grad():
            theirs.append(model(torch.tensor(tokens).long(), use_cache=False).logits.numpy())
    ours = [np.asarray(forward(params, tokens, config)) for config in (off, on)]
    for mine, reference in zip(ours, theirs, strict=True):
        assert np.abs(mine - reference).max() <= 2e-5
    assert distance(ours[1] - ours[0], theirs[1] - theirs[0]) < 0.01
    assert np.abs(ours[1] - ours[0]).max() > 1e-3


@pytest.mark.parametrize("precision", HALVES)
def test_decoding_turns_by_the_same_angles_as_the_forward_pass(precision):
    config = replace(TINY, max_position_embeddings=512, rotary_precision=precision)
    params, tokens = random_params(config, 5), random_tokens(config, 2, 400)
    runtime = Runtime()
    whole = hidden_states(params, tokens, config, runtime=runtime)[0]
    start = 396
    served = decode.serving(params, runtime)
    caches, rows = cache.empty(config, 2, 400, "float32"), np.arange(2)
    _, caches = decode.prefill(served, tokens[:, :start], caches, rows, config, runtime)
    for position in range(start, 400):
        token, place = jnp.asarray(tokens[:, position]), jnp.full(2, position, jnp.int32)
        hidden, caches = decode.step(served, token, place, caches, config)
        np.testing.assert_allclose(hidden, whole[:, position], rtol=0, atol=2e-5)


def test_float16_refuses_positions_that_it_cannot_count():
    ModelConfig(16, 1, 1, rotary_precision="float16", max_position_embeddings=65505)
    with pytest.raises(ConfigError, match=r"model\.rotary_precision: 'float16'.*65504.*65506"):
        ModelConfig(16, 1, 1, rotary_precision="float16", max_position_embeddings=65506)
