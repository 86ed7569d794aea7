"""Pythia's optimizer and learning-rate schedule, as GPT-NeoX v1.0 really ran them.

Sources: megatron/learning_rates.py (AnnealingLR) for the schedule; apex's FusedAdam and
DeeperSpeed's ZeRO-1 and FP16 wrappers for the update.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pythia_jax.configs import OptimizerConfig
from pythia_jax.model.parameters import decay_mask


def learning_rate(config: OptimizerConfig, steps: int) -> Callable[[Any], Any]:
    """The schedule `neox_v1`: a function from the number of updates made to a learning rate.

    Linear warm-up from 0, so that the first update changes nothing, then a cosine that aims at 0
    over *all* steps (not those after the warm-up) and is clipped at the floor: for a floor of a
    tenth of the peak it lies there from 80.5 % of training on. Later GPT-NeoX anneals otherwise.

    In float64, by NumPy; `learning_rates` are what updates use.
    """
    warmup = config.warmup_fraction * steps
    peak, floor = config.peak_learning_rate, config.min_learning_rate

    def schedule(update: Any) -> Any:
        annealed = np.minimum(update, steps - warmup) - warmup
        cosine = peak / 2 * (1 + np.cos(np.pi * annealed / steps))
        rate = np.maximum(cosine, floor)
        if warmup > 0:
            rate = np.where(update <= warmup, peak * update / warmup, rate)
        return rate

    return schedule


def learning_rates(config: OptimizerConfig, steps: int) -> np.ndarray:
    """`learning_rate` of every update of a run, rounded to float32.

    A table, for a float32 cosine on the device would be off by several units in the last place,
    and by how many would depend on the device.
    """
    return learning_rate(config, steps)(np.arange(steps)).astype(np.float32)


def optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW with decoupled decay under `learning_rate`.

    p -= lr(n) x (m̂ / (sqrt(v̂) + eps) + decay x p) at update n = 0, 1, …; norms and biases are
    not decayed.
    """
    rates = learning_rates(config, steps)
    return optax.chain(
        clip_by_global_norm(config.gradient_clip),
        scale_by_adam(config),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask()),
        optax.scale_by_learning_rate(lambda update: jnp.asarray(rates)[update]),
    )


def scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam (Kingma and Ba, 2015) with bias correction one step ahead.

    Both DeeperSpeed wrappers take a dummy step with zero gradients when they are made. It leaves
    weights and moments as they are but counts, so that the first real update is corrected as
    the second.
    """
    b1, b2 = config.betas
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=config.eps)

    def init(params: optax.Params) -> optax.OptState:
        return adam.init(params)._replace(count=jnp.ones([], jnp.int32))  # type: ignore

    return optax.GradientTransformation(init, adam.update)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Divide gradients by (norm + 1e-6) / max_norm where that is more than 1 (DeeperSpeed)."""

    def update(updates: optax.Updates, state: optax.OptState, params: Any = None) -> tuple:
        excess = (optax.tree.norm(updates) + 1e-6) / max_norm
        scale = 1 / jnp.maximum(excess, 1.0)
        return jax.tree.map(lambda g: g * scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
