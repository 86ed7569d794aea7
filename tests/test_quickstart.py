"""The whole road at a smaller size, as its user walks it."""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

import pythia_jax as pj
from pythia_jax import configs, quickstart
from pythia_jax.cli import main
from pythia_jax.configs import RunConfig
from pythia_jax.training.telemetry import read_metrics


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped config, cut to a few seconds."""
    real = quickstart._config

    def config(out: Path) -> RunConfig:
        values = configs.to_dict(real(out))
        values["training"] |= {"steps": 60, "batch_size": 4}
        values["model"]["num_hidden_layers"] = 2
        values["evaluation"]["every"] = 30
        return configs.from_dict(values)

    monkeypatch.setattr(quickstart, "_config", config)
    monkeypatch.setattr(quickstart, "MAX_CHARACTERS", 600_000)


def test_the_whole_road_leaves_what_the_summary_promises(
    short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner().invoke(main, ["quickstart", "--out", "q"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    summary = Path("q/summary.txt").read_text()
    assert "checkpoint 30" in summary and "bigram" in summary and summary in result.output
    for path in re.findall(r"^  (q/\S+)", summary, re.MULTILINE):
        assert Path(path).exists(), path
    lines = read_metrics(Path("q/run/metrics.jsonl"))
    assert lines[0]["loss"] - lines[-2]["loss"] > 1.0

    model = pj.load("q/hf")
    reference = AutoModelForCausalLM.from_pretrained("q/hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained("q/hf")
    assert model.tokenizer is not None
    text = "def f(x):\n    return x + 1\n"
    ids = model.tokenizer.encode(text).ids
    assert tokenizer(text)["input_ids"] == ids
    with torch.no_grad():
        theirs = reference(torch.tensor([ids])).logits.numpy()
    ours = pj.forward(model.params, np.array([ids], np.int32), model.config)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)

    # The commands that the summary tells people to try.
    commands = re.findall(r"^  \S*pythia-jax (.*)$", summary, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["generate", "data", "train"]
    for command in commands:
        arguments = ["62" if a == "2000" else a for a in shlex.split(command)]
        done = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    rows = np.load("batch.npy")

    # The run's own config finds the data wherever one stands.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = pj.load_config(tmp_path / "q" / "run" / "config.yaml")
    np.testing.assert_array_equal(pj.data.batches(config)[0], rows)
    assert config.tokenizer is not None and Path(config.tokenizer).is_file()
    assert Path(config.checkpoint.directory) == tmp_path / "q" / "run"


def test_text_of_ones_own_and_a_second_run_over_the_first(short: None, tmp_path: Path) -> None:
    text = tmp_path / "novel.txt"
    rng = np.random.default_rng(0)
    words = ["whale", "ship", "captain", "sea", "the", "of", "and", "a", "leg", "white"]
    text.write_text(" ".join(rng.choice(words, 60_000)))
    # A place whose name means something to YAML and to a shell.
    out = tmp_path / "my, runs: #1&2"
    for _ in range(2):
        made = quickstart.quickstart(out, [text], say=lambda line: None, show_progress=False)
        (out / ".hf.replaced").mkdir()  # a killed export's
        (out / ".hf.partial-1").mkdir()
        (out / "notes.txt").write_text("the user's")
    # One of ten words drawn evenly is ln 10 nats, which nothing can beat and which is easy to
    # come near; not knowing the words is ln 4096, 8.3.
    assert 0.98 * np.log(10) < made.held_out_loss < 1.1 * np.log(10)
    assert (out / "notes.txt").exists()
    assert pj.load(out / "run").tokenizer is not None
    for command in re.findall(r"pythia-jax (.*)$", made.text(), re.MULTILINE):
        arguments = shlex.split(command)
        paths = [a for a in arguments if a.startswith(str(tmp_path))]
        assert paths and {p.removesuffix("-longer").split("/run/")[0] for p in paths} <= {
            str(out),
            str(out / "hf"),
        }
    with pytest.raises(ValueError, match="too little text"):
        small = tmp_path / "small.txt"
        small.write_text("a few words")
        quickstart.quickstart(tmp_path / "p", [small], say=lambda line: None)


def test_a_folder_with_other_things_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="choose another folder"):
        quickstart.quickstart(tmp_path, say=lambda line: None)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("name", ["data", "run", "hf", "summary.txt"])
def test_a_folder_that_no_quickstart_made_keeps_what_has_the_names_of_ours(
    name: str, tmp_path: Path
) -> None:
    own = tmp_path / name / "mine.txt" if name != "summary.txt" else tmp_path / name
    own.parent.mkdir(exist_ok=True)
    own.write_text("years of work")
    with pytest.raises(FileExistsError, match="choose another folder"):
        quickstart.quickstart(tmp_path, say=lambda line: None)
    assert own.read_text() == "years of work"
    assert not (tmp_path / quickstart.MARKER).exists()


def test_what_an_earlier_one_made_stays_where_there_is_nothing_to_put_in_its_place(
    tmp_path: Path,
) -> None:
    out = tmp_path / "q"
    quickstart._clear(out)
    (out / quickstart.SUMMARY).write_text("made before")
    with pytest.raises(FileNotFoundError, match="nonesuch"):
        quickstart.quickstart(out, [tmp_path / "nonesuch"], say=lambda line: None)
    assert (out / quickstart.SUMMARY).read_text() == "made before"


def test_only_what_a_quickstart_makes_is_cleared_and_links_are_not_followed(
    tmp_path: Path,
) -> None:
    out, mine = tmp_path / "new" / "q", tmp_path / "mine"
    mine.mkdir()
    (mine / "model").write_text("years of work")
    quickstart._clear(out)
    for part in ("run", ".hf.partial-12", ".hf.replaced", "other"):
        (out / part).mkdir()
        (out / part / "file").write_text("x")
    (out / "data" / "train.bin").write_text("x")
    (out / "summary.txt").write_text("x")
    (out / "hf").symlink_to(mine)
    quickstart._clear(out)
    assert {path.name for path in out.iterdir()} == {quickstart.MARKER, "data", "other"}
    assert not list((out / "data").iterdir())
    assert (mine / "model").exists() and (out / "other" / "file").exists()


def test_an_empty_folder_is_taken_and_a_file_is_not(tmp_path: Path) -> None:
    quickstart._clear(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {quickstart.MARKER, "data"}
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="choose another folder"):
        quickstart._clear(tmp_path / "file")


def executable(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o755)
    return path


def test_commands_to_try_call_the_program_as_it_can_be_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.defpath)
    assert shutil.which("pythia-jax") is None
    program = executable(tmp_path / "my env" / "bin" / "pythia-jax")
    made = quickstart.Summary(Path("q"), 1.0, 2.0, 300, 1.0, ())

    def called() -> set[str]:
        lines = made.text().partition("to try next:\n")[2].strip().splitlines()
        assert len(lines) == 3
        return {shlex.split(line)[0] for line in lines}

    # By path, as `make quickstart` does it, from where it was called.
    for argv in ("my env/bin/pythia-jax", str(program)):
        monkeypatch.setattr(sys, "argv", [argv, "quickstart"])
        assert called() == {"my env/bin/pythia-jax"}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "argv", [str(program)])
    assert called() == {str(program)}
    # As a library: the program beside the interpreter, if there is one.
    monkeypatch.setattr(sys, "argv", ["notebook.py"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "my env" / "bin" / "python"))
    assert called() == {str(program)}
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none" / "python"))
    assert called() == {"pythia-jax"}
    # By name, where that will do.
    monkeypatch.setenv("PATH", str(program.parent))
    assert called() == {"pythia-jax"}


@pytest.mark.slow
def test_the_shipped_quickstart_beats_the_bigram_model(tmp_path: Path) -> None:
    made = quickstart.quickstart(tmp_path / "q", say=lambda line: None, show_progress=False)
    assert made.held_out_loss < made.bigram_loss
    assert "ours is below it" in made.text()


def test_a_model_that_is_no_better_than_the_bigram_model_is_said_to_be_so() -> None:
    assert "ours is NOT below it" in quickstart.Summary(Path("q"), 2.0, 2.0, 3, 1.0, ()).text()


def test_the_bigram_loss_is_that_of_counting_by_hand() -> None:
    training = np.array([1, 2, 1, 2, 1, 3], np.uint16)
    rows = np.array([[1, 2, 1], [3, 1, 1]])
    pairs = {(1, 2): 2, (2, 1): 2, (1, 3): 1}
    before = {1: 3, 2: 2, 3: 0}

    def loss(k: float) -> float:
        wanted = [(1, 2), (2, 1), (3, 1), (1, 1)]
        chances = [(pairs.get(w, 0) + k) / (before[w[0]] + k * 5) for w in wanted]
        return float(-np.mean(np.log(chances)))

    best = min(map(loss, (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)))
    assert quickstart.bigram_loss(training, rows, 5) == pytest.approx(best)
