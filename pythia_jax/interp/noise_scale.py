"""The gradient noise scale: how many examples it takes for a batch's gradient to be worth it.

McCandlish et al., 2018 (arXiv:1812.06162), appendix A.1, with a small batch of one sequence: the
norms of the per-example gradients stand for many small batches, which makes the estimate the one
of least variance.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Int

from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.interp.gradients import gradient_norms
from pythia_jax.model.gptneox import AnyArray
from pythia_jax.model.loss import loss
from pythia_jax.model.parameters import Params


class NoiseScale(NamedTuple):
    """Estimates of one or more parameters: `[layers]` where they have layers, else `[]`.

    g2: squared norm of the true gradient. s: trace of the covariance of one sequence's gradient,
    of its mean loss per token. Both are unbiased, and may come out negative; average them over
    batches before dividing. sequences: s / g2, the simple noise scale. tokens: the same in tokens.
    """

    g2: Float[Array, "*layers"]
    s: Float[Array, "*layers"]
    sequences: Float[Array, "*layers"]
    tokens: Float[Array, "*layers"]


def gradient_noise_scale(
    params: Params,
    tokens: Int[AnyArray, "batch seq+1"],
    config: ModelConfig,
    *,
    runtime: Runtime = Runtime(),
) -> dict[str, NoiseScale]:
    """Noise scale of the gradient by parameter and layer, by layer, and over all parameters.

    With G_i the gradient of row i's mean loss, G their mean and B rows:
    g2 = (B |G|² − mean |G_i|²) / (B − 1) and s = (mean |G_i|² − |G|²) / (1 − 1/B).

    Returns {path of the parameter table: estimates by layer, "layers": of all the parameters of
    each layer together, "whole": of all there are}. Of several parameters g2 and s are the sums of
    theirs; noise scales do not add up.

    Raises ValueError for a batch of one row, and for gradients that are no finite numbers.
    """
    if len(np.shape(tokens)) != 2 or len(tokens) < 2:
        raise ValueError(
            f"tokens of shape {np.shape(tokens)}: the noise scale wants 2 rows or more"
        )
    norms = gradient_norms(params, tokens, config, reduction="mean", runtime=runtime)
    batch_norms = _batch_squares(params, tokens, config=config, runtime=runtime)
    batch, seq = tokens.shape[0], tokens.shape[1] - 1
    flat: dict[str, Any] = traverse_util.flatten_dict(norms, sep="/")
    squares = {path: ((norm**2).mean(axis=0), batch_norms[path]) for path, norm in flat.items()}
    layers = [pair for path, pair in squares.items() if path.startswith("layers/")]
    together = {
        "layers": tuple(map(sum, zip(*layers, strict=True))),
        "whole": tuple(sum(pair[i].sum() for pair in squares.values()) for i in (0, 1)),
    }
    found = {**squares, **together}
    return {path: _estimate(one, all_, batch, seq) for path, (one, all_) in found.items()}


def _estimate(small: Any, large: Any, batch: int, seq: int) -> NoiseScale:
    """From the mean squared norm of one row's gradient and that of the batch's."""
    g2 = (batch * large - small) / (batch - 1)
    s = (small - large) / (1 - 1 / batch)
    return NoiseScale(g2=g2, s=s, sequences=s / g2, tokens=s / g2 * seq)


@partial(jax.jit, static_argnames=("config", "runtime"))
def _batch_squares(
    params: Params, tokens: AnyArray, *, config: ModelConfig, runtime: Runtime
) -> dict[str, jax.Array]:
    """Squared norm of the batch's gradient by path, `[(layers)]`."""
    gradient = jax.grad(loss)(params, tokens, config, runtime=runtime)

    def squares(path: str, value: jax.Array) -> jax.Array:
        kept = 1 if path.startswith("layers/") else 0
        wide = value.astype(jnp.promote_types(value.dtype, jnp.float32))
        return (wide**2).sum(axis=tuple(range(kept, value.ndim)))

    flat: dict[str, Any] = traverse_util.flatten_dict(gradient, sep="/")
    return {path: squares(path, value) for path, value in flat.items()}
