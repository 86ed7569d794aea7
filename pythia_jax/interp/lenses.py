"""What the model would say after each layer: the residual stream, read by the model's own head.

The *logit lens* (nostalgebraist, 2020) sends the stream before layer l through the final LayerNorm
and the unembedding. The *tuned lens* (Belrose et al., 2023, arXiv 2303.08112) first translates it
by an affine map of that layer, fitted by `pythia_jax.interp.tuned_lens`.

Lenses are counted 0 to L, the number of layers: lens l reads the stream before layer l, lens 0 the
embeddings, and lens L what the last layer leaves: the model's own logits.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from pythia_jax import sharding
from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.model import quantize
from pythia_jax.model.attention import exact
from pythia_jax.model.gptneox import (
    AnyArray,
    check_rows,
    check_tokens,
    hidden_states,
    layer_norm,
    unembed,
)
from pythia_jax.model.parameters import Params


class TunedLens(NamedTuple):
    """Translators of each layer: the stream h before it becomes h + h @ kernel + bias.

    All zero, it is the logit lens. The last lens, the model's own logits, has no translator.
    """

    kernel: Float[AnyArray, "layers hidden hidden"]
    bias: Float[AnyArray, "layers hidden"]


class LensLosses(NamedTuple):
    """How each lens does on each row, as means over its tokens.

    loss: cross-entropy of the next token, in nats. kl: KL(model ‖ lens), in nats. agreement: the
    share of tokens at which the likeliest one is the model's.
    """

    loss: Float[Array, "lens batch"]
    kl: Float[Array, "lens batch"]
    agreement: Float[Array, "lens batch"]

    def bits_per_byte(
        self, seq: int, text_bytes: Int[ArrayLike, " batch"]
    ) -> Float[np.ndarray, " lens"]:
        """The loss over all rows, in bits a byte of text.

        seq: losses a row. text_bytes: UTF-8 bytes of the tokens that are predicted, of each row.
        """
        nats = np.asarray(self.loss, np.float64).sum(axis=1) * seq
        return nats / math.log(2) / np.sum(np.asarray(text_bytes))


@overload
def logit_lens(
    params: Params,
    tokens: Int[AnyArray, "batch seq"],
    config: ModelConfig,
    *,
    layers: Sequence[int] | None = None,
    top: None = None,
    runtime: Runtime = Runtime(),
) -> Float[Array, "lens batch seq vocab"]: ...
@overload
def logit_lens(
    params: Params,
    tokens: Int[AnyArray, "batch seq"],
    config: ModelConfig,
    *,
    layers: Sequence[int] | None = None,
    top: int,
    runtime: Runtime = Runtime(),
) -> tuple[Int[Array, "lens batch seq top"], Float[Array, "lens batch seq top"]]: ...
def logit_lens(
    params: Params,
    tokens: Int[AnyArray, "batch seq"],
    config: ModelConfig,
    *,
    layers: Sequence[int] | None = None,
    top: int | None = None,
    runtime: Runtime = Runtime(),
) -> Array | tuple[Array, Array]:
    """Logits after each layer, `[lens, batch, seq, vocab]`, at least float32.

    layers: lenses, 0 to the number of layers, in the order wanted; None is all. top: instead of
    logits, the ids and the log-probabilities (nats) of so many likeliest tokens, the likeliest
    first; then logits of `runtime.loss_chunk` tokens exist at once, on each device.

    Raises ValueError for a lens that the model does not have, for tokens outside the vocabulary,
    and for a stream that is not finite, naming the row.
    """
    return read(params, tokens, config, None, layers, top, runtime)


def lens_losses(
    params: Params,
    tokens: Int[AnyArray, "batch seq+1"],
    config: ModelConfig,
    *,
    lens: TunedLens | None = None,
    layers: Sequence[int] | None = None,
    runtime: Runtime = Runtime(),
) -> LensLosses:
    """Loss, divergence from the model's own logits, and agreement with them, of each lens and row.

    lens: a tuned lens; None is the logit lens. layers: as in `logit_lens`.

    Raises ValueError as `logit_lens` does, and for a tuned lens of another shape of model.
    """
    check_rows(tokens, config)
    chosen = _chosen(layers, config)
    check_lens(lens, config)
    found, sound = _losses(params, jnp.asarray(tokens), config, lens, chosen, runtime)
    _refuse_unsound(sound)
    return found


def read(
    params: Params,
    tokens: AnyArray,
    config: ModelConfig,
    lens: TunedLens | None,
    layers: Sequence[int] | None,
    top: int | None,
    runtime: Runtime,
) -> Any:
    """`logit_lens`, through translators if there are any."""
    check_tokens(tokens, config)
    chosen = _chosen(layers, config)
    check_lens(lens, config)
    if top is not None and not 1 <= top <= config.vocab_size:
        raise ValueError(f"top {top}: from 1 to {config.vocab_size} tokens, the vocabulary")
    found, sound = _read(params, jnp.asarray(tokens), config, lens, chosen, top, runtime)
    _refuse_unsound(sound)
    return found


@partial(jax.jit, static_argnames=("config", "layers", "top", "runtime"))
def _read(
    params: Params,
    tokens: jax.Array,
    config: ModelConfig,
    lens: TunedLens | None,
    layers: tuple[int, ...],
    top: int | None,
    runtime: Runtime,
) -> tuple[Any, jax.Array]:
    hidden, _ = _normed(params, tokens, config, lens, layers, runtime)
    sound = _sound(hidden)
    if top is None:
        return unembed(params, hidden), sound
    whole, cut = gathered(params), Chunks(tokens.shape, runtime.loss_chunk)

    def likeliest(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, ids = jax.lax.top_k(log_probabilities(whole, x), top)
        return ids, values

    found = jax.lax.map(lambda x: jax.lax.map(likeliest, x), cut.split(hidden))
    return jax.tree.map(cut.join, found), sound


@partial(jax.jit, static_argnames=("config", "layers", "runtime"))
def _losses(
    params: Params,
    tokens: jax.Array,
    config: ModelConfig,
    lens: TunedLens | None,
    layers: tuple[int, ...],
    runtime: Runtime,
) -> tuple[LensLosses, jax.Array]:
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    hidden, final = _normed(params, inputs, config, lens, layers, runtime)
    whole, cut = gathered(params), Chunks(labels.shape, runtime.loss_chunk)

    def chunk(given: tuple[jax.Array, ...]) -> LensLosses:
        x, last, y = given
        own = log_probabilities(whole, last[0])

        def each(x: jax.Array) -> LensLosses:
            said = log_probabilities(whole, x)
            picked = jnp.take_along_axis(said, y[0][..., None], axis=-1)[..., 0]
            agree = said.argmax(axis=-1) == own.argmax(axis=-1)
            return LensLosses(-picked, divergence(own, said), agree.astype(said.dtype))

        return jax.lax.map(each, x)

    xs = cut.split(hidden), cut.split(final[None]), cut.split(labels[None])
    found = jax.tree.map(cut.join, jax.lax.map(chunk, xs))
    return LensLosses(*(x.mean(axis=2) for x in found)), _sound(hidden)


def _normed(
    params: Params,
    tokens: jax.Array,
    config: ModelConfig,
    lens: TunedLens | None,
    layers: tuple[int, ...],
    runtime: Runtime,
) -> tuple[Float[Array, "lens batch seq hidden"], Float[Array, "batch seq hidden"]]:
    """What the unembedding reads at each lens, and at the last one."""
    last = config.num_hidden_layers
    inner = tuple(layer for layer in layers if layer < last)
    final, streams = streams_of(params, tokens, config, inner, runtime)
    if lens is not None and inner:
        chosen = TunedLens(*(x[np.array(inner)] for x in lens))
        streams = translate(chosen, streams)
    read = layer_norm(streams, params["final_layer_norm"], config.layer_norm_eps)
    everything = jnp.concatenate([read.astype(final.dtype), final[None]])
    places = [inner.index(layer) if layer < last else len(inner) for layer in layers]
    if places != list(range(len(inner) + 1)):
        everything = everything[np.array(places)]
    return sharding.constrain(everything, ("layers", "batch", "seq", "stream")), final


def streams_of(
    params: Params,
    tokens: jax.Array,
    config: ModelConfig,
    layers: tuple[int, ...],
    runtime: Runtime,
) -> tuple[Float[Array, "batch seq hidden"], Float[Array, "layer batch seq hidden"]]:
    """The final LayerNorm's output, and the stream before each of some layers."""
    everything = layers == tuple(range(config.num_hidden_layers))
    capture = ("resid_pre",) if everything else (("resid_pre", layers),) if layers else ()
    final, captured = hidden_states(params, tokens, config, capture=capture, runtime=runtime)
    if not layers:
        return final, jnp.zeros((0, *final.shape), final.dtype)
    axes = ("layers", "batch", "seq", "stream")
    return final, sharding.constrain(captured["resid_pre"], axes)


