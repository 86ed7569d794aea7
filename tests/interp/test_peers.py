"""Our gradients beside those of three programs that nobody here wrote.

Their numbers for a small model are kept in `peers/*.npz`; `peers/remake.py` makes them again, and
the slow tests do, where there is an environment with the three in it: `make test-all` makes one,
`.venv-peers`, or PEERS_VENV names it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from peers import case, remake
from reference import distance
from scipy.stats import spearmanr

import pythia_jax as pj
from pythia_jax.interp import attribution, bergson, patching
from pythia_jax.interp.activations import activation_gradients, logit_difference
from pythia_jax.interp.factors import fit_factors
from pythia_jax.interp.gradients import LINEAR, per_example_gradients
from pythia_jax.interp.influence import pairwise
from pythia_jax.interp.preconditioning import precondition
from pythia_jax.interp.projection import Projection, matrices, module_name

ROOT = Path(__file__).parents[2]
PEERS_VENV = Path(os.environ.get("PEERS_VENV", ROOT / ".venv-peers"))
CONFIG = remake.CONFIG
CLOSE = 1e-5
"""Of the norm; float32 on both sides."""


def need_peers() -> None:
    if not (PEERS_VENV / "bin" / "python").is_file():
        pytest.skip(f"no peers in {PEERS_VENV} (make test-all installs them; PEERS_VENV names it)")


def golden(peer: str) -> Mapping[str, np.ndarray]:
    return np.load(Path(remake.__file__).with_name(f"{peer}.npz"))


@cache
def params() -> Any:
    return remake.model().params


def in_their_order(tree: Any, turned: bool = False) -> np.ndarray:
    """Gradients of the layers' linear modules as a row of Bergson's, behind the leading axes.

    turned: kernels lie (in, out) with us, (out, in) with them; projections lie as theirs.
    """
    blocks = []
    for module in LINEAR:
        _, part, name = module.split("/")
        kernel = np.asarray(tree["layers"][part][name]["kernel"])
        kernel = kernel.swapaxes(-1, -2) if turned else kernel
        blocks.append(kernel.reshape(*kernel.shape[:-2], -1))
    layers = [block[..., layer, :] for layer in range(case.LAYERS) for block in blocks]
    return np.concatenate(layers, axis=-1)


def slowly(*given: Any) -> Any:
    """A case whose program takes longer to compile than it tells anything new."""
    return pytest.param(*given, marks=pytest.mark.slow)


KERNELS = tuple(f"{module}/kernel" for module in LINEAR)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("raw", {"parameters": KERNELS}),
        ("projected", {"projection": Projection(dimension=16)}),
        ("tokens", {"projection": Projection(dimension=4), "unit": "token", "by": "position"}),
        slowly("seeded", {"projection": Projection(dimension=5, seed=7)}),
        slowly("mean", {"projection": Projection(dimension=16), "reduction": "mean"}),
    ],
)
def test_per_example_gradients_are_bergsons(name, options):
    theirs = golden("bergson")[name]
    rows = 1 if name == "tokens" else len(theirs)
    tokens = case.tokens("rows", 4)[:rows]
    found = per_example_gradients(params(), tokens, CONFIG, **options)
    ours = in_their_order(found, turned=name == "raw")
    # Entries by position stand in one list, row after row.
    ours = ours[0] if name == "tokens" else ours
    assert ours.shape == theirs.shape
    for row, expected in zip(ours, theirs, strict=True):
        assert distance(row, expected) < CLOSE


def test_losses_of_rows_are_bergsons():
    losses = pj.token_losses(params(), case.tokens("rows", 4), CONFIG).sum(axis=1)
    assert distance(losses, golden("bergson")["projected.loss"]) < 1e-6


@pytest.mark.parametrize("seed", [None, 7])
def test_projections_are_bergsons_bit_for_bit(seed):
    suffix = "" if seed is None else f"/seed{seed}"
    theirs = golden("bergson")
    left = theirs[f"matrix layers.0.mlp.dense_h_to_4h/left{suffix}"]
    ours = matrices(Projection(dimension=16, seed=seed), CONFIG)["layers/mlp/dense_h_to_4h"]
    np.testing.assert_array_equal(ours["left"][0].T, left)
    right = theirs[f"matrix layers.1.attention.dense/right{suffix}"]
    ours = matrices(Projection(dimension=5, seed=seed), CONFIG)["layers/attention/dense"]
    np.testing.assert_array_equal(ours["right"][1].T, right)


def test_activation_gradients_are_those_of_transformer_lens_hooks():
    theirs = golden("transformer_lens")
    sites = [key.removeprefix("gradient ") for key in theirs if key.startswith("gradient ")]
    assert {"resid_pre", "attn.q", "attn.k", "attn.v", "attn.z", "mlp.pre", "mlp.post"} < {*sites}
    _, corrupt = case.clean_and_corrupt()
    metric = logit_difference(case.ANSWER, case.WRONG)
    values, _, gradients = activation_gradients(params(), corrupt, CONFIG, metric, sites)
    assert distance(values, theirs["metrics corrupt"]) < CLOSE
    for site in sites:
        assert distance(gradients[site], theirs[f"gradient {site}"]) < CLOSE, site


def test_attribution_to_nodes_is_that_of_transformer_lens():
    clean, corrupt = case.clean_and_corrupt()
    metric = logit_difference(case.ANSWER, case.WRONG)
    nodes = [
        patching.Node(writer.site, writer.layer, position, writer.head)
        for position in range(clean.shape[1])
        for writer in attribution.edge_writers(CONFIG)
    ]
    ours = attribution.attribution_patching(params(), clean, corrupt, CONFIG, metric, nodes)
    theirs = golden("transformer_lens")["nodes"]
    assert distance(np.asarray(ours).reshape(theirs.shape), theirs) < CLOSE


def test_attribution_to_edges_is_that_of_transformer_lens():
    clean, corrupt = case.clean_and_corrupt()
    metric = logit_difference(case.ANSWER, case.WRONG)
    ours = attribution.attribution_patching(
        params(), clean, corrupt, CONFIG, metric, granularity="edge"
    )
    theirs = golden("transformer_lens")["edges"]
    assert ours.shape == theirs.shape
    assert distance(ours, theirs) < CLOSE
    assert not np.asarray(ours)[~attribution.edge_mask(CONFIG)].any()


def test_what_lies_beside_the_gradients_is_what_bergson_writes():
    theirs = golden("bergson")
    for name, projection in (
        ("projected", Projection(dimension=16)),
        ("seeded", Projection(dimension=5, seed=7)),
        ("raw", None),
    ):
        ours = bergson.files(CONFIG, projection, len(theirs[name]), np.dtype(np.float32))
        assert ours["info.json"].decode() == str(theirs[f"{name}.info.json"])
        processor = "processor_config.yaml"
        assert yaml.safe_load(ours[processor]) == yaml.safe_load(str(theirs[f"{name}.{processor}"]))
        assert set(ours) < set(json.loads(str(theirs[f"{name}.files"])))


SCORES = {
    "identity": (None, None),
    "kfac": ("kfac", None),
    "ekfac": ("ekfac", None),
    "ekfac 1e-8": ("ekfac", 1e-8),
}
"""Method and damping by kronfluence's golden scores."""
LAYERS = tuple(f"{module}/*" for module in LINEAR)


