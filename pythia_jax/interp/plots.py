"""Pictures of scores over tokens, layers, positions, heads and rows, as matplotlib figures.

Colours diverge around zero, red above and blue below. Save one with `figure.savefig(path)`.
"""

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.typing import ArrayLike
from numpy.typing import NDArray

from pythia_jax.interp.attribution_table import compare
from pythia_jax.interp.patching import Node

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIGNED, _POSITIVE = "RdBu_r", "viridis"
_PLAIN: Any = {"parse_math": False}  # a dollar in a token is no formula
_LONGEST = 12  # characters of a token that are shown
_SIGNS = {**dict.fromkeys(range(32), "�"), **str.maketrans("\r\n\t ", "␍⏎⇥␣")}


def shown(token: str) -> str:
    """A token as text that can be seen: its spaces and controls by signs, its end cut off."""
    token = token.translate(_SIGNS)
    return token if len(token) <= _LONGEST else token[: _LONGEST - 1] + "…"


def titled(figure: "Figure", title: str) -> None:
    """Give a figure its title, in as many lines as its width wants."""
    letters = int(10 * figure.get_figwidth())  # an inch holds about 12 of them
    lines = [part for line in title.split("\n") for part in textwrap.wrap(line, letters) or [""]]
    figure.suptitle("\n".join(lines), **_PLAIN)


def token_heat_map(
    tokens: Sequence[str],
    scores: ArrayLike,
    *,
    title: str = "",
    label: str = "attribution",
    columns: int = 10,
) -> "Figure":
    """The text, token by token, each on the colour of its score.

    tokens: `[seq]` texts; scores: `[seq]`. label: of the colour scale. columns: tokens a line.

    Raises ValueError for scores that are not one a token, or not finite.
    """
    values = _finite(scores, 1)
    if len(values) != len(tokens) or not len(values):
        raise ValueError(f"{len(values)} scores for {len(tokens)} tokens: one a token is wanted")
    if columns < 1:
        raise ValueError(f"columns: {columns} tokens a line; at least 1")
    across = min(columns, len(values))
    down = math.ceil(len(values) / across)
    cells = np.full(down * across, np.nan)
    cells[: len(values)] = values
    figure = _figure((1.0 * across + 1.5, 0.55 * down + 1.2))
    axes = figure.subplots()
    image = _draw(axes, cells.reshape(down, across), _peak(values), signed=True)
    for i, token in enumerate(tokens):
        dark = abs(values[i]) > 0.6 * _peak(values)
        axes.text(
            i % across,
            i // across,
            shown(token),
            ha="center",
            va="center",
            fontsize="small",
            color="white" if dark else "black",
            **_PLAIN,
        )
    axes.set_axis_off()
    figure.colorbar(image, ax=axes, label=label, shrink=0.9)
    titled(figure, title)
    return figure


def layer_position_grid(
    values: ArrayLike,
    tokens: Sequence[str] | None = None,
    *,
    title: str = "",
    label: str = "",
    signed: bool = True,
) -> "Figure":
    """`[layer, seq]` values, the first layer at the bottom.

    tokens: texts below the columns, in place of positions. signed: colours that diverge around
    zero; else a scale from the least value to the greatest.

    Raises ValueError for values of another shape, or not finite.
    """
    grid = _finite(values, 2)
    figure = _figure(_size(grid))
    axes = figure.subplots()
    image = _draw(axes, grid, _peak(grid), signed=signed)
    axes.invert_yaxis()
    _ticks(axes, "x", _column_names(grid.shape[1], tokens))
    _ticks(axes, "y", [str(i) for i in range(len(grid))])
    axes.set(xlabel="token" if tokens else "position", ylabel="layer")
    figure.colorbar(image, ax=axes, label=label)
    titled(figure, title)
    return figure


def patching_grid(
    nodes: Sequence[Node],
    effects: ArrayLike,
    *,
    tokens: Sequence[str] | None = None,
    title: str = "",
    label: str = "effect on the metric",
) -> "Figure":
    """Effects of nodes, a panel for each site, on one scale.

    effects: `[nodes]`, or `[nodes, batch]`, which is averaged over rows. Rows of a panel are
    layers (`3`) or heads (`3.7`), columns positions; where nodes are of all positions, rows are
    layers and columns heads. Places without a node stay white. tokens: `[seq]` texts below the
    columns, in place of positions.

    Raises ValueError for effects that are not one a node, or not finite.
    """
    values = np.asarray(effects, np.float64)
    values = _finite(values.mean(axis=1) if values.ndim == 2 else values, 1)
    nodes = [Node(*node) for node in nodes]
    if len(values) != len(nodes) or not nodes:
        raise ValueError(f"{len(values)} effects of {len(nodes)} nodes: one a node is wanted")
    panels = {}
    for site in dict.fromkeys(node.site for node in nodes):
        here = [i for i, node in enumerate(nodes) if node.site == site]
        panels[site] = _panel([nodes[i] for i in here], values[here], tokens)
    sizes = [_size(grid) for grid, *_ in panels.values()]
    figure = _figure(
        (max(width for width, _ in sizes), sum(height for _, height in sizes)),
    )
    drawn = figure.subplots(len(panels), squeeze=False, height_ratios=[h for _, h in sizes])
    image = None
    for axes, (site, (grid, rows, columns, names)) in zip(drawn[:, 0], panels.items(), strict=True):
        image = _draw(axes, grid, _peak(values), signed=True)
        axes.invert_yaxis()
        _ticks(axes, "x", columns)
        _ticks(axes, "y", rows)
        axes.set(title=site, ylabel=names[0], xlabel=names[1])
    assert image is not None
    figure.colorbar(image, ax=drawn[:, 0], label=label)
    titled(figure, title)
    return figure


