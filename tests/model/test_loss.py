"""The loss in chunks is the plain loss: its value and every kind of derivative."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import (
    TINY,
    distance,
    hf_gradients,
    hf_model,
    hf_token_losses,
    random_params,
    random_tokens,
)

from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.model import parameters
from pythia_jax.model.gptneox import forward
from pythia_jax.model.loss import fused_cross_entropy, loss, token_cross_entropy, token_losses

FORMS = ("fused", "remat")
BATCH, SEQ = 3, 23  # a prime, which no chunk divides
CHUNKS = (1, 7, 16, 10**6)


def plain_losses(params, tokens, config):
    logits: Any = forward(params, tokens[:, :-1], config)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)[..., 0]


def plain_loss(params, tokens, config, weights=None):
    rows = plain_losses(params, tokens, config).sum(axis=1)
    weights = jnp.ones(len(tokens)) if weights is None else weights
    return (rows * weights).sum() / (tokens.shape[0] * (tokens.shape[1] - 1))


# The head of the model alone, where all that is under test happens and little is compiled.
def head_inputs(dtype=np.float32):
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((BATCH, SEQ, 16)).astype(dtype)
    kernel = (0.5 * rng.standard_normal((16, 131))).astype(dtype)
    weights = rng.uniform(0.1, 2, BATCH).astype(dtype)
    labels = rng.integers(0, 131, (BATCH, SEQ)).astype(np.int32)
    return (jnp.asarray(hidden), jnp.asarray(kernel), jnp.asarray(weights)), jnp.asarray(labels)


def plain_head(hidden, kernel, weights, labels):
    log_probabilities = jax.nn.log_softmax(jnp.einsum("bsh,hv->bsv", hidden, kernel))
    chosen = jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1)[..., 0]
    return -(chosen * weights[:, None]).sum()


def head(form, chunk):
    def fused(hidden, kernel, weights, labels):
        return fused_cross_entropy(hidden, kernel, weights, labels, chunk)

    def remat(hidden, kernel, weights, labels):
        return (token_cross_entropy(hidden, kernel, labels, chunk) * weights[:, None]).sum()

    return {"fused": fused, "remat": remat}[form]


def directions_like(tree, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), tree)


def largest_distance(got, wanted):
    return max(jax.tree.leaves(jax.tree.map(distance, got, wanted)))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("form", FORMS)
def test_value_gradient_and_directional_derivative_equal_the_plain_loss(form, chunk):
    inputs, labels = head_inputs()
    directions = directions_like(inputs)

    def everything(function):
        def run(inputs, directions):
            scalar = lambda x: function(*x, labels)  # noqa: E731
            return (jax.value_and_grad(scalar)(inputs), jax.jvp(scalar, (inputs,), (directions,)))

        return jax.jit(run)(inputs, directions)

    assert largest_distance(everything(head(form, chunk)), everything(plain_head)) <= 2e-6


@pytest.mark.parametrize("form", FORMS)
def test_hessian_product_equals_that_of_the_plain_loss(form):
    inputs, labels = head_inputs()
    directions = directions_like(inputs)

    def product(function):
        gradient = jax.grad(lambda x: function(*x, labels))
        return jax.jit(lambda x, d: jax.jvp(gradient, (x,), (d,))[1])(inputs, directions)

    assert largest_distance(product(head(form, 16)), product(plain_head)) <= 5e-6


@pytest.mark.parametrize("form", FORMS)
def test_reverse_over_reverse_equals_that_of_the_plain_loss(form):
    inputs, labels = head_inputs()

    def of_squared_gradient(function):
        def squared(x):
            leaves = jax.tree.leaves(jax.grad(lambda x: function(*x, labels))(x))
            return sum((leaf**2).sum() for leaf in leaves)

        return jax.jit(jax.grad(squared))(inputs)

    got = of_squared_gradient(head(form, 16))
    assert largest_distance(got, of_squared_gradient(plain_head)) <= 5e-6


@pytest.mark.parametrize("form", FORMS)
def test_third_derivative_equals_that_of_the_plain_loss(form):
    inputs, labels = head_inputs()
    directions = directions_like(inputs)

    def third(function):
        def along(f):
            return lambda x: jax.jvp(f, (x,), (directions,))[1]

        return jax.jit(along(along(along(lambda x: function(*x, labels)))))(inputs)

    assert distance(third(head(form, 16)), third(plain_head)) <= 2e-5


@pytest.mark.parametrize("argument", [0, 1, 2], ids=["hidden", "kernel", "weights"])
def test_derivative_by_one_argument_alone_is_the_same(argument):
    inputs, labels = head_inputs()
    got = jax.grad(head("fused", 16), argnums=argument)(*inputs, labels)
    assert distance(got, jax.grad(plain_head, argnums=argument)(*inputs, labels)) <= 2e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_logits_far_beyond_the_range_of_exp_give_finite_losses_and_gradients(form, scale):
    (hidden, kernel, weights), labels = head_inputs()
    function = jax.value_and_grad(lambda h: head(form, 16)(h, kernel, weights, labels))
    value, gradient = function(scale * hidden)
    reference = jax.value_and_grad(lambda h: plain_head(h, kernel, weights, labels))(scale * hidden)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert distance(value, reference[0]) <= 2e-6
    assert distance(gradient, reference[1]) <= 1e-5


# The whole model.


def hessian_product(function):
    params = random_params(TINY)
    directions = jax.tree.map(lambda d: 0.1 * d, directions_like(params))
    return jax.jit(lambda p, d: jax.jvp(jax.grad(function), (p,), (d,))[1])(params, directions)


@pytest.fixture(scope="module")
def plain_derivatives():
    params, tokens = random_params(TINY), random_tokens(TINY, BATCH, SEQ + 1)
    by_both = jax.value_and_grad(lambda p, w: plain_loss(p, tokens, TINY, w), argnums=(0, 1))
    first = jax.jit(by_both)(params, jnp.asarray([0.5, 2.0, 0.0]))
    return first, hessian_product(lambda p: plain_loss(p, tokens, TINY))


@pytest.mark.parametrize("form", FORMS)
def test_derivatives_through_the_whole_model_equal_those_of_the_plain_loss(form, plain_derivatives):
    params, tokens = random_params(TINY), random_tokens(TINY, BATCH, SEQ + 1)
    runtime = Runtime(loss=form, loss_chunk=16)

    def ours(p, w=None):
        return loss(p, tokens, TINY, w, runtime=runtime)

    weights = jnp.asarray([0.5, 2.0, 0.0])
    first = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(params, weights)
    assert largest_distance(first, plain_derivatives[0]) <= 5e-6
    assert largest_distance(hessian_product(ours), plain_derivatives[1]) <= 2e-5


def test_per_example_gradients_by_vmap_equal_those_of_each_example():
    params, tokens = random_params(TINY), jnp.asarray(random_tokens(TINY, BATCH, SEQ + 1))
    runtime = Runtime(loss_chunk=7)
    gradient = jax.grad(lambda p, row: loss(p, row[None], TINY, runtime=runtime))
    together = jax.jit(jax.vmap(gradient, in_axes=(None, 0)))(params, tokens)
    plain = jax.jit(jax.grad(lambda p, row: plain_loss(p, row[None], TINY)))
    for i, row in enumerate(tokens):
        alone = jax.tree.map(lambda g, i=i: g[i], together)
        assert largest_distance(alone, plain(params, row)) <= 5e-6


def test_gradient_of_a_gradient_norm_through_the_whole_model_in_the_remat_form():
    params, tokens = random_params(TINY), random_tokens(TINY, 2, 12)

    def of_squared_gradient(function):
        def squared(p):
            return sum((leaf**2).sum() for leaf in jax.tree.leaves(jax.grad(function)(p)))

        return jax.jit(jax.grad(squared))(params)

    runtime = Runtime(loss="remat", loss_chunk=7)
    got = of_squared_gradient(lambda p: loss(p, tokens, TINY, runtime=runtime))
    wanted = of_squared_gradient(lambda p: plain_loss(p, tokens, TINY))
    assert largest_distance(got, wanted) <= 2e-5


def test_weights_multiply_rows_and_leave_the_divisor():
    params, tokens = random_params(TINY), random_tokens(TINY, BATCH, SEQ + 1)
    run = jax.jit(lambda w: loss(params, tokens, TINY, w))
    rows = np.asarray(token_losses(params, tokens, TINY)).sum(axis=1) / (BATCH * SEQ)
    for weights in ([1, 1, 1], [0, 0, 0], [2, 0, -1], [0.25, 3, 1]):
        value = run(jnp.asarray(weights, jnp.float32))
        np.testing.assert_allclose(value, np.dot(rows, weights), rtol=1e-6, atol=1e-6)
    # Linear in the weights: the derivative is each row's share of the loss.
    np.testing.assert_allclose(jax.grad(run)(jnp.ones(BATCH)), rows, rtol=1e-6)
    np.testing.assert_allclose(run(jnp.ones(BATCH)), loss(params, tokens, TINY), rtol=1e-7)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_loss_is_the_mean_of_token_losses(chunk):
    params, tokens = random_params(TINY), random_tokens(TINY, BATCH, SEQ + 1)
    runtime = Runtime(loss_chunk=chunk)
    each = jax.jit(lambda p: token_losses(p, tokens, TINY, runtime=runtime))(params)
    assert each.shape == (BATCH, SEQ) and each.dtype == jnp.float32
    mean = jax.jit(lambda p: loss(p, tokens, TINY, runtime=runtime))(params)
    assert abs(mean - np.asarray(each, np.float64).mean()) <= 1e-6


def test_token_losses_equal_those_of_torch():
    params, tokens = random_params(TINY), random_tokens(TINY, BATCH, SEQ + 1)
    theirs = hf_token_losses(hf_model(params, TINY), tokens).detach().numpy()
    assert np.abs(token_losses(params, tokens, TINY) - theirs).max() <= 1e-5


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig.from_size("14m"),
        replace(TINY, hidden_size=80, num_attention_heads=5),
        replace(TINY, rotary_pct=0.5, hidden_act="gelu_pytorch_tanh"),
        replace(TINY, rotary_pct=1.0, use_parallel_residual=False, vocab_size=131),
        ModelConfig(512, 2, 2, vocab_size=160, hidden_act="gelu"),
    ],
    ids=["14m", "five heads", "half rotary", "sequential", "heads of 256"],
)
def test_gradients_equal_those_of_torch_tensor_by_tensor(config):
    params, tokens = random_params(config), random_tokens(config, 2, 64)
    model = hf_model(params, config)
    hf_token_losses(model, tokens).mean().backward()
    theirs = hf_gradients(model, config)
    gradient = jax.jit(jax.grad(lambda p: loss(p, tokens, config)))(params)
    heads, size = config.num_attention_heads, config.head_size
    for parameter, ours in parameters.items(gradient):
        expected = theirs[parameter.path]
        if parameter.path == "layers/attention/query_key_value/bias":
            # A key bias shifts all scores of a query alike where no rotation makes it depend on
            # the position: its gradient there is 0 but for rounding.
            ours, expected = (np.reshape(g, (-1, heads, 3, size)) for g in (ours, expected))
            unrotated = (..., 1, slice(config.rotary_size, None))
            assert np.abs(ours[unrotated]).max(initial=0) <= 1e-7
            assert np.abs(expected[unrotated]).max(initial=0) <= 1e-7
            ours, expected = (g.reshape(len(g), -1) for g in (ours, expected))
        if not parameter.stacked:
            ours, expected = ours[None], expected[None]
        for layer in range(len(expected)):
            assert distance(ours[layer], expected[layer]) <= 1e-5, (parameter.path, layer)


# What is computed and held.


def equations(jaxpr):
    """All equations of a jaxpr, those inside its calls and loops too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def shapes(jaxpr):
    return {getattr(v.aval, "shape", ()) for e in equations(jaxpr.jaxpr) for v in e.outvars}


