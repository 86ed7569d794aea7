"""Prefill and decode: the forward pass over whole prompts, and over one more token a row.

Both go through layers that are arrays of their own (`serving`), and keep keys and values in a
cache (`pythia_jax.model.cache`). Prompts of unequal length stand left-aligned in one array.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pythia_jax import sharding
from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.model import attention, cache, gptneox
from pythia_jax.model.cache import Cache
from pythia_jax.model.gptneox import AnyArray
from pythia_jax.model.parameters import Params
from pythia_jax.model.quantize import Quantized
from pythia_jax.model.sampling import likeliest
from pythia_jax.model.sites import Hooks


def serving(params: Params, runtime: Runtime) -> Params:
    """The parameters as decoding reads them: in the compute dtype, the layers a tuple of trees.

    On a CPU, layers that need no cast are views of the stacked arrays, not copies.
    """
    params = gptneox.cast(params, runtime)
    kernel = params["embed_out"]["kernel"]
    if runtime.dtype is not None and not isinstance(kernel, Quantized):
        params = {**params, "embed_out": {"kernel": kernel.astype(runtime.dtype)}}
    stacked = params["layers"]
    if not all(_on_one_cpu(leaf) for leaf in jax.tree.leaves(stacked)):
        return jax.jit(gptneox.unstacked)(params)
    layers = tuple(
        jax.tree.map(partial(_view, i), stacked) for i in range(len(jax.tree.leaves(stacked)[0]))
    )
    return {**params, "layers": layers}


def dtype_of(params: Params) -> str:
    """The dtype of the computation with these parameters."""
    token = jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.eval_shape(gptneox.embed, params, token).dtype.name


def _on_one_cpu(leaf: Any) -> bool:
    devices = leaf.devices() if isinstance(leaf, jax.Array) else ()
    return len(devices) == 1 and all(device.platform == "cpu" for device in devices)


def _view(i: int, stacked: jax.Array) -> jax.Array:
    (device,) = stacked.devices()
    return jax.device_put(np.asarray(stacked)[i], device, may_alias=True)


def prefill(
    params: Params,
    tokens: Int[AnyArray, "some width"],
    caches: Cache,
    rows: Int[AnyArray, " some"],
    config: ModelConfig,
    runtime: Runtime,
) -> tuple[Float[Array, "some width hidden"], Cache]:
    """Run prompts: final hidden states, and the cache with theirs in some of its rows.

    `params` come from `serving`. What a layer leaves is cached before the next is run: in floats,
    the keys and values of all of them can be more than the weights.
    """
    positions = np.arange(tokens.shape[1])
    kernel = attention.choose(runtime, ())
    filled = []

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, k = (attention.rotate(x, positions, config) for x in (q, k))
        keys, values = (x.transpose(0, 2, 1, 3) for x in (k, v))
        filled.append(cache.fill(caches[layer], keys, values, rows))
        return attention.attend(q, k, v, kernel, lambda site, value: value)

    return _through(params, tokens, config, attend), tuple(filled)


def step(
    params: Params,
    token: Int[Array, " batch"],
    position: Int[Array, " batch"] | Int[Array, ""],
    caches: Cache,
    config: ModelConfig,
) -> tuple[Float[Array, "batch hidden"], Cache]:
    """One token a row: final hidden state, and the cache grown by it.

    position: each row's own, or one for all of them. `params` come from `serving`.
    """
    slots = caches[0][0].values.shape[2]
    visible = jnp.arange(slots) <= jnp.atleast_1d(position)[:, None]
    grown = []

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, k = (attention.rotate(x, position[..., None], config) for x in (q, k))
        keys, values = (
            cache.put(side, x[:, 0], position)
            for side, x in zip(caches[layer], (k, v), strict=True)
        )
        grown.append((keys, values))
        return cache.attend(q[:, 0], keys, values, visible)[:, None]

    hidden = _through(params, token[:, None], config, attend)
    return hidden[:, 0], tuple(grown)


def _through(
    params: Params,
    tokens: Int[AnyArray, "batch seq"],
    config: ModelConfig,
    attend: Callable[[int, Array, Array, Array], Array],
) -> Float[Array, "batch seq hidden"]:
    """Final hidden states. attend: (layer, queries, keys, values before rotary) → mixed values."""
    site = Hooks((), None, None, config, *tokens.shape).at()
    x = gptneox.embed(params, tokens)
    for layer, weights in enumerate(params["layers"]):
        x = sharding.constrain(x, ("batch", "seq", "stream"))
        x = gptneox.block(weights, x, config, partial(attend, layer), site)
    return gptneox.layer_norm(x, params["final_layer_norm"], config.layer_norm_eps)


def greedy(
    params: Params,
    prompts: Int[AnyArray, "batch prompt"],
    config: ModelConfig,
    *,
    new_tokens: int,
    never: int | None = None,
    runtime: Runtime = Runtime(),
) -> Int[Array, "batch new"]:
    """The likeliest tokens after prompts of one length, which all go on in step; for `jax.jit`.

    never: a token that is not picked, however likely. `params` come from `serving`. On a mesh
    each device has its own rows.
    """
    batch, width = prompts.shape
    caches = cache.empty(config, batch, width + new_tokens, dtype_of(params))
    hidden, caches = prefill(params, prompts, caches, np.arange(batch), config, runtime)

    def pick(hidden: jax.Array) -> jax.Array:
        logits = sharding.constrain(gptneox.unembed(params, hidden), ("batch", "vocab"))
        if never is not None:
            logits = logits.at[:, never].set(-jnp.inf)
        return sharding.constrain(likeliest(logits), ("batch",))

    def advance(carry: tuple, position: jax.Array) -> tuple[tuple, jax.Array]:
        token, caches = carry
        hidden, caches = step(params, token, position, caches, config)
        token = pick(hidden)
        return (token, caches), token

    first = pick(hidden[:, -1])
    positions = jnp.arange(width, width + new_tokens - 1)
    _, later = jax.lax.scan(advance, (first, caches), positions)
    return jnp.concatenate([first[:, None], later.T], axis=1)