def influence_scatter(
    predicted: ArrayLike,
    actual: ArrayLike,
    *,
    title: str = "",
    xlabel: str = "predicted change of the loss",
    ylabel: str = "change by training without the row",
    diagonal: bool = False,
) -> "Figure":
    """What a score of influence foretold of each row, against what training without it did.

    predicted: `[rows]`; of a metagradient, minus the influence. actual: `[rows]`, the `effect` of
    each row's counterfactual. Pearson's and Spearman's correlations stand in the title. diagonal:
    draw where both are the same, for predictions that are in the units of the change.

    Raises ValueError for arrays that do not belong together, fewer than three rows, values that
    are not finite, and where all are equal, so that nothing can be correlated.
    """
    x, y = _finite(predicted, 1), _finite(actual, 1)
    if len(x) != len(y):
        raise ValueError(f"{len(x)} predictions of {len(y)} changes: one a row is wanted")
    if len(x) < 3:
        raise ValueError(f"{len(x)} rows: a correlation wants 3 or more")
    found = compare(x, y, k=1)
    figure = _figure((5.5, 5.0))
    axes = figure.subplots()
    axes.axhline(0, color="0.85", linewidth=0.8, zorder=0)
    axes.axvline(0, color="0.85", linewidth=0.8, zorder=0)
    axes.scatter(x, y, s=22, alpha=0.8)
    if diagonal:
        # By its slope, not by its ends, so that the points alone set the ranges of the axes.
        axes.axline((0, 0), slope=1.0, color="0.5", linestyle="--", linewidth=0.9, zorder=1)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.ticklabel_format(style="sci", scilimits=(-2, 3))
    told = f"Pearson {found.pearson:.3f}, Spearman {found.spearman:.3f}, {len(x)} rows"
    titled(figure, f"{title}\n{told}" if title else told)
    return figure


def _panel(
    nodes: Sequence[Node], values: NDArray[np.float64], tokens: Sequence[str] | None
) -> tuple[NDArray[np.float64], list[str], list[str], tuple[str, str]]:
    """Grid, names of its rows and columns, and what rows and columns are."""
    by_position = any(node.position is not None for node in nodes)
    has_heads = any(node.head is not None for node in nodes)

    def row(node: Node) -> tuple[int, int]:
        layer = -1 if node.layer is None else node.layer
        return layer, -1 if node.head is None or not by_position else node.head

    def column(node: Node) -> int:
        chosen = node.position if by_position else node.head
        return -1 if chosen is None else chosen

    def name(*numbers: int) -> str:
        return ".".join(str(n) for n in numbers if n >= 0)

    rows = sorted({row(node) for node in nodes})
    columns = sorted({column(node) for node in nodes})
    named = {number: name(number) or "all" for number in columns}
    if by_position:
        seq = max(columns) + 1 if tokens is None else len(tokens)
        if max(columns) >= seq:
            raise ValueError(f"{seq} tokens, and a node at position {max(columns)}")
        columns = [*([-1] if -1 in columns else []), *range(seq)]
        named = {-1: "all", **dict(enumerate(_column_names(seq, tokens)))}
    grid = np.full((len(rows), len(columns)), np.nan)
    for node, value in zip(nodes, values, strict=True):
        grid[rows.index(row(node)), columns.index(column(node))] = value
    down = "layer.head" if has_heads and by_position else "layer"
    down = "" if all(node.layer is None for node in nodes) else down
    across = "head" if has_heads else ""
    if by_position:
        across = "position" if tokens is None else "token"
    return grid, [name(*r) for r in rows], [named[c] for c in columns], (down, across)


def _figure(size: tuple[float, float]) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _finite(values: ArrayLike, axes: int) -> NDArray[np.float64]:
    array = np.asarray(values, np.float64)
    if array.ndim != axes or not array.size:
        raise ValueError(f"values of shape {array.shape} where {axes} axes are drawn")
    if not np.isfinite(array).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(f"the value at {where} is not finite, so nothing is drawn")
    return array


def _peak(values: NDArray[np.float64]) -> float:
    """Where the colours end, the same distance from zero on both sides."""
    return float(np.abs(values).max()) or 1.0


def _draw(axes: Any, grid: NDArray[np.float64], peak: float, *, signed: bool) -> Any:
    scale: dict[str, Any] = {"cmap": _POSITIVE}
    if signed:
        scale = {"cmap": _SIGNED, "vmin": -peak, "vmax": peak}
    return axes.imshow(grid, aspect="auto", interpolation="nearest", **scale)


def _size(grid: NDArray[np.float64]) -> tuple[float, float]:
    rows, columns = grid.shape
    return min(24.0, 2.5 + 0.45 * max(columns, 4)), min(30.0, 1.4 + 0.25 * max(rows, 4))


def _column_names(columns: int, tokens: Sequence[str] | None) -> list[str]:
    if tokens is None:
        return [str(i) for i in range(columns)]
    if len(tokens) != columns:
        raise ValueError(f"{len(tokens)} tokens for {columns} positions: one each is wanted")
    return [shown(token) for token in tokens]


def _ticks(axes: Any, which: str, names: Sequence[str]) -> None:
    """Names along an axis; every so many, where there are more than can be read."""
    every = math.ceil(len(names) / 60)
    places = range(0, len(names), every)
    rotation = 90 if which == "x" and max(map(len, names)) > 2 else 0
    set_ticks = axes.set_xticks if which == "x" else axes.set_yticks
    set_ticks(
        list(places),
        [names[i] for i in places],
        rotation=rotation,
        fontsize="small",
        **_PLAIN,
    )
