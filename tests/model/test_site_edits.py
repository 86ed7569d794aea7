"""Taps and edits at every site: the logits are torch's with the same values changed there."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
import torch
from reference import TINY, HFSites, hf_logits, hf_model, random_params, random_tokens

from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.model.gptneox import forward
from pythia_jax.model.sites import SITES, site_shape

BATCH, SEQ = 2, 19
PARAMS = random_params(TINY)
TOKENS = random_tokens(TINY, BATCH, SEQ)
# Both residuals and both ways to run the layers, in two programs a site instead of four.
RUNS = {
    "parallel-scan": (TINY, Runtime()),
    "sequential-unrolled": (
        replace(TINY, use_parallel_residual=False),
        Runtime(scan_layers=False),
    ),
}


@partial(jax.jit, static_argnames=("site", "config", "runtime"))
def changed(site: str, tap, mask, value, config: ModelConfig, runtime: Runtime):
    logits, captured = forward(
        PARAMS,
        TOKENS,
        config,
        capture=(site,),
        taps={site: tap},
        edits={site: (mask, value)},
        runtime=runtime,
    )
    return logits, captured[site]


def changed_in_torch(site: str, tap, mask, value, config: ModelConfig):
    layered = SITES[site][0] == "layer"

    def change(layer: int, seen: torch.Tensor) -> torch.Tensor:
        here = [torch.from_numpy(a[layer] if layered else a) for a in (mask, value, tap)]
        return torch.where(here[0], here[1], seen + here[2])

    model = hf_model(PARAMS, config)
    plain = hf_logits(model, TOKENS)
    with HFSites(model, config, {site: change}) as hooks:
        logits = hf_logits(model, TOKENS)
    return logits, hooks.values()[site], plain


@pytest.mark.parametrize(("config", "runtime"), RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("site", SITES)
def test_taps_and_edits_do_what_torch_does(site, config, runtime):
    rng = np.random.default_rng(3)
    shape = site_shape(site, TINY, BATCH, SEQ)
    tap, value = rng.standard_normal((2, *shape), np.float32)
    tap *= 0.3
    mask = rng.random(shape) < 0.3
    cases = {
        "tap": (tap, np.zeros_like(mask), value),
        "edit": (np.zeros_like(tap), mask, value),
        "edit of what was tapped": (tap, mask, value),
    }
    for case, given in cases.items():
        logits, seen = changed(site, *given, config=config, runtime=runtime)
        expected, theirs, plain = changed_in_torch(site, *given, config=config)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5, err_msg=case)
        assert np.abs(logits - plain).max() > 1e-2, case
        shown = theirs > -1e30  # all but masked scores, which are only about the lowest number
        assert (np.asarray(seen)[~shown] < -1e30).all(), case
        np.testing.assert_allclose(
            np.asarray(seen)[shown], theirs[shown], rtol=0, atol=2e-5, err_msg=case
        )
        np.testing.assert_array_equal(np.asarray(seen)[given[1]], value[given[1]], err_msg=case)
