"""What the pictures show: every value in its place, on colours that are the same on both sides."""

import io

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.lines import AxLine

from pythia_jax.interp.patching import Node
from pythia_jax.interp.plots import (
    influence_scatter,
    layer_position_grid,
    patching_grid,
    shown,
    token_heat_map,
)

TOKENS = ["The", " price", " is", " $", "5", " or $", "6", "\n", "and so on for long"]
SCORES = np.array([0.1, -0.5, 2.0, 0.0, 0.3, -1.0, 0.7, 0.2, -0.1])


def drawn(figure):
    """A figure's images as arrays, panel by panel; and that it can be drawn."""
    figure.savefig(io.BytesIO(), format="png")
    images = [image for axes in figure.axes for image in axes.images]
    return [np.ma.filled(image.get_array(), np.nan) for image in images], images


def texts(ticks):
    return [tick.get_text() for tick in ticks]


def test_a_heat_map_has_each_token_on_the_colour_of_its_score():
    figure = token_heat_map(TOKENS, SCORES, columns=4, title="of $5")
    (grid,), (image,) = drawn(figure)
    assert grid.shape == (3, 4)
    np.testing.assert_array_equal(grid.ravel()[:9], SCORES)
    assert np.isnan(grid.ravel()[9:]).all()
    assert image.get_clim() == (-2.0, 2.0) and image.cmap == colormaps["RdBu_r"]
    found = {tuple(t.get_position()): t.get_text() for t in figure.axes[0].texts}
    for i, token in enumerate(TOKENS):
        assert found[i % 4, i // 4] == shown(token)


@pytest.mark.parametrize("title", ["words and " * 12, "folder/" * 24], ids=["words", "a path"])
def test_a_title_of_any_length_is_inside_the_picture(title):
    figure = layer_position_grid(np.eye(2), title=title)
    FigureCanvasAgg(figure).draw()
    (written,) = figure.texts
    assert "".join(written.get_text().split()) == "".join(title.split())
    box, whole = written.get_window_extent(), figure.bbox
    assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and box.y1 <= whole.y1
    assert figure.axes[0].get_window_extent().y1 <= box.y0


def test_tokens_are_shown_with_their_spaces():
    assert [shown(t) for t in (" a", "\n", "\t", "\r\x18", "longer than most")] == [
        "␣a", "⏎", "⇥", "␍�", "longer␣than…",
    ]  # fmt: skip


def test_a_grid_has_the_first_layer_at_the_bottom_and_tokens_below():
    values = np.random.default_rng(0).standard_normal((3, len(TOKENS)))
    figure = layer_position_grid(values, TOKENS, title="lens")
    (grid,), (image,) = drawn(figure)
    np.testing.assert_array_equal(grid, values)
    axes = figure.axes[0]
    assert axes.get_ylim()[0] < axes.get_ylim()[1]
    assert texts(axes.get_xticklabels()) == [shown(token) for token in TOKENS]
    low, high = image.get_clim()
    assert -low == high == np.abs(values).max()
    (_,), (image,) = drawn(layer_position_grid(values, signed=False))
    assert image.get_clim() == (values.min(), values.max())


def test_a_patching_grid_has_a_panel_a_site_and_all_on_one_scale():
    nodes = [Node("mlp_out", layer, p) for layer in (0, 1) for p in (0, 2)]
    nodes += [Node("attn.z", layer, None, head) for layer in (0, 1) for head in (0, 1, 2)]
    nodes += [Node("attn.q", 1, 1, 0), Node("attn.q", 1, 2, 2)]
    effects = np.stack([np.arange(12.0), np.arange(12.0) + 2], axis=1)
    figure = patching_grid(nodes, effects, tokens=["a", "b", "c"])
    grids, images = drawn(figure)
    mlp, heads, queries = grids
    np.testing.assert_array_equal(mlp, [[1, np.nan, 2], [3, np.nan, 4]])
    np.testing.assert_array_equal(heads, [[5, 6, 7], [8, 9, 10]])
    np.testing.assert_array_equal(queries, [[np.nan, 11, np.nan], [np.nan, np.nan, 12]])
    assert {image.get_clim() for image in images} == {(-12.0, 12.0)}
    panels = figure.axes[:3]
    assert [axes.get_title() for axes in panels] == ["mlp_out", "attn.z", "attn.q"]
    assert texts(panels[0].get_xticklabels()) == ["a", "b", "c"]
    assert texts(panels[1].get_xticklabels()) == ["0", "1", "2"]
    assert texts(panels[2].get_yticklabels()) == ["1.0", "1.2"]
    assert [axes.get_xlabel() for axes in panels] == ["token", "head", "token"]


def test_positions_without_a_node_and_nodes_of_all_positions_have_their_columns():
    nodes = [Node("embed", None, 1), Node("embed")]
    figure = patching_grid(nodes, np.array([1.0, 2.0]), tokens=["a", "b", "c"])
    (grid,), _ = drawn(figure)
    np.testing.assert_array_equal(grid, [[2, np.nan, 1, np.nan]])
    assert texts(figure.axes[0].get_xticklabels()) == ["all", "a", "b", "c"]


def test_a_scatter_has_a_point_a_row_and_both_correlations_in_its_title():
    predicted = np.array([1.0, 2.0, 3.0, 4.0, 10.0])
    actual = np.array([1.0, 3.0, 2.0, 5.0, 6.0])
    figure = influence_scatter(predicted, actual, title="of $5", diagonal=True)
    drawn(figure)
    axes = figure.axes[0]
    (points,) = axes.collections
    np.testing.assert_array_equal(points.get_offsets(), np.stack([predicted, actual], axis=1))
    # By the definitions: of the values, and of their ranks, two of which are exchanged.
    pearson = np.corrcoef(predicted, actual)[0, 1]
    spearman = 1 - 6 * (1 + 1) / (5 * (25 - 1))
    title = f"of $5\nPearson {pearson:.3f}, Spearman {spearman:.3f}, 5 rows"
    assert figure.get_suptitle() == title
    *_, diagonal = axes.lines
    assert isinstance(diagonal, AxLine) and diagonal.get_slope() == 1
    assert diagonal.get_xy1() == (0, 0)
    assert axes.get_xlim()[1] < 12, "the points alone set the range"
    assert len(axes.lines) == 1 + len(influence_scatter(predicted, actual).axes[0].lines)


def test_rows_that_cannot_be_correlated_are_refused():
    with pytest.raises(ValueError, match="4 predictions of 5 changes"):
        influence_scatter(np.arange(4), np.arange(5))
    with pytest.raises(ValueError, match="2 rows: a correlation wants 3"):
        influence_scatter(np.arange(2), np.arange(2))
    with pytest.raises(ValueError, match="all are 1, so nothing can be correlated"):
        influence_scatter(np.arange(4), np.ones(4))
    with pytest.raises(ValueError, match=r"value at \(1,\) is not finite"):
        influence_scatter(np.array([0.0, np.inf, 1.0]), np.arange(3))


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="8 scores for 9 tokens"):
        token_heat_map(TOKENS, SCORES[:8])
    with pytest.raises(ValueError, match=r"value at \(3,\) is not finite"):
        token_heat_map(TOKENS, np.where(np.arange(9) == 3, np.nan, SCORES))
    with pytest.raises(ValueError, match=r"values of shape \(9,\) where 2 axes are drawn"):
        layer_position_grid(SCORES)
    with pytest.raises(ValueError, match="2 tokens for 9 positions"):
        layer_position_grid(SCORES[None], ["a", "b"])
    with pytest.raises(ValueError, match="1 tokens, and a node at position 1"):
        patching_grid([Node("embed", None, 1)], np.ones(1), tokens=["a"])
    with pytest.raises(ValueError, match="1 effects of 2 nodes"):
        patching_grid([Node("embed", None, 0), Node("embed", None, 1)], np.ones(1))
