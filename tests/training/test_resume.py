"""Runs that stop, are killed or change their archive: going on is as never having stopped."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import Make, assert_same_bits

import pythia_jax as pj
from pythia_jax import configs
from pythia_jax.training.telemetry import MEASURED, read_metrics
from pythia_jax.training.trainer import train


def numbers(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


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


@pytest.mark.parametrize("stop_at", [None, 3])
def test_a_finished_run_is_left_as_it_is_and_said_to_be_finished(
    make_config: Make,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    stop_at: int | None,
) -> None:
    config = make_config()
    first = train(config, show_progress=False)
    before = numbers(first.folder)
    caplog.set_level(logging.INFO, "pythia_jax")
    caplog.clear()
    capfd.readouterr()
    again = train(config, stop_at=stop_at)
    assert (again.step, again.resumed_from) == (20, 20)
    assert numbers(again.folder) == before
    assert f"already trained to step 20: {again.folder}" in caplog.text
    assert "resumed" not in caplog.text
    assert "step/s" not in capfd.readouterr().err, "a progress bar of no step"


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


def test_switching_the_archive_half_way_erases_no_metrics(make_config: Make) -> None:
    folder = train(make_config(), stop_at=5, show_progress=False).folder
    before = numbers(folder)
    light = make_config(checkpoint={"archive": "params"})
    assert train(light, stop_at=6, show_progress=False).resumed_from == 5
    assert numbers(folder)[: len(before)] == before


SURVIVE = """
import sys
from pythia_jax import configs
from pythia_jax.training.trainer import train
train(configs.load(sys.argv[1]), show_progress=False)
"""
KILLS = 2


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
    reached = 0
    for _ in range(KILLS):
        process = subprocess.Popen(command, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"})
        kill_in_a_write(process, folder, after=reached, draw=draw)
        assert unfinished(folder), "the kill fell into no write: the test proves nothing"
        complete = [int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit()]
        assert max(complete) >= reached
        reached = max(complete)
    result = train(config, show_progress=False)
    assert result.resumed_from == reached
    assert not unfinished(folder), "what was half-written is still there"
    for step in config.checkpoint_steps:
        saved = (pj.load(made.folder, step=step).params for made in (result, straight))
        assert_same_bits(*saved)
    assert_same_bits(result.state, straight.state)
    assert numbers(folder) == numbers(straight.folder)


def kill_in_a_write(
    process: subprocess.Popen, folder: Path, after: int, draw: random.Random
) -> None:
    """Kill -9 at some moment while a checkpoint beyond `after` is being written.

    However slow the machine is: the process is stopped first, to look where it stands, and let
    go on if no write is under way.
    """
    while process.poll() is None:
        if not writing(folder, after):
            time.sleep(0.002)
            continue
        time.sleep(draw.random() * 0.05)  # anywhere in the write
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        caught = writing(folder, after)
        process.send_signal(signal.SIGKILL if caught else signal.SIGCONT)
        if caught:
            process.wait()
            return
    pytest.fail(f"the run ended (status {process.returncode}) before a write could be hit")


def unfinished(folder: Path) -> list[Path]:
    places = folder / "checkpoints"
    return [p for p in places.iterdir() if not p.name.isdigit()] if places.is_dir() else []


def writing(folder: Path, after: int) -> bool:
    """Whether a checkpoint a few steps beyond `after` is being written."""
    return any(int(p.name.split(".")[0]) > after + 3 for p in unfinished(folder))
