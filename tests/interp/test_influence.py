from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from reference import distance, random_params, random_tokens

import pythia_jax as pj
from pythia_jax import configs
from pythia_jax.interp.factors import Factors, fit_factors
from pythia_jax.interp.influence import pairwise, scores, token_scores, tracin
from pythia_jax.interp.preconditioning import adam_factors, adam_updates, precondition
from pythia_jax.interp.projection import Projection
from pythia_jax.training.optimizer import learning_rates
from pythia_jax.training.step import init_state

RUN = configs.from_dict(
    {
        "name": "tiny",
        "model": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "vocab_size": 29,
            "max_position_embeddings": 64,
        },
        "data": {"sequence_length": 7},
        "training": {"steps": 100, "batch_size": 6, "precision": "float32"},
        "optimizer": {
            "peak_learning_rate": 1e-3,
            "min_learning_rate": 1e-4,
            "row_parallel_bias_multiple": 2,
        },
    }
)
CONFIG: Any = RUN.model
PARAMS = random_params(CONFIG)
ROWS, QUERIES = random_tokens(CONFIG, 6, 8), random_tokens(CONFIG, 2, 8, seed=1)
LINEAR = ("attention/query_key_value", "attention/dense", "mlp/dense_h_to_4h", "mlp/dense_4h_to_h")

losses = jax.jit(lambda params, tokens: pj.token_losses(params, tokens, CONFIG))
gradient = jax.jit(jax.grad(lambda params, row: pj.token_losses(params, row[None], CONFIG).sum()))


