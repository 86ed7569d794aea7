"""Next-token cross-entropy, in chunks: the logits of a whole batch never exist.

Two forms of one function. *fused* (`fused_cross_entropy`) has a rule of its own: asked for a
derivative, the forward pass already forms the gradients of hidden states and unembedding, chunk
by chunk, and computes no logit twice. The rule is a `custom_jvp`, so forward mode, Hessian
products and vmap go through it as well. *remat* (`token_cross_entropy`) is a plain scan that
recomputes each chunk in the backward pass; it gives per-token losses, and differentiates in any
order of modes (reverse over reverse through the fused form would hold twice the logits).

On a mesh, each device sweeps over its own rows: the unembedding is gathered once before the sweep,
in the compute dtype, and its gradient reduced once after it. Left to the compiler, both would
happen in every chunk.

Losses are in nats. GPT-NeoX v1.0 (mpu/cross_entropy.py) averages over all positions; rows of the
vocabulary that only pad it belong to the softmax, as they did upstream.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from pythia_jax import sharding
from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.model import quantize
from pythia_jax.model.attention import exact
from pythia_jax.model.gptneox import AnyArray, check_rows, hidden_states
from pythia_jax.model.parameters import Params
from pythia_jax.model.sinks import Units, projected
from pythia_jax.model.sites import Edits, Taps


def loss(
    params: Params,
    tokens: Int[AnyArray, "batch seq+1"],
    config: ModelConfig,
    weights: Float[AnyArray, " batch"] | None = None,
    *,
    taps: Taps | None = None,
    edits: Edits | None = None,
    runtime: Runtime = Runtime(),
) -> Float[Array, ""]:
    """Mean next-token cross-entropy in nats, at least float32.

    weights multiply each row's summed loss; the divisor stays batch x seq whatever they are, so
    that the derivative with respect to them is the influence of a row.
    """
    hidden, kernel, labels = _inputs(params, tokens, config, taps, edits, runtime)
    batch, seq = labels.shape
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    weights = jnp.ones(batch, wide) if weights is None else jnp.asarray(weights, wide)
    if weights.shape != (batch,):
        raise ValueError(
            f"weights of shape {weights.shape}: one for each of {batch} rows is wanted"
        )
    weights = weights / (batch * seq)
    if runtime.loss == "fused":
        return fused_cross_entropy(hidden, kernel, weights, labels, runtime.loss_chunk)
    nll = token_cross_entropy(hidden, kernel, labels, runtime.loss_chunk)
    return jnp.einsum("bs,b->", nll, weights, precision=exact(nll))


def token_losses(
    params: Params,
    tokens: Int[AnyArray, "batch seq+1"],
    config: ModelConfig,
    *,
    taps: Taps | None = None,
    edits: Edits | None = None,
    runtime: Runtime = Runtime(),
) -> Float[Array, "batch seq"]:
    """Cross-entropy of each next token in nats: entry t is that of `tokens[:, t + 1]`."""
    hidden, kernel, labels = _inputs(params, tokens, config, taps, edits, runtime)
    return token_cross_entropy(hidden, kernel, labels, runtime.loss_chunk)


def _inputs(
    params: Params,
    tokens: AnyArray,
    config: ModelConfig,
    taps: Taps | None,
    edits: Edits | None,
    runtime: Runtime,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    check_rows(tokens, config)
    hidden, _ = hidden_states(
        params, tokens[:, :-1], config, taps=taps, edits=edits, runtime=runtime
    )
    hidden, kernel = quantize.in_floats(hidden, params["embed_out"]["kernel"])
    return hidden, kernel, jnp.asarray(tokens[:, 1:])


def token_cross_entropy(
    hidden: Float[Array, "batch seq hidden"],
    kernel: Float[Array, "hidden vocab"],
    labels: Int[Array, "batch seq"],
    chunk: int,
) -> Float[Array, "batch seq"]:
    """Per-token losses by a scan over chunks of positions, recomputed in the backward pass."""
    part = _Part(whole=sharding.current() is None)

    def sweep(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
        cut = _Chunks(labels.shape, chunk)
        cast = part.gather(kernel.astype(hidden.dtype))

        @jax.checkpoint
        def step(carry: None, xs: tuple) -> tuple[None, jax.Array]:
            x, y = xs
            return None, part.cross_entropy(_logits(x, cast), y)[0]

        rows = part.spread(hidden, ("tensor",))
        _, nll = jax.lax.scan(step, None, (cut.split(rows), cut.split(labels)))
        return cut.join(nll)

    axes = (_AXES["hidden"], _AXES["kernel"], _AXES["labels"])
    return sharding.by_shard(sweep, axes, _AXES["labels"])(hidden, kernel, labels)


@partial(jax.custom_jvp, nondiff_argnums=(4,))
def fused_cross_entropy(
    hidden: Float[Array, "batch seq hidden"],
    kernel: Float[Array, "hidden vocab"],
    weights: Float[Array, " batch"],
    labels: Int[Array, "batch seq"],
    chunk: int,
) -> Float[Array, ""]:
    """Sum over tokens of weight x cross-entropy; its derivative is formed with its value.

    chunk: tokens whose logits exist at once, on each device.
    """
    return _sweep(hidden, kernel, weights, labels, chunk, want=())[0]


@partial(fused_cross_entropy.defjvp, symbolic_zeros=True)
def _fused_jvp(chunk: int, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    """value, <d_hidden, hidden'> + <d_kernel, kernel'> + <nll of rows, weights'>.

    A tangent that is known to be zero (weights always, the kernel where only activations are
    differentiated) costs nothing.
    """
    names = ("hidden", "kernel", "weights")
    moving = {
        name: tangent
        for name, tangent in zip(names, tangents, strict=False)
        if not isinstance(tangent, SymbolicZero)
    }
    hidden, kernel, weights, labels = primals
    value, gradient = _sweep(hidden, kernel, weights, labels, chunk, want=tuple(moving))
    tangent = jnp.zeros_like(value)
    for name, direction in moving.items():
        # Not jnp.vdot: it would flatten, and a flattened sharded array is gathered.
        product = gradient[name].astype(value.dtype) * direction.astype(value.dtype)
        tangent = tangent + product.sum()
    return value, tangent


_AXES: dict[str, tuple[str, ...]] = {
    "hidden": ("batch", "seq", "stream"),
    "kernel": ("hidden", "vocab"),
    "weights": ("batch", "seq"),
    "labels": ("batch", "seq"),
}
"""Logical axes of the loss's arrays, and of their gradients. Weights of rows have the first alone.
"""


def _sweep(
    hidden: jax.Array,
    kernel: jax.Array,
    weights: jax.Array,
    labels: jax.Array,
    chunk: int,
    want: tuple[str, ...],
) -> tuple[jax.Array, dict[str, Any]]:
    """The weighted sum, and the gradients named in `want`, in one pass over chunks of positions."""
    part = _Part(whole=sharding.current() is None)
    sweep = partial(_sweep_part, part=part, chunk=chunk, want=want)
    own = {**_AXES, "weights": _AXES["weights"][: weights.ndim]}
    axes = tuple(own[name] for name in ("hidden", "kernel", "weights", "labels"))
    sharded = sharding.by_shard(sweep, axes, ((), {name: own[name] for name in want}))
    return sharded(hidden, kernel, weights, labels)


def _sweep_part(
    hidden: jax.Array,
    kernel: jax.Array,
    weights: jax.Array,
    labels: jax.Array,
    *,
    part: "_Part",
    chunk: int,
    want: tuple[str, ...],
) -> tuple[jax.Array, dict[str, Any]]:
    """`_sweep` over this device's rows and its part of the vocabulary."""
    cut = _Chunks(labels.shape, chunk)
    cast = part.gather(kernel.astype(hidden.dtype))
    wide = weights.dtype

    def step(kernel_gradient: Any, xs: tuple) -> tuple[Any, tuple]:
        x, y, w = xs
        logits = _logits(x, cast)
        nll, peak, total = part.cross_entropy(logits, y)
        if "hidden" not in want and "kernel" not in want:
            return kernel_gradient, (nll, None)
        if "kernel" not in want:
            return kernel_gradient, (nll, part.hidden_gradient(logits, cast, y, w, peak, total))
        d_logits = part.gradient(logits, y, w, peak, total).astype(hidden.dtype)
        d_hidden = None
        if "hidden" in want:
            d_hidden = jnp.einsum("bsv,hv->bsh", d_logits, cast, precision=exact(d_logits))
        kernel_gradient = kernel_gradient + jnp.einsum(
            "bsh,bsv->hv",
            x,
            d_logits,
            precision=exact(x),
            preferred_element_type=kernel_gradient.dtype,
        )
        return kernel_gradient, (nll, d_hidden)

    accumulator = part.spread(jnp.zeros(cast.shape, wide)) if "kernel" in want else None
    # Positions that pad the last chunk weigh nothing.
    by_row = weights.ndim == 1
    spread = jnp.broadcast_to(weights[:, None] if by_row else weights, labels.shape)
    xs = (cut.split(hidden), cut.split(labels), cut.split(spread))
    d_kernel, (nll, d_hidden) = jax.lax.scan(step, accumulator, xs)
    each = cut.join(nll).sum(axis=1) if by_row else cut.join(nll)
    gradient: dict[str, Any] = {"weights": each} if "weights" in want else {}
    if "kernel" in want:
        gradient["kernel"] = part.reduce_kernel(d_kernel)
    if "hidden" in want:
        gradient["hidden"] = part.sum_over_vocabulary(cut.join(d_hidden))
    return part.sum_over_rows((each * weights).sum()), gradient


