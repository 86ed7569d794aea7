"""Per-example gradients equal torch's row by row, and do not depend on the rows beside them."""

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from on_a_mesh import on_eight_devices
from reference import (
    distance,
    hf_gradients,
    hf_model,
    hf_token_losses,
    random_params,
    random_tokens,
)

from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.interp import (
    LINEAR,
    gradient_noise_scale,
    gradient_norms,
    per_example_gradients,
)
from pythia_jax.interp.gradients import EMBEDDINGS, check_finite
from pythia_jax.interp.projection import Projection, matrices
from pythia_jax.model.loss import loss, token_losses
from pythia_jax.model.parameters import TABLE

MICRO = ModelConfig(32, 2, 4, vocab_size=64, max_position_embeddings=32, hidden_act="gelu")
BATCH, SEQ = 3, 10
PARAMS = random_params(MICRO)
TOKENS = random_tokens(MICRO, BATCH, SEQ + 1)
TOKENS[0, 3:6] = TOKENS[0, 2]  # one token many times, across a document's border too
PATHS = [parameter.path for parameter in TABLE]
# Of three numbers at most; some tokens are in none, and no row has its documents as another has.
DOCUMENTS = np.array([[0] * 4 + [1] * 7, [-1] * 2 + [0] * 9, [0] * 2 + [1] * 3 + [2] * 5 + [-1]])
UNITS: dict[str, dict[str, Any]] = {
    "sequence": {},
    "document by loss": {"unit": "document", "documents": DOCUMENTS},
    "document by position": {"unit": "document", "documents": DOCUMENTS, "by": "position"},
    "token by loss": {"unit": "token"},
    "token by position": {"unit": "token", "by": "position"},
}
BY_LOSS = ("document by loss", "token by loss")
"""Units that take the statistic of whole rows, one after the other."""
some_units = pytest.mark.parametrize(
    "name", [pytest.param(u, marks=[pytest.mark.slow] * (u in BY_LOSS)) for u in UNITS]
)


def flat(tree) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")


def units_of(how):
    """Axes of units in front of a parameter's own."""
    return 1 + (how.get("unit", "sequence") != "sequence")


@cache
def gradients(name):
    return flat(per_example_gradients(PARAMS, TOKENS, MICRO, **UNITS[name]))


@cache
def of_tokens():
    """`[batch, seq, …]`: the gradient of every token's loss, by reverse mode a token."""

    def losses(params, row):
        return token_losses(params, row[None], MICRO)[0]

    return flat(jax.jit(jax.vmap(jax.jacrev(losses), in_axes=(None, 0)))(PARAMS, TOKENS))


def assert_near(got, wanted, limit=1e-5):
    assert set(got) == set(wanted)
    for path, value in wanted.items():
        assert got[path].shape == value.shape, path
        assert distance(got[path], value) <= limit, path


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
def test_gradient_of_every_parameter_equals_torch_autograd_row_by_row(parallel):
    config = replace(MICRO, use_parallel_residual=parallel)
    runtime = Runtime() if parallel else Runtime(scan_layers=False, remat="full", loss_chunk=8)
    ours = flat(per_example_gradients(PARAMS, TOKENS, config, runtime=runtime))
    assert set(ours) == set(PATHS)
    for row, tokens in enumerate(TOKENS):
        model = hf_model(PARAMS, config)
        hf_token_losses(model, tokens[None]).sum().backward()
        theirs = hf_gradients(model, config)
        assert_near({path: value[row] for path, value in ours.items()}, theirs)


@pytest.mark.slow
def test_gradients_by_loss_are_those_of_the_losses_of_each_document_and_token():
    each = of_tokens()
    assert_near(gradients("token by loss"), each)
    of_documents = DOCUMENTS[:, 1:, None] == np.arange(3)  # of the targets
    wanted = {
        path: np.einsum("bsd,bs...->bd...", of_documents, value) for path, value in each.items()
    }
    assert_near(gradients("document by loss"), wanted)


