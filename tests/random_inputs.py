"""A small model of random numbers and tokens for it. Without torch: processes start quickly."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pythia_jax.configs import ModelConfig
from pythia_jax.model.parameters import Parameter, Params, standard_deviations, tree

TINY = ModelConfig(
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=3,
    vocab_size=130,
    max_position_embeddings=64,
    hidden_act="gelu",
)


def random_params(config: ModelConfig, seed: int = 0, dtype: type = np.float32) -> Params:
    """Parameters with nothing left at 0 or 1: norms and biases are perturbed too."""
    rng = np.random.default_rng(seed)
    deviations = {**standard_deviations(config), "zeros": 0.1, "ones": 0.1}

    def leaf(parameter: Parameter) -> jax.Array:
        value = rng.standard_normal(parameter.shape(config), np.float32)
        value *= deviations[parameter.init]
        return jnp.asarray((value + (parameter.init == "ones")).astype(dtype))

    return tree(leaf)


def random_tokens(config: ModelConfig, batch: int, seq: int, seed: int = 0) -> Any:
    """An int32 NumPy array; typed so that it goes where JAX arrays go, as it does."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, seq)).astype(np.int32)


def distance(ours: Any, reference: Any) -> float:
    """Norm of the difference over the norm of the reference."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))
