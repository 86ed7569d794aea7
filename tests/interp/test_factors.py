from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util
from on_a_mesh import on_eight_devices
from reference import TINY, distance, hf_model, hf_token_losses, random_params, random_tokens

import pythia_jax as pj
from pythia_jax.configs import Runtime
from pythia_jax.interp import factors as files
from pythia_jax.interp import preflight
from pythia_jax.interp.curvature import ggn_vp
from pythia_jax.interp.factor_fitting import bytes_of
from pythia_jax.interp.factors import Factors, fit_factors, sample_labels
from pythia_jax.interp.gradients import LINEAR
from pythia_jax.interp.projection import Projection, matrices

CONFIG = replace(
    TINY,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    vocab_size=29,
)
PARAMS = random_params(CONFIG)
ROWS = random_tokens(CONFIG, 6, 8)


def flattened(tree: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")


@cache
def fitted(method: Any) -> Factors:
    """To the true labels of six rows."""
    return fit_factors(PARAMS, ROWS, CONFIG, method=method, empirical=True)


@cache
def gradients() -> dict[str, np.ndarray]:
    """By path, `[row, …]`: of each row's summed loss, one by one by jax.grad."""
    grad = jax.jit(jax.grad(lambda p, row: pj.token_losses(p, row[None], CONFIG).sum()))
    rows = [flattened(grad(PARAMS, row)) for row in ROWS]
    return {path: np.stack([np.asarray(row[path]) for row in rows]) for path in rows[0]}


def joined(module: str) -> np.ndarray:
    """`[row, layers, in + 1, out]`: the bias as one more input."""
    bias = gradients()[f"{module}/bias"][..., None, :]
    return np.concatenate([gradients()[f"{module}/kernel"], bias], axis=-2)


def test_covariances_are_those_that_hooks_see_in_torch():
    model = hf_model(PARAMS, CONFIG)
    seen: dict[str, list] = {}

    def watch(name: str, module: torch.nn.Module) -> None:
        def forward(_: Any, inputs: Any, output: torch.Tensor) -> None:
            flat = inputs[0].detach().flatten(0, 1)
            seen[name] = [torch.cat([flat, torch.ones(len(flat), 1)], dim=1)]
            output.register_hook(lambda g: seen[name].append(g.flatten(0, 1)))

        module.register_forward_hook(forward)

    for name, module in model.named_modules():
        if name.endswith(("query_key_value", "attention.dense", "h_to_4h", "4h_to_h")):
            watch(name, module)
    hf_token_losses(model, ROWS).sum().backward()
    for module in LINEAR:
        ours = fitted("kfac").covariances(module)
        for layer in range(CONFIG.num_hidden_layers):
            name = module.replace("layers/", f"gpt_neox.layers.{layer}.").replace("/", ".")
            for matrix, x in zip(ours, seen[name], strict=True):
                assert distance(matrix[layer], (x.T @ x / len(x)).numpy()) < 1e-5, name


@pytest.mark.parametrize("module", LINEAR)
def test_ekfac_holds_the_squares_of_gradients_in_orthonormal_bases(module):
    of = fitted("ekfac").modules[module]
    for layer in range(CONFIG.num_hidden_layers):
        right, left = of["activation_vectors"][layer], of["gradient_vectors"][layer]
        for basis in (right, left):
            assert distance(basis.T @ basis, np.eye(len(basis))) < 1e-5
        turned = right.T @ joined(module)[:, layer] @ left
        assert distance(of["squares"][layer], (turned**2).mean(axis=0)) < 1e-5


def test_the_diagonal_is_the_mean_of_squares():
    for module, of in fitted("diagonal").modules.items():
        for leaf, value in of.items():
            expected = (gradients()[f"{module}/{leaf}"] ** 2).mean(axis=0)
            assert distance(value, expected) < 1e-5


def test_autocorrelation_is_that_of_projected_gradients():
    projection = Projection(dimension=3, seed=5)
    found = fit_factors(
        PARAMS, ROWS, CONFIG, method="autocorrelation", empirical=True, projection=projection
    )
    total = sum(array.nbytes for array in jax.tree.leaves(found))
    assert total == bytes_of(CONFIG, "autocorrelation", projection)
    for module, sides in matrices(projection, CONFIG).items():
        if module not in LINEAR:
            continue
        kernel = gradients()[f"{module}/kernel"]
        rows = np.einsum("lop,blio,liq->blpq", sides["left"], kernel, sides["right"])
        rows = rows.reshape(*rows.shape[:2], -1)
        of = found.modules[module]
        rebuilt = (of["vectors"] * of["values"][:, None]) @ of["vectors"].swapaxes(1, 2)
        assert distance(rebuilt, np.einsum("bli,blj->lij", rows, rows) / len(ROWS)) < 1e-5


def test_bytes_are_counted_beforehand():
    for method in ("kfac", "ekfac", "diagonal"):
        total = sum(array.nbytes for array in jax.tree.leaves(fitted(method)))
        assert total == bytes_of(CONFIG, method)


def test_many_batches_are_as_good_as_one():
    cut = fit_factors(PARAMS, [ROWS[:3], ROWS[3:]], CONFIG, method="kfac", empirical=True)
    assert (cut.rows, cut.tokens) == (6, 42)
    for module in LINEAR:
        whole = fitted("kfac").covariances(module)
        for a, b in zip(cut.covariances(module), whole, strict=True):
            assert distance(a, b) < 1e-5


def test_labels_are_drawn_from_the_model_given_the_true_tokens():
    key = jax.random.key(1)
    rows = np.repeat(ROWS[:1], 4000, axis=0)
    draw = jax.jit(sample_labels, static_argnames=("config", "runtime"))
    drawn = np.asarray(draw(PARAMS, rows, config=CONFIG, key=key))
    chunked = draw(PARAMS, rows, config=CONFIG, key=key, runtime=Runtime(loss_chunk=9000))
    np.testing.assert_array_equal(drawn, chunked)
    likely = np.asarray(jax.nn.softmax(pj.forward(PARAMS, ROWS[:1, :-1], CONFIG)[0]))
    counts = np.stack([np.bincount(of, minlength=CONFIG.vocab_size) for of in drawn.T])
    z = (counts - 4000 * likely) / np.sqrt(4000 * likely * (1 - likely))
    assert np.abs(z).max() < 4.5  # of 203 nearly normal variables
    assert 0.6 < (z**2).mean() < 1.4


def test_the_fisher_matrix_of_drawn_labels_is_the_gauss_newton_matrix():
    smaller = {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 12}
    config = replace(CONFIG, num_hidden_layers=1, vocab_size=7, **smaller)
    params = jax.tree.map(lambda x: 3 * x, random_params(config, seed=2))
    row = random_tokens(config, 1, 4, seed=3)
    seq, path = row.shape[1] - 1, "layers/mlp/dense_h_to_4h/bias"
    expected = []
    for i in range(config.intermediate_size):
        flat = flattened(jax.tree.map(jnp.zeros_like, params))
        flat[path] = flat[path].at[0, i].set(1)
        product = ggn_vp(params, row, config, traverse_util.unflatten_dict(flat, sep="/"))
        expected.append(seq * flattened(product)[path][0, i])

    def off(rows: int, **labels: Any) -> float:
        batch = np.repeat(row, rows, axis=0)
        how = {"method": "diagonal", "modules": ("layers/mlp/dense_h_to_4h",)}
        found = fit_factors(params, [batch] * 4, config, **how, **labels)
        return distance(found.modules["layers/mlp/dense_h_to_4h"]["bias"][0], expected)

    assert off(4000, key=jax.random.key(0)) < 0.03
    assert off(1, empirical=True) > 0.3


def test_factors_come_back_as_they_were_saved(tmp_path, monkeypatch):
    projected = fit_factors(
        PARAMS,
        ROWS,
        CONFIG,
        method="autocorrelation",
        key=jax.random.key(0),
        projection=Projection(dimension=2),
        modules=LINEAR[:1],
    )
    other = Factors({"embed_in": {"embedding": jnp.ones((3, 2))}}, "adam", eps=1e-8)
    for name, factors in (("e", fitted("ekfac")), ("r", projected), ("a", other)):
        files.save(factors, tmp_path / name, provenance={"model": "tiny"})
        again = files.load(tmp_path / name)
        assert jax.tree.structure(again) == jax.tree.structure(factors)
        for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(factors), strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
        assert files.about(tmp_path / name)["provenance"] == {"model": "tiny"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "e", "r"]
    with pytest.raises(FileExistsError, match="choose another place"):
        files.save(other, tmp_path / "e")
    with pytest.raises(FileNotFoundError, match="holds no factors"):
        files.load(tmp_path)
    monkeypatch.setattr(preflight, "host_memory", lambda: 10)
    with pytest.raises(MemoryError, match=r"a: these factors: .* wanted, and 10 bytes are free"):
        files.load(tmp_path / "a")
    monkeypatch.undo()
    lost = tmp_path / "e" / "layers.1.mlp.dense_4h_to_h.safetensors"
    lost.write_bytes((tmp_path / "e" / "layers.1.attention.dense.safetensors").read_bytes())
    with pytest.raises(
        ValueError, match=r"dense_4h_to_h.safetensors: .* is not there in the shape"
    ):
        files.load(tmp_path / "e")


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        files.save(fitted("kfac"), tmp_path / "f")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "shampoo", "empirical": True}, "choose from kfac, ekfac"),
        ({}, "key=jax.random.key"),
        ({"empirical": True, "key": 0}, "one of the two"),
        ({"empirical": True, "projection": Projection()}, "goes with method='autocorrelation'"),
        ({"empirical": True, "batches": iter([ROWS])}, "twice"),
        ({"empirical": True, "batches": []}, "no batch"),
        ({"empirical": True, "batches": ROWS + 29}, "not in the vocabulary"),
        ({"empirical": True, "modules": ("embed_in",)}, "no factors of 'embed_in'"),
    ],
)
def test_what_does_not_go_together_is_refused(options, told):
    options = dict(options)
    batches = options.pop("batches", ROWS)
    with pytest.raises(ValueError, match=told):
        fit_factors(PARAMS, batches, CONFIG, **options)


def test_what_is_not_finite_is_named():
    flat = flattened(PARAMS)
    # One unit of layer 1 is not a number on its way out.
    flat["layers/mlp/dense_4h_to_h/kernel"] = (
        flat["layers/mlp/dense_4h_to_h/kernel"].at[1, 0, 0].set(np.nan)
    )
    with pytest.raises(ValueError, match=r"gradient covariance of layers\.0.*not finite"):
        fit_factors(
            traverse_util.unflatten_dict(flat, sep="/"),
            ROWS,
            CONFIG,
            method="kfac",
            empirical=True,
        )


@pytest.mark.slow
def test_eight_devices_find_what_one_does():
    script = Path(__file__).with_name("influence_on_a_mesh.py")
    found = on_eight_devices(script, x64=True)
    assert max(found.values()) < 1e-9, found
