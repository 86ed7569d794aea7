"""Influence of training rows on queries: inner products of gradients, formed in several ways.

The sign is that of the inner product: a row with a positive score, trained on, lowers the query's
loss. Losses are summed over a row, in nats.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Int

from pythia_jax.configs import ModelConfig, RunConfig, Runtime
from pythia_jax.interp.collecting import LINEAR, Backward, backward
from pythia_jax.interp.curvature import twice_differentiable
from pythia_jax.interp.gradients import (
    EMBEDDINGS,
    PATHS,
    check_finite,
    per_example_gradients,
)
from pythia_jax.model.attention import exact
from pythia_jax.model.gptneox import AnyArray, check_tokens
from pythia_jax.model.loss import token_cross_entropy, token_losses
from pythia_jax.model.parameters import Params
from pythia_jax.model.quantize import check_floats
from pythia_jax.model.sinks import Units
from pythia_jax.training.optimizer import learning_rate

Rows = Int[AnyArray, "batch seq+1"]


def pairwise(
    query_gradients: Params,
    train_gradients: Params,
    metric: Literal["dot", "cosine"] = "dot",
) -> Float[Array, "queries rows"]:
    """Inner products of gradients, or cosines, over all of their parameters together.

    Both are trees with a leading axis: `[queries, …]` and `[rows, …]`, as `per_example_gradients`
    and `precondition` give them.

    Raises ValueError for trees that do not fit, for gradients that are no finite numbers, and for
    the cosine of one that is all zero, with its row. Cosines are not for the inside of `jax.jit`.
    """
    if metric not in ("dot", "cosine"):
        raise ValueError(f"metric={metric!r}: choose dot or cosine")
    sides = [_flat(tree) for tree in (query_gradients, train_gradients)]
    shapes = [{path: np.shape(value)[1:] for path, value in flat.items()} for flat in sides]
    for path in sorted({*shapes[0], *shapes[1]}):
        got = [of.get(path) for of in shapes]
        if got[0] != got[1]:
            told = ["none" if shape is None else f"{shape} a row" for shape in got]
            raise ValueError(f"gradients of {path} do not fit: queries {told[0]}, rows {told[1]}")
    names = ("query", "train")
    dots, *norms = _pairwise(*sides)
    for name, norm in zip(names, norms, strict=True):
        check_finite(norm, f"the norm of the {name} gradient")
    if metric == "dot":
        return dots
    for name, norm in zip(names, norms, strict=True):
        if (empty := np.flatnonzero(np.asarray(norm) == 0)).size:
            raise ValueError(f"the {name} gradient of row {empty[0]} is all zero: it has no cosine")
    return dots / norms[0][:, None] / norms[1]


def scores(
    params: Params,
    tokens: Rows,
    config: ModelConfig,
    directions: Params,
    *,
    runtime: Runtime = Runtime(),
) -> Float[Array, "queries batch"]:
    """The inner product of each row's gradient with each of `directions`, in one backward pass.

    directions: a tree of any of the parameters with a leading axis of queries, such as gradients of
    queries, preconditioned (`pythia_jax.interp.preconditioning`). A row's gradient is that of its
    summed loss. It is formed one module of one layer at a time, and only its inner products are
    kept; a direction of the unembedding costs another sweep over the logits.

    Raises ValueError for directions that do not fit the parameters, and for a score or a direction
    that is no finite number, with its row. (Under tracing, nothing looks for these.)
    """
    flat = _directions(directions, params)
    check_tokens(tokens, config)
    found = _scores(params, jnp.asarray(tokens), flat, config=config, runtime=runtime)
    check_finite(found.T, "the score")
    return found


def token_scores(
    params: Params,
    tokens: Rows,
    config: ModelConfig,
    directions: Params,
    *,
    runtime: Runtime = Runtime(),
) -> Float[Array, "queries batch seq"]:
    """The inner product of the gradient of each token's loss with each of `directions`.

    Entry t is about the loss of `tokens[:, t + 1]`; over a row they add up to `scores`. One
    forward-mode derivative of `pj.token_losses` a query, and no backward pass.

    directions: as in `scores`.

    Raises ValueError as `scores` does, and for an attention kernel that has no forward-mode
    derivative.
    """
    flat = _directions(directions, params)
    check_tokens(tokens, config)
    runtime = twice_differentiable(runtime)
    found = _token_scores(params, jnp.asarray(tokens), flat, config=config, runtime=runtime)
    check_finite(found.swapaxes(0, 1), "the score of a token")
    return found


def tracin(
    checkpoints: Iterable[tuple[int, Params]],
    tokens: Rows | Sequence[Rows],
    queries: Rows,
    config: RunConfig,
    *,
    parameters: str | Sequence[str] = "*",
    runtime: Runtime | None = None,
) -> Float[np.ndarray, "queries rows"]:
    """Σ_k η_k ∇ℓ_row(θ_k) · ∇ℓ_query(θ_k) over checkpoints (TracInCP, Pruthi et al., 2020).

    checkpoints: pairs (step, parameters), taken one by one. η_k is the learning rate of the update
    made from that checkpoint, by the config's schedule, as if no update had been skipped; 0 at
    step 0 of a schedule that warms up from 0. tokens: training rows, or a list of batches of them.
    parameters: pattern or patterns of those whose gradients count. runtime: the config's run's if
    left out.

    Losses are summed over rows, in nats; divided by batch x seq of training, a term is what one
    plain step of gradient descent on the row's share of a batch would take off the query's loss.
    Of the gradients, those of the queries exist at a time.

    Raises ValueError for no checkpoint, a step that is not of the run, what does not fit, and a
    score that is no finite number, with its step and row.
    """
    assert config.model is not None
    runtime = config.runtime if runtime is None else runtime
    batches: list[Any] = [tokens] if getattr(tokens, "ndim", None) == 2 else list(tokens)
    rate = learning_rate(config.optimizer, config.training.steps)
    total = None
    for step, params in checkpoints:
        if not 0 <= step <= config.training.steps:
            raise ValueError(f"step {step} is not of this run, which has {config.training.steps}")
        gradients = per_example_gradients(
            params, queries, config.model, parameters=parameters, runtime=runtime
        )
        flat, found = _directions(gradients, params), []
        for batch in batches:
            check_tokens(batch, config.model)
            part = _scores(params, jnp.asarray(batch), flat, config=config.model, runtime=runtime)
            found.append(np.asarray(part))
        every = np.concatenate(found, axis=1)
        check_finite(every.T, f"the score at step {step}")
        part = float(rate(step)) * every
        total = part if total is None else total + part
    if total is None:
        raise ValueError("there is no checkpoint to score with")
    return total


@jax.jit
def _pairwise(query: dict[str, Any], train: dict[str, Any]) -> tuple[jax.Array, ...]:
    """Inner products `[queries, rows]` and norms of both."""

    def wide(x: Any) -> jax.Array:
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))

    query, train = (jax.tree.map(wide, side) for side in (query, train))
    dots = sum(
        jnp.tensordot(
            value, train[path], axes=[[*range(1, value.ndim)]] * 2, precision=exact(value)
        )
        for path, value in query.items()
    )
    norms = [
        jnp.sqrt(sum((x**2).sum(axis=tuple(range(1, x.ndim))) for x in side.values()))
        for side in (query, train)
    ]
    return jnp.asarray(dots), *norms


def _flat(tree: Params) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")


def _directions(directions: Params, params: Params) -> dict[str, Any]:
    """By path, checked."""
    check_floats(params)
    flat = _flat(directions)
    shapes = {k: v.shape for k, v in _flat(params).items()}
    if not flat:
        raise ValueError("directions name no parameter")
    counts = {np.shape(value)[:1] for value in flat.values()}
    for path, value in flat.items():
        if path not in shapes:
            raise ValueError(f"a direction of {path!r}: there are {', '.join(PATHS)}")
        if np.shape(value)[1:] != shapes[path]:
            raise ValueError(
                f"the directions of {path} have shape {np.shape(value)}: "
                f"[queries, {', '.join(map(str, shapes[path]))}] is wanted"
            )
    if len(counts) > 1:
        raise ValueError(f"directions of {sorted(counts)} queries: the same number is wanted")
    check_finite(flat, "the query's direction")
    return flat


def _dots(inputs: jax.Array, cotangents: jax.Array, aux: dict[str, jax.Array]) -> jax.Array:
    """`[queries, batch]` of one module: rows' gradients times directions."""
    found = jnp.zeros([], jnp.promote_types(inputs.dtype, jnp.float32))
    if "kernel" in aux:
        rows = Units().products(inputs, cotangents)
        found = found + jnp.einsum("bio,qio->qb", rows, aux["kernel"], precision=exact(rows))
    if "bias" in aux:
        rows = Units().sums(cotangents)
        found = found + jnp.einsum("bo,qo->qb", rows, aux["bias"], precision=exact(rows))
    return found


