"""Choosing tokens against transformers' processors, and against the distribution asked for."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike
from random_inputs import random_params
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import pythia_jax as pj
from pythia_jax.configs import ModelConfig
from pythia_jax.model.sampling import KEYS, Sampling, draw, processed, sampling

LOGITS = np.log([0.5, 0.25, 0.15, 0.1])


def theirs(chosen: Sampling, tokens: np.ndarray, logits: np.ndarray) -> np.ndarray:
    made: Any = LogitsProcessorList()
    if chosen.repetition_penalty is not None:
        made.append(RepetitionPenaltyLogitsProcessor(chosen.repetition_penalty))
    if chosen.temperature is not None:
        made.append(TemperatureLogitsWarper(chosen.temperature))
    if chosen.top_k is not None:
        made.append(TopKLogitsWarper(chosen.top_k))
    if chosen.top_p is not None:
        made.append(TopPLogitsWarper(chosen.top_p))
    return made(torch.tensor(tokens), torch.tensor(logits)).numpy()


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7},
        {"temperature": 0.6},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 1.7, "top_k": 1000},
        {"temperature": 1.0, "top_p": 0.05},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.8, "top_k": 40, "top_p": 0.7, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_processed_logits_are_those_of_transformers(settings: dict) -> None:
    rng = np.random.default_rng(0)
    logits = 4 * rng.standard_normal((6, 500), np.float32)
    tokens = rng.integers(0, 500, (6, 20))
    seen = np.zeros((6, 500), bool)
    np.put_along_axis(seen, tokens, True, axis=1)
    chosen = Sampling(**settings)
    ours = np.asarray(jax.jit(processed)(logits, seen, chosen))
    reference = theirs(chosen, tokens, logits)
    assert (np.isfinite(ours) == np.isfinite(reference)).all()
    # Ours are shifted, which changes no probability.
    ours, reference = (np.asarray(jax.nn.log_softmax(x)) for x in (ours, reference))
    np.testing.assert_allclose(ours, reference, atol=2e-5)


def frequencies(logits: ArrayLike, draws: int = 20_000, **settings: Any) -> np.ndarray:
    rows = jnp.tile(jnp.asarray(logits, jnp.float32), (draws, 1))
    keys = jax.random.key_data(jax.random.split(jax.random.key(0, impl=KEYS), draws))
    drawn, _ = draw(rows, None, keys, Sampling(**{"temperature": 1.0, **settings}))
    return np.bincount(np.asarray(drawn), minlength=4) / draws


def test_samples_follow_the_softmax_at_a_temperature() -> None:
    np.testing.assert_allclose(frequencies(LOGITS), np.exp(LOGITS), atol=0.02)
    cold = np.exp(LOGITS / 0.5)
    np.testing.assert_allclose(frequencies(LOGITS, temperature=0.5), cold / cold.sum(), atol=0.02)


def test_top_k_keeps_the_k_likeliest_and_draws_as_the_model_would() -> None:
    np.testing.assert_allclose(frequencies(LOGITS, top_k=2), [2 / 3, 1 / 3, 0, 0], atol=0.02)
    np.testing.assert_allclose(frequencies(LOGITS, top_k=99), np.exp(LOGITS), atol=0.02)


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, 1), (0.6, 2), (0.74, 2), (0.8, 3)])
def test_top_p_keeps_the_fewest_that_reach_p(top_p: float, kept: int) -> None:
    expected = np.where(np.arange(4) < kept, np.exp(LOGITS), 0)
    np.testing.assert_allclose(
        frequencies(LOGITS, top_p=top_p), expected / expected.sum(), atol=0.02
    )


def test_tokens_as_likely_as_the_last_that_stays_stay_too() -> None:
    logits = jnp.array([[1.0, 0.0, 0.0, -1.0]])
    for chosen in (Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.6)):
        kept = np.isfinite(processed(logits, None, chosen))
        assert kept.tolist() == [[True, True, True, False]]


def test_a_temperature_near_zero_takes_the_likeliest() -> None:
    assert frequencies(LOGITS, draws=100, temperature=1e-30)[0] == 1


def indifferent(logits: ArrayLike) -> Any:
    """A model that gives these logits after whatever text, and ends none."""
    config = ModelConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=len(LOGITS)
    )
    params = random_params(config)
    norm, kernel = params["final_layer_norm"], np.zeros((8, len(LOGITS)), np.float32)
    norm["scale"], norm["bias"] = np.zeros(8, np.float32), np.eye(8, dtype=np.float32)[0]
    kernel[0] = logits
    params["embed_out"]["kernel"] = kernel
    return SimpleNamespace(params=params, config=config, tokenizer=None, eod=-1)


def test_every_token_of_a_text_is_a_draw_of_its_own() -> None:
    texts, new = 256, 32
    drawn = np.array(
        pj.generate(indifferent(LOGITS), [[1]] * texts, max_new_tokens=new, batch_size=texts)
    )
    probabilities = np.exp(LOGITS)
    for token, probability in enumerate(probabilities):  # at each place of a text
        np.testing.assert_allclose((drawn == token).mean(axis=0), probability, atol=0.15)
        assert (drawn == token).mean() == pytest.approx(probability, abs=0.02)
    # Two places of a text, or of two texts, agree as often as two draws do by chance.
    chance = np.square(probabilities).sum()
    for rows in (drawn, drawn.T):
        agree = (rows[:, :, None] == rows[:, None]).mean(axis=0)
        others = agree[~np.eye(len(agree), dtype=bool)]
        assert others.mean() == pytest.approx(chance, abs=0.02)
        np.testing.assert_allclose(others, chance, atol=5 * np.sqrt(0.25 / len(rows)))


def test_log_probabilities_are_of_the_logits_as_they_came() -> None:
    logits = np.random.default_rng(0).standard_normal((3, 50), np.float32)
    keys = jnp.arange(6, dtype=jnp.uint32).reshape(3, 2)
    seen = jnp.ones((3, 50), bool)
    token, logprob = draw(jnp.asarray(logits), seen, keys, Sampling(0.3, 5, 0.8, 1.5))
    whole = torch.log_softmax(torch.tensor(logits), -1).numpy()
    np.testing.assert_allclose(logprob, whole[np.arange(3), np.asarray(token)], atol=1e-5)


def test_settings_that_change_nothing_are_left_out() -> None:
    assert sampling(0.0, 5, 0.5, 1.0) == Sampling()
    assert sampling(1.0, None, 1.0, 1.0) == Sampling(1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((-1.0, None, None, 1.0), r"temperature must be 0 \(greedy\), or"),
        ((1e-40, None, None, 1.0), "temperature must be .* at least 1e-37"),
        ((float("nan"), None, None, 1.0), "temperature must be .* finite"),
        ((float("inf"), None, None, 1.0), "temperature must be .* finite"),
        ((1.0, 0, None, 1.0), "top_k must be at least 1"),
        ((1.0, None, 0.0, 1.0), "top_p must be more than 0"),
        ((1.0, None, 1.1, 1.0), "top_p must be more than 0 and at most 1"),
        ((1.0, None, None, 0.0), "repetition_penalty must be more than 0"),
        ((1.0, None, None, float("nan")), "repetition_penalty must be more than 0"),
    ],
)
def test_impossible_settings_are_one_clear_error(settings: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampling(*settings)
