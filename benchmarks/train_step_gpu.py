"""The GPU side of train_step.py: each implementation at the settings and the batch it does best at.

Every try has a process of its own, so that memory is clean. First each implementation looks for
its batch: doubled until memory runs out, or until twice the rows give less than 1 % more tokens/s.
Ours does so for each way of rematerialisation, and the fastest is kept. Then both run at what they
found, process after process in turn; medians are told. Steps are dispatched without waiting for
each other, as in training.

Ours: float32 weights, bfloat16 products, `attention: auto`. Theirs: transformers' GPTNeoX with
SDPA, under torch.autocast and torch.compile, fused AdamW. MFU is by the convention of
pythia_jax/training/flops.py for both.
"""

import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import click

SIZES = ("160m", "410m", "1.4b")
SIDES = {"pythia_jax": ("none", "dots", "full"), "torch": ("compile",)}
"""Implementations, and the settings that each may choose from."""
FIRST_BATCH, MOST_ROWS = 8, 1024
GAIN = 1.01
"""Twice the rows must give at least this many times the tokens/s to be worth a further doubling."""
WARM_UP = 3

Result = dict[str, Any]
Attempt = Callable[[int], Result | None]


@dataclass(frozen=True)
class Card:
    """What is held fixed: `gpu` or `cpu`, tokens a row, dtype of products, timed steps a try."""

    platform: str
    seq: int
    dtype: str
    steps: int


def compare(
    card: Card, sizes: Sequence[str], batch: int | None, rounds: int
) -> tuple[str, dict[str, Any]]:
    """The table, and what it was made of. batch: in place of as many rows as fit."""
    from pythia_jax import suite

    for size in sizes:
        suite.lookup(size)
    measured = {}
    with tempfile.TemporaryDirectory() as caches:
        for size in sizes:
            chosen = {name: choose(card, name, size, batch, caches) for name in SIDES}
            runs: dict[str, list[Result]] = {name: [] for name in SIDES}
            for _ in range(rounds):
                for name, best in chosen.items():
                    again = attempt(card, name, size, best["setting"], best["batch"], caches)
                    if again is None:
                        raise click.ClickException(
                            f"{name}, {size}: no memory for what fitted before"
                        )
                    runs[name].append(again)
            measured[size] = {name: summary(card, size, tries) for name, tries in runs.items()}
    head = machine(next(iter(measured.values()))["pythia_jax"]["device"], card)
    count = f"{rounds} processes of {card.steps} steps each, in turn; medians"
    return f"{head}; {count}\n\n{table(measured)}\n", {"machine": head, "measured": measured}


def choose(card: Card, name: str, size: str, batch: int | None, caches: str) -> Result:
    """The fastest of all tries of an implementation at a size."""
    tries: list[Result] = []
    for setting in SIDES[name]:

        def run(rows: int, setting: str = setting) -> Result | None:
            result = attempt(card, name, size, setting, rows, caches)
            speed = "out of memory" if result is None else f"{result['tokens/s']:,.0f} tokens/s"
            click.echo(f"{size} {name} {setting}, {rows} rows: {speed}", err=True)
            return result

        tries += doubled(run) if batch is None else [r for r in [run(batch)] if r is not None]
    if not tries:
        raise click.ClickException(f"{name}: {size} does not fit this device at any batch tried")
    return max(tries, key=lambda result: result["tokens/s"])


def doubled(run: Attempt) -> list[Result]:
    """Tries at more and more rows, until memory is full or more rows bring nothing.

    Where the first is too many already, at fewer and fewer until they fit.
    """
    rows, tries = FIRST_BATCH, []
    first = run(rows)
    while first is None and rows > 1:
        rows //= 2
        first = run(rows)
        if first is not None:
            return [first]
    while first is not None:
        tries.append(first)
        gained = len(tries) < 2 or first["tokens/s"] >= GAIN * tries[-2]["tokens/s"]
        rows *= 2
        first = run(rows) if gained and rows <= MOST_ROWS else None
    return tries


