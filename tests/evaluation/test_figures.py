"""Pictures of every maker: the kinds of files, and the same bytes for the same picture."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from result_files import PUBLISHED

from pythia_jax.evaluation import figures, memorization_plots, plots, results, term_plot
from pythia_jax.evaluation.term_frequency import CountedScore, Score


def curves(out: Path) -> None:
    plots.plot(results.read([PUBLISHED / "pythia-v1" / "pythia-70m-deduped"]), out=out)


def memorized(out: Path) -> None:
    scores = out.with_name("scores.csv")
    chance = np.random.default_rng(0).random(64)
    scores.write_text("".join(f"{i},{float(p < 0.2)}\n" for i, p in enumerate(chance)))
    memorization_plots.plot(scores, out, rows_per_step=8)


def frequencies(out: Path) -> None:
    scores = [Score("pythia-70m", 3, "times", 16, x1, x1 % 7, 50) for x1 in range(100)]
    term_plot.write([CountedScore(score, 7 * score.x1) for score in scores], out)


MAKERS = [curves, memorized, frequencies]


@pytest.mark.parametrize("draw", MAKERS)
@pytest.mark.parametrize("name", ["f.png", "f.SVG"])
def test_a_picture_is_what_its_name_says_and_its_bytes_do_not_depend_on_chance(
    tmp_path, draw, name
):
    pictures = []
    for place in "ab":
        (tmp_path / place).mkdir()
        draw(tmp_path / place / name)
        pictures.append((tmp_path / place / name).read_bytes())
    assert pictures[0] == pictures[1]
    assert pictures[0].startswith(b"\x89PNG" if name == "f.png" else b"<?xml")
    assert b"<dc:date>" not in pictures[0]


@pytest.mark.parametrize("draw", MAKERS)
def test_another_kind_of_file_is_refused_and_not_made(tmp_path, draw):
    with pytest.raises(ValueError, match=r"f\.pdf: the name of the file ends in \.png.*\.svg"):
        draw(tmp_path / "f.pdf")
    assert not (tmp_path / "f.pdf").exists()


def test_a_table_is_named_where_it_may_be_written():
    assert figures.check("a/F.CSV", table=True) == ".csv"
    with pytest.raises(ValueError, match=r"F\.CSV: .* ends in \.png or \.svg$"):
        figures.check("a/F.CSV")


def test_a_picture_that_fails_leaves_what_was_there(tmp_path):
    figure = Figure()
    figure.text(0, 0, "$\\nothing$")  # mathematics that matplotlib does not know
    path = tmp_path / "f.png"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match="nothing"):
        figures.save(figure, path)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
