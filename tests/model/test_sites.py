"""Named sites: what is captured, tapped and edited is what torch's hooks see and change."""

import operator
import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import (
    HF_SITES,
    TINY,
    HFSites,
    distance,
    hf_logits,
    hf_model,
    hf_token_losses,
    random_params,
    random_tokens,
)

from pythia_jax.configs import Runtime
from pythia_jax.model import gptneox, sites
from pythia_jax.model.loss import loss, token_losses
from pythia_jax.model.sites import MATERIALISED, SITES, SPLIT_READERS, site_shape

forward: Any = gptneox.forward  # logits alone, or with what was captured
BATCH, SEQ = 2, 19
CONFIGS = {"parallel": TINY, "sequential": replace(TINY, use_parallel_residual=False)}
RUNTIMES = {"scan": Runtime(), "unrolled": Runtime(scan_layers=False)}
PARAMS = random_params(TINY)
TOKENS = random_tokens(TINY, BATCH, SEQ + 1)

both_residuals = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
both_runs = pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES)


def shape_of(site):
    return site_shape(site, TINY, BATCH, SEQ)


@partial(jax.jit, static_argnames=("config", "capture", "runtime"))
def run(hooks, config, capture, runtime):
    return forward(PARAMS, TOKENS[:, :-1], config, capture=capture, runtime=runtime, **hooks)


def logits(*, config=TINY, capture=(), runtime=Runtime(), **hooks):
    """Jitted, over the tokens that the losses have as inputs."""
    return run(hooks, config, capture, runtime)


def random_tap(site, scale=0.1, seed=3):
    values = scale * np.random.default_rng(seed).standard_normal(shape_of(site))
    return jnp.asarray(values, jnp.float32)


@pytest.fixture(scope="module")
def torch_sites():
    """By residual: values at the sites that torch has, gradients of the mean loss by all."""

    def seen(config, change=None):
        model = hf_model(PARAMS, config)
        with HFSites(model, config, change) as hooks:
            hf_token_losses(model, TOKENS).mean().backward()
        return hooks

    split = dict.fromkeys(SPLIT_READERS, lambda layer, value: value)
    found = {}
    for name, config in CONFIGS.items():
        plain, readers = seen(config), seen(config, split)
        found[name] = (plain.values(), {**readers.gradients(), **plain.gradients()})
    return found


def test_every_site_but_the_split_readers_has_its_place_in_the_torch_model():
    assert set(SITES) == {*HF_SITES, *SPLIT_READERS}


@both_runs
@pytest.mark.parametrize("name", CONFIGS)
def test_captured_values_equal_those_of_torch_hooks(name, runtime, torch_sites):
    _, captured = logits(capture=tuple(SITES), config=CONFIGS[name], runtime=runtime)
    assert set(captured) == set(SITES)
    values, _ = torch_sites[name]
    for site in SITES:
        assert captured[site].shape == shape_of(site), site
    for site in HF_SITES:
        ours, theirs = np.asarray(captured[site]), values[site]
        if site == "attn.scores":
            # Masked scores are the lowest number there is, give or take the score itself.
            masked = theirs < -1e30
            assert (masked == np.triu(np.ones((SEQ, SEQ), bool), 1)).all()
            assert (ours[masked] < -1e30).all()
            ours, theirs = ours[~masked], theirs[~masked]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5, err_msg=site)
    for reader in SPLIT_READERS:
        for head in range(TINY.num_attention_heads):
            copy = captured[reader][..., head, :]
            np.testing.assert_allclose(copy, captured["resid_pre"], rtol=0, atol=1e-5)


def test_captured_values_do_not_depend_on_what_else_is_captured():
    _, together = logits(capture=tuple(SITES))
    for site in ("resid_pre", "attn.q", "attn.z", "mlp.post"):
        _, alone = logits(capture=(site,))
        assert set(alone) == {site}
        np.testing.assert_allclose(alone[site], together[site], rtol=0, atol=1e-5)


def test_capture_may_be_the_name_of_one_site():
    one, several = logits(capture="resid_pre"), logits(capture=("resid_pre",))
    assert list(one[1]) == list(several[1]) == ["resid_pre"]