@pytest.mark.parametrize("form", FORMS)
def test_logits_of_the_batch_never_exist(form):
    params, tokens = random_params(TINY), random_tokens(TINY, 4, 33)
    whole = 4 * 32 * TINY.vocab_size

    def has_all_logits(function):
        found = shapes(jax.make_jaxpr(jax.grad(function))(params))
        return any(TINY.vocab_size in s and np.prod(s, dtype=int) >= whole for s in found)

    runtime = Runtime(loss=form, loss_chunk=32)
    assert not has_all_logits(lambda p: loss(p, tokens, TINY, runtime=runtime))
    assert has_all_logits(lambda p: plain_loss(p, tokens, TINY))


def products_of_shape(function, argument, shape):
    jaxpr = jax.make_jaxpr(jax.grad(function))(argument).jaxpr
    products = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    return sum(sorted(e.outvars[0].aval.shape) == sorted(shape) for e in products)


def test_gradient_by_an_activation_does_not_compute_that_of_the_unembedding():
    params, tokens = random_params(TINY), random_tokens(TINY, 2, 33)
    unembedding = (TINY.hidden_size, TINY.vocab_size)
    by_tap = lambda tap: loss(params, tokens, TINY, taps={"ln_final": tap})  # noqa: E731
    assert products_of_shape(by_tap, jnp.zeros((2, 32, TINY.hidden_size)), unembedding) == 0
    by_params = lambda p: loss(p, tokens, TINY)  # noqa: E731
    assert products_of_shape(by_params, params, unembedding) == 1