@partial(jax.jit, static_argnames=("config", "runtime"))
def _scores(
    params: Params,
    tokens: jax.Array,
    directions: dict[str, Any],
    *,
    config: ModelConfig,
    runtime: Runtime,
) -> jax.Array:
    watched: dict[str, dict[str, jax.Array]] = {}
    for path, value in directions.items():
        module, _, leaf = path.rpartition("/")
        if module in LINEAR:
            watched.setdefault(module, {})[leaf] = jnp.moveaxis(value, 0, 1)  # layers first
    flat = _flat(params)
    rows = (tokens.shape[0], 1)  # a batch axis makes of one gradient each row's
    norms = {
        path: jnp.broadcast_to(
            flat[path][..., None, None, :], (*flat[path].shape[:-1], *rows, config.hidden_size)
        )
        for path in directions
        if "norm/" in path
    }
    done = backward(
        params,
        tokens,
        config,
        {module: (_dots, aux) for module, aux in watched.items()},
        norms=norms,
        embed=EMBEDDINGS[0] in directions,
        runtime=runtime,
    )
    pulled = done.pull(done.d_hidden)
    total = jnp.zeros([], done.weights.dtype)
    for found in pulled["sinks"].values():
        total = total + found.sum(axis=0)
    for path, value in pulled["norms"].items():
        axes = "lbsh,qlh->qb" if path.startswith("layers/") else "bsh,qh->qb"
        total = total + jnp.einsum(axes, value, directions[path], precision=exact(value))
    if EMBEDDINGS[0] in directions:
        total = total + _embedding(pulled["embed"], tokens[:, :-1], directions[EMBEDDINGS[0]])
    if EMBEDDINGS[1] in directions:
        kernel = params["embed_out"]["kernel"]
        total = total + _unembedding(done, kernel, directions[EMBEDDINGS[1]], runtime)
    return total