def test_capture_leaves_the_logits():
    plain = logits()
    np.testing.assert_allclose(logits(capture=("resid_post",))[0], plain, rtol=0, atol=2e-6)
    np.testing.assert_allclose(logits(capture=tuple(SITES))[0], plain, rtol=0, atol=1e-5)


def test_pattern_rows_are_probabilities_over_the_past():
    _, captured = logits(capture=("attn.pattern", "attn.scores"))
    pattern = np.asarray(captured["attn.pattern"])
    np.testing.assert_allclose(pattern.sum(-1), 1, atol=1e-6)
    assert (np.triu(pattern, 1) == 0).all()
    scores = np.asarray(captured["attn.scores"], np.float64)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(pattern, weights / weights.sum(-1, keepdims=True), atol=1e-6)


CHOSEN = ("resid_pre", "attn.q", "attn.scores", "attn.pattern", "mlp.post")


@both_runs
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_chosen_layers_are_rows_of_the_whole_in_the_order_asked(runtime, dtype):
    runtime = replace(runtime, dtype=dtype)
    _, whole = logits(capture=CHOSEN, runtime=runtime)
    _, chosen = logits(capture=tuple((site, (2, 0)) for site in CHOSEN), runtime=runtime)
    for site in CHOSEN:
        assert chosen[site].dtype == whole[site].dtype, site
        wide = dtype is None or site in MATERIALISED
        assert whole[site].dtype == (jnp.float32 if wide else jnp.bfloat16)
        np.testing.assert_array_equal(chosen[site], whole[site][np.array([2, 0])])


@pytest.mark.parametrize("layers", [[0, 2], (1,), range(3), np.array([1, 2]), [np.int64(2)]])
def test_layers_may_be_named_by_any_sequence_of_whole_numbers(layers):
    capture = (("resid_pre", layers), "embed")
    found = jax.eval_shape(lambda p: forward(p, TOKENS, TINY, capture=capture)[1], PARAMS)
    assert set(found) == {"resid_pre", "embed"}
    assert found["resid_pre"].shape == (len(layers), BATCH, SEQ + 1, TINY.hidden_size)


def test_chosen_layers_hold_no_array_of_all_layers():
    def largest(capture):
        run = lambda p: forward(p, TOKENS[:, :-1], TINY, capture=capture)[1]  # noqa: E731
        return jax.eval_shape(run, PARAMS)["resid_pre"].shape, jax.jit(run).lower(
            PARAMS
        ).as_text().count(f"tensor<3x{BATCH}x{SEQ}x{TINY.hidden_size}xf32>")

    assert largest((("resid_pre", [1]),)) == ((1, BATCH, SEQ, TINY.hidden_size), 0)
    assert largest(("resid_pre",))[1] > 0


@both_runs
@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_by_a_zero_tap_equals_retain_grad(name, runtime, torch_sites):
    _, theirs = torch_sites[name]
    taps = {site: jnp.zeros(shape_of(site)) for site in SITES}

    def tapped(taps):
        return loss(PARAMS, TOKENS, CONFIGS[name], taps=taps, runtime=runtime)

    gradient = jax.jit(jax.grad(tapped))(taps)
    for site in SITES:
        assert distance(gradient[site], theirs[site]) <= 1e-5, site
    # Through the norm the stream is read by 3 x heads copies; the stream has their sum and what
    # goes on to the MLP and past the block.
    read = sum(gradient[reader].sum(axis=3) for reader in SPLIT_READERS)
    past = theirs["resid_post"] + theirs["mlp_in"]
    if not CONFIGS[name].use_parallel_residual:
        assert distance(past, theirs["attn_out"]) <= 1e-6
    assert distance(read + past, theirs["resid_pre"]) <= 1e-5


def test_edit_comes_after_the_tap_and_capture_after_both():
    mask = np.zeros(shape_of("resid_pre"), bool)
    mask[1, :, 4] = True
    hooks = {
        "taps": {"resid_pre": random_tap("resid_pre")},
        "edits": {"resid_pre": (mask, jnp.zeros(shape_of("resid_pre")))},
    }
    _, captured = logits(capture=("resid_pre", "embed"), **hooks)
    assert (captured["resid_pre"][mask] == 0).all()
    untouched = captured["resid_pre"][0] - captured["embed"]
    np.testing.assert_allclose(untouched, hooks["taps"]["resid_pre"][0], rtol=0, atol=1e-6)


