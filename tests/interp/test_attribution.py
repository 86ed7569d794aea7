"""Attribution patching: exact to first order, each of its variants as defined, edges add up."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from on_a_mesh import on_eight_devices
from reference import TINY, HFSites, distance, hf_model, random_params, random_tokens

import pythia_jax as pj
from pythia_jax.interp import activations as values_at
from pythia_jax.interp.activations import activation_gradients, logit_difference
from pythia_jax.interp.attribution import (
    attribution_patching,
    edge_mask,
    edge_readers,
    edge_writers,
)
from pythia_jax.interp.attribution_table import compare, compare_variants, table_text
from pythia_jax.interp.patching import Node, activation_patching, all_nodes, node_mask

CONFIG = replace(TINY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=61)
SEQUENTIAL = replace(CONFIG, use_parallel_residual=False)
BATCH, SEQ = 2, 8
PARAMS = random_params(CONFIG)
CLEAN = random_tokens(CONFIG, BATCH, SEQ)
CORRUPT = random_tokens(CONFIG, BATCH, SEQ, seed=1)
METRIC = logit_difference(3, np.array([5, 6]))
RUNS = (PARAMS, CLEAN, CORRUPT, CONFIG, METRIC)
both_residuals = pytest.mark.parametrize(
    "config", [CONFIG, SEQUENTIAL], ids=["parallel", "sequential"]
)


# To first order


def nearby(scale):
    """Runs whose embeddings differ by `scale` in one place: token 60 lies that near to token 7."""
    params = random_params(CONFIG, dtype=np.float64)
    table = np.asarray(params["embed_in"]["embedding"]).copy()
    table[60] = table[7] + scale * np.random.default_rng(5).standard_normal(table.shape[1])
    params["embed_in"]["embedding"] = jnp.asarray(table)
    corrupt = np.where(CORRUPT == 60, 0, CORRUPT)
    corrupt[:, 2] = 7
    clean = corrupt.copy()
    clean[:, 2] = 60
    return params, clean, corrupt


NEAR_NODES = (
    Node("embed", None, 2),
    Node("attn.z", 0, 7, 1),
    Node("attn.z", 1, None, 0),
    Node("attn.k", 0, 2),
    Node("attn.k", 1, None, 1),
    Node("mlp_out", 0),
)
OPTIONS = {"gradient": {}, "path": {"steps": 3}, "QK fix": {"qk_fix": True}}


@pytest.fixture(scope="module")
def near():
    """By scale: exact effects, and each variant's, in float64."""
    found = {}
    with jax.enable_x64(True):
        for scale in (4e-4, 1e-4):
            params, clean, corrupt = nearby(scale)
            given = (params, clean, corrupt, CONFIG, METRIC, NEAR_NODES)
            exact = np.asarray(activation_patching(*given))
            variants = {
                name: np.asarray(attribution_patching(*given, **options))
                for name, options in OPTIONS.items()
            }
            found[scale] = exact, variants
    return found


@pytest.mark.parametrize("variant", OPTIONS)
def test_the_error_falls_at_second_order_as_the_runs_come_near(variant, near):
    errors = {}
    for scale, (exact, estimates) in near.items():
        assert exact.dtype == np.float64
        errors[scale] = np.linalg.norm(estimates[variant] - exact, axis=1)
        assert (errors[scale] < 0.1 * np.linalg.norm(exact, axis=1)).all()
    ratio = errors[4e-4] / errors[1e-4]
    # 16 for an error of second order, 64 where that vanishes, 4 for a wrong first order.
    assert (ratio > 12).all(), ratio


