"""Generation against transformers' generate, one by one, and the forward pass."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import pytest
import torch
from on_a_mesh import on_eight_devices
from random_inputs import random_params
from reference import hf_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import pythia_jax as pj
from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.model.generation import Continuation, continuations, encoded
from pythia_jax.model.serving import _width

CONFIG = ModelConfig(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=3,
    vocab_size=130,
    max_position_embeddings=128,
)
PROMPTS = [list(range(5, 12)), [7], list(range(40, 61)), [3] * 13, [9, 8, 7]]
NEW = 24
"""New tokens; and two slots: with few shapes, few programs are compiled."""
EOD = 0


@dataclass
class Bare:
    """The least that `generate` asks of a model."""

    params: dict
    config: ModelConfig = CONFIG
    tokenizer: Tokenizer | None = None
    eod: int = EOD


def sharp(config: ModelConfig = CONFIG) -> Bare:
    """A random model whose favourites stand out from rounding."""
    params = random_params(config)
    params["embed_out"]["kernel"] = params["embed_out"]["kernel"] * 5
    return Bare(params, config)


def spelling() -> Tokenizer:
    """A token a byte, 0 to 127; 128 is `ab`, 129 the first byte of `é`, and 0 is special."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_of = {text: i for i, text in enumerate(_byte_letters())}
    vocabulary = {text: byte_of[text] for text in letters if byte_of[text] < 128}
    vocabulary |= {"ab": 128, _byte_letters()[0xC3]: 129}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary (GPT-2's encoder.py)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


@pytest.fixture(scope="module")
def model() -> Bare:
    return sharp()


@pytest.fixture(scope="module")
def greedy(model: Bare) -> list[Continuation]:
    """All prompts in two slots, to `NEW` tokens or the end of a document."""
    rows = continuations(model, PROMPTS, max_new_tokens=NEW, temperature=0.0, batch_size=2)
    return sorted(rows, key=lambda row: row.index)


@pytest.mark.parametrize(("parallel", "penalty"), [(True, 1.0), (False, 1.4)])
def test_greedy_tokens_are_those_of_transformers(parallel: bool, penalty: float) -> None:
    model = sharp(replace(CONFIG, use_parallel_residual=parallel))
    reference = cast(Any, hf_model(model.params, model.config))
    ours = pj.generate(
        model, PROMPTS, max_new_tokens=NEW, temperature=0.0, repetition_penalty=penalty
    )
    for prompt, new in zip(PROMPTS, ours, strict=True):
        theirs = reference.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW,
            do_sample=False,
            repetition_penalty=penalty,
            pad_token_id=0,
        )
        assert new == theirs[0, len(prompt) :].tolist()


def scores(model: Bare, prompt: list[int], new: list[int]) -> jax.Array:
    """Logits that the new tokens were picked by, without a cache, `[new, vocab]`."""
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : len(prompt) + len(new)] = prompt + new
    logits = pj.forward(model.params, tokens, model.config)[0]
    return logits[len(prompt) - 1 :][: len(new)]


def test_the_cache_changes_no_token(model: Bare, greedy: list[Continuation]) -> None:
    for prompt, row in zip(PROMPTS, greedy, strict=True):
        assert scores(model, prompt, row.tokens).argmax(axis=-1).tolist() == row.tokens


def test_log_probabilities_are_of_the_forward_pass(model: Bare) -> None:
    rows = continuations(
        model,
        PROMPTS,
        max_new_tokens=NEW,
        temperature=1.7,
        top_k=20,
        top_p=0.8,
        repetition_penalty=1.3,
        batch_size=2,
    )
    for row in rows:
        whole = jax.nn.log_softmax(scores(model, PROMPTS[row.index], row.tokens))
        expected = whole[np.arange(len(row.tokens)), np.array(row.tokens)]
        np.testing.assert_allclose(row.logprobs, expected, atol=2e-4)


@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        ((1, 2, 5), {"temperature": 0.0}),
        ((1, 2), {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2}),
    ],
    ids=str,
)
def test_a_row_depends_neither_on_its_company_nor_on_the_batch_size(
    model: Bare, sizes: tuple[int, ...], settings: dict
) -> None:
    together = [
        pj.generate(model, PROMPTS, max_new_tokens=NEW, batch_size=size, **settings)
        for size in sizes
    ]
    assert all(rows == together[0] for rows in together)


def test_a_row_of_its_own_seed_is_the_same_alone_and_in_any_place(model: Bare) -> None:
    seeds = [3, 2**32 - 1, 0, 12, 3]
    every = pj.generate(model, PROMPTS, max_new_tokens=NEW, batch_size=2, seed=seeds)
    other = pj.generate(model, PROMPTS[::-1], max_new_tokens=NEW, batch_size=2, seed=seeds[::-1])
    assert every == other[::-1]