def test_no_gradient_flows_through_what_was_replaced():
    mask = np.zeros((3, 1, 1, 1), bool)
    mask[1] = True

    def edited(embedding, value):
        params = {**PARAMS, "embed_in": {"embedding": embedding}}
        return loss(params, TOKENS, TINY, edits={"resid_pre": (jnp.asarray(mask), value)})

    by_embedding, by_value = jax.grad(edited, argnums=(0, 1))(
        PARAMS["embed_in"]["embedding"], jnp.ones(TINY.hidden_size)
    )
    assert (by_embedding == 0).all()
    assert (by_value != 0).all()


@pytest.mark.parametrize(
    "shape",
    [
        (),
        (48,),
        (19, 48),
        (2, 1, 48),
        (1, 48),
        (3, 1, 1, 1),
        (1, 1, 1, 1),
        (3, 1, 1, 48),
        (1, 2, 19, 1),
        (3, 2, 19, 48),
    ],
    ids=str,
)
def test_taps_and_edits_broadcast_to_the_site(shape):
    small = jnp.asarray(0.3 * np.random.default_rng(7).standard_normal(shape), jnp.float32)
    full = jnp.broadcast_to(small, shape_of("resid_post"))

    def hooked(tap, mask, value):
        return logits(taps={"resid_post": tap}, edits={"mlp_out": (mask, value)})

    expected = hooked(full, full > 0, full)
    np.testing.assert_allclose(hooked(small, small > 0, small), expected, rtol=0, atol=2e-6)
    if small.ndim == 4:
        mixed = hooked(full, full > 0, small), hooked(small, small > 0, full)
        np.testing.assert_allclose(mixed[0], expected, rtol=0, atol=2e-6)
        np.testing.assert_allclose(mixed[1], expected, rtol=0, atol=2e-6)


