"""Functions of a checkpoint that are made for curves: `over_checkpoints` takes them as they are.

Each is of certain tokens, and has a name that tells these, so that values which are kept in a
folder are never taken for those of others.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.interp.gradient_plan import matching
from pythia_jax.interp.gradients import gradient_norms
from pythia_jax.interp.lenses import lens_losses
from pythia_jax.interp.noise_scale import gradient_noise_scale
from pythia_jax.model.gptneox import AnyArray
from pythia_jax.model.loss import token_losses
from pythia_jax.model.parameters import Params


@partial(jax.tree_util.register_dataclass, data_fields=["tokens"], meta_fields=["measure", "name"])
@dataclass(frozen=True, eq=False)
class Measure:
    """`measure(params, tokens, config)` of certain tokens, as a function of (params, config).

    The tokens are an argument of the compiled program. name: what is computed, of which tokens.
    """

    tokens: Any
    measure: Callable[[Params, Any, ModelConfig], Any]
    name: str

    def __call__(self, params: Params, config: ModelConfig) -> Any:
        return self.measure(params, self.tokens, config)


def token_loss_curve(
    tokens: Int[AnyArray, "batch seq+1"], *, runtime: Runtime = Runtime()
) -> Measure:
    """Loss of each token in nats, `[batch, seq]`: entry t is that of `tokens[:, t + 1]`."""
    return _measure("token losses", partial(token_losses, runtime=runtime), tokens, runtime)


def gradient_norm_curve(
    tokens: Int[AnyArray, "batch seq+1"],
    *,
    parameters: str | Sequence[str] = "*",
    reduction: Any = "sum",
    runtime: Runtime = Runtime(),
) -> Measure:
    """`gradient_norms` of each row: a tree of `[batch(, layers)]`.

    Raises ValueError for a pattern without a match.
    """
    paths = matching(parameters)
    measure = partial(gradient_norms, parameters=paths, reduction=reduction, runtime=runtime)
    name = f"gradient norms ({reduction}) of {', '.join(paths)}"
    return _measure(name, measure, tokens, runtime)


def noise_scale_curve(
    tokens: Int[AnyArray, "batch seq+1"], *, runtime: Runtime = Runtime()
) -> Measure:
    """`gradient_noise_scale` of the batch: by parameter, `[(layers)]`, by layer, and of all."""
    return _measure(
        "noise scale", partial(gradient_noise_scale, runtime=runtime), tokens, runtime, rows=2
    )


def lens_curve(
    tokens: Int[AnyArray, "batch seq+1"],
    *,
    layers: Sequence[int] | None = None,
    runtime: Runtime = Runtime(),
) -> Measure:
    """`lens_losses` of the logit lens at each layer, or at `layers`: loss, divergence from the
    model's own logits and agreement with them, `[lens, batch]` each."""
    chosen = None if layers is None else tuple(layers)
    measure = partial(lens_losses, layers=chosen, runtime=runtime)
    which = "all layers" if chosen is None else f"layers {', '.join(map(str, chosen))}"
    return _measure(f"logit lens at {which}", measure, tokens, runtime)


def digest_of(tokens: AnyArray) -> str:
    """Shape and hash of tokens, for a name."""
    array = np.asarray(tokens, np.int32)
    shape = "x".join(map(str, array.shape))
    return f"tokens {shape} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"


def _measure(
    name: str,
    measure: Callable[[Params, Any, ModelConfig], Any],
    tokens: AnyArray,
    runtime: Runtime,
    *,
    rows: int = 1,
) -> Measure:
    if jnp.ndim(tokens) != 2 or tokens.shape[0] < rows or tokens.shape[1] < 2:
        raise ValueError(
            f"tokens of shape {jnp.shape(tokens)}: {name} wants [batch, seq + 1] with {rows} or "
            "more rows"
        )
    return Measure(np.asarray(tokens), measure, f"{name}, {runtime}, {digest_of(tokens)}")
