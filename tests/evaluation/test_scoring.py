"""Scores are those of the plain forward pass, whatever is shared, packed, cut or replaced."""

import functools
import logging
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from on_a_mesh import on_eight_devices
from small_models import CONFIG, random_model

import pythia_jax as pj
from pythia_jax.configs import ModelConfig
from pythia_jax.evaluation import packing
from pythia_jax.evaluation.scoring import Scorer
from pythia_jax.model import parameters, quantize
from pythia_jax.model.quantize import Quantized

LIMIT = CONFIG.max_position_embeddings
Requests = list[tuple[list[int], list[int]]]


def requests_of_every_kind(config: ModelConfig, count: int = 24) -> Requests:
    """Short and too long, choices of one token and of more, one input the beginning of others."""
    rng = np.random.default_rng(0)

    def some(least: int, most: int) -> list[int]:
        return rng.integers(0, config.vocab_size, rng.integers(least, most + 1)).tolist()

    requests: Requests = []
    for _ in range(count):
        context = some(1, config.max_position_embeddings + 20)
        requests += [(context, [token]) for token in some(1, 2 * packing.WAYS)]
        requests += [(context, some(1, 6)), (context, [7]), (context, [7, 8])]
        requests += [([*context, 7], [8, 9]), (context, [7])]
        requests += [([0], some(60, config.max_position_embeddings))]
    return requests


@pytest.fixture(scope="module")
def model() -> pj.Model:
    return random_model()


@pytest.fixture(scope="module")
def requests() -> Requests:
    return requests_of_every_kind(CONFIG)


@functools.partial(jax.jit, static_argnames="config")
def log_probabilities(params: Any, tokens: jax.Array, config: ModelConfig) -> jax.Array:
    return jax.nn.log_softmax(pj.forward(params, tokens, config))


def plain(model: pj.Model, request: tuple[list[int], list[int]]) -> tuple[float, bool]:
    """One request on its own, as the harness's `hf` model scores it."""
    context, continuation = request
    whole = [*context, *continuation][-(LIMIT + 1) :]
    row = np.zeros((1, LIMIT), np.int32)
    row[0, : len(whole) - 1] = whole[:-1]
    scores = np.asarray(log_probabilities(model.params, row, model.config))[0]  # type: ignore[arg-type]
    scores = scores[: len(whole) - 1][-len(continuation) :]
    chosen = scores[np.arange(len(continuation)), continuation]
    return float(chosen.sum()), bool((scores.argmax(-1) == continuation).all())


def assert_same(found: list[tuple[float, bool]], wanted: list[tuple[float, bool]]) -> None:
    for i, ((score, greedy), (reference, flag)) in enumerate(zip(found, wanted, strict=True)):
        assert abs(score - reference) <= max(1e-4, 1e-6 * abs(reference)), i
        assert greedy == flag, i


@pytest.fixture(scope="module")
def references(model: pj.Model, requests: Requests) -> list[tuple[float, bool]]:
    return [plain(model, request) for request in requests]


@pytest.mark.parametrize("batch", [{}, {"batch_rows": 1}])
def test_scores_are_those_of_each_request_alone(model, requests, references, batch):
    assert_same(Scorer(model, **batch).loglikelihoods(requests), references)


def test_greedy_continuations_are_known_as_such(model):
    prompts = [[5, 6, 7], [9] * 40, [300]]
    scorer = Scorer(model)
    made = scorer.greedy(prompts, 6, stop_at_eod=False)
    changed = [[*tokens[:-1], (tokens[-1] + 1) % CONFIG.vocab_size] for tokens in made]
    flags = scorer.loglikelihoods([*zip(prompts, made), *zip(prompts, changed)])  # noqa: B905
    assert [flag for _, flag in flags] == [True] * 3 + [False] * 3


def test_greedy_texts_are_those_of_generate_however_they_are_cut(model):
    prompts = [list(range(i, i + n)) for i, n in enumerate([1, 30, 45, 50, 3])]
    wanted = pj.generate(model, prompts, max_new_tokens=40, temperature=0.0)
    scorer = Scorer(model, batch_rows=3)
    assert scorer.greedy(prompts, 40) == wanted
    seen = []

    def finished(tokens: list[int]) -> bool:
        seen.append(len(tokens))
        return tokens[0] == wanted[1][0]

    made = scorer.greedy(prompts, 40, finished=finished)
    for tokens, whole in zip(made, wanted, strict=True):
        assert tokens == whole[: len(tokens)]
        assert len(tokens) == len(whole) or tokens[0] == wanted[1][0]
    assert len(made[1]) < 40 and max(seen) <= 40


def test_the_end_of_a_document_ends_a_row_unless_it_is_told_not_to(model):
    scorer = Scorer(model)
    params = jax.tree.map(lambda x: x, model.params)
    kernel = np.zeros((CONFIG.hidden_size, CONFIG.vocab_size), np.float32)
    params["embed_out"]["kernel"] = jax.numpy.asarray(kernel)  # all alike: the first is token 0
    silent = scorer.replace(params)
    assert silent.greedy([[5, 6], [7]], 9) == [[0], [0]]
    assert silent.greedy([[5, 6], [7]], 9, stop_at_eod=False) == [[0] * 9] * 2


