"""Curves of scores over steps, tokens or sizes, and of training, as pictures and tables.

Colours follow size, from dark to light (viridis, which the colour-blind read too); dashes tell
deduplicated and v0 models apart, markers the kind of run, hollow ones few-shot, and thick lines are
pythia_jax's own scores. Doubtful or limited ones are pale, with crosses.
"""

import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pythia_jax.data.storage import is_url
from pythia_jax.evaluation import figures, names
from pythia_jax.evaluation.points import (
    AXES,
    TRAINING,
    Curve,
    Line,
    Point,
    curves,
    line_of,
    over_sizes,
    points,
    to_csv,
    training_points,
)
from pythia_jax.evaluation.results import OLD_HARNESS, Result, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_X_LABELS = {
    "step": "step",
    "tokens": "tokens trained on",
    "parameters": "non-embedding parameters",
}
_MARKERS = {
    "plain": "o",
    "batch-size": "D",
    "baseline": "s",
    "intervention": "^",
    "long-intervention": "v",
}
_NO_SIZE = ("#D55E00", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Of models whose size nothing tells (Okabe and Ito's colours)."""
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_GREYS = ("#333333", "#777777")
_MOST_BANDS = 4
"""Standard errors of more lines than this would hide each other."""
_SHORT_LEGEND = 6
_LEGEND_WIDTH = 60
"""Letters of a line of the legend."""


def plot_paths(
    paths: Sequence[str | Path],
    metrics: Sequence[str],
    *,
    x: str = "step",
    out: str | Path,
    step: int | None = None,
    shots: int | None = None,
) -> None:
    """Draw metrics of files and folders of results, and of run folders, into a file.

    metrics: TASK:METRIC, a panel each; `training:loss` and the like are read from the metrics.jsonl
    of run folders (gs:// too). shots: only results of so many. The rest is as for `plot`.

    Raises FileNotFoundError and ValueError as `results.read` and `plot` do.
    """
    _check(x, out)
    trained = [m for m in metrics if m.partition(":")[0] == TRAINING]
    scored = [m for m in metrics if m not in trained]
    runs = [path for path in paths if is_url(path) or (Path(path) / "metrics.jsonl").is_file()]
    if trained and not runs:
        raise ValueError(f"{', '.join(trained)}: none of the paths is a run with metrics.jsonl")
    local = [path for path in paths if not is_url(path)]
    found = read(local) if scored else []
    if shots is not None:
        there = sorted({result.num_fewshot for result in found})
        found = [result for result in found if result.num_fewshot == shots]
        if scored and not found:
            raise ValueError(f"no {shots}-shot results; there are {', '.join(map(str, there))}")
    plot(found, metrics, x=x, out=out, step=step, runs=runs if trained else ())


def plot(
    results: Iterable[Result],
    metric: str | Sequence[str] = "lambada_openai:acc",
    *,
    x: str = "step",
    out: str | Path | None = None,
    step: int | None = None,
    runs: Sequence[str | Path] = (),
) -> "Figure | None":
    """Draw one metric or several, a panel each.

    x: `step` or `tokens`, on an axis that is linear about 0 and logarithmic beyond, or
    `parameters`, of the last step of each model or of `step`. out: a `.png` or `.svg`, or a `.csv`
    with the numbers; without one the figure is only returned. runs: run folders, whose metrics
    `training:loss` and the like are.

    Raises ValueError for a metric, an axis, a step or a file ending that is not there, and where
    two files differ about a checkpoint.
    """
    _check(x, out)
    wanted = [metric] if isinstance(metric, str) else list(metric)
    if not wanted:
        raise ValueError("no metric; give TASK:METRIC, as in lambada_openai:acc")
    results = list(results)
    panels = []
    for name in wanted:
        task, _, key = name.partition(":")
        panels.append(training_points(runs, key) if task == TRAINING else points(results, name))
    if step is not None and x != "parameters":
        raise ValueError(f"step {step}: only a plot over parameters is of one step")
    if out is not None and figures.check(out, table=True) == figures.TABLE:
        to_csv((point for panel in panels for point in panel), out)
        return None
    figure = _figure(panels, x, step)
    if out is not None:
        figures.save(figure, out)
    return figure


def _check(x: str, out: str | Path | None) -> None:
    if x not in AXES:
        raise ValueError(f"x {x!r}: one of {', '.join(AXES)}")
    if out is not None:
        figures.check(out, table=True)


def _figure(panels: Sequence[Sequence[Point]], x: str, step: int | None) -> "Figure":
    # Slow to import, and only wanted here.
    from matplotlib.figure import Figure

    across = min(math.ceil(math.sqrt(len(panels))), 3)
    down = math.ceil(len(panels) / across)
    drawn = [over_sizes(p, step) if x == "parameters" else _over_time(p, x) for p in panels]
    for panel, placed in zip(panels, drawn, strict=True):
        if not placed and (x == "parameters" or all(p.result.step is not None for p in panel)):
            raise ValueError(f"{_metric_label(panel[0])}: no score has a place over {_X_LABELS[x]}")
    every = [curve for panel in drawn for curve in panel]
    level = [p for panel in panels for p in panel if p.result.step is None and x != "parameters"]
    colours = _of_sizes(every) if x != "parameters" else {}
    if len(colours) < 2:
        colours = _of_lines(every)
    lines = [curve.line for curve in every] + [line_of(point.result) for point in level]
    labels = [_label(curve, lines) for curve in every]
    beside = (
        len(panels) > 1 or len(set(labels)) > _SHORT_LEGEND or max(map(len, labels), default=0) > 30
    )
    # About what a letter of the legend takes, in inches.
    longest = min(_LEGEND_WIDTH, max(map(len, labels), default=0))
    margin = 0.8 + 0.065 * longest if beside else 0.0
    size = (0.8 + 5.6 * across + margin + 0.6 * bool(level), 0.5 + 4.0 * down)
    figure = Figure(figsize=size, layout="constrained")
    notes = _steps_of(every) if x == "parameters" else []
    for panel, curves_of, axes in zip(
        panels, drawn, figure.subplots(down, across, squeeze=False).flat, strict=False
    ):
        _draw(axes, panel, curves_of, colours, lines, x, notes)
    for axes in list(figure.axes)[len(panels) :]:
        axes.remove()
    _legend(figure, beside)
    title = _in_common(lines)
    if title:
        figure.suptitle(title, fontsize=10)
    notes += ["steps of v0 160m, 410m and 1.4b are doubled"] * any(
        p.result.doubled for panel in panels for p in panel
    )
    if notes:
        figure.supxlabel("; ".join(dict.fromkeys(notes)), fontsize=8, color="#555555")
    return figure


def _of_sizes(drawn: Iterable[Curve]) -> dict[str, Any]:
    """A colour for each size, or model of no known one, dark to light as they grow."""
    from matplotlib import colormaps

    shown = {r.size or r.model: r.parameters for r in (c.points[0].result for c in drawn)}
    sized = sorted((name for name in shown if shown[name]), key=lambda name: shown[name] or 0)
    # Its end is too pale on white.
    scale = [0.82 * i / max(1, len(sized) - 1) for i in range(len(sized))]
    colours: dict[Any, Any] = dict(zip(sized, map(colormaps["viridis"], scale), strict=True))
    for i, name in enumerate(name for name in shown if not shown[name]):
        colours[name] = _NO_SIZE[i % len(_NO_SIZE)]
    return colours


def _of_lines(drawn: Iterable[Curve]) -> dict[Any, Any]:
    """A colour for each line, where size tells none apart."""
    lines = dict.fromkeys(curve.line for curve in drawn)
    return {line: _COLOURS[i % len(_COLOURS)] for i, line in enumerate(lines)}


def _colour(curve: Curve, colours: dict[Any, Any]) -> Any:
    line, result = curve.line, curve.points[0].result
    keys = (line, line.size, line.model, result.model)
    return next(colours[key] for key in keys if key in colours)


def _over_time(panel: Sequence[Point], x: str) -> list[Curve]:
    return curves([point for point in panel if point.result.step is not None], x)


def _draw(
    axes: "Axes",
    panel: Sequence[Point],
    drawn: Sequence[Curve],
    colours: dict[Any, Any],
    lines: Sequence[Line],
    x: str,
    notes: list[str],
) -> None:
    banded = [c for c in drawn if c.low is not None and (c.line.seeds or len(drawn) <= _MOST_BANDS)]
    for curve in drawn:
        line, colour = curve.line, _colour(curve, colours)
        many = len(curve.x) > 60
        axes.plot(
            curve.x,
            curve.y,
            label=_label(curve, lines),
            color=colour,
            linestyle={(False, False): "-", (True, False): "--", (False, True): ":"}.get(
                (line.deduped, line.version == "v0"), "-."
            ),
            linewidth=2.6 if line.ours else 1.3,
            marker=None if many else "X" if line.notes else _MARKERS[line.kind],
            alpha=0.55 if line.notes else None,
            markersize=6 if line.ours or x == "parameters" else 4,
            markerfacecolor="white" if line.shots else colour,
        )
        if curve in banded:
            assert curve.low is not None and curve.high is not None
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
            if len(curve.x) == 1:  # of no width
                axes.vlines(curve.x, curve.low, curve.high, color=colour, alpha=0.5)
            seeds = "shaded: least to greatest of the seeds, about their mean"
            notes.append(seeds if line.seeds else "shaded: ± 1 standard error")
    level = [point for point in panel if point.result.step is None and x != "parameters"]
    for point in level:
        _level_line(axes, point)
    _scales(axes, drawn, panel, x)
    if level:
        _name_level_lines(axes, level, lines, notes)
    axes.grid(alpha=0.25)
    axes.set_xlabel(_X_LABELS[x])
    axes.set_ylabel(_metric_label(panel[0]))


def _metric_label(point: Point) -> str:
    unit = " (nats per token)" if point.metric in ("loss", "validation_loss") else ""
    task = "" if point.task == TRAINING else f"{point.task}: "
    return f"{task}{point.metric.replace('_', ' ')}{unit}"


def _level_line(axes: "Axes", point: Point) -> None:
    opt = point.result.model.lower().startswith("opt")
    axes.axhline(
        point.value,
        color=_GREYS[0 if opt else 1],
        linewidth=0.9,
        linestyle=(0, (6, 2)) if opt else (0, (1, 2)),
        gid=point.result.model,
    )


def _name_level_lines(
    axes: "Axes", level: Sequence[Point], lines: Sequence[Line], notes: list[str]
) -> None:
    """Names at the right edge, those that lie close pushed apart."""
    told = {" ".join(_apart(line_of(point.result), lines)) for point in level}
    if len(told) == 1 and told != {""}:
        notes.append(f"level lines: {told.pop().removeprefix('· ')}")
        told = {""}
    # From here on the labels move with the axes, whatever size these are given.
    axes.set_ylim(axes.get_ylim())
    to_axes = axes.transData + axes.transAxes.inverted()
    apart, at = 0.04, -1.0
    for point in sorted(level, key=lambda p: p.value):
        at = max(to_axes.transform((1.0, point.value))[1], at + apart)
        more = _apart(line_of(point.result), lines) if told != {""} else []
        axes.annotate(
            " ".join([point.result.model, *more]),
            (1.0, point.value),
            xycoords=("axes fraction", "data"),
            xytext=(1.03, at),
            textcoords="axes fraction",
            fontsize=7,
            va="center",
            color="#333333",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": "#AAAAAA",
                "linewidth": 0.5,
                "relpos": (0, 0.5),
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )


def _scales(axes: "Axes", drawn: Sequence[Curve], panel: Sequence[Point], x: str) -> None:
    if x == "parameters":
        axes.set_xscale("log")
    else:
        per_step = [p.result.tokens_per_step for c in drawn for p in c.points]
        first = min((t for t in per_step if t), default=1) if x == "tokens" else 1
        last = max((at for curve in drawn for at in curve.x), default=first)
        # Linear up to the first step, so that step 0 has a place.
        axes.set_xscale("symlog", linthresh=first, linscale=0.4)
        axes.set_xlim(-0.3 * first, 1.4 * max(last, first))
        powers = range(math.ceil(math.log10(first)), math.floor(math.log10(max(last, first))) + 1)
        axes.set_xticks([0, *(10**power for power in powers)])
        axes.set_xticks([], minor=True)
    values = [p.value for p in panel if math.isfinite(p.value)]
    if "perplexity" in panel[0].metric and min(values) > 0 and max(values) > 100 * min(values):
        axes.set_yscale("log")


def _label(curve: Curve, lines: Sequence[Line]) -> str:
    """What tells this line from the others; what all share stands in the title."""
    line = curve.line
    parts = [line.model.removeprefix("pythia-")]
    if line.seed is not None:
        parts.append(line.seed)
    if line.seeds:
        parts.append(f"(mean of {len({p.result.seed for p in curve.points})})")
    if line.version == "v0":
        parts.append("v0")
    if line.kind not in ("plain", "batch-size"):
        parts.append(line.kind)
    return " ".join([*parts, *_apart(line, lines)])


def _apart(line: Line, lines: Sequence[Line]) -> list[str]:
    """Shots and harness of a line, if others have others, and its notes."""
    told = [
        text(line)
        for text in (_shots_text, _harness_text)
        if text(line) and len({text(other) for other in lines} - {""}) > 1
    ]
    return [f"· {text}" for text in (*told, *line.notes)]


def _in_common(lines: Sequence[Line]) -> str:
    shared = [{text(line) for line in lines} - {""} for text in (_shots_text, _harness_text)]
    return " · ".join(text for texts in shared for text in texts if len(texts) == 1)


def _shots_text(line: Line) -> str:
    if not line.harness:
        return ""  # of training
    return names.shots_name(line.shots)


def _harness_text(line: Line) -> str:
    if not line.harness:
        return ""
    text = f"harness {'of 2022' if line.harness == OLD_HARNESS else line.harness}"
    return f"pythia_jax, {text}" if line.ours else text


def _steps_of(drawn: Sequence[Curve]) -> list[str]:
    """Which steps a plot over parameters is of."""
    found = (p.result.step for curve in drawn for p in curve.points)
    steps = {step for step in found if step is not None}
    return [f"at step {max(steps)}" if len(steps) == 1 else "last step of each"] if steps else []


def _legend(figure: "Figure", beside: bool) -> None:
    """One for all panels, beside them or inside the only one."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    # Long enough for dashes and dots to be told apart.
    how: dict[str, Any] = {"frameon": False, "fontsize": 8, "handlelength": 3.5}
    texts = [textwrap.fill(label, _LEGEND_WIDTH) for label in found]
    if found and beside:
        figure.legend(found.values(), texts, loc="outside right upper", **how)
    elif found:
        figure.axes[0].legend(found.values(), texts, **how)