def flat(tree: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")


def tree(of: dict[str, Any]) -> Any:
    return traverse_util.unflatten_dict(of, sep="/")


def gradients(tokens: np.ndarray, params: Any = PARAMS) -> dict[str, np.ndarray]:
    """By path, `[row, …]`: of each row's summed loss, one by one by jax.grad."""
    rows = [flat(gradient(params, row)) for row in tokens]
    return {path: np.stack([np.asarray(row[path]) for row in rows]) for path in rows[0]}


def dots(queries: dict[str, np.ndarray], rows: dict[str, np.ndarray]) -> np.ndarray:
    """Over the parameters of the first, in NumPy, float64."""
    sides = [
        np.concatenate(
            [np.float64(of[path]).reshape(len(of[path]), -1) for path in queries], axis=1
        )
        for of in (queries, rows)
    ]
    return sides[0] @ sides[1].T


@pytest.fixture(scope="module")
def rows() -> dict[str, np.ndarray]:
    return gradients(ROWS)


@pytest.fixture(scope="module")
def queries() -> dict[str, np.ndarray]:
    return gradients(QUERIES)


# Inner products.


def test_pairwise_is_the_inner_product_over_all_parameters(queries, rows):
    expected = dots(queries, rows)
    assert distance(pairwise(tree(queries), tree(rows)), expected) < 1e-5
    norms = [np.sqrt(np.diag(dots(of, of))) for of in (queries, rows)]
    cosines = pairwise(tree(queries), tree(rows), metric="cosine")
    assert distance(cosines, expected / np.outer(*norms)) < 1e-5


def test_pairwise_refuses_what_does_not_fit():
    row = {"final_layer_norm": {"scale": jnp.ones((2, 16))}}
    with pytest.raises(ValueError, match="choose dot or cosine"):
        pairwise(row, row, metric="l2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"final_layer_norm/bias do not fit: queries none"):
        pairwise(row, {"final_layer_norm": {"bias": jnp.ones((2, 16))}})
    with pytest.raises(ValueError, match=r"\(16,\) a row, rows \(8,\) a row"):
        pairwise(row, {"final_layer_norm": {"scale": jnp.ones((2, 8))}})
    empty = {"final_layer_norm": {"scale": jnp.ones((2, 16)).at[1].set(0)}}
    with pytest.raises(ValueError, match="train gradient of row 1 is all zero"):
        pairwise(row, empty, metric="cosine")


def test_scores_are_inner_products_with_every_parameter(queries, rows):
    assert distance(scores(PARAMS, ROWS, CONFIG, tree(queries)), dots(queries, rows)) < 1e-5


def test_scores_of_some_parameters_leave_the_others_out(queries, rows):
    some = ("layers/mlp/dense_4h_to_h/bias", "layers/input_layernorm/scale")
    own = {path: queries[path] for path in some}
    assert distance(scores(PARAMS, ROWS, CONFIG, tree(own)), dots(own, rows)) < 1e-5


def test_token_scores_add_up_to_those_of_rows(queries, rows):
    found = token_scores(PARAMS, ROWS, CONFIG, tree(queries))
    assert found.shape == (2, 6, 7)
    assert distance(found.sum(axis=2), dots(queries, rows)) < 1e-5


def test_a_small_step_on_a_row_changes_a_query_by_minus_their_score():
    rate = 1e-6
    with jax.enable_x64(True):
        params = random_params(CONFIG, dtype=np.float64)
        row = gradient(params, ROWS[0])
        moved = jax.tree.map(lambda p, g: p - rate * g, params, row)
        change = (losses(moved, QUERIES) - losses(params, QUERIES)) / rate
        direction = jax.tree.map(lambda g: g[None], row)
        found = token_scores(params, QUERIES, CONFIG, direction)
        assert found.dtype == np.float64
        assert distance(change, -found[0]) < 1e-3
        of_rows = scores(params, QUERIES, CONFIG, direction)
        assert distance(of_rows, found.sum(axis=2)) < 1e-12


@pytest.mark.parametrize("function", [scores, token_scores])
def test_directions_that_do_not_fit_are_refused(function):
    for direction, told in (
        ({"mlp": {"bias": np.ones((1, 3))}}, "a direction of 'mlp/bias'"),
        ({"final_layer_norm": {"bias": np.ones(16)}}, r"\[queries, 16\] is wanted"),
        ({"final_layer_norm": {"bias": np.ones((1, 16)), "scale": np.ones((2, 16))}}, "same"),
        ({}, "name no parameter"),
    ):
        with pytest.raises(ValueError, match=told):
            function(PARAMS, ROWS, CONFIG, direction)


def test_a_score_that_is_no_number_names_its_row(queries):
    # The last token of the vocabulary stands in one row alone, and its embedding is NaN.
    tokens, others = ROWS.clip(max=27), QUERIES.clip(max=27)
    tokens[4, 3] = 28
    embedding = np.array(PARAMS["embed_in"]["embedding"])
    embedding[28] = np.nan
    broken = {**PARAMS, "embed_in": {"embedding": embedding}}
    with pytest.raises(ValueError, match="row 4: the score is not finite; leave"):
        scores(broken, tokens, CONFIG, tree(queries))
    with pytest.raises(ValueError, match="row 4: the score of a token is not finite"):
        token_scores(broken, tokens, CONFIG, tree(queries))
    with pytest.raises(ValueError, match="row 4: the score at step 50 is not finite"):
        tracin([(50, broken)], [tokens[:3], tokens[3:]], others, RUN)
    bias = {"final_layer_norm": {"bias": np.ones((3, 16), np.float32)}}
    wrong = {"final_layer_norm": {"bias": bias["final_layer_norm"]["bias"] * [[1], [np.nan], [1]]}}
    with pytest.raises(ValueError, match="row 1: the norm of the train gradient is not finite"):
        pairwise(bias, wrong)
    with pytest.raises(ValueError, match=r"row 1: the query's direction is not finite, in final"):
        scores(PARAMS, tokens, CONFIG, wrong)


def test_tracin_is_the_sum_over_checkpoints_with_the_runs_learning_rates(queries, rows):
    other = random_params(CONFIG, seed=4)
    found = tracin([(50, PARAMS), (100, other), (0, PARAMS)], [ROWS[:3], ROWS[3:]], QUERIES, RUN)
    expected = learning_rates(RUN.optimizer, 100)[50] * dots(queries, rows)
    expected = expected + 1e-4 * dots(gradients(QUERIES, other), gradients(ROWS, other))
    assert found.shape == (2, 6)
    assert distance(found, expected) < 1e-5
    with pytest.raises(ValueError, match="step 101 is not of this run"):
        tracin([(101, PARAMS)], ROWS, QUERIES, RUN)
    with pytest.raises(ValueError, match="no checkpoint"):
        tracin([], ROWS, QUERIES, RUN)


# Preconditioning.


def test_ekfac_is_exact_where_one_token_is_all_there_is(queries):
    token = ROWS[:1, :2]
    factors = fit_factors(PARAMS, token, CONFIG, method="ekfac", empirical=True)
    own = {path: queries[path] for path in factors.parameters}
    found, fisher = flat(precondition(factors, tree(own), 1e-3)), gradients(token)
    for module in LINEAR:
        for layer in range(CONFIG.num_hidden_layers):
            seen = block(fisher, f"layers/{module}", layer)
            expected = solved(seen.T @ seen, 1e-3, block(own, f"layers/{module}", layer))
            assert distance(block(found, f"layers/{module}", layer), expected) < 1e-5


def block(of: dict[str, Any], module: str, layer: int) -> np.ndarray:
    """`[row, (in + 1) · out]` of one layer, float64."""
    kernel, bias = (np.asarray(of[f"{module}/{leaf}"])[:, layer] for leaf in ("kernel", "bias"))
    joined = np.concatenate([kernel, bias[:, None]], axis=1)
    return joined.reshape(len(joined), -1).astype(np.float64)


def solved(matrix: np.ndarray, damping: float | None, vectors: np.ndarray) -> np.ndarray:
    added = 0.1 * np.trace(matrix) / len(matrix) if damping is None else damping
    return np.linalg.solve(matrix + added * np.eye(len(matrix)), vectors.T).T


LAYERS, IN, OUT = 2, 5, 3


def positive(size: int, seed: int) -> np.ndarray:
    """`[layers, size, size]`, symmetric, with eigenvalues of many sizes."""
    spread = np.random.default_rng(seed).standard_normal((LAYERS, size, size)) * np.arange(
        1, 1 + size
    )
    return spread @ spread.swapaxes(1, 2)


def made(method: str) -> tuple[Factors, np.ndarray]:
    """Factors of one module, and the curvature they stand for, `[layers, n, n]`."""
    activation, gradient = positive(IN + 1, 0), positive(OUT, 1)
    if method == "autocorrelation":
        matrix = positive(4, 2)
        values, vectors = np.linalg.eigh(matrix)
        of = {"values": values, "vectors": vectors}
        return Factors({"m": of}, method, projection=Projection(dimension=2)), matrix
    if method == "diagonal":
        squares = np.random.default_rng(3).random((LAYERS, IN + 1, OUT))
        of = {"kernel": squares[:, :-1], "bias": squares[:, -1]}
        flat = squares.reshape(LAYERS, -1)
        return Factors({"layers/m": of}, method), flat[:, None] * np.eye(flat.shape[1])
    of = {}
    for side, matrix in (("activation", activation), ("gradient", gradient)):
        of[f"{side}_values"], of[f"{side}_vectors"] = np.linalg.eigh(matrix)
    eigenvalues = of["activation_values"][:, :, None] * of["gradient_values"][:, None]
    if method == "ekfac":
        eigenvalues = of["squares"] = np.random.default_rng(4).random(eigenvalues.shape)
    basis = np.stack(
        [
            np.kron(a, s)
            for a, s in zip(of["activation_vectors"], of["gradient_vectors"], strict=True)
        ]
    )
    matrix = (basis * eigenvalues.reshape(LAYERS, 1, -1)) @ basis.swapaxes(1, 2)
    if method == "kfac":
        assert distance(matrix[1], np.kron(activation[1], gradient[1])) < 1e-12
    return Factors({"m": of}, method), matrix


@pytest.mark.parametrize("damping", [None, 0.3])
@pytest.mark.parametrize("method", ["kfac", "ekfac", "autocorrelation", "diagonal"])
def test_preconditioning_solves_with_the_damped_curvature(method, damping):
    factors, matrix = made(method)
    name = next(iter(factors.modules))
    rng = np.random.default_rng(5)
    own = {f"{name}/bias": rng.standard_normal((4, LAYERS, OUT))}
    own[f"{name}/kernel"] = rng.standard_normal((4, LAYERS, IN, OUT))
    if method == "autocorrelation":
        own = {f"{name}/kernel": rng.standard_normal((4, LAYERS, 2, 2))}

    def of(tree: dict[str, Any], layer: int) -> np.ndarray:
        if method == "autocorrelation":
            return np.asarray(tree[f"{name}/kernel"])[:, layer].reshape(4, -1)
        return block(tree, name, layer)

    with jax.enable_x64(True):
        found = flat(precondition(factors, tree(own), damping))
        half = precondition(factors, tree(own), damping, power=-0.5)
        twice = flat(precondition(factors, half, damping, power=-0.5))
    for layer in range(LAYERS):
        expected = solved(matrix[layer], damping, of(own, layer))
        assert distance(of(found, layer), expected) < 1e-9
        assert distance(of(twice, layer), expected) < 1e-9


def test_what_the_factors_do_not_fit_is_refused():
    row = {"kernel": jnp.ones((1, LAYERS, IN, OUT)), "bias": jnp.ones((1, LAYERS, OUT))}
    for method, of, options, told in (
        ("kfac", {"kernel": row["kernel"]}, {}, "without the bias"),
        ("kfac", {"scale": row["bias"]}, {}, "nothing of m/scale"),
        ("autocorrelation", {"kernel": row["kernel"]}, {}, "not projected to 2 x 2"),
        ("kfac", row, {"damping": -1}, "0 or more"),
        ("kfac", row, {"power": 2}, "power 2 of kfac"),
        ("ekfac", {**row, "bias": row["bias"] * np.nan}, {}, "row 0: the gradient is not finite"),
    ):
        with pytest.raises(ValueError, match=told):
            precondition(made(method)[0], {"m": of}, **options)


def test_a_damping_that_cannot_invert_the_curvature_is_named():
    factors, _ = made("autocorrelation")
    factors.modules["m"]["values"][1, 0] = 0  # rank 3 of 4
    row = {"m": {"kernel": jnp.ones((1, LAYERS, 2, 2))}}
    with pytest.raises(ValueError, match=r"eigenvalues of 0.*damping 0\.0 is too little"):
        precondition(factors, row, 0.0)
    assert np.isfinite(precondition(factors, row, 0.1)["m"]["kernel"]).all()


# Adam's.


@pytest.fixture(scope="module")
def state() -> Any:
    """A state whose optimizer has seen three gradients."""
    rng = np.random.default_rng(6)
    moments = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(np.float32), PARAMS)
    fresh = jax.jit(init_state, static_argnums=0)(RUN)
    clip, adam, *rest = fresh.opt_state
    squares = jax.tree.map(np.square, moments)
    adam = adam._replace(count=adam.count + 3, mu=moments, nu=squares)
    return fresh.replace(opt_state=(clip, adam, *rest))


def test_adams_update_of_a_row_is_the_formula(state, rows):
    row = {path: value / 7 for path, value in rows.items()}
    found = flat(adam_updates(state, tree(row), RUN))
    adam, (b1, b2) = state.opt_state[1], RUN.optimizer.betas
    count = int(adam.count) + 1
    for path, g in row.items():
        m = b1 * np.float64(flat(adam.mu)[path]) + (1 - b1) * g
        v = b2 * np.float64(flat(adam.nu)[path]) + (1 - b2) * np.float64(g) ** 2
        expected = m / (1 - b1**count) / (np.sqrt(v / (1 - b2**count)) + RUN.optimizer.eps)
        twice = path in ("layers/attention/dense/bias", "layers/mlp/dense_4h_to_h/bias")
        assert distance(found[path], expected * (1 + twice)) < 1e-5
    part = {path: row[path][:2] for path in list(row)[3:5]}
    for path, value in flat(adam_updates(state, tree(part), RUN)).items():
        assert distance(value, found[path][:2]) < 1e-6
    with pytest.raises(ValueError, match="no moments of embed_in/kernel"):
        adam_updates(state, {"embed_in": {"kernel": np.ones((1, 2))}}, RUN)


def test_adams_factors_divide_by_the_root_of_its_second_moment(state, rows):
    factors = adam_factors(state, RUN)
    found, adam = flat(precondition(factors, tree(rows))), state.opt_state[1]
    for path, value in rows.items():
        v = np.float64(flat(adam.nu)[path]) / (1 - RUN.optimizer.betas[1] ** int(adam.count))
        assert distance(found[path], value / (np.sqrt(v) + RUN.optimizer.eps)) < 1e-5
    with pytest.raises(ValueError, match=r"power -0\.5 of adam"):
        precondition(factors, tree(rows), power=-0.5)
    fresh = state.opt_state[1]._replace(count=jnp.int32(0))
    with pytest.raises(ValueError, match="seen no gradient"):
        adam_factors(state.replace(opt_state=(fresh,)), RUN)