def test_gradients_by_position_sum_up_to_the_rows():
    wanted = gradients("sequence")
    tokens = {path: value.sum(axis=1) for path, value in gradients("token by position").items()}
    assert_near(tokens, wanted)
    # Documents, to the gradient that the positions of any document carry.
    inside = DOCUMENTS[:, :-1] >= 0
    carried = {
        path: np.einsum("bs...,bs->b...", value, inside)
        for path, value in gradients("token by position").items()
    }
    documents = gradients("document by position")
    assert_near({path: value.sum(axis=1) for path, value in documents.items()}, carried)


def test_gradient_by_position_is_that_of_what_the_position_reads():
    """Of the embedding's, the row of the token that stands there; of a kernel's, rank one."""
    by_position = gradients("token by position")
    embedding = by_position[EMBEDDINGS[0]]
    for row, position in np.ndindex(BATCH, SEQ):
        others = np.delete(embedding[row, position], TOKENS[row, position], axis=0)
        assert not others.any() and embedding[row, position].any()
    for module in LINEAR:
        singular = np.linalg.svd(by_position[f"{module}/kernel"], compute_uv=False)
        assert (singular[..., 1] <= 1e-5 * singular[..., 0]).all()


def test_in_units_of_training_gradients_sum_up_to_that_of_the_loss():
    wanted = flat(jax.jit(jax.grad(lambda p: loss(p, TOKENS, MICRO)))(PARAMS))
    for name in ("sequence", "token by position", "token by loss"):
        run = partial(per_example_gradients, reduction="train", **UNITS[name])
        got = flat(run(PARAMS, TOKENS, MICRO))
        axes = tuple(range(units_of(UNITS[name])))
        assert_near({path: value.sum(axis=axes) for path, value in got.items()}, wanted)


def test_mean_is_the_sum_by_the_tokens_of_the_unit():
    for name, count in {
        "sequence": np.full(BATCH, SEQ),
        "document by loss": (DOCUMENTS[:, 1:, None] == np.arange(3)).sum(axis=1),
        "document by position": (DOCUMENTS[:, :-1, None] == np.arange(3)).sum(axis=1),
        "token by loss": np.ones((BATCH, SEQ)),
    }.items():
        run = partial(per_example_gradients, **UNITS[name])
        for path, mean in flat(run(PARAMS, TOKENS, MICRO, reduction="mean")).items():
            total = gradients(name)[path]
            divisor = np.maximum(count, 1).reshape(*count.shape, *[1] * (mean.ndim - count.ndim))
            assert distance(mean, total / divisor) <= 1e-6


@some_units
def test_norms_are_those_of_the_gradients(name):
    norms = flat(gradient_norms(PARAMS, TOKENS, MICRO, reduction="train", **UNITS[name]))
    wanted = {}
    for path, value in gradients(name).items():
        kept = units_of(UNITS[name]) + path.startswith("layers/")
        squares = (np.asarray(value, np.float64) ** 2).sum(axis=tuple(range(kept, value.ndim)))
        wanted[path] = np.sqrt(squares) / (BATCH * SEQ)
    assert_near(norms, wanted)


@some_units
def test_projected_gradient_is_the_gradient_between_two_projections(name):
    projection = Projection(4)
    modules = [*(f"{module}/kernel" for module in LINEAR), *EMBEDDINGS]
    run = partial(per_example_gradients, projection=projection, parameters=["layers/*", "embed_*"])
    got = flat(run(PARAMS, TOKENS, MICRO, **UNITS[name]))
    sides = matrices(projection, MICRO)
    wanted = {}
    for path in modules:
        of_module = sides[path.rpartition("/")[0]]
        form = "lop,...lio,liq->...lpq" if path.startswith("layers/") else "op,...io,iq->...pq"
        left, right = (np.asarray(of_module[side], np.float64) for side in ("left", "right"))
        wanted[path] = np.einsum(form, left, gradients(name)[path], right)
    assert_near(got, wanted)


def test_projection_of_everything_holds_the_linear_modules_of_the_layers():
    got = per_example_gradients(PARAMS, TOKENS, MICRO, projection=Projection(4))
    assert set(flat(got)) == {f"{module}/kernel" for module in LINEAR}
    assert got["layers"]["mlp"]["dense_h_to_4h"]["kernel"].shape == (BATCH, 2, 4, 4)


