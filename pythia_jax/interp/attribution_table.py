"""How well estimates of effects agree with exact ones, over many nodes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Int

from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.interp.activations import Metric
from pythia_jax.interp.attribution import FIXABLE, attribution_patching
from pythia_jax.interp.patching import Node, activation_patching
from pythia_jax.model.gptneox import AnyArray
from pythia_jax.model.parameters import Params


@dataclass(frozen=True)
class Comparison:
    """Agreement of estimated effects with exact ones.

    pearson, spearman: correlations over nodes. recall: of the k nodes with the largest absolute
    effect, the share that is among the k largest of the estimates.
    """

    pearson: float
    spearman: float
    recall: float
    k: int


def compare(estimate: ArrayLike, exact: ArrayLike, *, k: int = 10) -> Comparison:
    """Hold estimates beside exact effects, `[nodes]` or `[nodes, batch]`, then averaged over rows.

    Estimates that are absolute values, as GradDrop's, belong beside absolute values.

    Raises ValueError for arrays of different shape, for k outside of 1 … nodes, for what is not
    finite, and where all values are equal, so that nothing can be ranked.
    """
    from scipy import stats

    ours, truth = (np.asarray(x, np.float64) for x in (estimate, exact))
    if ours.shape != truth.shape or ours.ndim not in (1, 2):
        raise ValueError(
            f"estimates of shape {ours.shape} beside exact effects of {truth.shape}: "
            "both should be [nodes] or [nodes, batch]"
        )
    ours, truth = (x.reshape(len(x), -1).mean(axis=1) for x in (ours, truth))
    if not 1 <= k <= len(truth):
        raise ValueError(f"k: {k} of {len(truth)} nodes; choose from 1 to {len(truth)}")
    for name, values in (("estimates", ours), ("exact effects", truth)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name}: that of node {np.argmin(np.isfinite(values))} is not finite")
        if np.ptp(values) == 0:
            raise ValueError(f"{name}: all are {values[0]:g}, so nothing can be correlated")
    best, found = (set(np.argsort(-np.abs(x), kind="stable")[:k]) for x in (truth, ours))
    pearson: Any = stats.pearsonr(ours, truth)
    spearman: Any = stats.spearmanr(ours, truth)
    return Comparison(float(pearson.statistic), float(spearman.statistic), len(best & found) / k, k)


def compare_variants(
    params: Params,
    clean: Int[AnyArray, "batch seq"],
    corrupt: Int[AnyArray, "batch seq"],
    config: ModelConfig,
    metric: Metric,
    nodes: Sequence[Node],
    *,
    k: int = 10,
    steps: int = 5,
    chunk: int = 16,
    runtime: Runtime = Runtime(),
) -> dict[str, Comparison]:
    """Every variant of attribution patching beside exact patching, over `nodes`.

    The exact effects cost one forward pass for each node. steps: points of the variants with
    integrated gradients. Variants with the QK fix are there if a node is at a query or key. Those
    with GradDrop, which are absolute values, stand beside absolute values.

    Raises as `activation_patching` and `compare` do.
    """
    given = (params, clean, corrupt, config, metric, nodes)
    exact = activation_patching(*given, chunk=chunk, runtime=runtime)
    variants: dict[str, dict[str, Any]] = {"AtP": {}, f"AtP, IG {steps}": {"steps": steps}}
    if any(node[0] in FIXABLE for node in nodes):
        variants["AtP, QK fix"] = {"qk_fix": True}
        variants[f"AtP, QK fix, IG {steps}"] = {"qk_fix": True, "steps": steps}
    if config.num_hidden_layers > 1:
        for name, options in list(variants.items()):
            if "steps" not in options:
                variants[f"{name}, GradDrop"] = {**options, "grad_drop": True}
    table = {}
    for name, options in variants.items():
        estimate = attribution_patching(*given, runtime=runtime, **options)
        truth = jnp.abs(exact) if options.get("grad_drop") else exact
        table[name] = compare(estimate, truth, k=k)
    return table


def table_text(table: Mapping[str, Comparison]) -> str:
    """A Markdown table, a variant a row."""
    k = next(iter(table.values())).k
    lines = [f"| variant | Pearson | Spearman | recall of the largest {k} |"]
    lines.append("| --- | ---: | ---: | ---: |")
    lines += [
        f"| {name} | {row.pearson:.3f} | {row.spearman:.3f} | {row.recall:.2f} |"
        for name, row in table.items()
    ]
    return "\n".join(lines)
