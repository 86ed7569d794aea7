"""Gradients, patching and attribution on eight devices beside the same on one;
`test_attribution.py` runs this in a process of its own, since the number of devices is fixed when
JAX starts.

In float64. Prints one JSON object: function → norm of the difference over the norm.
"""

import json
from dataclasses import replace

import jax
import numpy as np
from reference import TINY, distance, random_params, random_tokens

from pythia_jax import sharding
from pythia_jax.configs import MeshConfig
from pythia_jax.interp.activations import activation_gradients, logit_difference
from pythia_jax.interp.attribution import attribution_patching
from pythia_jax.interp.patching import Node, activation_patching
from pythia_jax.interp.token_attribution import integrated_gradients
from pythia_jax.model.parameters import map_parameters

CONFIG = replace(TINY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
METRIC = logit_difference(3, 5)
NODES = [Node("attn.z", 0, None, 1), Node("attn.z", 1, 7, 0), Node("attn.z", 1, 7, 1)]


def results() -> dict[str, jax.Array]:
    """Of parameters that lie on the ambient mesh as in training."""
    mesh = jax.sharding.get_mesh()
    params = map_parameters(
        lambda parameter, value: jax.device_put(value, sharding.sharding(mesh, parameter.axes)),
        random_params(CONFIG, dtype=np.float64),
    )
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


def main() -> None:
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        one = results()
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        eight = results()
    print(json.dumps({name: distance(eight[name], one[name]) for name in one}))


if __name__ == "__main__":
    main()
