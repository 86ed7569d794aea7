"""Pictures and tables of scores: what is drawn is looked up in matplotlib's own axes."""

import csv
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from result_files import lambada, old_file, returned

from pythia_jax.cli.plots import plot as command
from pythia_jax.evaluation import plots, points, results

STEPS = (0, 1, 512, 143_000)
TOKENS = 2_097_152


def published(folder, size, scores=(0.0, 0.1, 0.2, 0.3), **how):
    for step, acc in zip(STEPS, scores, strict=True):
        lambada(folder, size, step, acc, **how)


def ours(folder, name, scores=(0.0, 0.1, 0.2, 0.3), **provenance):
    for step, acc in zip(STEPS, scores, strict=True):
        found = returned({"lambada_openai": {"acc": acc, "acc_stderr": 0.004}})
        results.write(folder, found, model_name=name, step=step, provenance=provenance)


def draw(folder: Path, metric: str | Sequence[str] = "lambada_openai:acc", **how: Any) -> Any:
    figure = plots.plot(results.read([folder]), metric, **how)
    assert figure is not None
    return figure


def lines(axes: Any) -> dict[str, Any]:
    """Label → (x, y) of every line with a name of its own."""
    named = [line for line in axes.lines if not line.get_label().startswith("_")]
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in named}


def corners(band: PolyCollection) -> set[tuple[float, ...]]:
    found = (np.asarray(path.vertices) for path in band.get_paths())
    return {tuple(corner) for vertices in found for corner in np.round(vertices, 6).tolist()}


def test_a_line_holds_the_files_scores_and_step_0_has_a_place(tmp_path):
    published(tmp_path, "70m")
    published(tmp_path, "410m-deduped", (0.1, 0.2, 0.3, 0.4))
    (axes,) = draw(tmp_path).axes
    assert lines(axes) == {
        "70m": (list(STEPS), [0.0, 0.1, 0.2, 0.3]),
        "410m-deduped": (list(STEPS), [0.1, 0.2, 0.3, 0.4]),
    }
    assert axes.get_xscale() == "symlog"
    assert axes.get_xlim()[0] < 0 < 143_000 < axes.get_xlim()[1]
    # In the picture too, and not upon step 1.
    at = [axes.transData.transform((step, 0.0))[0] for step in (0, 1, 512)]
    assert at[0] + 20 < at[1] < at[2]
    assert axes.figure.get_suptitle() == "zero-shot · harness of 2022"


def test_over_tokens_each_batch_size_counts_its_own(tmp_path):
    published(tmp_path, "70m")
    variant = tmp_path / "pythia-1.4b-1MtokBS" / "1.4b-1MtokBS_step600.json"
    old_file(variant, {"lambada_openai": {"acc": 0.5}})
    (axes,) = draw(tmp_path, x="tokens").axes
    assert lines(axes)["70m"][0] == [step * TOKENS for step in STEPS]
    assert lines(axes)["1.4b-1MtokBS"][0] == [600 * 2**20]


def test_doubled_steps_are_drawn_doubled_and_told(tmp_path):
    name = "pythia-160m-0shot-global_step71500_eval_results_12-30-2022-23-06-54.json"
    path = tmp_path / "pythia-v0" / "pythia-160m" / "zero-shot" / name
    old_file(path, {"lambada_openai": {"acc": 0.4}})
    published(tmp_path, "160m")
    figure = draw(tmp_path)
    assert lines(figure.axes[0])["160m v0"] == ([143_000], [0.4])
    assert "doubled" in figure.get_supxlabel()


def test_sizes_go_from_dark_to_light(tmp_path):
    for size in ("12b", "70m", "1b", "410m"):
        published(tmp_path, size)
    (axes,) = draw(tmp_path).axes
    assert list(lines(axes)) == ["70m", "410m", "1b", "12b"]
    light = [np.dot((0.2126, 0.7152, 0.0722), to_rgb(line.get_color())) for line in axes.lines]
    assert light == sorted(light) and light[-1] - light[0] > 0.4


