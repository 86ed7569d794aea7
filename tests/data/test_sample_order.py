"""GPT-NeoX v1.0's order, against vectors made by its own functions and a plain walk."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pythia_jax.data import sample_order
from pythia_jax.data.sample_order import (
    SplitSizes,
    build_sample_order,
    epochs_needed,
    samples_to_draw,
)


def sha256(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def walk(sizes, document_order, num_samples, sequence_length):
    """Where samples start, found by going through the documents one after the other."""
    places = [(0, 0)]
    position, used = 0, 0
    for _ in range(num_samples):
        wanted = sequence_length + 1
        while True:
            left = sizes[document_order[position]] - used
            if left >= wanted:
                # The next sample begins on the last token of this one.
                used += wanted - 1
                break
            wanted -= left
            position, used = position + 1, 0
        places.append((position, used))
    return places


def test_small_vector_of_neox():
    sizes = np.array([7, 3, 12, 5, 9, 1, 20, 4], np.int32)
    order = build_sample_order(sizes, num_samples=10, sequence_length=8, seed=1234)
    assert order.epochs == 2
    assert list(order.document_order) == [5, 3, 0, 4, 6, 2, 2, 7, 1, 1, 0, 4, 5, 6, 3, 7]
    assert order.sample_index.tolist() == [
        [0, 0], [2, 2], [3, 3], [4, 2], [4, 10], [4, 18], [5, 6], [6, 2], [6, 10],
        [8, 2], [10, 4], [11, 5], [13, 3], [13, 11], [13, 19], [15, 2],
    ]  # fmt: skip
    assert list(order.shuffle) == [9, 7, 4, 3, 11, 2, 13, 1, 12, 5, 0, 8, 14, 6, 10]


def test_large_vector_of_neox():
    sizes = np.random.RandomState(0).randint(1, 500, size=1000).astype(np.int32)
    order = build_sample_order(sizes, num_samples=8000, sequence_length=64, seed=1234)
    assert (order.epochs, len(order.shuffle)) == (3, 11696)
    assert [order.document_order.dtype, order.sample_index.dtype, order.shuffle.dtype] == [
        np.int32,
        np.int32,
        np.uint32,
    ]
    assert list(order.document_order[:8]) == [936, 85, 45, 230, 676, 965, 453, 634]
    assert list(order.shuffle[:8]) == [3995, 9384, 7926, 9900, 5244, 4945, 1332, 3928]
    assert [sha256(a) for a in (order.document_order, order.sample_index, order.shuffle)] == [
        "deba9b07e6d1c8fabe7e0691dfa669b3510ee0b23b2b3d25b1b91dea05257df2",
        "79f5e53b74e06bf6442365a30419e95b8980f31269d1fa531a8769573511cc60",
        "bbde561a5d67afdf834415d51655e6fbbd9ae43c09a3bdc1aa120e52dce0f252",
    ]


def test_shuffles_are_those_of_the_legacy_generator():
    rng = np.random.RandomState(1234)
    first, second = np.arange(10, dtype=np.int32), np.arange(10, dtype=np.uint32)
    rng.shuffle(first)
    rng.shuffle(second)
    assert list(first) == [7, 2, 9, 1, 0, 8, 4, 5, 6, 3]
    assert list(second) == [7, 3, 5, 1, 4, 8, 0, 2, 6, 9]
    order = build_sample_order(np.full(10, 2), num_samples=10, sequence_length=1, seed=1234)
    assert list(order.document_order) == list(first)


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 7, 40]), min_size=1, max_size=60),
    sequence_length=st.integers(1, 12),
    num_samples=st.integers(2, 60),
    seed=st.integers(0, 2**32 - 1),
    chunk=st.sampled_from([1, 2, 7, 1 << 18]),
)
def test_sample_index_equals_a_walk_over_the_documents(
    sizes, sequence_length, num_samples, seed, chunk
):
    sizes = [*sizes, sequence_length + 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_order, "_CHUNK", chunk)
        order = build_sample_order(np.array(sizes, np.int32), num_samples, sequence_length, seed)
    total = len(order.shuffle)
    assert total >= num_samples
    assert (order.epochs * sum(sizes) - 1) // sequence_length == total
    expected = walk(sizes, order.document_order, total, sequence_length)
    assert order.sample_index.tolist() == [list(place) for place in expected]


def test_first_row_stays_on_an_empty_first_document():
    sizes = np.array([0, 0, 9, 0, 0], np.int32)
    orders = [build_sample_order(sizes, 2, 4, seed) for seed in range(20)]
    starts_empty = [order for order in orders if sizes[order.document_order[0]] == 0]
    assert starts_empty
    assert all(order.sample_index[0].tolist() == [0, 0] for order in orders)


def test_a_sample_may_start_on_the_last_token_of_a_document():
    order = build_sample_order(np.array([5, 5, 5, 5], np.int32), 4, 4, seed=0)
    assert order.sample_index.tolist() == [[0, 0], [0, 4], [1, 3], [2, 2], [3, 1]]


def test_only_the_chosen_documents_are_used():
    sizes = np.arange(100, dtype=np.int32)
    order = build_sample_order(sizes, 300, 10, seed=3, documents=np.arange(20, 40))
    assert order.epochs == 6
    assert sorted(order.document_order) == sorted([*range(20, 40)] * 6)


def test_length_is_one_less_than_the_samples():
    order = build_sample_order(np.full(50, 9, np.int32), 50, 8, seed=1)
    assert len(order) == len(order.shuffle) - 1 == (50 * 9 - 1) // 8 - 1


def test_offsets_beyond_32_bits_do_not_overflow():
    sizes = np.full(8, 2**31 - 1, np.int32)
    order = build_sample_order(sizes, 100, 2**24, seed=5)
    flat = order.sample_index[:, 0].astype(np.int64) * (2**31 - 1) + order.sample_index[:, 1]
    assert np.array_equal(flat, np.arange(len(order.shuffle) + 1) * 2**24)


@pytest.mark.parametrize(
    ("tokens", "samples", "length", "epochs"),
    [(61, 10, 8, 2), (249515, 8000, 64, 3), (81, 10, 8, 1), (80, 10, 8, 2), (9, 0, 8, 1)],
)
def test_epochs_are_the_least_that_give_the_samples(tokens, samples, length, epochs):
    assert epochs_needed(tokens, samples, length) == epochs
    assert (epochs * tokens - 1) // length >= samples
    assert epochs == 1 or ((epochs - 1) * tokens - 1) // length < samples


@pytest.mark.parametrize(
    ("every", "batches", "samples"),
    [(100000, 20, 20583), (40000, 40, 41165), (1000, 1440, 1481933)],
)
def test_numbers_of_samples_are_pythias(every, batches, samples):
    sizes = SplitSizes.of_run(steps=143000, evaluate_every=every, evaluation_steps=10)
    assert (sizes.train, sizes.validation, sizes.test) == (143000, batches, 10)
    assert samples_to_draw(sizes.train, 1024) == 147164160
    assert samples_to_draw(sizes.validation, 1024) == samples
    assert samples_to_draw(sizes.test, 1024) == 10292


@pytest.mark.parametrize(
    ("sizes", "samples", "length", "message"),
    [
        ([], 5, 8, "hold 0 tokens, but one sample takes 9"),
        ([0, 0, 0], 5, 8, "hold 0 tokens"),
        ([4, 4], 5, 8, "hold 8 tokens, but one sample takes 9"),
        ([12], 1, 8, "one sample .* never serves the last"),
        ([12], -1, 8, "cannot make -1 samples"),
        ([12], 5, 0, "sequence_length 0"),
    ],
)
def test_data_that_gives_no_samples_is_one_clear_error(sizes, samples, length, message):
    with pytest.raises(ValueError, match=message):
        build_sample_order(np.array(sizes, np.int32), samples, length, seed=1)
