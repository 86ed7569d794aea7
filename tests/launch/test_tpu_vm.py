"""TPU VM slices: installed and started on, watched, made again after preemption, told of errors."""

import importlib.metadata
import io
import re
import shlex
import subprocess
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from stand_ins import World

from launch import tpu_vm
from launch.packages import constraints, packed
from launch.tpu_vm import verdict

WHERE = ["--name", "night", "--zone", "us-west4-a"]
SLICE = [*WHERE, "--accelerator", "v5litepod-16", "--poll-seconds", "0.1"]


def run(command: str, *arguments: object) -> Result:
    return CliRunner().invoke(tpu_vm.main, [command, *map(str, arguments)])


def test_a_slice_is_made_installed_on_and_trained_on(world: World, config: Path) -> None:
    world.set("plan", "0")
    done = run("train", *SLICE, "--spot", config, "--training.steps", "20")
    assert done.exit_code == 0, done.output
    assert world.starts() == [[0], [0]]
    (create,) = [call for call in world.calls("gcloud") if call[4] == "create"]
    assert create[1:] == [
        "compute",
        "tpus",
        "queued-resources",
        "create",
        "night",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--node-id=night",
        "--spot",
        "--zone=us-west4-a",
        "--quiet",
    ]
    # Asked whether it is there, made, waited for, and only then touched.
    assert world.verbs()[:7] == ["describe", "create", *["describe"] * 3, "scp", "ssh"]
    assert "WAITING_FOR_RESOURCES" in done.output and "PROVISIONING" in done.output


def test_after_each_of_two_preemptions_the_slice_is_made_again_and_training_goes_on(
    world: World, config: Path
) -> None:
    world.set("plan", "preempted preempted 0")
    done = run("train", *SLICE, "--spot", config)
    assert done.exit_code == 0, done.output
    assert world.starts() == [[0, 10, 20], [0, 10, 20]]
    life = world.verbs("describe", "scp", "ssh")
    assert life == ["create", "delete", "create", "delete", "create"]
    assert done.output.count("night is SUSPEND") == 2
    # Every new slice is installed on before training starts there.
    assert world.verbs("describe", "create", "delete").count("scp") == 3


@pytest.mark.parametrize("end", ["75", "abort"])
def test_training_that_was_interrupted_is_started_again_on_the_same_slice(
    world: World, config: Path, end: str
) -> None:
    world.set("plan", f"{end} 0")
    done = run("train", *SLICE, config)
    assert done.exit_code == 0, done.output
    assert world.starts() == [[0, 10], [0, 10]]
    assert world.verbs("describe", "scp", "ssh") == ["create"]


def test_workers_that_do_not_end_with_the_others_are_ended(world: World, config: Path) -> None:
    world.set("plan", "hangs 0")
    done = run("train", *SLICE, config)
    assert done.exit_code == 0, done.output
    assert world.starts() == [[0, 10], [0, 10]]
    assert world.alive() == []


def test_an_error_is_told_with_its_last_lines_and_status(world: World, config: Path) -> None:
    world.set("plan", "fails")
    done = run("train", *SLICE, config)
    assert done.exit_code == 1
    told = done.output.partition("night-w-0 failed, exit status 1:")[2]
    assert "    RuntimeError: no such file: data.bin" in told
    assert "costs: launch/tpu_vm delete --name night" in told
    assert world.verbs("describe", "scp", "ssh") == ["create"], "nothing is made again or deleted"


def test_restarts_come_to_an_end(world: World, config: Path) -> None:
    world.set("plan", "75 75 75 75")
    done = run("train", *SLICE, "--restarts", "2", config)
    assert done.exit_code == 1 and "started again 2 times, no more" in done.output
    assert world.starts()[0] == [0, 10, 20]


def test_training_outlives_its_launcher_and_is_watched_later(world: World, config: Path) -> None:
    world.set("plan", "until-told 0")
    assert run("train", *SLICE, "--detach", config).exit_code == 0
    world.wait_for("starts-0", "starts-1")
    assert world.alive()
    # Someone sends SIGTERM, as a machine about to go does: training saves, and is started again.
    for home in world.folder.glob("home-*"):
        group = (home / "pythia_jax/train.pid").read_text().strip()
        subprocess.run(["kill", "-TERM", "--", f"-{group}"], check=True)
    done = run("watch", *SLICE, config)
    assert done.exit_code == 0, done.output
    assert world.starts() == [[0, 10], [0, 10]]


def test_a_slice_that_vanished_or_never_was_is_made_by_watching(world: World, config: Path) -> None:
    world.set("plan", "0")
    done = run("watch", *SLICE, config)
    assert done.exit_code == 0, done.output
    assert "night is gone" in done.output and world.starts() == [[0], [0]]


