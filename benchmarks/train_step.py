"""A full training step on CPU: ours beside transformers' GPTNeoX on torch.

    python benchmarks/train_step.py --shapes 70m:8x512 --repeats 10

float32; forward, backward, clip to norm 1, AdamW. Every implementation has a process of its own,
all pinned to the same cores, and they take turns, one step each, so that whatever else the machine
does meets them alike. Torch runs twice: with glibc's allocator as it comes, which maps and unmaps
memory in every step, and told to keep it. Ratios compare with the better of the two, figure by
figure. Peak memory is that of the whole process, imports included.
"""

import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import click

KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
WORKERS: dict[str, tuple[str, dict[str, str]]] = {
    "pythia_jax": ("ours", {}),
    "torch": ("torch", {}),
    "torch, keeping memory": ("torch", KEEP_MEMORY),
}
"""What the table calls it: which side it runs, and what is added to its environment."""

SHAPES = ("14m:8x512", "14m:2x2048", "70m:8x512", "70m:2x2048")
COLUMNS = ("tokens/s", "wall s", "CPU s", "peak MiB")
WARM_UP = 2

Step = Callable[[], float]


def ours(size: str, batch: int, seq: int) -> Step:
    import jax
    import numpy as np

    from pythia_jax.configs import DataConfig, ModelConfig, RunConfig, TrainingConfig
    from pythia_jax.training.step import init_state, jitted_train_step

    model = ModelConfig.from_size(size)
    # Remat `dots` keeps what matrix products gave. On CPU the rest is cheaper computed again than
    # kept: memory that is new in every step costs a page fault each 4 KiB (docs/benchmarks.md).
    training = TrainingConfig(batch_size=batch, precision="float32", remat="dots")
    config = RunConfig(model=model, data=DataConfig(sequence_length=seq), training=training)
    state = jax.jit(init_state, static_argnums=0)(config)
    rng = np.random.default_rng(0)

    def step() -> float:
        nonlocal state
        tokens = rng.integers(0, model.vocab_size, (batch, seq + 1)).astype(np.int32)
        state, metrics = jitted_train_step(state, jax.numpy.asarray(tokens), config=config)
        return float(jax.block_until_ready((state, metrics))[1]["loss"])

    return step


def theirs(size: str, batch: int, seq: int) -> Step:
    import numpy as np
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from pythia_jax import suite

    entry = suite.lookup(size)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = GPTNeoXConfig(
        vocab_size=entry.vocab_size,
        hidden_size=entry.hidden_size,
        num_hidden_layers=entry.num_hidden_layers,
        num_attention_heads=entry.num_attention_heads,
        intermediate_size=entry.intermediate_size,
        hidden_act="gelu_pytorch_tanh",  # the function we train with, in torch's fused form
        use_cache=False,
        attn_implementation="sdpa",  # type: ignore[call-arg]  # taken by the base class
    )
    model = GPTNeoXForCausalLM(config).train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=True,
    )
    rng = np.random.default_rng(0)

    def step() -> float:
        tokens = torch.from_numpy(rng.integers(0, entry.vocab_size, (batch, seq)))
        # transformers shifts labels itself: one position a row fewer than ours, 0.2 % at most.
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def work(side: str, shape: str) -> None:
    """A worker: builds its step, takes one for each line on stdin and says how long it took."""
    size, batch, seq = parse(shape)
    step = (ours if side == "ours" else theirs)(size, batch, seq)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"wall": wall, "cpu": cpu, "peak": peak, "loss": loss}), flush=True)


def parse(shape: str) -> tuple[str, int, int]:
    try:
        size, rows = shape.split(":")
        batch, seq = map(int, rows.split("x"))
    except ValueError:
        raise click.BadParameter(f"{shape!r}: write size:BATCHxSEQ, as in 70m:8x512") from None
    return size, batch, seq


