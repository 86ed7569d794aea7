"""The forward pass of GPT-NeoX as a pure function of (params, tokens, config).

GPT-NeoX v1.0, megatron/model/transformer.py and gpt2_model.py; Black et al., 2022. The hidden
states run through a scan over the stacked layers (or a loop, `Runtime.scan_layers`), past the
named sites of `pythia_jax.model.sites`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pythia_jax import sharding
from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.model import attention, quantize, sinks
from pythia_jax.model.parameters import Parameter, Params, map_parameters
from pythia_jax.model.quantize import Quantized
from pythia_jax.model.sites import SPLIT_READERS, Capture, Edits, Hooks, LayerHooks, Taps

AnyArray = Array | np.ndarray
Hidden = Float[Array, "batch seq hidden"]
Logits = Float[Array, "batch seq vocab"]


@overload
def forward(
    params: Params,
    tokens: Int[AnyArray, "batch seq"],
    config: ModelConfig,
    *,
    capture: tuple[()] = (),
    taps: Taps | None = None,
    edits: Edits | None = None,
    runtime: Runtime = Runtime(),
) -> Logits: ...
@overload
def forward(
    params: Params,
    tokens: Int[AnyArray, "batch seq"],
    config: ModelConfig,
    *,
    capture: Capture,
    taps: Taps | None = None,
    edits: Edits | None = None,
    runtime: Runtime = Runtime(),
) -> tuple[Logits, dict[str, Array]]: ...
def forward(
    params: Params,
    tokens: Int[AnyArray, "batch seq"],
    config: ModelConfig,
    *,
    capture: Capture = (),
    taps: Taps | None = None,
    edits: Edits | None = None,
    runtime: Runtime = Runtime(),
) -> Logits | tuple[Logits, dict[str, Array]]:
    """Logits at every position, at least float32.

    capture: names of sites, or pairs (site, layers), to return. taps: arrays added at sites.
    edits: pairs (mask, value) that replace sites where the mask is true. Both broadcast to the
    site's shape, `[layer, batch, seq, …]` (`pythia_jax.model.sites.SITES`).

    Returns logits, or (logits, {site: value}) if `capture` names any.

    Raises ValueError for an unknown site, a shape that does not fit, too long a sequence.
    """
    capture = (capture,) if isinstance(capture, str) else tuple(capture)
    hidden, captured = hidden_states(
        params, tokens, config, capture=capture, taps=taps, edits=edits, runtime=runtime
    )
    logits = unembed(params, hidden)
    return (logits, captured) if capture else logits


def hidden_states(
    params: Params,
    tokens: Int[AnyArray, "batch seq"],
    config: ModelConfig,
    *,
    capture: Capture = (),
    taps: Taps | None = None,
    edits: Edits | None = None,
    watched: Mapping[str, sinks.Sink] | None = None,
    runtime: Runtime = Runtime(),
) -> tuple[Hidden, dict]:
    """The final LayerNorm's output, before the unembedding, and the captured sites.

    watched: sinks by module of the layers (`pythia_jax.model.sinks`).
    """
    check_tokens(tokens, config)
    batch, seq = tokens.shape
    if seq > config.max_position_embeddings:
        raise ValueError(
            f"{seq} tokens do not fit the model's {config.max_position_embeddings} positions"
        )
    hooks = Hooks(capture, taps, edits, config, batch, seq)
    kernel = attention.choose(runtime, hooks.used)
    positions = np.arange(seq)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, site: LayerHooks) -> jax.Array:
        q, k = (attention.rotate(x, positions, config) for x in (q, k))
        return attention.attend(q, k, v, kernel, site)

    params = cast(params, runtime)
    if watched:
        params = sinks.inserted(params, watched)
    outer = hooks.at()
    x = _stream(outer("embed", embed(params, tokens)))

    def layer(carry: tuple, scanned: tuple) -> tuple[tuple, dict]:
        x, chosen = carry
        index, weights, layered = scanned
        site = hooks.at(index, layered, chosen)
        x = block(weights, x, config, lambda q, k, v: attend(q, k, v, site), site)
        return (_stream(x), site.chosen), site.captured

    run = run_layers(layer, runtime, config.num_hidden_layers)
    indices = jnp.arange(config.num_hidden_layers)
    (x, chosen), stacked = run(
        (x, hooks.start(x.dtype)), (indices, params["layers"], hooks.layered)
    )
    x = outer("ln_final", layer_norm(x, params["final_layer_norm"], config.layer_norm_eps))
    return x, hooks.results({**stacked, **outer.captured}, chosen)


def check_tokens(tokens: AnyArray, config: ModelConfig) -> None:
    """Refuse what are not `[batch, seq]` token ids of this vocabulary.

    Inside `jax.jit` the ids are not known yet; there, a wrong one is embedded as NaN.
    """
    if not isinstance(tokens, np.ndarray | jax.Array):
        raise ValueError(f"tokens are a {type(tokens).__name__}: an array is wanted (np.array)")
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens of shape {tokens.shape} and dtype {tokens.dtype}: whole numbers, "
            "[batch, seq], are wanted"
        )
    try:
        ids = np.asarray(tokens)
    except jax.errors.TracerArrayConversionError:
        return
    wrong = ids[(ids < 0) | (ids >= config.vocab_size)]
    if wrong.size:
        raise ValueError(f"token {wrong[0]} is not in the vocabulary of {config.vocab_size}")


def check_rows(tokens: AnyArray, config: ModelConfig) -> None:
    """Refuse what are not `[batch, seq + 1]` token ids, of which a loss has inputs and targets."""
    shape = np.shape(tokens)
    if len(shape) != 2 or shape[1] < 2:
        raise ValueError(f"tokens of shape {shape}: a loss wants [batch, seq + 1]")
    check_tokens(tokens, config)


def embed(params: Params, tokens: Int[AnyArray, "*rows"]) -> Float[Array, "*rows hidden"]:
    """Rows of the embedding; NaN for an id that it does not have."""
    table = params["embed_in"]["embedding"]
    if isinstance(table, Quantized):
        return quantize.rows(table, jnp.asarray(tokens))
    # Gathered in its own dtype, then widened: the gradient of a frequent token has many summands.
    gathered = sharding.constrain(table, ("vocab", "stream"))
    wide = gathered.astype(jnp.promote_types(table.dtype, jnp.float32))
    return jnp.take(wide, tokens, axis=0, mode="fill", fill_value=np.nan).astype(table.dtype)


def _stream(x: Hidden) -> Hidden:
    """The residual stream: each device has its own rows, whole."""
    return sharding.constrain(x, ("batch", "seq", "stream"))


def block(
    weights: Params,
    x: Hidden,
    config: ModelConfig,
    attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    site: LayerHooks,
) -> Hidden:
    """One layer. `attend` maps unrotated q, k, v, `[batch, seq, heads, head]` each, to z.

    Parallel residual: x + attention(norm(x)) + mlp(norm'(x)), both of the block's input;
    sequential: the MLP reads the stream that attention has written to.
    """
    x = site("resid_pre", checkpoint_name(x, "resid_pre"))
    q, k, v = queries_keys_values(weights, x, config, site)
    z = site("attn.z", attend(q, k, v))  # named by the kernel, in the layout that it keeps
    merged = z.reshape(*x.shape[:2], config.hidden_size)
    attention_out = dense(merged, weights["attention"]["dense"])
    attention_out = site("attn_out", checkpoint_name(attention_out, "attn_out"))
    if not config.use_parallel_residual:
        x = x + attention_out
    mlp_in = site("mlp_in", x)
    normed = layer_norm(mlp_in, weights["post_attention_layernorm"], config.layer_norm_eps)
    pre = checkpoint_name(dense(normed, weights["mlp"]["dense_h_to_4h"]), "mlp.pre")
    pre = site("mlp.pre", sharding.constrain(pre, ("batch", "seq", "mlp")))
    post = jax.nn.gelu(pre, approximate=config.tanh_gelu)
    post = site("mlp.post", checkpoint_name(post, "mlp.post"))
    mlp_out = dense(post, weights["mlp"]["dense_4h_to_h"])
    mlp_out = site("mlp_out", checkpoint_name(mlp_out, "mlp_out"))
    # GPT-NeoX adds the two branches first and the stream last: the order decides the last bits.
    written = attention_out + mlp_out if config.use_parallel_residual else mlp_out
    return site("resid_post", x + written)


def queries_keys_values(
    weights: Params, x: Hidden, config: ModelConfig, site: LayerHooks
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values before rotary, `[batch, seq, heads, head]` each."""
    norm, eps = weights["input_layernorm"], config.layer_norm_eps
    qkv = weights["attention"]["query_key_value"]
    heads, size = config.num_attention_heads, config.head_size
    if site.wants(*SPLIT_READERS):
        # Every head reads a copy of the stream of its own, so that edges can be told apart.
        bias = qkv["bias"].reshape(heads, 3, size)
        copies = jnp.broadcast_to(x[:, :, None], (*x.shape[:2], heads, config.hidden_size))
        split = []
        for i, reader in enumerate(SPLIT_READERS):
            read = layer_norm(site(reader, copies), norm, eps)
            read, kernel = quantize.in_floats(read, qkv["kernel"])
            kernel = kernel.reshape(config.hidden_size, heads, 3, size)
            precision = attention.exact(read)
            value = jnp.einsum("bshd,dhe->bshe", read, kernel[:, :, i], precision=precision)
            split.append(value + bias[:, i])
    else:
        fused = checkpoint_name(dense(layer_norm(x, norm, eps), qkv), "attn.qkv")
        fused = sharding.constrain(fused, ("batch", "seq", "qkv"))
        split = jnp.split(fused.reshape(*x.shape[:2], heads, 3 * size), 3, axis=-1)
    return site("attn.q", split[0]), site("attn.k", split[1]), site("attn.v", split[2])


def unembed(params: Params, hidden: Float[Array, "*rows hidden"]) -> Float[Array, "*rows vocab"]:
    """Logits, at least float32."""
    kernel = params["embed_out"]["kernel"]
    if isinstance(kernel, Quantized):
        return quantize.matmul(hidden, kernel)
    kernel = kernel.astype(hidden.dtype)
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.matmul(
        hidden, kernel, precision=attention.exact(hidden), preferred_element_type=wide
    )


def dense(x: Float[Array, "*rows in"], weights: Params) -> Float[Array, "*rows out"]:
    """x @ kernel + bias; with a sink among the weights, the backward pass fills it."""
    if "sink" in weights:
        return sinks.dense(_affine, x, weights)
    return _affine(x, weights["kernel"], weights["bias"])


def _affine(x: jax.Array, kernel: jax.Array | Quantized, bias: jax.Array) -> jax.Array:
    if isinstance(kernel, Quantized):
        return (quantize.matmul(x, kernel) + bias).astype(x.dtype)
    # As matrices: of a product of three-dimensional arrays, XLA's CPU compiler writes out a
    # transposed copy for the kernel's gradient; of matrices it folds the transpose away.
    rows = x.reshape(-1, x.shape[-1])
    product = jnp.matmul(rows, kernel, precision=attention.exact(x))
    return (product + bias).reshape(*x.shape[:-1], -1)


def layer_norm(
    x: Float[Array, "*rows hidden"], weights: Params, eps: float
) -> Float[Array, "*rows hidden"]:
    """LayerNorm over the last axis (Ba et al., 2016); at least float32 throughout, as torch's."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + eps)
    return (normed * weights["scale"] + weights["bias"]).astype(x.dtype)


def cast(params: Params, runtime: Runtime) -> Params:
    """Parameters in the compute dtype.

    All but the unembedding, which the loss casts itself, and the norms, which are float32: sums
    over every token, their gradients would lose most in a narrow one.
    """
    if runtime.dtype is None:
        return params

    def leaf(parameter: Parameter, value: jax.Array | Quantized) -> jax.Array | Quantized:
        if isinstance(value, Quantized):
            return dataclasses.replace(value, dtype=jnp.dtype(runtime.dtype))
        kept = parameter.path == "embed_out/kernel" or "norm/" in parameter.path
        return value if kept else value.astype(runtime.dtype)

    return map_parameters(leaf, params)


def unstacked(params: Params) -> Params:
    """The tree with each layer's parameters in arrays of their own, a tuple of trees as `layers`.

    For decoding, which reads all weights for a few tokens: a layer cut out of stacked arrays is
    copied first.
    """
    stacked = params["layers"]
    count = len(jax.tree.leaves(stacked)[0])
    layers = tuple(jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(count))
    return {**params, "layers": layers}


def _remat_policy(remat: str) -> Callable[..., bool]:
    named = jax.checkpoint_policies.save_only_these_names
    if remat in REMAT_POLICIES:
        return REMAT_POLICIES[remat]
    return named(*(name.strip() for name in remat.split(",")))


REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        # Attention recomputes its scores by itself; without its output it would do so twice.
        jax.checkpoint_policies.save_only_these_names("attn.z"),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def run_layers(layer: Callable, runtime: Runtime, layers: int) -> Callable:
    """`layer(carry, scanned)` over all layers: by `lax.scan`, or unrolled."""
    if runtime.remat != "none":
        policy = _remat_policy(runtime.remat)
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=not runtime.scan_layers)
    if runtime.scan_layers:
        return functools.partial(jax.lax.scan, layer)

    def unrolled(carry: tuple, scanned: tuple) -> tuple[tuple, dict]:
        outputs = []
        for i in range(layers):
            carry, output = layer(carry, jax.tree.map(lambda a, i=i: a[i], scanned))
            outputs.append(output)
        return carry, jax.tree.map(lambda *a: jnp.stack(a), *outputs)

    return unrolled
