"""The fused attention kernels: Splash (Pallas) on TPUs, flash attention of cuDNN on GPUs.

Neither ever writes scores to memory. Both are made by others and can be differentiated once, in
reverse; whoever needs more is told so, and what to use. Both take queries that are scaled already.
"""

import contextlib
import re
from collections.abc import Callable
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib
from jax.extend.core import Primitive
from jaxtyping import Array, Float

Heads = Float[Array, "batch seq heads head"]
Kernel = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

FUSED = ("splash", "cudnn")
KEPT = "attn.z"
"""The name, for `remat`, of what spares a backward pass the forward kernel: z and, from a fused
kernel, each query's logsumexp."""

TILE = 128
"""Splash works on tiles of so many positions; shorter sequences are filled up."""
BLOCKS = (512, 256, 128)
"""Sizes of Splash's blocks of queries and keys. The largest is taken that divides the sequence and
is of at most `BLOCK_BYTES`, heads filled up to whole tiles: a TPU's fast memory holds no more."""
BLOCK_BYTES = 2**18

_BEFORE_AMPERE = re.compile(r"\b([KMPV]\d+|T4|GTX|TITAN|Quadro|RTX 20\d\d)\b", re.IGNORECASE)
_SINCE_HOPPER = re.compile(r"\b(H100|H200|H800|H20|GH200|G?B[123]00)\b")
_AMD = re.compile(r"\b(AMD|Radeon|Instinct)\b|\bgfx\d", re.IGNORECASE)


def obstacle(
    kernel: str, head_size: int, dtype: jax.typing.DTypeLike, platform: str, device_kind: str = ""
) -> str | None:
    """Why a fused kernel cannot run there; None if it can.

    platform: `tpu`, `gpu`, `cuda`, `rocm` or `cpu`. device_kind: JAX's name of the device; one
    that is unknown or empty passes for the oldest that the kernel runs on.
    """
    dtype = jnp.dtype(dtype)
    if kernel == "splash":
        if platform != "tpu":
            return f"runs on TPUs, not on {platform}"
        if re.search(r"\bv[23]\b", device_kind):
            return f"needs a TPU v4 or later, not {device_kind}"
        if dtype not in (jnp.bfloat16, jnp.float32):
            return f"takes bfloat16 and float32, not {dtype}"
        if not 32 <= head_size <= 256:
            return f"takes head sizes 32 to 256, not {head_size}"
        return None
    if platform not in ("gpu", "cuda") or _AMD.search(device_kind):
        return f"runs on NVIDIA's GPUs, not on {device_kind or platform}"
    if _BEFORE_AMPERE.search(device_kind):
        return f"needs an Ampere GPU or later, not {device_kind}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, not {dtype}"
    # cuDNN's own rule, for training as for inference: jax.nn.dot_product_attention holds to it.
    largest = 256 if _SINCE_HOPPER.search(device_kind) else 128
    if head_size > largest or head_size % 8:
        where = f" on {device_kind}" if device_kind else " before Hopper" * (largest == 128)
        return f"takes head sizes that are multiples of 8, up to {largest}{where}, not {head_size}"
    return None


def pick(
    asked: str,
    head_size: int,
    dtype: jax.typing.DTypeLike,
    platform: str,
    device_kind: str = "",
) -> str:
    """The kernel to run: the one asked for or, for `auto`, the first that can run, else `xla`.

    Raises ValueError if one was asked for by name that cannot run there.
    """
    if asked in FUSED:
        why = obstacle(asked, head_size, dtype, platform, device_kind)
        if why:
            raise ValueError(
                f"attention kernel {asked!r} {why}; ask for 'xla', which runs anywhere, or 'auto'"
            )
    if asked != "auto":
        return asked
    able = (k for k in FUSED if obstacle(k, head_size, dtype, platform, device_kind) is None)
    return next(able, "xla")


