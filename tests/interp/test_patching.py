"""A patched run is torch's with the same values put in; nodes are what they name."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from reference import TINY, HFSites, hf_logits, hf_model, random_params, random_tokens

import pythia_jax as pj
from pythia_jax.interp.activations import logit_difference
from pythia_jax.interp.patching import Node, activation_patching, all_nodes
from pythia_jax.model.sites import SITES

CONFIG = replace(TINY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=61)
SEQUENTIAL = replace(CONFIG, use_parallel_residual=False)
BATCH, SEQ = 2, 9
PARAMS = random_params(CONFIG)
CLEAN = random_tokens(CONFIG, BATCH, SEQ)
CORRUPT = random_tokens(CONFIG, BATCH, SEQ, seed=1)
METRIC = logit_difference(3, np.array([5, 6]))
NODES = (
    Node("mlp.post", 0, 4),
    Node("embed", position=2),
    Node("attn.q", 0, None, 1),
    Node("attn.z", 0, 7, 0),
    Node("resid_pre", 1, 3),
    Node("attn.pattern", 0, 8, 1),
    Node("attn.z", 0, None, None),
    Node("attn.k", 1, 2, None),
    Node("ln_final", None, 8),
    Node("embed"),
    Node("attn.z", 1, 8, 0),
)


def in_torch(config, node):
    """The metric of the corrupt run with the clean values of one node, by torch's hooks."""
    model = hf_model(PARAMS, config)
    with HFSites(model, config) as hooks:
        hf_logits(model, CLEAN)
    clean = hooks.values()[node.site]
    axes = [axis for axis in SITES[node.site] if axis != "layer"]

    def change(layer, value):
        if node.layer not in (None, layer):
            return value
        here = [slice(None)] * value.ndim
        if node.position is not None:
            here[axes.index("seq")] = node.position
        if node.head is not None:
            here[axes.index("heads")] = node.head
        put = torch.from_numpy(clean if node.layer is None else clean[layer])
        value = value.clone()
        value[tuple(here)] = put[tuple(here)]
        return value

    with HFSites(model, config, {node.site: change}):
        last = hf_logits(model, CORRUPT)[:, -1]
    return last[:, 3] - last[range(BATCH), [5, 6]]


def metric_of(tokens, config=CONFIG):
    return METRIC(pj.forward(PARAMS, tokens, config), tokens)


@pytest.mark.parametrize(
    ("config", "nodes"), [(CONFIG, NODES), (SEQUENTIAL, NODES[:2])], ids=["parallel", "sequential"]
)
def test_effects_are_torchs_with_the_same_values_put_in(config, nodes):
    effects = activation_patching(PARAMS, CLEAN, CORRUPT, config, METRIC, nodes, chunk=2)
    assert effects.shape == (len(nodes), BATCH)
    before = metric_of(CORRUPT, config)
    for node, effect in zip(nodes, effects, strict=True):
        expected = in_torch(config, node) - before
        assert np.abs(expected).max() > 1e-4, node
        np.testing.assert_allclose(effect, expected, rtol=0, atol=1e-5, err_msg=str(node))


def test_with_every_embedding_patched_nothing_of_the_corrupt_run_is_left():
    (effect,) = activation_patching(PARAMS, CLEAN, CORRUPT, CONFIG, METRIC, [Node("embed")])
    np.testing.assert_allclose(effect, metric_of(CLEAN) - metric_of(CORRUPT), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_neither_chunk_nor_order_nor_jit_changes_an_effect():
    nodes = all_nodes(CONFIG, SEQ, ("attn.z",), positions=[8, 3])

    def run(nodes, chunk):
        return activation_patching(PARAMS, CLEAN, CORRUPT, CONFIG, METRIC, nodes, chunk=chunk)

    whole = run(nodes, 64)
    np.testing.assert_allclose(run(nodes, 3), whole, rtol=0, atol=1e-6)
    order = np.random.default_rng(0).permutation(len(nodes))
    shuffled = run([nodes[i] for i in order], 5)
    np.testing.assert_allclose(shuffled, whole[order], rtol=0, atol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda: run(nodes, 5))(), whole, rtol=0, atol=1e-6)


def test_equal_runs_have_no_effect():
    nodes = all_nodes(CONFIG, SEQ, ("attn.z",), positions=[None])
    effects = activation_patching(PARAMS, CLEAN, CLEAN, CONFIG, METRIC, nodes)
    np.testing.assert_allclose(effects, 0, atol=1e-6)


def test_all_nodes_are_each_place_once():
    sites = ("embed", "resid_pre", "attn.q", "mlp_out")
    nodes = all_nodes(CONFIG, SEQ, sites)
    assert len(nodes) == len(set(nodes)) == SEQ * (1 + 2 + 2 * 2 + 2)
    assert Node("attn.q", 1, 4, 0) in nodes and Node("embed", None, 8) in nodes
    assert all_nodes(CONFIG, SEQ, [("attn.z", [1])], positions=[None]) == (
        Node("attn.z", 1, None, 0),
        Node("attn.z", 1, None, 1),
    )


def test_patching_what_the_first_layer_reads_is_patching_what_it_makes_of_it():
    pairs = [("attn.k_in", "attn.k"), ("attn.v_in", "attn.v"), ("mlp_in", "mlp_out")]
    nodes = [Node(site, 0, 3) for site in np.ravel(pairs)]
    effects = activation_patching(PARAMS, CLEAN, CORRUPT, CONFIG, METRIC, nodes)
    assert (np.abs(effects).max(axis=1) > 1e-4).all()
    np.testing.assert_allclose(effects[::2], effects[1::2], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("node", "says"),
    [
        (("mlp", 0), r"no site 'mlp'"),
        (("mlp_out",), r"nodes\[1\].*which layer\? Choose from 0 to 1"),
        (("mlp_out", 2), r"nodes\[1\].*layer 2: choose from 0 to 1"),
        (("mlp_out", 0, 9), r"position 9: choose from 0 to 8"),
        (("mlp_out", 0, -1), r"position -1: choose from 0 to 8"),
        (("attn.z", 0, None, 2), r"head 2: choose from 0 to 1"),
        (("mlp_out", 0, None, 0), r"site 'mlp_out' has no head"),
        (("embed", 0), r"site 'embed' has no layer"),
        (("embed", 0, 0, 0, 0), r"\(site, layer, position, head\) is wanted"),
    ],
)
def test_a_node_that_is_not_there_is_one_clear_error(node, says):
    with pytest.raises(ValueError, match=says):
        activation_patching(PARAMS, CLEAN, CORRUPT, CONFIG, METRIC, [Node("embed"), node])


def test_bad_input_is_one_clear_error():
    with pytest.raises(ValueError, match="nodes: name at least one"):
        activation_patching(PARAMS, CLEAN, CORRUPT, CONFIG, METRIC, [])
    with pytest.raises(ValueError, match=r"clean tokens of shape \(2, 9\) and corrupt ones"):
        activation_patching(PARAMS, CLEAN, CORRUPT[:, 1:], CONFIG, METRIC, NODES)
    with pytest.raises(ValueError, match="chunk: 0 nodes"):
        activation_patching(PARAMS, CLEAN, CORRUPT, CONFIG, METRIC, NODES, chunk=0)
    with pytest.raises(ValueError, match=r"of row 0 is not finite"):
        activation_patching(PARAMS, CLEAN, CORRUPT, CONFIG, logit_difference(3, 61), NODES[:1])
    with pytest.raises(ValueError, match="position 9"):
        all_nodes(CONFIG, SEQ, positions=[9])
