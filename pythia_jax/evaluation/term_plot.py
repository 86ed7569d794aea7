"""Accuracy against how often a number was seen, as a picture or as a table."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pythia_jax import suite
from pythia_jax.evaluation import figures
from pythia_jax.evaluation.names import model_name
from pythia_jax.evaluation.term_frequency import COLUMNS, CountedScore
from pythia_jax.files import write_whole

GROUPS = 10
"""Groups of numbers, from the rarest to the commonest, whose mean a line goes through."""


def gap(points: Sequence[CountedScore]) -> float:
    """Mean accuracy on the tenth of the numbers that were seen most, less that on the tenth seen
    least: the paper's measure, after Razeghi et al. (2022)."""
    ordered = sorted(points, key=lambda point: point.count)
    tenth = max(1, len(ordered) // 10)
    rare, common = ordered[:tenth], ordered[-tenth:]
    return float(np.mean([p.score.accuracy for p in common])) - float(
        np.mean([p.score.accuracy for p in rare])
    )


def checkpoints(
    points: Iterable[CountedScore],
) -> list[tuple[tuple[str, str, int, int], list[CountedScore]]]:
    """The points of each (model, operation, shots, step), in this order; models by size."""
    sizes = list(suite.SUITE)

    def of(point: CountedScore) -> tuple[int, str, str, int, int]:
        score = point.score
        size = model_name(score.model).size
        place = sizes.index(size) if size in sizes else len(sizes)
        return place, score.model, score.operation, score.shots, score.step

    return [(key[1:], list(group)) for key, group in groupby(sorted(points, key=of), key=of)]


def write(points: Sequence[CountedScore], out: str | Path) -> Path:
    """Draw points to a `.png` or `.svg`, or write them to a `.csv`, with a column `count`.

    A picture has a panel for each model, operation and number of shots, and in it a line for each
    checkpoint: a faint dot for each number, and the means of ten groups from rare to common.

    Raises ValueError where there are no points, or for another kind of file.
    """
    out = Path(out)
    if not points:
        raise ValueError("there are no scores to plot")
    if figures.check(out, table=True) == figures.TABLE:
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow((*COLUMNS, "count"))
        for point in points:
            score = point.score
            values = [getattr(score, column) for column in COLUMNS]
            writer.writerow((*values, point.count))
        write_whole(out, text.getvalue().encode())
    else:
        figures.save(figure(points), out)
    return out


def figure(points: Sequence[CountedScore]) -> Any:
    """The picture as a `matplotlib.figure.Figure`."""
    # Slow to import, and only wanted here.
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    lines = checkpoints(points)
    panels = [(key, list(group)) for key, group in groupby(lines, key=lambda line: line[0][:3])]
    steps = sorted({key[3] for key, _ in lines})
    # Light enough to tell apart, dark enough to read on white; without red and green.
    shades = colormaps["viridis"](np.linspace(0.0, 0.88, len(steps)))
    columns = min(3, len(panels) if len(panels) < 4 else math.ceil(math.sqrt(len(panels))))
    rows = math.ceil(len(panels) / columns)
    drawn = Figure(figsize=(1.4 + 4.0 * columns, 0.4 + 3.2 * rows), layout="constrained")
    axes = drawn.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for axis, ((model, operation, shots), group) in zip(axes, panels, strict=False):
        for (*_, step), chosen in group:
            colour = shades[steps.index(step)]
            counts = np.array([point.count for point in chosen], float)
            accuracy = np.array([point.score.accuracy for point in chosen])
            axis.plot(counts, accuracy, ".", color=colour, alpha=0.25, markersize=4, zorder=1)
            axis.plot(*_means(counts, accuracy), "-o", color=colour, markersize=3.5, linewidth=1.5)
        # Numbers never seen are there too, at 0.
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xlim(left=-0.2)
        axis.set_title(f"{model}: {operation}, {shots} shots", fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    drawn.supxlabel("times that x1 was seen in training up to the checkpoint", fontsize=10)
    drawn.supylabel("accuracy on the questions of x1", fontsize=10)
    handles = [
        axes[0].plot([], [], "-o", color=shade, markersize=3.5, label=f"{step:,}")[0]
        for step, shade in zip(steps, shades, strict=True)
    ]
    drawn.legend(handles=handles, title="step", loc="outside right upper", frameon=False)
    return drawn


def _means(
    counts: NDArray[np.float64], accuracy: NDArray[np.float64]
) -> tuple[list[float], list[float]]:
    """Mean count (geometric, so that it lies among its dots) and accuracy of each group."""
    order = np.argsort(counts, kind="stable")
    groups = np.array_split(order, min(GROUPS, len(order)))
    x = [float(np.expm1(np.mean(np.log1p(counts[group])))) for group in groups]
    return x, [float(np.mean(accuracy[group])) for group in groups]