@cache
def factors(method: Any) -> Any:
    batches = case.tokens("train", 12).reshape(3, 4, -1)
    return fit_factors(params(), batches, CONFIG, method=method, empirical=True)


@cache
def gradients_of(name: str, rows: int) -> Any:
    return per_example_gradients(params(), case.tokens(name, rows), CONFIG, parameters=LAYERS)


@pytest.mark.parametrize("name", SCORES)
def test_influence_scores_are_those_of_kronfluence(name):
    theirs = golden("kronfluence")[f"scores {name}"]  # module by module
    method, damping = SCORES[name]
    queries, train = gradients_of("queries", 3), gradients_of("train", 12)
    if method is not None:
        queries = precondition(factors(method), queries, damping)
    ours = np.asarray(pairwise(queries, train))
    bound = CLOSE if name == "identity" else 1e-3
    assert distance(ours, theirs.sum(axis=0)) < bound
    ranked: Any = spearmanr(ours.ravel(), theirs.sum(axis=0).ravel())
    assert ranked.statistic > 0.999
    for number, module in enumerate(in_kronfluences_order()):
        path, layer = module
        alone = [only(tree, path, layer) for tree in (queries, train)]
        assert distance(pairwise(*alone), theirs[number]) < bound, module


def in_kronfluences_order() -> list[tuple[str, int]]:
    return [(module, layer) for layer in range(case.LAYERS) for module in LINEAR]


