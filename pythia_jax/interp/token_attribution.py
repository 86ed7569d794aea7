"""How much of a metric each input token accounts for: gradient at the embeddings, times them.

Sources: Shrikumar et al., 2016 (arXiv 1605.01713, input x gradient); Sundararajan et al., 2017
(arXiv 1703.01365, integrated gradients).
"""

import csv
import io
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from pythia_jax.bridge.model import Model
from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.files import write_whole, written_whole
from pythia_jax.interp.activations import (
    Metric,
    answer_log_probability,
    as_argument,
    differentiate,
    logit_difference,
    measure,
    refuse_nan,
    wide_dtype,
)
from pythia_jax.model.gptneox import AnyArray, check_tokens, embed, forward
from pythia_jax.model.parameters import Params
from pythia_jax.model.sites import site_shape

Scores = Float[Array, "batch seq"]
Gap = Float[Array, " batch"]


def input_x_gradient(
    params: Params,
    tokens: Int[AnyArray, "batch seq"],
    config: ModelConfig,
    metric: Metric,
    *,
    runtime: Runtime = Runtime(),
) -> tuple[Scores, Gap]:
    """Embedding · gradient of the metric there, for each token, and what these leave unexplained.

    The gap is metric(row) - metric(all embeddings zero) - sum of the row's scores: what the model's
    curvature hides from this first-order estimate. Scores are in units of the metric.

    Raises ValueError for a metric or a score that is not finite, naming the row.
    """
    # The path of integrated gradients from zero, with all weight on its end.
    ends = np.ones(1), np.ones(1)
    return _checked(params, tokens, config, metric, ends, None, runtime)


def integrated_gradients(
    params: Params,
    tokens: Int[AnyArray, "batch seq"],
    config: ModelConfig,
    metric: Metric,
    *,
    steps: int = 50,
    baseline: Float[ArrayLike, "*batch seq hidden"] | None = None,
    runtime: Runtime = Runtime(),
) -> tuple[Scores, Gap]:
    """(Embedding - baseline) · mean gradient of the metric on the way from one to the other, for
    each token, and the completeness gap.

    The gap is metric(row) - metric(baseline) - sum of the row's scores. It is zero for the exact
    integral; that of a number of points tells whether they are enough. steps: points of the path,
    by Gauss-Legendre quadrature. baseline: embeddings, broadcasting to `[batch, seq, hidden]`; None
    is zero.

    Raises ValueError for a baseline that does not fit, and for a metric or a score that is not
    finite, naming the row.
    """
    if steps < 1:
        raise ValueError(f"steps: {steps} points of a path; at least 1")
    roots, weights = np.polynomial.legendre.leggauss(steps)
    # Of the quadrature over [-1, 1], one over [0, 1].
    path = (roots + 1) / 2, weights / 2
    return _checked(params, tokens, config, metric, path, baseline, runtime)


def _checked(
    params: Params,
    tokens: AnyArray,
    config: ModelConfig,
    metric: Metric,
    path: tuple[np.ndarray, np.ndarray],
    baseline: ArrayLike | None,
    runtime: Runtime,
) -> tuple[Scores, Gap]:
    check_tokens(tokens, config)
    wide, shape = wide_dtype(params, runtime), site_shape("embed", config, *tokens.shape)
    start = jnp.zeros((), wide) if baseline is None else jnp.asarray(baseline, wide)
    try:
        fits = np.broadcast_shapes(start.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"baseline of shape {start.shape}: embeddings, {shape} = [batch, seq, hidden], "
            "or what broadcasts to them, are wanted"
        )
    points, weights = (jnp.asarray(x, wide) for x in path)
    scores, gap = _along(
        params, jnp.asarray(tokens), as_argument(metric), start, points, weights, config, runtime
    )
    refuse_nan("the score of a token", scores.T)
    refuse_nan("the completeness gap", gap)
    return scores, gap


