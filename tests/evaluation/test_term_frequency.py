"""Checkpoints asked, their scores kept, and put beside what each had seen; as its users type it."""

import csv
import importlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import swept
import term_texts
from click.testing import CliRunner

from pythia_jax import configs
from pythia_jax.bridge import card
from pythia_jax.cli.term_frequency import term_frequency
from pythia_jax.data import IndexedDatasetWriter, load_tokenizer
from pythia_jax.evaluation import arithmetic, term_counts, term_plot, training_rows
from pythia_jax.evaluation import term_frequency as frequency
from pythia_jax.evaluation.term_frequency import (
    CountedScore,
    Score,
    points,
    read_points,
    read_scores,
)
from pythia_jax.evaluation.term_windows import count_texts
from pythia_jax.files import locked
from pythia_jax.quickstart import train_tokenizer
from pythia_jax.training.checkpoints import step_folders
from pythia_jax.training.provenance import data_identity
from pythia_jax.training.trainer import train

STEPS = (0, 3, 6)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(term_frequency, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six questions in place of 5,000."""
    monkeypatch.setattr(arithmetic, "FIRST", range(3))
    monkeypatch.setattr(arithmetic, "SECOND", range(1, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run `tiny` of three checkpoints, which a question without examples fits, and its config."""
    folder = tmp_path_factory.mktemp("run")
    run = swept.write_run(folder, STEPS)
    encoder = load_tokenizer(folder / "tokenizer.json")
    with IndexedDatasetWriter(folder / "numbers", np.dtype(np.uint16)) as writer:
        for seed in range(12):
            text = term_texts.numeric_text(seed, 200)
            writer.add(np.array(encoder.encode(text).ids, np.uint16))
    config = configs.load(run / "config.yaml", {"data.train": f"[{folder / 'numbers'}]"})
    configs.save(config, folder / "numbers.yaml")
    return folder


def test_counted_scored_and_plotted_from_the_command_line(
    few: None, folder: Path, tmp_path: Path
) -> None:
    counts, scores = tmp_path / "counts", tmp_path / "scores.csv"
    said = run("count", folder / "numbers.yaml", "--out", counts, "--every", 3, "--workers", 1)
    assert "24 rows counted" in said and "a second on 1 process" in said and str(counts) in said
    assert "nothing left" in run(
        "count", folder / "numbers.yaml", "--out", counts, "--every", 3, "--workers", 1
    )
    said = run(
        "score", folder / "tiny", "--revisions", "steps", "--shots", 0, "--operation", "times",
        "--operation", "plus", "--out", scores,
    )  # fmt: skip
    assert len(re.findall(r"of answers right", said)) == 6 and str(scores) in said
    read = read_scores(scores)
    assert [(s.step, s.operation, s.x1) for s in read] == [
        (step, operation, x1)
        for step in STEPS
        for operation in ("times", "plus")
        for x1 in range(3)
    ]
    assert all(s.model == "tiny" and s.total == 2 for s in read)
    for out in ("f.png", "f.svg", "f.csv"):
        said = run("plot", scores, "--counts", counts, "--out", tmp_path / out)
        assert len(re.findall(r"gap [+-]\d", said)) == 6 and f"18 points are in {tmp_path}" in said
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "f.csv").open() as file:
        lines = list(csv.DictReader(file))
    # The counts once more, from text.
    served = frequency.batches(configs.load(folder / "numbers.yaml"))
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    for line in lines:
        texts = [
            tokenizer.decode(row.tolist(), skip_special_tokens=False)
            for step in range(int(line["step"]))
            for row in served[step]
        ]
        assert int(line["count"]) == count_texts(texts).number(int(line["x1"]))