@pytest.mark.slow
def test_the_table_of_variants_says_how_near_they_are(near):
    with jax.enable_x64(True):
        params, clean, corrupt = nearby(1e-4)
        table = compare_variants(params, clean, corrupt, CONFIG, METRIC, NEAR_NODES, k=2, steps=3)
    exact, variants = near[1e-4]
    assert list(table) == [
        "AtP", "AtP, IG 3", "AtP, QK fix", "AtP, QK fix, IG 3", "AtP, GradDrop",
        "AtP, QK fix, GradDrop",
    ]  # fmt: skip
    assert table["AtP"] == compare(variants["gradient"], exact, k=2)
    assert table["AtP, IG 3"] == compare(variants["path"], exact, k=2)
    assert table["AtP, QK fix"] == compare(variants["QK fix"], exact, k=2)
    assert table["AtP"].pearson > 0.999 and table["AtP"].recall == 1
    lines = table_text(table).splitlines()
    assert len(lines) == 2 + len(table) and lines[2].startswith("| AtP | 1.000 |")


def test_comparison_is_of_means_over_rows():
    exact = np.array([[1.0, 3.0], [-4.0, -4.0], [0.0, 0.2], [1.0, 1.0]])
    estimate = np.array([[2.0, 2.0], [-1.0, -1.0], [3.0, 3.0], [0.0, 0.0]])
    means = np.array([[2, -4, 0.1, 1], [2, -1, 3, 0]])
    found = compare(estimate, exact, k=2)
    correlation: Any = np.corrcoef(means)
    assert found.pearson == pytest.approx(correlation[0, 1])
    correlation = np.corrcoef(np.argsort(np.argsort(means)))
    assert found.spearman == pytest.approx(correlation[0, 1])
    assert found.recall == 0.5  # of -4 and 2, only 2 is among the estimates 3 and 2
    with pytest.raises(ValueError, match=r"shape \(4, 2\) beside exact effects of \(4,\)"):
        compare(estimate, exact[:, 0])
    with pytest.raises(ValueError, match="k: 5 of 4 nodes"):
        compare(estimate, exact, k=5)
    with pytest.raises(ValueError, match="estimates: all are 1"):
        compare(np.ones(4), exact[:, 0], k=1)
    with pytest.raises(ValueError, match="exact effects: that of node 1 is not finite"):
        compare(np.arange(4.0), np.array([1, np.nan, 2, 3]), k=1)


# Each variant as defined


WRITERS = ("embed", "attn.z", "mlp_out")


def gradients_in_torch(tokens, config, change=None):
    model = hf_model(PARAMS, config)
    with HFSites(model, config, change) as hooks:
        last = model(torch.tensor(tokens).long(), use_cache=False).logits[:, -1]
        (last[:, 3].sum() - last[0, 5] - last[1, 6]).backward()
    return hooks


@both_residuals
def test_grad_drop_is_torchs_with_one_layer_detached(config):
    def drop(dropped):
        return lambda layer, value: value.detach() if layer == dropped else value

    difference = {
        site: gradients_in_torch(CLEAN, config).values()[site] - value
        for site, value in gradients_in_torch(CORRUPT, config).values().items()
        if site in WRITERS
    }
    nodes = edge_writers(config)
    expected = np.zeros((len(nodes), BATCH))
    for dropped in range(config.num_hidden_layers):
        change = dict.fromkeys(("attn_out", "mlp_out"), drop(dropped))
        hooks = gradients_in_torch(CORRUPT, config, change)
        for i, node in enumerate(nodes):
            values = hooks._values[node.site]
            grad = values[node.layer or 0].grad
            if grad is None:  # what a dropped layer writes leads nowhere
                continue
            delta = difference[node.site]
            product = grad.numpy() * (delta if node.layer is None else delta[node.layer])
            product = product if node.head is None else product[:, :, node.head]
            expected[i] += np.abs(product.reshape(BATCH, -1).sum(axis=1))
    expected /= config.num_hidden_layers - 1
    got = attribution_patching(PARAMS, CLEAN, CORRUPT, config, METRIC, nodes, grad_drop=True)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_steps_are_the_mean_gradient_on_the_way_of_the_embeddings():
    nodes = all_nodes(CONFIG, SEQ, ("attn.z", "embed"), positions=[None])
    sites = ("embed", "attn.z")
    clean, corrupt = (values_at(PARAMS, tokens, CONFIG, sites) for tokens in (CLEAN, CORRUPT))
    way = clean["embed"] - corrupt["embed"]

    @jax.jit
    def gradient(point):
        def run(taps):
            taps = {**taps, "embed": taps["embed"] + point * way}
            return METRIC(pj.forward(PARAMS, CORRUPT, CONFIG, taps=taps), CORRUPT).sum()

        return jax.grad(run)({site: jnp.zeros_like(clean[site]) for site in sites})

    grads = [gradient(point) for point in (1 / 3, 2 / 3, 1.0)]
    product = {s: (clean[s] - corrupt[s]) * sum(g[s] for g in grads) / 3 for s in sites}
    heads = product["attn.z"].sum(axis=(2, 4)).transpose(0, 2, 1).reshape(-1, BATCH)
    expected = np.concatenate([heads, product["embed"].sum(axis=(1, 2))[None]])
    got = attribution_patching(*RUNS, nodes, steps=3)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sharpness", [1.0, 60.0], ids=["soft", "saturated"])
