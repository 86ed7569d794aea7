"""Causal self-attention: rotary embedding, the plain kernels and the chooser.

Both kernels here are plain JAX with no derivative rule of their own, so that derivatives of any
order and either mode go through them. `xla` works through blocks of queries, each against the
keys it can see, and recomputes scores in the backward pass: no more than one block's scores exist
at a time. `einsum` holds all scores, which the sites `attn.scores` and `attn.pattern` need. The
fused ones, for TPUs and GPUs, are in `pythia_jax.model.kernels`.

On a mesh every kernel but `einsum` works on each device's own rows and heads.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pythia_jax import sharding
from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.model import kernels
from pythia_jax.model.sites import MATERIALISED

log = logging.getLogger(__name__)

Queries = Float[Array, "batch seq heads head"]
HEADS = ("batch", "seq", "heads", "head")
FUSED = {"splash": kernels.splash, "cudnn": kernels.cudnn}


def inverse_frequencies(rotary_size: int, base: float) -> np.ndarray:
    """base^(-2i / rotary_size), float32 `[rotary_size // 2]`, rounded step by step as torch does.

    The power is taken in float64, its reciprocal in float32. NumPy in float32 throughout differs
    by one unit in the last place of a frequency, which 2048 positions turn into 6e-5.
    """
    exponent = np.arange(0, rotary_size, 2, dtype=np.float32) / np.float32(rotary_size)
    return np.float32(1) / (base ** exponent.astype(np.float64)).astype(np.float32)


@functools.cache
def rotary_table(
    rotary_size: int, base: float, positions: int, precision: str = "float32"
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines, float32 `[positions, rotary_size // 2]`, of RoFormer's angles (sec. 3.2).

    Angles are float32 products, as torch's. Their cosines are taken in float64 and rounded once:
    NumPy's float32 ones depend on the processor.

    precision: `float16` or `bfloat16` rounds to it as GPT-NeoX v1.0's positional_embeddings.py did:
    frequencies, positions, their products, and the cosines and sines of these, which torch takes in
    float32. Up to position 2047 angles are off by up to 0.8 in float16, and by up to 7 in bfloat16.
    """

    def rounded(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float32).astype(jnp.dtype(precision)).astype(np.float32)

    frequencies = rounded(inverse_frequencies(rotary_size, base))
    angle = rounded(np.outer(rounded(np.arange(positions)), frequencies)).astype(np.float64)
    return rounded(np.cos(angle)), rounded(np.sin(angle))


def rotate(
    x: Queries, positions: jax.Array | np.ndarray, config: ModelConfig
) -> Float[Array, "batch seq heads head"]:
    """Rotate the first `rotary_size` dimensions of each head, halves against halves (GPT-NeoX).

    positions: integers, `[seq]` or `[batch, seq]`.
    """
    size = config.rotary_size
    if size == 0:
        return x
    table = rotary_table(
        size, config.rotary_emb_base, config.max_position_embeddings, config.rotary_precision
    )
    # The rotation is done in float32 (or wider), whatever the compute dtype.
    wide = jnp.promote_types(x.dtype, jnp.float32)
    cos, sin = (jnp.asarray(t, wide)[positions][..., None, :] for t in table)
    first, second, rest = jnp.split(x, [size // 2, size], axis=-1)
    first, second = first.astype(wide), second.astype(wide)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*(r.astype(x.dtype) for r in rotated), rest], axis=-1)


def resolve(
    runtime: Runtime,
    config: ModelConfig,
    platform: str,
    device_kind: str = "",
    sites: Collection[str] = (),
) -> Runtime:
    """`runtime` with the name of the attention kernel that will run.

    platform, device_kind: those of the mesh's devices. A `runtime` that leaves the dtype open is
    taken for float32.

    Raises ValueError if a kernel was asked for by name that cannot run there.
    """
    dtype = runtime.dtype or "float32"
    asked = choose(runtime, sites)
    name = kernels.pick(asked, config.head_size, dtype, platform, device_kind)
    return dataclasses.replace(runtime, attention=name)


def choose(runtime: Runtime, sites: Collection[str]) -> str:
    """The kernel as far as the sites in use decide it; `auto` is what they leave to `attend`.

    Raises ValueError if a kernel was asked for by name that cannot serve the sites in use.
    """
    needed = [site for site in MATERIALISED if site in sites]
    if runtime.attention == "auto" and needed:
        log.info("attention: einsum, since %s must be held in memory", " and ".join(needed))
        return "einsum"
    if needed and runtime.attention != "einsum":
        raise ValueError(
            f"attention kernel {runtime.attention!r} never holds {' or '.join(needed)}; "
            "ask for 'einsum' or 'auto' to use these sites"
        )
    return runtime.attention


