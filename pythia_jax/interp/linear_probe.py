"""Linear probes in closed form: what can be read off activations by a linear map.

Ridge regression, min ‖Y - XW - b‖² + ridge · ‖W‖² with b free (Hoerl and Kennard, 1970), by the
singular values of the centred activations, in float64 on the host. Of classes each is told from
the rest: Y is +1 for a row of the class and -1 for another, and the largest output decides.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A fitted probe: activations @ weights + bias.

    weights: a column an output (a target, or a class). classes: those of the columns; None of a
    regression. flat: whether the targets were `[n]`.
    """

    weights: Float[NDArray, "width outputs"]
    bias: Float[NDArray, " outputs"]
    classes: NDArray | None = None
    flat: bool = True

    def outputs(self, activations: Float[ArrayLike, "n width"]) -> Float[NDArray, "n outputs"]:
        """Raises ValueError for activations of another width."""
        x = _matrix(activations)
        if x.shape[1] != len(self.weights):
            raise ValueError(
                f"activations of width {x.shape[1]}: the probe reads {len(self.weights)}"
            )
        return x @ self.weights + self.bias

    def predict(self, activations: Float[ArrayLike, "n width"]) -> NDArray:
        """Classes `[n]`, or numbers in the shape that the targets had."""
        found = self.outputs(activations)
        if self.classes is not None:
            return self.classes[found.argmax(axis=1)]
        return found[:, 0] if self.flat else found


def fit(
    activations: Float[ArrayLike, "n width"], targets: ArrayLike, *, ridge: float = 1.0
) -> LinearProbe:
    """The probe that minimises the squared error plus ridge · ‖weights‖².

    targets: floats, `[n]` or `[n, outputs]`, for a regression; whole numbers, booleans or strings,
    `[n]`, are classes. ridge: in units of activations squared, summed over rows; 0 is least
    squares, of several solutions the smallest.

    Raises ValueError for shapes that do not fit, a single class, and what is not finite, naming
    the row.
    """
    x = _matrix(activations)
    y, classes, flat = _targets(targets, len(x))
    if not (np.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge {ridge}: 0 or more")
    if classes is not None and len(classes) < 2:
        raise ValueError(f"all {len(x)} targets are {classes[0]}: nothing to tell apart")
    middle, level = x.mean(axis=0), y.mean(axis=0)
    left, values, right = np.linalg.svd(x - middle, full_matrices=False)
    floor = np.finfo(np.float64).eps * max(x.shape) * values.max(initial=0)
    # Directions in which nothing varies would be divided by nothing.
    gain = np.divide(values, values**2 + ridge, out=np.zeros_like(values), where=values > floor)
    weights = right.T @ (gain[:, None] * (left.T @ (y - level)))
    return LinearProbe(weights, level - middle @ weights, classes, flat)


def score(
    probe: LinearProbe, activations: Float[ArrayLike, "n width"], targets: ArrayLike
) -> float:
    """The share of rows whose class is right; of a regression R², the mean over outputs.

    R² is 1 - (squared error) / (squared deviation from these targets' mean): 0 for a guess of the
    mean, and below for worse.

    Raises ValueError for shapes that do not fit, targets of another kind, and R² of targets that
    do not vary.
    """
    found = probe.predict(activations)
    y, classes, _ = _targets(targets, len(found))
    if (classes is None) != (probe.classes is None):
        kinds = "numbers", "classes"
        raise ValueError(
            f"targets are {kinds[classes is not None]}, and the probe was fitted to "
            f"{kinds[probe.classes is not None]} (floats are numbers, all else classes)"
        )
    if classes is not None:
        return float((found == np.asarray(targets)).mean())
    found = found.reshape(len(found), -1)
    if found.shape != y.shape:
        raise ValueError(f"targets with {y.shape[1]} outputs: the probe has {found.shape[1]}")
    deviation = ((y - y.mean(axis=0)) ** 2).sum(axis=0)
    if not deviation.all():
        raise ValueError("R² of targets that are all the same is not defined")
    return float((1 - ((y - found) ** 2).sum(axis=0) / deviation).mean())


def cross_validated(
    activations: Float[ArrayLike, "n width"],
    targets: ArrayLike,
    *,
    ridge: float = 1.0,
    folds: int = 5,
    seed: int = 0,
) -> Float[NDArray, " folds"]:
    """`score` on each of `folds` parts of the rows, of the probe fitted to the others.

    Rows are dealt at random, by `seed`. Rows that are not independent (positions of one sequence)
    make it look better than it is.

    Raises ValueError as `fit` and `score` do, and for more folds than rows.
    """
    x, y = _matrix(activations), np.asarray(targets)
    _targets(y, len(x))
    if not 2 <= folds <= len(x):
        raise ValueError(f"folds {folds}: from 2 to {len(x)}, the rows")
    return np.array(
        [
            score(fit(x[rest], y[rest], ridge=ridge), x[part], y[part])
            for part, rest in _dealt(len(x), folds, seed)
        ]
    )


def _dealt(rows: int, folds: int, seed: int) -> Iterator[tuple[NDArray, NDArray]]:
    order = np.random.default_rng(seed).permutation(rows)
    for fold in range(folds):
        own = np.arange(rows) % folds == fold
        yield order[own], order[~own]


def _matrix(activations: ArrayLike) -> Float[NDArray, "n width"]:
    x = np.asarray(activations, np.float64)
    if x.ndim != 2 or not x.size:
        raise ValueError(f"activations of shape {x.shape}: [n, width] is wanted, a row an example")
    bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if bad.size:
        raise ValueError(f"activations: row {bad[0]} is not finite")
    return x


def _targets(targets: ArrayLike, rows: int) -> tuple[NDArray[np.float64], NDArray | None, bool]:
    """Numbers `[n, outputs]`, the classes if they are such, and whether they were `[n]`."""
    given = np.asarray(targets)
    number = given.dtype.kind not in "iubUS"
    if given.ndim not in ((1, 2) if number else (1,)) or len(given) != rows:
        wanted = "[n] or [n, outputs]" if number else "[n]"
        raise ValueError(
            f"targets of shape {given.shape} and dtype {given.dtype} for {rows} rows of "
            f"activations: {wanted} is wanted"
        )
    if not number:
        classes, places = np.unique(given, return_inverse=True)
        return np.where(places[:, None] == np.arange(len(classes)), 1.0, -1.0), classes, True
    try:
        y = given.astype(np.float64)
    except (TypeError, ValueError):
        raise ValueError(
            f"targets of dtype {given.dtype}: floats are a regression; whole numbers, booleans "
            "and strings are classes"
        ) from None
    bad = np.flatnonzero(~np.isfinite(y.reshape(rows, -1)).all(axis=1))
    if bad.size:
        raise ValueError(f"targets: row {bad[0]} is not finite")
    return y.reshape(rows, -1), None, given.ndim == 1