def test_qk_fix_scores_the_pattern_that_the_model_makes_of_the_patched_value(sharpness):
    params = jax.tree.map(lambda x: x, PARAMS)
    qkv = params["layers"]["attention"]["query_key_value"]
    params["layers"]["attention"]["query_key_value"] = {**qkv, "kernel": sharpness * qkv["kernel"]}
    _, seen, gradient = activation_gradients(params, CORRUPT, CONFIG, METRIC, ("attn.pattern",))
    nodes = [
        Node(site, layer, position, head)
        for site in ("attn.k", "attn.q")
        for layer in (0, 1)
        for position in (None, 0, 3, 7)
        for head in (0, None)
    ]
    if sharpness > 1:
        assert np.mean(np.max(seen["attn.pattern"], axis=-1) > 0.99) > 0.5
    expected = []
    for site in ("attn.k", "attn.q"):
        value = values_at(params, CLEAN, CONFIG, (site,))[site]

        @jax.jit
        @jax.vmap
        def patched(index, site=site, value=value):
            edits = {site: (node_mask(site, index, CONFIG, SEQ), value)}
            captured = pj.forward(params, CORRUPT, CONFIG, capture=("attn.pattern",), edits=edits)
            # Other layers follow; the fix is about the pattern of the node's own.
            return captured[1]["attn.pattern"][index[0]]

        here = [node for node in nodes if node.site == site]
        index = np.array([[-1 if i is None else i for i in node[1:]] for node in here])
        for node, pattern in zip(here, patched(index), strict=True):
            change = pattern - seen["attn.pattern"][node.layer]
            expected.append((change * gradient["attn.pattern"][node.layer]).sum(axis=(1, 2, 3)))
    got = attribution_patching(params, CLEAN, CORRUPT, CONFIG, METRIC, nodes, qk_fix=True)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5 * scale)


# Edges


@both_residuals
def test_edges_from_a_writer_and_into_a_reader_sum_to_the_nodes(config):
    """By the chain rule, what a writer does it does through its readers; and what a reader gets is
    the sum of what writers sent it, the stream being linear."""
    runs = (PARAMS, CLEAN, CORRUPT, config, METRIC)
    edges = np.asarray(attribution_patching(*runs, granularity="edge"))
    writers, readers = edge_writers(config), edge_readers(config)
    assert edges.shape == (len(writers), len(readers), BATCH)
    assert ((edges != 0).any(axis=2) == edge_mask(config)).all()
    nodes = attribution_patching(*runs, (*writers, *readers))
    assert distance(edges.sum(axis=1), nodes[: len(writers)]) <= 1e-5
    assert distance(edges.sum(axis=0), nodes[len(writers) :]) <= 1e-5


