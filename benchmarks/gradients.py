"""Building a gradient index: ours beside Bergson, on the same rows of the same model.

\b
    python benchmarks/gradients.py --peers .venv-peers
    python benchmarks/gradients.py --shapes 14m:512 --tokens 2048

Random weights in float32, random tokens in rows of one more than the shape says, as in training;
the gradient of each row's summed loss by the linear modules of the layers, projected on both
sides, is written to disk. Every implementation has a process of its own, all pinned to the same
cores, and they take turns, one index each. The first, in which ours compiles, is shown apart; of
the others there are medians. Models are loaded before the clock starts; ours is the whole of
`build_index`, Bergson's what its `build` does with model and rows. Both take batches of their own
default, 2048 tokens. Bergson runs twice: with glibc's allocator as it comes, which maps and unmaps
memory all the time, and told to keep it. Peak memory is that of the whole process, imports
included. Without --peers, an environment with Bergson in it (`make test-all` makes one), ours runs
alone.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from train_step import KEEP_MEMORY, machine

OURS = "pythia_jax"
BERGSON = {"bergson": {}, "bergson, keeping memory": KEEP_MEMORY}
"""What the table calls it, and what is added to its environment."""
SHAPES = ("14m:512", "14m:2048", "70m:512", "70m:2048")
COLUMNS = ("tokens/s", "wall s", "CPU s", "first s", "peak MiB")
AIMS = {"14m": 3.0, "70m": 2.0}
"""Of Bergson's tokens/s."""
TOKEN_BATCH = 2048
"""Tokens of a batch of Bergson's, where a row is not longer."""
Build = Callable[[str], None]
"""Writes an index to a folder that is not there yet."""


