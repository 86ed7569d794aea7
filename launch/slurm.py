"""GPUs under Slurm: one process a GPU, saved and queued again before the time limit.

\b
    launch/slurm submit --name night --time 24:00:00 \\
        --nodes 2 --gpus-per-node 8 configs/pythia-160m.yaml \\
        --checkpoint.directory /shared/night

The repository, its .venv and the run folder lie on a disk that all nodes see.
"""

import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from launch.commands import (
    CONFIG,
    DRY_RUN,
    POLL,
    RESTARTS,
    ROOT,
    SETTINGS,
    Commands,
    LaunchError,
    Training,
    training,
)
from launch.outcomes import TAIL

SAVE_SECONDS = 180
"""How long before the time limit training is told to save and end."""
TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE")
"""Times as sbatch reads them. https://slurm.schedmd.com/sbatch.html#OPT_time"""
WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "RESIZING"}
RUNNING = {"RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "PREEMPTED"}
"""PREEMPTED goes over into PENDING by itself, since the job is one to be queued again."""


def script(
    name: str,
    nodes: int,
    gpus_per_node: int,
    time_limit: str,
    extra: tuple[str, ...],
    restarts: int,
    out: Path,
    wanted: Training,
) -> str:
    """The batch script. extra: more of sbatch's own flags, such as --partition=gpu.

    Tasks see all GPUs of their node, and JAX gives each the one of its own number; so GPUs are
    asked for by node, not by task, which would hide the others. The signal goes to the tasks: the
    script itself only waits for them.
    """
    settings = [
        f"--job-name={name}",
        f"--nodes={nodes}",
        f"--ntasks-per-node={gpus_per_node}",
        f"--gpus-per-node={gpus_per_node}",
        f"--time={time_limit}",
        f"--signal=TERM@{SAVE_SECONDS}",
        "--requeue",
        "--open-mode=append",
        f"--output={out.resolve()}/{name}-%j.log",
        *extra,
    ]
    command = [
        "bash",
        str(ROOT / "launch" / "worker" / "slurm_job.sh"),
        sys.executable,
        str(restarts),
        str(wanted.path.resolve()),
        *wanted.flags,
    ]
    header = "\n".join(f"#SBATCH {setting}" for setting in settings)
    return f"#!/usr/bin/env bash\n{header}\nexec {shlex.join(command)}\n"


class Job:
    """What Slurm is asked about one job."""

    def __init__(self, commands: Commands, number: str) -> None:
        self.commands, self.number = commands, number

    def state(self) -> str:
        """RUNNING and the like, from the accounts, which keep what has ended."""
        command = ["sacct", f"--jobs={self.number}", "--allocations", "--noheader", "--parsable2"]
        done = self.commands.ask([*command, "--format=State"], assumed="COMPLETED")
        if done.returncode != 0:
            raise LaunchError(f"sacct: {done.stderr.strip()}")
        # "CANCELLED by 1000"; none in the first seconds
        return (done.stdout.split() or ["PENDING"])[0]

    def log(self, out: Path) -> Path:
        found = sorted(out.glob(f"*-{self.number}.log"))
        if not found:
            raise LaunchError(f"{out}: holds no log of job {self.number}; it begins with the job")
        return found[0]

    def watch(
        self, out: Path, poll_seconds: float, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        """Returns when training is done. Raises LaunchError if it failed or was cancelled."""
        told = None
        while True:
            state = self.state()
            if state != told:
                self.commands.say(f"job {self.number}: {state}")
                told = state
            if state == "COMPLETED":
                return
            if state not in WAITING | RUNNING:
                lines = self.log(out).read_text(errors="replace").splitlines()[-TAIL:]
                self.commands.say("\n".join(f"    {line}" for line in lines))
                raise LaunchError(f"job {self.number}: {state}; its last lines are above")
            sleep(poll_seconds)


JOB = click.argument("job")
OUT = click.option("--out", type=click.Path(path_type=Path), default="logs", show_default=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
def main() -> None: ...


@main.command(context_settings=SETTINGS)
@click.option("--name", required=True, help="Of the job.")
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True)
@click.option("--gpus-per-node", type=click.IntRange(1), required=True)
@click.option("--time", "time_limit", required=True, help="Of one start: 24:00:00, 2-12.")
@click.option("--sbatch", "extra", multiple=True, help="A flag of sbatch: --sbatch=--partition=gpu")
@RESTARTS
@OUT
@DRY_RUN
@CONFIG
@click.pass_context
def submit(
    ctx: click.Context, config: Path, name: str, out: Path, dry_run: bool, **settings: Any
) -> None:
    """Write OUT/NAME.sbatch for CONFIG, with its dotted flags, and submit it."""
    if not TIME.fullmatch(settings["time_limit"]):
        raise LaunchError(
            f"--time {settings['time_limit']}: want MINUTES, MINUTES:SECONDS, "
            "HOURS:MINUTES:SECONDS, DAYS-HOURS, DAYS-HOURS:MINUTES or DAYS-HOURS:MINUTES:SECONDS; "
            "for example 24:00:00"
        )
    commands, wanted = Commands(dry_run), training(ctx, config)
    file = out / f"{name}.sbatch"
    commands.write(file, script(name, out=out, wanted=wanted, **settings))
    commands.run(["sbatch", str(file)])


@main.command()
@JOB
@OUT
@POLL
@DRY_RUN
def watch(job: str, out: Path, poll_seconds: float, dry_run: bool) -> None:
    """Wait until JOB, a number that sbatch gave, is done; if it fails, show its last lines."""
    Job(Commands(dry_run), job).watch(out, poll_seconds)


@main.command()
@JOB
@OUT
@DRY_RUN
def logs(job: str, out: Path, dry_run: bool) -> None:
    """Print what JOB has written so far."""
    commands = Commands(dry_run)
    if dry_run:
        commands.say(f"+ read {out}/NAME-{job}.log")
    else:
        commands.say(Job(commands, job).log(out).read_text(errors="replace").rstrip("\n"))


@main.command()
@JOB
@DRY_RUN
def cancel(job: str, dry_run: bool) -> None:
    """End JOB without queuing it again. What was not saved is lost."""
    Commands(dry_run).run(["scancel", job])