def test_gradient_of_a_row_does_not_depend_on_its_company():
    def alone(row, beside, params=PARAMS):
        tokens = np.concatenate([beside, TOKENS[row : row + 1]])
        found = flat(per_example_gradients(params, tokens, MICRO))
        return {path: value[-1] for path, value in found.items()}

    others = random_tokens(MICRO, 4, SEQ + 1, seed=7)
    wanted = {path: value[1] for path, value in gradients("sequence").items()}
    assert_near(alone(1, others), wanted, 1e-6)
    with jax.enable_x64(True):
        params = random_params(MICRO, dtype=np.float64)
        first, second = alone(1, others[:0], params), alone(1, others, params)
        assert {value.dtype for value in first.values()} == {np.dtype(np.float64)}
        assert_near(first, second, 1e-12)


@pytest.mark.parametrize(
    "which", ["float64", pytest.param("others", marks=pytest.mark.slow)], ids=["float64", "others"]
)
def test_eight_devices_give_the_gradients_of_one(which):
    script = Path(__file__).with_name("gradients_on_a_mesh.py")
    report = on_eight_devices(script, which)
    assert len(report) == {"float64": 1, "others": 4}[which]
    for name, (furthest, cut) in report.items():
        assert furthest <= (1e-10 if "float64" in name else 1e-5), name
        assert cut, name


def test_bfloat16_gradients_are_float32_and_near():
    got = flat(per_example_gradients(PARAMS, TOKENS, MICRO, runtime=Runtime(dtype="bfloat16")))
    assert {value.dtype for value in got.values()} == {np.dtype(np.float32)}
    assert_near(got, gradients("sequence"), 5e-2)


def test_parameters_are_chosen_by_patterns():
    run = partial(per_example_gradients, PARAMS, TOKENS, MICRO)
    got = flat(run(parameters=["*/scale", "embed_in/*", "layers/mlp/*_h/*"]))
    scales = {path for path in PATHS if path.endswith("/scale")}
    assert set(got) == {*scales, EMBEDDINGS[0], f"{LINEAR[3]}/kernel", f"{LINEAR[3]}/bias"}
    assert_near(got, {path: gradients("sequence")[path] for path in got}, 1e-6)


def test_under_jit_documents_want_their_number():
    def run(documents, **count):
        how = {"unit": "document", "documents": documents, "parameters": "final_*", **count}
        return per_example_gradients(PARAMS, TOKENS, MICRO, **how)

    got = flat(jax.jit(partial(run, document_count=3))(DOCUMENTS))
    assert_near(got, {path: gradients("document by loss")[path] for path in got}, 1e-6)
    with pytest.raises(ValueError, match="document_count"):
        jax.jit(run)(DOCUMENTS)
    with pytest.raises(ValueError, match="documents are a list"):
        run(DOCUMENTS.tolist())


# Gradient noise scale.


def test_noise_scale_is_that_of_the_per_example_gradients():
    """g2 is the mean product of two different rows' gradients, s the trace of their covariance."""
    got = gradient_noise_scale(PARAMS, TOKENS, MICRO)
    assert set(got) == {*PATHS, "layers", "whole"}
    total, of_layers = np.zeros(2), np.zeros((2, 2))
    for path, value in gradients("sequence").items():
        layers = 2 if path.startswith("layers/") else 1
        of_mean = np.asarray(value, np.float64).reshape(BATCH, layers, -1) / SEQ
        products = np.einsum("alx,blx->lab", of_mean, of_mean)
        g2 = products[:, ~np.eye(BATCH, dtype=bool)].mean(axis=1)
        s = of_mean.var(axis=0, ddof=1).sum(axis=-1)
        total += [g2.sum(), s.sum()]
        of_layers += [g2, s] if path.startswith("layers/") else 0
        scale = np.abs([g2, s]).max()
        np.testing.assert_allclose(np.ravel(got[path].g2), g2, rtol=0, atol=1e-5 * scale)
        np.testing.assert_allclose(np.ravel(got[path].s), s, rtol=0, atol=1e-5 * scale)
    whole, each = got["whole"], got["layers"]
    np.testing.assert_allclose([each.g2, each.s], of_layers, rtol=0, atol=1e-5 * of_layers.max())
    np.testing.assert_allclose(each.sequences, each.s / each.g2, rtol=1e-6)
    np.testing.assert_allclose([whole.g2, whole.s], total, rtol=0, atol=1e-5 * total.max())
    np.testing.assert_allclose(whole.sequences, whole.s / whole.g2, rtol=1e-6)
    np.testing.assert_allclose(whole.tokens, SEQ * whole.sequences, rtol=1e-6)


