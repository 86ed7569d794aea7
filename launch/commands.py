"""What launchers share: programs run, or only shown, and a CONFIG that is checked before."""

import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from jax.sharding import AbstractMesh

from pythia_jax import sharding
from pythia_jax.cli.options import DOTTED, load_config
from pythia_jax.configs import ConfigError
from pythia_jax.training.topologies import parse

ROOT = Path(__file__).resolve().parents[1]
SETTINGS: dict[str, Any] = {**DOTTED, "help_option_names": ["-h", "--help"]}
"""Of a command that takes CONFIG and dotted flags."""

CONFIG = click.argument("config", type=click.Path(path_type=Path))
DRY_RUN = click.option(
    "--dry-run", is_flag=True, help="Print commands and files; run and write nothing."
)
POLL = click.option(
    "--poll-seconds", type=float, default=60, show_default=True, help="Between two looks."
)
RESTARTS = click.option(
    "--restarts", type=int, default=100, show_default=True, help="At most; then it is an error."
)


class LaunchError(click.ClickException):
    """A launcher's own error, told in one line; its exit status is 1."""


@dataclass(frozen=True)
class Commands:
    """Runs programs, or with `dry_run` prints them. say: takes a line for the user."""

    dry_run: bool
    say: Callable[[str], object] = click.echo

    def run(self, command: Sequence[str]) -> None:
        """Run a program, its output shown as it comes. Raises LaunchError if it fails."""
        self.say(f"+ {shlex.join(command)}")
        if self.dry_run:
            return
        status = _start(command, capture_output=False).returncode
        if status != 0:
            raise LaunchError(f"{shlex.join(command)}: exit status {status}")

    def ask(self, command: Sequence[str], assumed: str) -> subprocess.CompletedProcess[str]:
        """Run a program for its answer, whatever its exit status. assumed: stdout of a dry run."""
        if self.dry_run:
            self.say(f"+ {shlex.join(command)}")
            return subprocess.CompletedProcess(command, 0, assumed, "")
        return _start(command, capture_output=True)

    def write(self, path: Path, text: str) -> None:
        """Write a small file, or print it."""
        self.say(f"+ write {path}")
        if self.dry_run:
            self.say(text.rstrip("\n"))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def _start(command: Sequence[str], *, capture_output: bool) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=capture_output, text=True, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise LaunchError(f"{command[0]}: not found on this machine; install it first") from None


@dataclass(frozen=True)
class Training:
    """What is to be trained: the file, the dotted flags beside it, and what both amount to."""

    path: Path
    flags: tuple[str, ...]
    config: Any


def training(ctx: click.Context, path: Path) -> Training:
    """CONFIG and dotted flags of a command; what is wrong with them is told before it costs."""
    try:
        return Training(path, tuple(ctx.args), load_config(ctx, path))
    except (ValueError, OSError) as error:
        raise LaunchError(str(error)) from error


def check_for_cloud(
    wanted: Training, topology: str, slices: int, say: Callable[[str], object]
) -> None:
    """Refuse what cannot train there, before it costs; say what every worker needs to have.

    topology: `v5litepod-16` or `v5e:4x4`, of one slice.
    """
    config = wanted.config
    directory = str(config.checkpoint.directory)
    try:
        devices = parse(topology, slices).devices
        shape = sharding.mesh_shape(config.mesh, devices)
        parts = config.training.batch_size // config.training.gradient_accumulation
        if config.model is None:
            raise ConfigError("model: missing; a training run needs one")
        sharding.check_fit(AbstractMesh(shape, sharding.AXES), config.model, parts)
    except ValueError as error:
        raise LaunchError(str(error)) from error
    if "://" not in directory and not Path(directory).is_absolute():
        raise LaunchError(
            f"checkpoint.directory: {directory} would lie on the workers' own disks, which are "
            "not shared and go with them; use a bucket, --checkpoint.directory gs://BUCKET/RUN, or "
            "mount storage that outlives them on every worker, and give its absolute path"
        )
    if config.mesh.slices != slices:
        raise LaunchError(
            f"mesh.slices: {config.mesh.slices}, but --slices {slices}; they must be the same"
        )
    files = [*config.data.train, *config.data.validation, config.tokenizer]
    for file in dict.fromkeys(file for file in files if file is not None and "://" not in file):
        say(f"note: {file} is no URL, so every worker must have it under this path")
    if "://" not in directory:
        say(f"note: {directory} must be the same shared storage on every worker")
