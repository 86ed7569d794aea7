"""Memorised rows over the order of training, and whether a Poisson process gives such counts.

If where a row stands in training did not matter to its being memorised, memorised rows would be
events of a Poisson process of constant rate, each step's batch a slice of its time: counts of a
step would follow one Poisson distribution, their variance equal to their mean. Source: Biderman et
al., 2023 (Pythia, arXiv 2304.01373), section 3.2 and figure 3, which draws the quantiles of these
counts against Poisson's.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pythia_jax.evaluation import figures
from pythia_jax.evaluation.memorization_files import Scores, read, read_about

PYTHIA_BATCH = 1024  # rows of a step, of files that do not tell
_BINS = 100
_MEASURED, _EXPECTED = "#0072B2", "#D55E00"  # Okabe and Ito's: told apart by all eyes


@dataclass(frozen=True)
class Counts:
    """Memorised rows of each step that was scored whole, int64 `[n]` both; steps ascending."""

    step: NDArray[np.int64]
    memorized: NDArray[np.int64]
    rows_per_step: int


@dataclass(frozen=True)
class PoissonTest:
    """Counts held against one Poisson distribution.

    rate: their mean. dispersion: variance / mean, 1 for Poisson. p_value: how likely a dispersion
    at least so far from 1 is, on either side. Both are NaN where they mean nothing: no event, or
    fewer than two counts.
    """

    rate: float
    dispersion: float
    p_value: float

    def __str__(self) -> str:
        if math.isnan(self.dispersion):
            return (
                f"memorised rows a step: mean {self.rate:.3g}; too few to be held against Poisson"
            )
        return (
            f"memorised rows a step: mean {self.rate:.3g}, variance / mean {self.dispersion:.3f} "
            f"(Poisson: 1; p = {self.p_value:.2g})"
        )


def counts(scores: Scores, rows_per_step: int) -> Counts:
    """Memorised rows of each step; steps of which not every row was scored are left out."""
    step, scored = np.unique(scores.index // rows_per_step, return_counts=True)
    step = step[scored == rows_per_step]
    place, found = np.unique(scores.memorized // rows_per_step, return_counts=True)
    memorized = np.zeros(len(step), np.int64)
    known = np.isin(place, step)
    memorized[np.searchsorted(step, place[known])] = found[known]
    return Counts(step, memorized, rows_per_step)


def poisson_test(events: NDArray[np.int64]) -> PoissonTest:
    """Fisher's index of dispersion: (n - 1) variance / mean of n counts of one Poisson distribution
    is nearly chi-squared of n - 1 degrees of freedom.

    Source: Fisher, Statistical Methods for Research Workers, section 18.
    """
    from scipy import stats

    rate = float(events.mean()) if len(events) else 0.0
    if len(events) < 2 or rate == 0:
        return PoissonTest(rate, math.nan, math.nan)
    dispersion = float(events.var(ddof=1)) / rate
    freedom = len(events) - 1
    chi = stats.chi2(freedom)
    tails = chi.cdf(freedom * dispersion), chi.sf(freedom * dispersion)
    return PoissonTest(rate, dispersion, min(1.0, 2 * float(min(tails))))


def quantiles(events: NDArray[np.int64]) -> NDArray[np.int64]:
    """Points of a Q-Q plot, int64 `[points, 3]`: Poisson's quantile, that of the counts, and how
    many counts fall there. Poisson's rate is the counts' mean.
    """
    from scipy import stats

    n = len(events)
    if n == 0:
        return np.zeros((0, 3), np.int64)
    theirs = stats.poisson.ppf((np.arange(n) + 0.5) / n, events.mean()).astype(np.int64)
    pairs = np.stack([np.maximum(theirs, 0), np.sort(events)], axis=1)
    points, many = np.unique(pairs, axis=0, return_counts=True)
    return np.concatenate([points, many[:, None]], axis=1)


def plot(
    csv: str | os.PathLike[str] | list[str],
    out: str | os.PathLike[str],
    *,
    rows_per_step: int | None = None,
    title: str | None = None,
) -> PoissonTest:
    """Draw scores from CSV files: memorised fraction over training, and the Q-Q plot of the paper.

    csv: a file of `memorization`, or several of one model, upstream's too. out: .png or .svg.
    rows_per_step: None is what the files say, or 1024, Pythia's.

    Raises ValueError for another kind of picture and for files of different things, and as
    `memorization_files.read` does.
    """
    from matplotlib.figure import Figure

    figures.check(out)
    files = [csv] if isinstance(csv, str | os.PathLike) else csv
    computed = [told["computed"] for told in map(read_about, map(Path, files)) if told]
    if rows_per_step is None:
        known = {told["rows_per_step"] for told in computed}
        if len(known) > 1:
            raise ValueError(
                f"{', '.join(map(str, files))}: steps of {sorted(known)} rows; of one?"
            )
        rows_per_step = int(known.pop()) if known else PYTHIA_BATCH
    if title is None and computed:
        source, step = str(computed[0]["source"]), computed[0]["step"]
        told = step is None or source.endswith((f"step{step}", f"step {step}"))
        title = source if told else f"{source}, step {step}"
    per_step = counts(read(*files), rows_per_step)
    test = poisson_test(per_step.memorized)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    over_time, against = figure.subplots(1, 2, width_ratios=(1.6, 1))
    _draw_fraction(over_time, per_step)
    _draw_quantiles(against, per_step, test)
    if title:
        figure.suptitle(title)
    figures.save(figure, out)
    return test


def _draw_fraction(axes: Any, per_step: Counts) -> None:
    """Memorised fraction in bins of whole steps, and where 95 % of a Poisson process lie."""
    from scipy import stats

    n = len(per_step.step)
    starts = np.arange(0, n, max(1, math.ceil(n / _BINS)))
    axes.set_xlabel("step at which the rows were seen")
    axes.set_ylabel("memorised rows (%)")
    axes.grid(alpha=0.3)
    if n == 0:
        axes.text(0.5, 0.5, "no step was scored whole", ha="center", transform=axes.transAxes)
        return
    steps = np.diff(starts, append=n)
    rows = steps * per_step.rows_per_step
    found = np.add.reduceat(per_step.memorized, starts)
    middle = np.add.reduceat(per_step.step, starts) / steps
    expected = per_step.memorized.mean() * steps
    low, high = stats.poisson.interval(0.95, expected) if expected.any() else (expected, expected)
    axes.fill_between(
        middle,
        100 * low / rows,
        100 * high / rows,
        color=_EXPECTED,
        alpha=0.25,
        linewidth=0,
        label="95 % of a Poisson process of constant rate",
    )
    axes.plot(middle, 100 * expected / rows, color=_EXPECTED, linewidth=1)
    label = "1 step" if steps[0] == 1 else f"{steps[0]:,} steps"
    axes.plot(
        middle,
        100 * found / rows,
        ".-",
        color=_MEASURED,
        linewidth=1,
        label=f"measured, by {label}",
    )
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)


def _draw_quantiles(axes: Any, per_step: Counts, test: PoissonTest) -> None:
    points = quantiles(per_step.memorized)
    top = max(1, int(points[:, :2].max(initial=0)))
    axes.plot([0, top], [0, top], color=_EXPECTED, linewidth=1, label="equal")
    most = points[:, 2].max(initial=1)
    axes.scatter(
        points[:, 0],
        points[:, 1],
        s=12 + 120 * points[:, 2] / most,
        color=_MEASURED,
        alpha=0.8,
        linewidth=0,
        label="steps (larger: more of them)",
        zorder=3,
    )
    axes.set_xlabel(f"Poisson quantile, mean {test.rate:.3g}")
    axes.set_ylabel("quantile of memorised rows a step")
    told = (
        "too few to test"
        if math.isnan(test.dispersion)
        else f"variance / mean {test.dispersion:.2f}, p = {test.p_value:.2g}"
    )
    axes.set_title(told, fontsize="medium")
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