def test_shots_kinds_and_harnesses_are_told_apart(tmp_path):
    published(tmp_path / "theirs", "70m-deduped")
    published(tmp_path / "theirs", "70m-deduped", (0.0, 0.1, 0.1, 0.2), shots=5)
    ours(tmp_path / "ours", "pythia-70m-deduped", (0.0, 0.11, 0.21, 0.31))
    for kind in ("baseline", "intervention"):
        place = tmp_path / "theirs" / "pythia-70m-deduped" / kind
        old_file(
            place / f"{kind}-70m-deduped_step143000.json", {"lambada_openai": {"acc": len(kind)}}
        )
    figure = draw(tmp_path)
    assert set(lines(figure.axes[0])) == {
        "70m-deduped · zero-shot · harness of 2022",
        "70m-deduped · five-shot · harness of 2022",
        "70m-deduped · zero-shot · pythia_jax, harness 0.4.13",
        "70m-deduped baseline · zero-shot · harness of 2022",
        "70m-deduped intervention · zero-shot · harness of 2022",
    }
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(texts) == sorted(lines(figure.axes[0]))
    # Of one size: by colour, then.
    assert len({line.get_color() for line in figure.axes[0].lines}) == 5


def test_flagged_files_are_a_line_of_their_own(tmp_path):
    published(tmp_path, "70m", shots=5)
    path = tmp_path / "pythia-70m" / "five-shot" / "70m-5shot_step13000.json"
    old_file(path, {"lambada_openai": {"acc": 0.9}}, num_fewshot=0)
    (axes,) = draw(tmp_path).axes
    assert lines(axes) == {
        "70m": (list(STEPS), [0.0, 0.1, 0.2, 0.3]),
        "70m · its config says zero-shot": ([13_000], [0.9]),
    }


def test_seeds_are_their_mean_within_their_range(tmp_path):
    scores = {1: (0.0, 0.1, 0.2, 0.3), 2: (0.0, 0.2, 0.1, 0.6), 3: (0.0, 0.3, 0.3, 0.9)}
    for seed, of_seed in scores.items():
        ours(tmp_path, f"pythia-70m-seed{seed}", of_seed)
    # A step that one of them lacks has no mean.
    results.path_of(tmp_path, model_name="pythia-70m-seed2", step=512).unlink()
    (axes,) = draw(tmp_path).axes
    ((label, (x, y)),) = lines(axes).items()
    assert label == "70m-seeds (mean of 3)"
    assert x == [0, 1, 143_000] and y == pytest.approx([0.0, 0.2, 0.6])
    (band,) = (c for c in axes.collections if isinstance(c, PolyCollection))
    assert {(1, 0.1), (1, 0.3), (143_000, 0.3), (143_000, 0.9)} <= corners(band)
    assert "least to greatest" in axes.figure.get_supxlabel()


def test_seeds_without_a_common_step_are_drawn_one_by_one(tmp_path):
    for seed, step in ((1, 8), (2, 16)):
        found = returned({"lambada_openai": {"acc": 0.1}})
        name = f"pythia-70m-seed{seed}"
        results.write(tmp_path, found, model_name=name, step=step, provenance={})
    (axes,) = draw(tmp_path).axes
    assert lines(axes) == {"70m seed1": ([8], [0.1]), "70m seed2": ([16], [0.1])}


def test_standard_errors_are_shaded_while_lines_are_few(tmp_path):
    for size in ("70m", "160m"):
        published(tmp_path, size, stderr=0.02)
    (axes,) = draw(tmp_path).axes
    bands = [c for c in axes.collections if isinstance(c, PolyCollection)]
    assert len(bands) == 2
    assert {(1.0, 0.12), (1.0, 0.08)} <= corners(bands[0])
    for size in ("410m", "1b", "1.4b"):
        published(tmp_path, size)
    (axes,) = draw(tmp_path).axes
    assert not [c for c in axes.collections if isinstance(c, PolyCollection)]


def baselines(folder):
    for name, acc in (("opt-125m", 0.38), ("opt-1.3b", 0.58), ("bloom-1b1", 0.579)):
        place = folder / name.partition("-")[0] / f"{name}.json"
        args = f"pretrained=facebook/{name}"
        old_file(place, {"lambada_openai": {"acc": acc}}, model_args=args)


def test_baselines_are_level_lines_with_their_names(tmp_path):
    published(tmp_path, "70m")
    baselines(tmp_path)
    (axes,) = draw(tmp_path).axes
    level = {line.get_gid(): set(line.get_ydata()) for line in axes.lines if line.get_gid()}
    assert level == {"opt-125m": {0.38}, "opt-1.3b": {0.58}, "bloom-1b1": {0.579}}
    high = {text.get_text(): text.xyann[1] for text in axes.texts}
    assert set(high) == set(level)
    assert high["opt-1.3b"] - high["bloom-1b1"] >= 0.039