def hidden_gradient(
    hidden: Float[Array, "batch seq hidden"],
    kernel: Float[Array, "hidden vocab"],
    weights: Float[Array, "batch seq"],
    labels: Int[Array, "batch seq"],
    chunk: int,
) -> Float[Array, "batch seq hidden"]:
    """Gradient of Σ weight x cross-entropy by the hidden states. Each position's is its own: that
    of some tokens' losses alone is this one with the other positions at zero."""
    return _sweep(hidden, kernel, weights, labels, chunk, want=("hidden",))[1]["hidden"]


def unembedding_rows(
    hidden: Float[Array, "batch seq hidden"],
    kernel: Float[Array, "hidden vocab"],
    weights: Float[Array, "batch seq"],
    labels: Int[Array, "batch seq"],
    chunk: int,
    *,
    units: Units,
    slots: Int[Array, "batch seq"] | None = None,
    projection: tuple[Float[Array, "hidden p"], Float[Array, "vocab p"]] | None = None,
    squares: bool = False,
) -> Array:
    """Gradients of the unembedding by row, or by unit within it, of Σ weight x cross-entropy.

    `[batch, (units,) hidden, vocab]`; with a projection `[batch, (units,) p, p]`, Rᵀ G L; with
    `squares` the squared norms, `[batch, (units)]`. Row after row, chunk by chunk: the gradient of
    one row (if it is not what was asked for) and the logits of one chunk exist at once, on each
    device.
    """
    part = _Part(whole=sharding.current() is None)
    unit = () if units.count is None and not units.each else ("seq",)
    made = () if squares else ("stream", "stream" if projection else "vocab")
    rows = [labels, weights, jnp.zeros_like(labels) if slots is None else slots]
    sweep = partial(_rows_part, part=part, chunk=chunk, units=units, squares=squares)
    sides = () if projection is None else projection
    axes = (_AXES["hidden"], _AXES["kernel"], (_AXES["labels"],) * 3)
    sides_axes = tuple(zip(("stream", "vocab"), ("stream",) * len(sides), strict=False))
    sharded = sharding.by_shard(
        sweep, (*axes, sides_axes[: len(sides)]), ("batch", *unit, *made), check_vma=False
    )
    return sharded(hidden, kernel, tuple(rows), tuple(sides))


