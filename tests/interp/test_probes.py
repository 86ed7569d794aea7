"""Linear probes against NumPy's least squares, and on directions that were planted."""

import numpy as np
import pytest

import pythia_jax as pj
from pythia_jax.interp import linear_probe

RNG = np.random.default_rng(0)
N, WIDTH = 120, 10
X = RNG.standard_normal((N, WIDTH)) @ RNG.standard_normal((WIDTH, WIDTH)) + 3
Y = X @ RNG.standard_normal((WIDTH, 2)) + 1 + 0.5 * RNG.standard_normal((N, 2))


def normal_equations(x, y, ridge):
    """Weights and bias with the intercept as an unpunished column of ones."""
    ones = np.c_[x, np.ones(len(x))]
    punished = ridge * np.eye(x.shape[1] + 1)
    punished[-1, -1] = 0
    solved = np.linalg.solve(ones.T @ ones + punished, ones.T @ y)
    return solved[:-1], solved[-1]


@pytest.mark.parametrize("ridge", [0.1, 50.0])
def test_a_regression_solves_the_normal_equations(ridge):
    probe = linear_probe.fit(X, Y, ridge=ridge)
    weights, bias = normal_equations(X, Y, ridge)
    np.testing.assert_allclose(probe.weights, weights, rtol=0, atol=1e-9)
    np.testing.assert_allclose(probe.bias, bias, rtol=0, atol=1e-9)
    one = linear_probe.fit(X.astype(np.float32), Y[:, 0], ridge=ridge)
    assert one.predict(X).shape == (N,) and probe.predict(X).shape == (N, 2)
    np.testing.assert_allclose(one.predict(X), probe.predict(X)[:, 0], rtol=0, atol=1e-4)


def test_without_ridge_it_is_numpys_least_squares_the_smallest_of_several():
    for x in (X, X[:6], np.c_[X, X[:, :3]]):  # enough rows, too few, and columns twice
        probe = linear_probe.fit(x, Y[: len(x)], ridge=0)
        middle, level = x.mean(axis=0), Y[: len(x)].mean(axis=0)
        weights = np.linalg.lstsq(x - middle, Y[: len(x)] - level, rcond=1e-12)[0]
        np.testing.assert_allclose(probe.weights, weights, rtol=0, atol=1e-8)


def test_classes_are_told_from_the_rest_and_planted_directions_found():
    directions = np.linalg.qr(RNG.standard_normal((WIDTH, 3)))[0].T
    names = np.array(["cat", "dog", "owl"])[RNG.integers(0, 3, 600)]
    x = 0.3 * RNG.standard_normal((600, WIDTH))
    x += 2 * directions[np.searchsorted(["cat", "dog", "owl"], names)]
    probe = linear_probe.fit(x[:400], names[:400], ridge=1.0)
    assert probe.classes is not None and probe.classes.tolist() == ["cat", "dog", "owl"]
    assert linear_probe.score(probe, x[400:], names[400:]) >= 0.99
    for i in range(3):
        # What raises one class and not the others, within the plane of the three.
        wanted = directions[i] - directions.mean(axis=0)
        cosine = probe.weights[:, i] @ wanted
        cosine /= np.linalg.norm(probe.weights[:, i]) * np.linalg.norm(wanted)
        assert cosine > 0.98
        signs = np.where(names[:400] == probe.classes[i], 1.0, -1.0)
        alone, _ = normal_equations(x[:400], signs, 1.0)
        np.testing.assert_allclose(probe.weights[:, i], alone, rtol=0, atol=1e-9)
    shuffled = RNG.permutation(names)
    assert linear_probe.cross_validated(x, shuffled).mean() < 0.5


def test_two_classes_of_booleans():
    y = X[:, 0] > 3
    probe = linear_probe.fit(X, y, ridge=1e-3)
    assert linear_probe.score(probe, X, y) == (probe.predict(X) == y).mean() > 0.85


def test_r_squared_is_one_of_the_truth_and_nothing_of_the_mean():
    exact = X @ np.ones(WIDTH)
    probe = linear_probe.fit(X, exact, ridge=0)
    assert linear_probe.score(probe, X, exact) == pytest.approx(1, abs=1e-12)
    blind = linear_probe.fit(X, exact, ridge=1e15)
    assert linear_probe.score(blind, X, exact) == pytest.approx(0, abs=1e-6)
    both = linear_probe.fit(X, Y, ridge=1.0)
    residual = ((Y - both.predict(X)) ** 2).sum(axis=0) / ((Y - Y.mean(axis=0)) ** 2).sum(axis=0)
    assert linear_probe.score(both, X, Y) == pytest.approx((1 - residual).mean())


def test_each_fold_is_scored_by_a_probe_that_has_not_seen_it():
    # A row's own column gives it away: nothing is learned of the rows left out.
    y = RNG.standard_normal(20)
    assert linear_probe.score(linear_probe.fit(np.eye(20), y, ridge=1e-9), np.eye(20), y) > 0.99
    assert linear_probe.cross_validated(np.eye(20), y, ridge=1e-9, folds=4).max() <= 0
    found = linear_probe.cross_validated(X, Y, folds=7, seed=1)
    assert found.shape == (7,) and found.min() > 0.8
    np.testing.assert_array_equal(found, linear_probe.cross_validated(X, Y, folds=7, seed=1))


def test_bad_input_is_one_clear_error():
    fit, probe = linear_probe.fit, linear_probe.fit(X, Y)
    with pytest.raises(ValueError, match=r"activations of shape \(120, 10, 1\): \[n, width\]"):
        fit(X[..., None], Y)
    with pytest.raises(ValueError, match=r"targets of shape \(5,\) .* for 120 rows"):
        fit(X, np.zeros(5))
    with pytest.raises(ValueError, match="activations: row 7 is not finite"):
        fit(np.where(np.arange(N)[:, None] == 7, np.nan, X), Y)
    with pytest.raises(ValueError, match="targets: row 3 is not finite"):
        fit(X, np.where(np.arange(N) == 3, np.inf, 0.0))
    with pytest.raises(ValueError, match="all 120 targets are 1"):
        fit(X, np.ones(N, int))
    with pytest.raises(ValueError, match="ridge -1: 0 or more"):
        fit(X, Y, ridge=-1)
    with pytest.raises(ValueError, match="of width 9: the probe reads 10"):
        probe.predict(X[:, :9])
    with pytest.raises(ValueError, match="targets are classes, and the probe was fitted to num"):
        linear_probe.score(probe, X, np.arange(N))
    with pytest.raises(ValueError, match="with 1 outputs: the probe has 2"):
        linear_probe.score(probe, X, Y[:, 0])
    with pytest.raises(ValueError, match="all the same is not defined"):
        linear_probe.score(probe, X, np.ones((N, 2)))
    with pytest.raises(ValueError, match="folds 1: from 2 to 120"):
        linear_probe.cross_validated(X, Y, folds=1)


def test_the_packages_door_opens_modules_as_such():
    assert pj.interp.linear_probe.fit is linear_probe.fit
    assert callable(pj.interp.tuned_lens.fit) and callable(pj.interp.logit_lens)
