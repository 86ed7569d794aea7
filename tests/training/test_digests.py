"""Digests see every change of a bit or of its place, and not how an array is cut."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pythia_jax.training.digests import BLOCK, changed, digests, part_sums, written

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint32", "int8", "bool")


def digest(x: np.ndarray) -> str:
    return digests({"x": jnp.asarray(x)})["x"]


def of_random_bits(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    kind = jnp.dtype(dtype)
    high = 2 if dtype == "bool" else 256
    size = int(np.prod(shape)) * kind.itemsize
    return np.random.default_rng(seed).integers(0, high, size, np.uint8).view(kind).reshape(shape)


def by_hand(x: np.ndarray) -> str:
    """The digest of an array of 32-bit elements, in Python's own integers."""

    def mix(v: int) -> int:
        v = (v ^ v >> 16) * 0x85EBCA6B % 2**32
        v = (v ^ v >> 13) * 0xC2B2AE35 % 2**32
        return v ^ v >> 16

    high = low = 0
    for place, word in enumerate(map(int, x.view(np.uint32).ravel())):
        place = mix((place + 0x9E3779B9) % 2**32)
        high += mix(word ^ place)
        low += mix(((word ^ 0x5BD1E995) + place * 0xCC9E2D51) % 2**32)
    return f"{high % 2**32:08x}{low % 2**32:08x}"


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4)])
def test_a_digest_is_the_sum_it_is_said_to_be(shape: tuple[int, ...]) -> None:
    x = of_random_bits(shape, "float32")
    assert digest(x) == by_hand(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_single_flipped_bit_shows(dtype: str) -> None:
    x = of_random_bits((3, 5), dtype)
    seen = {digest(x)}
    raw = x.view(np.uint8)
    flips = [(place, 1 << bit) for place in np.ndindex(raw.shape) for bit in range(8)]
    if dtype == "bool":
        flips = [(place, 1) for place in np.ndindex(raw.shape)]
    for place, bit in flips:
        raw[place] ^= bit
        seen.add(digest(x))
        raw[place] ^= bit
    assert len(seen) == len(flips) + 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 63), st.integers(0, 63), st.sampled_from(["float32", "bfloat16"]))
def test_swapped_elements_show_unless_they_are_equal(i: int, j: int, dtype: str) -> None:
    x = of_random_bits((8, 8), dtype)
    y = x.copy().ravel()
    y[[i, j]] = y[[j, i]]
    same = x.tobytes() == y.tobytes()
    assert (digest(x) == digest(y.reshape(8, 8))) == same


def test_shifted_transposed_and_swapped_rows_show() -> None:
    x = of_random_bits((16, 16), "float32")
    others = [np.roll(x, 1), np.roll(x, 1, 0), np.roll(x, 1, 1), x.T, x[::-1], np.zeros_like(x)]
    assert len({digest(y) for y in [x, *others]}) == 7


def test_zero_and_minus_zero_differ_and_not_a_number_is_itself() -> None:
    assert digest(np.array([0.0], np.float32)) != digest(np.array([-0.0], np.float32))
    nan = np.array([0x7FC00001], np.uint32).view(np.float32)
    other = np.array([0x7FC00002], np.uint32).view(np.float32)
    assert digest(nan) == digest(nan.copy()) != digest(other)


def test_leaves_are_named_by_their_path_and_compared_by_name() -> None:
    tree = {"a": {"b": jnp.ones(3)}, "c": [jnp.zeros(2)]}
    found = digests(tree)
    assert list(found) == ["a/b", "c/0"]
    assert changed(found, found) == []
    assert changed({**found, "c/0": "0" * 16}, found) == ["c/0"]
    assert changed({"a/b": found["a/b"]}, found) == ["c/0"], "one that was not saved is no match"


ON_MESHES = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from pythia_jax.training.digests import digests
x = np.random.default_rng(0).standard_normal((8, 16, 24)).astype(np.float32)
y = x.astype(jax.numpy.bfloat16)
seen = set()
cuts = [((8, 1), P("a")), ((4, 2), P(None, "a", "b")), ((2, 4), P("b", "a")), ((8, 1), P())]
for shape, cut in cuts:
    mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    put = lambda v: jax.device_put(v, NamedSharding(mesh, cut))
    seen.add(tuple(digests({"x": put(x), "y": put(y)}).values()))
seen.add(tuple(digests({"x": jax.numpy.asarray(x), "y": jax.numpy.asarray(y)}).values()))
print(len(jax.devices()), len(seen))
"""


def test_a_digest_does_not_depend_on_the_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    command = [sys.executable, "-c", ON_MESHES]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["8", "1"], done.stderr


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cuts", [(), (3,), (1, 2, 4)])
def test_sums_of_parts_add_up_to_the_digest(dtype: str, cuts: tuple[int, ...]) -> None:
    x = of_random_bits((5, 7, 3), dtype)
    parts = np.split(x, cuts)
    starts = np.cumsum([0, *(part.size for part in parts)])
    total = sum(part_sums(part, int(at)) for part, at in zip(parts, starts[:-1], strict=True))
    assert written(total) == digest(x)


def test_parts_larger_than_a_block_are_cut_up_rightly() -> None:
    x = of_random_bits((2, BLOCK + 5), "float16")
    assert written(part_sums(x[0], 0) + part_sums(x[1], x[0].size)) == digest(x)
    assert written(part_sums(x.T.copy().T, 0)) == digest(x)
