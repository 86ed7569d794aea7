"""The tuned lens: an affine translator for each layer, so that the model's own head can read it.

Belrose et al., 2023 (arXiv 2303.08112). Each translator minimises KL(model ‖ lens), the mean over
tokens, from an identity on, by the paper's optimizer: SGD with Nesterov's momentum 0.9, gradients
clipped to norm 1, weight decay 1e-3 towards the identity, and a rate that falls linearly to 0. The
rate is multiplied by 1 - momentum, as in the package `tuned-lens`. Here each layer's gradient is
clipped by itself, so that no layer depends on which others are fitted beside it. Nothing is random.

`save` writes a safetensors file; `load` also reads the folders of the package `tuned-lens`.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from numpy.typing import NDArray
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pythia_jax import sharding
from pythia_jax.bridge.torch_files import TorchTensor, open_torch
from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.interp import lenses, preflight, tensor_files, training_rows
from pythia_jax.interp.lenses import Chunks, TunedLens
from pythia_jax.model.gptneox import AnyArray, check_tokens, layer_norm
from pythia_jax.model.parameters import Params
from pythia_jax.model.quantize import check_floats

MOMENTUM = 0.9
WEIGHT_DECAY = 1e-3
CLIP = 1.0
KIND = "pythia_jax tuned lens"
_AXES = ("layers", "hidden", "stream"), ("layers", "stream")
"""Logical axes of kernel and bias."""


def identity(config: ModelConfig) -> TunedLens:
    """Translators that change nothing: the logit lens."""
    layers, hidden = config.num_hidden_layers, config.hidden_size
    return TunedLens(jnp.zeros((layers, hidden, hidden)), jnp.zeros((layers, hidden)))


def fit(
    params: Params,
    batches: Iterable[Int[AnyArray, "batch seq"]],
    config: ModelConfig,
    *,
    steps: int | None = None,
    learning_rate: float = 1.0,
    start: TunedLens | None = None,
    rows: int | None = None,
    show_progress: bool = True,
    runtime: Runtime = Runtime(),
) -> TunedLens:
    """A tuned lens for every layer, one update a batch.

    batches: all of one shape; they are taken one at a time, so that they may be a generator. The
    paper's are 250 of 2¹⁸ tokens. steps: how many; None is their number, if they have one.
    learning_rate: of the first update. start: where to begin; None is the identity. rows:
    of a batch, computed together; None goes by tokens.

    Raises ValueError for a batch that does not fit, for fewer of them than `steps`, and for a
    divergence that is not finite, naming the update, the row and the layer; MemoryError with the
    numbers, before the first update, for rows that do not fit.
    """
    steps = _count(batches) if steps is None else steps
    if steps < 1 or not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ValueError(f"steps {steps}, learning_rate {learning_rate}: both must be above 0")
    lenses.check_lens(start, config)
    # The caller's own stays his: updates take the place of what they are given.
    begun = identity(config) if start is None else jax.tree.map(jnp.array, start)
    lens, state = _begin(begun)
    shape: tuple[int, ...] = ()
    made = 0
    with (
        logging_redirect_tqdm(),
        tqdm(total=steps, unit=" updates", desc="tuned lens", disable=not show_progress) as bar,
    ):
        for made, tokens in zip(range(1, steps + 1), batches, strict=False):
            check_tokens(tokens, config)
            if tokens.shape != (shape or tokens.shape):
                raise ValueError(f"batch {made - 1} is of shape {tokens.shape}, and others {shape}")
            if made == 1:
                _check_room(lens, params, tokens.shape, config, rows, runtime)
            shape = tokens.shape
            gradient, kl = _gradient(lens, params, np.asarray(tokens), config, rows, runtime)
            _refuse_nan(made - 1, kl)
            rate = learning_rate * (1 - MOMENTUM) * (1 - (made - 1) / steps)
            lens, state = _updated(lens, state, gradient, rate)
            bar.update()
            bar.set_postfix(kl=f"{kl.mean():.4f}")
    if made < steps:
        raise ValueError(f"batches: {made} were given, and {steps} wanted")
    return lens


def apply(
    lens: TunedLens,
    params: Params,
    tokens: Int[AnyArray, "batch seq"],
    config: ModelConfig,
    *,
    layers: Sequence[int] | None = None,
    top: int | None = None,
    runtime: Runtime = Runtime(),
) -> Any:
    """`logit_lens` through the translators: logits `[lens, batch, seq, vocab]`, or with `top` the
    ids and log-probabilities of the likeliest, `[lens, batch, seq, top]` each.

    Raises ValueError as `logit_lens` does, and for a tuned lens of another shape of model.
    """
    return lenses.read(params, tokens, config, lens, layers, top, runtime)


def save(
    lens: TunedLens, path: str | os.PathLike[str], about: Mapping[str, str] | None = None
) -> None:
    """Write a lens to a safetensors file: kernel `[layers, in, out]` and bias, in float32.

    about: what it is of, in the file's metadata.
    """
    arrays = {name: np.asarray(x, np.float32) for name, x in lens._asdict().items()}
    tensor_files.write(path, arrays, {**(about or {}), "kind": KIND})


def load(path: str | os.PathLike[str], config: ModelConfig) -> TunedLens:
    """A lens that `save` wrote, or a folder of the package `tuned-lens` (params.pt, config.json).

    Raises FileNotFoundError, CheckpointError for a damaged params.pt, and ValueError for what is
    no lens, or of another shape of model.
    """
    path = Path(path)
    lens = _load_torch(path) if path.is_dir() else _load_own(path)
    lenses.check_lens(lens, config)
    bad = [i for i in range(len(lens.bias)) if not all(np.isfinite(x[i]).all() for x in lens)]
    if bad:
        raise ValueError(f"{path}: the translator of layer {bad[0]} is not finite")
    return TunedLens(*(jnp.asarray(x) for x in lens))


def about(path: str | os.PathLike[str]) -> dict[str, str]:
    """What a file or folder says that its lens is of. Raises as `load` does."""
    path = Path(path)
    if path.is_dir():
        told = _config_of(path)
        step = told.get("base_model_revision")
        named = {"source": told.get("base_model_name_or_path"), "revision": step}
        return {key: str(value) for key, value in named.items() if value}
    metadata = _own(path)[1]
    return {key: value for key, value in metadata.items() if key != "kind"}


def _count(batches: Iterable[Any]) -> int:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError("batches have no length: say how many with steps=") from None


def _check_room(
    lens: TunedLens,
    params: Params,
    shape: tuple[int, ...],
    config: ModelConfig,
    rows: int | None,
    runtime: Runtime,
) -> None:
    """Refuse rows together that do not fit, with the lens's gradient and the sum of these."""
    together = training_rows.together(rows, *shape)

    def part() -> Any:
        tokens, weights = np.zeros((together, shape[1]), np.int32), np.zeros(together, np.float32)
        given = map(sharding.place_rows, (tokens, weights))
        return _part.lower(lens, params, *given, config, runtime).compile()

    preflight.check_memory(
        f"fitting a lens to {together} rows at a time",
        (1, lens),
        program=part,
        advice="take fewer together (--batch), or cut the model over more devices (--fsdp)",
    )