def run_config(place: Path, size: str, seq: int, tokens: int) -> Any:
    """A run whose one step has all the rows."""
    from pythia_jax import configs

    wanted = {
        # A training row is one token longer than the positions it fills; Bergson runs on all of it.
        "model": {"size": size, "max_position_embeddings": 2 * seq},
        "data": {"train": [str(place / "tokens")], "sequence_length": seq, "order": "neox"},
        "training": {"steps": 1, "batch_size": max(1, tokens // seq)},
    }
    return configs.from_dict(wanted)


def write_inputs(place: Path, size: str, seq: int, tokens: int) -> int:
    """A model and tokens, and the rows of the one step as `rows.npy` for Bergson; their number."""
    import jax
    import numpy as np

    import pythia_jax as pj
    from pythia_jax.data.indexed_writer import IndexedDatasetWriter
    from pythia_jax.quickstart import train_tokenizer

    config = run_config(place, size, seq, tokens)
    rows = config.training.batch_size
    random = np.random.default_rng(0).integers(0, config.model.vocab_size, rows * seq + 1)
    with IndexedDatasetWriter(place / "tokens", np.uint16) as writer:
        writer.add(random)
    np.save(place / "rows.npy", np.asarray(pj.data.batches(config)[0]))
    tokenizer = train_tokenizer(["a word or two of text"], 300).to_str().encode()
    params = pj.init_parameters(config.model, jax.random.key(0))
    pj.save_hf(pj.Model(params, config.model, {"tokenizer.json": tokenizer}), place / "model")
    return rows


def ours(place: Path, shape: str, tokens: int, dimension: int) -> Build:
    import jax

    import pythia_jax as pj
    from pythia_jax.interp.build import build_index
    from pythia_jax.interp.projection import Projection

    # As for anyone who builds more than one: an index finds the program of the one before it.
    jax.config.update("jax_compilation_cache_dir", str(place / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    size, _, length = shape.partition(":")
    config = run_config(place, size, int(length), tokens)
    model, projection = pj.load(place / "model"), Projection(dimension)

    def build(folder: str) -> None:
        build_index(model, config, 0, 1, folder, projection=projection, show_progress=False)

    return build


def theirs(place: Path, dimension: int) -> Build:
    import numpy as np
    import torch
    from bergson.collection import collect_gradients  # type: ignore
    from bergson.config.config import DataConfig, IndexConfig, PreprocessConfig  # type: ignore
    from bergson.data import allocate_batches  # type: ignore
    from bergson.utils.worker_utils import create_processor, setup_model_and_peft  # type: ignore
    from datasets import Dataset

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows = np.load(place / "rows.npy")
    lengths = [rows.shape[1]] * len(rows)
    data = Dataset.from_dict({"input_ids": rows.tolist(), "length": lengths})
    budget = max(1, TOKEN_BATCH // (rows.shape[1] - 1)) * rows.shape[1]
    index = IndexConfig(
        run_path=str(place / "unused"),
        model=str(place / "model"),
        data=DataConfig(dataset=str(place / "rows")),
        projection_dim=dimension,
        token_batch_size=budget,
    )
    model, modules = setup_model_and_peft(index)
    batches = allocate_batches(lengths, budget)
    processor = None

    def build(folder: str) -> None:
        nonlocal processor
        index.run_path = folder
        index.partial_run_path.mkdir()
        # Kept, and with it the projections that it makes in the first index.
        processor = processor or create_processor(model, index, modules)
        collect_gradients(
            model=model,
            data=data,
            processor=processor,
            cfg=index,
            batches=batches,
            target_modules=modules,
            preprocess_cfg=PreprocessConfig(),
        )
        index.partial_run_path.rename(folder)

    return build


def work(side: str, place: Path, shape: str, tokens: int, dimension: int) -> None:
    """A worker: builds an index in the folder that each line on stdin names."""
    if side == OURS:
        build = ours(place, shape, tokens, dimension)
    else:
        build = theirs(place, dimension)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        build(line.strip())
        took = {"wall s": time.perf_counter() - wall, "CPU s": time.process_time() - cpu}
        # Kilobytes, but on macOS bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
        print("\n" + json.dumps({"took": took, "peak MiB": peak}), flush=True)


class Worker:
    def __init__(self, name: str, python: str, place: Path, given: dict[str, Any]) -> None:
        self.name, self.place, self.taken = name, place, []
        side = OURS if name == OURS else "bergson"
        command = [python, os.path.abspath(__file__), "--worker", side, "--place", str(place)]
        added = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        # What our environment finds by PYTHONPATH is not for theirs.
        added |= BERGSON.get(name, {}) | ({} if name == OURS else {"PYTHONPATH": ""})
        self.process = subprocess.Popen(
            [*command, *(f"--{name}={value}" for name, value in given.items())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if name == OURS else subprocess.DEVNULL,
            text=True,
            env={**os.environ, **added},
        )

    @property
    def index(self) -> Path:
        """The one built last."""
        return self.place / f"{self.name} {len(self.taken)}"

    def take(self) -> None:
        assert self.process.stdin and self.process.stdout
        before = self.index
        self.process.stdin.write(f"{self.place / self.name} {len(self.taken) + 1}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith('{"took"'):
                self.taken.append(json.loads(line))
                if before.exists():
                    (before / "gradients.bin").unlink()
                return
        raise click.ClickException(f"{self.name} ended before its index was built")


def measure(shape: str, tokens: int, repeats: int, dimension: int, peers: Path | None) -> dict:
    """Of each implementation: figures of the medians."""
    import numpy as np

    size, _, length = shape.partition(":")
    seq = int(length)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        rows = write_inputs(place, size, seq, tokens)
        pythons = {OURS: sys.executable}
        if peers is not None:
            pythons |= dict.fromkeys(BERGSON, os.path.abspath(peers / "bin" / "python"))
        given = {"shapes": shape, "tokens": tokens, "projection": dimension}
        workers = [Worker(name, python, place, given) for name, python in pythons.items()]
        try:
            for _ in range(1 + repeats):
                for worker in workers:
                    worker.take()
            stored = [np.fromfile(worker.index / "gradients.bin", np.float32) for worker in workers]
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.wait()
    apart = [np.linalg.norm(each - stored[0]) / np.linalg.norm(stored[0]) for each in stored]
    return {
        worker.name: summary(worker.taken, rows * seq) | {"difference": float(difference)}
        for worker, difference in zip(workers, apart, strict=True)
    }


def summary(taken: list[dict], tokens: int) -> dict[str, float]:
    wall = statistics.median(one["took"]["wall s"] for one in taken[1:])
    return {
        "tokens/s": tokens / wall,
        "wall s": wall,
        "CPU s": statistics.median(one["took"]["CPU s"] for one in taken[1:]),
        "first s": taken[0]["took"]["wall s"],
        "peak MiB": taken[-1]["peak MiB"],
    }


def ratios(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Ours over each of Bergson's, in tokens/s and in memory."""
    figures = ("tokens/s", "peak MiB")
    return {
        name: {figure: rows[OURS][figure] / row[figure] for figure in figures}
        for name, row in rows.items()
        if name != OURS
    }


def table(measured: dict[str, dict]) -> str:
    lines = [
        f"| shape | implementation | {' | '.join(COLUMNS)} | difference | ours, in its tokens/s "
        "| ours, in its memory |",
        "| --- | --- | " + "--: | " * (len(COLUMNS) + 2) + "--: |",
    ]
    for shape, rows in measured.items():
        found = ratios(rows)
        for name, row in rows.items():
            cells = [
                f"{row[c]:.0f}" if c in ("tokens/s", "peak MiB") else f"{row[c]:.2f}"
                for c in COLUMNS
            ]
            if name in found:
                cells.append(f"{row['difference']:.0e}")
                cells += [f"{ratio:.2f}" for ratio in found[name].values()]
            else:
                cells += [""] * 3
            lines.append(f"| {shape} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(measured: dict[str, dict]) -> str:
    if any(len(rows) == 1 for rows in measured.values()):
        return "Ours alone: --peers names an environment with Bergson in it (make test-all)."
    lines = []
    for shape, rows in measured.items():
        aim = AIMS.get(shape.partition(":")[0])
        told = [
            f"{found['tokens/s']:.2f} times the tokens/s and {found['peak MiB']:.2f} of the memory "
            f"of {name}"
            for name, found in ratios(rows).items()
        ]
        aimed = "" if aim is None else f" (aim: {aim:g} times Bergson as it comes, no more memory)"
        lines.append(f"{shape}: {'; '.join(told)}{aimed}")
    return "\n".join(lines)


def versions(peers: Path | None) -> str:
    if peers is None:
        return ""
    packages = ("bergson", "torch", "transformers")
    code = f"from importlib.metadata import version as v; print(*map(v, {packages!r}))"
    done = subprocess.run(
        [peers / "bin" / "python", "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    named = (" ".join(pair) for pair in zip(packages, done.stdout.split(), strict=True))
    return f"; beside it {', '.join(named)}"


@click.command(help=__doc__)
@click.option("--shapes", default=",".join(SHAPES), show_default=True, help="size:TOKENS-A-ROW, …")
@click.option("--tokens", default=8192, show_default=True, help="of an index, whole rows of them")
@click.option("--projection", default=16, show_default=True, help="dimension of each side")
@click.option("--repeats", default=3, show_default=True, help="timed indices of each")
@click.option("--cores", default=2, show_default=True, help="CPU cores to pin all of them to")
@click.option("--peers", type=click.Path(path_type=Path), help="environment that has Bergson")
@click.option("--out", type=click.Path(path_type=Path), help="also write .json, or .md as printed")
@click.option("--worker", hidden=True)
@click.option("--place", type=click.Path(path_type=Path), hidden=True)
def main(
    shapes: str,
    tokens: int,
    projection: int,
    repeats: int,
    cores: int,
    peers: Path | None,
    out: Path | None,
    worker: str | None,
    place: Path | None,
) -> None:
    if worker:
        assert place is not None
        work(worker, place, shapes, tokens, projection)
        return
    wanted = shapes.split(",")
    if not all(size and length.isdigit() for size, _, length in (w.partition(":") for w in wanted)):
        raise click.BadParameter(f"{shapes!r}: size:TOKENS-A-ROW, such as 14m:512, are wanted")
    if peers is not None and not (peers / "bin" / "python").exists():
        raise click.BadParameter(f"--peers {peers}: no environment is there (make test-all)")
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    os.sched_setaffinity(0, allowed)
    os.environ["JAX_PLATFORMS"] = "cpu"
    head = f"{machine(len(allowed))}{versions(peers)}; projection {projection}, {tokens} tokens"
    click.echo(head, err=True)
    measured = {}
    for shape in wanted:
        click.echo(f"{shape} …", err=True)
        measured[shape] = measure(shape, tokens, repeats, projection, peers)
    text = f"{head}; medians of {repeats}\n\n{table(measured)}\n\n{verdict(measured)}\n"
    click.echo(text)
    if out:
        compared = {s: ratios(rows) for s, rows in measured.items() if len(rows) > 1}
        result = {"machine": head, "measured": measured, "ratios": compared}
        out.write_text(json.dumps(result, indent=1) if out.suffix == ".json" else text, "utf-8")
        click.echo(f"written to {out}", err=True)


if __name__ == "__main__":
    main()
