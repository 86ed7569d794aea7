"""`pythia-jax gradients`: an index built, queried and exported as its user types it."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import index_cases
import numpy as np
import pytest
from click.testing import CliRunner

import pythia_jax as pj
from pythia_jax import configs
from pythia_jax.cli.gradients import gradients
from pythia_jax.interp.index import open_index


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model, a run, and an index that the command built."""
    folder = tmp_path_factory.mktemp("typed")
    configs.save(index_cases.packed(folder), folder / "run.yaml")
    pj.save_hf(index_cases.model(), folder / "hf")
    result = run(
        "build", folder / "hf", "--data", folder / "run.yaml", "--steps", "2:4", "--step", "3",
        "--unit", "document", "--projection-dim", "8", "--precision", "bfloat16", "--rows", "6",
        "--batch", "4", "--out", folder / "index", "--data.seed", "5",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = len(open_index(folder / "index"))
    assert f"{rows} rows of 512 numbers (bfloat16)" in result.output
    return folder


def run(*arguments: object):
    return CliRunner().invoke(gradients, [str(a) for a in arguments])


def refused(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code
    return result.output if isinstance(result.exception, SystemExit) else str(result.exception)


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def scores(table: Path) -> list[float]:
    return [float(row["score"]) for row in rows_of(table)]


def test_options_reach_the_index(place):
    index = open_index(place / "index")
    assert index.settings["step"] == 3
    assert index.settings["steps"] == [2, 4]
    assert index.settings["unit"] == "document"
    assert index.projection == pj.interp.Projection(8)
    assert configs.load(place / "index" / "run.yaml").data.seed == 5
    assert len(np.unique(index.rows[["step", "slot"]])) == 6


def test_a_query_finds_the_model_again_and_prints_passages(place):
    result = run(
        "query", place / "index", "--text", "the cat", "--completion", " sat", "--metric",
        "cosine", "--top", "3", "--out", place / "hits.csv",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if "step" in line]
    assert len(lines) == 3
    assert lines[0].split()[0] == "1"
    assert "document" in lines[0] and "tokens" in lines[0]
    table = rows_of(place / "hits.csv")
    found = scores(place / "hits.csv")
    assert found == sorted(found, reverse=True)
    assert f"{found[0]:.4g}" in lines[0]
    assert all(row["text"] for row in table)


def test_a_query_of_a_model_cut_over_eight_devices_scores_as_on_one(place):
    words = ["query", place / "index", "--text", "the cat", "--out"]
    assert run(*words, place / "one.csv").exit_code == 0
    cut = [*words, place / "eight.csv", "--fsdp", "2", "--tensor", "2"]
    assert "does not fit 1 device" in refused(*cut)
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "pythia_jax", "gradients", *cut],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, eight = (scores(place / f"{name}.csv") for name in ("one", "eight"))
    np.testing.assert_allclose(eight, one, atol=1e-5 * max(one))


def test_a_model_that_is_named_must_be_the_index_s(place, tmp_path):
    model = index_cases.model()
    params = {**model.params, "embed_out": {"kernel": -model.params["embed_out"]["kernel"]}}
    pj.save_hf(pj.Model(params, model.config, model.tokenizer_files), tmp_path / "other")
    told = refused("query", place / "index", "--text", "ab", "--model", tmp_path / "other")
    assert "has other weights" in told
    same = run("query", place / "index", "--text", "ab", "--model", place / "hf", "--top", "1")
    assert same.exit_code == 0, same.output


def test_an_export_checks_and_says_what_is_there(place):
    result = run("export", place / "index")
    assert result.exit_code == 0, result.output
    assert "whole, and in Bergson's format already" in result.output
    made = run("export", place / "index", "--to", place / "plain")
    assert f"bergson query --index {place / 'plain'}" in made.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("query", "--data.seed", "1", "o", "--text", "a"), "INDEX comes before its flags"),
        (
            ("build", "x", "--data", "c", "--steps", "1:2", "--out", "o", "--projection-dim", "0",
             "--projection-seed", "1"),
            "--projection-seed goes with a projection",
        ),
        (("build", "x", "--steps", "1:2", "--out", "o"), "Missing option '--data'"),
        (("query", "o", "--text", "a", "--step", "1"), "--revision and --step go with --model"),
        (("query", "o", "--text", "a", "--data.seed", "1"), "go with --data CONFIG"),
        (("query", "o", "--text", "a", "--out", "hits.txt"), "end it in .parquet or .csv"),
        (("query", "nowhere", "--text", "a"), "holds no gradient index"),
        (("export", "o", "--model", "m"), "--model goes with --to"),
    ],
)  # fmt: skip
def test_bad_commands_are_refused_and_leave_nothing(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(*arguments)
    assert not list(tmp_path.iterdir())
