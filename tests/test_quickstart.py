"""The whole road at a smaller size, as its user walks it."""

import re
import shlex
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
    commands = re.findall(r"^  pythia-jax (.*)$", summary, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["generate", "data", "train"]
    for command in commands:
        arguments = ["62" if a == "2000" else a for a in shlex.split(command)]
        done = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    assert Path("batch.npy").exists()


def test_text_of_ones_own_and_a_second_run_over_the_first(short: None, tmp_path: Path) -> None:
    text = tmp_path / "novel.txt"
    rng = np.random.default_rng(0)
    words = ["whale", "ship", "captain", "sea", "the", "of", "and", "a", "leg", "white"]
    text.write_text(" ".join(rng.choice(words, 60_000)))
    for _ in range(2):
        made = quickstart.quickstart(
            tmp_path / "q", [text], say=lambda line: None, show_progress=False
        )
    assert made.held_out_loss < 9
    with pytest.raises(ValueError, match="too little text"):
        small = tmp_path / "small.txt"
        small.write_text("a few words")
        quickstart.quickstart(tmp_path / "p", [small], say=lambda line: None)


def test_a_folder_with_other_things_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="choose another folder"):
        quickstart.quickstart(tmp_path, say=lambda line: None)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


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
