"""Lenses on eight devices beside the same on one; `test_lenses.py` runs this in a process of its
own, since the number of devices is fixed when JAX starts.

In float64. Prints one JSON object: function → norm of the difference over the norm.
"""

from dataclasses import replace

import jax
import numpy as np
from on_a_mesh import placed, print_distances
from random_inputs import TINY, random_params, random_tokens

from pythia_jax.configs import Runtime
from pythia_jax.interp import tuned_lens
from pythia_jax.interp.lenses import TunedLens, lens_losses, logit_lens

CONFIG = replace(TINY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
RUNTIME = Runtime(loss_chunk=8)


def results() -> dict[str, jax.typing.ArrayLike]:
    """Of parameters that lie on the ambient mesh as in training."""
    params = placed(random_params(CONFIG, dtype=np.float64))
    batches = [random_tokens(CONFIG, 6, 8, seed) for seed in (1, 2)]
    lens = tuned_lens.fit(
        params, batches, CONFIG, rows=4, show_progress=False, start=_some(), runtime=RUNTIME
    )
    tokens = random_tokens(CONFIG, 4, 9)
    losses = lens_losses(params, tokens, CONFIG, lens=lens, runtime=RUNTIME)
    ids, log_probabilities = logit_lens(params, tokens, CONFIG, top=3, runtime=RUNTIME)
    return {
        "kernel": lens.kernel,
        "bias": lens.bias,
        "loss": losses.loss,
        "kl": losses.kl[:-1],
        "ids": ids,
        "log-probabilities": log_probabilities,
    }


def _some() -> TunedLens:
    rng = np.random.default_rng(0)
    return TunedLens(0.02 * rng.standard_normal((2, 32, 32)), rng.standard_normal((2, 32)))


if __name__ == "__main__":
    print_distances(results)
