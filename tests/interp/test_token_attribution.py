"""Scores of input tokens against torch's, their completeness, and the command that prints them."""

import csv
from dataclasses import replace

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from reference import TINY, distance, hf_model, random_params, random_tokens

import pythia_jax as pj
from pythia_jax.bridge.model import Model
from pythia_jax.cli.attribute import attribute as command
from pythia_jax.interp import token_attribution
from pythia_jax.interp.activations import logit_difference
from pythia_jax.interp.token_attribution import (
    attribute,
    input_x_gradient,
    integrated_gradients,
)

CONFIG = replace(TINY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=61)
BATCH, SEQ = 2, 9
PARAMS = random_params(CONFIG)
TOKENS = random_tokens(CONFIG, BATCH, SEQ)
METRIC = logit_difference(3, np.array([5, 6]))


def in_torch(embedded):
    """The metric `[batch]` and its gradient at embeddings, by torch."""
    model = hf_model(PARAMS, CONFIG)
    embedded = torch.tensor(np.array(embedded), requires_grad=True)
    last = model(inputs_embeds=embedded, use_cache=False).logits[:, -1]
    values = last[:, 3] - last[range(BATCH), [5, 6]]
    (gradient,) = torch.autograd.grad(values.sum(), embedded)
    return values.detach().numpy(), gradient.numpy()


EMBEDDED = np.asarray(PARAMS["embed_in"]["embedding"])[TOKENS]


def test_input_x_gradient_and_its_gap_are_torchs():
    scores, gap = input_x_gradient(PARAMS, TOKENS, CONFIG, METRIC)
    value, gradient = in_torch(EMBEDDED)
    expected = (EMBEDDED * gradient).sum(axis=-1)
    assert distance(scores, expected) <= 1e-5
    nothing, _ = in_torch(np.zeros_like(EMBEDDED))
    np.testing.assert_allclose(gap, value - nothing - expected.sum(axis=1), rtol=0, atol=1e-5)


def test_integrated_gradients_are_torchs_mean_over_the_path():
    baseline = np.asarray(PARAMS["embed_in"]["embedding"]).mean(axis=0)
    scores, gap = integrated_gradients(PARAMS, TOKENS, CONFIG, METRIC, steps=3, baseline=baseline)
    # Gauss and Legendre's three points and weights, from any table.
    points = (1 + np.array([-np.sqrt(0.6), 0, np.sqrt(0.6)])) / 2
    way = EMBEDDED - baseline
    gradients = [
        in_torch((baseline + p * way).astype(np.float32))[1] * w
        for p, w in zip(points, np.array([5, 8, 5]) / 18, strict=True)
    ]
    expected = (way * sum(gradients)).sum(axis=-1)
    assert distance(scores, expected) <= 1e-4
    ends = in_torch(EMBEDDED)[0] - in_torch(np.broadcast_to(baseline, way.shape))[0]
    np.testing.assert_allclose(gap, ends - expected.sum(axis=1), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_the_gap_falls_with_steps_to_nothing():
    gaps = [
        np.abs(integrated_gradients(PARAMS, TOKENS, CONFIG, METRIC, steps=steps)[1]).max()
        for steps in (4, 16, 50)
    ]
    assert gaps[0] > 3 * gaps[1] and gaps[1] > 30 * gaps[2] and gaps[2] < 2e-3
    own, gap = integrated_gradients(PARAMS, TOKENS, CONFIG, METRIC, steps=2, baseline=EMBEDDED)
    np.testing.assert_allclose(own, 0, atol=1e-6)
    np.testing.assert_allclose(gap, 0, atol=1e-6)


def test_bad_input_is_one_clear_error():
    with pytest.raises(ValueError, match="steps: 0 points"):
        integrated_gradients(PARAMS, TOKENS, CONFIG, METRIC, steps=0)
    with pytest.raises(ValueError, match=r"baseline of shape \(31,\): embeddings, \(2, 9, 32\)"):
        integrated_gradients(PARAMS, TOKENS, CONFIG, METRIC, baseline=np.zeros(31))
    with pytest.raises(ValueError, match="of row 1 is not finite"):
        input_x_gradient(PARAMS, TOKENS, CONFIG, logit_difference(3, np.array([5, 61])))


# Of a prompt


TEXTS = ["the river was grey and slow, and the boy on the bank said many things to the old woman"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    config = replace(CONFIG, vocab_size=tokenizer.get_vocab_size())
    files = {"tokenizer.json": tokenizer.to_str().encode()}
    return Model(random_params(config), config, files, source="a random model")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "hf"
    pj.save_hf(model, path)
    return path


PROMPT = "the old river was many\n"


def test_a_prompts_scores_are_those_of_its_tokens(model):
    found = attribute(model, PROMPT, target=" the", against=" and", method="input-x-gradient")
    ids = model.tokenizer.encode(PROMPT).ids
    assert list(found.ids) == ids and "".join(found.tokens) == PROMPT
    the, and_ = (model.tokenizer.encode(text).ids[0] for text in (" the", " and"))
    metric = logit_difference(the, and_)
    expected, gap = input_x_gradient(model.params, np.array([ids], np.int32), model.config, metric)
    np.testing.assert_allclose(found.scores, expected[0], rtol=0, atol=1e-6)
    assert found.gap == pytest.approx(float(gap[0]), abs=1e-6)
    logits = np.asarray(pj.forward(model.params, np.array([ids], np.int32), model.config))[0, -1]
    assert found.value == pytest.approx(logits[the] - logits[and_], abs=1e-5)
    assert found.metric == "logit of ' the' less that of ' and'"


def test_the_command_prints_and_writes_what_the_function_finds(model, folder, tmp_path):
    table, picture = tmp_path / "scores.csv", tmp_path / "scores.png"
    options = [str(folder), PROMPT, "--points", "5"]
    for out in (table, picture):
        result = CliRunner().invoke(command, [*options, "--out", str(out)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    found = attribute(model, PROMPT, steps=5)
    assert "(the likeliest) in nats" in found.metric
    assert found.text() in result.output and str(picture) in result.output
    assert r'"\n"' in result.output  # a line's end does not break the table
    assert f"{found.gap:+.4f} of the change" in found.text()
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["token"] for row in rows] == list(found.tokens)
    assert [int(row["id"]) for row in rows] == list(found.ids)
    np.testing.assert_allclose([float(r["score"]) for r in rows], found.scores, rtol=0, atol=1e-6)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scores.csv", "scores.png"]


def test_refused_input_leaves_no_file(folder, tmp_path):
    def refused(*arguments):
        result = CliRunner().invoke(command, [str(a) for a in arguments])
        assert isinstance(result.exception, ValueError)
        return str(result.exception)

    out = tmp_path / "scores.csv"
    said = refused(folder, PROMPT, "--target", " the river", "--out", out)
    assert "is 2 tokens (' the', ' river'), and one is scored" in said
    assert "the prompt is empty" in refused(folder, "", "--out", out)
    assert "name a .csv, a .png or an .svg" in refused(
        "nowhere", PROMPT, "--out", tmp_path / "a.pdf"
    )
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_tokenizer_is_refused(model):
    with pytest.raises(ValueError, match="a random model: has no tokenizer"):
        attribute(replace(model, tokenizer_files={}), PROMPT)
    with pytest.raises(ValueError, match="method: 'magic'; choose integrated-gradients or"):
        attribute(model, PROMPT, method="magic")


def test_the_command_knows_the_methods_of_the_library():
    (method,) = [p for p in command.params if p.name == "method"]
    assert isinstance(method.type, click.Choice)
    assert tuple(method.type.choices) == token_attribution.METHODS
