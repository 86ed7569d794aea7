"""Factors of a run's batches: those of the function, saved with what they came from."""

import dataclasses
from pathlib import Path
from typing import Any

import index_cases
import jax
import numpy as np
import pytest
from click.testing import CliRunner

import pythia_jax as pj
from pythia_jax import configs
from pythia_jax.bridge.revisions import weights_hash
from pythia_jax.cli.factors import factors as command
from pythia_jax.data import batches
from pythia_jax.interp import factors, preflight
from pythia_jax.interp.factor_fitting import adam_factors_of, bytes_of, fit_factors_of
from pythia_jax.interp.index import table
from pythia_jax.interp.preconditioning import adam_factors
from pythia_jax.training.trainer import train


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's config and the model of it, as files."""
    place = tmp_path_factory.mktemp("run")
    configs.save(index_cases.packed(place), place / "config.yaml")
    pj.save_hf(index_cases.model(), place / "model")
    return place


def told(place: Path, *arguments: str) -> Any:
    config = ["--data", str(place / "config.yaml")]
    return CliRunner().invoke(command, [str(place / "model"), *config, *arguments])


def test_the_command_fits_the_batches_of_the_steps(place):
    out = place / "kfac"
    how = ["--method", "kfac", "--batch", "4", "--seed", "5"]
    done = told(place, "--steps", "2:5", "--rows", "8", *how, "--out", str(out))
    assert done.exit_code == 0, done.output
    assert f"{out}: kfac factors of 8 rows (192 tokens)" in done.output
    found, model = factors.load(out), index_cases.model()
    served = batches(configs.load(place / "config.yaml"))
    sample = table(served, served[0].shape[1], range(2, 5), "sequence", 8)  # an index's, of as many
    rows = np.stack([served[int(row["step"])][row["slot"]] for row in sample])
    expected = factors.fit_factors(
        model.params,
        [rows[:4], rows[4:]],
        model.config,
        method="kfac",
        key=jax.random.key(5),
    )
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert sum(x.nbytes for x in jax.tree.leaves(found)) == bytes_of(model.config, "kfac")
    about = factors.about(out)["provenance"]
    assert (about["steps"], about["seed"], about["rows_together"]) == ([2, 5], 5, 4)
    again = told(place, "--steps", "2:4", "--out", str(out))
    assert isinstance(again.exception, FileExistsError)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "4:99"], "not steps of"),
        ([], "--method ekfac reads batches: give --steps A:B"),
        (["--steps", "2:3", "--projection-dim", "4"], "goes with --method autocorrelation"),
        (["--steps", "2:3", "--optimizer-state", "rebuild:2"], "goes with --method adam"),
        (["--steps", "2:3", "--method", "adam"], "adam reads no batches"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(place, arguments, words):
    done = told(place, *arguments, "--out", str(place / "refused"))
    assert done.exit_code != 0
    assert words in done.output + str(done.exception)
    assert not (place / "refused").exists()


def test_what_does_not_fit_is_refused_with_the_numbers(place, monkeypatch):
    config = configs.load(place / "config.yaml")
    monkeypatch.setattr(preflight, "host_memory", lambda: 500_000)
    with pytest.raises(MemoryError, match=r"\d+ kB, .*; 500 kB of memory are free"):
        fit_factors_of(place / "model", config, 2, 3, place / "large")
    assert not (place / "large").exists()


@pytest.mark.slow
def test_adams_factors_are_of_the_runs_own_state(place, tmp_path):
    config = configs.load(place / "config.yaml")
    checkpoint = dataclasses.replace(config.checkpoint, directory=str(tmp_path / "run"))
    training = dataclasses.replace(config.training, precision="float32")
    config = dataclasses.replace(config, checkpoint=checkpoint, training=training)
    state = train(config, show_progress=False).state
    options = ["--method", "adam", "--data", str(tmp_path / "run" / "config.yaml")]
    out = tmp_path / "adam"
    done = CliRunner().invoke(command, [str(tmp_path / "run"), *options, "--out", str(out)])
    assert done.exit_code == 0, (done.output, done.exception)
    expected = adam_factors(state, config)
    for ours, theirs in zip(
        jax.tree.leaves(factors.load(out)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    rebuilt = adam_factors_of(
        tmp_path / "run", config, tmp_path / "rebuilt", optimizer_state="rebuild:2", step=4
    )
    assert rebuilt.parameters == expected.parameters
    # By these two a query knows factors for its index's.
    for folder, step in ((out, None), (tmp_path / "rebuilt", 4)):
        about = factors.about(folder)["provenance"]
        loaded = pj.load(tmp_path / "run", step=step)
        assert (about["weights"], about["dtype"]) == (weights_hash(loaded.params), "float32")