def translate(
    lens: TunedLens, streams: Float[Array, "layers batch seq hidden"]
) -> Float[Array, "layers batch seq hidden"]:
    """The streams as the final LayerNorm takes them, at least float32."""
    kernel = sharding.constrain(jnp.asarray(lens.kernel), ("layers", "stream", "stream"))
    wide = streams.astype(jnp.promote_types(streams.dtype, kernel.dtype))
    moved = jnp.einsum("lbsh,lhk->lbsk", wide, kernel, precision=exact(wide))
    return wide + moved + lens.bias[:, None, None]


def gathered(params: Params) -> Params:
    """The unembedding with its hidden axis whole: once, and not in every chunk."""
    kernel = params["embed_out"]["kernel"]
    if isinstance(kernel, quantize.Quantized):
        kernel = quantize.whole_rows(kernel)
    else:
        kernel = sharding.constrain(kernel, ("stream", "vocab"))
    return {"embed_out": {"kernel": kernel}}


def log_probabilities(
    params: Params, hidden: Float[Array, "batch seq hidden"]
) -> Float[Array, "batch seq vocab"]:
    logits = sharding.constrain(unembed(params, hidden), ("batch", "seq", "vocab"))
    return jax.nn.log_softmax(logits, axis=-1)


def divergence(
    model: Float[Array, "batch seq vocab"], lens: Float[Array, "batch seq vocab"]
) -> Float[Array, "batch seq"]:
    """KL(model ‖ lens) of log-probabilities, in nats."""
    return (jnp.exp(model) * (model - lens)).sum(axis=-1)


