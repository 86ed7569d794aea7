"""Sinks: what they collect is what the gradient is made of, and without them nothing changes."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import distance, random_params, random_tokens

from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.interp import LINEAR, collect, per_example_gradients
from pythia_jax.interp.chunks import kernel_gradient
from pythia_jax.interp.factor_sums import projected_moments
from pythia_jax.interp.projection import Projection, matrices
from pythia_jax.model import gptneox, parameters
from pythia_jax.model.gptneox import forward
from pythia_jax.model.loss import loss, token_losses
from pythia_jax.model.sinks import Sink, inserted

MICRO = ModelConfig(32, 2, 4, vocab_size=64, max_position_embeddings=32)
BATCH, SEQ = 3, 12
KERNELS = [f"{module}/kernel" for module in LINEAR]
PARAMS = random_params(MICRO)
TOKENS = random_tokens(MICRO, BATCH, SEQ + 1)
RUNTIMES = {
    "scan": Runtime(),
    "unrolled": Runtime(scan_layers=False),
    "remat": Runtime(remat="full"),
    "remat of dots, small chunks": Runtime(remat="dots", loss_chunk=7),
}


def kernels(inputs, cotangents, aux):
    return jnp.einsum("bsi,bso->bio", inputs, cotangents)


def module_of(tree, module):
    for key in module.split("/"):
        tree = tree[key]
    return tree


def per_row(function):
    """Gradients of `function(params, row, index)` for every row, by vmap."""
    gradient = jax.vmap(jax.grad(function), in_axes=(None, 0, 0))
    return jax.jit(gradient)(PARAMS, jnp.asarray(TOKENS), jnp.arange(BATCH))


@pytest.fixture(scope="module")
def rows():
    return per_row(lambda p, row, i: token_losses(p, row[None], MICRO).sum())


@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES)
def test_statistic_sees_the_inputs_and_cotangents_of_its_module(runtime, rows):
    got = jax.jit(lambda p: collect(p, TOKENS, MICRO, kernels, runtime=runtime))(PARAMS)
    assert set(got) == set(LINEAR)
    for module, value in got.items():
        expected = module_of(rows, module)["kernel"].swapaxes(0, 1)
        assert value.shape == expected.shape
        assert distance(value, expected) <= 1e-6, module


def test_loss_weights_and_labels_are_those_of_the_loss():
    rng = np.random.default_rng(3)
    weights = jnp.asarray(rng.uniform(-1, 2, (BATCH, SEQ)), jnp.float32)
    labels = jnp.asarray(random_tokens(MICRO, BATCH, SEQ, seed=5))

    def weighted(p, row, i):
        logits: Any = forward(p, row[None, :-1], MICRO)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[0]), labels[i][:, None], axis=-1)
        return -(chosen[:, 0] * weights[i]).sum()

    run = partial(collect, modules=LINEAR[2:3], loss_weights=weights, labels=labels)
    got = jax.jit(lambda p: run(p, TOKENS, MICRO, kernels))(PARAMS)
    assert set(got) == {LINEAR[2]}
    expected = module_of(per_row(weighted), LINEAR[2])["kernel"].swapaxes(0, 1)
    assert distance(got[LINEAR[2]], expected) <= 1e-6


def test_every_layer_of_a_module_gets_its_own_aux_and_may_give_a_tree(rows):
    rng = np.random.default_rng(3)
    sides = {
        LINEAR[0]: {"q": jnp.asarray(rng.standard_normal((2, 96, 5)), jnp.float32)},
        LINEAR[3]: {"q": jnp.asarray(rng.standard_normal((2, 32, 5)), jnp.float32)},
    }

    def statistic(inputs, cotangents, aux):
        made = {"kernel": kernels(inputs, cotangents, None), "none": jnp.arange(3)}
        return made if aux is None else {**made, "projected": cotangents @ aux["q"]}

    got = jax.jit(lambda p: collect(p, TOKENS, MICRO, statistic, aux=sides))(PARAMS)
    for module in LINEAR:
        assert ("projected" in got[module]) == (module in sides)
    for module, aux in sides.items():
        bias = got[module]["projected"].sum(axis=2)  # over positions: the bias's gradient
        by_bias = module_of(rows, module)["bias"]
        expected = jnp.einsum("blo,lop->lbp", by_bias, aux["q"])
        assert distance(bias, expected) <= 1e-6


def test_in_bfloat16_projections_round_only_what_they_are_made_of():
    """An index's, a factor's and a per-example gradient's are NumPy's of one backward pass."""

    def statistic(inputs, cotangents, sides):
        assert inputs.dtype == cotangents.dtype == jnp.bfloat16
        moments = projected_moments(inputs, cotangents, sides)["projected"]
        return inputs, cotangents, kernel_gradient(inputs, cotangents, sides), moments

    runtime = Runtime(dtype="bfloat16")
    every = matrices(Projection(4), MICRO)
    sides = {module: every[module] for module in LINEAR}
    run = partial(collect, statistic=statistic, aux=sides, runtime=runtime)
    got = jax.jit(lambda p: run(p, TOKENS, MICRO))(PARAMS)
    rows = per_example_gradients(PARAMS, TOKENS, MICRO, projection=Projection(4), runtime=runtime)
    for module, made in got.items():
        inputs, cotangents, of_index, moments = (np.asarray(x, np.float64) for x in made)
        left = np.einsum("lop,lbso->lbsp", sides[module]["left"], cotangents)
        right = np.einsum("liq,lbsi->lbsq", sides[module]["right"], inputs)
        expected = np.einsum("lbsp,lbsq->lbpq", left, right)
        assert distance(of_index, expected) <= 1e-6
        assert distance(module_of(rows, module)["kernel"].swapaxes(0, 1), expected) <= 1e-6
        each = expected.reshape(*expected.shape[:2], -1)
        assert distance(moments, np.einsum("lbx,lby->lxy", each, each)) <= 1e-6


def test_no_gradient_of_a_kernel_is_formed():
    def products(function):
        jaxpr = jax.make_jaxpr(function)(PARAMS).jaxpr
        shapes = [sorted(p.shape(MICRO)[1:]) for p in parameters.TABLE if p.path in KERNELS]
        return sum(sorted(e.outvars[0].aval.shape) in shapes for e in products_in(jaxpr))

    bias = lambda a, g, aux: g.sum(axis=1)  # noqa: E731
    assert products(jax.grad(lambda p: loss(p, TOKENS, MICRO))) == len(LINEAR)
    assert products(lambda p: collect(p, TOKENS, MICRO, bias)) == 0


def products_in(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from products_in(inner)


@pytest.mark.slow
def test_memory_of_a_statistic_that_reduces_does_not_grow_with_layers_and_rows_and_kernels():
    """8 layers' kernels for 64 rows would take 400 MB; one layer's, 50."""
    batch, hidden = 64, 128
    tokens = random_tokens(MICRO, batch, 3)

    def temporary(layers, statistic):
        config = replace(
            MICRO, hidden_size=hidden, num_hidden_layers=layers, intermediate_size=4 * hidden
        )
        run = jax.jit(lambda p: collect(p, tokens, config, statistic))
        compiled = run.lower(parameters.abstract(config)).compile()
        analysis: Any = compiled.memory_analysis()
        return analysis.temp_size_in_bytes

    def projected(inputs, cotangents, aux):
        return kernels(inputs[..., :4], cotangents[..., :4], aux)

    def norms(inputs, cotangents, aux):
        return (kernels(inputs, cotangents, aux) ** 2).sum(axis=(1, 2))

    one_layer = 4 * batch * 12 * hidden**2  # all four modules' kernels
    assert temporary(8, projected) < one_layer
    assert temporary(8, norms) < 2 * one_layer
    assert temporary(8, norms) - temporary(2, norms) < one_layer / 2


def programs(runtime):
    jax.clear_caches()
    run = jax.jit(lambda p, t: forward(p, t[:, :-1], MICRO, runtime=runtime))
    gradient = jax.jit(jax.grad(lambda p, t: loss(p, t, MICRO, runtime=runtime)))
    return [f.lower(PARAMS, TOKENS).as_text() for f in (run, gradient)]


@pytest.mark.parametrize("remat", ["none", "full"])
def test_program_without_sinks_is_that_without_the_feature(remat, monkeypatch):
    def dense(x, weights):
        rows = x.reshape(-1, x.shape[-1])
        product = jnp.matmul(rows, weights["kernel"], precision=gptneox.attention.exact(x))
        return (product + weights["bias"]).reshape(*x.shape[:-1], -1)

    with_feature = programs(Runtime(remat=remat))
    monkeypatch.setattr(gptneox, "dense", dense)
    assert programs(Runtime(remat=remat)) == with_feature


# Mistakes.


def test_unknown_module_is_an_error_that_names_the_others():
    with pytest.raises(ValueError, match=r"no linear module 'layers/mlp'.*dense_4h_to_h"):
        collect(PARAMS, TOKENS, MICRO, kernels, modules=["layers/mlp"])
    with pytest.raises(ValueError, match="no dense layer 'embed_in'"):
        inserted(PARAMS, {"embed_in": Sink(0, None, kernels)})


def test_aux_of_a_module_not_collected_or_without_layers_is_an_error():
    with pytest.raises(ValueError, match="aux for 'layers/mlp/dense_4h_to_h'"):
        collect(PARAMS, TOKENS, MICRO, kernels, modules=LINEAR[:1], aux={LINEAR[3]: 1})
    with pytest.raises(ValueError, match=r"shape \(3,\): 2 layers"):
        collect(PARAMS, TOKENS, MICRO, kernels, aux={LINEAR[0]: jnp.zeros(3)})


@pytest.mark.parametrize("name", ["labels", "loss_weights"])
def test_labels_and_weights_of_another_shape_are_an_error(name):
    wrong: Any = {name: jnp.zeros((BATCH, SEQ + 1), jnp.int32)}
    with pytest.raises(ValueError, match=rf"{name} of shape \(3, 13\): \(3, 12\)"):
        collect(PARAMS, TOKENS, MICRO, kernels, **wrong)