def test_noise_scale_of_equal_rows_is_zero():
    tokens = np.repeat(TOKENS[:1], BATCH, axis=0)
    whole = gradient_noise_scale(PARAMS, tokens, MICRO)["whole"]
    assert abs(whole.s) <= 1e-4 * whole.g2


def test_noise_scale_of_one_row_is_an_error():
    with pytest.raises(ValueError, match="2 rows"):
        gradient_noise_scale(PARAMS, TOKENS[:1], MICRO)


# Mistakes.


def test_gradient_that_is_no_number_is_an_error_that_names_the_row():
    broken = {**PARAMS, "embed_in": {"embedding": np.array(PARAMS["embed_in"]["embedding"])}}
    absent = next(t for t in range(64) if t not in np.delete(TOKENS, 1, axis=0) and t in TOKENS[1])
    broken["embed_in"]["embedding"][absent] = np.nan
    for function in (per_example_gradients, gradient_norms):
        with pytest.raises(ValueError, match=r"row 1: .* not finite, in .*mlp/dense_h_to_4h/bias"):
            function(broken, TOKENS, MICRO)
    with pytest.raises(ValueError, match="row 0, 2: "):
        check_finite({"a": jnp.asarray([np.inf, 0, np.nan])})


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"parameters": "layers/attn/*"}, r"'layers/attn/\*' matches no parameter.*embed_in"),
        ({"parameters": ["*", "nothing"]}, "'nothing' matches no parameter"),
        ({"parameters": []}, "names none"),
        ({"parameters": "*norm/*", "projection": Projection(4)}, "matches no linear module"),
        ({"unit": "row"}, "unit='row': choose from sequence"),
        ({"by": "token"}, "by='token': choose from loss"),
        ({"reduction": "none"}, "reduction='none': choose from sum"),
        ({"unit": "document"}, "documents and unit"),
        ({"documents": DOCUMENTS}, "documents and unit"),
        ({"document_count": 3}, "no documents are"),
        ({"unit": "document", "documents": DOCUMENTS[:, 1:]}, r"shape \(3, 10\).*\(3, 11\)"),
        ({"unit": "document", "documents": DOCUMENTS * 1.0}, "float64.*whole numbers"),
        ({"unit": "document", "documents": DOCUMENTS * 0 - 1}, "name none"),
        ({"unit": "document", "documents": DOCUMENTS, "document_count": 2}, "go to 2.*too small"),
    ],
)
def test_what_cannot_be_asked_for_is_an_error(wrong, told):
    with pytest.raises(ValueError, match=told):
        per_example_gradients(PARAMS, TOKENS, MICRO, **wrong)


def test_tokens_of_another_shape_or_vocabulary_are_an_error():
    for wrong in (TOKENS[0], TOKENS[:, :1]):
        with pytest.raises(ValueError, match=r"\[batch, seq \+ 1\]"):
            per_example_gradients(PARAMS, wrong, MICRO)
    with pytest.raises(ValueError, match="token 64 is not in the vocabulary"):
        per_example_gradients(PARAMS, np.full((1, 3), 64), MICRO)
    listed: Any = TOKENS.tolist()
    for function in (per_example_gradients, gradient_norms, token_losses):
        with pytest.raises(ValueError, match="tokens are a list: an array is wanted"):
            function(PARAMS, listed, MICRO)
