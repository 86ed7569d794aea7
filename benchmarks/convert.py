"""Converting a Hugging Face folder to a run folder and back, beside Orbax and transformers.

    python benchmarks/convert.py

The weights are random bits of float16, written here, of one of the suite's shapes. Each row is a
process of its own, whose peak memory is told (everything it held, libraries included; files in the
system's cache are not its own). Beside ours stand an Orbax save of the same arrays that are in
memory already, and the usual way: `from_pretrained`, then `save_pretrained`. Speed is bytes of
weights by seconds, relative to that Orbax save, which compresses as it does unless told otherwise;
ours does not, since that gains next to nothing. What comes back must be the bytes that went in.
"""

import datetime
import filecmp
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import click

MEMORY = 3e9
"""Bytes that a conversion may take at its peak."""
SPEED = 0.8
"""Of an Orbax save."""


@click.command(help=__doc__)
@click.option("--size", default="2.8b", show_default=True, help="Of the suite.")
@click.option("--repeats", type=int, default=1, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where to write, for a while.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON of the same numbers.")
@click.option("--work", hidden=True)
def main(size: str, repeats: int, folder: Path | None, out: Path | None, work: str | None) -> None:
    if work is not None:
        click.echo(json.dumps(WORKERS[work](size)))
        return
    names = [name for name in WORKERS if name != "make"]
    if find_spec("torch") is None or find_spec("transformers") is None:
        names.remove(THEIRS)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(dir=folder) as place:
        _run("make", size, place)
        total = sum(path.stat().st_size for path in Path(place, "hf").glob("*.safetensors"))
        for _ in range(repeats):
            for name in names:
                rows[name].append(_run(name, size, place))
            same = [
                filecmp.cmp(path, Path(place, "back", path.name), shallow=False)
                for path in Path(place, "hf").iterdir()
            ]
            if not all(same):
                raise click.ClickException("what came back is not what went in")
    results = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for name, found in rows.items()
    }
    for row in results.values():
        row["speed"] = results[ORBAX]["s"] / row["s"]
    click.echo(_table(results, size, total, repeats))
    if out is not None:
        out.write_text(json.dumps({"rows": results, "bytes": total, "runs": rows}, indent=1))


def _run(name: str, size: str, place: str) -> dict[str, float]:
    command = [sys.executable, os.path.abspath(__file__), "--size", size, "--work", name]
    done = subprocess.run(command, cwd=place, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measured(call) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    took = {"s": time.perf_counter() - wall, "CPU s": time.process_time() - cpu}
    # Kilobytes, but on macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return {**took, "peak bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def _random_bits(size: str):
    """A checkpoint whose tensors are drawn as they are read: finite float16 of any bits."""
    import numpy as np

    from pythia_jax.bridge.opened import Opened
    from pythia_jax.configs import ModelConfig
    from pythia_jax.model.parameters import TABLE

    config = ModelConfig.from_dict({"size": size})

    def read(parameter, layer):
        shape = parameter.shape(config)[int(parameter.stacked) :]
        rng = np.random.default_rng([TABLE.index(parameter), layer])
        bits = np.frombuffer(rng.bytes(2 * int(np.prod(shape))), np.uint16)
        # Without the top bit of the exponent there is no infinity and no NaN.
        return (bits & np.uint16(0xBFFF)).view(np.float16).reshape(shape)

    return Opened(config, read, "float16", "random bits")


def _make(size: str) -> dict[str, float]:
    from pythia_jax.bridge import hf_out

    return _measured(lambda: hf_out.save(_random_bits(size), Path("hf")))


def _to_orbax(size: str) -> dict[str, float]:
    from pythia_jax.bridge.convert import convert

    shutil.rmtree("run", ignore_errors=True)
    return _measured(lambda: convert("hf", "run", to="orbax", show_progress=False))


def _to_hf(size: str) -> dict[str, float]:
    from pythia_jax.bridge.convert import convert

    return _measured(lambda: convert("run", "back", to="hf", show_progress=False))


def _orbax_save(size: str) -> dict[str, float]:
    import jax
    import orbax.checkpoint as ocp

    params = jax.block_until_ready(_random_bits(size).params("float16"))
    shutil.rmtree("orbax", ignore_errors=True)
    with ocp.PyTreeCheckpointer() as checkpointer:
        took = _measured(lambda: checkpointer.save(Path("orbax").absolute(), params))
    shutil.rmtree("orbax")
    return took


def _usual_way(size: str) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    def call() -> None:
        model = AutoModelForCausalLM.from_pretrained("hf", dtype=torch.float16)
        model.save_pretrained("theirs")

    took = _measured(call)
    shutil.rmtree("theirs")
    return took


def _table(results: dict[str, dict[str, float]], size: str, total: int, repeats: int) -> str:
    lines = [
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, jax {version('jax')}, "
        f"orbax-checkpoint {version('orbax-checkpoint')}; pythia-{size}, {total / 1e9:.2f} GB of "
        f"float16; medians of {repeats}",
        "",
        "| | s | CPU s | MB/s | peak memory, GB | speed, of an Orbax save |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for name, row in results.items():
        lines.append(
            f"| {name} | {row['s']:.1f} | {row['CPU s']:.1f} | {total / row['s'] / 1e6:.0f} | "
            f"{row['peak bytes'] / 1e9:.2f} | {row['speed']:.2f} |"
        )
    ours = [results[name] for name in OURS]
    lines += [
        "",
        f"Ours at its worst: {max(row['peak bytes'] for row in ours) / 1e9:.2f} GB (to be below "
        f"{MEMORY / 1e9:g}), {min(row['speed'] for row in ours):.2f} of the speed of an Orbax save "
        f"(to be at least {SPEED}). The bytes that came back are those that went in.",
    ]
    return "\n".join(lines)


ORBAX = "Orbax save, arrays in memory"
THEIRS = "from_pretrained, save_pretrained"
OURS = ("Hugging Face to run folder", "run folder to Hugging Face")
WORKERS = {
    "make": _make,
    ORBAX: _orbax_save,
    OURS[0]: _to_orbax,
    OURS[1]: _to_hf,
    THEIRS: _usual_way,
}

if __name__ == "__main__":
    main()
