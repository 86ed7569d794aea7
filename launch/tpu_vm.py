"""TPU VM slices by queued resources: made, installed on, trained on, made again after preemption.

\b
    launch/tpu_vm train --name night --zone us-west4-a \\
        --accelerator v5litepod-16 --spot configs/pythia-160m.yaml \\
        --checkpoint.directory gs://BUCKET/night

The slice and its nodes are called NAME (NAME-0 … with several slices).
"""

import shlex
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from launch.commands import (
    CONFIG,
    DRY_RUN,
    POLL,
    RESTARTS,
    SETTINGS,
    Commands,
    LaunchError,
    Training,
    check_for_cloud,
    training,
)
from launch.outcomes import DONE, TAIL, in_words, of_all, worth_a_restart
from launch.packages import packed

GCLOUD = ("gcloud", "compute", "tpus", "queued-resources")
GONE = ("SUSPENDING", "SUSPENDED", "FAILED", "DELETING")
"""States that a queued resource never leaves: preempted, refused, or deleted by somebody.
https://cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.queuedResources#State"""
RUNTIME = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
"""Machine images by the beginning of an accelerator's name.
https://cloud.google.com/tpu/docs/runtimes"""
WORKER = "pythia_jax/source/launch/worker"
CONNECT_TRIES = 10
"""A slice is ACTIVE some time before all its machines let one in."""
PATIENCE = 5
"""Looks in a row at which a slice may not answer, or some workers may be on their way out."""


@dataclass(frozen=True)
class Slice:
    """A queued resource, there or not, and what gcloud is asked about it."""

    commands: Commands
    name: str
    zone: str
    accelerator: str = ""
    project: str | None = None
    runtime_version: str | None = None
    spot: bool = False
    slices: int = 1
    poll_seconds: float = 60

    def gcloud(self, verb: str, *arguments: str) -> list[str]:
        where = [f"--zone={self.zone}"]
        if self.project:
            where.append(f"--project={self.project}")
        return [*GCLOUD, verb, *arguments, *where, "--quiet"]

    def create(self) -> None:
        """Ask for the slice. Raises LaunchError, also for an accelerator whose image is unknown."""
        if not self.accelerator:
            raise LaunchError("--accelerator: missing; for example --accelerator v5litepod-16")
        runtime = self.runtime_version or RUNTIME.get(self.accelerator.rpartition("-")[0])
        if runtime is None:
            raise LaunchError(
                f"--accelerator {self.accelerator}: its machine image is not known here; the names "
                f"known begin with {', '.join(RUNTIME)}; for another give --runtime-version too"
            )
        nodes = [f"--node-id={self.name}"]
        if self.slices > 1:
            nodes = [f"--node-count={self.slices}", f"--node-prefix={self.name}"]
        what = [f"--accelerator-type={self.accelerator}", f"--runtime-version={runtime}", *nodes]
        self.commands.run(self.gcloud("create", self.name, *what, *["--spot"] * self.spot))

    def state(self) -> str | None:
        """ACTIVE and the like; None where there is no such slice. Raises LaunchError otherwise."""
        command = self.gcloud("describe", self.name, "--format=value(state.state)")
        done = self.commands.ask(command, assumed="ACTIVE")
        if done.returncode == 0:
            return done.stdout.strip() or "UNKNOWN"
        if "NOT_FOUND" in done.stderr or "not found" in done.stderr.lower():
            return None
        raise LaunchError(f"gcloud cannot describe {self.name}: {done.stderr.strip()}")

    def wait_until_active(self) -> str | None:
        """Wait for the cloud to give the slice; returns ACTIVE, or the state that ended this."""
        told = None
        while (state := self.state()) != "ACTIVE":
            if state is None or state in GONE:
                return state
            if state != told:
                self.commands.say(f"{self.name}: {state}")
                told = state
            time.sleep(self.poll_seconds)
        return state

    def delete(self) -> None:
        self.commands.run(self.gcloud("delete", self.name, "--force"))

    def everywhere(self, script: str) -> list[str]:
        """The command that runs a shell command on every worker of every slice."""
        targets = ["--node=all", "--worker=all", "--strict-host-key-checking=no"]
        return self.gcloud("ssh", self.name, *targets, f"--command={script}")

    def install(self, package: bytes) -> None:
        """Bring code and config to every worker, and install what is not there yet."""
        unpack = (
            "mkdir -p pythia_jax && cd pythia_jax && mv ../pythia_jax.tar.gz source.tar.gz && "
            "rm -rf source && mkdir source && tar -xzf source.tar.gz -C source"
        )
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "pythia_jax.tar.gz"
            if not self.commands.dry_run:
                file.write_bytes(package)
            copy = self.gcloud(
                "scp",
                str(file),
                f"{self.name}:",
                "--node=all",
                "--worker=all",
                "--strict-host-key-checking=no",
            )
            for left in reversed(range(CONNECT_TRIES)):
                try:
                    self.commands.run(copy)
                    break
                except LaunchError:
                    if not left:
                        raise
                    time.sleep(min(15, self.poll_seconds))
        self.commands.run(self.everywhere(f"{unpack} && bash ~/{WORKER}/install.sh tpu,bucket"))

    def start(self, wanted: Training) -> None:
        """Start training on all workers, ending first what may still train there."""
        flags = shlex.join(wanted.flags)
        self.commands.run(self.everywhere(f"bash ~/{WORKER}/start.sh {flags}".rstrip()))

    def look(self, lines: int = 0) -> tuple[dict[str, str], dict[str, list[str]]] | None:
        """By worker: how training stands there, and the last `lines` of its log where it failed.

        None when not all workers answered.
        """
        # Without the script, as on a machine just made, training is absent.
        script = f"test -e ~/{WORKER} || echo pythia_jax: $HOSTNAME absent; "
        script += f"test ! -e ~/{WORKER} || bash ~/{WORKER}/status.sh {lines}"
        done = self.commands.ask(self.everywhere(script), assumed="pythia_jax: worker 0")
        if done.returncode != 0:
            return None
        states: dict[str, str] = {}
        logs: dict[str, list[str]] = {}
        for line in done.stdout.splitlines():
            mark, _, rest = line.partition(" ")
            worker, _, text = rest.partition(" ")
            if mark == "pythia_jax:":
                states[worker] = text
            elif mark == "pythia_jax|":
                logs.setdefault(worker, []).append(text)
        return (states, logs) if states else None


