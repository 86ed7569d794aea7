"""Projections: Philox as its authors tell it, and matrices that a name alone decides."""

import numpy as np
import pytest
from reference import TINY

from pythia_jax.interp.projection import Projection, matrices, module_name, philox4x32, rademacher


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    counters = np.array(counter, np.uint64)[:, None]
    assert tuple(philox4x32(counters, key)[:, 0].tolist()) == expected


def test_matrices_are_those_of_their_names_and_no_two_are_alike():
    made = matrices(Projection(5), TINY)
    for module, side, width in (
        ("layers/attention/query_key_value", "left", 144),
        ("layers/mlp/dense_4h_to_h", "right", 192),
    ):
        stacked = made[module][side]
        assert stacked.shape == (3, width, 5)
        for layer in range(3):
            identifier = f"{module_name(module, layer)}/{side}"
            np.testing.assert_array_equal(
                stacked[layer], rademacher(identifier, Projection(5), width).T
            )
    assert made["embed_in"]["right"].shape == (130, 5)
    assert made["embed_out"]["left"].shape == (130, 5)
    distinct = {
        layer.tobytes()
        for module, sides in made.items()
        if module.startswith("layers/")
        for side in sides.values()
        for layer in side[:, :48]
    }
    assert len(distinct) == 4 * 2 * 3


def test_names_are_those_of_torch():
    assert module_name("layers/mlp/dense_h_to_4h", 11) == "layers.11.mlp.dense_h_to_4h"


def test_a_wider_matrix_begins_with_the_narrower_one():
    wide, narrow = (rademacher("m/left", Projection(3), width) for width in (300, 130))
    np.testing.assert_array_equal(wide[:, :130], narrow)


def test_entries_are_signs_over_the_root_and_projections_keep_products():
    gradient, other = np.random.default_rng(0).standard_normal((2, 40, 30))
    products = []
    for seed in range(300):
        left, right = (rademacher(f"m/{s}", Projection(8, seed), n)
                       for s, n in (("left", 40), ("right", 30)))  # fmt: skip
        assert set(np.unique(left)) == {-np.float32(8**-0.5), np.float32(8**-0.5)}
        small, smaller = (left @ g @ right.T for g in (gradient, other))
        products.append((small * smaller).sum())
    true = (gradient * other).sum()
    error = np.std(products) / np.sqrt(len(products))
    assert abs(np.mean(products) - true) < 4 * error


def test_matrices_are_made_once_and_cannot_be_changed():
    made = matrices(Projection(4, 1), TINY)["embed_in"]["left"]
    assert matrices(Projection(4, 1), TINY)["embed_in"]["left"] is made
    with pytest.raises(ValueError, match="read-only"):
        made[0] = 1


def test_a_dimension_below_1_is_refused():
    with pytest.raises(ValueError, match="dimension 0: must be at least 1"):
        Projection(0)
