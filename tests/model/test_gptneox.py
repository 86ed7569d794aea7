"""The forward pass: equal to transformers', however it is run."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import TINY, distance, hf_logits, hf_model, random_params, random_tokens
from transformers import GPTNeoXConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding

from pythia_jax.bridge import hf_config
from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.model.attention import inverse_frequencies, rotary_table
from pythia_jax.model.gptneox import forward
from pythia_jax.model.loss import loss

ODD = {
    "five heads of 16": replace(TINY, hidden_size=80, num_attention_heads=5),
    "half of each head rotated": replace(TINY, rotary_pct=0.5),
    "all of each head rotated": replace(TINY, rotary_pct=1.0),
    "none of each head rotated": replace(TINY, rotary_pct=0.0),
    "sequential residual": replace(TINY, use_parallel_residual=False),
    "sequential residual, tanh": replace(
        TINY, use_parallel_residual=False, hidden_act="gelu_pytorch_tanh"
    ),
    "vocabulary of 131": replace(TINY, vocab_size=131),
    "one layer": replace(TINY, num_hidden_layers=1),
    "one head": replace(TINY, num_attention_heads=1),
    "wide mlp": replace(TINY, intermediate_size=100),
    "tanh gelu": replace(TINY, hidden_act="gelu_pytorch_tanh"),
    "old name of tanh gelu": replace(TINY, hidden_act="gelu_new"),
    "another rotary base": replace(TINY, rotary_emb_base=500.0),
    "large epsilon": replace(TINY, layer_norm_eps=1e-2),
}
RUNTIMES = {
    "scan": Runtime(),
    "unrolled": Runtime(scan_layers=False),
    "einsum": Runtime(attention="einsum"),
    "einsum unrolled": Runtime(attention="einsum", scan_layers=False),
}


def ours(params, tokens, config, runtime=Runtime()):
    run = jax.jit(lambda p, t: forward(p, t, config, runtime=runtime))
    return np.asarray(run(params, jnp.asarray(tokens)))


def largest_difference(config, batch=2, seq=64, runtime=Runtime()):
    params, tokens = random_params(config), random_tokens(config, batch, seq)
    reference = hf_logits(hf_model(params, config), tokens)
    return np.abs(ours(params, tokens, config, runtime) - reference).max()


@pytest.mark.parametrize(
    "size", ["14m", "31m", "70m", pytest.param("160m", marks=pytest.mark.slow)]
)
def test_logits_equal_transformers_in_the_shapes_of_the_suite(size):
    config = ModelConfig.from_size(size)
    params, tokens = random_params(config), random_tokens(config, 2, 64)
    for activation in ("gelu", "gelu_pytorch_tanh"):
        config = replace(config, hidden_act=activation)
        reference = hf_logits(hf_model(params, config), tokens)
        assert np.abs(ours(params, tokens, config) - reference).max() <= 2e-5


def test_logits_equal_transformers_over_all_2048_positions():
    assert largest_difference(ModelConfig.from_size("14m", hidden_act="gelu"), 1, 2048) <= 2e-5


def test_logits_equal_transformers_over_all_2048_positions_with_heads_of_256():
    config = ModelConfig(512, 2, 2, vocab_size=160, hidden_act="gelu")
    assert (config.head_size, config.rotary_size) == (256, 64)
    assert largest_difference(config, 1, 2048) <= 2e-5


@pytest.mark.parametrize("config", ODD.values(), ids=ODD)
def test_logits_equal_transformers_for_odd_shapes(config):
    assert largest_difference(config, 3, 37) <= 2e-5


@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES)
def test_logits_equal_transformers_however_they_are_run(runtime):
    config = replace(TINY, max_position_embeddings=256)
    assert largest_difference(config, 2, 150, runtime) <= 2e-5


@pytest.mark.parametrize("rotary_size", [2, 4, 8, 12, 16, 20, 24, 32, 40, 48, 64])
def test_rotary_frequencies_equal_those_of_torch_bit_for_bit(rotary_size):
    # The suite has 8, 16, 20, 32 and (1b) 64.
    cosines, sines = rotary_table(rotary_size, 10000.0, 2048)
    fields = hf_config.config_json(ModelConfig(rotary_size, 1, 1, rotary_pct=1.0), "float32", eod=0)
    table = GPTNeoXRotaryEmbedding(GPTNeoXConfig(**fields))
    frequencies = inverse_frequencies(rotary_size, 10000.0)
    assert frequencies.dtype == np.float32
    assert frequencies.tobytes() == table.inv_freq.numpy().tobytes()
    half = slice(rotary_size // 2)
    # Cosine and sine differ by the last bit of their own rounding, at most.
    for mine, theirs in zip(
        (cosines, sines), table(torch.zeros(1), torch.arange(2048)[None]), strict=True
    ):
        assert mine.dtype == np.float32
        assert np.abs(mine - theirs[0, :, half].numpy()).max() <= 2**-24


def test_logits_equal_transformers_in_float64():
    configs = [
        ModelConfig.from_size("14m", hidden_act="gelu"),
        ModelConfig(512, 2, 2, vocab_size=160, hidden_act="gelu"),  # heads of 256
        replace(TINY, hidden_size=80, num_attention_heads=5, rotary_pct=0.5),
        replace(TINY, use_parallel_residual=False, hidden_act="gelu_pytorch_tanh", rotary_pct=1.0),
    ]
    for config in configs:
        tokens = random_tokens(config, 1, min(100, config.max_position_embeddings))
        with jax.enable_x64(True):
            params = random_params(config, dtype=np.float64)
            logits = ours(params, tokens, config)
        # Eager attention takes its softmax in float32 whatever it is given.
        reference = hf_logits(hf_model(params, config, torch.float64, "sdpa"), tokens)
        assert logits.dtype == np.float64
        assert np.abs(logits - reference).max() <= 1e-6


def value_and_gradient(runtime):
    params, tokens = random_params(TINY), random_tokens(TINY, 2, 33)
    return jax.jit(jax.value_and_grad(lambda p: loss(p, tokens, TINY, runtime=runtime)))(params)


@pytest.fixture(scope="module")
def plain():
    return value_and_gradient(Runtime(attention="einsum", scan_layers=False))


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scan", "unrolled"])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_loss_and_gradient_do_not_depend_on_remat_and_scan(remat, scan_layers, plain):
    value, gradient = value_and_gradient(Runtime(remat=remat, scan_layers=scan_layers))
    assert abs(value - plain[0]) <= 1e-6
    assert max(jax.tree.leaves(jax.tree.map(distance, gradient, plain[1]))) <= 2e-6


@pytest.mark.parametrize("attention", ["xla", "einsum"])
@pytest.mark.parametrize("seq", [40, 200])
def test_a_token_changes_no_logit_before_it_by_a_single_bit(attention, seq):
    config = replace(TINY, max_position_embeddings=256)
    params, tokens = random_params(config), random_tokens(config, 2, seq)
    run = jax.jit(lambda t: forward(params, t, config, runtime=Runtime(attention=attention)))
    before = np.asarray(run(tokens))
    for changed in (0, 1, seq // 2, seq - 1):
        other = tokens.copy()
        other[:, changed] = (other[:, changed] + 1) % config.vocab_size
        after = np.asarray(run(other))
        np.testing.assert_array_equal(after[:, :changed], before[:, :changed])
        assert (after[:, changed:] != before[:, changed:]).any(axis=-1).all()


def test_rows_of_a_batch_do_not_see_each_other():
    params, tokens = random_params(TINY), random_tokens(TINY, 3, 20)
    together = ours(params, tokens, TINY)
    run = jax.jit(lambda t: forward(params, t, TINY))
    for row in range(3):
        alone = np.asarray(run(tokens[row : row + 1]))
        np.testing.assert_allclose(alone[0], together[row], rtol=0, atol=5e-6)


def test_sequence_longer_than_the_positions_is_an_error_that_gives_both_lengths():
    params, tokens = random_params(TINY), random_tokens(TINY, 1, 65)
    with pytest.raises(ValueError, match=r"65 tokens.*64 positions"):
        forward(params, tokens, TINY)


def test_sequence_as_long_as_the_positions_is_taken():
    assert largest_difference(TINY, 1, 64) <= 2e-5


@pytest.mark.parametrize("dtype", [np.uint16, np.int64, np.uint32])
def test_tokens_may_have_any_integer_type(dtype):
    params, tokens = random_params(TINY), random_tokens(TINY, 2, 20)
    expected = ours(params, tokens, TINY)
    np.testing.assert_array_equal(ours(params, tokens.astype(dtype), TINY), expected)


def test_bfloat16_computes_in_bfloat16_and_stays_near_float32():
    params, tokens = random_params(TINY), random_tokens(TINY, 2, 50)
    whole = ours(params, tokens, TINY)
    for runtime in (Runtime(dtype="bfloat16"), Runtime(dtype="bfloat16", attention="einsum")):
        half = ours(params, tokens, TINY, runtime)
        assert half.dtype == np.float32
        assert 1e-4 < distance(half, whole) < 2e-2
    text = jax.jit(
        lambda p: forward(p, tokens, TINY, runtime=Runtime(dtype="bfloat16"))
    ).lower(params).as_text()  # fmt: skip
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and all("bf16" in line.split("->")[0] for line in products)


def test_parameters_stored_in_bfloat16_compute_in_bfloat16_unless_told_otherwise():
    params, tokens = random_params(TINY), random_tokens(TINY, 2, 50)
    stored = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    widened = jax.tree.map(lambda p: p.astype(jnp.float32), stored)
    exact = ours(widened, tokens, TINY)
    assert 1e-4 < distance(ours(stored, tokens, TINY), exact) < 2e-2
    as_float32 = ours(stored, tokens, TINY, Runtime(dtype="float32"))
    np.testing.assert_allclose(as_float32, exact, rtol=0, atol=1e-6)


def test_gradient_in_bfloat16_stays_near_float32():
    params, tokens = random_params(TINY), random_tokens(TINY, 2, 50)

    def gradient(runtime):
        return jax.jit(jax.grad(lambda p: loss(p, tokens, TINY, runtime=runtime)))(params)

    half = gradient(Runtime(dtype="bfloat16", remat="full"))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(half))
    assert max(jax.tree.leaves(jax.tree.map(distance, half, gradient(Runtime())))) < 5e-2


@pytest.mark.parametrize("wrong", [-1, TINY.vocab_size])
def test_an_id_outside_the_vocabulary_is_refused_and_under_jit_gives_nan(wrong):
    params = random_params(TINY)
    tokens = np.array([[1, 2, wrong, 3]], np.int32)
    with pytest.raises(ValueError, match=f"token {wrong} is not in the vocabulary of"):
        forward(params, tokens, TINY)
    with pytest.raises(ValueError, match=f"token {wrong} is not in the vocabulary of"):
        loss(params, tokens, TINY)
    with pytest.raises(ValueError, match=f"token {wrong} is not in the vocabulary of"):
        loss(params, tokens[:, :3], TINY)  # as a label only
    if wrong > 0:
        logits = jax.jit(lambda t: forward(params, t, TINY))(tokens)
        assert np.isnan(logits[0, 2:]).all()


@pytest.mark.parametrize(
    "tokens", [np.zeros(4, np.int32), np.zeros((1, 4)), np.zeros((1, 2, 3), int)]
)
def test_what_are_not_rows_of_ids_is_refused(tokens):
    with pytest.raises(ValueError, match="whole numbers"):
        forward(random_params(TINY), tokens, TINY)
