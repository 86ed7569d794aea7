"""A full training step: ours beside transformers' GPTNeoX on torch, on a CPU or on a GPU.

\b
    python benchmarks/train_step.py --shapes 70m:8x512 --repeats 10
    python benchmarks/train_step.py --platform gpu --sizes 160m,410m,1.4b

Forward, backward, clip to norm 1, AdamW. With --platform or --sizes: in bfloat16, with the batch
that fills the device; train_step_gpu.py says how. Else on a CPU, in float32: every implementation
has a process of its own, all pinned to the same cores, and they take turns, one step each, so that
whatever else the machine does meets them alike. Torch runs twice: with glibc's allocator as it
comes, which maps and unmaps memory in every step, and told to keep it. Ratios compare with the
better of the two, figure by figure. Peak memory is that of the whole process, imports included.
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
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Step:
    """take: begins a step and returns its loss, which `float` waits for. wait: for the whole."""

    take: Callable[[], Any]
    wait: Callable[[], object]


def ours(size: str, batch: int, seq: int, precision: str = "float32", remat: str = "dots") -> Step:
    import jax
    import numpy as np

    from pythia_jax import configs
    from pythia_jax.training.step import init_state, jitted_train_step

    # On a CPU, remat `dots` keeps what matrix products gave: the rest is cheaper computed again
    # than kept, for memory new in every step costs a page fault each 4 KiB (docs/benchmarks.md).
    config = configs.from_dict(
        {
            "model": {"size": size},
            "data": {"sequence_length": seq},
            "training": {"batch_size": batch, "precision": precision, "remat": remat},
        }
    )
    assert config.model is not None
    vocab_size = config.model.vocab_size
    state = jax.jit(init_state, static_argnums=0)(config)
    rng = np.random.default_rng(0)

    def take() -> jax.Array:
        nonlocal state
        tokens = rng.integers(0, vocab_size, (batch, seq + 1)).astype(np.int32)
        state, metrics = jitted_train_step(state, jax.numpy.asarray(tokens), config=config)
        return metrics["loss"]

    return Step(take, lambda: jax.block_until_ready(state))


def theirs(
    size: str,
    batch: int,
    seq: int,
    precision: str = "float32",
    device: str = "cpu",
    compiled: bool = False,
) -> Step:
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
    model = GPTNeoXForCausalLM(config).to(device).train()  # type: ignore[arg-type]
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
    run: Any = torch.compile(model) if compiled else model
    # Weights stay float32 and products are taken in `precision`, as ours are.
    dtype, cast = getattr(torch, precision), precision != "float32"

    def take() -> torch.Tensor:
        tokens = torch.from_numpy(rng.integers(0, entry.vocab_size, (batch, seq))).to(device)
        # transformers shifts labels itself: one position a row fewer than ours, 0.2 % at most.
        with torch.autocast(device, dtype=dtype, enabled=cast):
            loss = run(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return Step(take, torch.cuda.synchronize if device == "cuda" else lambda: None)


def work(side: str, shape: str) -> None:
    """A worker: builds its step, takes one for each line on stdin and says how long it took."""
    size, batch, seq = parse(shape)
    step = (ours if side == "ours" else theirs)(size, batch, seq)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        loss = float(step.take())
        step.wait()
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
@click.option("--platform", type=click.Choice(["gpu", "cpu"]), help="fill this device's memory")
@click.option("--sizes", help="of the models to fill it with  [default: 160m,410m,1.4b]")
@click.option("--batch", type=int, help="rows a step, in place of as many as fit")
@click.option("--seq", default=2048, show_default=True, help="tokens a row, beside --batch")
@click.option("--dtype", default="bfloat16", show_default=True, help="of products of matrices")
@click.option("--rounds", default=3, show_default=True, help="processes of each, in turn")
@click.option("--out", type=click.Path(path_type=Path), help="also write .json, or .md as printed")
@click.option("--worker", hidden=True)
def main(
    shapes: str,
    repeats: int,
    cores: int,
    platform: str | None,
    sizes: str | None,
    batch: int | None,
    seq: int,
    dtype: str,
    rounds: int,
    out: Path | None,
    worker: str | None,
) -> None:
    if worker:
        work(worker, shapes)
        return
    if platform or sizes:
        import train_step_gpu

        names = (sizes or ",".join(train_step_gpu.SIZES)).split(",")
        card = train_step_gpu.Card(platform or "gpu", seq, dtype, repeats)
        text, result = train_step_gpu.compare(card, names, batch, rounds)
    else:
        text, result = compare_shapes(shapes.split(","), repeats, cores)
    click.echo(text)
    if out:
        out.write_text(json.dumps(result, indent=1) if out.suffix == ".json" else text, "utf-8")
        click.echo(f"written to {out}", err=True)


def compare_shapes(shapes: list[str], repeats: int, cores: int) -> tuple[str, dict[str, Any]]:
    """The table of the CPU side, and what it was made of."""
    for shape in shapes:
        parse(shape)
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    os.sched_setaffinity(0, allowed)
    head = machine(len(allowed))
    click.echo(head, err=True)
    measured = {}
    for shape in shapes:
        click.echo(f"{shape} …", err=True)
        measured[shape] = measure(shape, repeats)
    text = f"{head}; medians of {repeats} steps\n\n{table(measured)}\n"
    ratio = {shape: ratios(results) for shape, results in measured.items()}
    return text, {"machine": head, "measured": measured, "ratios": ratio}


if __name__ == "__main__":
    main()
