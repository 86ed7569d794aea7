"""Attribution patching: the effects of activation patching, all at once and to first order.

The effect of a node is estimated by (clean value - corrupt value) · gradient of the metric in the
corrupt run: two runs and one backward pass for all nodes. Sources: Nanda, 2023 (attribution
patching); Syed et al., 2023 (arXiv 2310.10348, edges: EAP); Hanna et al., 2024 (arXiv 2403.17806,
integrated gradients: EAP-IG); Kramár et al., 2024 (arXiv 2403.00745, AtP*: QK fix and GradDrop).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.interp import qk_fix as softmax_fix
from pythia_jax.interp.activations import (
    Metric,
    Sites,
    as_argument,
    differentiate,
    refuse_nan,
    wide_dtype,
)
from pythia_jax.interp.patching import Node, all_nodes, in_order, pair, places
from pythia_jax.model.attention import exact
from pythia_jax.model.gptneox import AnyArray, hidden_states
from pythia_jax.model.parameters import Params
from pythia_jax.model.sites import MATERIALISED, SITES, SPLIT_READERS, Edits

FIXABLE = {"attn.q": softmax_fix.of_queries, "attn.k": softmax_fix.of_keys}
WRITES = ("attn_out", "mlp_out")
"""What a layer adds to the residual stream."""


def attribution_patching(
    params: Params,
    clean: Int[AnyArray, "batch seq"],
    corrupt: Int[AnyArray, "batch seq"],
    config: ModelConfig,
    metric: Metric,
    nodes: Sequence[Node] | None = None,
    *,
    granularity: Literal["node", "edge"] = "node",
    steps: int = 0,
    qk_fix: bool = False,
    grad_drop: bool = False,
    runtime: Runtime = Runtime(),
) -> Float[Array, "nodes batch"] | Float[Array, "writers readers batch"]:
    """Estimated effect of patching clean values into the corrupt run, as of `activation_patching`.

    granularity: `node` scores `nodes` (`all_nodes` if None), in their order. `edge` scores what
    each writer to the residual stream sends to each reader of it, summed over positions: entry
    (w, r) is that of `edge_writers(config)[w]` and `edge_readers(config)[r]`, zero where the reader
    does not come after the writer (`edge_mask`). Biases belong to no writer: they are the same in
    both runs, and their difference is zero.

    steps: 0 takes the gradient in the corrupt run; k > 0 the mean over runs with embeddings
    corrupt + j/k (clean - corrupt), j = 1 … k. qk_fix: for nodes at `attn.q` and `attn.k`, the
    pattern is recomputed with the patched query or key, and its change scored by the gradient at
    the pattern, since softmax saturates; holds the patterns of all layers in memory. grad_drop: one
    backward pass for each layer, with what that layer writes held fixed, so that effects which
    cancel are seen; a score is the sum of their absolute values / (layers - 1), never negative.

    Raises ValueError for a node that the model does not have, runs of different shape, options that
    do not go together, and a score that is not finite, naming the row.
    """
    clean, corrupt = pair(clean, corrupt, config)
    held = as_argument(metric)
    if steps < 0:
        raise ValueError(f"steps: {steps} points of a path; 0 or more")
    if granularity == "edge":
        if nodes is not None or qk_fix or grad_drop:
            raise ValueError("granularity 'edge': nodes, qk_fix and grad_drop are for 'node'")
        scores = _edge_scores(params, clean, corrupt, held, config, steps, runtime)
        refuse_nan("the score of an edge in the run", scores)
        return scores
    if granularity != "node":
        raise ValueError(f"granularity: {granularity!r}; choose node or edge")
    seq = clean.shape[1]
    where = places(all_nodes(config, seq) if nodes is None else nodes, config, seq)
    if qk_fix and FIXABLE.keys().isdisjoint(where):
        raise ValueError(f"qk_fix: no node is at {' or '.join(FIXABLE)}")
    if grad_drop and config.num_hidden_layers < 2:
        raise ValueError("grad_drop: it leaves out one layer of several, and the model has one")
    scores = _node_scores(
        params,
        clean,
        corrupt,
        held,
        {site: indices for site, (_, indices) in where.items()},
        config,
        steps,
        qk_fix,
        grad_drop,
        runtime,
    )
    refuse_nan("the score of a node in the run", scores)
    return scores[in_order(where)]


@partial(jax.jit, static_argnames=("config", "steps", "qk_fix", "grad_drop", "runtime"))
def _node_scores(
    params: Params,
    clean: jax.Array,
    corrupt: jax.Array,
    metric: Partial,
    where: Mapping[str, jax.Array],
    config: ModelConfig,
    steps: int,
    qk_fix: bool,
    grad_drop: bool,
    runtime: Runtime,
) -> Float[Array, "nodes batch"]:
    fixed = [site for site in FIXABLE if qk_fix and site in where]
    tapped = tuple(site for site in where if site not in fixed)
    tapped += ("attn.pattern",) if fixed and "attn.pattern" not in where else ()
    captured = tuple({**dict.fromkeys(where), **dict.fromkeys(FIXABLE if fixed else ())})
    runs = _Runs(params, clean, corrupt, config, captured, steps, runtime)

    def scores(dropped: jax.Array | None) -> Float[Array, "nodes batch"]:
        value, gradient = runs.gradient(metric, tapped, dropped)
        found = []
        for site, indices in where.items():
            if site in fixed:
                grid, jointly = _fixed(site, runs, gradient["attn.pattern"])
            else:
                grid = _contracted(site, runs.difference(site) * gradient[site])
                jointly = grid.sum(axis=2)
            found.append(_selected(grid, jointly, indices))
        return _known(jnp.concatenate(found), value)

    if not grad_drop:
        return scores(None)
    layers = config.num_hidden_layers
    each = jax.lax.map(scores, jnp.arange(layers))
    return jnp.abs(each).sum(axis=0) / (layers - 1)


class _Runs:
    """The clean and the corrupt run, and gradients between them."""

    def __init__(
        self,
        params: Params,
        clean: jax.Array,
        corrupt: jax.Array,
        config: ModelConfig,
        capture: Sites,
        steps: int,
        runtime: Runtime,
    ) -> None:
        self.params, self.tokens, self.config, self.runtime = params, corrupt, config, runtime
        self.steps = steps
        self._wide = wide_dtype(params, runtime)
        capture = (*capture, *(("embed",) if steps and "embed" not in capture else ()))
        self.clean, self.corrupt = (
            hidden_states(params, tokens, config, capture=capture, runtime=runtime)[1]
            for tokens in (clean, corrupt)
        )

    def difference(self, site: str) -> jax.Array:
        """What patching adds to a site, at least float32."""
        return self.clean[site].astype(self._wide) - self.corrupt[site].astype(self._wide)

    def gradient(
        self, metric: Partial, sites: Sites, dropped: jax.Array | None = None
    ) -> tuple[Float[Array, " batch"], dict[str, jax.Array]]:
        """The metric in the corrupt run and its gradient at sites, or their means over the path.

        dropped: a layer whose writing to the stream is held fixed.
        """

        def at(point: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
            shift = None if point is None else point * self.difference("embed")
            edits = None if dropped is None else self._held(dropped, shift)
            value, _, gradient = differentiate(
                self.params,
                self.tokens,
                self.config,
                metric,
                sites,
                shift=shift,
                edits=edits,
                runtime=self.runtime,
            )
            return value, gradient

        if not self.steps:
            return at(None)

        def add(total: Any, point: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(lambda a, b: a + b / self.steps, total, at(point)), None

        points = jnp.arange(1, self.steps + 1, dtype=self._wide) / self.steps
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(at, points[0]))
        return jax.lax.scan(add, zeros, points)[0]

    def _held(self, layer: jax.Array, shift: jax.Array | None) -> Edits:
        """Edits that replace what one layer writes by the very same value, as a constant."""
        taps = None if shift is None else {"embed": shift}
        _, values = hidden_states(
            self.params,
            self.tokens,
            self.config,
            capture=WRITES,
            taps=taps,
            runtime=self.runtime,
        )
        mask = (jnp.arange(self.config.num_hidden_layers) == layer)[:, None, None, None]
        return {site: (mask, value) for site, value in jax.lax.stop_gradient(values).items()}


def _known(scores: jax.Array, value: Float[Array, " batch"]) -> jax.Array:
    """Scores, but NaN in rows whose metric is: its gradient may well be zero there."""
    return jnp.where(jnp.isfinite(value), scores, jnp.nan)


Grid = Float[Array, "layer batch seq heads"]


def _contracted(site: str, product: jax.Array) -> Grid:
    """Summed over a site's features; a site without layers or heads is taken to have one."""
    axes, grid = SITES[site], product.sum(axis=-1)
    if site in MATERIALISED:
        return grid.swapaxes(2, 3)
    grid = grid if axes[0] == "layer" else grid[None]
    return grid if "heads" in axes else grid[..., None]