def _rows_part(
    hidden: jax.Array,
    kernel: jax.Array,
    rows: tuple[jax.Array, jax.Array, jax.Array],
    sides: tuple[jax.Array, ...],
    *,
    part: "_Part",
    chunk: int,
    units: Units,
    squares: bool,
) -> jax.Array:
    """`unembedding_rows` of this device's rows and its part of the vocabulary."""
    cast = part.gather(kernel.astype(hidden.dtype))
    right, left = sides or (None, None)

    def step(xs: tuple[jax.Array, ...]) -> jax.Array:
        x, y, w, slot = xs
        logits = _logits(x, cast)
        _, peak, total = part.cross_entropy(logits, y)
        d_logits = part.gradient(logits, y, w, peak, total).astype(x.dtype)[0]
        x = x[0]
        if right is not None and left is not None:
            x, d_logits = projected(x, right), part.sum_over_vocabulary(projected(d_logits, left))
        if squares and units.each:  # of an outer product
            wide = [a.astype(w.dtype) for a in (x, d_logits)]
            return (wide[0] ** 2).sum(-1) * part.sum_over_vocabulary((wide[1] ** 2).sum(-1))
        return units.products(x, d_logits, slot[0])

    def row(given: tuple[jax.Array, ...]) -> jax.Array:
        given = tuple(a[None] for a in given)
        cut = _Chunks(given[1].shape, chunk)
        xs = tuple(cut.split(a) for a in given)
        if units.each:
            each = jax.lax.map(step, xs)
            return each.reshape(-1, *each.shape[2:])[: cut.seq]
        shape = jax.eval_shape(step, jax.tree.map(lambda a: a[0], xs))
        start = jnp.zeros(shape.shape, shape.dtype)
        total, _ = jax.lax.scan(lambda total, xs: (total + step(xs), None), start, xs)
        return part.sum_over_vocabulary((total**2).sum(axis=(-2, -1))) if squares else total

    return jax.lax.map(row, (hidden, *rows))


def _logits(x: jax.Array, kernel: jax.Array) -> jax.Array:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("bsh,hv->bsv", x, kernel, precision=exact(x), preferred_element_type=wide)