def splash(q: Heads, k: Heads, v: Heads, *, interpret: bool = False) -> Heads:
    """Causal attention by Splash, a Pallas kernel for TPUs. interpret: run it anywhere, slowly.

    Sequences are filled up to whole tiles: nothing before the filling sees it, and what it
    computes is cut off. Products of float32 are exact, as everywhere in the model.
    """
    seq, head = q.shape[1], q.shape[3]
    filling = -seq % TILE
    row = (head + -head % TILE) * q.dtype.itemsize
    block = next(b for b in BLOCKS if (seq + filling) % b == 0 and b * row <= BLOCK_BYTES)
    sizes = splash_lib.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        use_fused_bwd_kernel=True,
    )

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        heads, seq = q.shape[1:3]
        causal = mask_lib.MultiHeadMask([mask_lib.CausalMask((seq, seq))] * heads)
        of_one_row = splash_lib.make_splash_mha(
            causal,
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        return jax.vmap(of_one_row)(q, k, v)  # pyright: ignore[reportReturnType]

    filled = (jnp.pad(x, ((0, 0), (0, filling), (0, 0), (0, 0))) for x in (q, k, v))
    z = _once("splash", kernel, _merge, _split)(*(x.transpose(0, 2, 1, 3) for x in filled))
    return z.transpose(0, 2, 1, 3)[:, :seq]


def _merge(x: jax.Array) -> jax.Array:
    """`[batch, heads, seq, head]` as `[batch, seq, heads * head]`; anything else as it is.

    TPU tiles would fill up heads of 64 to twice the bytes.
    """
    return x.transpose(0, 2, 1, 3).reshape(*x.shape[::2], -1) if x.ndim == 4 else x


def _split(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """What `_merge` made of an array of this shape, as it was; anything else as it is."""
    batch, heads, seq, head = shape
    if x.shape != (batch, seq, heads * head):
        return x
    return x.reshape(batch, seq, heads, head).transpose(0, 2, 1, 3)


def cudnn(q: Heads, k: Heads, v: Heads) -> Heads:
    """Causal attention by the flash kernel of cuDNN, for NVIDIA's GPUs."""

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, scale=1.0, implementation="cudnn"
        )

    return _once("cudnn", kernel)(q, k, v)


def _once(
    name: str,
    kernel: Kernel,
    pack: Callable[[jax.Array], jax.Array] = lambda x: x,
    unpack: Callable[[jax.Array, tuple[int, ...]], jax.Array] = lambda x, _: x,
) -> Kernel:
    """`kernel`, differentiable once and in reverse; any other derivative is refused by name.

    pack, unpack: how arrays lie between the forward and the backward pass, and back again, given
    z's shape. Those that the kernel computed are named `KEPT`.
    """

    @jax.custom_vjp
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        with _products(q):
            return kernel(q, k, v)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Callable]:
        with _products(q):
            z, pullback = jax.vjp(kernel, q, k, v)
        # The pullback holds its arguments, tables of whole numbers and what the kernel computed.
        # The latter gets the name, z as one value with that which is returned, lest both be kept.
        packed = {id(x): pack(x) for x in (q, k, v)}

        def keep(x: jax.Array) -> jax.Array:
            if id(x) not in packed:
                computed = jnp.issubdtype(x.dtype, jnp.floating)
                packed[id(x)] = checkpoint_name(pack(x), KEPT) if computed else x
            return packed[id(x)]

        return unpack(keep(z), z.shape), jax.tree.map(keep, pullback)

    def backward(pullback: Callable, cotangent: jax.Array) -> tuple[jax.Array, ...]:
        restored = jax.tree.map(lambda x: unpack(x, cotangent.shape), pullback)
        with _products(cotangent):
            return restored(cotangent)

    run.defvjp(forward, backward)
    return lambda q, k, v: run(*map(_GUARDS[name], (q, k, v)))


def _products(x: jax.Array) -> contextlib.AbstractContextManager:
    """Full precision for float32, in backward kernels too; what the type has for narrower ones."""
    return jax.default_matmul_precision("highest" if x.dtype == np.float32 else "default")


def _guard(name: str) -> Callable[[jax.Array], jax.Array]:
    """The identity, whose derivative is refused but for the first, in reverse.

    Reverse mode transposes a tangent and never computes it; this one can be transposed only. The
    primal value goes on through an identity that has no derivative.
    """
    words = (
        f"the attention kernel {name!r} has first derivatives in reverse only; for forward mode "
        "(jvp, linearize) or a second derivative pass Runtime(attention='xla')"
    )

    def refuse(*_: object) -> NoReturn:
        raise ValueError(words)

    # It is not lowered either, and what JAX says of such a primitive is its name.
    uncomputed_p = Primitive(words)
    uncomputed_p.def_impl(refuse)
    uncomputed_p.def_abstract_eval(lambda x: x)

    plain = jax.custom_jvp(lambda x: x)
    plain.defjvp(refuse)
    # Under `custom_vmap` both are kept as they are by scan and remat, which drop custom rules that
    # they think are no longer wanted.
    differentiated, uncomputed = _at_any_batch(plain), _at_any_batch(uncomputed_p.bind)

    @jax.custom_jvp
    def guard(x: jax.Array) -> jax.Array:
        return x

    @guard.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
        tangent = jax.lax.custom_linear_solve(
            lambda x: x,
            tangents[0],
            solve=lambda _, tangent: uncomputed(tangent),
            transpose_solve=lambda _, cotangent: cotangent,
        )
        return differentiated(primals[0]), tangent

    return guard


def _at_any_batch(f: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """`f`, which does not care about shapes, as one that `vmap` leaves as it is."""
    batched = jax.custom_batching.custom_vmap(f)

    @batched.def_vmap
    def _(_: int, in_batched: list[bool], x: jax.Array) -> tuple[jax.Array, bool]:
        return batched(x), in_batched[0]

    return batched


_GUARDS = {name: _guard(name) for name in FUSED}