def test_machines_that_do_not_let_one_in_yet_are_tried_again(world: World, config: Path) -> None:
    world.set("plan", "0")
    world.set("refuse", "xxx")
    assert run("train", *SLICE, config).exit_code == 0
    assert world.verbs("describe", "ssh") == ["create", *["scp"] * 4]


def test_logs_of_every_worker_are_fetched_and_the_slice_deleted(
    world: World, config: Path, tmp_path: Path
) -> None:
    world.set("plan", "0")
    run("train", *SLICE, config, "--training.steps", "20")
    assert run("logs", *WHERE, "--out", tmp_path / "out").exit_code == 0
    for worker in range(2):
        log = (tmp_path / f"out/night/slice-0/{worker}.log").read_text()
        assert f"process {worker} from step 0" in log
        assert "train --training.steps 20" in log
    assert run("delete", *WHERE).exit_code == 0
    assert world.calls("gcloud")[-1][4:] == [
        "delete",
        "night",
        "--force",
        "--zone=us-west4-a",
        "--quiet",
    ]


def test_several_slices_are_nodes_of_one_resource(world: World, config: Path) -> None:
    more = ["--slices", "2", config, "--mesh.slices", "2", "--dry-run"]
    told = run("train", *SLICE, *more).output
    assert "--node-count=2 --node-prefix=night" in told and "--node-id" not in told
    assert run("train", *SLICE, "--slices", "2", config).exit_code == 1, "the mesh says 1"


@pytest.mark.parametrize("command", ["create", "train", "watch", "logs", "delete"])
def test_dry_run_shows_commands_and_calls_nothing(
    world: World, config: Path, tmp_path: Path, command: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    wanted = [config, "--training.steps", "20"] if command in ("train", "watch") else []
    done = run(command, *SLICE, "--dry-run", *wanted)
    assert done.exit_code == 0, done.output
    shown = [line[2:] for line in done.output.splitlines() if line.startswith("+ ")]
    assert shown and all(shlex.split(line)[:2] == ["gcloud", "compute"] for line in shown)
    assert world.calls() == [] and sorted(tmp_path.rglob("*")) == before
    if command == "train":
        assert any("start.sh --training.steps 20" in line for line in shown)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--training.stesp", "20"], "stesp"),
        (["--checkpoint.directory", "runs/night"], "mount storage"),
        (["--mesh.tensor", "5"], "mesh:"),
        (["--mesh.slices", "2"], "mesh.slices: 2, but --slices 1"),
    ],
)
def test_a_config_that_cannot_run_is_refused_before_anything_is_rented(
    world: World, config: Path, flags: list[str], message: str
) -> None:
    done = run("train", *SLICE, config, *flags)
    assert done.exit_code != 0 and message in done.output
    assert world.calls() == []


def test_an_accelerator_of_unknown_image_is_refused(world: World) -> None:
    done = run("create", *WHERE, "--accelerator", "v99-8")
    assert done.exit_code == 1 and "--runtime-version" in done.output
    done = run("create", *WHERE, "--accelerator", "v99-8", "--runtime-version", "x", "--dry-run")
    assert done.exit_code == 0


def test_a_package_is_the_same_bytes_of_the_same_files(config: Path) -> None:
    package = packed(config)
    assert packed(config) == package
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        names = archive.getnames()
    assert {"pyproject.toml", "config.yaml", "constraints.txt", "pythia_jax/__init__.py"} <= set(
        names
    )
    assert "launch/worker/train.sh" in names
    assert not [name for name in names if "__pycache__" in name or "tests" in name]
    config.write_text(config.read_text() + "\n")
    assert packed(config) != package


def test_workers_get_the_versions_that_are_here() -> None:
    pins = constraints().split()
    assert f"jax=={importlib.metadata.version('jax')}" in pins
    assert f"orbax-checkpoint=={importlib.metadata.version('orbax-checkpoint')}" in pins
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!-]+", pin) for pin in pins)


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (["running", "running"], ("running", 0)),
        (["running", "0"], ("running", 0)),
        (["0", "0"], ("done", 0)),
        (["running", "75"], ("leaving", 75)),
        (["running", "lost"], ("leaving", 0)),
        (["75", "75"], ("again", 75)),
        (["0", "134"], ("again", 134)),
        (["lost", "0"], ("again", 0)),
        (["absent", "absent"], ("again", 0)),
        (["134", "1"], ("failed", 1)),
        (["running", "2"], ("failed", 2)),
    ],
)
def test_what_the_workers_states_amount_to(states: list[str], expected: tuple[str, int]) -> None:
    assert verdict({str(i): state for i, state in enumerate(states)}) == expected
