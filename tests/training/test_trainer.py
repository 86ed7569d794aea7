"""Runs: what they leave behind, and that going on is the same as never having stopped."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pythia_jax as pj
from pythia_jax import configs, data
from pythia_jax.configs import ConfigError, RunConfig
from pythia_jax.training import checkpoints, telemetry
from pythia_jax.training.feed import read_ahead
from pythia_jax.training.telemetry import NonFiniteError, read_metrics
from pythia_jax.training.trainer import run_folder, train

TIMES = {"tokens_per_second", "step_time_s", "data_wait_s"}
Make = Callable[..., RunConfig]


def numbers(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def assert_same_bits(a: object, b: object) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(make_config: Make) -> None:
    straight = train(make_config("straight"), show_progress=False)
    cut = make_config("cut")
    for stop in (3, 11, 12, None):
        result = train(cut, stop_at=stop, show_progress=False)
    assert result.resumed_from == 12
    assert_same_bits(result.state, straight.state)
    assert numbers(result.folder) == numbers(straight.folder)
    for step in cut.checkpoint_steps:
        assert_same_bits(
            pj.load(result.folder, step=step).params, pj.load(straight.folder, step=step).params
        )


def test_a_run_folder_holds_what_the_documentation_says(make_config: Make) -> None:
    config = make_config()
    folder = train(config, show_progress=False).folder
    kept = sorted(int(path.name) for path in (folder / "checkpoints").iterdir())
    assert kept == [0, 1, 2, 4, 5, 10, 15, 20]
    assert configs.load(folder / "config.yaml") == config
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")

    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(20))
    assert [line["step"] for line in lines if "validation_loss" in line] == [8, 16, 20]
    assert {"loss", "grad_norm", "learning_rate", "tokens_per_second", "data_wait_s"} <= set(
        lines[0]
    )
    assert lines[0]["learning_rate"] == 0.0
    events = EventAccumulator(str(folder / "events")).Reload()
    logged = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in logged] == list(range(20))
    assert logged[5][1] == pytest.approx(next(x for x in lines if x["step"] == 5)["loss"])


def test_the_first_step_changes_nothing_and_the_second_does(make_config: Make) -> None:
    folder = train(make_config(), stop_at=2, show_progress=False).folder
    zero, one, two = (pj.load(folder, step=step).params for step in (0, 1, 2))
    assert_same_bits(zero, one)
    assert not np.array_equal(one["embed_out"]["kernel"], two["embed_out"]["kernel"])


def test_training_goes_on_from_a_step_that_is_not_scheduled(make_config: Make) -> None:
    config = make_config()
    folder = train(config, stop_at=7, show_progress=False).folder
    assert [path.name for path in (folder / "resume").iterdir()] == ["7"]
    assert train(config, stop_at=9, show_progress=False).resumed_from == 7


def test_an_archive_of_parameters_still_resumes(make_config: Make) -> None:
    straight = train(make_config("straight"), show_progress=False)
    config = make_config("light", checkpoint={"archive": "params"})
    train(config, stop_at=10, show_progress=False)
    result = train(config, show_progress=False)
    assert result.resumed_from == 10
    assert_same_bits(result.state, straight.state)
    light, whole = (
        sum(f.stat().st_size for f in (r.folder / "checkpoints" / "20").rglob("*") if f.is_file())
        for r in (result, straight)
    )
    assert light < whole / 2
    assert_same_bits(pj.load(result.folder, step=5).params, pj.load(straight.folder, step=5).params)


def test_resume_states_are_saved_by_the_clock_and_few_are_kept(make_config: Make) -> None:
    config = make_config(checkpoint={"resume_every_minutes": 1e-9, "keep_resume": 2})
    folder = train(config, stop_at=19, show_progress=False).folder
    assert sorted(int(path.name) for path in (folder / "resume").iterdir()) == [18, 19]


def test_a_finished_run_is_left_as_it_is(make_config: Make) -> None:
    config = make_config()
    first = train(config, show_progress=False)
    before = numbers(first.folder)
    again = train(config, show_progress=False)
    assert again.resumed_from == 20
    assert numbers(again.folder) == before


def test_lines_beyond_the_restored_step_are_written_anew(make_config: Make) -> None:
    config = make_config()
    folder = train(config, stop_at=10, show_progress=False).folder
    path = folder / "metrics.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({"step": 10, "loss": 99.0}) + "\n")
        file.write('{"step": 11, "lo')  # what a killed process leaves
    train(config, show_progress=False)
    assert 99.0 not in [line.get("loss") for line in numbers(folder)]
    assert [line["step"] for line in numbers(folder) if "loss" in line] == list(range(20))


SURVIVE = """
import sys
from pythia_jax import configs
from pythia_jax.training.trainer import train
train(configs.load(sys.argv[1]), show_progress=False)
"""


def test_kill_9_at_any_moment_loses_only_steps_since_the_last_checkpoint(
    make_config: Make, tmp_path: Path
) -> None:
    # A state of 20 MB saved at every step: nearly always a write is under way.
    sections = {
        "model": {"hidden_size": 128, "vocab_size": 5000},
        "checkpoint": {"every": 1},
        "training": {"steps": 30},
    }
    straight = train(make_config("straight", **sections), show_progress=False)
    config = make_config("killed", **sections)
    configs.save(config, tmp_path / "killed.yaml")
    folder, draw = Path(config.checkpoint.directory), random.Random(0)
    command = [sys.executable, "-c", SURVIVE, str(tmp_path / "killed.yaml")]
    reached, mid_write = 0, 0
    for _ in range(3):
        process = subprocess.Popen(command, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"})
        while process.poll() is None and not writing(folder, after=reached):
            time.sleep(0.002)
        time.sleep(draw.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        mid_write += bool(unfinished(folder))
        complete = [int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit()]
        assert max(complete) >= reached
        reached = max(complete)
    assert mid_write, "no kill fell into a write: the test proves nothing"
    assert 0 < reached < 30
    result = train(config, show_progress=False)
    assert result.resumed_from == reached
    for step in config.checkpoint_steps:
        saved = (pj.load(made.folder, step=step).params for made in (result, straight))
        assert_same_bits(*saved)
    assert_same_bits(result.state, straight.state)
    assert numbers(folder) == numbers(straight.folder)


def unfinished(folder: Path) -> list[Path]:
    places = folder / "checkpoints"
    return [p for p in places.iterdir() if not p.name.isdigit()] if places.is_dir() else []


def writing(folder: Path, after: int) -> bool:
    """Whether a checkpoint a few steps beyond `after` is being written."""
    return any(int(p.name.split(".")[0]) > after + 3 for p in unfinished(folder))


def test_another_config_is_refused_and_the_run_is_left_alone(make_config: Make) -> None:
    train(make_config(), stop_at=2, show_progress=False)
    changed = make_config(data={"seed": 7}, training={"batch_size": 8})
    with pytest.raises(ConfigError, match=r"data\.seed was 1234, is 7.*training\.batch_size"):
        train(changed, show_progress=False)
    assert train(make_config(), stop_at=3, show_progress=False).resumed_from == 2


def test_two_runs_in_one_folder_are_refused(make_config: Make) -> None:
    config = make_config()
    with run_folder(config), pytest.raises(RuntimeError, match="another process"):
        train(config, show_progress=False)


def test_a_loss_that_is_no_number_stops_the_run_and_saves_nothing(
    make_config: Make,
) -> None:
    config = make_config(
        optimizer={"peak_learning_rate": 1e30, "min_learning_rate": 0.0, "warmup_fraction": 0.0}
    )
    with pytest.raises(NonFiniteError, match="step"):
        train(config, show_progress=False)
    folder = Path(config.checkpoint.directory)
    for path in (folder / "checkpoints").iterdir():
        params = pj.load(folder, step=int(path.name)).params
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_a_run_without_a_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.train|model"):
        train(configs.from_dict({}), show_progress=False)


def test_other_surroundings_are_told(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config()
    train(config, stop_at=2, show_progress=False)
    with caplog.at_level("INFO", "pythia_jax"):
        train(config, stop_at=3, show_progress=False)
    assert "bit for bit" in caplog.text
    real = checkpoints.surroundings()
    monkeypatch.setattr(checkpoints, "surroundings", lambda: {**real, "cores": 77})
    with caplog.at_level("WARNING", "pythia_jax"):
        train(config, stop_at=4, show_progress=False)
    assert "equal to rounding only" in caplog.text and "-> 77" in caplog.text


def test_a_step_that_is_not_there_is_named(make_config: Make) -> None:
    folder = train(make_config(), stop_at=2, show_progress=False).folder
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 3; there are 0, 1, 2"):
        pj.load(folder, step=3)


def test_held_out_batches_of_an_evaluation_follow_those_before(make_config: Make) -> None:
    from pythia_jax.training.trainer import held_out_loss, jitted_init, jitted_loss

    config = make_config()
    params, batches = jitted_init(config).params, data.batches(config, "validation")
    for step, first in ((8, 0), (16, 2), (20, 4)):
        expected = np.mean(
            [float(jitted_loss(params, batches[i], config=config)) for i in (first, first + 1)]
        )
        assert held_out_loss(params, config, batches, step) == pytest.approx(expected, abs=1e-6)


def test_batches_read_ahead_are_the_batches(make_config: Make) -> None:
    batches = data.batches(make_config())
    for step, tokens in zip(range(6, 20), read_ahead(batches, 6, 20), strict=True):
        np.testing.assert_array_equal(tokens, batches[step])
    assert list(read_ahead(batches, 20, 20)) == []


def test_a_cut_off_line_is_dropped_from_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "loss": 2.0}\n{"st')
    telemetry.drop_lines_from(path, 1)
    assert path.read_text() == '{"step": 0, "loss": 1.0}\n'
