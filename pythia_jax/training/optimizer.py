"""Pythia's optimizer and learning-rate schedule, as GPT-NeoX v1.0 really ran them, or later.

Sources: megatron/learning_rates.py (AnnealingLR) for the schedule; apex's FusedAdam and
DeeperSpeed's ZeRO-1 and FP16 wrappers for the update.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from pythia_jax.configs import OptimizerConfig
from pythia_jax.model.parameters import decay_mask, map_parameters


def learning_rate(config: OptimizerConfig, steps: int) -> Callable[[Any], Any]:
    """The schedule: a function from the number of updates made to a learning rate.

    It is laid out over `decay_steps`, or over `steps`, and warms up linearly from 0, so that the
    first update changes nothing, or, without `warmup_from_zero`, from what is then the second rate.

    `neox_v1`: a cosine that aims at 0 over *all* steps (not those after the warm-up) and is clipped
    at the floor: for a floor of a tenth of the peak it lies there from 80.5 % of training on.
    `cosine`: from the peak to the floor over the steps after the warm-up, then at the floor
    (GPT-NeoX from August 2023 on).

    In float64, by NumPy; `learning_rates` are what updates use.
    """
    total = steps if config.decay_steps is None else config.decay_steps
    warmup = config.warmup_fraction * total
    peak, floor = config.peak_learning_rate, config.min_learning_rate

    def schedule(update: Any) -> Any:
        if config.schedule == "neox_v1":
            annealed = np.minimum(update, total - warmup) - warmup
            cosine = peak / 2 * (1 + np.cos(np.pi * annealed / total))
        else:
            annealed = np.minimum(update, total) - warmup
            turn = np.pi * annealed / (total - warmup)
            cosine = floor + (peak - floor) / 2 * (1 + np.cos(turn))
        rate = np.maximum(cosine, floor)
        if warmup > 0:
            begun = update if config.warmup_from_zero else np.maximum(update, min(1, warmup))
            rate = np.where(update <= warmup, peak * begun / warmup, rate)
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
    """Adam (Kingma and Ba, 2015), with bias correction one step ahead if the config says so.

    Both DeeperSpeed wrappers take a dummy step with zero gradients when they are made. It leaves
    weights and moments as they are but counts, so that the first real update is corrected as
    the second.

    Row-parallel biases move `row_parallel_bias_multiple` times as far. Of such a bias each of n
    model-parallel ranks holds a copy, and the layer adds the sum of the copies, which is our one
    bias. A sum hands its gradient to each of its terms whole. So every copy has the gradient of
    the sum, the same moments and the same update (eps and all, no decay), and the sum moves n times
    as far. The clip is the same too: its norm counts replicated parameters on rank 0 alone.
    """
    b1, b2 = config.betas
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=config.eps)
    multiple = config.row_parallel_bias_multiple

    def init(params: optax.Params) -> optax.OptState:
        return adam.init(params)._replace(count=_first_count(config))  # type: ignore

    def update(updates: optax.Updates, state: optax.OptState, params: Any = None) -> tuple:
        updates, state = adam.update(updates, state, params)
        if multiple != 1:
            updates = map_parameters(lambda p, u: multiple * u if p.summed else u, updates)  # type: ignore
        return updates, state

    return optax.GradientTransformation(init, update)


def restarted(config: OptimizerConfig, opt_state: Any, step: Int[Array, ""]) -> Any:
    """The state of `optimizer` with Adam's counter begun anew if `step` is among the restarts.

    DeeperSpeed's elastic ZeRO-1 checkpoints hold the moments of every tensor but not the counter,
    which lay in the parameter groups: after a restart grown moments were corrected as if they had
    just begun, and the first update was 1.64 times too long.
    """
    if not config.restarts:
        return opt_state
    clip, adam, *rest = opt_state
    begins = jnp.isin(step, np.asarray(config.restarts, np.int32))
    count = jnp.where(begins, _first_count(config), adam.count)
    return (clip, adam._replace(count=count), *rest)


def _first_count(config: OptimizerConfig) -> Int[Array, ""]:
    return jnp.asarray(int(config.bias_correction_ahead), jnp.int32)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Divide gradients by (norm + 1e-6) / max_norm where that is more than 1 (DeeperSpeed)."""

    def update(updates: optax.Updates, state: optax.OptState, params: Any = None) -> tuple:
        excess = (optax.tree.norm(updates) + 1e-6) / max_norm
        scale = 1 / jnp.maximum(excess, 1.0)
        return jax.tree.map(lambda g: g * scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
