"""Second order and the metagradient on eight devices beside the same on one.

`test_metagradients.py` runs this in a process of its own, since the number of devices is fixed when
JAX starts.

In float64. Prints one JSON object: function → norm of the difference over the norm.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from on_a_mesh import placed, print_distances
from random_inputs import TINY, random_params, random_tokens

from pythia_jax import configs
from pythia_jax.configs import Runtime
from pythia_jax.interp.curvature import fisher_diagonal, ggn_vp, hessian_top_eigenvalues, hvp
from pythia_jax.interp.metagradients import metagradient
from pythia_jax.model.loss import loss
from pythia_jax.training.step import init_state

MODEL = replace(TINY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
RUN = configs.RunConfig(
    model=MODEL,
    data=configs.DataConfig(sequence_length=8),
    training=configs.TrainingConfig(steps=10, batch_size=4, precision="float32", remat="none"),
)
RUNTIME = Runtime(dtype="float64")


def results() -> dict[str, Any]:
    """Of parameters that lie on the ambient mesh as in training."""
    params, vector = (placed(random_params(MODEL, seed, np.float64)) for seed in (0, 1))
    tokens = random_tokens(MODEL, 4, 9)
    state = init_state(RUN)
    clip, adam, *rest = state.opt_state
    moments = [jax.tree.map(jnp.zeros_like, params) for _ in range(2)]
    adam = adam._replace(mu=moments[0], nu=moments[1])
    state = state.replace(params=params, opt_state=(clip, adam, *rest))  # type: ignore
    steps = np.stack([random_tokens(MODEL, 4, 9, seed) for seed in (1, 2)])
    influence = metagradient(
        state,
        steps,
        lambda params: loss(params, tokens, MODEL, runtime=RUNTIME),
        steps=2,
        config=RUN,
        runtime=RUNTIME,
    )
    values, *_ = hessian_top_eigenvalues(
        params, tokens, MODEL, 2, 12, jax.random.key(0), runtime=RUNTIME
    )
    return {
        "hvp": hvp(params, tokens, MODEL, vector, runtime=RUNTIME),
        "ggn_vp": ggn_vp(params, tokens, MODEL, vector, runtime=RUNTIME),
        "fisher_diagonal": fisher_diagonal(params, tokens, MODEL, runtime=RUNTIME),
        "hessian_top_eigenvalues": values,
        "metagradient": influence,
    }


if __name__ == "__main__":
    print_distances(results)