def attend(q: Queries, k: Queries, v: Queries, kernel: str, hooks: Callable) -> Queries:
    """Causal softmax attention, scaled by 1/sqrt(head): `[batch, seq, heads, head]` each.

    What a backward pass needs of the result is named `kernels.KEPT` for rematerialisation.

    Raises ValueError if `kernel` names one that cannot run here.
    """
    platform, device_kind = _device()
    kernel = kernels.pick(kernel, q.shape[-1], q.dtype, platform, device_kind)
    q = q * (q.shape[-1] ** -0.5)
    if kernel == "einsum":
        return checkpoint_name(_einsum_attention(q, k, v, hooks), kernels.KEPT)
    fused = kernel in FUSED
    run = FUSED[kernel] if fused else functools.partial(_blockwise_attention, platform=platform)
    mixed = sharding.by_shard(run, (HEADS, HEADS, HEADS), HEADS, check_vma=not fused)(q, k, v)
    # The fused kernels have named what they keep, in the layout that they keep it in.
    return mixed if fused else checkpoint_name(mixed, kernels.KEPT)


def _device() -> tuple[str, str]:
    """Platform and kind of the devices that will compute: the ambient mesh's, or the default's.

    The mesh may be of devices that are not here, when compiling for them ahead of time.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return described.platform, described.device_kind
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if default is None or isinstance(default, str):
        default = jax.local_devices(backend=default)[0]
    return default.platform, default.device_kind


def _exponentials(
    scores: jax.Array, visible: jax.Array | np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """Unnormalised exponentials and their sums, both at least float32."""
    scores = jnp.where(visible, scores, jnp.finfo(scores.dtype).min)
    # The shift cancels in the quotient, in every derivative too.
    peak = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - peak)
    return weights, weights.sum(axis=-1, keepdims=True)


def _einsum_attention(q: Queries, k: Queries, v: Queries, hooks: Callable) -> Queries:
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=wide, precision=exact(q))
    seq = q.shape[1]
    visible = np.tril(np.ones((seq, seq), bool))
    scores = hooks("attn.scores", jnp.where(visible, scores, jnp.finfo(wide).min))
    pattern = hooks("attn.pattern", jax.nn.softmax(scores, axis=-1)).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", pattern, v, precision=exact(q))


BLOCKS = 8
"""Query blocks a sequence is cut into. More skip more of the masked half (44 % of it at 8), and
add more pieces to the gradients of keys and values."""


def _blockwise_attention(q: Queries, k: Queries, v: Queries, platform: str) -> Queries:
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    run = {"cpu": _head_by_head, "tpu": _row_by_row}.get(platform, _all_heads)
    return run(q, k, v).transpose(0, 2, 1, 3)


@jax.checkpoint  # Else every block would keep its own copy of the keys and values that it sees.
def _all_heads(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return _attend_in_blocks(q, k, v, jax.checkpoint)


def _row_by_row(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """One row after the other: its heads fill a TPU, and take a batch's share of the memory."""

    @jax.checkpoint
    def attend_row(qkv: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v = (x[None] for x in qkv)
        return _attend_in_blocks(q, k, v, jax.checkpoint)[0]

    return jax.lax.map(attend_row, (q, k, v))


def _head_by_head(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """One head of one row after the other: a CPU's cache holds the scores of one."""

    @jax.checkpoint
    def attend_head(qkv: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v = (x[None, None] for x in qkv)
        return _attend_in_blocks(q, k, v)[0, 0]

    heads = tuple(x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    return jax.lax.map(attend_head, heads).reshape(q.shape)


def _attend_in_blocks(
    q: jax.Array, k: jax.Array, v: jax.Array, remat: Callable = lambda block: block
) -> jax.Array:
    """Causal attention, block of queries after block, `[batch, heads, seq, head]` each."""
    seq = q.shape[2]
    size = max(64, -(-seq // BLOCKS))
    blocks = []
    for start in range(0, seq, size):
        stop = min(start + size, seq)
        block = remat(functools.partial(_attend_block, start=start))
        blocks.append(block(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop]))
    return jnp.concatenate(blocks, axis=2)


def _attend_block(q: jax.Array, k: jax.Array, v: jax.Array, start: int) -> jax.Array:
    """Queries from position `start` on against all keys up to theirs, `[batch, heads, …, head]`."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=wide, precision=exact(q))
    visible = start + np.arange(q.shape[2])[:, None] >= np.arange(k.shape[2])
    weights, total = _exponentials(scores, visible)
    mixed = jnp.einsum(
        "bhqk,bhkd->bhqd",
        weights.astype(v.dtype),
        v,
        preferred_element_type=wide,
        precision=exact(q),
    )
    return (mixed / total).astype(v.dtype)


def exact(x: jax.Array) -> jax.lax.Precision | None:
    """Full precision for float32 and wider, which TPUs and GPUs otherwise round on the way in."""
    return jax.lax.Precision.HIGHEST if x.dtype.itemsize >= 4 else None