def verdict(states: dict[str, str]) -> tuple[str, int]:
    """What the workers' states amount to, and an exit status.

    running; leaving: some have ended and the others should soon; again: start anew; done; failed.
    """
    ended = [int(state) for state in states.values() if state.isdecimal()]
    status = of_all(ended)
    if status != DONE and not worth_a_restart(status):
        return "failed", status
    if "running" in states.values():
        calm = set(states.values()) <= {"running", "0"}
        return ("running" if calm else "leaving"), status
    if all(state == "0" for state in states.values()):
        return "done", DONE
    return "again", status


@dataclass
class Watch:
    """Keeps training going on a slice until it is done, or fails of itself.

    package: the code and CONFIG as they were when the watching began; what is edited meanwhile
    takes no part in a restart.
    """

    slice: Slice
    wanted: Training
    package: bytes
    restarts: int
    sleep: Callable[[float], object] = time.sleep
    started: int = field(default=0, init=False)

    def until_done(self) -> None:
        """Returns when training is done. Raises click's Exit with its status if it failed."""
        silent = leaving = 0
        while True:
            state = self._state()
            if state is None or state in GONE:
                self._again(f"{self.slice.name} is {state or 'gone'}", anew=True)
                silent = leaving = 0
            elif state == "ACTIVE":
                seen = self.slice.look()
                what, status = ("silent", DONE) if seen is None else verdict(seen[0])
                silent = silent + 1 if what == "silent" else 0
                leaving = leaving + 1 if what == "leaving" else 0
                if what == "done":
                    self.slice.commands.say("done")
                    return
                # A machine that is taken away may fail in any way; its state tells a moment later.
                if what == "failed" and self._state() == "ACTIVE":
                    self._fail(status)
                if silent > PATIENCE:
                    self._again(f"{self.slice.name} does not answer", anew=True)
                    silent = 0
                elif what == "again" or leaving > PATIENCE:
                    self._again(f"training ended: {in_words(status)}", anew=False)
                    leaving = 0
            self.sleep(self.slice.poll_seconds)

    def _state(self) -> str | None:
        """The slice's state, asked for again where gcloud itself fails, as networks do."""
        for _ in range(PATIENCE):
            try:
                return self.slice.state()
            except LaunchError as error:
                self.slice.commands.say(error.message)
                self.sleep(self.slice.poll_seconds)
        return self.slice.state()

    def _again(self, why: str, *, anew: bool) -> None:
        """Start training again, on a new slice if the old one is of no more use."""
        self.started += 1
        if self.started > self.restarts:
            raise LaunchError(f"{why}; it has been started again {self.restarts} times, no more")
        say = self.slice.commands.say
        say(f"{why}; starting again, {self.started} of at most {self.restarts} times")
        if anew:
            if self._state() is not None:
                self.slice.delete()
            self.slice.create()
            if self.slice.wait_until_active() != "ACTIVE":
                return  # preempted before it began; the next look finds it gone
        try:
            self.slice.install(self.package)
            self.slice.start(self.wanted)
        except LaunchError as error:
            say(f"{error.message}; looking again")

    def _fail(self, status: int) -> None:
        seen = self.slice.look(TAIL)
        states, logs = seen or ({}, {})
        for worker, state in states.items():
            if state.isdecimal() and int(state) == status:
                text = "\n".join(f"    {line}" for line in logs.get(worker, []))
                self.slice.commands.say(f"{worker} failed, {in_words(status)}:\n{text}")
        self.slice.commands.say(
            f"training failed: {in_words(status)}. The slice is still there, and costs: "
            f"launch/tpu_vm delete --name {self.slice.name} --zone {self.slice.zone}"
        )
        raise click.exceptions.Exit(status)


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags that every command takes."""
    for option in reversed(
        [
            click.option("--name", required=True, help="Of the slice, made or to be made."),
            click.option("--zone", required=True, help="For example us-west4-a."),
            click.option("--project", help="Google Cloud's.  [default: gcloud's own setting]"),
            click.option("--accelerator", default="", help="For example v5litepod-16."),
            click.option("--runtime-version", help="Machine image.  [default: by accelerator]"),
            click.option("--spot", is_flag=True, help="Cheaper, and may be taken away."),
            click.option("--slices", type=click.IntRange(1), default=1, show_default=True),
            POLL,
            DRY_RUN,
        ]
    ):
        command = option(command)
    return command


def slice_of(dry_run: bool, **settings: Any) -> Slice:
    return Slice(Commands(dry_run), **settings)


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
def main() -> None: ...


@main.command()
@options
def create(**settings: Any) -> None:
    """Ask for the slice and wait until it is there."""
    wanted = slice_of(**settings)
    wanted.create()
    state = wanted.wait_until_active()
    if state != "ACTIVE":
        raise LaunchError(f"{wanted.name}: {state or 'gone'}; see launch/tpu_vm delete")


@main.command(context_settings=SETTINGS)
@options
@RESTARTS
@click.option("--detach", is_flag=True, help="Do not watch; launch/tpu_vm watch does so later.")
@CONFIG
@click.pass_context
def train(ctx: click.Context, config: Path, restarts: int, detach: bool, **settings: Any) -> None:
    """Train CONFIG, with its dotted flags, on the slice; make that first if it is not there."""
    on, wanted = _checked(ctx, config, settings)
    if on.state() is None or on.commands.dry_run:
        on.create()
    state = on.wait_until_active()
    if state != "ACTIVE":
        raise LaunchError(f"{on.name}: {state or 'gone'}; see launch/tpu_vm delete")
    package = packed(wanted.path)
    on.install(package)
    on.start(wanted)
    if not detach:
        Watch(on, wanted, package, restarts).until_done()


@main.command(context_settings=SETTINGS)
@options
@RESTARTS
@CONFIG
@click.pass_context
def watch(ctx: click.Context, config: Path, restarts: int, **settings: Any) -> None:
    """Watch training until it is done; start it again, on a new slice, when it is interrupted.

    Takes what `train` was given. Ctrl-C ends the watching, not the training.
    """
    on, wanted = _checked(ctx, config, settings)
    Watch(on, wanted, packed(wanted.path), restarts).until_done()


def _checked(ctx: click.Context, config: Path, settings: dict[str, Any]) -> tuple[Slice, Training]:
    on, wanted = slice_of(**settings), training(ctx, config)
    if not on.accelerator:
        raise LaunchError("--accelerator: missing; a slice that is taken away is made again by it")
    check_for_cloud(wanted, on.accelerator, on.slices, on.commands.say)
    return on, wanted


@main.command()
@options
@click.option("--out", type=click.Path(path_type=Path), default="logs", show_default=True)
def logs(out: Path, **settings: Any) -> None:
    """Fetch every worker's log to OUT/NAME/slice-N/WORKER.log."""
    on = slice_of(**settings)
    for node in range(on.slices):
        folder = out / on.name / f"slice-{node}"
        if not on.commands.dry_run:
            folder.mkdir(parents=True, exist_ok=True)
        targets = [f"--node={node}", "--worker=all", "--strict-host-key-checking=no"]
        how = ["--command=cat pythia_jax/train.log", f"--output-directory={folder}"]
        on.commands.run(on.gcloud("ssh", on.name, *targets, *how))


@main.command()
@options
def delete(**settings: Any) -> None:
    """Delete the slice, and with it what its machines' disks hold."""
    slice_of(**settings).delete()