def test_scalar_a_layer_scales_what_it_multiplies_in_the_gradient():
    taps = {"resid_post": jnp.zeros((3, 1, 1, 1))}
    whole = {"resid_post": jnp.zeros(shape_of("resid_post"))}
    gradient = jax.jit(jax.grad(lambda t: loss(PARAMS, TOKENS, TINY, taps=t)))
    small, full = gradient(taps)["resid_post"], gradient(whole)["resid_post"]
    np.testing.assert_allclose(small.ravel(), full.sum(axis=(1, 2, 3)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("reader", "read"), [("q_in", "q"), ("k_in", "k"), ("v_in", "v")])
def test_tap_on_the_stream_of_one_head_reaches_one_projection_of_that_head(reader, read):
    layer, head = 2, 1  # the last layer, after which nothing is read again
    tap = np.zeros(shape_of(f"attn.{reader}"), np.float32)
    tap[layer, :, :, head] = 0.5 * np.random.default_rng(1).standard_normal((BATCH, SEQ, 48))
    wanted = ("attn.q", "attn.k", "attn.v", "mlp_in", "resid_pre")
    _, before = logits(capture=wanted)
    _, after = logits(capture=wanted, taps={f"attn.{reader}": jnp.asarray(tap)})
    for site in wanted:
        moved = np.abs(after[site] - before[site]) > 1e-4
        if site != f"attn.{read}":
            assert not moved.any(), site
            continue
        assert moved[layer, :, :, head].mean() > 0.9
        moved[layer, :, :, head] = False
        assert not moved.any()


def test_tap_on_the_readers_of_all_heads_is_a_tap_on_the_norms_input():
    tap = 0.2 * np.random.default_rng(1).standard_normal((3, BATCH, SEQ, 1, 48))
    model: Any = hf_model(PARAMS, TINY)
    added = [
        layer.input_layernorm.register_forward_pre_hook(
            lambda m, args, i=i: (args[0] + torch.tensor(tap[i, :, :, 0]).float(),)
        )
        for i, layer in enumerate(model.gpt_neox.layers)
    ]
    expected = hf_logits(model, TOKENS[:, :-1])
    assert len(added) == 3
    taps = {reader: jnp.asarray(tap, jnp.float32) for reader in SPLIT_READERS}
    np.testing.assert_allclose(logits(taps=taps), expected, rtol=0, atol=2e-5)


@both_residuals
def test_tap_on_what_the_mlp_reads_leaves_the_stream_itself(config):
    tap = {"mlp_in": random_tap("mlp_in").at[:2].set(0)}
    wanted = ("attn_out", "mlp_in", "mlp_out", "resid_pre", "resid_post")
    _, before = logits(config=config, capture=wanted)
    _, after = logits(config=config, capture=wanted, taps=tap)
    change = {site: np.asarray(after[site] - before[site])[2] for site in wanted}
    assert (np.abs(change["attn_out"]) < 1e-5).all() and (np.abs(change["resid_pre"]) < 1e-5).all()
    np.testing.assert_allclose(change["mlp_in"], tap["mlp_in"][2], rtol=0, atol=1e-5)
    np.testing.assert_allclose(change["resid_post"], change["mlp_out"], rtol=0, atol=1e-5)
    assert np.abs(change["mlp_out"]).max() > 1e-3


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_sites_work_under_remat(remat):
    hooks = {"taps": {"mlp.post": jnp.zeros(shape_of("mlp.post"))}}

    def gradient(runtime):
        return jax.jit(jax.grad(lambda h: loss(PARAMS, TOKENS, TINY, runtime=runtime, **h)))(hooks)

    got = gradient(Runtime(remat=remat))["taps"]["mlp.post"]
    assert distance(got, gradient(Runtime())["taps"]["mlp.post"]) <= 2e-6


def test_sites_work_under_vmap():
    taps = jnp.stack([random_tap("resid_pre", seed=seed) for seed in range(3)])
    together = jax.vmap(lambda tap: forward(PARAMS, TOKENS[:, :-1], TINY, taps={"resid_pre": tap}))
    expected = [logits(taps={"resid_pre": tap}) for tap in taps]
    np.testing.assert_allclose(together(taps), jnp.stack(expected), rtol=0, atol=5e-6)


def test_token_losses_take_taps_and_edits():
    tap = random_tap("ln_final")
    expected = token_losses(PARAMS, TOKENS, TINY, taps={"ln_final": tap})
    assert np.abs(expected - token_losses(PARAMS, TOKENS, TINY)).max() > 1e-3
    value = loss(PARAMS, TOKENS, TINY, taps={"ln_final": tap})
    assert abs(value - expected.mean()) <= 1e-6
    edited = token_losses(
        PARAMS, TOKENS, TINY, edits={"ln_final": (jnp.array(True), jnp.zeros(()))}
    )
    np.testing.assert_allclose(edited, np.log(TINY.vocab_size), rtol=1e-6)


# The same program where nothing is asked for.


SOURCE_LINES = re.compile(
    r"^(?:FileNames|FunctionNames|FileLocations|StackFrames)\n(?:.+\n)*"
    r'|, metadata=\{(?:[^{}"]|"[^"]*")*\}',
    re.MULTILINE,
)


def programs(runtime, taps=None):
    """The forward pass and the gradient, lowered."""
    jax.clear_caches()
    run = jax.jit(lambda p, t: forward(p, t[:, :-1], TINY, taps=taps, runtime=runtime))
    gradient = jax.jit(jax.grad(lambda p, t: loss(p, t, TINY, taps=taps, runtime=runtime)))
    return [f.lower(PARAMS, TOKENS) for f in (run, gradient)]


def texts(programs):
    return [program.as_text() for program in programs]


def optimised_texts(programs):
    """HLO as XLA leaves it, without the lines of ours that it came from."""
    # The level concerns the machine code made of the HLO: the text is the same, in half the time.
    fast = {"xla_backend_optimization_level": "0"}
    return [SOURCE_LINES.sub("", program.compile(fast).as_text()) for program in programs]


@both_runs
@pytest.mark.parametrize("remat", ["none", "full"])
def test_program_without_hooks_is_that_without_the_feature(runtime, remat, monkeypatch):
    runtime = replace(runtime, remat=remat)
    plain, tapped = programs(runtime), programs(runtime, taps={"resid_post": jnp.ones(())})
    plain_texts, plain_optimised = texts(plain), optimised_texts(plain)
    assert not any("metadata" in text or ".py" in text for text in plain_optimised)
    assert texts(programs(runtime)) == texts(programs(runtime, taps={})) == plain_texts
    assert all(map(operator.ne, texts(tapped), plain_texts))
    assert all(map(operator.ne, optimised_texts(tapped), plain_optimised))
    monkeypatch.setattr(sites.LayerHooks, "__call__", lambda self, site, value: value)
    monkeypatch.setattr(sites.LayerHooks, "wants", lambda self, *names: False)
    bypassed = programs(runtime)
    assert texts(bypassed) == plain_texts
    assert optimised_texts(bypassed) == plain_optimised


# Mistakes.


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("resid_mid", "resid_pre"), ("attn.qq", "attn.q"), ("mlp_post", "mlp.post"), ("Z", None)],
)
def test_unknown_site_is_an_error_that_names_the_nearest(wrong, nearest):
    for hooks in (
        {"capture": (wrong,)},
        {"capture": ((wrong, [0]),)},
        {"taps": {wrong: jnp.zeros(())}},
        {"edits": {wrong: (True, jnp.zeros(()))}},
    ):
        with pytest.raises(ValueError, match=f"no site '{wrong}'; the nearest is") as error:
            forward(PARAMS, TOKENS[:, :-1], TINY, **hooks)
        assert next(iter(hooks)) in str(error.value)
        if nearest and wrong != "resid_mid":
            assert f"nearest is '{nearest}'" in str(error.value)


