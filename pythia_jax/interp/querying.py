"""Which rows of an index a passage's gradient is most like: a scan over all of it.

The score of a row is the dot product of its gradient with the query's, or their cosine. Of the
query's loss −η · dot is the first-order change by one step of gradient descent on that row (TracIn;
Pruthi et al., 2020), in nats, if the index is not projected; projected, it is so in expectation.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Float, Int
from numpy.typing import NDArray
from tqdm import tqdm

from pythia_jax import sharding
from pythia_jax.bridge import Model
from pythia_jax.bridge.revisions import at_step, load_at, weights_hash
from pythia_jax.configs import MeshConfig, ModelConfig, RunConfig, Runtime
from pythia_jax.interp.chunks import projection_sides, row_gradients
from pythia_jax.interp.collecting import LINEAR
from pythia_jax.interp.factors import Factors
from pythia_jax.interp.factors import about as about_factors
from pythia_jax.interp.factors import load as load_factors
from pythia_jax.interp.gradients import per_example_gradients
from pythia_jax.interp.index import Index, described, open_index
from pythia_jax.interp.passages import Passages, saved_tokenizer
from pythia_jax.interp.preconditioning import precondition
from pythia_jax.model.attention import exact
from pythia_jax.model.gptneox import check_tokens
from pythia_jax.model.parameters import Params

log = logging.getLogger(__name__)

Metric = Literal["dot", "cosine"]
BLOCK_BYTES = 2**26
"""Of the index that is in memory at once, as float32."""


@dataclass(frozen=True, eq=False)
class Hits:
    """The rows that scored highest, the best first.

    scores: float32 `[n]`. numbers: rows of the index, `[n]`. rows: which tokens they are of, `ROW`
    `[n]`. documents: of each row, the numbers of all its documents, where the data can be read.
    texts: the passages; empty where they cannot be read. data: `Index.data`, by which the rows are
    known to be of the same data again.
    """

    scores: NDArray[np.float32]
    numbers: NDArray[np.int64]
    rows: NDArray[Any]
    documents: list[list[int]]
    texts: list[str]
    data: str

    def __len__(self) -> int:
        return len(self.numbers)

    def described(self, place: int) -> str:
        """Which row stands at a place, in words."""
        return described(self.rows[place], self.documents[place])

    def columns(self) -> dict[str, Any]:
        """As a table: score, row, step, slot and so on, data, text."""
        named = {name: self.rows[name] for name in self.rows.dtype.names or ()}
        texts = {"text": self.texts} if self.texts else {}
        data = [self.data] * len(self)
        return {"score": self.scores, "row": self.numbers, **named, "data": data, **texts}


def query(
    index: Index | str | os.PathLike[str],
    text: str | None = None,
    *,
    completion: str | None = None,
    tokens: Int[NDArray, " length"] | None = None,
    answer_at: int = 1,
    model: Model | None = None,
    metric: Metric = "dot",
    factors: str | os.PathLike[str] | None = None,
    damping: float | None = None,
    top: int = 50,
    data: RunConfig | None = None,
    runtime: Runtime = Runtime(),
    show_progress: bool = False,
) -> Hits:
    """The rows of an index whose gradients are most like that of the loss of a text.

    completion: what follows the text; then the loss is of these tokens alone. It is encoded apart,
    so it begins with its own space. tokens: the query in place of a text, and answer_at its first
    token whose loss counts. model: the one that the index was built with; None loads it again.
    factors: a folder of `pythia_jax.interp.factors`, by which the query's gradient is
    preconditioned, with `damping`. data: the run, where its data has moved.

    The query's loss is summed, in nats; nothing is put before its first token.

    Raises ValueError for a model of other weights, and for arguments that do not go together; as
    `open_index` and `load` do.
    """
    index = index if isinstance(index, Index) else open_index(index)
    if metric not in ("dot", "cosine"):
        raise ValueError(f"metric {metric!r}: choose dot or cosine")
    if top < 1:
        raise ValueError(f"top {top}: must be at least 1")
    if damping is not None and factors is None:
        raise ValueError("damping goes with factors (--damping, --factors)")
    if (text is None) == (tokens is None):
        raise ValueError("give the query as a text or as tokens, and not both")
    if tokens is None:
        assert text is not None
        tokens, answer_at = encoded(index, text, completion)
    elif completion is not None:
        raise ValueError("a completion goes with a text; tokens have answer_at")
    tokens = _checked(tokens, answer_at, index.model_config)
    if factors is not None:
        _check_factors(index, factors)
    model = recorded_model(index) if model is None else model
    check_model(index, model)
    if factors is None:
        gradient = query_gradient(index, model, tokens, answer_at, runtime=runtime)
    else:
        gradient = preconditioned_gradient(
            index, model, tokens, answer_at, factors=factors, damping=damping, runtime=runtime
        )
    scores, numbers = search(index, gradient, metric, top, show_progress=show_progress)
    passages = Passages(index, data=data, needed=False)
    texts = [passages.text(int(n)) for n in numbers] if passages.readable else []
    documents = [passages.documents(int(n)) for n in numbers]
    return Hits(scores, numbers, np.array(index.rows[numbers]), documents, texts, index.data)


def query_of(
    index: str | os.PathLike[str],
    text: str,
    *,
    model: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    step: int | None = None,
    fsdp: int = 1,
    tensor: int = 1,
    factors: str | os.PathLike[str] | None = None,
    **how: Any,
) -> Hits:
    """`query` with a checkpoint of any kind as the model (`pj.load`), over all devices there are.

    model: None is the one that the index was built with. fsdp, tensor: devices that the weights are
    cut over, for a model that does not fit one. how: other arguments of `query`.

    Raises as both do, and ConfigError for a model that cannot be cut so.
    """
    opened = open_index(index)
    if factors is not None:
        _check_factors(opened, factors)  # before a model is loaded
    mesh = sharding.make_mesh(MeshConfig(data=-1, fsdp=fsdp, tensor=tensor))
    dtype = opened.settings["computed_in"]
    with jax.set_mesh(mesh):
        sharding.check_fit(mesh, opened.model_config, sharding.parts_of_rows())
        given = None
        if model is not None:
            given = load_at(model, revision=revision, step=step, dtype=dtype)
        return query(opened, text, model=given, factors=factors, **how)


def query_gradient(
    index: Index,
    model: Model,
    tokens: Int[NDArray, " length"],
    answer_at: int = 1,
    *,
    runtime: Runtime = Runtime(),
) -> Float[NDArray, " numbers"]:
    """The gradient of a passage's loss as a row of the index would hold it, float32.

    Raises ValueError for tokens that do not fit, and where it is zero or not finite.
    """
    tokens = _checked(tokens, answer_at, model.config)
    weights = np.arange(1, len(tokens)) >= answer_at
    found = row_gradients(
        model.params,
        projection_sides(index.projection, model.config),
        jnp.asarray(_whole_batch(tokens)),
        jnp.asarray(_whole_batch(weights), jnp.float32),
        config=model.config,
        runtime=runtime,
    )
    return _nonzero(np.asarray(found, np.float32)[0])


def preconditioned_gradient(
    index: Index,
    model: Model,
    tokens: Int[NDArray, " length"],
    answer_at: int = 1,
    *,
    factors: str | os.PathLike[str],
    damping: float | None = None,
    runtime: Runtime = Runtime(),
) -> Float[NDArray, " numbers"]:
    """`query_gradient`, preconditioned: whole, and then projected as the index is.

    Of factors fitted in a projection (autocorrelation), in that one, which must be the index's.

    Raises ValueError for factors that do not fit the index.
    """
    fitted = load_factors(os.fspath(factors))
    missing = [f"{m}/kernel" for m in LINEAR if f"{m}/kernel" not in fitted.parameters]
    if missing:
        raise ValueError(f"{factors}: these factors are not of {missing[0]}, which the index holds")
    if fitted.projection is not None:
        if fitted.projection != index.projection:
            raise ValueError(
                f"{factors}: fitted in {fitted.projection}, and the index in {index.projection}; "
                "fit them in the index's"
            )
        row = query_gradient(index, model, tokens, answer_at, runtime=runtime)
        tree = {m: {"kernel": block[None]} for m, block in as_modules(index, row).items()}
        made = precondition(fitted, traverse_util.unflatten_dict(tree, sep="/"), damping)
        return _nonzero(from_modules(index, {m: _kernel(made, m)[0] for m in LINEAR}))
    tokens = _checked(tokens, answer_at, model.config)
    return _nonzero(_preconditioned(index, model, fitted, tokens, answer_at, damping, runtime))


def _check_factors(index: Index, folder: str | os.PathLike[str]) -> None:
    """Curvature at other weights says nothing of these gradients."""
    saved = about_factors(os.fspath(folder))["provenance"]
    if "weights" not in saved:
        log.warning("%s: does not tell which weights its factors are of", folder)
        return
    if saved["weights"] == index.settings["weights"]:
        return
    at, ours = f"({at_step(saved['source'], saved['step'])})", index.settings["computed_in"]
    if saved["dtype"] != ours:  # of one checkpoint or not: the hashes are of rounded weights
        raise ValueError(
            f"{folder}: factors of weights in {saved['dtype']} {at}, and the index's gradients "
            f"are of weights in {ours}: give both the same --dtype"
        )
    raise ValueError(
        f"{folder}: factors of other weights {at} than the index's gradients; fit them at the "
        "index's checkpoint"
    )


def _preconditioned(
    index: Index,
    model: Model,
    fitted: Factors,
    tokens: NDArray[np.int32],
    answer_at: int,
    damping: float | None,
    runtime: Runtime,
) -> NDArray[np.float32]:
    """The whole gradient, preconditioned, and then projected."""
    wanted = [path for path in fitted.parameters if path.rpartition("/")[0] in LINEAR]
    raw = per_example_gradients(
        model.params,
        _whole_batch(tokens),
        model.config,
        unit="document",
        documents=_whole_batch(np.where(np.arange(len(tokens)) >= answer_at, 0, -1)),
        parameters=wanted,
        runtime=runtime,
    )
    made = precondition(fitted, raw, damping)
    sides = projection_sides(index.projection, model.config)
    found = {}
    for module in LINEAR:
        kernel = _kernel(made, module)[0, 0].swapaxes(-1, -2)
        if sides is not None:
            left, right = sides[module]["left"], sides[module]["right"]
            kernel = jnp.einsum("lop,loi,liq->lpq", left, kernel, right, precision=exact(kernel))
        found[module] = np.asarray(kernel)
    return from_modules(index, found)


def _kernel(tree: Params, module: str) -> jax.Array:
    return jnp.asarray(traverse_util.flatten_dict(tree, sep="/")[f"{module}/kernel"])


def _checked(tokens: Any, answer_at: int, config: ModelConfig) -> NDArray[np.int32]:
    tokens = np.asarray(tokens)
    longest = config.max_position_embeddings + 1
    if tokens.ndim != 1:
        raise ValueError(
            f"tokens of shape {tokens.shape}: those of one query, [length], are wanted"
        )
    if len(tokens) < 2:
        raise ValueError(
            "the query is too short: its loss is of tokens that have one before them, so at least "
            f"two are wanted, and not {len(tokens)}"
        )
    if len(tokens) > longest:
        raise ValueError(f"the query is too long: {len(tokens)} tokens; up to {longest} fit")
    if not 1 <= answer_at < len(tokens):
        raise ValueError(
            f"answer_at {answer_at}: from 1, since nothing comes before token 0, to "
            f"{len(tokens) - 1}"
        )
    check_tokens(tokens[None], config)
    return tokens.astype(np.int32)


def _whole_batch(values: NDArray[Any]) -> NDArray[Any]:
    """The query once for each part that a mesh cuts rows into."""
    return np.repeat(values[None], sharding.parts_of_rows(), axis=0)


def _nonzero(gradient: NDArray[np.float32]) -> NDArray[np.float32]:
    if not np.isfinite(gradient).all() or not gradient.any():
        raise ValueError("the query's gradient is zero or not finite, so it is like no row's")
    return gradient


def search(
    index: Index,
    gradient: Float[NDArray, " numbers"],
    metric: Metric = "dot",
    top: int = 50,
    *,
    show_progress: bool = False,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The `top` highest scores, best first, and their rows; ties by row.

    The index is read once, `BLOCK_BYTES` of it in memory at a time.
    """
    gradient = np.asarray(gradient, np.float32)
    if gradient.shape != index.gradients.shape[1:]:
        raise ValueError(
            f"a gradient of shape {gradient.shape}: {index.gradients.shape[1:]} is a row's"
        )
    if metric == "cosine":
        gradient = gradient / np.linalg.norm(gradient)
    block = max(1, BLOCK_BYTES // (4 * len(gradient)))
    best_scores, best = np.zeros(0, np.float32), np.zeros(0, np.int64)
    with tqdm(total=len(index), unit=" rows", desc="query", disable=not show_progress) as bar:
        for start in range(0, len(index), block):
            part = np.asarray(index.gradients[start : start + block], np.float32)
            scores = part @ gradient
            if metric == "cosine":
                norms = np.sqrt(np.einsum("ij,ij->i", part, part))
                scores = np.divide(scores, norms, out=np.zeros_like(scores), where=norms > 0)
            bad = np.flatnonzero(~np.isfinite(scores))
            if bad.size:
                row = start + int(bad[0])
                raise ValueError(
                    f"{index.folder}: the score of row {row} ({index.name_of(row)}) is not finite; "
                    "check the index: pythia-jax gradients export"
                )
            best_scores = np.concatenate([best_scores, scores])
            best = np.concatenate([best, np.arange(start, start + len(part))])
            kept = np.lexsort((best, -best_scores))[:top]
            best_scores, best = best_scores[kept], best[kept]
            bar.update(len(part))
    return best_scores, best


def recorded_model(index: Index) -> Model:
    """The model that an index was built with, loaded again on the mesh around us.

    Raises ValueError where its provenance does not say from where.
    """
    opened = index.provenance["computed"]["opened"]
    if opened is None:
        raise ValueError(
            f"{index.folder}: was built from a model in memory ({_source(index)}), which cannot "
            "be found again: give it as model (--model)"
        )
    return load_at(
        opened["path_or_id"],
        revision=opened["revision"],
        step=opened["step"],
        dtype=opened["dtype"],
    )


def check_model(index: Index, model: Model) -> None:
    """Refuse a model that an index was not built with. Raises ValueError with what differs."""
    settings = index.settings
    ours = {"weights": weights_hash(model.params)}
    ours |= {"step": model.step, "computed_in": jax.tree.leaves(model.params)[0].dtype.name}
    if model.config == index.model_config and ours["weights"] == settings["weights"]:
        return
    told = [
        f"{key} {settings[key]!r} there, {value!r} here"
        for key, value in ours.items()
        if settings[key] != value
    ]
    if model.config != index.model_config:
        told.append("and another architecture")
    raise ValueError(
        f"{index.folder} was built with {_source(index)}, and {model.source or 'this model'} has "
        f"other weights: {', '.join(told)}. Gradients at different weights do not compare"
    )


def as_modules(index: Index, row: Float[NDArray, " numbers"]) -> dict[str, NDArray[np.float32]]:
    """A row as {module of the layers: `[layers, p, p]` or `[layers, out, in]`}."""
    stacked: dict[str, list[NDArray[np.float32]]] = {}
    for name, columns in index.modules.items():
        block = row[columns].reshape(index.shapes[name])
        stacked.setdefault(_layers_and_module(name)[1], []).append(block)
    return {module: np.stack(blocks) for module, blocks in stacked.items()}


def from_modules(index: Index, modules: Mapping[str, Any]) -> Float[NDArray, " numbers"]:
    """The other way round."""
    row = np.empty(index.gradients.shape[1], np.float32)
    for name, columns in index.modules.items():
        layer, module = _layers_and_module(name)
        row[columns] = np.asarray(modules[module][layer]).ravel()
    return row


def _layers_and_module(name: str) -> tuple[int, str]:
    """(3, layers/mlp/dense_4h_to_h) of layers.3.mlp.dense_4h_to_h."""
    _, layer, module = name.split(".", 2)
    return int(layer), f"layers/{module.replace('.', '/')}"


def encoded(index: Index, text: str, completion: str | None) -> tuple[NDArray[np.int32], int]:
    """A query's tokens, and the first whose loss counts."""
    tokenizer = saved_tokenizer(index)
    if tokenizer is None:
        raise ValueError(
            f"{index.folder}: neither the model nor the run came with a tokenizer; give tokens"
        )
    context = tokenizer.encode(text).ids
    if completion is None:
        return np.array(context, np.int32), 1
    answer = tokenizer.encode(completion).ids
    if not (context and answer):
        raise ValueError("a completion needs a text before it, and at least one token of its own")
    return np.array([*context, *answer], np.int32), len(context)


def _source(index: Index) -> str:
    source = index.provenance["computed"]["source"] or "a model in memory"
    return at_step(source, index.settings["step"])
