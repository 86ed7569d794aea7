"""A run killed again and again, beside the same run left alone: are they equal, bit for bit?

\b
    python benchmarks/soak.py --kills 25
    python benchmarks/soak.py --kills 25 --processes 2

A small run is trained once undisturbed, and once more killed with kill -9 at random moments and
started again each time. Half of the kills come at any moment of a life, the other half are aimed
at a moment when a checkpoint is being written. With several processes one of them, drawn, is
killed; the others should notice and end. Those that do not within 30 seconds are ended, as a
launcher would, and counted. In the end the final checkpoint (every array of the state) and every
logged loss of the two must be equal. Exit status 0 only if they are.
"""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from pythia_jax import configs
from pythia_jax.configs import RunConfig
from pythia_jax.data import IndexedDatasetWriter
from pythia_jax.training.telemetry import read_metrics

COMPARED = ("step", "loss", "grad_norm", "learning_rate", "validation_loss")
"""What of a logged line does not depend on the clock."""
PHASES = ("start", "restore", "compile", "step", "save")
"""Imports; reading data and a checkpoint; until the first step is done; what then alternates."""
MAIN = "from pythia_jax.cli import main; main()"
START_SECONDS = 8.0
"""Until about when a run is starting."""
NOTICE_SECONDS = 30
"""How long the other processes may take to end once one is killed."""


@dataclass(frozen=True)
class Kill:
    """phase: what the run was doing. noticed: seconds until the other processes had ended by
    themselves; None if they had not within NOTICE_SECONDS, and were ended."""

    phase: str
    last_step: int
    noticed: float | None


