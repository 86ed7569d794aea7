"""Digests of arrays: 64 bits that tell whether any bit of an array, or its place, has changed.

Each 32-bit word of an array is mixed with its place in the array, twice and differently, and the
mixed words are summed modulo 2^32. A sum does not ask in which order its terms come, so a digest
is the same however the array is cut over devices, and each device reads only its own part. The
mixing is MurmurHash3's 32-bit finaliser (Appleby, public domain): one to one, so that a single
changed word always shows; anything else goes unseen about once in 2^64. These digests find
accidents, not forgeries.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

Digests = dict[str, str]
"""Name of a leaf (`params/embed_in/embedding`) → 16 hexadecimal digits."""


def digests(tree: Any) -> Digests:
    """The digest of each array of a tree, under its path; waits for the device.

    In a run of several processes all of them call this together, and all get the same answer.
    """
    named = {name_of(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
    sums = jax.device_get(_all_sums(named))
    return {name: f"{int(high):08x}{int(low):08x}" for name, (high, low) in sums.items()}


def name_of(path: Any) -> str:
    """The path of a leaf as one string, as digests and messages call it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def changed(saved: Digests, found: Digests) -> list[str]:
    """Names of the leaves of `found` whose digest is not the one in `saved`, or is not there."""
    return [name for name, digest in found.items() if saved.get(name) != digest]


def _all_sums(named: dict[str, jax.Array]) -> dict[str, jax.Array]:
    shardings = {leaf.sharding for leaf in named.values()}
    meshes = {s.mesh for s in shardings if isinstance(s, jax.sharding.NamedSharding)}
    # Whole on every device, so that every process can read them.
    whole = jax.sharding.NamedSharding(meshes.pop(), jax.P()) if len(meshes) == 1 else None
    return jax.jit(_sums_of_tree, out_shardings=whole)(named)


def _sums_of_tree(tree: dict[str, jax.Array]) -> dict[str, UInt32[Array, "2"]]:
    return jax.tree.map(sums, tree)


def sums(x: jax.Array) -> UInt32[Array, "2"]:
    """The two sums that are an array's digest."""
    words = _words(x)
    place = _mix(_place(words.shape) + jnp.uint32(0x9E3779B9))
    mixed = (
        _mix(words ^ place),
        _mix((words ^ jnp.uint32(0x5BD1E995)) + place * jnp.uint32(0xCC9E2D51)),
    )
    return jnp.stack([jnp.sum(one, dtype=jnp.uint32) for one in mixed])


def _words(x: jax.Array) -> jax.Array:
    """The bits of an array as uint32, narrower elements one a word, wider ones cut up."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = min(8 * x.dtype.itemsize, 32)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)


def _place(shape: tuple[int, ...]) -> jax.Array:
    """The row-major index of each element, modulo 2^32."""
    place, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        place += index * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return place


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