def attempt(
    card: Card, name: str, size: str, setting: str, batch: int, caches: str
) -> Result | None:
    """One process; None where memory ran out."""
    task = {"card": asdict(card), "name": name, "size": size, "setting": setting, "batch": batch}
    # Compiled programs are kept between processes, of both alike.
    environment = {
        "JAX_COMPILATION_CACHE_DIR": f"{caches}/jax",
        "JAX_PLATFORMS": "cuda" if card.platform == "gpu" else "cpu",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.94",
        "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(task)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    if done.returncode == -9:  # the kernel's way to say that memory ran out
        return None
    if done.returncode:
        raise click.ClickException(f"{name}, {size}, {batch} rows, failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(card: Card, size: str, tries: list[Result]) -> Result:
    """Medians of the tries of one implementation, and its MFU where the peak is known."""
    from pythia_jax.chips import of_device_kind
    from pythia_jax.configs import ModelConfig
    from pythia_jax.training.flops import model_flops

    seconds = statistics.median(result["step s"] for result in tries)
    chip = of_device_kind(tries[0]["device"])
    peak = chip.peak_flops.get(card.dtype) if chip else None
    work = model_flops(ModelConfig.from_size(size), tries[0]["batch"], card.seq)
    return {
        **tries[0],
        "step s": seconds,
        "tokens/s": tries[0]["batch"] * card.seq / seconds,
        "peak GiB": max(result["peak GiB"] for result in tries),
        "MFU": work / seconds / peak if peak else None,
        "all step s": [result["step s"] for result in tries],
    }


def table(measured: dict[str, dict[str, Result]]) -> str:
    lines = [
        "| size | implementation | setting | rows | tokens/s | step s | peak GiB | MFU | ratio |",
        "| --- | --- | --- | --: | --: | --: | --: | --: | --: |",
    ]
    for size, results in measured.items():
        ratio = results["pythia_jax"]["tokens/s"] / results["torch"]["tokens/s"]
        for name, row in results.items():
            mfu = "unknown" if row["MFU"] is None else f"{row['MFU']:.1%}"
            cells = [f"{row['tokens/s']:,.0f}", f"{row['step s']:.3f}", f"{row['peak GiB']:.1f}"]
            cells += [mfu, f"{ratio:.2f}" if name == "pythia_jax" else ""]
            lead = f"| {size} | {name} | {row['setting']} | {row['batch']} |"
            lines.append(f"{lead} {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(device: str, card: Card) -> str:
    """What was measured on and with, and when."""
    packages = ("jax", "jaxlib", "optax", "torch", "transformers")
    named = ", ".join(f"{package} {version(package)}" for package in packages)
    driver = ""
    if card.platform == "gpu":
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
        told = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        driver = " (driver {}, {})".format(*told.splitlines()[0].split(", "))
    date = datetime.date.today().isoformat()
    python = platform.python_version()
    return f"{date}, {device}{driver}, Python {python}, {named}; {card.dtype}, rows of {card.seq}"


def work(task: dict[str, Any]) -> Result | None:
    """The worker: builds a step and times it; None where memory ran out."""
    card, name, batch = Card(**task["card"]), task["name"], task["batch"]
    try:
        step, device, peak = build(card, name, task["size"], task["setting"], batch)
        for _ in range(WARM_UP):
            loss = float(step.take())
        step.wait()
        began = time.perf_counter()
        for _ in range(card.steps):
            step.take()
        step.wait()
        seconds = (time.perf_counter() - began) / card.steps
    except Exception as error:
        if any(sign in str(error) for sign in ("RESOURCE_EXHAUSTED", "out of memory")):
            return None
        raise
    return {
        "setting": task["setting"],
        "batch": batch,
        "step s": seconds,
        "tokens/s": batch * card.seq / seconds,
        "peak GiB": peak() / 2**30,
        "loss": loss,
        "device": device,
    }


def build(
    card: Card, name: str, size: str, setting: str, batch: int
) -> tuple[Any, str, Callable[[], int]]:
    """The step of an implementation, the name of its device, and what tells its peak bytes."""
    from train_step import ours, theirs

    def of_process() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    if name == "pythia_jax":
        import jax

        device = jax.devices()[0]
        step = ours(size, batch, card.seq, card.dtype, setting)
        stats = device.memory_stats
        peak = of_process if stats() is None else lambda: stats()["peak_bytes_in_use"]
        return step, device.device_kind, peak
    import torch

    torch.set_float32_matmul_precision("high")
    kind = "cuda" if card.platform == "gpu" else "cpu"
    step = theirs(size, batch, card.seq, card.dtype, kind, setting == "compile")
    if kind == "cpu":
        return step, "cpu", of_process
    return step, torch.cuda.get_device_name(), torch.cuda.max_memory_allocated


if __name__ == "__main__":
    print(json.dumps(work(json.loads(sys.argv[1]))))