@partial(jax.jit, static_argnames=("config", "runtime"))
def _along(
    params: Params,
    tokens: jax.Array,
    metric: Partial,
    baseline: jax.Array,
    points: Float[Array, " points"],
    weights: Float[Array, " points"],
    config: ModelConfig,
    runtime: Runtime,
) -> tuple[Scores, Gap]:
    way = embed(params, tokens).astype(baseline.dtype) - baseline

    def add(total: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        point, weight = at
        _, _, gradient = differentiate(
            params, tokens, config, metric, ("embed",), shift=(point - 1) * way, runtime=runtime
        )
        return total + weight * gradient["embed"], None

    mean, _ = jax.lax.scan(add, jnp.zeros_like(way), (points, weights))
    scores = (way * mean).sum(axis=-1)
    here, _ = measure(params, tokens, config, metric, runtime=runtime)
    there, _ = measure(params, tokens, config, metric, taps={"embed": -way}, runtime=runtime)
    return scores, here - there - scores.sum(axis=1)


METHODS = ("integrated-gradients", "input-x-gradient")


@dataclass(frozen=True)
class Attribution:
    """Scores of a prompt's tokens.

    ids, tokens, scores: of the prompt's tokens. metric: what was attributed, in words; value: what
    it is; gap: what the scores leave unexplained of its change from embeddings of zero.
    """

    method: str
    metric: str
    value: float
    gap: float
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    scores: tuple[float, ...]

    def text(self) -> str:
        """A line for each token, then the metric and the gap."""
        texts = [json.dumps(token, ensure_ascii=False) for token in self.tokens]
        width = max(map(len, texts))
        lines = [
            f"{text:<{width}}  {score:+.4f}" for text, score in zip(texts, self.scores, strict=True)
        ]
        total = sum(self.scores)
        lines.append(f"{self.metric}: {self.value:.4f}; by {self.method}")
        lines.append(
            f"the scores sum to {total:.4f}; {self.gap:+.4f} of the change from embeddings of zero "
            f"({total + self.gap:.4f}) is left unexplained"
        )
        return "\n".join(lines)

    def write(self, out: Path) -> None:
        """To a CSV file (position, id, token, score), or as a heat map to a PNG or SVG.

        Raises ValueError for another ending.
        """
        check_output(out)
        if out.suffix.lower() == ".csv":
            table = io.StringIO(newline="")
            writer = csv.writer(table)
            writer.writerow(["position", "id", "token", "score"])
            for row in enumerate(zip(self.ids, self.tokens, self.scores, strict=True)):
                writer.writerow([row[0], *row[1]])
            write_whole(out, table.getvalue().encode())
            return
        from pythia_jax.interp.plots import token_heat_map

        figure = token_heat_map(
            self.tokens, np.array(self.scores), title=self.metric, label=self.method
        )
        with written_whole(out) as file:
            figure.savefig(file, format=out.suffix[1:].lower(), dpi=150)


def check_output(out: Path) -> None:
    """Refuse a name of a file that `Attribution.write` would not write."""
    if out.suffix.lower() not in (".csv", ".png", ".svg"):
        raise ValueError(f"{out}: name a .csv, a .png or an .svg")


def attribute(
    model: Model,
    prompt: str,
    *,
    target: str | None = None,
    against: str | None = None,
    method: str = "integrated-gradients",
    steps: int = 50,
) -> Attribution:
    """What each token of `prompt` has to do with the model's next one.

    target: the next token; None is the one that the model finds likeliest. The metric is its
    log-probability in nats, or with `against`, another token, the difference of their logits.
    steps: points of integrated gradients.

    Raises ValueError for a model without a tokenizer, an empty prompt, a target that is not one
    token, and an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method: {method!r}; choose {' or '.join(METHODS)}")
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(f"{model.source}: has no tokenizer, so a prompt cannot be read")
    ids = tokenizer.encode(prompt).ids
    if not ids:
        raise ValueError("the prompt is empty: there is no token to score")

    def one(name: str, text: str) -> int:
        found = tokenizer.encode(text).ids
        if len(found) != 1:
            pieces = ", ".join(repr(tokenizer.decode([i])) for i in found)
            raise ValueError(
                f"{name} {text!r} is {len(found)} tokens ({pieces}), and one is scored; mind that "
                "most words begin with their space"
            )
        return found[0]

    rival = None if against is None else one("against", against)
    tokens = np.array([ids], np.int32)
    logits = forward(model.params, tokens, model.config)[0, -1]
    wanted = int(jnp.argmax(logits)) if target is None else one("target", target)
    chosen = repr(tokenizer.decode([wanted])) + (" (the likeliest)" if target is None else "")
    if rival is None:
        metric, told = answer_log_probability(wanted), f"log-probability of {chosen} in nats"
    else:
        metric = logit_difference(wanted, rival)
        told = f"logit of {chosen} less that of {against!r}"
    given = (model.params, tokens, model.config, metric)
    if method == "integrated-gradients":
        scores, gap = integrated_gradients(*given, steps=steps)
        method = f"integrated gradients, {steps} points"
    else:
        scores, gap = input_x_gradient(*given)
        method = "input x gradient"
    return Attribution(
        method=method,
        metric=told,
        value=float(metric(logits[None, None], jnp.asarray(tokens))[0]),
        gap=float(gap[0]),
        ids=tuple(ids),
        tokens=tuple(tokenizer.decode([i], skip_special_tokens=False) for i in ids),
        scores=tuple(map(float, np.asarray(scores[0]))),
    )
