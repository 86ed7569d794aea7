"""Factors and scores on eight devices beside the same on one; `test_factors.py` runs this in a
process of its own, since the number of devices is fixed when JAX starts.

Prints one JSON object: function → norm of the difference over the norm.
"""

from dataclasses import replace

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from on_a_mesh import placed, print_distances
from random_inputs import TINY, random_params, random_tokens

from pythia_jax.interp.factor_sums import covariances, summed
from pythia_jax.interp.factors import fit_factors
from pythia_jax.interp.influence import scores, token_scores
from pythia_jax.interp.preconditioning import precondition

CONFIG = replace(TINY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
MODULES = ("layers/attention/dense",)


def results() -> dict[str, np.ndarray]:
    """Of parameters that lie on the ambient mesh as in training."""
    mesh = jax.sharding.get_mesh()
    params = placed(random_params(CONFIG, dtype=np.float64))
    rows = random_tokens(CONFIG, 4, 8)
    rng = np.random.default_rng(0)
    every = jax.tree.map(lambda x: rng.standard_normal((2, *x.shape)), params)
    how = {"key": jax.random.key(0), "modules": MODULES}
    factors = fit_factors(params, [rows] * 2, CONFIG, method="ekfac", **how)
    activation, gradient = factors.covariances(MODULES[0])
    own = {"layers": {"attention": {"dense": every["layers"]["attention"]["dense"]}}}
    made = flatten_dict(precondition(factors, own), sep="/")
    sums, *_ = summed(params, [rows], CONFIG, covariances, **how)
    array = sums[MODULES[0]]["activation"]
    assert array.addressable_shards[0].data.shape[1] * mesh.shape["fsdp"] == array.shape[1]
    found = {
        "A": activation,
        "S": gradient,
        "preconditioned": made["layers/attention/dense/kernel"],
        "scores": scores(params, rows, CONFIG, every),
        "token scores": token_scores(params, rows, CONFIG, every),
    }
    return {name: np.asarray(array) for name, array in found.items()}


if __name__ == "__main__":
    print_distances(results)