class Chunks:
    """Cuts `[n, batch, seq, …]` along the sequence into equal chunks, the last filled with zeros.

    tokens: of a chunk, on each device. Along the sequence, so that a sharded batch stays where it
    is.
    """

    def __init__(self, shape: tuple[int, ...], tokens: int) -> None:
        batch, seq = shape
        self._seq = seq
        parts = sharding.parts_of_rows()
        wanted = min(seq, max(1, math.ceil(seq * batch / parts / tokens)))
        self._length = math.ceil(seq / wanted)
        self._count = math.ceil(seq / self._length)

    def split(self, x: jax.Array) -> jax.Array:
        """`[n, batch, seq, …]` to `[chunk, n, batch, length, …]`."""
        padding = self._count * self._length - self._seq
        x = jnp.pad(x, [(0, 0), (0, 0), (0, padding), *[(0, 0)] * (x.ndim - 3)])
        return jnp.moveaxis(x.reshape(*x.shape[:2], self._count, self._length, *x.shape[3:]), 2, 0)

    def join(self, x: jax.Array) -> jax.Array:
        """The way back, without what was filled in."""
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, : self._seq]


def _chosen(layers: Sequence[int] | None, config: ModelConfig) -> tuple[int, ...]:
    last = config.num_hidden_layers
    if layers is None:
        return tuple(range(last + 1))
    chosen = tuple(int(layer) for layer in layers)
    wrong = [layer for layer in chosen if not 0 <= layer <= last]
    if wrong or not chosen or len(set(chosen)) < len(chosen):
        told = f"there is no lens {wrong[0]}" if wrong else "name each lens once, and at least one"
        raise ValueError(f"layers: {told}; lenses are 0 to {last}, which is the model's own logits")
    return chosen


def check_lens(lens: TunedLens | None, config: ModelConfig) -> None:
    """Refuse a tuned lens of another shape of model."""
    if lens is None:
        return
    layers, hidden = config.num_hidden_layers, config.hidden_size
    wanted = (layers, hidden, hidden), (layers, hidden)
    if (lens.kernel.shape, lens.bias.shape) != wanted:
        raise ValueError(
            f"the tuned lens has a kernel of {lens.kernel.shape} and a bias of {lens.bias.shape}; "
            f"this model has {layers} layers of {hidden}, and wants {wanted[0]} and {wanted[1]}"
        )


def _sound(hidden: Float[Array, "lens batch seq hidden"]) -> Bool[Array, " batch"]:
    return jnp.isfinite(hidden).all(axis=(0, 2, 3))


def _refuse_unsound(sound: Bool[Array, " batch"]) -> None:
    """Raise ValueError naming the first row that is not sound; inside `jax.jit` it passes."""
    try:
        if not sound.is_fully_addressable:
            return
        bad = np.flatnonzero(~np.asarray(sound))
    except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError):
        return
    if bad.size:
        raise ValueError(
            f"row {bad[0]}: what a lens reads there is not finite; are the model, and the tuned "
            "lens, free of NaN?"
        )
