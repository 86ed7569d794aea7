"""Files as published with Pythia: the numbers of the paper, and every kind of file told apart."""

import logging

import numpy as np
import pytest
from result_files import GIVEN, PUBLISHED

from pythia_jax.evaluation import plots, points, results

# Step 143000, zero-shot: lambada_openai's accuracy and perplexity, then accuracies.
FINAL = {
    "70m": (0.1915, 138.45, 0.5979, 0.606, 0.3847, 0.1621, 0.4917),
    "410m": (0.5244, 10.574, 0.6746, 0.826, 0.5168, 0.2022, 0.5335),
    "1.4b": (0.6187, 6.1069, 0.7203, 0.865, 0.6170, 0.2722, 0.5659),
}
WANTED = [
    ("lambada_openai", "acc"),
    ("lambada_openai", "perplexity"),
    *((task, "acc") for task in ("piqa", "sciq", "arc_easy", "arc_challenge", "winogrande")),
]
# Of one model that was trained on with pronouns swapped, and of another batch size, and of v0:
# (model, version, step, shots, kind, notes) and lambada_openai's accuracy.
KINDS = {
    ("pythia-1.4b-deduped", "v1", 0, 0, "plain", ()): 0.0,
    ("pythia-1.4b-deduped", "v1", 143_000, 0, "plain", ()): 0.6187,
    ("pythia-1.4b-deduped", "v1", 143_000, 5, "plain", ()): 0.5676,
    ("pythia-1.4b-deduped", "v1", 143_000, 0, "baseline", ()): 0.6185,
    ("pythia-1.4b-deduped", "v1", 137_000, 0, "intervention", ()): 0.6088,
    ("pythia-1.4b-deduped", "v1", 143_000, 0, "intervention", ()): 0.6214,
    ("pythia-1.4b-deduped", "v1", 137_000, 0, "long-intervention", ()): 0.6202,
    ("pythia-70m-deduped", "v1", 134_000, 0, "baseline", ()): 0.1861,
    ("pythia-160m-0.5MtokBS", "v1", 12_000, 5, "batch-size", ()): 0.1941,
    ("pythia-160m", "v0", 143_000, 0, "plain", ()): 0.3877,
    ("pythia-160m", "v0", 43_000, 5, "plain", ("its config says zero-shot",)): 0.3035,
    # Scored within GPT-NeoX under the sizes' names of 2022, in steps of twice the tokens.
    ("pythia-410m-deduped", "v0", 134_000, 0, "intervention", ()): 0.4970,
    ("pythia-1.4b-deduped", "v0", 114_000, 0, "long-intervention", ()): 0.5783,
    ("opt-125m", None, None, 0, "plain", ()): 0.3790,
    ("opt-1.3b", None, None, 0, "plain", ()): 0.5793,
    ("bloom-1b1", None, None, 0, "plain", ()): 0.4258,
}

given = pytest.mark.skipif(
    not GIVEN.is_dir(), reason="the whole published results do not lie beside this repository"
)


@pytest.mark.parametrize(
    "folder, size",
    [
        *((PUBLISHED, size) for size in FINAL),
        *(pytest.param(GIVEN, size, marks=given) for size in ("70m", "410m")),
    ],
)
def test_final_scores_are_those_of_the_paper(folder, size):
    found = results.read([folder])
    asked = (f"pythia-{size}-deduped", 143_000, 0, "v1", "plain")
    (result,) = (r for r in found if (r.model, r.step, r.num_fewshot, r.version, r.kind) == asked)
    for (task, metric), value in zip(WANTED, FINAL[size], strict=True):
        score = result.value(task, metric)
        assert score is not None
        assert score[0] == pytest.approx(value, abs=5e-5, rel=5e-5)


def test_every_kind_of_published_file_is_told_apart():
    found = {
        (r.model, r.version, r.step, r.num_fewshot, r.kind, r.notes): r
        for r in results.read([PUBLISHED])
    }
    assert KINDS.keys() <= found.keys()
    rest = {(model, shots, kind) for model, _, _, shots, kind, _ in found.keys() - KINDS.keys()}
    assert rest == {("pythia-70m-deduped", 0, "plain"), ("pythia-410m-deduped", 0, "plain")}
    for key, value in KINDS.items():
        score = found[key].value("lambada_openai", "acc")
        assert score is not None and score[0] == pytest.approx(value, abs=5e-5)
        assert found[key].harness == "2022" and found[key].parameters


def test_perplexities_at_step_0_tell_the_initialisation():
    found = points.points(results.read([PUBLISHED]), "lambada_openai:ppl")
    first = {p.result.size: p.value for p in found if p.result.step == 0}
    assert first["1.4b"] == pytest.approx(3_594_272.66, abs=5e-3)
    assert first["410m"] == pytest.approx(3_617_040.82, abs=5e-3)
    assert first["70m"] == pytest.approx(3_684_074.45, abs=5e-3)


def test_winobias_files_are_refused_by_name_and_left_out_of_their_folder(caplog):
    folder = PUBLISHED / "bias-evals"
    listed, bare = sorted((folder / "winobias").rglob("*.json"))
    with pytest.raises(ValueError, match=r"is a list, as in .*; .*has no `results`") as refused:
        results.read([listed, bare])
    assert listed.name in str(refused.value) and bare.name in str(refused.value)
    with caplog.at_level(logging.WARNING):
        kinds = [result.kind for result in results.read([folder])]
    assert sorted(kinds) == ["intervention", "long-intervention"]
    assert "2 files left out" in caplog.text


def test_kinds_and_shots_of_one_model_are_lines_of_their_own():
    figure = plots.plot(results.read([PUBLISHED / "pythia-v1" / "pythia-1.4b-deduped"]))
    assert figure is not None
    (axes,) = figure.axes
    steps = {str(line.get_label()): np.asarray(line.get_xdata()).tolist() for line in axes.lines}
    assert steps == {
        "1.4b-deduped · zero-shot": [0, 143_000],
        "1.4b-deduped · five-shot": [143_000],
        "1.4b-deduped baseline · zero-shot": [143_000],
        "1.4b-deduped intervention · zero-shot": [137_000, 143_000],
        "1.4b-deduped long-intervention · zero-shot": [137_000],
    }


@given
def test_every_given_file_is_read():
    found = results.read([GIVEN])
    assert len(found) == len(list(GIVEN.rglob("*.json"))) > 70
    assert all(not result.notes and result.parameters for result in found)
    steps = [r.step for r in found if r.model == "pythia-70m-deduped" and r.step is not None]
    assert sorted(steps) == [0, *(2**i for i in range(10)), 1000, *range(3000, 143_001, 10_000)]
    v0 = [r.step for r in found if r.version == "v0" and r.step is not None]
    assert sorted(v0) == [*range(3000, 143_001, 10_000)]


@given
def test_the_given_files_are_drawn():
    wanted = ["lambada_openai:acc", "lambada_openai:ppl", "blimp:acc", "mmlu:acc"]
    figure = plots.plot(results.read([GIVEN]), wanted)
    assert figure is not None
    acc, _, blimp, mmlu = (
        {str(line.get_label()): line for line in axes.lines if not line.get_gid()}
        for axes in figure.axes
    )
    assert list(acc) == ["70m-deduped", "160m v0", "410m-deduped"]
    assert np.asarray(acc["70m-deduped"].get_ydata())[-1] == pytest.approx(0.1915, abs=5e-5)
    assert list(blimp) == ["160m v0"] and len(mmlu) == 3
    assert len([line for line in figure.axes[0].lines if line.get_gid()]) == 7