def test_a_seed_decides_what_is_drawn_and_rows_draw_apart(model: Bare) -> None:
    draws = [
        pj.generate(model, [[7] * 20] * 4, max_new_tokens=NEW, batch_size=2, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert len({tuple(row) for row in draws[0]}) == 4


def test_a_row_ends_with_the_end_of_document_and_the_others_go_on(
    model: Bare, greedy: list[Continuation]
) -> None:
    eod = greedy[0].tokens[4]
    ending = replace(model, eod=eod)
    cut = continuations(ending, PROMPTS, max_new_tokens=NEW, temperature=0.0, batch_size=2)
    for row in cut:
        free = greedy[row.index].tokens
        assert row.ended == ("eod" if eod in free else "length")
        assert row.tokens == (free[: free.index(eod) + 1] if eod in free else free)
        assert len(row.logprobs) == len(row.tokens)


def test_rows_come_as_they_end(model: Bare) -> None:
    settings = {"max_new_tokens": NEW, "temperature": 0.0, "batch_size": 2}
    prompts = [[5] * 21, [7] * 20]
    ending = replace(model, eod=pj.generate(model, prompts, **settings)[1][0])
    rows = continuations(ending, prompts, **settings)
    assert next(rows).index == 1


def test_the_runtime_changes_no_token(model: Bare, greedy: list[Continuation]) -> None:
    rows = pj.generate(
        model,
        PROMPTS,
        max_new_tokens=NEW,
        temperature=0.0,
        batch_size=2,
        runtime=Runtime(attention="einsum", scan_layers=False),
    )
    assert rows == [row.tokens for row in greedy]


def test_bfloat16_picks_what_its_forward_pass_picks(model: Bare) -> None:
    runtime = Runtime(dtype="bfloat16")
    (new,) = pj.generate(model, [[5, 9]], max_new_tokens=1, temperature=0.0, runtime=runtime)
    logits = pj.forward(model.params, np.array([[5, 9]]), CONFIG, runtime=runtime)
    assert new == [int(logits[0, -1].argmax())]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_narrow_cache_gives_nearly_the_same_log_probabilities(
    dtype: str, model: Bare, greedy: list[Continuation]
) -> None:
    rows = continuations(
        model, PROMPTS, max_new_tokens=NEW, temperature=0.0, batch_size=2, cache_dtype=dtype
    )
    for row in rows:
        # As far as the same tokens were picked.
        same = np.cumprod(np.equal(row.tokens[:8], greedy[row.index].tokens[:8]), dtype=bool)
        assert same[0]
        ours, exact = (np.array(r.logprobs[:8])[same] for r in (row, greedy[row.index]))
        np.testing.assert_allclose(ours, exact, atol=0.2)


def text_model(model: Bare, *tokens: int) -> Bare:
    """A model that writes these tokens after token 1, then nothing but the end."""
    params = jax.tree.map(np.zeros_like, model.params)
    # The stream is the embedding; LayerNorm keeps the place of its one large entry.
    config = replace(CONFIG, hidden_size=130, num_attention_heads=1)
    params = random_params(config)
    params = jax.tree.map(lambda x: np.zeros_like(x), params)
    params["final_layer_norm"]["scale"] = np.ones(130, np.float32)
    params["embed_in"]["embedding"] = 100 * np.eye(130, dtype=np.float32)
    follows = np.zeros((130, 130), np.float32)
    for before, after in zip((1, *tokens), (*tokens, EOD), strict=True):
        follows[before, after] = 1
    params["embed_out"]["kernel"] = follows
    return Bare(params, config, spelling())


def written(model: Bare, stop: list[str]) -> tuple[Continuation, list[list[int]]]:
    told: list[list[int]] = []
    (row,) = continuations(
        model,
        [[1]],
        max_new_tokens=12,
        temperature=0.0,
        stop=stop,
        on_tokens=lambda index, tokens: told.append(tokens),
    )
    return row, told


@pytest.mark.parametrize(
    ("stop", "text", "kept"),
    [
        ([], "xyabz\x00", 5),
        (["z"], "xyab", 3),
        (["yab"], "x", 1),  # across tokens
        (["bz"], "xya", 2),  # begins within a token, which is cut whole
        (["q", "abz", "y"], "x", 1),  # the earliest
        (["xyabzq"], "xyabz\x00", 5),  # only begun
    ],
)
def test_text_ends_before_the_first_stop_string(
    model: Bare, stop: list[str], text: str, kept: int
) -> None:
    tokens = [ord("x"), ord("y"), 128, ord("z"), EOD]
    row, told = written(text_model(model, *tokens[:-1]), stop)
    assert row.text == text
    assert row.tokens == tokens[:kept] == [token for some in told for token in some]
    assert row.ended == ("eod" if kept == 5 else "stop")
    assert len(row.logprobs) == kept


def test_tokens_are_told_as_they_come_and_not_before_they_are_certain(model: Bare) -> None:
    tokens = [ord(letter) for letter in "abcxyz"]
    _, told = written(text_model(model, *tokens), [])
    assert told == [[token] for token in [*tokens, EOD]]
    _, told = written(text_model(model, *tokens), ["cxq"])
    # `c`, and `cx`, may be what the string begins with.
    assert told == [tokens[:1], tokens[1:2], tokens[2:5], tokens[5:], [EOD]]


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[]], {}, "prompt 0: it is empty"),
        ([[1], [130]], {}, "prompt 1: token 130 is not in the vocabulary of 130"),
        ([[-1]], {}, "token -1"),
        ([[1] * 120], {"max_new_tokens": 9}, "do not fit the context of 128"),
        (["text"], {}, "no tokenizer"),
        ([1, 2], {}, "neither text nor a list"),
        ([[1.7]], {}, "neither text nor a list"),
        ([b"abc"], {}, "neither text nor a list"),
        ([[1]], {"temperature": -1.0}, "temperature must be 0 .greedy., or finite"),
        ([[1]], {"temperature": np.nan}, "temperature must be 0 .greedy., or finite"),
        ([[1]], {"temperature": 1e-40, "top_k": 3}, "temperature must be .* at least 1e-37"),
        ([[1]], {"top_p": 0.0}, "top_p must be more than 0"),
        ([[1]], {"top_k": 0}, "top_k must be at least 1"),
        ([[1]], {"repetition_penalty": 0.0}, "repetition_penalty must be more than 0"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens must be at least 0"),
        ([[1]], {"batch_size": 0}, "batch_size must be at least 1"),
        ([[1]], {"cache_dtype": "int4"}, "cache_dtype must be one of bfloat16, int8"),
        ([[1]], {"seed": -1}, "seed must be from 0"),
        ([[1]], {"seed": 2**32}, "seed must be from 0"),
        ([[1]], {"seed": 1.5}, "seed must be .* a whole number"),
        ([[1]], {"seed": [1, 2]}, "2 of them for 1 prompts"),
        ([[1]], {"stop": ["x"]}, "the model has no tokenizer"),
        ([[1]], {"stop": [""]}, "stop must be strings that are not empty"),
    ],
)
def test_bad_input_is_one_clear_error_before_anything_is_made(
    model: Bare, prompts: list, settings: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        continuations(model, prompts, **{"max_new_tokens": 4, **settings})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_gives_no_distribution_is_an_error_and_no_text(
    model: Bare, temperature: float
) -> None:
    broken = jax.tree.map(lambda x: x * np.float32(np.nan), model.params)
    with pytest.raises(ValueError, match="prompt 0: the log-probability of new token 0 is no"):
        pj.generate(replace(model, params=broken), [[1, 2]], temperature=temperature)


def test_half_of_a_surrogate_pair_is_no_text() -> None:
    with pytest.raises(ValueError, match=r"no text: '\\udcff' is a lone surrogate"):
        encoded("a\udcff", Tokenizer(models.BPE({}, [])))


def test_nothing_asked_for_gives_nothing_and_the_context_can_be_filled(model: Bare) -> None:
    assert pj.generate(model, [[1], [2]], max_new_tokens=0) == [[], []]
    assert pj.generate(model, []) == []
    endless = replace(model, eod=-1)  # never reached
    (full,) = pj.generate(endless, [[1] * 120], max_new_tokens=8, temperature=0.0)
    assert len(full) == 8


def test_widths_are_few_and_hold_their_prompts() -> None:
    config = replace(CONFIG, max_position_embeddings=2000)
    widths = [_width(length, config) for length in range(1, 2001)]
    assert all(width >= length for length, width in enumerate(widths, 1))
    assert len(set(widths)) < 20 and max(widths) == 2000


def test_eight_devices_make_what_one_makes(model: Bare) -> None:
    report = on_eight_devices(Path(__file__).with_name("generated_on_a_mesh.py"))
    assert report["one"] == report["eight"]
    assert report["cache"] == [2, 1, 32, 16]  # of a device: its rows, its heads, slots, head
