"""Values at the model's sites, and the gradient of a metric with respect to them.

A *metric* is one number a row, made of the logits: how much likelier the right answer is than a
wrong one, the loss of a token. Rows are independent of each other in the model, and are taken to be
so in the metric; then the gradient of its sum over rows holds the gradient of every row.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.model.gptneox import AnyArray, Logits, check_tokens, forward, hidden_states
from pythia_jax.model.parameters import Params
from pythia_jax.model.quantize import check_floats
from pythia_jax.model.sites import Capture, Edits, Hooks, site_shape

Metric = Callable[[Logits, Int[Array, "batch seq"]], Float[Array, " batch"]]
Sites = tuple[str | tuple[str, tuple[int, ...]], ...]
"""What was asked for, in a form that can be a key: names, or pairs (name, layers)."""


def activations(
    params: Params,
    tokens: Int[AnyArray, "batch seq"],
    config: ModelConfig,
    sites: Capture,
    *,
    dtype: DTypeLike | None = None,
    runtime: Runtime = Runtime(),
) -> dict[str, Array]:
    """Values at sites, `{site: [layer, batch, seq, …]}` (axes: `pythia_jax.model.sites.SITES`).

    sites: names, or pairs (name, layers), of which the layers come in the order asked. dtype: to
    store them in; None is that of the computation. The logits are never formed.

    Raises ValueError for an unknown site or layer, and for tokens outside the vocabulary.
    """
    check_tokens(tokens, config)
    asked = known_sites(sites, config)
    return _activations(params, jnp.asarray(tokens), config, asked, dtype, runtime)


@partial(jax.jit, static_argnames=("config", "sites", "dtype", "runtime"))
def _activations(
    params: Params,
    tokens: jax.Array,
    config: ModelConfig,
    sites: Sites,
    dtype: DTypeLike | None,
    runtime: Runtime,
) -> dict[str, Array]:
    _, captured = hidden_states(params, tokens, config, capture=sites, runtime=runtime)
    return captured if dtype is None else {s: value.astype(dtype) for s, value in captured.items()}


def activation_gradients(
    params: Params,
    tokens: Int[AnyArray, "batch seq"],
    config: ModelConfig,
    metric: Metric,
    sites: Capture,
    *,
    runtime: Runtime = Runtime(),
) -> tuple[Float[Array, " batch"], dict[str, Array], dict[str, Array]]:
    """The metric of each row, the values at sites, and the metric's gradient there.

    metric: `(logits [batch, seq, vocab], tokens [batch, seq]) -> [batch]`, in which a row's number
    depends on that row alone. The gradient is that with respect to a zero added at the site: the
    effect of this place alone, with everything after it following. It has the shape of the value,
    and is at least float32.

    Raises ValueError for an unknown site or layer, a metric that is not one number a row, and a
    metric that is not finite, naming the row.
    """
    check_tokens(tokens, config)
    asked, held = known_sites(sites, config), as_argument(metric)
    found = _activation_gradients(params, jnp.asarray(tokens), held, config, asked, runtime)
    refuse_nan("the metric", found[0])
    return found


@partial(jax.jit, static_argnames=("config", "sites", "runtime"))
def _activation_gradients(
    params: Params,
    tokens: jax.Array,
    metric: Partial,
    config: ModelConfig,
    sites: Sites,
    runtime: Runtime,
) -> tuple[jax.Array, dict[str, Array], dict[str, Array]]:
    return differentiate(params, tokens, config, metric, sites, capture=sites, runtime=runtime)


def differentiate(
    params: Params,
    tokens: jax.Array,
    config: ModelConfig,
    metric: Metric,
    sites: Sites,
    *,
    capture: Sites = (),
    shift: jax.Array | None = None,
    edits: Edits | None = None,
    runtime: Runtime = Runtime(),
) -> tuple[jax.Array, dict[str, Array], dict[str, Array]]:
    """(metric `[batch]`, captured, gradients at `sites`), for use inside `jax.jit`.

    Of the model with its embeddings shifted by `shift`, and with `edits`. Nothing is checked but
    the metric's shape, and that the model is no int8 one (ValueError).
    """
    check_floats(params)
    batch, seq = tokens.shape
    wide = wide_dtype(params, runtime)
    layers = {site: None for site in sites if isinstance(site, str)}
    layers = {**{pair[0]: pair[1] for pair in sites if not isinstance(pair, str)}, **layers}

    def shape(site: str) -> tuple[int, ...]:
        full, chosen = site_shape(site, config, batch, seq), layers[site]
        return full if chosen is None else (len(chosen), *full[1:])

    def place(site: str, tap: jax.Array) -> jax.Array:
        chosen = layers[site]
        if chosen is None:
            return tap
        full = jnp.zeros(site_shape(site, config, batch, seq), wide)
        return full.at[np.array(chosen)].set(tap)

    def run(taps: Mapping[str, jax.Array]) -> tuple[jax.Array, tuple]:
        placed = {site: place(site, tap) for site, tap in taps.items()}
        if shift is not None:
            placed["embed"] = placed.get("embed", 0) + shift
        values, captured = measure(
            params, tokens, config, metric, capture, taps=placed, edits=edits, runtime=runtime
        )
        return values.sum(), (values, captured)

    zeros = {site: jnp.zeros(shape(site), wide) for site in layers}
    (_, (values, captured)), gradient = jax.value_and_grad(run, has_aux=True)(zeros)
    return values, captured, gradient


def measure(
    params: Params,
    tokens: jax.Array,
    config: ModelConfig,
    metric: Metric,
    capture: Sites = (),
    **hooks: Any,
) -> tuple[jax.Array, dict[str, Array]]:
    """The metric of each row, `[batch]`, and what was captured on the way."""
    if capture:
        logits, captured = forward(params, tokens, config, capture=capture, **hooks)
    else:
        logits, captured = forward(params, tokens, config, **hooks), {}
    values = jnp.asarray(metric(logits, tokens))
    if values.shape != tokens.shape[:1]:
        raise ValueError(
            f"metric: it gave shape {values.shape} for {tokens.shape[0]} rows; "
            "one number a row, [batch], is wanted"
        )
    return values, captured


def known_sites(sites: Capture, config: ModelConfig) -> Sites:
    """`sites` as a tuple that can be a key. Raises ValueError for what the model does not have."""
    asked = (sites,) if isinstance(sites, str) else tuple(sites)
    if not asked:
        raise ValueError("sites: name at least one")
    Hooks(asked, None, None, config, batch=1, seq=1)
    return tuple(
        item if isinstance(item, str) else (item[0], tuple(int(layer) for layer in item[1]))
        for item in asked
    )


def wide_dtype(params: Params, runtime: Runtime) -> jnp.dtype:
    """At least float32: that of gradients and of differences of activations."""
    stored = params["embed_in"]["embedding"].dtype if runtime.dtype is None else runtime.dtype
    return jnp.promote_types(stored, jnp.float32)


def as_argument(metric: Metric) -> Partial:
    """A metric that can be an argument of a compiled function.

    The answers inside our own metrics are then values, and others need no new program.
    """
    return metric if isinstance(metric, Partial) else Partial(metric)


def refuse_nan(what: str, values: jax.Array) -> None:
    """Raise ValueError, naming the row, if any of `values`, `[…, batch]`, is not finite.

    Inside `jax.jit`, where values are not known, and where this process has only some, it passes.
    """
    try:
        if not values.is_fully_addressable:
            return
        known = np.asarray(values)
    except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError):
        return
    bad = np.flatnonzero(~np.isfinite(known).all(axis=tuple(range(known.ndim - 1))))
    if bad.size:
        raise ValueError(
            f"{what} of row {bad[0]} is not finite: is the metric's position within the row, "
            "its answer within the vocabulary, and the model itself free of NaN?"
        )


def logit_difference(
    answer: Int[ArrayLike, "*batch"],
    wrong: Int[ArrayLike, "*batch"],
    *,
    position: Int[ArrayLike, "*batch"] = -1,
) -> Metric:
    """A metric: logit of `answer` less that of `wrong`, at a position.

    Token ids and positions: one for all rows, or one for each, `[batch]`. A position below 0 counts
    from the end.
    """
    return Partial(
        _logit_difference, _ids("answer", answer), _ids("wrong", wrong), _whole(position)
    )


def answer_log_probability(
    answer: Int[ArrayLike, "*batch"], *, position: Int[ArrayLike, "*batch"] = -1
) -> Metric:
    """A metric: log-probability, in nats, that `answer` follows a position.

    One id and one position for all rows, or one for each, `[batch]`. A position below 0 counts from
    the end.
    """
    return Partial(_answer_log_probability, _ids("answer", answer), _whole(position))


def token_loss(*, position: Int[ArrayLike, "*batch"] = -1) -> Metric:
    """A metric: cross-entropy, in nats, of the row's own token at a position, given those before.

    position: one for all rows, or one for each, `[batch]`; below 0 it counts from the end. The
    first token of a row is predicted from nothing and has no loss: position 0 gives NaN.
    """
    return Partial(_token_loss, _whole(position))


def _logit_difference(
    answer: jax.Array, wrong: jax.Array, position: jax.Array, logits: Logits, tokens: jax.Array
) -> jax.Array:
    last = _at(logits, position)
    return _pick(last, answer) - _pick(last, wrong)


def _answer_log_probability(
    answer: jax.Array, position: jax.Array, logits: Logits, tokens: jax.Array
) -> jax.Array:
    return _pick(jax.nn.log_softmax(_at(logits, position), axis=-1), answer)


def _token_loss(position: jax.Array, logits: Logits, tokens: jax.Array) -> jax.Array:
    seq = tokens.shape[1]
    position = jnp.where(position < 0, position + seq, position)
    # Nothing stands before the first token: a place past the end, which gives NaN.
    before = jnp.where((position < 1) | (position >= seq), seq, position - 1)
    place = jnp.broadcast_to(position, tokens.shape[:1])[:, None]
    label = jnp.take_along_axis(tokens, place, axis=1, mode="clip")[:, 0]
    return -_answer_log_probability(label, before, logits, tokens)


def _at(logits: Logits, position: jax.Array) -> Float[Array, "batch vocab"]:
    batch, seq = logits.shape[:2]
    position = jnp.broadcast_to(jnp.where(position < 0, position + seq, position), (batch,))
    # A position before the start is none, too.
    position = jnp.where(position < 0, seq, position)
    return jnp.take_along_axis(logits, position[:, None, None], axis=1, mode="fill")[:, 0]


def _pick(rows: Float[Array, "batch vocab"], ids: jax.Array) -> Float[Array, " batch"]:
    ids = jnp.broadcast_to(ids, rows.shape[:1])
    return jnp.take_along_axis(rows, ids[:, None], axis=1, mode="fill")[:, 0]


def _ids(name: str, given: ArrayLike) -> jax.Array:
    ids = _whole(given, name)
    try:
        known = np.asarray(ids)
    except jax.errors.TracerArrayConversionError:
        return ids
    if (known < 0).any():
        raise ValueError(f"{name}: {known.min()} is not a token id; ids start at 0")
    return ids


def _whole(given: ArrayLike, name: str = "position") -> jax.Array:
    value = jnp.asarray(given)
    if value.ndim > 1 or not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(
            f"{name}: a whole number, or one for each row, [batch], is wanted, "
            f"and not {value.dtype} of shape {value.shape}"
        )
    return value