class Life:
    """The processes of one start of a run."""

    def __init__(self, config: Path, folder: Path, processes: int, log: Path) -> None:
        self.folder, self.log = folder, log
        self._left = unfinished(folder)
        command = [sys.executable, "-c", MAIN, "train", str(config)]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
        if processes > 1:
            command += ["--pod", "--distributed.heartbeat_seconds", "10"]
            environment["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{free_port()}"
            environment["JAX_NUM_PROCESSES"] = str(processes)
        self.processes = []
        with log.open("wb") as file:
            for number in range(processes):
                self.processes.append(
                    subprocess.Popen(
                        command,
                        env={**environment, "JAX_PROCESS_ID": str(number)}
                        if processes > 1
                        else environment,
                        stdout=file if number == 0 else subprocess.DEVNULL,
                        stderr=subprocess.STDOUT,
                    )
                )

    def wait(self) -> None:
        """Wait for a run that is left alone. Raises ClickException if it fails."""
        statuses = [process.wait() for process in self.processes]
        if any(statuses):
            raise click.ClickException(
                f"a run left alone ended with {statuses}:\n{self.log.read_text()[-3000:]}"
            )

    def running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def kill(self, victim: int, *, in_a_save: bool) -> Kill | None:
        """Kill one process and wait for the others; None, and nothing done, if it is not saving."""
        process = self.processes[victim]
        # Stopped first, to look where it stands.
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        phase, last = self.phase(), newest_step(self.folder)
        if in_a_save and phase != "save":
            process.send_signal(signal.SIGCONT)
            return None
        process.kill()
        began = time.monotonic()
        for other in self.processes:
            left = NOTICE_SECONDS - (time.monotonic() - began)
            try:
                other.wait(max(left, 0.1))
            except subprocess.TimeoutExpired:
                self.end()
                return Kill(phase, last, None)
        return Kill(phase, last, time.monotonic() - began)

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def writing(self) -> bool:
        """Whether a checkpoint is being written; what an earlier kill left does not count."""
        return bool(unfinished(self.folder) - self._left)

    def phase(self) -> str:
        """What the run is doing, by what it has said and written so far."""
        if self.writing():
            return "save"
        said = self.log.read_text(errors="replace")
        signs = {"loss=": "step", "%|": "compile", "attention:": "restore"}
        return next((phase for sign, phase in signs.items() if sign in said), "start")


def unfinished(folder: Path) -> set[tuple[Path, int]]:
    """Checkpoints that lie there unfinished, each with its inode: their names come again."""
    found = set()
    for kind in ("checkpoints", "resume"):
        for path in (folder / kind).glob("*tmp*"):
            with suppress(FileNotFoundError):  # it may be finished by now
                found.add((path, path.stat().st_ino))
    return found


def newest_step(folder: Path) -> int:
    """The newest logged step, -1 if there is none."""
    path = folder / "metrics.jsonl"
    lines = read_metrics(path) if path.is_file() else []
    return max((int(line["step"]) for line in lines), default=-1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def small_run(folder: Path, steps: int) -> dict[str, Any]:
    """A run of a few megabytes that saves at nearly every step, and its data."""
    draw = np.random.default_rng(0)
    with IndexedDatasetWriter(folder / "corpus", np.dtype(np.uint16)) as writer:
        for _ in range(400):
            writer.add((2000 * draw.random(draw.integers(5, 400)) ** 4).astype(np.uint16))
    data = [str(folder / "corpus")]
    return {
        "name": "soak",
        "model": {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 2048,
            "max_position_embeddings": 64,
        },
        "data": {"train": data, "validation": data, "sequence_length": 64},
        "optimizer": {"peak_learning_rate": 1e-2},
        "training": {"steps": steps, "batch_size": 8, "precision": "float32", "remat": "none"},
        "checkpoint": {"every": 20, "extra_steps": [0, 1, 2, 4, 8], "resume_every_minutes": 0.005},
        "evaluation": {"every": 30, "steps": 2},
        "logging": {"every": 1},
    }


def with_folder(run: dict[str, Any], folder: Path, steps: int) -> RunConfig:
    checkpoint = {**run.get("checkpoint", {}), "directory": str(folder)}
    training = {**run.get("training", {}), "steps": steps}
    return configs.from_dict({**run, "checkpoint": checkpoint, "training": training})


def differences(a: Path, b: Path, steps: int) -> list[str]:
    """What differs between two finished runs: arrays of the final state, logged lines."""
    import jax

    from pythia_jax.bridge import load
    from pythia_jax.training.stored import read_about

    found = []
    digests = [read_about(run / "checkpoints" / str(steps))["digests"] for run in (a, b)]
    found += [f"final {name}" for name in digests[0] if digests[0][name] != digests[1].get(name)]
    # Reading them compares the arrays with their digests, too.
    trees = [load(run, step=steps).params for run in (a, b)]
    for x, y in zip(*map(jax.tree.leaves, trees), strict=True):
        if np.asarray(x).tobytes() != np.asarray(y).tobytes():
            found.append(f"a final parameter of shape {x.shape}")
    lines = [
        [{key: line[key] for key in COMPARED if key in line} for line in read_metrics(path)]
        for path in (a / "metrics.jsonl", b / "metrics.jsonl")
    ]
    if len(lines[0]) != len(lines[1]):
        found.append(f"{len(lines[0])} logged lines against {len(lines[1])}")
    pairs = zip(*lines, strict=False)
    found += [f"logged line of step {x['step']}: {x} against {y}" for x, y in pairs if x != y]
    return found


def kill_and_restart(
    config: Path, folder: Path, processes: int, kills: int, stride: int, draw: random.Random
) -> tuple[list[Kill], int]:
    """Kill a run so many times, about every `stride` steps, then let it end.

    Returns the kills and how many steps were done again because of them.
    """
    done: list[Kill] = []
    redone = 0
    for number in range(kills + 1):
        log = folder.with_name(f"life-{number}.log")
        before = newest_step(folder)
        life = Life(config, folder, processes, log)
        try:
            if number == kills:
                life.wait()
            else:
                done.append(strike(life, draw, stride, aimed=number % 2 == 1))
        finally:
            life.end()
        if said := re.search(r"resumed from step (\d+)", log.read_text()):
            redone += max(before + 1 - int(said[1]), 0)
        if number < kills:
            where = f"{done[-1].phase:<8} last logged step {done[-1].last_step}"
            where += ", not noticed" * (done[-1].noticed is None)
            click.echo(f"  {number + 1:>3}  {where}", err=True)
    return done, redone


def strike(life: Life, draw: random.Random, stride: int, *, aimed: bool) -> Kill:
    """Kill at a random moment of a life or, aimed, at one when a checkpoint is being written.

    One kill in four comes in the first seconds; the others once some steps were made. Raises
    ClickException if the run ends before that.
    """
    victim = draw.randrange(len(life.processes))
    early = not aimed and draw.random() < 0.5
    moment = time.monotonic() + draw.uniform(0.05, START_SECONDS)
    target = newest_step(life.folder) + draw.randint(1, stride)
    while life.running():
        due = time.monotonic() >= moment if early else newest_step(life.folder) >= target
        if due and (not aimed or life.writing()):
            time.sleep(draw.uniform(0, 0.03))  # anywhere in the write, or in the step
            if life.running() and (kill := life.kill(victim, in_a_save=aimed)):
                return kill
        time.sleep(0.003)
    raise click.ClickException(
        f"the run ended by itself before it was killed; give it more --steps:\n"
        f"{life.log.read_text()[-3000:]}"
    )


@click.command(help=__doc__)
@click.option("--kills", type=click.IntRange(min=1), default=25, show_default=True)
@click.option("--processes", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--config", type=click.Path(path_type=Path, exists=True), help="Another run.")
@click.option("--steps", type=click.IntRange(min=1), help="Of the run.  [default: 20 a kill]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the moments.")
def main(kills: int, processes: int, config: Path | None, steps: int | None, seed: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        steps = steps or max(20 * kills, 60)
        run = configs.to_dict(configs.load(config)) if config else small_run(folder, steps)
        paths = {name: folder / f"{name}.yaml" for name in ("alone", "killed")}
        for name, path in paths.items():
            configs.save(with_folder(run, folder / name, steps), path)
        began = time.monotonic()
        Life(paths["alone"], folder / "alone", processes, folder / "alone.log").wait()
        alone = time.monotonic() - began
        click.echo(f"undisturbed: {steps} steps, {alone:.1f} s; now with {kills} kills", err=True)
        done, redone = kill_and_restart(
            paths["killed"],
            folder / "killed",
            processes,
            kills,
            max(steps // kills, 1),
            random.Random(seed),
        )
        found = differences(folder / "alone", folder / "killed", steps)
    fell = Counter(kill.phase for kill in done)
    header = ["processes", "steps", "kills", *PHASES, "steps redone", "noticed (s)", "not noticed"]
    header.append("result")
    noticed = [kill.noticed for kill in done if kill.noticed is not None]
    row = [processes, steps, kills, *(fell[phase] for phase in PHASES), redone]
    row.append(kills - len(noticed))
    outcome = "different" if found else "equal"
    click.echo("| " + " | ".join(header) + " |\n|" + " --- |" * len(header))
    told = [*map(str, row[:-1]), f"{max(noticed, default=0):.1f}", str(row[-1]), outcome]
    click.echo("| " + " | ".join(told) + " |")
    if found:
        click.echo("\n".join(["", *found[:20]]))
        sys.exit(1)


if __name__ == "__main__":
    main()