def _embedding(cotangents: jax.Array, tokens: jax.Array, directions: jax.Array) -> jax.Array:
    def of_query(table: jax.Array) -> jax.Array:
        precision = exact(cotangents)
        return jnp.einsum("bsh,bsh->b", cotangents, table[tokens], precision=precision)

    return jax.lax.map(of_query, directions)


def _unembedding(
    done: Backward, kernel: jax.Array, directions: jax.Array, runtime: Runtime
) -> jax.Array:
    def losses(kernel: jax.Array) -> jax.Array:
        return token_cross_entropy(done.hidden, kernel, done.labels, runtime.loss_chunk)

    def of_query(direction: jax.Array) -> jax.Array:
        moved = jax.jvp(losses, (kernel,), (direction.astype(kernel.dtype),))[1]
        return moved.sum(axis=1)

    return jax.lax.map(of_query, directions)


@partial(jax.jit, static_argnames=("config", "runtime"))
def _token_scores(
    params: Params,
    tokens: jax.Array,
    directions: dict[str, Any],
    *,
    config: ModelConfig,
    runtime: Runtime,
) -> jax.Array:
    flat = _flat(params)
    moving = {path: flat[path] for path in directions}

    def losses(moving: dict[str, jax.Array]) -> jax.Array:
        moved = traverse_util.unflatten_dict({**flat, **moving}, sep="/")
        return token_losses(moved, tokens, config, runtime=runtime)

    def of_query(direction: dict[str, jax.Array]) -> jax.Array:
        like = {path: value.astype(moving[path].dtype) for path, value in direction.items()}
        return jax.jvp(losses, (moving,), (like,))[1]

    return jax.lax.map(of_query, directions)
