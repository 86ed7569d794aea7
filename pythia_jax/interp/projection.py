"""Random projections of gradients, bit for bit Bergson's: each kernel's from both sides.

The gradient G of a linear module, `[out, in]`, becomes P_L G P_Rᵀ, `[p, p]`, where P_L and P_R
have independent entries ±1/√p: inner products keep their expectation (Johnson and Lindenstrauss,
1984). The signs are bits of Philox4x32-10 (Salmon et al., 2011), keyed by the module's name, so
that nothing of them needs to be stored. Keying and layout: Bergson 2.5.1,
collector/projection_matrix.py (`projection_version` 2).
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pythia_jax.configs import ModelConfig
from pythia_jax.model.parameters import TABLE

_ROUND = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_BITS = 128  # of one output of Philox: columns that share it


@dataclass(frozen=True)
class Projection:
    """Which projection: `dimension` rows and columns of each module's gradient.

    seed: None is what Bergson calls none; another one gives another projection.

    Raises ValueError for a dimension below 1.
    """

    dimension: int = 16
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.dimension < 1:
            raise ValueError(f"projection: dimension {self.dimension}: must be at least 1")


def matrices(
    projection: Projection, config: ModelConfig
) -> dict[str, dict[str, NDArray[np.float32]]]:
    """The two matrices of each module with a kernel: `{module: {"left": …, "right": …}}`.

    left: P_Lᵀ, `[layers, out, p]`; right: P_Rᵀ, `[layers, in, p]`; without the layer axis for the
    embeddings, `embed_in` being taken for a linear module of one-hot inputs. Made once in a
    process, and read-only.
    """
    widths = tuple(
        (parameter.path.rpartition("/")[0], parameter.stacked, parameter.shape(config))
        for parameter in TABLE
        if parameter.path.endswith(("/kernel", "/embedding"))
    )
    return dict(_matrices(projection, widths))


@lru_cache(maxsize=4)
def _matrices(
    projection: Projection, widths: tuple[tuple[str, bool, tuple[int, ...]], ...]
) -> dict[str, dict[str, NDArray[np.float32]]]:
    made = {}
    for module, stacked, shape in widths:
        sides = {}
        for role, width in (("left", shape[-1]), ("right", shape[-2])):
            names = (
                [module_name(module, layer) for layer in range(shape[0])] if stacked else [module]
            )
            each = [rademacher(f"{name}/{role}", projection, width).T for name in names]
            sides[role] = np.stack(each) if stacked else np.ascontiguousarray(each[0])
            sides[role].flags.writeable = False
        made[module] = sides
    return made


def module_name(module: str, layer: int) -> str:
    """What a module of the layers is called in torch: `layers.3.mlp.dense_4h_to_h`."""
    return module.replace("layers/", f"layers.{layer}.").replace("/", ".")


def rademacher(identifier: str, projection: Projection, width: int) -> NDArray[np.float32]:
    """The matrix of one side of a module, `[p, width]`, of entries ±1/√p.

    identifier: `layers.0.attention.dense/left`. A wider matrix begins with the narrower one.
    """
    if projection.seed is not None:
        identifier = f"{identifier}/seed{projection.seed}"
    digest = hashlib.md5(identifier.encode(), usedforsecurity=False).digest()
    key = np.frombuffer(digest[:8], "<u4")
    rows, blocks = projection.dimension, -(-width // _BITS)
    counters = np.zeros((4, rows, blocks), np.uint64)
    counters[0] = np.arange(blocks)
    counters[1] = np.arange(rows)[:, None]
    words = philox4x32(counters, (int(key[0]), int(key[1])))
    # Low bits first, and the first word first: the order of bits in little-endian words.
    octets = np.ascontiguousarray(np.moveaxis(words, 0, -1)).astype("<u4").view(np.uint8)
    bits = np.unpackbits(octets, axis=-1, bitorder="little").reshape(rows, -1)[:, :width]
    one = np.float32(1 / np.sqrt(rows))
    return np.where(bits, one, -one)


def philox4x32(counters: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox4x32-10 of counters `[4, …]` of 32 bits each, in words wide enough to multiply.

    Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011).
    """
    first, second, third, fourth = counters
    for i in range(10):
        keys = [np.uint64((k + i * weyl) & 0xFFFFFFFF) for k, weyl in zip(key, _WEYL, strict=True)]
        products = first * _ROUND[0], third * _ROUND[1]
        first, second, third, fourth = (
            (products[1] >> _HALF) ^ second ^ keys[0],
            products[1] & _LOW,
            (products[0] >> _HALF) ^ fourth ^ keys[1],
            products[0] & _LOW,
        )
    return np.stack([first, second, third, fourth])