def measure(shape: str, repeats: int) -> dict[str, dict[str, float]]:
    """Medians of each implementation at one shape; the workers step in turn."""
    workers = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--worker", side, "--shapes", shape],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        for name, (side, environment) in WORKERS.items()
    }
    taken: dict[str, list[dict]] = {name: [] for name in workers}
    try:
        for _ in range(WARM_UP + repeats):
            for name, worker in workers.items():
                assert worker.stdin and worker.stdout
                worker.stdin.write("step\n")
                worker.stdin.flush()
                line = worker.stdout.readline()
                if not line:
                    raise click.ClickException(f"{name} ended at {shape}; its error stands above")
                taken[name].append(json.loads(line))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    _, batch, seq = parse(shape)
    results = {}
    for name, steps in taken.items():
        timed = steps[WARM_UP:]
        wall = statistics.median(step["wall"] for step in timed)
        results[name] = {
            "tokens/s": batch * seq / wall,
            "wall s": wall,
            "CPU s": statistics.median(step["cpu"] for step in timed),
            "peak MiB": steps[-1]["peak"],
            "fastest s": min(step["wall"] for step in timed),
            "first s": steps[0]["wall"],
            "last loss": steps[-1]["loss"],
        }
    return results


def ratios(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """Ours over torch's better figure: more tokens/s are better, less memory is."""
    mine = next(results[name] for name, (side, _) in WORKERS.items() if side == "ours")
    others = [results[name] for name, (side, _) in WORKERS.items() if side != "ours"]
    return {
        "tokens/s": mine["tokens/s"] / max(other["tokens/s"] for other in others),
        "peak MiB": mine["peak MiB"] / min(other["peak MiB"] for other in others),
    }


def table(measured: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [
        f"| shape | implementation | {' | '.join(COLUMNS)} | tokens/s ratio | memory ratio |",
        "| --- | --- | " + "--: | " * (len(COLUMNS) + 1) + "--: |",
    ]
    for shape, results in measured.items():
        ratio = ratios(results)
        for name, row in results.items():
            cells = [f"{row[c]:.0f}" if row[c] >= 100 else f"{row[c]:.2f}" for c in COLUMNS]
            ours = WORKERS[name][0] == "ours"
            cells += [f"{ratio[c]:.2f}" if ours else "" for c in ("tokens/s", "peak MiB")]
            lines.append(f"| {shape} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(cores: int) -> str:
    """What was measured on and with."""
    packages = ("jax", "jaxlib", "optax", "torch", "transformers", "numpy")
    named = ", ".join(f"{package} {version(package)}" for package in packages)
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        cpu = next(s.split(":")[1].strip() for s in text.splitlines() if s.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    date = datetime.date.today().isoformat()
    return f"{date}, {cores} cores of {cpu}, Python {platform.python_version()}, {named}"


@click.command(help=__doc__)
@click.option("--shapes", default=",".join(SHAPES), show_default=True, help="size:BATCHxSEQ, …")
@click.option("--repeats", default=5, show_default=True, help="timed steps of each")
@click.option("--cores", default=2, show_default=True, help="CPU cores to pin all of them to")
@click.option("--out", type=click.Path(path_type=Path), help="also write .json, or .md as printed")
@click.option("--worker", hidden=True)
def main(shapes: str, repeats: int, cores: int, out: Path | None, worker: str | None) -> None:
    if worker:
        work(worker, shapes)
        return
    for shape in shapes.split(","):
        parse(shape)
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    os.sched_setaffinity(0, allowed)
    head = machine(len(allowed))
    click.echo(head, err=True)
    measured = {}
    for shape in shapes.split(","):
        click.echo(f"{shape} …", err=True)
        measured[shape] = measure(shape, repeats)
    text = f"{head}; medians of {repeats} steps\n\n{table(measured)}\n"
    click.echo(text)
    if out:
        if out.suffix == ".json":
            ratio = {shape: ratios(results) for shape, results in measured.items()}
            text = json.dumps({"machine": head, "measured": measured, "ratios": ratio}, indent=1)
        out.write_text(text, encoding="utf-8")
        click.echo(f"written to {out}", err=True)


if __name__ == "__main__":
    main()