@jax.jit
def _begin(lens: TunedLens) -> tuple[TunedLens, Any]:
    return _placed(lens), jax.vmap(_optimizer().init)(_placed(lens))


@partial(jax.jit, donate_argnums=(0, 1))
def _updated(
    lens: TunedLens, state: Any, gradient: TunedLens, rate: jax.Array
) -> tuple[TunedLens, Any]:
    change, state = jax.vmap(_optimizer().update)(gradient, state, lens)
    return _placed(jax.tree.map(lambda x, d: x - rate * d, lens, change)), state


def _optimizer() -> optax.GradientTransformation:
    """That of one layer, but for the rate and the sign."""
    return optax.chain(
        optax.clip_by_global_norm(CLIP),
        optax.add_decayed_weights(WEIGHT_DECAY),
        optax.trace(MOMENTUM, nesterov=True),
    )


def _placed(lens: TunedLens) -> TunedLens:
    return TunedLens(
        *(sharding.constrain(jnp.asarray(x), a) for x, a in zip(lens, _AXES, strict=True))
    )


def _gradient(
    lens: TunedLens,
    params: Params,
    tokens: NDArray,
    config: ModelConfig,
    rows: int | None,
    runtime: Runtime,
) -> tuple[TunedLens, Float[NDArray, "layers batch"]]:
    """The gradient of the mean over tokens, and the mean of each layer and row; in parts."""
    batch, seq = tokens.shape
    together = training_rows.together(rows, batch, seq)
    total, found = None, []
    for first in range(0, batch, together):
        own = tokens[first : first + together]
        weights = np.zeros(together, np.float32)
        weights[: len(own)] = 1 / (batch * seq)
        filled = np.resize(own, (together, seq))
        placed = map(sharding.place_rows, (filled, weights))
        gradient, kl = _part(lens, params, *placed, config, runtime)
        total = gradient if total is None else _sum(total, gradient)
        found.append((kl, len(own)))
    assert total is not None
    return total, np.concatenate([np.asarray(kl)[:, :own] for kl, own in found], axis=1)


@partial(jax.jit, donate_argnums=0)
def _sum(total: TunedLens, gradient: TunedLens) -> TunedLens:
    return jax.tree.map(jnp.add, total, gradient)