@pytest.mark.parametrize(
    "shape", [(47,), (4, 1, 1, 1), (2, 18, 48), (1, 3, 2, 19, 48), (3, 2, 19, 48, 1)], ids=str
)
def test_shape_that_does_not_broadcast_is_an_error_that_gives_both(shape):
    array = jnp.zeros(shape)
    for hooks in (
        {"taps": {"resid_pre": array}},
        {"edits": {"resid_pre": (array > 0, jnp.zeros(()))}},
        {"edits": {"resid_pre": (True, array)}},
    ):
        with pytest.raises(ValueError) as error:
            forward(PARAMS, TOKENS[:, :-1], TINY, **hooks)
        assert str(shape) in str(error.value) and "(3, 2, 19, 48)" in str(error.value)
        assert "resid_pre" in str(error.value)


@pytest.mark.parametrize("edit", [jnp.zeros(48), (jnp.zeros(48),), (True, 1.0, 2.0), None])
def test_edit_that_is_no_pair_is_an_error(edit):
    with pytest.raises(ValueError, match="pair"):
        forward(PARAMS, TOKENS[:, :-1], TINY, edits={"resid_pre": edit})


@pytest.mark.parametrize(
    "capture",
    [
        (("resid_pre", [3]),),
        (("resid_pre", [-1]),),
        (("resid_pre", []),),
        (("resid_pre", [1, 1]),),
        (("embed", [0]),),
        (("resid_pre", 0),),
        (("resid_pre", [0.5]),),
        (("resid_pre", [0]), ("resid_pre", [1])),
        ("resid_pre", [0, 2]),
        (3,),
        (None,),
    ],
    ids=str,
)
def test_capture_that_cannot_be_is_a_clear_error(capture):
    with pytest.raises(ValueError, match=r"^capture"):
        forward(PARAMS, TOKENS[:, :-1], TINY, capture=capture)


@pytest.mark.parametrize("site", MATERIALISED)
@pytest.mark.parametrize("way", ["capture", "some layers", "taps", "edits"])
def test_scores_and_pattern_need_attention_that_holds_them(site, way, caplog):
    hooks = {
        "capture": {"capture": (site,)},
        "some layers": {"capture": ((site, [1]),)},
        "taps": {"taps": {site: jnp.zeros(())}},
        "edits": {"edits": {site: (False, jnp.zeros(()))}},
    }[way]
    with pytest.raises(ValueError, match=f"'xla' never holds {site}"):
        forward(PARAMS, TOKENS[:, :-1], TINY, runtime=Runtime(attention="xla"), **hooks)
    with caplog.at_level("INFO", logger="pythia_jax"):
        jax.eval_shape(lambda: forward(PARAMS, TOKENS[:, :-1], TINY, **hooks))
    assert "einsum" in caplog.text and site in caplog.text
