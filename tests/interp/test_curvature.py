"""Second order against dense matrices: of a model of some 1,500 parameters, in float64."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.flatten_util import ravel_pytree
from reference import (
    distance,
    hf_gradients,
    hf_model,
    hf_token_losses,
    random_params,
    random_tokens,
)

from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.interp import preflight
from pythia_jax.interp.curvature import (
    fisher_diagonal,
    ggn_vp,
    hessian_density,
    hessian_top_eigenvalues,
    hvp,
    lanczos,
)
from pythia_jax.model import parameters
from pythia_jax.model.gptneox import forward

MICRO = ModelConfig(
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    vocab_size=17,
    intermediate_size=16,
    max_position_embeddings=8,
    rotary_pct=0.5,
    hidden_act="gelu",
)
RUNTIME = Runtime(attention="einsum", loss_chunk=6)  # of 2 positions and 1, the last one padded
TOKENS = random_tokens(MICRO, 3, 6)


@dataclass(frozen=True)
class Dense:
    """The plain loss's own matrices, at these parameters."""

    params: Any
    unravel: Any
    hessian: np.ndarray
    ggn: np.ndarray


def row_losses(params: Any, tokens: Any) -> jax.Array:
    """Losses of all tokens, the plain way."""
    logits: Any = forward(params, tokens[:, :-1], MICRO, runtime=RUNTIME)
    taken = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
    return -taken[..., 0]


@pytest.fixture(scope="module")
def dense() -> Iterator[Dense]:
    with jax.enable_x64(True):
        params = random_params(MICRO, dtype=np.float64)
        flat, unravel = ravel_pytree(params)
        assert flat.size <= 3000

        def logits_of(flat: jax.Array) -> jax.Array:
            logits: Any = forward(unravel(flat), TOKENS[:, :-1], MICRO, runtime=RUNTIME)
            return logits.reshape(-1, MICRO.vocab_size)

        def mean_loss(flat: jax.Array) -> jax.Array:
            return row_losses(unravel(flat), TOKENS).mean()

        hessian = jax.jit(jax.hessian(mean_loss))(flat)
        jacobian = np.asarray(jax.jit(jax.jacfwd(logits_of))(flat))
        p = np.asarray(jax.nn.softmax(logits_of(flat)))
        by_logits = np.einsum("tv,vw->tvw", p, np.eye(p.shape[1])) - np.einsum("tv,tw->tvw", p, p)
        curved = np.einsum("tvw,twn->tvn", by_logits, jacobian)
        ggn = np.einsum("tvm,tvn->mn", jacobian, curved) / len(p)
        yield Dense(params, unravel, np.asarray(hessian), ggn)