def test_inputs_that_begin_alike_are_run_once():
    requests = [([1, 2], [3]), ([1, 2], [4]), ([1], [2, 9]), ([1, 2], [3, 4, 5]), ([2], [3])]
    rows = packing.shared(requests, 16)
    assert [row.tokens for row in rows] == [[1, 2, 3, 4], [2]]
    assert sorted(request for request, _ in rows[0].requests) == [0, 1, 2, 3]
    (batch,) = packing.batches(rows, requests, lambda width: 4, 1, 16)
    # Of the first row four positions, of the second, which begins at 16, one.
    assert batch.used == 5 and batch.tokens.shape == (4, 16)
    asked = {
        int(slot): {int(token) for token in tokens if token}
        for slot, tokens in zip(batch.slots[0, :5], batch.targets[0, :5], strict=True)
    }
    assert asked == {0: {2}, 1: {3, 4, 9}, 2: {4}, 3: {5}, 16: {3}}


def test_widths_are_few_and_waste_little():
    widths = {packing.width_of(n, 2048) for n in range(1, 2049)}
    assert len(widths) == 24 and max(widths) == 2048
    assert all(n <= packing.width_of(n, 2048) < n * 1.25 for n in range(65, 2049))
    assert packing.width_of(90, 96) == packing.width_of(96, 96) == 96


def test_other_weights_are_scored_without_compiling(model, requests, caplog):
    scorer = Scorer(model)
    scorer.loglikelihoods(requests)
    scorer.greedy([[1, 2, 3]], 4)
    other = random_model(7)
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        again = scorer.replace(other.params)
        found = again.loglikelihoods(requests)
        again.greedy([[1, 2, 3]], 4)
    compiled = [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
    assert not compiled
    assert_same(found[:40], [plain(other, request) for request in requests[:40]])
    # The one before is left as it was.
    assert_same(scorer.loglikelihoods(requests[:9]), [plain(model, r) for r in requests[:9]])


def test_weights_of_another_model_are_refused(model):
    scorer = Scorer(model)
    narrow = jax.tree.map(lambda x: x.astype(jax.numpy.bfloat16), model.params)
    with pytest.raises(ValueError, match=r"embed_in/embedding is bfloat16\[352, 48\], where"):
        scorer.replace(narrow)


def test_a_model_in_int8_is_not_scored_by_the_program_of_floats(model):
    def leaf(parameter, value):
        if not parameter.path.endswith("kernel"):
            return value
        values, scale = map(jax.numpy.asarray, quantize.quantize(np.asarray(value.mT)))
        return Quantized(values, scale)

    stored = parameters.map_parameters(leaf, model.params)
    with pytest.raises(ValueError, match=r"kernel is int8\[.*, where .* has float32"):
        Scorer(model).replace(stored)
    in_int8 = Scorer(replace(model, params=stored))
    assert in_int8.replace(stored).loglikelihoods([([1, 2], [3])])
    with pytest.raises(ValueError, match=r"kernel is float32\[.*, where .* has int8"):
        in_int8.replace(model.params)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (([], [1]), "request 1: its context is empty"),
        (([1], []), "request 1: its continuation is empty"),
        (([1], [2] * (LIMIT + 1)), "97 tokens is longer than the 96"),
        (([1, 352], [2]), "token 352 is not in the vocabulary of 352"),
        (([1], [-1]), "token -1"),
    ],
)
def test_requests_that_cannot_be_scored_are_refused_by_number(model, request_, said):
    with pytest.raises(ValueError, match=said):
        Scorer(model).loglikelihoods([([1], [2]), request_])


def test_no_requests_are_no_answers(model):
    assert Scorer(model).loglikelihoods([]) == [] and Scorer(model).greedy([], 5) == []


def test_meshes_of_eight_devices_score_as_one_device_does(tmp_path):
    """Of the same numbers in another order of summing: rounding is all that may differ."""
    model = random_model(config=replace(CONFIG, num_attention_heads=2))
    requests = requests_of_every_kind(model.config, 8)
    prompts = [list(range(i, i + n)) for i, n in enumerate([1, 30, 45, 50, 3, 17])]
    alone = Scorer(model)
    texts = alone.greedy(prompts, 12)
    requests += zip(prompts, texts, strict=True)  # the only greedy ones
    scores = alone.loglikelihoods(requests)
    given = tmp_path / "given.pickle"
    params = jax.device_get(model.params)
    given.write_bytes(pickle.dumps((params, model.config, requests, prompts)))
    script = Path(__file__).with_name("scored_on_a_mesh.py")
    report = on_eight_devices(script, given)
    assert list(report) == ["fsdp 8", "data 2, fsdp 2, tensor 2"]
    for mesh, (found, made, compiled) in report.items():
        for (score, greedy), (reference, flag) in zip(found, scores, strict=True):
            assert abs(score - reference) <= max(1e-5, 1e-6 * abs(reference)), mesh
            assert greedy == flag, mesh
        assert made == texts, mesh
        assert compiled == 0, mesh