def test_fused_form_computes_each_logit_once():
    params, tokens = random_params(TINY), random_tokens(TINY, 2, 33)

    def unembedding_products(form):
        runtime = Runtime(loss=form, loss_chunk=16)
        jaxpr = jax.make_jaxpr(jax.grad(lambda p: loss(p, tokens, TINY, runtime=runtime)))(params)
        found = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
        return sum(TINY.vocab_size in v.aval.shape for e in found for v in (*e.invars, *e.outvars))

    # Logits, gradient of hidden, gradient of the kernel: two mentions of the vocabulary each.
    assert unembedding_products("fused") == 6
    assert unembedding_products("remat") == 8


@pytest.mark.parametrize("shape", [(3,), (3, 1), (2, 3, 4)])
def test_tokens_of_another_shape_are_an_error_that_gives_it(shape):
    tokens: Any = np.zeros(shape, np.int32)
    for function in (loss, token_losses):
        with pytest.raises(ValueError, match=r"shape \(.*\[batch, seq \+ 1\]"):
            function(random_params(TINY), tokens, TINY)


@pytest.mark.parametrize("shape", [(), (1,), (BATCH + 1,), (BATCH, 1), (BATCH, SEQ)])
def test_weights_of_another_shape_are_an_error(shape):
    params, tokens = random_params(TINY), random_tokens(TINY, BATCH, SEQ + 1)
    with pytest.raises(ValueError, match="weights"):
        loss(params, tokens, TINY, jnp.ones(shape))


def test_weights_may_be_a_numpy_array_or_integers():
    params, tokens = random_params(TINY), random_tokens(TINY, BATCH, SEQ + 1)
    expected = loss(params, tokens, TINY)
    given: list[Any] = [np.ones(BATCH), np.ones(BATCH, np.int64)]
    for weights in given:
        np.testing.assert_allclose(loss(params, tokens, TINY, weights), expected, rtol=1e-7)


def test_loss_in_bfloat16_is_formed_in_float32_and_stays_near():
    params, tokens = random_params(TINY), random_tokens(TINY, BATCH, SEQ + 1)
    value = loss(params, tokens, TINY, runtime=Runtime(dtype="bfloat16"))
    assert value.dtype == jnp.float32
    assert abs(value - loss(params, tokens, TINY)) <= 2e-2


def test_loss_of_uniform_logits_is_the_log_of_the_vocabulary():
    params, tokens = random_params(TINY), random_tokens(TINY, BATCH, SEQ + 1)
    flat = {**params, "embed_out": {"kernel": jnp.zeros_like(params["embed_out"]["kernel"])}}
    np.testing.assert_allclose(token_losses(flat, tokens, TINY), np.log(TINY.vocab_size), rtol=1e-6)