@pytest.mark.slow
def test_an_edge_is_first_order_in_what_one_writer_sends_to_one_reader():
    cases = [
        (Node("embed"), Node("attn.v_in", 1, None, 0)),
        (Node("attn.z", 0, None, 1), Node("mlp_in", 0)),  # within a layer: the residual sequential
        (Node("attn.z", 0, None, 0), Node("attn.k_in", 1, None, 1)),
        (Node("mlp_out", 0), Node("resid_post", 1)),
    ]
    errors = {}
    with jax.enable_x64(True):

        @partial(jax.jit, static_argnames="site")
        def metric(params, tokens, site, tap):
            return METRIC(pj.forward(params, tokens, SEQUENTIAL, taps={site: tap}), tokens)

        for scale in (4e-4, 1e-4):
            params, clean, corrupt = nearby(scale)
            edges = attribution_patching(
                params, clean, corrupt, SEQUENTIAL, METRIC, granularity="edge"
            )
            seen = [
                values_at(params, tokens, SEQUENTIAL, ("embed", "attn.z", "mlp_out"))
                for tokens in (clean, corrupt)
            ]
            for writer, reader in cases:
                sent = seen[0][writer.site] - seen[1][writer.site]
                if writer.layer is not None:
                    sent = sent[writer.layer]
                if writer.site == "attn.z":
                    size, head = CONFIG.head_size, writer.head or 0
                    dense = params["layers"]["attention"]["dense"]["kernel"][writer.layer]
                    sent = sent[:, :, head] @ dense[head * size : (head + 1) * size]
                tap = jnp.zeros((2, *sent.shape)).at[reader.layer].set(sent)
                if reader.head is not None:
                    tap = jnp.zeros((2, BATCH, SEQ, 2, sent.shape[-1]))
                    tap = tap.at[reader.layer, :, :, reader.head].set(sent)
                exact = metric(params, corrupt, reader.site, tap)
                exact -= metric(params, corrupt, reader.site, 0 * tap)
                place = edge_writers(SEQUENTIAL).index(writer), edge_readers(CONFIG).index(reader)
                assert np.abs(exact).max() > 1e-9
                errors[scale, writer, reader] = distance(edges[place], exact)
    for writer, reader in cases:
        small, large = errors[1e-4, writer, reader], errors[4e-4, writer, reader]
        assert small < 0.02 and large / small > 3, (writer, reader)


# Whatever the call


@pytest.mark.slow
def test_runs_under_jit_and_defaults_to_all_nodes():
    nodes = all_nodes(CONFIG, SEQ)
    given = attribution_patching(*RUNS, nodes)
    default = jax.jit(
        lambda params, clean, corrupt: attribution_patching(params, clean, corrupt, CONFIG, METRIC)
    )(PARAMS, CLEAN, CORRUPT)
    np.testing.assert_allclose(default, given, rtol=0, atol=1e-6)


def test_bad_input_is_one_clear_error():
    def run(nodes=None, **options):
        return attribution_patching(*RUNS, nodes, **options)

    with pytest.raises(ValueError, match="granularity: 'heads'; choose node or edge"):
        run(granularity="heads")
    with pytest.raises(ValueError, match="'edge': nodes, qk_fix and grad_drop are for 'node'"):
        run(granularity="edge", grad_drop=True)
    with pytest.raises(ValueError, match=r"qk_fix: no node is at attn\.q or attn\.k"):
        run(qk_fix=True)
    with pytest.raises(ValueError, match="steps: -1 points"):
        run(steps=-1)
    with pytest.raises(ValueError, match="layer 2: choose from 0 to 1"):
        run([Node("mlp_out", 2)])
    one = replace(CONFIG, num_hidden_layers=1)
    with pytest.raises(ValueError, match="grad_drop: it leaves out one layer"):
        attribution_patching(random_params(one), CLEAN, CORRUPT, one, METRIC, grad_drop=True)
    with pytest.raises(ValueError, match="of row 1 is not finite"):
        attribution_patching(
            *RUNS[:4], logit_difference(3, np.array([5, 61])), [Node("mlp_out", 0)]
        )


@pytest.mark.slow
def test_eight_devices_find_what_one_does():
    script = Path(__file__).with_name("attributed_on_a_mesh.py")
    found = on_eight_devices(script, x64=True)
    assert max(found.values()) <= 1e-10, found