@dataclass(frozen=True)
class _Part:
    """What a device must ask of others, holding some rows and a part of the vocabulary.

    whole: there are no others, and every function here is the plain one.
    """

    whole: bool

    def gather(self, kernel: jax.Array) -> jax.Array:
        """All of the hidden axis, for this part of the vocabulary."""
        if self.whole:
            return kernel
        kernel = jax.lax.all_gather(kernel, "fsdp", axis=0, tiled=True)
        # Said here, or the sum that undoes it in the backward pass would stand inside the scan.
        return self.spread(kernel, ("slices", "data"))

    def spread(self, x: jax.Array, axes: tuple[str, ...] = sharding.AXES) -> jax.Array:
        """`x`, the same along these axes so far, as a value that may differ between devices."""
        return x if self.whole else jax.lax.pcast(x, axes, to="varying")

    def reduce_kernel(self, gradient: jax.Array) -> jax.Array:
        """The gradient summed over all rows, each device keeping its part of the hidden axis."""
        if self.whole:
            return gradient
        own = jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=0, tiled=True)
        return jax.lax.psum(own, ("slices", "data"))

    def sum_over_rows(self, x: jax.Array) -> jax.Array:
        return x if self.whole else jax.lax.psum(x, sharding.ROWS)

    def sum_over_vocabulary(self, x: jax.Array) -> jax.Array:
        return x if self.whole else jax.lax.psum(x, "tensor")

    def place(self, labels: jax.Array, logits: jax.Array) -> jax.Array:
        """Where labels stand in this part of the vocabulary; outside of it, if they do not."""
        if self.whole:
            return labels
        return labels - jax.lax.axis_index("tensor") * logits.shape[-1]

    def cross_entropy(
        self, logits: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Losses, and the peak and the sum of exponentials they were computed with."""
        peak = jax.lax.stop_gradient(logits.max(axis=-1))
        peak = peak if self.whole else jax.lax.pmax(peak, "tensor")
        total = self.sum_over_vocabulary(jnp.exp(logits - peak[..., None]).sum(axis=-1))
        return peak + jnp.log(total) - self._chosen(logits, labels), peak, total

    def gradient(
        self,
        logits: jax.Array,
        labels: jax.Array,
        weights: jax.Array,
        peak: jax.Array,
        total: jax.Array,
    ) -> jax.Array:
        """Gradient of weight x loss by the logits; peak and total are `cross_entropy`'s."""
        share = jnp.exp(logits - peak[..., None]) * (weights / total)[..., None]
        place = self.place(labels, logits)
        hit = jax.nn.one_hot(place, logits.shape[-1], dtype=weights.dtype) * weights[..., None]
        return share - hit

    def hidden_gradient(
        self,
        logits: jax.Array,
        kernel: jax.Array,
        labels: jax.Array,
        weights: jax.Array,
        peak: jax.Array,
        total: jax.Array,
    ) -> jax.Array:
        """Gradient of weight x loss by the hidden states, in their dtype, of this part of the
        vocabulary: the kernel's columns as the softmax weighs them, less the label's own. No
        gradient of the logits is written out."""
        share = jnp.exp(logits - peak[..., None]).astype(kernel.dtype)
        expected = jnp.einsum(
            "bsv,hv->bsh", share, kernel, precision=exact(share), preferred_element_type=total.dtype
        )
        place = self.place(labels, logits)
        inside = place if self.whole else jnp.clip(place, 0, logits.shape[-1] - 1)
        own = jnp.moveaxis(jnp.take(kernel, inside, axis=1), 0, -1).astype(total.dtype)
        own = jnp.where((inside == place)[..., None], own, 0)
        return ((expected / total[..., None] - own) * weights[..., None]).astype(kernel.dtype)

    def _chosen(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        place = self.place(labels, logits)
        last = logits.shape[-1] - 1
        inside = place if self.whole else jnp.clip(place, 0, last)
        chosen = jnp.take_along_axis(logits, inside[..., None], axis=-1)[..., 0]
        return (
            chosen
            if self.whole
            else self.sum_over_vocabulary(jnp.where(inside == place, chosen, 0))
        )


class _Chunks:
    """Cuts `[batch, seq, …]` along the sequence into equal chunks, padding the last with zeros.

    Along the sequence and not the batch, so that a sharded batch stays where it is.
    """

    def __init__(self, shape: tuple[int, ...], tokens: int) -> None:
        batch, self.seq = shape
        self.count = max(1, -(-self.seq * batch // tokens))
        self.count = min(self.count, self.seq)
        self.length = -(-self.seq // self.count)
        self.count = -(-self.seq // self.length)

    def split(self, x: jax.Array) -> jax.Array:
        """`[batch, seq, …]` to `[chunk, batch, length, …]`."""
        padding = self.count * self.length - self.seq
        x = jnp.pad(x, [(0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(x.shape[0], self.count, self.length, *x.shape[2:]), 1, 0)

    def join(self, x: jax.Array) -> jax.Array:
        """The way back, without the padding."""
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : self.seq]