def test_over_parameters_a_family_is_a_line(tmp_path):
    for size, last in (("70m", 0.3), ("410m", 0.5), ("1b-deduped", 0.6)):
        published(tmp_path, size, (0.0, 0.1, 0.2, last))
    baselines(tmp_path)
    figure = draw(tmp_path, x="parameters")
    assert lines(figure.axes[0]) == {
        "Pythia": ([18_915_328, 302_311_424], [0.3, 0.5]),
        "Pythia-deduped": ([805_736_448], [0.6]),
        "BLOOM": ([679_962_624], [0.579]),
        "OPT": ([85_056_000, 1_208_602_624], [0.38, 0.58]),
    }
    assert "at step 143000" in figure.get_supxlabel()
    (axes,) = draw(tmp_path, x="parameters", step=512).axes
    assert lines(axes)["Pythia"][1] == [0.2, 0.2]
    with pytest.raises(ValueError, match="no model has a score at step 7; there are 0, 1, 512"):
        draw(tmp_path, x="parameters", step=7)


def test_a_model_without_a_place_on_the_axis_is_left_out_aloud(tmp_path, caplog):
    published(tmp_path, "70m")
    ours(tmp_path, "mine")
    ours(tmp_path, "told", tokens_per_step=1000)
    with caplog.at_level(logging.WARNING):
        (axes,) = draw(tmp_path, x="tokens").axes
    assert {label.partition(" ·")[0] for label in lines(axes)} == {"70m", "told"}
    assert "left out, without tokens or a finite score: mine" in caplog.text


def test_several_metrics_are_panels(tmp_path):
    scores = {"lambada_openai": {"ppl": 3e6, "acc": 0.1}, "hendrycksTest-anatomy": {"acc": 0.2}}
    old_file(tmp_path / "pythia-70m" / "zero-shot" / "70m_step0.json", scores)
    scores["lambada_openai"]["ppl"] = 5.0
    old_file(tmp_path / "pythia-70m" / "zero-shot" / "70m_step8.json", scores)
    wanted = ["lambada_openai:perplexity", "lambada_openai:ppl", "mmlu_anatomy:acc"]
    first, second, third = draw(tmp_path, wanted).axes
    assert lines(first) == lines(second) == {"70m": ([0, 8], [3e6, 5.0])}
    assert first.get_yscale() == "log" and third.get_yscale() == "linear"
    assert lines(third) == {"70m": ([0, 8], [0.2, 0.2])}


def test_two_files_that_differ_are_refused_and_equal_ones_are_one(tmp_path):
    published(tmp_path / "a", "70m")
    published(tmp_path / "b", "70m")
    (axes,) = draw(tmp_path).axes
    assert lines(axes) == {"70m": (list(STEPS), [0.0, 0.1, 0.2, 0.3])}
    for folder in "ab":  # a model that is no good yet
        lambada(tmp_path / folder, "70m", 512, float("nan"))
    assert len(lines(draw(tmp_path).axes[0])["70m"][0]) == len(STEPS) - 1
    lambada(tmp_path / "b", "70m", 512, 0.25)
    with pytest.raises(ValueError, match=r"differ about lambada_openai:acc .* step 512") as refused:
        draw(tmp_path)
    for folder in "ab":
        assert str(tmp_path / folder) in str(refused.value)


@pytest.mark.parametrize(
    "metric, why",
    [
        ("lambada_openai", "give TASK:METRIC"),
        ("lambada_openai:f1", "of lambada_openai there are acc$"),
        ("piqa:acc", "the tasks there are: lambada_openai"),
    ],
)
def test_a_metric_that_is_not_there_is_refused_with_those_that_are(tmp_path, metric, why):
    published(tmp_path, "70m")
    with pytest.raises(ValueError, match=why):
        draw(tmp_path, metric)


