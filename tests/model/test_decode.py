"""Prefill and decode with the cache against the forward pass without it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_inputs import distance, random_params, random_tokens

from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.model import cache, decode, gptneox
from pythia_jax.model.parameters import Parameter, Params, map_parameters
from pythia_jax.model.quantize import Quantized, quantize

CONFIG = ModelConfig(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=3,
    vocab_size=130,
    max_position_embeddings=64,
)
START = np.array([3, 9, 1])
"""Tokens of each row that are given; the rest come one by one."""


def decoded(
    params: Params, tokens: np.ndarray, dtype: str, runtime: Runtime = Runtime()
) -> list[tuple[np.ndarray, jax.Array]]:
    """Positions and logits, step after step, of rows whose prompts are of unequal length."""
    batch, width = tokens.shape
    served = decode.serving(params, runtime)
    caches = cache.empty(CONFIG, batch, width, dtype)
    given, rows = tokens[:, : START.max()], np.arange(batch)
    _, caches = decode.prefill(served, given, caches, rows, CONFIG, runtime)
    step = jax.jit(partial(decode.step, config=CONFIG))
    made = []
    for position in START + np.arange(width - START.max())[:, None]:
        token = tokens[np.arange(batch), position]
        hidden, caches = step(served, jnp.asarray(token), jnp.asarray(position), caches)
        made.append((position, gptneox.unembed(served, hidden)))
    return made


@pytest.mark.parametrize(
    ("dtype", "error"), [("float32", 1e-6), ("bfloat16", 0.01), ("int8", 0.02)]
)
def test_logits_with_the_cache_are_those_without(dtype: str, error: float) -> None:
    params, tokens = random_params(CONFIG), random_tokens(CONFIG, 3, 25)
    whole = np.asarray(gptneox.forward(params, tokens, CONFIG))
    for position, logits in decoded(params, tokens, dtype):
        assert distance(logits, whole[np.arange(3), position]) < error


def test_a_slot_that_is_not_finite_is_not_kept_as_if_it_were() -> None:
    new = jnp.ones((2, 3, 16)).at[1, 2, 5].set(jnp.nan)
    kept = cache.put(cache.empty(CONFIG, 2, 4, "int8")[0][0], new, jnp.int32(1))
    assert kept.scale is not None
    found = kept.values[:, :, 1] * kept.scale[:, :, 1, None]
    assert np.isnan(found[1, 2]).all() and np.isfinite(found[0]).all()


def test_a_cache_in_int8_takes_the_bytes_that_it_says() -> None:
    kept, plain = (cache.empty(CONFIG, 2, 32, dtype) for dtype in ("int8", "float32"))
    sizes = [sum(x.nbytes for x in jax.tree.leaves(each)) for each in (kept, plain)]
    assert sizes[0] / sizes[1] == (16 + 4) / (16 * 4)


def test_computing_in_bfloat16_is_the_forward_pass_in_bfloat16() -> None:
    params, tokens = random_params(CONFIG), random_tokens(CONFIG, 3, 20)
    runtime = Runtime(dtype="bfloat16")
    whole = np.asarray(gptneox.forward(params, tokens, CONFIG, runtime=runtime))
    assert decode.dtype_of(decode.serving(params, runtime)) == "bfloat16"
    for position, logits in decoded(params, tokens, "bfloat16", runtime):
        assert distance(logits, whole[np.arange(3), position]) < 0.01


@pytest.mark.parametrize("dynamic", [False, True])
def test_weights_in_int8_decode_as_their_forward_pass(dynamic: bool) -> None:
    def leaf(parameter: Parameter, value: jax.Array) -> jax.Array | Quantized:
        if len(parameter.axes) - parameter.stacked < 2:
            return value
        turned = np.asarray(value).swapaxes(-1, -2) if parameter.transposed else np.asarray(value)
        values, scale = quantize(turned)
        return Quantized(jnp.asarray(values), jnp.asarray(scale), dynamic)

    params, tokens = map_parameters(leaf, random_params(CONFIG)), random_tokens(CONFIG, 3, 20)
    whole = np.asarray(gptneox.forward(params, tokens, CONFIG))
    for position, logits in decoded(params, tokens, "float32"):
        # Activations are rounded too, a little otherwise after other sums.
        assert distance(logits, whole[np.arange(3), position]) < (0.01 if dynamic else 2e-4)


def test_layers_served_on_a_cpu_are_no_copies() -> None:
    params = random_params(CONFIG)
    stacked = params["layers"]["mlp"]["dense_h_to_4h"]["kernel"]
    served = decode.serving(params, Runtime())["layers"]
    size = stacked.nbytes // CONFIG.num_hidden_layers
    for i, layer in enumerate(served):
        kernel = layer["mlp"]["dense_h_to_4h"]["kernel"]
        np.testing.assert_array_equal(kernel, stacked[i])
        at = kernel.unsafe_buffer_pointer() - stacked.unsafe_buffer_pointer()
        assert at == i * size


def test_greedy_in_step_never_picks_what_it_must_not() -> None:
    params, tokens = random_params(CONFIG), random_tokens(CONFIG, 4, 7)
    served = decode.serving(params, Runtime())
    run = partial(jax.jit, static_argnames="never")(
        partial(decode.greedy, config=CONFIG, new_tokens=9)
    )
    never = int(run(served, tokens)[0, 0])
    rows = np.asarray(run(served, tokens, never=never))
    whole = np.concatenate([tokens, rows], axis=1)
    logits = gptneox.forward(params, whole, CONFIG)[:, 6:-1].at[..., never].set(-jnp.inf)
    np.testing.assert_array_equal(rows, logits.argmax(axis=-1))
