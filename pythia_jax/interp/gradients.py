"""Per-example gradients of every parameter, in one backward pass over the batch.

Those of the linear layers come from sinks (`pythia_jax.model.sinks`); those of the norms by giving
their parameters a batch axis; of the embedding, from the gradient at the site `embed`; of the
unembedding, from inside the loss's chunks. A row's gradient is formed from that row alone, so it
does not depend on what else is in the batch.

The gradient of a unit within a row has two meanings. `by="loss"`: that of the losses *of* the
unit's tokens, each the target of the position before it; it reaches back into whatever the model
attends to. `by="position"`: the part of the whole row's gradient that the unit's positions carry.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Int

from pythia_jax import sharding
from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.interp.collecting import LINEAR, Backward, backward, collect
from pythia_jax.interp.gradient_plan import (
    EMBEDDINGS,
    PATHS,
    By,
    Plan,
    Reduction,
    Unit,
    check_choices,
    module_of,
    plan_of,
    sides_of,
)
from pythia_jax.interp.projection import Projection
from pythia_jax.model.gptneox import AnyArray, check_rows
from pythia_jax.model.loss import unembedding_rows
from pythia_jax.model.parameters import Params
from pythia_jax.model.sinks import Units, projected

__all__ = [
    "EMBEDDINGS",
    "LINEAR",
    "PATHS",
    "check_finite",
    "collect",
    "gradient_norms",
    "per_example_gradients",
]


def per_example_gradients(
    params: Params,
    tokens: Int[AnyArray, "batch seq+1"],
    config: ModelConfig,
    *,
    unit: Unit = "sequence",
    by: By = "loss",
    documents: Int[AnyArray, "batch seq+1"] | None = None,
    document_count: int | None = None,
    projection: Projection | None = None,
    parameters: str | Sequence[str] = "*",
    reduction: Reduction = "sum",
    runtime: Runtime = Runtime(),
) -> Params:
    """The gradient of each row's loss, or of each document's or token's, by every parameter.

    unit: what an example is. Leaves have the parameter's axes behind `[batch]` for sequences,
        `[batch, documents]` for documents, `[batch, seq]` for tokens: `[batch, layers, in, out]`
        is a kernel of the layers by sequence.
    by: what the gradient of a document or a token is: that of its `loss`, or what its positions
        carry of the row's (`position`). Entry t of tokens is, by loss, of the loss of
        `tokens[:, t + 1]`; by position, what `tokens[:, t]` carries. By loss, the backward pass is
        made once for every unit, by position once.
    documents: the number of each token's document within its row, from 0; -1 is none.
    document_count: how many numbers there are; under `jax.jit`, where it cannot be read off.
    projection: which, of the kernels. The tree then holds, at `kernel`,
        P_L G P_Rᵀ of each linear module, `[batch, (units,) layers, p (out), p (in)]`, and nothing
        else: biases and norms are not projected. The embedding (`embedding`, taken for a linear
        layer of one-hot inputs) and the unembedding are if a pattern other than "*" matches them.
    parameters: pattern or patterns over the paths of the parameter table, `layers/mlp/*`. The tree
        holds those that match.
    reduction: `sum` of a unit's losses in nats; `mean` per token of it; `train`, divided by
        batch x seq, so that their sum over rows is the gradient of `pj.loss`.

    Gradients are at least float32. Outside of `jax.jit` they are checked: one that is no finite
    number is an error. Inside it, `check_finite` can be called on what comes out.

    Raises ValueError for a pattern without a match, units and documents that do not fit, and
    gradients that are no finite numbers, with their row.
    """
    check_rows(tokens, config)
    check_choices(unit, by, reduction)
    plan = plan_of(parameters, projection, unit, by, documents, document_count, tokens)
    sides = None
    if projection is not None:
        sides = sides_of(projection, config, plan.paths)
    found = _gradients(params, tokens, documents, sides, config=config, plan=plan, runtime=runtime)
    if reduction != "sum" or plan.want == "squares":
        found = _reduced(found, documents, tokens, plan=plan, reduction=reduction)
    check_finite(found)
    return found


def gradient_norms(
    params: Params,
    tokens: Int[AnyArray, "batch seq+1"],
    config: ModelConfig,
    *,
    unit: Unit = "sequence",
    by: By = "loss",
    documents: Int[AnyArray, "batch seq+1"] | None = None,
    document_count: int | None = None,
    parameters: str | Sequence[str] = "*",
    reduction: Reduction = "sum",
    runtime: Runtime = Runtime(),
) -> Params:
    """Norms of the gradients that `per_example_gradients` gives for the same arguments.

    Leaves are `[batch, layers]`, or `[batch]` where a parameter has no layers, with an axis of
    units after `[batch]`. Of the gradients themselves, one module's of one layer exists at once
    (of the unembedding, one row's).
    """
    check_rows(tokens, config)
    check_choices(unit, by, reduction)
    plan = plan_of(parameters, None, unit, by, documents, document_count, tokens)
    plan = dataclasses.replace(plan, want="squares")
    found = _gradients(params, tokens, documents, None, config=config, plan=plan, runtime=runtime)
    if reduction != "sum" or plan.want == "squares":
        found = _reduced(found, documents, tokens, plan=plan, reduction=reduction)
    check_finite(found)
    return found


def check_finite(
    gradients: Any,
    what: str = "the gradient",
    advice: str = "leave the row out, or look at its loss and at the weights",
) -> None:
    """Refuse gradients, first axis batch, that are no finite numbers. Does nothing under tracing.

    what: what the error calls them. advice: how it ends.

    Raises ValueError with their rows, and their parameters if they are a tree.
    """
    flat = {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in _leaves(gradients)}
    try:
        finite = {path: np.asarray(rows) for path, rows in _finite_rows(flat).items()}
    except jax.errors.TracerArrayConversionError:
        return
    wrong = {path: np.flatnonzero(~rows) for path, rows in finite.items() if not rows.all()}
    if wrong:
        rows = sorted({int(row) for of_path in wrong.values() for row in of_path})
        where = "" if "" in wrong else f", in {', '.join(wrong)}"
        raise ValueError(f"row {', '.join(map(str, rows))}: {what} is not finite{where}; {advice}")


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


@jax.jit
def _finite_rows(flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def rows(value: jax.Array) -> jax.Array:
        finite = jnp.isfinite(value).all(axis=tuple(range(1, value.ndim)))
        return sharding.constrain(finite, ("seq",))  # whole everywhere: each process reads them

    return {path: rows(value) for path, value in flat.items()}


# How it is computed.


@dataclass(frozen=True)
class _OfModule:
    """The statistic of a linear module: of its kernel, its bias or both."""

    leaves: tuple[str, ...]
    want: str
    units: Units

    def __call__(self, inputs: jax.Array, cotangents: jax.Array, aux: Any) -> dict[str, jax.Array]:
        slots, sides = aux["slots"], aux["sides"]
        made = {}
        if "kernel" in self.leaves:
            made["kernel"] = self._kernel(inputs, cotangents, slots, sides)
        if "bias" in self.leaves:
            bias = self.units.sums(cotangents, slots)
            made["bias"] = (bias**2).sum(-1) if self.want == "squares" else bias
        return made

    def _kernel(self, inputs: Any, cotangents: Any, slots: Any, sides: Any) -> jax.Array:
        if self.want == "projections":
            return self.units.projections(inputs, cotangents, sides, slots)
        if self.want == "squares" and self.units.each:  # of an outer product
            wide = [a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in (inputs, cotangents)]
            return (wide[0] ** 2).sum(-1) * (wide[1] ** 2).sum(-1)
        kernel = self.units.products(inputs, cotangents, slots)
        return (kernel**2).sum(axis=(-2, -1)) if self.want == "squares" else kernel


@partial(jax.jit, static_argnames=("config", "plan", "runtime"))
def _gradients(
    params: Params,
    tokens: AnyArray,
    documents: AnyArray | None,
    sides: dict[str, Any] | None,
    *,
    config: ModelConfig,
    plan: Plan,
    runtime: Runtime,
) -> Params:
    """The tree that the plan asks for, of summed losses."""
    slots = _slots(documents, plan)
    done = _pass(params, tokens, slots, sides, config, plan, runtime)

    def found(d_hidden: jax.Array) -> dict[str, jax.Array]:
        pulled = done.pull(d_hidden)
        flat = _of_layers(pulled, slots, plan)
        if pulled["embed"] is not None:
            of_module = sides[module_of(EMBEDDINGS[0])] if sides else None
            flat[EMBEDDINGS[0]] = _embedding(
                pulled["embed"],
                jnp.asarray(tokens[:, :-1]),
                slots,
                of_module,
                config.vocab_size,
                plan,
            )
        return flat

    if plan.unit == "sequence" or plan.by == "position":
        behind = 1 + (plan.unit != "sequence")
        flat = {
            path: jnp.moveaxis(value, 0, behind) if path.startswith("layers/") else value
            for path, value in found(done.d_hidden).items()
        }
    else:
        flat = _unit_by_unit(found, done.d_hidden, slots, plan)
    if EMBEDDINGS[1] in plan.paths:
        flat[EMBEDDINGS[1]] = _unembedding(done, params, slots, sides, plan, runtime)
    return traverse_util.unflatten_dict({path: flat[path] for path in plan.paths}, sep="/")


def _slots(documents: AnyArray | None, plan: Plan) -> jax.Array | None:
    """The document of each loss's target, or of each input: `[batch, seq]`."""
    if documents is None:
        return None
    return jnp.asarray(documents[:, 1:] if plan.by == "loss" else documents[:, :-1])


def _pass(
    params: Params,
    tokens: AnyArray,
    slots: jax.Array | None,
    sides: dict[str, Any] | None,
    config: ModelConfig,
    plan: Plan,
    runtime: Runtime,
) -> Backward:
    of_layers = None
    if slots is not None:
        of_layers = jnp.broadcast_to(slots, (config.num_hidden_layers, *slots.shape))
    statistics = {}
    for module in LINEAR:
        leaves = tuple(leaf for leaf in ("kernel", "bias") if f"{module}/{leaf}" in plan.paths)
        if leaves:
            aux = {"slots": of_layers, "sides": sides[module] if sides else None}
            statistics[module] = (_OfModule(leaves, plan.want, plan.units), aux)
    # A batch axis makes of one gradient each row's; an axis of positions, each position's.
    rows = (tokens.shape[0], 1 if plan.units == Units() else tokens.shape[1] - 1)
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    norms = {
        path: jnp.broadcast_to(
            flat[path][..., None, None, :], (*flat[path].shape[:-1], *rows, config.hidden_size)
        )
        for path in plan.paths
        if "norm/" in path
    }
    embed = EMBEDDINGS[0] in plan.paths
    return backward(params, tokens, config, statistics, norms=norms, embed=embed, runtime=runtime)


def _of_layers(pulled: dict[str, Any], slots: jax.Array | None, plan: Plan) -> dict[str, jax.Array]:
    """Gradients of all but the embeddings, `[(layers,) batch, (units,) …]` each."""
    flat = {
        f"{module}/{leaf}": value
        for module, made in pulled["sinks"].items()
        for leaf, value in made.items()
    }
    for path, value in pulled["norms"].items():
        kept = plan.units.sums(value, slots)
        flat[path] = (kept**2).sum(-1) if plan.want == "squares" else kept
    return flat


def _unit_by_unit(
    found: Callable[[jax.Array], dict[str, jax.Array]],
    d_hidden: jax.Array,
    slots: jax.Array | None,
    plan: Plan,
) -> dict[str, jax.Array]:
    """One backward pass for the losses of each unit, `[batch, units, (layers,) …]`.

    The forward pass is shared: the loss's gradient by a hidden state is that of one token's loss.
    """
    seq = d_hidden.shape[1]
    slots, count = (jnp.arange(seq)[None], seq) if slots is None else (slots, plan.count)

    def one(slot: jax.Array) -> dict[str, jax.Array]:
        return found(jnp.where((slots == slot)[..., None], d_hidden, 0))

    def placed(path: str, value: jax.Array) -> jax.Array:
        if path.startswith("layers/"):
            return jnp.moveaxis(value, (0, 1, 2), (1, 2, 0))
        return jnp.moveaxis(value, 0, 1)

    stacked = jax.lax.map(one, jnp.arange(count))
    return {path: placed(path, value) for path, value in stacked.items()}


def _embedding(
    cotangents: jax.Array,
    tokens: jax.Array,
    slots: jax.Array | None,
    sides: Any,
    vocabulary: int,
    plan: Plan,
) -> jax.Array:
    """Gradients of the embedding, `[batch, (units,) vocab, hidden]`, from those of its output."""
    units = plan.units
    if plan.want == "projections":
        left = projected(cotangents, sides["left"])
        return units.products(left, jnp.asarray(sides["right"], left.dtype)[tokens], slots)
    if units.each and plan.want == "squares":
        return (cotangents**2).sum(-1)
    if units.each:
        batch, seq = tokens.shape
        empty = jnp.zeros((batch, seq, vocabulary, cotangents.shape[-1]), cotangents.dtype)
        return empty.at[np.arange(batch)[:, None], np.arange(seq), tokens].set(cotangents)
    unit = jnp.zeros_like(tokens) if slots is None or units.count is None else slots
    form = _embedding_squares if plan.want == "squares" else _embedding_rows
    inner = () if plan.want == "squares" else ("stream", "stream")
    outer = ("batch",) if units.count is None else ("batch", "seq")
    rows = ("batch", "seq")
    # Each device its own rows: of scattered rows, the compiler would sum copies.
    local = sharding.by_shard(
        partial(form, units=units, vocabulary=vocabulary),
        ((*rows, "stream"), rows, rows),
        (*outer, *inner),
    )
    return local(cotangents, tokens, unit)


def _embedding_rows(
    cotangents: jax.Array, tokens: jax.Array, unit: jax.Array, *, units: Units, vocabulary: int
) -> jax.Array:
    count = units.count or 1

    def row(cotangents: jax.Array, tokens: jax.Array, unit: jax.Array) -> jax.Array:
        empty = jnp.zeros((count, vocabulary, cotangents.shape[-1]), cotangents.dtype)
        # A unit of -1 would be counted from the end.
        return empty.at[jnp.where(unit < 0, count, unit), tokens].add(cotangents, mode="drop")

    summed = jax.vmap(row)(cotangents, tokens, unit)
    return summed[:, 0] if units.count is None else summed


def _embedding_squares(
    cotangents: jax.Array, tokens: jax.Array, unit: jax.Array, *, units: Units, vocabulary: int
) -> jax.Array:
    """Squared norms of what `_embedding_rows` gives, without the rows of zeros."""

    def row(cotangents: jax.Array, tokens: jax.Array, unit: jax.Array) -> jax.Array:
        same = (tokens[:, None] == tokens) & (unit[:, None] == unit)
        first = jnp.argmax(same, axis=-1)  # where this token stands first in this unit
        return jnp.zeros_like(cotangents).at[first].add(cotangents)

    squares = (jax.vmap(row)(cotangents, tokens, unit) ** 2).sum(-1)
    return units.sums(squares[..., None], unit)[..., 0]


def _unembedding(
    done: Backward,
    params: Params,
    slots: jax.Array | None,
    sides: dict[str, Any] | None,
    plan: Plan,
    runtime: Runtime,
) -> jax.Array:
    """Gradients of the unembedding. Position by position they are those of the losses too."""
    of_module = sides[module_of(EMBEDDINGS[1])] if sides else None
    made = unembedding_rows(
        done.hidden,
        params["embed_out"]["kernel"],
        done.weights,
        done.labels,
        runtime.loss_chunk,
        units=Units(plan.count, each=plan.unit == "token"),
        slots=slots,
        projection=(of_module["right"], of_module["left"]) if of_module else None,
        squares=plan.want == "squares",
    )
    return made.swapaxes(-2, -1) if of_module else made


@partial(jax.jit, static_argnames=("plan", "reduction"), donate_argnames="found")
def _reduced(
    found: Params,
    documents: AnyArray | None,
    tokens: AnyArray,
    *,
    plan: Plan,
    reduction: Reduction,
) -> Params:
    """Of summed losses' gradients those of the reduction, of squared norms norms."""
    batch, seq = tokens.shape[0], tokens.shape[1] - 1
    scale = jnp.ones([])
    if reduction == "train":
        scale = jnp.asarray(1 / (batch * seq))
    elif reduction == "mean" and plan.count is not None:
        members = jax.nn.one_hot(_slots(documents, plan), plan.count)
        scale = 1 / members.sum(axis=1).clip(1)
    elif reduction == "mean" and plan.unit == "sequence":
        scale = jnp.asarray(1 / seq)

    def scaled(value: jax.Array) -> jax.Array:
        value = jnp.sqrt(value) if plan.want == "squares" else value
        factor = scale.reshape(*scale.shape, *[1] * (value.ndim - scale.ndim))
        return value if reduction == "sum" else value * factor.astype(value.dtype)

    return jax.tree.map(scaled, found)