def test_the_table_holds_what_was_written(tmp_path):
    scores = (1 / 3, 2 / 7, 1e-17, 0.1 + 0.2)
    ours(tmp_path / "out", "pythia-160m-seed2", scores)
    table = tmp_path / "t.csv"
    assert plots.plot(results.read([tmp_path / "out"]), x="tokens", out=table) is None
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == points.COLUMNS
    assert [float(row["value"]) for row in rows] == list(scores)
    assert [float(row["stderr"]) for row in rows] == [0.004] * 4
    assert [int(row["tokens"]) for row in rows] == [step * TOKENS for step in STEPS]
    same = {"model": "pythia-160m", "seed": "seed2", "parameters": "85056000", "shots": "0"}
    same |= {"kind": "plain", "harness": "0.4.13", "task": "lambada_openai", "metric": "acc"}
    for row, step in zip(rows, STEPS, strict=True):
        assert same.items() <= row.items()
        written = json.loads(Path(row["path"]).read_text())
        assert written["provenance"]["step"] == step == int(row["step"])


@pytest.mark.parametrize(
    "how, why",
    [
        ({"out": "a.pdf"}, "ends in .png, .svg or .csv"),
        ({"x": "time"}, "one of step, tokens, parameters"),
        ({"metric": []}, "no metric"),
        ({"step": 8}, "only a plot over parameters"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_leaves_nothing(tmp_path, monkeypatch, how, why):
    monkeypatch.chdir(tmp_path)
    published(tmp_path / "r", "70m")
    with pytest.raises(ValueError, match=why):
        draw(tmp_path / "r", **{"out": "a.png", **how})
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def training_run(folder, losses):
    folder.mkdir(parents=True)
    text = "".join(json.dumps({"step": i, "loss": v}) + "\n" for i, v in enumerate(losses))
    (folder / "metrics.jsonl").write_text(text + '{"step": 99, "lo')
    (folder / "config.yaml").write_text(
        "training: {batch_size: 4}\ndata: {sequence_length: 8}\n"
        "model: {vocab_size: 128, hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 1,"
        " intermediate_size: 32}\n"
    )


def test_training_is_drawn_beside_scores(tmp_path):
    training_run(tmp_path / "run", [5.0, 4.5, 4.0])
    published(tmp_path / "run" / "evals", "70m")
    found = results.read([tmp_path / "run" / "evals"])
    wanted = ["training:loss", "lambada_openai:acc"]
    figure = plots.plot(found, wanted, x="tokens", runs=[tmp_path / "run"])
    assert figure is not None
    first, second = figure.axes
    assert lines(first) == {"run": ([0, 32, 64], [5.0, 4.5, 4.0])}
    assert lines(second)["70m"][0] == [step * TOKENS for step in STEPS]
    with pytest.raises(ValueError, match="no run has training:los; there are loss"):
        plots.plot([], "training:los", runs=[tmp_path / "run"])


def test_runs_of_one_name_are_two_lines(tmp_path):
    for where in "ab":
        training_run(tmp_path / where / "run", [5.0, ord(where)])
    figure = plots.plot([], "training:loss", runs=[tmp_path / w / "run" for w in "ab"])
    assert figure is not None
    found = lines(figure.axes[0])
    assert found == {str(tmp_path / w / "run"): ([0, 1], [5.0, ord(w)]) for w in "ab"}


def run(*arguments):
    return CliRunner().invoke(command, [str(a) for a in arguments])


def test_the_command_draws_and_says_where(tmp_path):
    published(tmp_path / "r", "70m")
    published(tmp_path / "r", "70m", (0.0, 0.1, 0.1, 0.2), shots=5)
    training_run(tmp_path / "run", [5.0, 4.5])
    out = tmp_path / "F.csv"
    wanted = ["--metric", "training:loss", "--metric", "lambada_openai:acc"]
    ran = run(tmp_path / "r", tmp_path / "run", *wanted, "--shots", 5, "--out", out)
    assert ran.exit_code == 0 and ran.output.strip().endswith(str(out))
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["value"] for row in rows] == ["5.0", "4.5", "0.0", "0.1", "0.1", "0.2"]
    assert [row["harness"] for row in rows] == [""] * 2 + ["2022"] * 4
    ran = run(tmp_path / "r", "--out", tmp_path / "F.png")
    assert ran.exit_code == 0 and (tmp_path / "F.png").stat().st_size > 10_000


def test_the_command_refuses_shots_and_runs_that_are_not_there(tmp_path):
    published(tmp_path / "r", "70m")
    out = tmp_path / "F.png"
    ran = run(tmp_path / "r", "--shots", 3, "--out", out)
    assert "no 3-shot results; there are 0" in str(ran.exception)
    ran = run(tmp_path / "r", "--metric", "training:loss", "--out", out)
    assert "none of the paths is a run" in str(ran.exception)
    assert not out.exists()
