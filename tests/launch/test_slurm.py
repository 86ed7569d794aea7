"""A Slurm job that is queued again when that is worth it, and whose errors are told."""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from stand_ins import World

from launch import slurm

JOB = ["--name", "night", "--nodes", "2", "--gpus-per-node", "8", "--time", "24:00:00"]


def run(command: str, *arguments: object) -> Result:
    return CliRunner().invoke(slurm.main, [command, *map(str, arguments)])


@pytest.fixture
def trained(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """The Python that jobs use plays training, and is the real one for all else."""
    monkeypatch.setattr(slurm.sys, "executable", str(world.folder / "worker-bin/train"))
    return world


def test_the_script_asks_for_a_task_a_gpu_and_a_signal_in_time(
    world: World, config: Path, tmp_path: Path
) -> None:
    flags = ["--sbatch=--partition=gpu", config, "--training.steps", "20", "--dry-run"]
    done = run("submit", *JOB, "--restarts", "7", *flags)
    lines = done.output.splitlines()
    asked = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")}
    assert asked == {
        "--job-name=night",
        "--nodes=2",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--time=24:00:00",
        "--signal=TERM@180",
        "--requeue",
        "--open-mode=append",
        f"--output={tmp_path}/logs/night-%j.log",
        "--partition=gpu",
    }
    (command,) = [line for line in lines if line.startswith("exec bash")]
    assert command.endswith(f" 7 {config} --training.steps 20")


@pytest.mark.parametrize("end", ["75", "abort"])
def test_an_interrupted_job_is_queued_again_and_goes_on(
    trained: World, config: Path, end: str
) -> None:
    trained.set("plan", f"{end} {end} 0")
    done = run("submit", *JOB, config)
    assert done.exit_code == 0, done.output
    assert trained.starts()[0] == [0, 10, 20]
    assert trained.read("state") == "COMPLETED"
    assert len(trained.calls("scontrol")) == 2
    assert not list(trained.folder.glob(".slurm-*")), "the tasks' statuses are cleared away"
    assert run("watch", "77").exit_code == 0
    assert "process 0 from step 20" in run("logs", "77").output


def test_an_error_is_not_queued_again_though_slurm_kills_the_others(
    trained: World, config: Path
) -> None:
    trained.set("plan", "fails 0")
    run("submit", *JOB, config)
    assert trained.starts()[0] == [0] and trained.calls("scontrol") == []
    done = run("watch", "77")
    assert done.exit_code == 1
    assert "    RuntimeError: no such file: data.bin" in done.output
    assert "job 77: FAILED" in done.output


def test_queuing_again_comes_to_an_end(trained: World, config: Path) -> None:
    trained.set("plan", "75 75 75 75")
    run("submit", *JOB, "--restarts", "2", config)
    assert trained.starts()[0] == [0, 10, 20]
    assert trained.read("state") == "FAILED"
    assert "queued again 2 times, no more" in run("logs", "77").output


@pytest.mark.parametrize("state", ["CANCELLED by 1000", "OUT_OF_MEMORY", "TIMEOUT", "NODE_FAIL"])
def test_other_ends_are_errors(world: World, tmp_path: Path, state: str) -> None:
    world.set("state", state)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/night-77.log").write_text("last words\n")
    done = run("watch", "77")
    assert done.exit_code == 1 and "    last words" in done.output


def test_a_job_without_a_log_is_told(world: World) -> None:
    done = run("logs", "77")
    assert done.exit_code == 1 and "no log of job 77" in done.output


def test_cancel_names_the_job(world: World) -> None:
    assert run("cancel", "77").exit_code == 0
    assert world.calls() == [["scancel", "77"]]


@pytest.mark.parametrize("command", ["submit", "watch", "logs", "cancel"])
def test_dry_run_shows_commands_and_calls_nothing(
    world: World, config: Path, tmp_path: Path, command: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = run(command, *([*JOB, config] if command == "submit" else ["77"]), "--dry-run")
    assert done.exit_code == 0, done.output
    assert "\n+ " in f"\n{done.output}"
    assert world.calls() == [] and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("time", ["24h", "", "1:2:3:4", "2-", "-5", "1-2:3:4:5", "tomorrow"])
def test_a_time_that_slurm_cannot_read_is_refused(world: World, config: Path, time: str) -> None:
    done = run("submit", *JOB[:-1], time, config)
    assert done.exit_code == 1 and f"Error: --time {time}: want MINUTES" in done.output
    assert world.calls() == [] and not Path("logs").exists()


@pytest.mark.parametrize("time", ["90", "90:00", "24:00:00", "2-12", "2-12:30", "2-12:30:00"])
def test_a_time_that_slurm_can_read_is_passed_on(world: World, config: Path, time: str) -> None:
    done = run("submit", *JOB[:-1], time, config, "--dry-run")
    assert done.exit_code == 0 and f"#SBATCH --time={time}\n" in done.output


def test_a_bad_config_is_refused_before_anything_is_queued(world: World, config: Path) -> None:
    done = run("submit", *JOB, config, "--training.stesp", "3")
    assert done.exit_code == 1 and "stesp" in done.output
    assert world.calls() == [] and not Path("logs").exists()
    assert os.getcwd() == str(config.parent)
