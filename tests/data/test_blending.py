"""Blends dealt as by GPT-NeoX's loop, and splits cut as by its arithmetic."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pythia_jax.data import blending
from pythia_jax.data.blending import blending_indices, normalized_weights, split_documents

WEIGHTS = st.one_of(
    st.sampled_from([1.0, 2.0, 3.0, 0.1, 0.3, 0.7, 1 / 3, 0.5, 0.25]),
    st.floats(1e-9, 1e3),
)


def deal(weights, size):
    """(dataset, sample) of each of `size` samples of a blend (build_blending_indices)."""
    shares = np.array(weights, np.float64)
    shares = (shares / np.sum(shares)).tolist()
    taken = [0] * len(shares)
    dealt = []
    for i in range(size):
        lags = [share * float(max(i, 1)) - float(t) for share, t in zip(shares, taken, strict=True)]
        most = lags.index(max(lags))
        dealt.append((most, taken[most]))
        taken[most] += 1
    return dealt


def parts(split, size):
    """Documents of the train, validation and test part (get_train_valid_test_split_)."""
    shares = [float(share) for share in split.split("," if "," in split else "/")]
    shares += [0.0] * (3 - len(shares))
    total = shares[0] + shares[1] + shares[2]
    ends = []
    for share in shares:
        ends.append((ends[-1] if ends else 0) + round(share / total * float(size)))
    excess = ends[2] - size
    ends = [end - excess for end in ends]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def assert_dealt_as_by_the_loop(weights, size):
    dataset, sample = blending_indices(weights, size)
    assert dataset.dtype == np.uint8
    assert list(zip(dataset.tolist(), sample.tolist(), strict=True)) == deal(weights, size)


def test_a_blend_by_hand():
    dataset, sample = blending_indices([0.7, 0.3], 10)
    assert dataset.tolist() == [0, 1, 0, 0, 1, 0, 0, 1, 0, 0]
    assert sample.tolist() == [0, 0, 1, 2, 1, 3, 4, 2, 5, 6]


@settings(max_examples=40, deadline=None)
@given(weights=st.lists(WEIGHTS, min_size=1, max_size=6), size=st.integers(0, 6000))
@example(weights=[1.0, 1.0], size=6000)  # a tie at every second sample
@example(weights=[1.0] * 6, size=6000)
@example(weights=[0.5, 0.25, 0.25], size=6000)
@example(weights=[1e-300, 1.0], size=6000)
def test_a_blend_is_dealt_as_by_the_loop(weights, size):
    assert_dealt_as_by_the_loop(weights, size)


@settings(max_examples=20, deadline=None)
@given(weights=st.lists(WEIGHTS, min_size=2, max_size=6), seed=st.integers(0, 1000))
def test_stretches_dealt_from_wrong_guesses_are_put_right(weights, seed):
    """However wrong the guesses, what they leave is the loop's blend."""
    rng = np.random.default_rng(seed)

    def wild(shares, places):
        return rng.integers(0, 50, (len(shares), len(places))).astype(float)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blending, "_guess", wild)
        patch.setattr(blending, "_WARM_UP", 2)
        assert_dealt_as_by_the_loop(weights, 3000)


@pytest.mark.slow
def test_a_long_blend_of_many_datasets_is_dealt_as_by_the_loop():
    weights = np.random.default_rng(0).dirichlet(np.ones(22)) + 1e-6
    assert_dealt_as_by_the_loop(weights, 1_000_000)


def test_samples_of_a_member_are_numbered_one_after_the_other():
    dataset, sample = blending_indices([0.2, 0.5, 0.3], 300_000)
    for member in range(3):
        numbers = sample[dataset == member]
        assert np.array_equal(numbers, np.arange(len(numbers)))


@pytest.mark.parametrize("count", [0, 255])
def test_a_blend_has_at_most_254_datasets(count):
    with pytest.raises(ValueError, match=f"{count} datasets given"):
        blending_indices(np.ones(count), 10)


def test_weights_are_added_one_after_the_other():
    """Compensated summing, which newer Pythons do, and pairwise summing round otherwise."""
    weights = [0.1] * 10
    assert normalized_weights(weights)[0] == 0.1 / 0.9999999999999999


@settings(max_examples=200)
@given(
    shares=st.lists(st.floats(0, 1000), min_size=1, max_size=3).filter(lambda s: sum(s) > 0),
    documents=st.integers(0, 10**9),
    between=st.sampled_from([",", "/", ", "]),
)
def test_a_split_is_cut_by_neox_arithmetic(shares, documents, between):
    padded = [*shares, *[0.0] * (3 - len(shares))]
    assert split_documents(padded, documents) == parts(between.join(map(repr, shares)), documents)


@pytest.mark.parametrize(
    ("shares", "documents", "bounds"),
    [
        ((969, 30, 1), 1000, [0, 969, 999, 1000]),
        ((969, 30, 1), 7, [0, 7, 7, 7]),
        # Each half is rounded to the even number, and the one too many taken from both bounds.
        ((1, 1, 0), 3, [0, 1, 3, 3]),
        ((80, 0, 0), 5, [0, 5, 5, 5]),
        ((1, 1, 1), 100, [0, 34, 67, 100]),
    ],
)
def test_splits_by_hand(shares, documents, bounds):
    parts = split_documents(shares, documents)
    assert [parts[0].start, *(part.stop for part in parts)] == bounds
