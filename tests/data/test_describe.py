"""What `data order` tells is what is served."""

import re
from typing import TypeVar

import brute_force
import numpy as np
import pytest

from pythia_jax.data import batches
from pythia_jax.data.describe import describe_order
from pythia_jax.data.samples import BlendedSamples, NeoxSamples

T = TypeVar("T")


def samples_of(config, kind: type[T]) -> T:
    samples = batches(config).samples
    assert isinstance(samples, kind)
    return samples


def numbers(text, pattern):
    match = re.search(pattern, text)
    assert match, f"{pattern} not in:\n{text}"
    return [int(number.replace(",", "")) for number in match.groups()]


@pytest.fixture
def paths(tmp_path):
    return tuple(
        brute_force.write(tmp_path / str(i), brute_force.corpus(i, 40 + 30 * i, 20))
        for i in range(2)
    )


def test_one_path_is_told_in_numbers(paths):
    config = brute_force.config(train=paths[:1], steps=200)
    text = describe_order(config)
    samples = samples_of(config, NeoxSamples)
    order = samples.order
    tokens = int(samples.dataset.sizes.sum())
    assert text.startswith("train_0: 200 steps of 4 rows, 800 samples, 5,600 tokens")
    assert numbers(text, r"documents +([\d,]+), ([\d,]+) tokens") == [40, tokens]
    assert numbers(text, r"epochs +([\d,]+), shuffled together") == [order.epochs]
    assert numbers(text, r"samples +([\d,]+) are served") == [len(samples)]
    assert "order: 0.0 MiB, ready in" in text


def test_an_epoch_ends_with_the_step_that_makes_its_tokens_full(paths):
    config = brute_force.config(train=paths[:1], steps=200)
    samples = samples_of(config, NeoxSamples)
    tokens = int(samples.dataset.sizes.sum())
    text = describe_order(config)
    for epoch in (1, 2, 3):
        count, step = numbers(text, rf"epoch {epoch} +([\d,]+) tokens, .* end of step ([\d,]+)")
        assert count == epoch * tokens
        # Seven new tokens a row, four rows a step.
        assert step * 28 < count <= (step + 1) * 28
    assert f"and {samples.order.epochs - 8} more" in text


def test_paths_of_a_blend_are_told_one_by_one(paths):
    config = brute_force.config(train=paths, train_weights=(0.7, 0.3), steps=150)
    samples = samples_of(config, BlendedSamples)
    text = describe_order(config)
    first, second = text.split(f"{paths[1]}:")
    for number, part in enumerate((first, second)):
        own = np.flatnonzero(samples.dataset[:600] == number)
        assert numbers(part, r"used +([\d,]+)") == [len(own)]
        count, step = numbers(part, r"epoch 1 +([\d,]+) tokens, .* end of step ([\d,]+)")
        needed = -(-count // 7)
        assert own[needed - 1] // 4 == step


def test_an_epoch_that_is_not_reached_is_said_to_be(paths):
    text = describe_order(brute_force.config(train=paths[:1], steps=2))
    assert "more than are served" in text


def test_preshuffled_rows_have_no_order(tmp_path):
    np.ones((50, 8), "<u2").tofile(tmp_path / "rows.bin")
    config = brute_force.config(train=(str(tmp_path / "rows"),), order="preshuffled")
    assert "50 rows, read as they lie" in describe_order(config)
