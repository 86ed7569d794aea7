"""Audits find every fault that is planted in a real training run, and none where there is none."""

import csv
import json
import os
import shutil
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from command_line import refused, run

import pythia_jax as pj
from pythia_jax import suite
from pythia_jax.bridge.model import Model
from pythia_jax.configs import ModelConfig, RunConfig
from pythia_jax.interp import audit_rules as rules
from pythia_jax.interp.auditing import Audit, audit
from pythia_jax.interp.sketch import sketch
from pythia_jax.model import parameters
from pythia_jax.model.parameters import Params
from pythia_jax.training.checkpoints import SCHEDULED
from pythia_jax.training.trainer import train

sys.path.append(str(Path(__file__).parent))
from checkpoint_cases import as_neox, as_revisions, write_steps  # type: ignore[import-not-found]
from hub_server import HubServer, hub_server  # type: ignore[import-not-found]
from swept import make_config  # type: ignore[import-not-found]

STEPS = (0, 1, 2, 3, 4, 6, 8, 10, 12)
MOVED = STEPS[1:]
"""Of these no two have the same weights; step 0 and step 1 do, for a warm-up begins at 0."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return make_config(
        tmp_path_factory.mktemp("home"),
        "trained",
        training={"steps": 12},
        optimizer={"peak_learning_rate": 1e-2, "warmup_fraction": 0.1},
        checkpoint={"every": 2, "extra_steps": [0, 1, 3], "archive": "params"},
    )


@pytest.fixture(scope="module")
def trained(config: RunConfig) -> Path:
    """A run that was really trained."""
    train(config)
    return Path(config.checkpoint.directory)


@pytest.fixture(scope="module")
def weights(trained: Path) -> dict[int, Params]:
    return {step: pj.load(trained, step=step).params for step in STEPS}


@pytest.fixture(scope="module")
def model(config: RunConfig) -> ModelConfig:
    assert config.model is not None
    return config.model


def of_pairs(weights: dict[int, Params], config: ModelConfig) -> Audit:
    return audit(sorted(weights.items()), config=config, show_progress=False)


def faults(found: Audit) -> set[tuple[str, tuple[int, ...]]]:
    return {(finding.kind, finding.steps) for finding in found.findings if finding.fault}


def vector(params: Params) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(params)])


# Nothing is wrong.


def test_a_real_run_gives_no_alarm(trained: Path, weights: dict[int, Params]) -> None:
    found = audit(trained, show_progress=False)
    assert found.ok and faults(found) == set()
    assert [row.step for row in found.rows] == list(STEPS)
    assert [finding.text for finding in found.findings] == [
        "step 0 and step 1 hold the same weights, the first update has learning rate 0"
    ]
    vectors = [vector(weights[step]) for step in STEPS]
    for row, before, now in zip(found.rows[1:], vectors, vectors[1:], strict=False):
        assert row.norm == pytest.approx(np.linalg.norm(now), rel=1e-6)
        assert row.distance == pytest.approx(np.linalg.norm(now - before), rel=1e-5)
        assert row.relative == pytest.approx(np.linalg.norm(now - before) / np.linalg.norm(now))
    true = np.array([[np.linalg.norm(a - b) for a in vectors] for b in vectors])
    np.testing.assert_allclose(found.distances, true, rtol=0.06)


def test_a_run_that_is_not_done_is_no_fault(
    config: RunConfig, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    for step in (8, 10, 12):
        shutil.rmtree(tmp_path / "run" / SCHEDULED / str(step))
    shutil.rmtree(tmp_path / "run" / "resume", ignore_errors=True)
    found = audit(tmp_path / "run", show_progress=False)
    assert found.ok
    assert "the run has come to step 6 of 12" in [finding.text for finding in found.findings]


@pytest.mark.parametrize("initializer", ["small_wang", "normal_scaled"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_fresh_start_is_taken_for_another(seed: int, initializer: Any) -> None:
    config = ModelConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=97,
        max_position_embeddings=32,
        initializer=initializer,
    )
    start = parameters.init_parameters(config, jax.random.key(seed))
    assert "start" not in {finding.kind for finding in of_pairs({0: start}, config).findings}


@pytest.mark.parametrize("how", ["line", "walk", "mean_reverting"])
@pytest.mark.parametrize("steps", [tuple(range(12)), suite.CHECKPOINT_STEPS[:30]])
def test_every_exchange_of_two_labels_is_found_whatever_the_path(
    steps: tuple[int, ...], how: str
) -> None:
    time = np.array(steps, float)
    between = np.abs(time[:, None] - time)
    squares = {
        "line": between**2,
        "walk": between,  # updates without a common direction
        "mean_reverting": 1 - np.exp(-between / (time[-1] / 5)),
    }
    distances = np.sqrt(squares[how])
    assert rules.misplaced(steps, distances) == ({}, 0)
    for i, j in combinations(range(len(steps)), 2):
        labels = list(range(len(steps)))
        labels[i], labels[j] = j, i
        found = rules.misplaced(steps, distances[np.ix_(labels, labels)])
        assert found == ({steps[i]: steps[j], steps[j]: steps[i]}, 0)


# What is planted is found.


def test_every_exchange_of_two_steps_is_found(
    weights: dict[int, Params], model: ModelConfig
) -> None:
    for first, second in combinations(MOVED, 2):
        planted = {step: weights[step] for step in MOVED}
        planted[first], planted[second] = weights[second], weights[first]
        found = of_pairs(planted, model)
        assert faults(found) == {("place", (first, second))}, (first, second)
        assert f"step {first} and step {second} seem to hold each other's" in found.verdicts()[0]


def test_every_copy_is_found(weights: dict[int, Params], model: ModelConfig) -> None:
    pairs = [(0, 12), (12, 0), (2, 3), (3, 2), (10, 12), (12, 10), (4, 8), (8, 4), (2, 10)]
    for copy, of in pairs:
        planted = {step: weights[step] for step in (0, *MOVED[1:])}
        planted[copy] = weights[of]
        found = of_pairs(planted, model)
        assert ("copy", tuple(sorted((copy, of)))) in faults(found)
        assert {kind for kind, _ in faults(found)} <= {"copy", "start"}
    named = of_pairs({**{s: weights[s] for s in MOVED}, 2: weights[10]}, model)
    assert "which seem to be those of step 10" in named.verdicts()[0]


def test_a_copy_of_step_0_is_wrong_where_the_schedule_does_not_explain_it(
    weights: dict[int, Params], model: ModelConfig
) -> None:
    assert ("copy", (0, 1)) in faults(of_pairs(weights, model))


def test_step_0_with_the_final_weights_is_found_by_the_command(
    weights: dict[int, Params], tmp_path: Path
) -> None:
    config = make_config(tmp_path, training={"steps": 12}, checkpoint={"every": 4})
    run_folder = write_steps(
        config, {0: weights[12], 1: weights[1], 4: weights[4], 8: weights[8], 12: weights[12]}
    )
    ran = run("audit", run_folder, "--out", tmp_path / "found.json")
    assert ran.exit_code == 1
    told = "wrong: step 0 and 12 hold the same weights, which seem to be those of step 12"
    assert told in ran.output
    assert "wrong: step 0 is not what training starts from" in ran.output
    content = json.loads((tmp_path / "found.json").read_bytes())
    assert content["ok"] is False and content["model"] == "tiny"
    rows = {row["step"]: row for row in content["checkpoints"]}
    assert rows[0]["verdict"] == "start, copy" and rows[4]["verdict"] == ""
    assert rows[0]["weights"] == rows[12]["weights"]


def test_steps_of_the_schedule_that_are_missing_are_found(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    for step in (3, 8):
        shutil.rmtree(tmp_path / "run" / SCHEDULED / str(step))
    found = audit(tmp_path / "run", show_progress=False)
    assert faults(found) == {("missing", (3, 8))}
    assert "by the run's own schedule" in found.verdicts()[0]
    assert [row.verdict for row in found.rows if row.step in (3, 8)] == ["missing"] * 2
    only = audit(tmp_path / "run", revisions="0:3,5,6", show_progress=False)
    assert faults(only) == {("missing", (5,))}


def test_a_damaged_checkpoint_is_found(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    for path in (tmp_path / "run" / SCHEDULED / "4").rglob("*"):
        if path.parent.name == "d":
            path.write_bytes(os.urandom(path.stat().st_size))
    found = audit(tmp_path / "run", show_progress=False)
    assert faults(found) == {("unreadable", (4,))}


def test_nan_is_found_and_named(weights: dict[int, Params], model: ModelConfig) -> None:
    broken = jax.tree.map(lambda x: x, weights[4])
    broken["final_layer_norm"]["bias"] = broken["final_layer_norm"]["bias"].at[3].set(np.nan)
    found = of_pairs({**{s: weights[s] for s in MOVED}, 4: broken}, model)
    assert faults(found) == {("nan", (4,))}
    assert found.verdicts()[0] == "wrong: step 4 is not finite in final_layer_norm/bias"
    assert 4 not in found.steps and np.isfinite(found.distances).all()


def test_a_parameter_that_is_of_another_step_is_found(
    weights: dict[int, Params], model: ModelConfig
) -> None:
    """As where one shard of a revision is that of the last step (EleutherAI/pythia#206)."""
    mixed = {**weights[4], "embed_in": weights[12]["embed_in"]}
    found = of_pairs({**{s: weights[s] for s in MOVED}, 4: mixed}, model)
    assert ("copy", (4, 12)) in faults(found)
    assert "of step 12, embed_in/embedding is that of step 4" in " ".join(found.verdicts())
    frozen = {s: {**weights[s], "embed_in": weights[0]["embed_in"]} for s in MOVED}
    assert of_pairs(frozen, model).ok


def test_weights_of_another_run_are_found(weights: dict[int, Params], model: ModelConfig) -> None:
    stranger = parameters.init_parameters(model, jax.random.key(99))
    found = of_pairs({**{s: weights[s] for s in MOVED}, 4: stranger}, model)
    assert faults(found) == {("place", (4,))}


def test_a_start_that_is_none_is_found(weights: dict[int, Params], tmp_path: Path) -> None:
    config = make_config(tmp_path, training={"steps": 4}, checkpoint={"every": 1})
    later = {step: weights[step + 4] for step in (0, 2, 4)}
    found = audit(write_steps(config, later), revisions="0,2,4", show_progress=False)
    assert faults(found) == {("start", (0,))}
    wide = jax.tree.map(lambda x: x, weights[0])
    wide["embed_out"]["kernel"] = wide["embed_out"]["kernel"] * 1.2
    other = make_config(tmp_path, "wide", training={"steps": 4}, checkpoint={"every": 4})
    found = audit(write_steps(other, {0: wide}), revisions="0", show_progress=False)
    assert faults(found) == {("start", (0,))}
    assert "embed_out/kernel has a standard deviation of 0.13" in found.verdicts()[0]


# Folders of GPT-NeoX's, and the hub.


@pytest.mark.parametrize(
    ("steps", "missing"),
    [
        ((1000, 2000, 3000, 5000, 6000), [4000]),
        ((0, 1, 2, 4, 8, 16, 32, 64, 512, 1000, 3000, 4000, 5000, 6000), [2000]),
        ((0, 10, 20, 30, 50), [40]),
        ((3, 13, 23, 33, 53, 63), [43]),
        ((0, 1, 2, 3, 4, 5, 7, 8), [6]),
        ((0, 1, 2, 4, 8, 16), []),
        ((0, 1, 2, 3, 6), []),
        (suite.CHECKPOINT_STEPS, []),
        ((5,), []),
    ],
)
def test_gaps_are_told_by_regularity_alone(steps: tuple[int, ...], missing: list[int]) -> None:
    assert rules.gaps(steps) == missing


def test_a_folder_of_gpt_neox_is_audited(trained: Path, tmp_path: Path) -> None:
    clean = {10: 2, 20: 4, 30: 6, 40: 8, 60: 12}
    found = audit(as_neox(trained, tmp_path / "neox", clean), show_progress=False)
    assert faults(found) == {("missing", (50,))}
    swapped = {10: 2, 20: 6, 30: 4, 40: 8}
    found = audit(as_neox(trained, tmp_path / "swapped", swapped), show_progress=False)
    assert faults(found) == {("place", (20, 30))}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_server(tmp_path / "hub") as running:
        running.use(monkeypatch, tmp_path / "cache")
        yield running


def test_revisions_of_the_suite_are_held_against_its_schedule(
    server: HubServer, weights: dict[int, Params], model: ModelConfig, tmp_path: Path
) -> None:
    holds = {0: 0, 1: 1, 2: 2, 4: 4, 16: 12}
    models = {step: Model(weights[of], model) for step, of in holds.items()}
    as_revisions(server, "EleutherAI/pythia-70m", tmp_path / "hf", models)
    found = audit("70m", revisions="0:33", show_progress=False)
    assert faults(found) == {("missing", (8, 32))}
    texts = [finding.text for finding in found.findings]
    assert any("step 0 and step 1 hold the same weights, as in all of Pythia" in t for t in texts)
    assert set(suite.COMMON_FAULTS) <= set(texts)
    as_revisions(server, "EleutherAI/pythia-12b", tmp_path / "12b", {50_000: models[4]})
    ran = run("audit", "12b", "--revisions", "50000", "--out", tmp_path / "found.csv")
    assert ran.exit_code == 1
    assert f"wrong: step 50000 {suite.bad_revision('pythia-12b', 50_000)}" in ran.output
    (row,) = csv.DictReader((tmp_path / "found.csv").read_text().splitlines())
    assert (row["step"], row["verdict"]) == ("50000", "known")


def test_revisions_of_others_are_audited_by_what_is_there(
    server: HubServer, weights: dict[int, Params], model: ModelConfig, tmp_path: Path
) -> None:
    models = {step: Model(weights[step], model) for step in (2, 4, 6, 8)}
    as_revisions(server, "someone/tiny", tmp_path / "hf", models)
    server.add("someone/tiny", "step10", {"config.json": b"{}"})
    ran = run("audit", "someone/tiny")
    assert ran.exit_code == 1
    assert "wrong: step 10 should be there, and is not" in ran.output
    assert run("audit", "someone/tiny", "--revisions", "2:9").exit_code == 0


# What is refused.


def test_what_cannot_be_audited_is_refused(
    trained: Path, weights: dict[int, Params], model: ModelConfig, tmp_path: Path
) -> None:
    assert "written as .json or .csv" in refused("audit", trained, "--out", tmp_path / "found.txt")
    assert "there is no folder" in refused("audit", trained, "--out", tmp_path / "no" / "f.csv")
    absent = tmp_path / "no" / "model"
    assert f"{absent}: there is no such folder" in refused("audit", absent)
    assert "'main' of 'main' is no step" in refused("audit", trained, "--revisions", "main")
    with pytest.raises(ValueError, match="give config="):
        audit([(0, weights[0])], show_progress=False)
    with pytest.raises(ValueError, match="step 1 comes after step 2"):
        audit([(2, weights[2]), (1, weights[1])], config=model, show_progress=False)
    with pytest.raises(ValueError, match=r"step 0: embed_in/embedding is \(304, 32\), and by"):
        wider = ModelConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
        audit([(0, weights[0])], config=wider, show_progress=False)


# Sketches.


def test_sketches_keep_distances_and_are_linear(weights: dict[int, Params]) -> None:
    first, last = (np.asarray(sketch(weights[step]), np.float64) for step in (2, 12))
    difference = jax.tree.map(np.subtract, weights[12], weights[2])
    np.testing.assert_allclose(sketch(difference), last - first, atol=1e-5)
    true = np.linalg.norm(vector(difference))
    errors = [np.linalg.norm(sketch(difference, 2**k)) / true - 1 for k in (8, 12)]
    assert abs(errors[0]) < 4 / np.sqrt(2 * 2**8) and abs(errors[1]) < 4 / np.sqrt(2 * 2**12)
    with pytest.raises(ValueError, match="power of two"):
        sketch(difference, 100)