def _fixed(
    site: str, runs: _Runs, gradient: jax.Array
) -> tuple[Grid, Float[Array, "layer batch heads"]]:
    """Scores of queries or keys by the QK fix, one layer after the other."""
    q, k = runs.corrupt["attn.q"], runs.corrupt["attn.k"]

    def layer(of: tuple[jax.Array, ...]) -> softmax_fix.Effects:
        return FIXABLE[site](*of, config=runs.config)

    return jax.lax.map(layer, (q, k, runs.clean[site], gradient))


def _selected(
    grid: Grid, jointly: Float[Array, "layer batch heads"], indices: Int[Array, "nodes 3"]
) -> Float[Array, "nodes batch"]:
    """A grid's values at nodes. Behind the last position and head stand all of them, so that the
    index -1 (`patching.ALL`) finds these."""
    grid = jnp.concatenate([grid, jointly[:, :, None]], axis=2)
    grid = jnp.concatenate([grid, grid.sum(axis=3, keepdims=True)], axis=3)
    layer, position, head = indices.T
    return grid[layer, :, position, head]


def edge_writers(config: ModelConfig) -> tuple[Node, ...]:
    """What writes to the residual stream: the embedding, then of each layer its heads (`attn.z`
    through their part of the output projection) and its MLP."""
    heads, layers = range(config.num_attention_heads), range(config.num_hidden_layers)
    writers = [Node("embed")]
    for layer in layers:
        writers += [Node("attn.z", layer, head=head) for head in heads]
        writers.append(Node("mlp_out", layer))
    return tuple(writers)


