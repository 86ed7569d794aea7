"""Generation with the cache against transformers' generate and against the forward pass."""

from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike
from reference import hf_model, random_params
from tokenizers import Tokenizer

import pythia_jax as pj
from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.model import decode

CONFIG = ModelConfig(
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=3,
    vocab_size=130,
    max_position_embeddings=128,
)
PROMPTS = [list(range(5, 12)), [7], list(range(40, 73)), [3] * 17]


@dataclass
class Bare:
    """The least that `generate` asks of a model."""

    params: dict
    config: ModelConfig
    tokenizer: Tokenizer | None = None
    eod: int = 0


def sharp(config: ModelConfig = CONFIG) -> Bare:
    """A random model whose favourites stand out from rounding."""
    params = random_params(config)
    params["embed_out"]["kernel"] = params["embed_out"]["kernel"] * 5
    return Bare(params, config)


@pytest.mark.parametrize("parallel", [True, False])
def test_greedy_tokens_are_those_of_transformers(parallel: bool) -> None:
    config = ModelConfig(**{**vars(CONFIG), "use_parallel_residual": parallel})
    model = sharp(config)
    reference = hf_model(model.params, config)
    ours = pj.generate(model, PROMPTS, max_new_tokens=40, temperature=0.0)
    for prompt, new in zip(PROMPTS, ours, strict=True):
        theirs = cast(Any, reference).generate(
            torch.tensor([prompt]), max_new_tokens=40, do_sample=False, pad_token_id=0
        )
        assert new == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("runtime", [Runtime(scan_layers=False), Runtime(attention="einsum")])
def test_the_runtime_changes_no_token(runtime: Runtime) -> None:
    model = sharp()
    plain = pj.generate(model, PROMPTS, max_new_tokens=20, temperature=0.0)
    assert pj.generate(model, PROMPTS, max_new_tokens=20, temperature=0.0, runtime=runtime) == plain


def test_a_row_does_not_depend_on_its_company() -> None:
    model = sharp()
    together = pj.generate(model, PROMPTS, max_new_tokens=20, temperature=0.0)
    alone = [pj.generate(model, [p], max_new_tokens=20, temperature=0.0)[0] for p in PROMPTS]
    assert together == alone


def test_a_row_ends_with_the_end_of_document_and_the_others_go_on() -> None:
    model = sharp()
    free = pj.generate(model, PROMPTS, max_new_tokens=20, temperature=0.0)
    stop = free[0][4]
    model.eod = stop
    for row, cut in zip(
        free, pj.generate(model, PROMPTS, max_new_tokens=20, temperature=0.0), strict=True
    ):
        assert cut == (row[: row.index(stop) + 1] if stop in row else row)


def test_cached_hidden_states_equal_the_forward_pass() -> None:
    model, tokens = sharp(), np.array([[5, 9, 100, 3, 77, 2]], np.int32)
    whole = pj.forward(model.params, tokens, CONFIG)
    _, keys, values = decode.prefill(model.params, tokens[:, :3], CONFIG, Runtime(), 6)
    for position in (3, 4, 5):
        hidden, keys, values = decode.decode_step(
            model.params,
            jnp.asarray(tokens[:, position]),
            jnp.array([position]),
            keys,
            values,
            CONFIG,
            Runtime(),
        )
        logits = hidden @ model.params["embed_out"]["kernel"]
        np.testing.assert_allclose(logits, whole[:, position], atol=2e-5)


def test_a_seed_decides_what_is_drawn() -> None:
    model = sharp()
    draws = [
        pj.generate(model, PROMPTS, max_new_tokens=15, temperature=1.5, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def frequencies(
    logits: ArrayLike,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    draws: int = 20_000,
) -> np.ndarray:
    rows = jnp.tile(jnp.asarray(logits, jnp.float32), (draws, 1))
    drawn = decode.sample(
        rows,
        jax.random.key(0),
        jnp.float32(temperature),
        jnp.float32(1.0 if top_p is None else top_p),
        ("sample", top_k, top_p is not None),
    )
    return np.bincount(np.asarray(drawn), minlength=4) / draws


LOGITS = np.log([0.5, 0.25, 0.15, 0.1])


def test_samples_follow_the_softmax_at_a_temperature() -> None:
    np.testing.assert_allclose(frequencies(LOGITS), np.exp(LOGITS), atol=0.02)
    cold = np.exp(LOGITS / 0.5)
    np.testing.assert_allclose(frequencies(LOGITS, 0.5), cold / cold.sum(), atol=0.02)


def test_top_k_keeps_the_k_likeliest() -> None:
    np.testing.assert_allclose(frequencies(LOGITS, top_k=2), [2 / 3, 1 / 3, 0, 0], atol=0.02)
    np.testing.assert_allclose(frequencies(LOGITS, top_k=99), np.exp(LOGITS), atol=0.02)


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, 1), (0.6, 2), (0.74, 2), (0.8, 3), (1.0, 4)])
def test_top_p_keeps_the_fewest_that_reach_p(top_p: float, kept: int) -> None:
    expected = np.where(np.arange(4) < kept, np.exp(LOGITS), 0)
    np.testing.assert_allclose(
        frequencies(LOGITS, top_p=top_p), expected / expected.sum(), atol=0.02
    )


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[]], {}, "prompt 0 is empty"),
        ([[1], [130]], {}, "prompt 1: token 130 is not in the vocabulary of 130"),
        ([[-1]], {}, "token -1"),
        ([[1] * 120], {"max_new_tokens": 9}, "do not fit the context of 128"),
        (["text"], {}, "no tokenizer"),
        ([[1]], {"temperature": -1.0}, "temperature must be at least 0"),
        ([[1]], {"top_p": 0.0}, "top_p must be more than 0"),
        ([1, 2], {}, "neither text nor a list"),
        ([[1.7]], {}, "neither text nor a list"),
        ([[1]], {"seed": -1}, "seed must be from 0"),
        ([[1]], {"top_k": 0}, "top_k must be at least 1"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens must be at least 0"),
    ],
)
def test_bad_input_is_one_clear_error(prompts: list, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pj.generate(sharp(), prompts, **{"max_new_tokens": 4, **settings})


def test_nothing_asked_for_gives_nothing_and_the_context_can_be_filled() -> None:
    model = sharp()
    assert pj.generate(model, [[1], [2]], max_new_tokens=0) == [[], []]
    assert pj.generate(model, []) == []
    model.eod = -1  # never reached
    (full,) = pj.generate(model, [[1] * 120], max_new_tokens=8, temperature=0.0)
    assert len(full) == 8


def test_prompts_of_every_length_are_taken() -> None:
    widths = {decode._round_up(length) for length in range(1, 2049)}
    assert all(decode._round_up(length) >= length for length in range(1, 2049))
    assert len(widths) < 40


def test_bfloat16_picks_what_its_forward_pass_picks() -> None:
    model, runtime = sharp(), Runtime(dtype="bfloat16")
    (new,) = pj.generate(model, [[5, 9]], max_new_tokens=1, temperature=0.0, runtime=runtime)
    logits = pj.forward(model.params, np.array([[5, 9]]), CONFIG, runtime=runtime)
    assert new == [int(logits[0, -1].argmax())]
