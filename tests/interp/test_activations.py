"""Values and gradients at sites are those of torch's hooks; metrics are what they say."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import TINY, HFSites, distance, hf_model, random_params, random_tokens

import pythia_jax as pj
from pythia_jax.interp import (
    Node,
    activation_patching,
    attribution_patching,
    gradient_noise_scale,
    integrated_gradients,
)
from pythia_jax.interp import activations as values_at
from pythia_jax.interp.activations import (
    activation_gradients,
    answer_log_probability,
    logit_difference,
    token_loss,
)
from pythia_jax.model.sites import SITES, SPLIT_READERS, site_shape

CONFIG = replace(TINY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=61)
BATCH, SEQ = 3, 11
PARAMS = random_params(CONFIG)
TOKENS = random_tokens(CONFIG, BATCH, SEQ)
ANSWER, WRONG, PLACE = np.array([3, 0, 60]), np.array([5, 5, 5]), np.array([10, -4, 0])
METRIC = logit_difference(ANSWER, WRONG, position=PLACE)


def in_torch(config, change=None):
    model = hf_model(PARAMS, config)
    with HFSites(model, config, change) as hooks:
        logits = model(torch.tensor(TOKENS).long(), use_cache=False).logits
        rows = logits[torch.arange(BATCH), torch.tensor(PLACE)]
        difference = rows[torch.arange(BATCH), ANSWER] - rows[torch.arange(BATCH), WRONG]
        difference.sum().backward()
    return difference.detach().numpy(), hooks


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
def test_gradients_at_every_site_are_those_of_torch_hooks(parallel):
    config = replace(CONFIG, use_parallel_residual=parallel)
    values, seen, gradients = activation_gradients(PARAMS, TOKENS, config, METRIC, SITES)
    theirs, hooks = in_torch(config)
    _, split = in_torch(config, dict.fromkeys(SPLIT_READERS, lambda layer, value: value))
    np.testing.assert_allclose(values, theirs, rtol=0, atol=2e-6)
    expected = {**split.gradients(), **hooks.gradients()}
    for site in SITES:
        assert gradients[site].shape == site_shape(site, config, BATCH, SEQ), site
        assert distance(gradients[site], expected[site]) <= 1e-5, site
    for site, value in hooks.values().items():
        shown = value > -1e30  # all but masked scores
        assert distance(np.asarray(seen[site])[shown], value[shown]) <= 1e-5, site


@pytest.fixture(scope="module")
def whole():
    return activation_gradients(PARAMS, TOKENS, CONFIG, METRIC, ("resid_pre", "attn.q", "mlp_out"))


def test_chosen_layers_are_rows_of_the_whole(whole):
    sites = (("attn.q", [1]), ("resid_pre", (1, 0)), "mlp_out")
    run = jax.jit(
        lambda params, tokens: activation_gradients(params, tokens, CONFIG, METRIC, sites)
    )
    _, seen, gradients = run(PARAMS, TOKENS)
    for got, expected in ((seen, whole[1]), (gradients, whole[2])):
        np.testing.assert_allclose(got["attn.q"], expected["attn.q"][1:], rtol=0, atol=1e-6)
        np.testing.assert_allclose(got["resid_pre"], expected["resid_pre"][::-1], rtol=0, atol=1e-6)
        np.testing.assert_allclose(got["mlp_out"], expected["mlp_out"], rtol=0, atol=1e-6)


def test_activations_are_what_gradients_are_taken_at(whole):
    found = values_at(PARAMS, TOKENS, CONFIG, ("resid_pre", "attn.q", "mlp_out"))
    assert found.keys() == whole[1].keys()
    for site, value in found.items():
        np.testing.assert_allclose(value, whole[1][site], rtol=0, atol=1e-6)
    narrow = values_at(PARAMS, TOKENS, CONFIG, [("mlp_out", [1])], dtype="bfloat16")
    assert narrow["mlp_out"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(narrow["mlp_out"][0], found["mlp_out"][1].astype(jnp.bfloat16))


def test_a_row_has_its_gradient_in_any_company(whole):
    alone = logit_difference(ANSWER[1:2], WRONG[1:2], position=PLACE[1:2])
    values, _, gradients = activation_gradients(
        PARAMS, TOKENS[1:2], CONFIG, alone, ("resid_pre", "attn.q", "mlp_out")
    )
    np.testing.assert_allclose(values, whole[0][1:2], rtol=0, atol=1e-6)
    for site, gradient in gradients.items():
        assert distance(gradient, whole[2][site][:, 1:2]) <= 1e-5, site


def test_another_answer_needs_no_new_program(caplog):
    def run(answer):
        metric = answer_log_probability(answer)
        return activation_gradients(PARAMS, TOKENS, CONFIG, metric, ("embed",))

    run(ANSWER)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        run(ANSWER[::-1].copy())
    said = [r.getMessage() for r in caplog.records]
    assert not [line for line in said if "_activation_gradients" in line], said


def test_gradients_are_at_least_float32():
    _, seen, gradients = activation_gradients(
        PARAMS, TOKENS, CONFIG, METRIC, ("mlp_out",), runtime=pj.Runtime(dtype="bfloat16")
    )
    assert seen["mlp_out"].dtype == jnp.bfloat16
    assert gradients["mlp_out"].dtype == jnp.float32


LOGITS = jax.random.normal(jax.random.key(0), (BATCH, SEQ, 61))


def test_metrics_are_what_torch_computes():
    logits, tokens = torch.tensor(np.array(LOGITS)), torch.tensor(TOKENS).long()
    log_p = torch.log_softmax(logits, dim=-1)
    got = answer_log_probability(ANSWER)(LOGITS, jnp.asarray(TOKENS))
    np.testing.assert_allclose(got, log_p[range(BATCH), -1, ANSWER], rtol=1e-5)
    got = answer_log_probability(7, position=PLACE)(LOGITS, jnp.asarray(TOKENS))
    np.testing.assert_allclose(got, log_p[range(BATCH), PLACE, 7], rtol=1e-5)
    nll = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
    )
    np.testing.assert_allclose(token_loss()(LOGITS, jnp.asarray(TOKENS)), nll[:, -1], rtol=1e-5)
    place = np.array([1, 6, -1])
    got = token_loss(position=place)(LOGITS, jnp.asarray(TOKENS))
    np.testing.assert_allclose(got, nll[range(BATCH), [0, 5, -1]], rtol=1e-5)


@pytest.mark.parametrize("position", [SEQ, -SEQ - 1])
def test_a_position_outside_of_the_row_is_not_a_number(position):
    for metric in (token_loss(position=position), answer_log_probability(1, position=position)):
        assert np.isnan(metric(LOGITS, jnp.asarray(TOKENS))).all()
    assert np.isnan(token_loss(position=0)(LOGITS, jnp.asarray(TOKENS))).all()


def test_what_is_not_finite_names_its_row():
    with pytest.raises(ValueError, match=r"metric of row 1 is not finite"):
        activation_gradients(
            PARAMS, TOKENS, CONFIG, answer_log_probability(np.array([0, 61, 61])), ("embed",)
        )


def test_bad_input_is_one_clear_error():
    def run(sites=("embed",), metric=METRIC, tokens=TOKENS):
        return activation_gradients(PARAMS, tokens, CONFIG, metric, sites)

    with pytest.raises(ValueError, match=r"no site 'mlp_outt'; the nearest is 'mlp_out'"):
        run(sites=("mlp_outt",))
    with pytest.raises(ValueError, match=r"layers \[2\] of 'attn.q': choose from 0 to 1"):
        values_at(PARAMS, TOKENS, CONFIG, [("attn.q", [2])])
    with pytest.raises(ValueError, match="name at least one"):
        run(sites=())
    with pytest.raises(ValueError, match=r"shape \(3, 11\) for 3 rows; one number a row"):
        run(metric=lambda logits, tokens: logits[..., 0])
    with pytest.raises(ValueError, match="token 61 is not in the vocabulary"):
        run(tokens=np.full_like(TOKENS, 61))
    lists = TOKENS.tolist()
    for call in (
        lambda: run(tokens=lists),
        lambda: values_at(PARAMS, lists, CONFIG, ["embed"]),
        lambda: activation_patching(PARAMS, lists, lists, CONFIG, METRIC, [Node("mlp_out", 0)]),
        lambda: attribution_patching(PARAMS, TOKENS, lists, CONFIG, METRIC),
        lambda: integrated_gradients(PARAMS, lists, CONFIG, METRIC),
        lambda: gradient_noise_scale(PARAMS, lists, CONFIG),
    ):
        with pytest.raises(ValueError, match="tokens are a list: an array is wanted"):
            call()
    with pytest.raises(ValueError, match="answer: -1 is not a token id"):
        answer_log_probability(-1)
    with pytest.raises(ValueError, match="position: a whole number"):
        logit_difference(1, 2, position=0.5)