@partial(jax.jit, static_argnames=("config", "runtime"))
def _part(
    lens: TunedLens,
    params: Params,
    tokens: Int[Array, "rows seq"],
    weights: Float[Array, " rows"],
    config: ModelConfig,
    runtime: Runtime,
) -> tuple[TunedLens, Float[Array, "layers rows"]]:
    """Gradient of the weighted sum of divergences, chunk by chunk; their mean over each row.

    The model is run once. Logits of a chunk and a layer exist at once, beside the model's own.
    """
    check_floats(params)
    layers = tuple(range(config.num_hidden_layers))
    final, streams = lenses.streams_of(params, tokens, config, layers, runtime)
    whole, cut = lenses.gathered(params), Chunks(tokens.shape, runtime.loss_chunk)
    norm, eps = params["final_layer_norm"], config.layer_norm_eps
    counted = jnp.broadcast_to(jnp.ones_like(weights)[:, None], tokens.shape)

    @partial(jax.value_and_grad, has_aux=True)
    def weighed(lens: TunedLens, given: tuple) -> tuple[jax.Array, jax.Array]:
        x, last, real = given
        own = lenses.log_probabilities(whole, last[0])

        @jax.checkpoint
        def each(one: tuple[TunedLens, jax.Array]) -> jax.Array:
            mine, x = one
            moved = lenses.translate(TunedLens(*(a[None] for a in mine)), x[None])[0]
            said = lenses.log_probabilities(whole, layer_norm(moved, norm, eps).astype(x.dtype))
            return (lenses.divergence(own, said) * real[0]).sum(axis=1)

        kl = jax.lax.map(each, (lens, x))
        return (kl * weights).sum(), kl

    def step(total: tuple, given: tuple) -> tuple[tuple, None]:
        (_, kl), gradient = weighed(lens, given)
        return jax.tree.map(jnp.add, total, (gradient, kl)), None

    xs = cut.split(streams), cut.split(final[None]), cut.split(counted[None])
    shapes = jax.eval_shape(weighed, lens, jax.tree.map(lambda x: x[0], xs))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[1], shapes[0][1]))
    (gradient, kl), _ = jax.lax.scan(step, zeros, xs)
    return _placed(gradient), kl / tokens.shape[1]


def _refuse_nan(number: int, kl: Float[NDArray, "layers batch"]) -> None:
    bad = np.argwhere(~np.isfinite(kl.T))
    if bad.size:
        row, layer = bad[0]
        raise ValueError(
            f"update {number}: the divergence of row {row} at layer {layer} is not finite; is the "
            "model free of NaN? If so, give a smaller learning rate"
        )


def _own(path: Path) -> tuple[dict[str, tensor_files.Place], dict[str, str]]:
    places, metadata = tensor_files.read(path)
    if metadata.get("kind") != KIND or set(places) != set(TunedLens._fields):
        raise ValueError(f"{path}: no tuned lens of ours, but another safetensors file")
    return places, metadata


def _load_own(path: Path) -> TunedLens:
    places, _ = _own(path)
    return TunedLens(*(np.array(tensor_files.mapped(path, places[k])) for k in TunedLens._fields))


def _config_of(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        told = json.loads(path.read_bytes())
        layers, hidden = told["num_hidden_layers"], told["d_model"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path}: not of the package tuned-lens, which says num_hidden_layers and d_model"
        ) from None
    kind = told.get("lens_type", "linear_tuned_lens")
    if kind != "linear_tuned_lens" or not all(type(n) is int and n > 0 for n in (layers, hidden)):
        raise ValueError(f"{path}: a {kind} of {layers} layers of {hidden}; no linear tuned lens")
    return told


def _load_torch(folder: Path) -> TunedLens:
    """Of the package: for each layer i of an `nn.ModuleList` of `nn.Linear`, whose weights are
    `[out, in]`, `i.weight` and `i.bias`, added to the stream as here."""
    told, path = _config_of(folder), folder / "params.pt"
    layers, hidden = told["num_hidden_layers"], told["d_model"]
    state = open_torch(path)
    wanted = {f"{i}.weight": (hidden, hidden) for i in range(layers)}
    if told.get("bias", True):
        wanted |= {f"{i}.bias": (hidden,) for i in range(layers)}
    found = {k: getattr(v, "shape", None) for k, v in state.items()} if _is_state(state) else {}
    if found != wanted:
        differing = sorted(map(str, dict(set(found.items()) ^ set(wanted.items()))))
        raise ValueError(
            f"{path}: not the translators of {layers} layers of {hidden}; it differs at "
            f"{', '.join(differing[:4])} ({len(differing)} in all)"
        )
    kernel = np.stack([state[f"{i}.weight"].read().T for i in range(layers)])
    bias = np.zeros((layers, hidden))
    if told.get("bias", True):
        bias = np.stack([state[f"{i}.bias"].read() for i in range(layers)])
    return TunedLens(*(x.astype(np.float32) for x in (kernel, bias)))


def _is_state(state: Any) -> bool:
    return isinstance(state, Mapping) and all(isinstance(v, TorchTensor) for v in state.values())
