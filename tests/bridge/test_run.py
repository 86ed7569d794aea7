"""Run folders as models: the weights are reachable wherever one stands."""

import dataclasses
import logging
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from reference import TINY
from tokenizers import Tokenizer, models

import pythia_jax as pj
from pythia_jax import configs
from pythia_jax.configs import CheckpointConfig, DataConfig, RunConfig
from pythia_jax.sharding import make_mesh
from pythia_jax.training.checkpoints import Checkpoints
from pythia_jax.training.step import abstract_state
from pythia_jax.training.trainer import fresh_state


def write_tokenizer(path: Path, word: str) -> str:
    Tokenizer(models.WordLevel({"<|endoftext|>": 0, word: 1}, "<|endoftext|>")).save(str(path))
    return path.read_text()


def save(config: RunConfig, step: int) -> None:
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), Checkpoints(config, abstract_state(config, mesh)) as checkpoints:
        assert checkpoints.restore_newest() is None
        checkpoints.save(step, fresh_state(config, mesh), resume=False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of one checkpoint, made in `home`, whose config names its tokenizer from there."""
    (tmp_path / "home").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    config = RunConfig(
        model=TINY,
        data=DataConfig(sequence_length=32),
        tokenizer="tokenizer.json",
        checkpoint=CheckpointConfig(directory="run"),
    )
    save(config, 1)
    configs.save(config, "run/config.yaml")
    return tmp_path / "home" / "run"


def test_tokenizer_is_the_runs_own_copy_first(folder: Path, monkeypatch) -> None:
    write_tokenizer(Path("tokenizer.json"), "named")
    named = pj.load(folder).tokenizer
    assert named is not None and named.token_to_id("named") == 1
    own = write_tokenizer(folder / "tokenizer.json", "own")
    for place in ("home", "elsewhere"):
        monkeypatch.chdir(folder.parents[1] / place)
        assert pj.load(folder).tokenizer_files == {"tokenizer.json": own.encode()}


def test_weights_load_without_the_tokenizer_and_the_log_says_so(
    folder: Path, monkeypatch, caplog
) -> None:
    write_tokenizer(Path("tokenizer.json"), "named")
    with caplog.at_level(logging.WARNING, logger="pythia_jax"):
        whole = pj.load(folder)
        assert not caplog.records
        monkeypatch.chdir(folder.parents[1] / "elsewhere")
        model = pj.load(folder)
    assert model.tokenizer is None
    (record,) = caplog.records
    assert str(folder / "tokenizer.json") in record.getMessage()
    for ours, theirs in zip(
        jax.tree.leaves(model.params), jax.tree.leaves(whole.params), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_run_that_names_no_tokenizer_has_none_and_is_not_warned_of(folder: Path, caplog) -> None:
    config = configs.load(folder / "config.yaml")
    configs.save(dataclasses.replace(config, tokenizer=None), folder / "config.yaml")
    with caplog.at_level(logging.WARNING, logger="pythia_jax"):
        assert pj.load(folder).tokenizer is None
    assert not caplog.records


def test_a_run_that_has_trained_nothing_yet_is_warned_of_unless_asked_for(
    folder: Path, caplog
) -> None:
    shutil.rmtree(folder / "checkpoints")
    write_tokenizer(folder / "tokenizer.json", "own")
    save(configs.load(folder / "config.yaml"), 0)
    with caplog.at_level(logging.WARNING, logger="pythia_jax"):
        pj.load(folder, step=0)
        assert not caplog.records
        pj.load(folder)
    (record,) = caplog.records
    assert "step 0, so nothing is trained" in record.getMessage()


def test_float64_and_revision_of_a_run_are_refused_as_of_other_folders(folder: Path) -> None:
    with pytest.raises(ValueError, match="JAX_ENABLE_X64"):
        pj.load(folder, dtype="float64")
    with pytest.raises(ValueError, match="choose a checkpoint of a run folder with step"):
        pj.load(folder, revision="step0")