def only(tree: Any, module: str, layer: int) -> Any:
    """Gradients of one module of one layer."""
    _, part, name = module.split("/")
    leaves = tree["layers"][part][name]
    own = {leaf: np.asarray(value)[:, layer : layer + 1] for leaf, value in leaves.items()}
    return {"layers": {part: {name: own}}}


def test_factors_are_those_of_kronfluence():
    theirs = golden("kronfluence")
    fitted = factors("ekfac")
    for module, layer in in_kronfluences_order():
        own = {name: np.asarray(array)[layer] for name, array in fitted.modules[module].items()}
        name = module_name(module, layer)
        for side in ("activation", "gradient"):
            values = np.sort(own[f"{side}_values"])
            assert distance(values, theirs[f"{side} eigenvalues {name}"]) < CLOSE, (side, name)
        assert own["squares"].mean() == pytest.approx(theirs[f"lambda mean {name}"], rel=CLOSE)
    shown = "layers.0.attention.dense"
    for ours, side in zip(fitted.covariances("layers/attention/dense"), SIDES, strict=True):
        assert distance(ours[0], theirs[f"{side} covariance {shown}"]) < CLOSE
    squares = np.asarray(fitted.modules["layers/attention/dense"]["squares"])[0]
    # Ascending eigenvalues on both sides; theirs lie (out, in).
    assert distance(squares.T, theirs[f"lambda {shown}"]) < 1e-4


SIDES = ("activation", "gradient")


@pytest.mark.slow
@pytest.mark.parametrize("peer", remake.PEERS)
def test_the_goldens_are_what_the_peers_say_today(peer, tmp_path):
    need_peers()
    made, kept = np.load(remake.remake(peer, PEERS_VENV, tmp_path)), golden(peer)
    assert set(made) == set(kept)
    for name, array in made.items():
        if array.dtype.kind == "U":
            assert str(array) == str(kept[name]), name
        else:
            close = 1e-3 if name.startswith("scores ") else CLOSE
            assert array.shape == kept[name].shape and distance(array, kept[name]) < close, name


@pytest.mark.slow
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside Bergson"])
def test_the_gradients_benchmark_builds_one_and_the_same_index(beside, tmp_path):
    if beside:
        need_peers()
    out, script = tmp_path / "results.json", ROOT / "benchmarks" / "gradients.py"
    small = ["--shapes", "14m:64", "--tokens", "128", "--repeats", "1", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, script, *small, *(["--peers", str(PEERS_VENV)] if beside else [])],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(out.read_text())["measured"]["14m:64"]
    assert len(measured) == (3 if beside else 1)
    for name, row in measured.items():
        assert f"| 14m:64 | {name} |" in done.stdout
        assert row["tokens/s"] == pytest.approx(128 / row["wall s"]) and row["peak MiB"] > 100
        assert row["difference"] < CLOSE, "not one and the same gradients"
    assert ("times the tokens/s" if beside else "Ours alone") in done.stdout
