"""Which scores are one line: flagged ones beside good ones, and runs by their names."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from result_files import lambada, old_file, returned

from pythia_jax.evaluation import plots, points, results

FAULT = "holds weights from the end of training (pythia#205)"


def ours(
    folder: Path, name: str, scores: dict[int, float], limit: Any = None, **about: Any
) -> Path:
    """Files of a model as we write them; scores: step → accuracy."""
    for step, acc in scores.items():
        found = returned({"lambada_openai": {"acc": acc}}, limit=limit)
        results.write(folder, found, model_name=name, step=step, provenance=about)
    return folder


def drawn(*folders: Path, **how: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Label → (x, y) of the lines of a plot."""
    figure = plots.plot(results.read(folders), **how)
    assert figure is not None
    (axes,) = figure.axes
    return {
        str(line.get_label()): (
            np.asarray(line.get_xdata()).tolist(),
            np.asarray(line.get_ydata()).tolist(),
        )
        for line in axes.lines
    }


@pytest.mark.parametrize(
    "limit, about, note",
    [(20, {}, "first 20 questions"), (None, {"known_fault": FAULT}, FAULT)],
    ids=["limit", "fault"],
)
def test_flagged_scores_are_a_line_beside_the_good_ones_of_the_same_steps(
    tmp_path, limit, about, note
):
    whole = ours(tmp_path / "whole", "pythia-70m", {0: 0.1, 8: 0.2})
    flagged = ours(tmp_path / "flagged", "pythia-70m", {0: 0.3, 8: 0.4}, limit, **about)
    assert drawn(whole, flagged) == {
        "70m": ([0, 8], [0.1, 0.2]),
        f"70m · {note}": ([0, 8], [0.3, 0.4]),
    }


def test_flagged_files_that_differ_among_themselves_are_refused(tmp_path):
    one, other = (
        ours(tmp_path / name, "pythia-70m", {0: acc}, 20) for name, acc in (("a", 0.1), ("b", 0.2))
    )
    with pytest.raises(ValueError, match="two files differ about"):
        drawn(one, other)
    # Of other questions: of another line.
    third = ours(tmp_path / "c", "pythia-70m", {0: 0.2}, 0.5)
    assert len(drawn(one, third)) == 2


def test_the_last_step_of_a_model_is_that_of_its_good_files(tmp_path):
    good = ours(tmp_path / "good", "pythia-70m", {8: 0.1, 16: 0.2})
    ours(tmp_path / "good", "pythia-160m", {16: 0.3})
    earlier = ours(tmp_path / "earlier", "pythia-70m", {4: 0.9}, known_fault=FAULT)
    later = ours(tmp_path / "later", "pythia-70m", {32: 0.9}, known_fault=FAULT)
    sizes = [18_915_328, 85_056_000]
    assert drawn(good, earlier, later, x="parameters") == {"Pythia": (sizes, [0.2, 0.3])}
    # At its own step a flagged score has its place.
    assert drawn(good, earlier, later, x="parameters", step=32) == {
        f"Pythia · {FAULT}": (sizes[:1], [0.9])
    }


def test_over_parameters_limited_scores_stand_beside_the_whole_ones_of_the_last_step(tmp_path):
    whole = ours(tmp_path / "whole", "pythia-70m", {8: 0.1, 16: 0.2})
    limited = ours(tmp_path / "limited", "pythia-70m", {8: 0.3, 16: 0.4}, 20)
    assert drawn(whole, limited, x="parameters") == {
        "Pythia": ([18_915_328], [0.2]),
        "Pythia · first 20 questions": ([18_915_328], [0.4]),
    }


def test_baselines_of_a_part_of_the_questions_are_named_so(tmp_path):
    lambada(tmp_path, "70m", 0, 0.1)
    for name, limit in (("whole", None), ("part", 100)):
        path = tmp_path / name / "opt-125m.json"
        old_file(path, {"lambada_openai": {"acc": 0.3}}, model_args="pretrained=facebook/opt-125m")
        content = json.loads(path.read_text())
        content["config"]["limit"] = limit
        path.write_text(json.dumps(content))
    figure = plots.plot(results.read([tmp_path]))
    assert figure is not None
    named = sorted(text.get_text() for text in figure.axes[0].texts)
    assert named == ["opt-125m", "opt-125m · first 100 questions"]


def run(folder: Path, name: str | None, losses: list[float]) -> Path:
    folder.mkdir(parents=True)
    lines = [json.dumps({"step": i, "loss": loss}) + "\n" for i, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    named = "" if name is None else f"name: {name}\n"
    (folder / "config.yaml").write_text(f"{named}training: {{batch_size: 4}}\n")
    return folder


def test_a_run_is_called_what_its_config_calls_it(tmp_path):
    here = run(tmp_path / "out" / "run", "poems", [5.0, 4.0])
    (first, _) = points.training_points([here, f"{here}/"], "loss")
    assert first.result.model == "poems"
    assert first.result.tokens_per_step == 4 * 2048


def test_losses_of_seeds_are_one_line_with_its_range(tmp_path):
    for seed in (1, 2):
        run(tmp_path / f"s{seed}", f"pythia-70m-seed{seed}", [5.0, 4.0 + seed])
    found = points.training_points([tmp_path / "s1", tmp_path / "s2"], "loss")
    (curve,) = points.curves(found, "step")
    assert (curve.y, curve.low, curve.high) == ([5.0, 5.5], [5.0, 5.0], [5.0, 6.0])


def test_a_run_without_a_config_is_called_by_its_folder_and_told(tmp_path, caplog):
    folder = run(tmp_path / "lost", None, [5.0])
    (folder / "config.yaml").unlink()
    (point,) = points.training_points([folder], "loss")
    assert point.result.model == "lost" and "are not known" in caplog.text