def directions(dense: Dense, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return dense.unravel(jnp.asarray(rng.standard_normal(dense.hessian.shape[0])))


def flat(tree: Any) -> np.ndarray:
    return np.asarray(ravel_pytree(tree)[0])


@pytest.mark.parametrize("name", ["hessian", "ggn"])
def test_products_equal_those_with_the_dense_matrix(dense: Dense, name: str) -> None:
    product = {"hessian": hvp, "ggn": ggn_vp}[name]
    matrix = getattr(dense, name)
    vector = directions(dense, 0)
    got = product(dense.params, TOKENS, MICRO, vector, runtime=RUNTIME)
    assert distance(flat(got), matrix @ flat(vector)) <= 1e-10


def test_float32_products_are_within_1e_5_of_the_dense_matrix_and_symmetric(dense: Dense) -> None:
    params, u, v = (
        jax.tree.map(lambda x: x.astype(np.float32), tree)
        for tree in (dense.params, directions(dense, 1), directions(dense, 2))
    )
    for product, matrix in ((hvp, dense.hessian), (ggn_vp, dense.ggn)):
        of_u, of_v = (
            flat(product(params, TOKENS, MICRO, x, runtime=RUNTIME)).astype(np.float64)
            for x in (u, v)
        )
        assert distance(of_u, matrix @ flat(u).astype(np.float64)) <= 1e-5
        size = np.linalg.norm(of_u) * np.linalg.norm(flat(v))
        assert abs(of_u @ flat(v) - of_v @ flat(u)) <= 1e-6 * size


def test_a_product_over_batches_is_that_over_all_their_tokens(dense: Dense) -> None:
    vector = directions(dense, 3)
    parts = [TOKENS[:2], TOKENS[2:]]
    for product, matrix in ((hvp, dense.hessian), (ggn_vp, dense.ggn)):
        got = product(dense.params, parts, MICRO, vector, runtime=RUNTIME)
        assert distance(flat(got), matrix @ flat(vector)) <= 1e-10


def test_a_hessian_product_equals_torch_differentiating_twice(dense: Dense) -> None:
    vector = directions(dense, 4)
    model = hf_model(dense.params, MICRO, torch.float64).train()
    ours = hvp(dense.params, TOKENS, MICRO, vector, runtime=RUNTIME)
    named = dict(model.named_parameters())
    first = torch.autograd.grad(
        hf_token_losses(model, TOKENS).mean(), list(named.values()), create_graph=True
    )
    along = hf_model(vector, MICRO, torch.float64)
    pairs = zip(first, along.parameters(), strict=True)
    sum((g * v.detach()).sum() for g, v in pairs).backward()  # type: ignore[union-attr]
    theirs = hf_gradients(model, MICRO)
    for parameter, value in parameters.items(ours):
        assert distance(value, theirs[parameter.path]) <= 1e-5, parameter.path


def test_top_eigenvalues_equal_those_of_the_dense_matrix(dense: Dense) -> None:
    values, vectors, residuals = hessian_top_eigenvalues(
        dense.params, TOKENS, MICRO, 4, 60, jax.random.key(0), runtime=RUNTIME
    )
    wanted, basis = np.linalg.eigh(dense.hessian)
    np.testing.assert_allclose(values, wanted[::-1][:4], rtol=1e-6)
    assert (np.asarray(residuals) <= 1e-3 * wanted[-1]).all()
    for i in range(4):
        vector = flat(jax.tree.map(lambda x, i=i: x[i], vectors))
        assert abs(vector @ basis[:, -1 - i]) >= 1 - 1e-5
        left = dense.hessian @ vector - float(values[i]) * vector
        assert np.linalg.norm(left) == pytest.approx(float(residuals[i]), rel=1e-3, abs=1e-9)


def test_few_iterations_say_by_their_residuals_that_they_were_too_few(dense: Dense) -> None:
    values, _, residuals = hessian_top_eigenvalues(
        dense.params, TOKENS, MICRO, 3, 5, jax.random.key(1), runtime=RUNTIME
    )
    wanted = np.linalg.eigvalsh(dense.hessian)
    gaps = np.abs(np.asarray(values)[:, None] - wanted).min(axis=1)
    assert (gaps <= np.asarray(residuals) + 1e-12).all()
    assert (np.asarray(residuals) > 1e-3 * wanted[-1]).any()


def test_the_density_has_the_moments_of_the_spectrum_and_integrates_to_1(dense: Dense) -> None:
    probes, size = 6, len(dense.hessian)
    grid, density = (
        np.asarray(x)
        for x in hessian_density(
            dense.params,
            TOKENS,
            MICRO,
            20,
            jax.random.key(0),
            probes=probes,
            points=4000,
            width=0.003,
            runtime=RUNTIME,
        )
    )
    assert (density >= 0).all()
    assert np.trapezoid(density, grid) == pytest.approx(1, abs=1e-3)
    sigma = 0.003 * (grid[-1] - grid[0]) / (1 + 12 * 0.003)
    for power, widening in ((1, 0.0), (2, sigma**2)):
        matrix = np.linalg.matrix_power(dense.hessian, power)
        moment = np.trapezoid(density * grid**power, grid) - widening
        # Hutchinson's estimate with signs: all that varies are the entries off the diagonal.
        off = (matrix**2).sum() - (np.diag(matrix) ** 2).sum()
        error = np.sqrt(2 * off / probes) / size
        assert abs(moment - np.trace(matrix) / size) <= 3 * error
        assert error < np.sqrt((matrix**2).sum() / size), "too noisy to tell anything"


def test_lanczos_goes_on_where_the_space_is_exhausted() -> None:
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.zeros(x.shape), parameters.abstract(MICRO))
        start = jax.tree.map(lambda x: jnp.ones(x.shape), params)
        # Twice the identity: the first vector's space is the whole space of its products.
        diagonal, off, basis = lanczos(
            lambda v: jax.tree.map(lambda x: 2 * x, v), start, 4, jax.random.key(0)
        )
    np.testing.assert_allclose(diagonal, 2)
    np.testing.assert_allclose(off, 0)
    rows = np.concatenate([np.asarray(x).reshape(4, -1) for x in jax.tree.leaves(basis)], axis=1)
    np.testing.assert_allclose(rows @ rows.T, np.eye(4), atol=1e-12)


