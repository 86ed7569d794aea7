"""FLOPs of a step: by hand, by the jaxpr, by XLA and by what others publish."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pythia_jax import suite
from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.model import parameters
from pythia_jax.model.loss import loss
from pythia_jax.training.flops import forward_flops, model_flops

SMALL = ModelConfig(
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=1000,
    intermediate_size=320,
    max_position_embeddings=128,
)
BATCH, SEQ = 2, 128


def test_a_tiny_model_counted_by_hand() -> None:
    config = ModelConfig(
        hidden_size=4, num_hidden_layers=3, num_attention_heads=2, vocab_size=10, rotary_pct=1.0
    )
    assert forward_flops(config, batch=5, seq=6) == {
        # 30 tokens through (4, 12), (4, 4), (4, 16) and (16, 4), in each of 3 layers.
        "dense": 3 * 2 * 30 * (4 * 12 + 4 * 4 + 4 * 16 + 16 * 4),
        # 5 rows, 2 heads of 2: q k^T is (6, 2) x (2, 6), pattern v is (6, 6) x (6, 2); halved.
        "attention": 3 * 5 * 2 * (2 * 6 * 2 * 6 + 2 * 6 * 6 * 2) / 2,
        "unembedding": 2 * 30 * 4 * 10,
    }
    assert model_flops(config, 5, 6) == 3 * (34560 + 4320 + 2400)


def gradient(runtime: Runtime, config: ModelConfig = SMALL) -> tuple[Any, Any, Any]:
    """The gradient of the loss as a function, and the shapes that it takes."""
    f = jax.grad(partial(loss, config=config, runtime=runtime))
    return f, parameters.abstract(config), jax.ShapeDtypeStruct((BATCH, SEQ + 1), jnp.int32)


def products(jaxpr: Any) -> int:
    """2mnk of every product of matrices in a jaxpr, loops taken as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            output = math.prod(equation.outvars[0].aval.shape)
            total += 2 * output * math.prod(left[axis] for axis in contracted)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            total += times * products(inner) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize("loss_chunk", [64, 4096])
def test_the_products_of_a_gradient_are_what_is_counted(loss_chunk: int) -> None:
    # einsum computes the masked half as well, which the convention leaves out.
    runtime = Runtime(attention="einsum", remat="none", loss_chunk=loss_chunk)
    f, params, tokens = gradient(runtime)
    masked = 3 * forward_flops(SMALL, BATCH, SEQ)["attention"]
    assert (
        products(jax.make_jaxpr(f)(params, tokens).jaxpr) == model_flops(SMALL, BATCH, SEQ) + masked
    )


def test_xla_counts_the_same_but_for_elementwise_work() -> None:
    # Unrolled and in one chunk, for XLA counts the body of a loop once.
    runtime = Runtime(attention="einsum", remat="none", scan_layers=False, loss_chunk=BATCH * SEQ)
    f, params, tokens = gradient(runtime)
    cost = jax.jit(f).lower(params, tokens).compile().cost_analysis()
    assert cost is not None
    masked = 3 * forward_flops(SMALL, BATCH, SEQ)["attention"]
    ours = model_flops(SMALL, BATCH, SEQ) + masked
    assert 1.0 <= cost["flops"] / ours < 1.06


def narayanan(layers: int, hidden: int, vocab: int, batch: int, seq: int) -> float:
    """Narayanan et al. 2021, equation of section 5.1, less its recomputation (a quarter)."""
    return (
        72
        * batch
        * seq
        * layers
        * hidden**2
        * (1 + seq / (6 * hidden) + vocab / (12 * layers * hidden))
    )


@pytest.mark.parametrize("size", list(suite.SUITE))
def test_megatrons_formula_is_ours_with_all_pairs(size: str) -> None:
    config, entry = ModelConfig.from_size(size), suite.lookup(size)
    masked = 3 * forward_flops(config, 1024, 2048)["attention"]
    published = narayanan(
        entry.num_hidden_layers, entry.hidden_size, entry.vocab_size, batch=1024, seq=2048
    )
    assert model_flops(config, 1024, 2048) + masked == pytest.approx(published, rel=1e-12)


def test_six_times_the_parameters_is_near_for_large_models() -> None:
    config = ModelConfig.from_size("12b")
    used = parameters.count(config) - config.vocab_size * config.hidden_size  # no lookup
    ratio = model_flops(config, 1, 2048) / (6 * used * 2048)
    # What is left is attention: seq / (12 hidden) of the weights of a layer, 3.3 %.
    assert 1.03 < ratio < 1.035
