"""Activation patching: what one value of a clean run does, put into a corrupt run.

Sources: Vig et al., 2020 (causal mediation); Meng et al., 2022 (arXiv 2202.05262, section 2). Here
in one direction: the corrupt run with a clean value patched in ("denoising"). For the other, hand
over the two runs the other way round.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.interp.activations import Metric, as_argument, known_sites, measure, refuse_nan
from pythia_jax.model.gptneox import AnyArray, check_tokens, hidden_states
from pythia_jax.model.parameters import Params
from pythia_jax.model.sites import SITES, Capture, site_shape

ALL = -1
"""In arrays of indices: every layer, position or head."""


class Node(NamedTuple):
    """A place that can be patched: a site, its layer, and one position and head or all of them.

    layer: None for a site without layers. position: None for all; of scores and patterns, the
    query's. head: None for all, and for a site without heads.
    """

    site: str
    layer: int | None = None
    position: int | None = None
    head: int | None = None

    def __str__(self) -> str:
        parts = [self.site]
        parts += [] if self.layer is None else [f"layer {self.layer}"]
        parts += [] if self.head is None else [f"head {self.head}"]
        parts += [] if self.position is None else [f"position {self.position}"]
        return ", ".join(parts)


COMPONENTS = ("embed", "attn.z", "mlp_out")
"""Sites of what writes to the residual stream: embeddings, heads, MLPs."""


def all_nodes(
    config: ModelConfig,
    seq: int,
    sites: Capture = COMPONENTS,
    *,
    positions: Sequence[int | None] | None = None,
) -> tuple[Node, ...]:
    """Every node of these sites: layer by layer, position by position, head by head.

    sites: names, or pairs (name, layers). positions: those wanted, in place of each of `seq`;
    `[None]` makes one node of all positions.

    Raises ValueError for an unknown site or layer, and for a position outside of `seq`.
    """
    where = range(seq) if positions is None else positions
    nodes = []
    for item in known_sites(sites, config):
        site, layers = (item, range(config.num_hidden_layers)) if isinstance(item, str) else item
        axes = SITES[site]
        layers = layers if axes[0] == "layer" else (None,)
        heads = range(config.num_attention_heads) if "heads" in axes else (None,)
        nodes += [Node(site, i, p, h) for i in layers for p in where for h in heads]
    places(nodes, config, seq)
    return tuple(nodes)


def activation_patching(
    params: Params,
    clean: Int[AnyArray, "batch seq"],
    corrupt: Int[AnyArray, "batch seq"],
    config: ModelConfig,
    metric: Metric,
    nodes: Sequence[Node],
    *,
    chunk: int = 16,
    runtime: Runtime = Runtime(),
) -> Float[Array, "nodes batch"]:
    """Exact effect of each node: metric(corrupt run with the node's clean value) - metric(corrupt).

    Every node is patched alone. The two runs are of one shape, row beside row; the metric is given
    the corrupt tokens. A score near metric(clean) - metric(corrupt) says that the node alone
    restores the clean answer.

    chunk: nodes that run at once; memory holds the logits of chunk x batch rows.

    Raises ValueError for a node that the model does not have, runs of different shape, and an
    effect that is not finite, naming the row.
    """
    clean, corrupt = pair(clean, corrupt, config)
    where = places(nodes, config, clean.shape[1])
    if chunk < 1:
        raise ValueError(f"chunk: {chunk} nodes at once; at least 1")
    effects = _effects(
        params,
        clean,
        corrupt,
        as_argument(metric),
        {site: indices for site, (_, indices) in where.items()},
        config,
        chunk,
        runtime,
    )
    refuse_nan("the effect of a node in the run", effects)
    return effects[in_order(where)]


@partial(jax.jit, static_argnames=("config", "chunk", "runtime"))
def _effects(
    params: Params,
    clean: jax.Array,
    corrupt: jax.Array,
    metric: Partial,
    where: Mapping[str, jax.Array],
    config: ModelConfig,
    chunk: int,
    runtime: Runtime,
) -> Float[Array, "nodes batch"]:
    _, values = hidden_states(params, clean, config, capture=tuple(where), runtime=runtime)
    before, _ = measure(params, corrupt, config, metric, runtime=runtime)
    seq = clean.shape[1]

    def patched(site: str, index: jax.Array) -> jax.Array:
        edits = {site: (node_mask(site, index, config, seq), values[site])}
        return measure(params, corrupt, config, metric, edits=edits, runtime=runtime)[0]

    effects = []
    # Sites one after the other, so that no run pays for a site that it does not patch.
    for site, indices in where.items():
        many = len(indices)
        size = min(chunk, many)
        padded = jnp.pad(indices, [(0, -many % size), (0, 0)], mode="edge")
        after = jax.lax.map(
            jax.vmap(partial(patched, site)), padded.reshape(-1, size, indices.shape[1])
        )
        effects.append(after.reshape(-1, *before.shape)[:many] - before)
    return jnp.concatenate(effects)


def node_mask(site: str, index: Int[Array, "3"], config: ModelConfig, seq: int) -> Bool[Array, "…"]:
    """Where a node is in its site, given its (layer, position, head); broadcasts to the site."""
    axes = SITES[site]
    sizes = site_shape(site, config, 1, seq)
    layer, position, head = index
    mask = jnp.ones((1,) * len(axes), bool)
    for axis, wanted in (("layer", layer), ("seq", position), ("heads", head)):
        if axis not in axes:
            continue
        i = axes.index(axis)  # of two sequence axes, the query's comes first
        hit = (jnp.arange(sizes[i]) == wanted) | (wanted == ALL)
        mask = mask & hit.reshape([-1 if j == i else 1 for j in range(len(axes))])
    return mask


Places = dict[str, tuple[np.ndarray, np.ndarray]]


def places(nodes: Iterable[Node], config: ModelConfig, seq: int) -> Places:
    """By site: its nodes' numbers, int `[n]`, and their (layer, position, head), int `[n, 3]`.

    Raises ValueError for a node that the model does not have, or that is no node.
    """
    found: dict[str, list[tuple[int, ...]]] = {}
    for number, given in enumerate(nodes):
        told = f"nodes[{number}] = {given!r}"
        try:
            node = Node(*given)
        except TypeError:
            raise ValueError(f"{told}: (site, layer, position, head) is wanted") from None
        known_sites((str(node.site),), config)
        axes = SITES[node.site]
        sizes = {"layer": config.num_hidden_layers, "position": seq}
        sizes["head"] = config.num_attention_heads
        has = {"layer": "layer" in axes, "position": True, "head": "heads" in axes}
        for name, size in sizes.items():
            value = getattr(node, name)
            if value is None and name == "layer" and has["layer"]:
                raise ValueError(f"{told}: which layer? Choose from 0 to {size - 1}")
            if value is not None and not has[name]:
                raise ValueError(f"{told}: site {node.site!r} has no {name} to choose")
            if value is not None and not 0 <= value < size:
                raise ValueError(f"{told}: {name} {value}: choose from 0 to {size - 1}")
        index = [ALL if value is None else int(value) for value in node[1:]]
        found.setdefault(node.site, []).append((number, *index))
    if not found:
        raise ValueError("nodes: name at least one")
    # By name, the order that a dict comes out of `jax.jit` in.
    arrays = {site: np.array(found[site]) for site in sorted(found)}
    return {site: (rows[:, 0], rows[:, 1:]) for site, rows in arrays.items()}


def in_order(where: Places) -> np.ndarray:
    """Where each node's value is among values that stand site by site."""
    return np.argsort(np.concatenate([numbers for numbers, _ in where.values()]))


def pair(clean: AnyArray, corrupt: AnyArray, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Both runs' tokens, checked. Raises ValueError if they do not stand beside each other."""
    for tokens in (clean, corrupt):
        check_tokens(tokens, config)
    if clean.shape != corrupt.shape:
        raise ValueError(
            f"clean tokens of shape {clean.shape} and corrupt ones of {corrupt.shape}: "
            "values are patched place by place, so both need one shape"
        )
    return jnp.asarray(clean), jnp.asarray(corrupt)
