"""Dynamic loss scaling for float16, as GPT-NeoX v1.0 ran it.

Source: DeeperSpeed, runtime/fp16/loss_scaler.py (DynamicLossScaler) with Pythia's settings.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

START = 4096.0
WINDOW = 1000
HYSTERESIS = 2
SMALLEST = 1.0


@struct.dataclass
class LossScale:
    """scale: what the loss is multiplied by. hysteresis: overflows left until one halves it.
    last_overflow: the step of the last overflow, -1 before any."""

    scale: Float[Array, ""]
    hysteresis: Int[Array, ""]
    last_overflow: Int[Array, ""]


def initial(step: int | Int[Array, ""] = 0) -> LossScale:
    """The scale of a run that begins at `step`; it grows as many steps from there as from 0."""
    return LossScale(
        scale=jnp.asarray(START, jnp.float32),
        hysteresis=jnp.asarray(HYSTERESIS, jnp.int32),
        last_overflow=jnp.asarray(step - 1, jnp.int32),
    )


def exhausted(state: LossScale, overflow: Bool[Array, ""]) -> Bool[Array, ""]:
    """Whether an overflow came at the smallest scale, where upstream gives up."""
    return overflow & (state.hysteresis == 1) & (state.scale <= SMALLEST)


def after(state: LossScale, overflow: Bool[Array, ""], step: Int[Array, ""]) -> LossScale:
    """The scale after a step.

    Of `HYSTERESIS` overflows the first only counts, each one more halves the scale; every `WINDOW`
    steps after the last one it doubles, and the count begins anew.
    """
    halves = overflow & (state.hysteresis == 1)
    doubles = ~overflow & ((step - state.last_overflow) % WINDOW == 0)
    halved = jnp.maximum(state.scale / 2, SMALLEST)
    return LossScale(
        scale=jnp.where(halves, halved, jnp.where(doubles, state.scale * 2, state.scale)),
        hysteresis=jnp.where(
            doubles,
            HYSTERESIS,
            jnp.where(overflow, jnp.maximum(state.hysteresis - 1, 1), state.hysteresis),
        ).astype(jnp.int32),
        last_overflow=jnp.where(overflow, step, state.last_overflow).astype(jnp.int32),
    )


def unscaled(gradients: Any, scale: Float[Array, ""]) -> Any:
    """Gradients of the loss itself. Scales are powers of two, so that nothing is rounded."""
    return jax.tree.map(lambda g: g / scale, gradients)