def edge_readers(config: ModelConfig) -> tuple[Node, ...]:
    """What reads the residual stream: of each layer the queries, keys and values of its heads and
    its MLP, each before its norm; at the end the unembedding (the last `resid_post`)."""
    readers = []
    for layer in range(config.num_hidden_layers):
        for site in SPLIT_READERS:
            readers += [Node(site, layer, head=h) for h in range(config.num_attention_heads)]
        readers.append(Node("mlp_in", layer))
    return (*readers, Node("resid_post", config.num_hidden_layers - 1))


def edge_mask(config: ModelConfig) -> Bool[np.ndarray, "writers readers"]:
    """Which edges there are: those to a reader that comes after the writer.

    Within a layer there are none, but from heads to the MLP where the residual is sequential.
    """

    def exists(writer: Node, reader: Node) -> bool:
        if writer.layer is None or reader.site == "resid_post":
            return True
        assert reader.layer is not None
        within = not config.use_parallel_residual and (writer.site, reader.site) == (
            "attn.z",
            "mlp_in",
        )
        return writer.layer + (not within) <= reader.layer

    readers = edge_readers(config)
    return np.array([[exists(w, r) for r in readers] for w in edge_writers(config)])


@partial(jax.jit, static_argnames=("config", "steps", "runtime"))
def _edge_scores(
    params: Params,
    clean: jax.Array,
    corrupt: jax.Array,
    metric: Partial,
    config: ModelConfig,
    steps: int,
    runtime: Runtime,
) -> Float[Array, "writers readers batch"]:
    runs = _Runs(params, clean, corrupt, config, ("embed", "attn.z", "mlp_out"), steps, runtime)
    end: tuple[str, tuple[int, ...]] = ("resid_post", (config.num_hidden_layers - 1,))
    value, gradient = runs.gradient(metric, (*SPLIT_READERS, "mlp_in", end))
    split = [gradient[site] for site in SPLIT_READERS]
    read = jnp.concatenate([*split, gradient["mlp_in"][:, :, :, None]], axis=3)
    kernel = params["layers"]["attention"]["dense"]["kernel"]
    by_head = (config.num_hidden_layers, config.num_attention_heads, config.head_size, -1)

    def sent(written: Float[Array, "batch seq writers hidden"]) -> Float[Array, "writers r batch"]:
        """From these writers to every reader, whether or not it comes after them."""
        precision = exact(written)
        inner = jnp.einsum("bswd,lbsrd->wlrb", written, read, precision=precision)
        last = jnp.einsum("bswd,lbsd->wlb", written, gradient["resid_post"], precision=precision)
        return jnp.concatenate([inner.reshape(inner.shape[0], -1, inner.shape[-1]), last], axis=1)

    def layer(of: tuple[jax.Array, ...]) -> Float[Array, "writers r batch"]:
        z, dense, mlp = of
        heads = jnp.einsum("bshe,hed->bshd", z, dense.astype(z.dtype), precision=exact(z))
        return sent(jnp.concatenate([heads, mlp[:, :, None]], axis=2))

    of_layers = jax.lax.map(
        layer, (runs.difference("attn.z"), kernel.reshape(by_head), runs.difference("mlp_out"))
    )
    first = sent(runs.difference("embed")[:, :, None])
    scores = jnp.concatenate([first, of_layers.reshape(-1, *first.shape[1:])])
    return _known(jnp.where(edge_mask(config)[:, :, None], scores, 0), value)
