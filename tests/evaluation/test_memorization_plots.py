"""Counts of memorised rows against Poisson's: known processes, upstream's files, the picture."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from pythia_jax.evaluation.memorization_files import Scores, read
from pythia_jax.evaluation.memorization_plots import counts, plot, poisson_test, quantiles


def scores(memorized: np.ndarray) -> Scores:
    """Scores of rows from 0 on, 1 where `memorized`, else 0.5."""
    return Scores(np.arange(len(memorized)), np.where(memorized, 1.0, 0.5))


def write(path: Path, found: Scores, *, end: str = "\n") -> Path:
    lines = [f"{i},{s}" for i, s in zip(found.index.tolist(), found.score.tolist(), strict=True)]
    path.write_text("\n".join(lines) + end)
    return path


def test_counts_are_of_whole_steps_alone() -> None:
    memorized = np.zeros(22, bool)
    memorized[[0, 1, 6, 21]] = True
    found = counts(scores(memorized), 4)
    assert found.step.tolist() == [0, 1, 2, 3, 4]
    assert found.memorized.tolist() == [2, 1, 0, 0, 0]
    later = Scores(np.arange(2, 22), np.where(memorized, 1.0, 0.0)[2:])
    found = counts(later, 4)
    assert found.step.tolist() == [1, 2, 3, 4]
    assert found.memorized.tolist() == [1, 0, 0, 0]


def test_poisson_counts_are_not_told_from_poisson_and_others_are() -> None:
    rng = np.random.default_rng(0)
    values = [poisson_test(rng.poisson(3.0, 300)).p_value for _ in range(300)]
    # p-values of what is tested for are uniform.
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    bursts = rng.poisson(rng.gamma(1.0, 3.0, 300))
    test = poisson_test(bursts)
    assert test.dispersion > 2
    assert test.p_value < 1e-6
    even = poisson_test(np.full(300, 3))
    assert even.dispersion == 0
    assert even.p_value < 1e-6


def test_where_there_is_nothing_to_test_nothing_is_claimed() -> None:
    for events in ([], [4], [0, 0, 0]):
        test = poisson_test(np.array(events, np.int64))
        assert math.isnan(test.dispersion)
        assert math.isnan(test.p_value)
        assert "too few" in str(test)


def test_quantiles_lie_on_the_diagonal_for_poisson_counts() -> None:
    n, rate = 1000, 2.5
    events = stats.poisson.ppf((np.arange(n) + 0.5) / n, rate).astype(np.int64)
    points = quantiles(np.random.default_rng(0).permutation(events))
    assert points[:, 2].sum() == n
    off = points[points[:, 0] != points[:, 1]]
    assert off[:, 2].sum() <= 5  # the mean of the counts is not quite the rate
    bursts = quantiles(np.repeat([0, 10], [900, 100]))
    assert bursts[-1, 1] == 10
    assert bursts[-1, 0] < 10


def test_upstreams_files_are_read_one_of_each_rank(tmp_path: Path) -> None:
    memorized = np.random.default_rng(0).random(64) < 0.2
    whole = scores(memorized)
    for rank in range(2):
        part = Scores(whole.index[32 * rank :][:32], whole.score[32 * rank :][:32])
        write(tmp_path / f"rank-{rank}.csv", part, end="")  # upstream's last line has no end
    found = read(tmp_path / "rank-1.csv", tmp_path / "rank-0.csv")
    assert found.index.tolist() == whole.index.tolist()
    assert found.memorized.tolist() == np.flatnonzero(memorized).tolist()
    with pytest.raises(ValueError, match="row 0 is scored twice"):
        read(tmp_path / "rank-0.csv", tmp_path / "rank-0.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [("0,1.0\n1,\n", "not lines of"), ("0,1.0\n1,1.5\n", "line 2"), ("index,score\n", "not lines")],
)
def test_what_are_no_scores_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(ValueError, match=rf"a\.csv.*{message}"):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize("suffix", ["png", "svg"])
@pytest.mark.parametrize("share", [0.0, 0.02])
def test_the_picture_is_drawn_whole(tmp_path: Path, suffix: str, share: float) -> None:
    memorized = np.random.default_rng(0).random(16 * 300) < share
    path = write(tmp_path / "a.csv", scores(memorized))
    about = {"settings": {}, "computed": {"rows_per_step": 16, "source": "a model", "step": 300}}
    (tmp_path / "a.csv.json").write_text(json.dumps(about))
    test = plot(path, tmp_path / f"a.{suffix}")
    assert test.rate == pytest.approx(memorized.sum() / 300)
    content = (tmp_path / f"a.{suffix}").read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    assert plot(path, tmp_path / f"b.{suffix}", rows_per_step=32).rate == pytest.approx(
        memorized.sum() / 150
    )