def test_the_fisher_diagonal_is_the_mean_of_squared_gradients_of_rows(dense: Dense) -> None:
    got = fisher_diagonal(dense.params, [TOKENS[:1], TOKENS[1:]], MICRO, runtime=RUNTIME)
    rows = jax.jacrev(lambda f: row_losses(dense.unravel(f), TOKENS).sum(axis=1))
    flat_params = ravel_pytree(dense.params)[0]
    wanted = (np.asarray(jax.jit(rows)(flat_params)) ** 2).mean(axis=0)
    assert distance(flat(got), wanted) <= 1e-10


def test_a_row_without_a_finite_gradient_is_named_by_the_fisher_diagonal() -> None:
    params = random_params(MICRO)
    table = params["embed_in"]["embedding"]
    broken = {**params, "embed_in": {"embedding": table.at[int(TOKENS[1, 0])].set(np.nan)}}
    rows = np.where(TOKENS[1, 0] == TOKENS, (TOKENS[1, 0] + 1) % 17, TOKENS)
    rows[1] = TOKENS[1]
    with pytest.raises(ValueError, match="row 1"):
        fisher_diagonal(broken, rows, MICRO, runtime=RUNTIME)


def test_a_product_that_is_no_number_is_refused_with_what_made_it_so() -> None:
    params, nan = random_params(MICRO), np.float32(np.nan)
    table = params["embed_in"]["embedding"]

    def refused(words: str, params: Any = params, **vector: Any) -> None:
        along = {**params, **vector}
        for product in (hvp, ggn_vp):
            with pytest.raises(ValueError, match="the product is not finite: " + words):
                product(params, [TOKENS, TOKENS], MICRO, along, runtime=RUNTIME)

    token = int(np.setdiff1d(TOKENS[2, :-1], TOKENS[:2])[0])  # of row 2 alone
    broken = {"embed_in": {"embedding": table.at[token, 2].set(nan)}}
    refused("parameter embed_in/embedding is not", params={**params, **broken})
    refused("the vector's embed_in/embedding is not", **broken)
    scale = jnp.full_like(params["final_layer_norm"]["scale"], 3e38)
    large = {**params, "final_layer_norm": {**params["final_layer_norm"], "scale": scale}}
    refused("nor is the gradient of row 0 of batch 0", params=large, **params)
    refused("every row's gradient is, so it overflowed", embed_in={"embedding": 3e38 * table})


def test_vectors_that_do_not_fit_are_refused_with_the_numbers(monkeypatch: Any) -> None:
    params, key = random_params(MICRO), jax.random.key(0)
    monkeypatch.setattr(preflight, "host_memory", lambda: 100_000)
    size = 4 * parameters.count(MICRO)
    told = f"Lanczos with 50 vectors .* takes {preflight.in_bytes(size * 54)} of memory"
    with pytest.raises(MemoryError, match=told):
        hessian_density(params, TOKENS, MICRO, 50, key)
    with pytest.raises(MemoryError, match=preflight.in_bytes(size * 56)):
        hessian_top_eigenvalues(params, TOKENS, MICRO, 2, 50, key)


def test_what_does_not_fit_is_refused() -> None:
    params = random_params(MICRO)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="first derivatives only"):
        hvp(params, TOKENS, MICRO, params, runtime=Runtime(attention="splash"))
    with pytest.raises(ValueError, match="names and shapes"):
        hvp(params, TOKENS, MICRO, {"embed_in": params["embed_in"]})
    with pytest.raises(ValueError, match="list of one or more"):
        ggn_vp(params, [], MICRO, params)
    with pytest.raises(ValueError, match="not in the vocabulary"):
        ggn_vp(params, TOKENS + 17, MICRO, params)
    with pytest.raises(ValueError, match="k = 5"):
        hessian_top_eigenvalues(params, TOKENS, MICRO, 5, 4, key)
    with pytest.raises(ValueError, match="0 iterations"):
        hessian_density(params, TOKENS, MICRO, 0, key)