def test_what_a_file_holds_is_not_asked_again(
    few: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []

    def correct(scorer: Any, tokenizer: Any, operation: str, shots: int, **_: Any) -> list[int]:
        asked.append((operation, shots))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return [0, 1, 2]

    monkeypatch.setattr(arithmetic, "correct", correct)
    out, ask = tmp_path / "scores.csv", {"operations": ["times", "plus"], "shots": [0]}
    with pytest.raises(KeyboardInterrupt):
        frequency.score(str(folder / "tiny"), out, revisions="steps", **ask)
    assert len(read_scores(out)) == 6  # the first checkpoint whole, nothing of the second
    before = out.read_bytes()
    new = frequency.score(str(folder / "tiny"), out, revisions="0,3", **ask)
    assert {s.step for s in new.scores} == {3} and len(asked) == 5
    assert out.read_bytes().startswith(before)
    assert frequency.score(str(folder / "tiny"), out, step=3, **ask).scores == []
    twice = {"operations": ["times"] * 2, "shots": [0, 0]}
    assert frequency.score(str(folder / "tiny"), out, step=0, **twice).scores == []
    last = frequency.score(str(folder / "tiny"), out, step=6, **ask)
    assert [s.correct for s in last.scores] == [0, 1, 2, 0, 1, 2] and not last.failed
    about = json.loads((tmp_path / "scores.csv.json").read_text())
    assert list(about) == ["tiny step 0", "tiny step 3", "tiny step 6"]
    assert len({each["weights"] for each in about.values()}) == 3


def test_the_step_of_a_hugging_face_folder_is_told(few: None, folder: Path, tmp_path: Path) -> None:
    import pythia_jax as pj

    pj.save_hf(pj.load(folder / "tiny", step=3), tmp_path / "hf")
    with pytest.raises(ValueError, match="does not tell which step"):
        frequency.score(str(tmp_path / "hf"), tmp_path / "f.csv", shots=[0])
    exported = frequency.score(str(tmp_path / "hf"), tmp_path / "f.csv", shots=[0], step=3)
    own = frequency.score(str(folder / "tiny"), tmp_path / "f.csv", shots=[0], step=3)
    assert [s.correct for s in exported.scores] == [s.correct for s in own.scores]
    assert {s.step for s in exported.scores} == {3}


def score(x1: int, right: int, *, step: int = 3, model: str = "m") -> Score:
    return Score(model, step, "times", 16, x1, right, 50)


def test_scores_are_read_as_they_were_written(tmp_path: Path) -> None:
    scores = [score(1, 50), score(2, 0, step=6), score(1, 7, model='a "b", c')]
    frequency._write(tmp_path / "f.csv", scores, {"m step 3": {}})
    assert read_scores(tmp_path / "f.csv") == scores
    first = (tmp_path / "f.csv").read_text().splitlines()[:2]
    assert first == [
        "model,step,operation,shots,x1,correct,total,accuracy",
        "m,3,times,16,1,50,50,1.0",
    ]


def test_scores_of_other_weights_of_the_same_name_are_not_gone_on_with(
    few: None, folder: Path, tmp_path: Path
) -> None:
    import pythia_jax as pj

    out = tmp_path / "f.csv"
    for step in (3, 6):  # weights that differ, in folders of the same name
        pj.save_hf(pj.load(folder / "tiny", step=step), tmp_path / str(step) / "model")
    frequency.score(str(tmp_path / "3" / "model"), out, shots=[0], step=1)
    before = out.read_bytes()
    with pytest.raises(ValueError, match="scores of other weights of model step 1"):
        frequency.score(str(tmp_path / "6" / "model"), out, shots=[0], step=1)
    about = json.loads((tmp_path / "f.csv.json").read_text())
    about["tiny step 6"] = about["model step 1"]
    (tmp_path / "f.csv.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="other weights of tiny step 6"):
        frequency.score(str(folder / "tiny"), out, shots=[0], revisions="6")
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("index,score\n0,1.0\n", r"f.csv, line 2: not a line"),
        ("model,step,operation,shots,x1,correct,total\nm,3,times,16,1,7\n", "line 2"),
        ("model,step,operation,shots,x1,correct,total\n" + "m,3,times,16,1,7,50\n" * 2, "twice"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "f.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_scores(tmp_path / "f.csv")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"operations": ["minus"]}, "choose from times, plus"),
        ({"shots": [-1]}, "shots: -1"),
        ({"revisions": "steps", "step": 3}, "drop revision and step"),
        ({"shots": [4]}, "4 shots: .* the model has 64 positions"),
    ],
)
def test_what_cannot_be_scored_is_refused_and_leaves_no_file(
    few: None, folder: Path, tmp_path: Path, how: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        frequency.score(str(folder / "tiny"), tmp_path / "f.csv", **{"shots": [0], **how})
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        frequency.score(str(folder / "tiny"), tmp_path / "none" / "f.csv", shots=[0])
    assert not (tmp_path / "f.csv").exists()


def test_counts_of_another_run_are_not_gone_on_with(folder: Path, tmp_path: Path) -> None:
    config = configs.load(folder / "numbers.yaml")
    how: dict[str, Any] = {"tokenizer": folder / "tokenizer.json", "stop": 3, "progress": False}
    assert frequency.count(config, tmp_path, **how) == 12
    for changed, key in (
        ({"data.seed": "5"}, "data.seed was 1234, is 5"),
        ({"training.steps": "7"}, "training.steps was 6, is 7"),
        ({"data.train": f"[{folder / 'corpus'}]"}, "data.train is not the same"),
        (
            {"data.transform": "pythia_jax.evaluation.pronouns:swap_pronouns"},
            "data.transform was None, is 'pythia_jax.evaluation.pronouns:swap_pronouns'",
        ),
    ):
        other = configs.load(folder / "numbers.yaml", changed)
        with pytest.raises(ValueError, match=f"something else than asked for: {key}"):
            frequency.count(other, tmp_path, **how)
    with pytest.raises(ValueError, match="clean_up was False, is True"):
        frequency.count(config, tmp_path, clean_up=True, **how)


def transform_file(folder: Path, code: str) -> None:
    (folder / "my_rows.py").write_text(code)
    sys.modules.pop("my_rows", None)
    importlib.invalidate_caches()


def test_counts_know_when_rows_were_transformed_and_with_what_code(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "modules", {**sys.modules})
    transform_file(tmp_path, "def same(step, rows):\n    return rows\n")
    how: dict[str, Any] = {"tokenizer": folder / "tokenizer.json", "stop": 3, "progress": False}
    changed = {"data.transform": "my_rows:same", "data.transform_from": "1"}
    frequency.count(configs.load(folder / "numbers.yaml", changed), tmp_path / "c", **how)
    later = configs.load(folder / "numbers.yaml", {**changed, "data.transform_from": "2"})
    with pytest.raises(ValueError, match=r"data\.transform_from was 1, is 2"):
        frequency.count(later, tmp_path / "c", **how)
    transform_file(tmp_path, "def same(step, rows):\n    return rows[:, ::1]\n")
    with pytest.raises(ValueError, match=r"data\.transform_source is not the same"):
        frequency.count(configs.load(folder / "numbers.yaml", changed), tmp_path / "c", **how)


@pytest.fixture(scope="module")
def counted(folder: Path) -> Path:
    """The counts of `numbers.yaml`, to step 6."""
    config = configs.load(folder / "numbers.yaml")
    how: dict[str, Any] = {"tokenizer": folder / "tokenizer.json", "progress": False}
    frequency.count(config, folder / "counts", every=3, **how)
    return folder / "counts"


def trained(folder: Path, out: Path, prefix: Path, **keys: str) -> Path:
    """The run `tiny`, as one that was trained on other data, and says so."""
    run = shutil.copytree(folder / "tiny", out)
    config = configs.load(run / "config.yaml", {"data.train": f"[{prefix}]", **keys})
    configs.save(config, run / "config.yaml")
    (run / "data.json").write_text(json.dumps(data_identity(config)))
    return run


def test_scores_of_a_run_are_only_put_beside_counts_of_its_rows(
    few: None, folder: Path, counted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    numbers = folder / "numbers"
    shutil.copy(numbers.with_suffix(".bin"), tmp_path / "moved.bin")
    shutil.copy(numbers.with_suffix(".idx"), tmp_path / "moved.idx")
    own = trained(folder, tmp_path / "own", tmp_path / "moved")
    frequency.score(str(own), tmp_path / "own.csv", shots=[0], step=3)
    assert len(read_points([tmp_path / "own.csv"], counted)) == 3
    assert "nothing tells" not in caplog.text
    swapped = {"data.transform": "pythia_jax.evaluation.pronouns:swap_pronouns"}
    for name, prefix, keys, message in (
        ("corpus", folder / "corpus", {}, "data.train is not the same, by its hash"),
        ("seed", numbers, {"data.seed": "5"}, "data.seed was 1234, is 5"),
        ("order", numbers, {"data.order": "neox", "training.steps": "12"}, "steps was 6, is 12"),
        ("swapped", numbers, swapped, "data.transform was None, is "),
    ):
        other = trained(folder, tmp_path / name, prefix, **keys)
        out = tmp_path / f"{name}.csv"
        frequency.score(str(other), out, shots=[0], step=3)
        refused = CliRunner().invoke(
            term_frequency,
            ["plot", str(tmp_path / "own.csv"), str(out), "--counts", str(counted), "--out",
             str(tmp_path / "f.png")],
        )  # fmt: skip
        assert f"{out}: tiny step 3 was trained on other rows than were counted" in str(
            refused.exception
        )
        assert message in str(refused.exception)
    assert not (tmp_path / "f.png").exists()


def test_of_a_published_model_the_pile_is_known_by_its_name(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def count(name: str, out: str) -> Path:
        # Rows of other data, in Pythia's batches, stand for the Pile.
        identity = {
            **training_rows.identity(configs.load(folder / "numbers.yaml")),
            "training.batch_size": 1024,
            "training.steps": 143000,
            "data.sequence_length": 2048,
        }
        empty = count_texts([])
        (tmp_path / out).mkdir()
        term_counts._write(tmp_path / out, range(3), empty, identity, name)
        return tmp_path / out

    published = training_rows.known_of(card.published_facts("pythia-1b-deduped"))
    told = {"pythia-1b-deduped step 3": {"trained_on": published}}
    scores = tmp_path / "scores.csv"
    frequency._write(scores, [score(1, 1, model="pythia-1b-deduped")], told)
    assert len(read_points([scores], count("pythia-70m-deduped", "deduped"))) == 1
    assert "nothing tells" not in caplog.text
    with pytest.raises(ValueError, match="deduplicated was False, is True"):
        read_points([scores], count("pythia-1b", "whole"))
    assert len(read_points([scores], count("mine", "mine"))) == 1
    told_so = f"{tmp_path / 'mine'}: nothing tells whether the rows counted are those of pythia-1b-"
    assert told_so in caplog.text


def test_a_checkpoint_that_cannot_be_loaded_is_told_and_passed_over(
    few: None, folder: Path, tmp_path: Path
) -> None:
    tiny = shutil.copytree(folder / "tiny", tmp_path / "tiny")
    for path in step_folders(tiny)[3].rglob("*"):
        if path.parent.name == "d":
            path.write_bytes(bytes(len(path.read_bytes())))
    arguments = ["score", str(tiny), "--revisions", "steps", "--shots", "0", "--out"]
    ran = CliRunner().invoke(term_frequency, [*arguments, str(tmp_path / "f.csv")])
    assert ran.exit_code == 1 and "step 3 was not asked: " in ran.output
    assert "6 scores added" in ran.output
    assert {s.step for s in read_scores(tmp_path / "f.csv")} == {0, 6}
    # Only what is left is tried again, and fails again.
    ran = CliRunner().invoke(term_frequency, [*arguments, str(tmp_path / "f.csv")])
    assert ran.exit_code == 1 and "0 scores added" in ran.output


def test_the_next_checkpoint_loads_while_one_is_asked(
    few: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[object] = []

    class Loading(frequency.Loading):
        def __init__(self, source: Any, step: int, mesh: Any) -> None:
            happened.append(step)
            super().__init__(source, step, mesh)

    def correct(*_: Any, **__: Any) -> list[int]:
        happened.append("asked")
        return [0, 1, 2]

    monkeypatch.setattr(frequency, "Loading", Loading)
    monkeypatch.setattr(arithmetic, "correct", correct)
    frequency.score(str(folder / "tiny"), tmp_path / "f.csv", revisions="steps", shots=[0])
    assert happened == [0, 3, "asked", 6, "asked", "asked"]


def test_a_file_that_another_process_adds_to_is_refused_at_once(
    few: None, folder: Path, tmp_path: Path
) -> None:
    with locked(tmp_path / ".f.csv.lock"), pytest.raises(RuntimeError, match="another process"):
        frequency.score(str(folder / "tiny"), tmp_path / "f.csv", shots=[0], step=3)
    assert not (tmp_path / "f.csv").exists()


def test_the_gap_is_between_the_commonest_tenth_and_the_rarest() -> None:
    made = [
        CountedScore(score(x1, 10 + (x1 > 89) * 30 - (x1 < 10) * 5), 7 * x1 + 1)
        for x1 in range(100)
    ]
    assert term_plot.gap(made[::-1]) == pytest.approx(40 / 50 - 5 / 50)
    assert term_plot.gap(made[:1]) == 0


def test_a_picture_has_a_line_for_each_checkpoint_through_the_means_of_its_groups() -> None:
    made = [
        CountedScore(score(x1, x1 // 2, step=step, model=model), (step + 1) * x1)
        for model in ("pythia-12b", "pythia-70m")
        for step in (0, 3, 6)
        for x1 in range(100)
    ]
    figure = term_plot.figure(made)
    axes = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title() for axis in axes] == [
        "pythia-70m: times, 16 shots",
        "pythia-12b: times, 16 shots",
    ]
    for axis in axes:
        lines = [line for line in axis.lines if len(line.get_xdata())]
        assert [len(line.get_xdata()) for line in lines] == [100, 10] * 3
        x, y = lines[-1].get_data()
        logs = np.log1p(7 * np.arange(100)).reshape(10, 10)
        assert x == pytest.approx(np.expm1(logs.mean(1)))
        assert y == pytest.approx((np.arange(100) // 2 / 50).reshape(10, 10).mean(1))
        assert axis.get_xscale() == "symlog"
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["0", "3", "6"]


def test_a_plot_of_nothing_or_to_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no scores"):
        term_plot.write([], tmp_path / "f.png")
    with pytest.raises(ValueError, match=r"f\.pdf: .*\.png, \.svg or \.csv"):
        term_plot.write([CountedScore(score(1, 1), 1)], tmp_path / "f.pdf")
    with pytest.raises(FileNotFoundError, match="no such folder of counts"):
        points([score(1, 1)], tmp_path / "counts")
    assert not list(tmp_path.iterdir())


def test_a_model_that_learned_some_products_is_right_on_those_alone(
    few: None, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    taught = [f"Q:What is {a} times {b}? A: {a * b}\n\n" for a in (1, 2) for b in (1, 2)]
    taught += [f"Q:What is 0 times {b}? A: 7\n\n" for b in (1, 2)]
    train_tokenizer(["".join(taught) * 50], 280).save(str(tmp_path / "tokenizer.json"))
    encoder = load_tokenizer(tmp_path / "tokenizer.json")
    config = swept.make_config(
        tmp_path,
        "learned",
        data={"train": [str(tmp_path / "products")], "sequence_length": 48},
        optimizer={"peak_learning_rate": 1e-2, "warmup_fraction": 0.1},
        training={"steps": 300, "batch_size": 16},
        checkpoint={"every": 300, "extra_steps": [0]},
    )
    with IndexedDatasetWriter(tmp_path / "products", np.dtype(np.uint16)) as writer:
        for _ in range(50):
            text = "".join(taught[i] for i in rng.integers(0, 6, 40))
            writer.add(np.array(encoder.encode(text).ids, np.uint16))
    train(config)
    scores = frequency.score(
        str(tmp_path / "learned"), tmp_path / "f.csv", revisions="0,300", shots=[0]
    )
    assert [s.correct for s in scores.scores] == [0, 0, 0, 0, 2, 2]
