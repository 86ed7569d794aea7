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
import numpy as np
from jaxtyping import Array, UInt32

BLOCK = 2**19
"""Elements that are digested at a time where an array comes in parts."""
Digests = dict[str, str]
"""Name of a leaf (`params/embed_in/embedding`) → 16 hexadecimal digits."""


def digests(tree: Any) -> Digests:
    """The digest of each array of a tree, under its path; waits for the device.

    In a run of several processes all of them call this together, and all get the same answer.
    """
    named = {name_of(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
    sums = jax.device_get(_all_sums(named))
    return {name: written(pair) for name, pair in sums.items()}


def written(pair: Any) -> str:
    """The two sums as the digits of a digest."""
    high, low = pair
    return f"{int(high):08x}{int(low):08x}"


def part_sums(part: np.ndarray, start: int) -> np.ndarray:
    """The two sums of a part of an array, as uint32 `[2]`; added up over all parts, its digest's.

    part: in one piece, in C order, of elements of at most 32 bits. start: how many elements of the
    array lie before it.
    """
    flat = np.ascontiguousarray(part).reshape(-1)
    total = np.zeros(2, np.uint32)
    for first in range(0, flat.size, BLOCK):
        block = flat[first : first + BLOCK]
        count = block.size
        if count < BLOCK:  # one program for all sizes
            block = np.concatenate([block, np.zeros(BLOCK - count, block.dtype)])
        place = np.uint32((start + first) % 2**32)
        total += np.array(jax.device_get(_block_sums(block, place, np.int32(count))))
    return total


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
    mixed = _mixed(words, _place(words.shape))
    return jnp.stack([jnp.sum(one, dtype=jnp.uint32) for one in mixed])


@jax.jit
def _block_sums(block: jax.Array, start: jax.Array, count: jax.Array) -> list[jax.Array]:
    """The sums of the first `count` elements of a block that lies at `start`.

    In one pass over both, which is four times as fast on a CPU, but which no mesh can cut.
    """
    index = jax.lax.iota(jnp.uint32, block.size)
    mixed = _mixed(_words(block), start + index)
    zero = jnp.uint32(0)
    return jax.lax.reduce(
        tuple(jnp.where(index < count.astype(jnp.uint32), one, zero) for one in mixed),
        (zero, zero),
        lambda a, b: (a[0] + b[0], a[1] + b[1]),
        dimensions=(0,),
    )


def _mixed(words: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Words mixed with their places, twice."""
    place = _mix(place + jnp.uint32(0x9E3779B9))
    return (
        _mix(words ^ place),
        _mix((words ^ jnp.uint32(0x5BD1E995)) + place * jnp.uint32(0xCC9E2D51)),
    )


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
