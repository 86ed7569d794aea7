"""Gradients, patching and attribution on eight devices beside the same on one;
`test_attribution.py` runs this in a process of its own, since the number of devices is fixed when
JAX starts.

In float64. Prints one JSON object: function → norm of the difference over the norm.
"""

from dataclasses import replace

import jax
import numpy as np
from on_a_mesh import placed, print_distances
from random_inputs import TINY, random_params, random_tokens

from pythia_jax.interp.activations import activation_gradients, logit_difference
from pythia_jax.interp.attribution import attribution_patching
from pythia_jax.interp.patching import Node, activation_patching
from pythia_jax.interp.token_attribution import integrated_gradients

CONFIG = replace(TINY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
METRIC = logit_difference(3, 5)
NODES = [Node("attn.z", 0, None, 1), Node("attn.z", 1, 7, 0), Node("attn.z", 1, 7, 1)]


def results() -> dict[str, jax.Array]:
    """Of parameters that lie on the ambient mesh as in training."""
    params = placed(random_params(CONFIG, dtype=np.float64))
    clean, corrupt = (random_tokens(CONFIG, 4, 8, seed) for seed in (0, 1))
    runs = (params, clean, corrupt, CONFIG, METRIC)
    _, _, gradient = activation_gradients(params, corrupt, CONFIG, METRIC, ("attn.q", "mlp_out"))
    scores, gap = integrated_gradients(params, clean, CONFIG, METRIC, steps=2)
    return {
        "gradient at queries": gradient["attn.q"],
        "gradient at MLPs": gradient["mlp_out"],
        "patching": activation_patching(*runs, NODES, chunk=2),
        "attribution": attribution_patching(*runs, NODES),
        "edges": attribution_patching(*runs, granularity="edge"),
        "integrated gradients": scores,
        "gap": gap,
    }


if __name__ == "__main__":
    print_distances(results)
