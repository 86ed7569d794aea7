"""Which dataset each sample of a blend comes from, and which documents each part of a split has.

GPT-NeoX deals the samples of a blend greedily: sample i comes from the dataset that lags furthest
behind its weight's share of max(i, 1), the first of them if several do. Source: GPT-NeoX v1.0,
megatron/data/blendable_dataset.py, helpers.cpp (build_blending_indices) and data_utils.py
(get_normalized_weights_and_num_samples, get_train_valid_test_split_).
"""

import operator
from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_DATASETS = 254  # upstream's limit
_WARM_UP = 64  # samples dealt before a stretch, so that what its guess got wrong evens out
_MOST_STRETCHES = 1 << 15
_STEPS = 64  # samples of each stretch written together: one cache line of bytes


def normalized_weights(weights: Sequence[float]) -> NDArray[np.float64]:
    """Weights as shares of one, by which upstream counts samples, `[datasets]` float64."""
    return np.asarray(weights, np.float64) / sum_in_order(weights)


def sum_in_order(values: Sequence[float]) -> float:
    """The sum as Python 3.8 formed it, one addition after the other; later ones round otherwise."""
    return reduce(operator.add, values)


def blending_indices(
    weights: Sequence[float] | NDArray[np.float64], size: int
) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """The dataset, and the sample within it, behind each of `size` samples of a blend.

    Every choice depends on those before it. So the samples are cut into stretches that are dealt
    side by side, each from a guess of what was taken before it. A stretch whose guess is not what
    the one before it ended with is dealt again from there, until all agree. That they agree, from
    the first on, is what makes the result the greedy one; the guesses only make it fast.

    Args:
        weights: of the datasets, at most 254; shares of one or not.
        size: how many samples to deal.

    Returns:
        Two arrays `[size]`: uint8, and int32 or, for 2^31 samples and more, int64.
    """
    shares = np.asarray(weights, np.float64)
    if not 1 <= len(shares) <= MOST_DATASETS:
        raise ValueError(f"{len(shares)} datasets given; a blend has 1 to {MOST_DATASETS}")
    shares = (shares / np.sum(shares))[:, None]
    warm_up = _WARM_UP * len(shares)
    number = int(np.clip(size // (4 * warm_up), 1, _MOST_STRETCHES))
    length = -(-size // number)
    dataset = np.empty((number, length), np.uint8)
    sample = np.empty((number, length), np.int32 if size < 2**31 else np.int64)

    starts = np.arange(number) * length
    taken = _guess(shares, np.maximum(starts - warm_up, 0))
    taken[:, 0] = 0  # which is no guess
    _deal(shares, starts[1:] - warm_up, taken[:, 1:], warm_up)
    wrong = np.arange(number)
    while wrong.size:
        ends = taken[:, wrong]
        _deal(shares, starts[wrong], ends, length, (dataset, sample, wrong))
        following = wrong + 1
        if following[-1] == number:
            ends, following = ends[:, :-1], following[:-1]
        differs = (taken[:, following] != ends).any(axis=0)
        taken[:, following] = ends
        wrong = following[differs]
    return dataset.reshape(-1)[:size], sample.reshape(-1)[:size]


def split_documents(shares: Sequence[float], documents: int) -> list[range]:
    """The documents of the train, validation and test part of a dataset, one after the other.

    Args:
        shares: of the three parts; normalised here.
        documents: how many the dataset has.
    """
    total = sum_in_order(shares)
    bounds = [0]
    for share in shares:
        bounds.append(bounds[-1] + round(share / total * documents))
    # What rounding gave too much or too little is taken from every bound but the first.
    excess = bounds[-1] - documents
    bounds = [0, *(bound - excess for bound in bounds[1:])]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def _guess(shares: NDArray[np.float64], places: NDArray[np.int64]) -> NDArray[np.float64]:
    """About what each dataset has given before each place, `[datasets, places]`.

    A dataset of small weight is dealt as soon as it lags at all, and then not for long; the one of
    the greatest weight makes up the rest and soon evens out.
    """
    taken = np.ceil(shares * places)
    greatest = np.argmax(shares)
    taken[greatest] += places - taken.sum(axis=0)
    return taken


def _deal(
    shares: NDArray[np.float64],
    places: NDArray[np.int64],
    taken: NDArray[np.float64],
    count: int,
    out: tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.int64]] | None = None,
) -> None:
    """Deals `count` samples from each place on, side by side; `taken` is brought up to date.

    out: where to write datasets and samples, both `[stretches, count]`, and into which stretches.
    """
    lag, best = np.empty_like(taken), np.empty(len(places))
    chosen = np.empty(taken.shape, bool)
    datasets = np.zeros((_STEPS, len(places)), np.uint8)
    samples = np.zeros((_STEPS, len(places)))
    for step in range(count):
        row = step % _STEPS
        np.multiply(shares, np.maximum(places + step, 1), out=lag)
        lag -= taken
        np.copyto(best, lag[0])
        datasets[row] = 0
        for d in range(1, len(shares)):
            np.copyto(datasets[row], d, where=lag[d] > best)
            np.maximum(best, lag[d], out=best)
        for d in range(len(shares)):
            np.equal(datasets[row], d, out=chosen[d])
            if out is not None:
                np.copyto(samples[row], taken[d], where=chosen[d])
        taken += chosen
        if out is not None and (row == _STEPS - 1 or step == count - 1):
            columns = slice(step - row, step + 1)
            out[0][out[2], columns] = datasets[: row + 1].T
            out[1][out[2], columns] = samples[: row + 1].T
