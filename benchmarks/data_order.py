"""The order of a tenth of the Pile: time and memory, beside NumPy's two shuffles alone.

    python benchmarks/data_order.py            # 21 million documents, 33 billion tokens
    python benchmarks/data_order.py --full     # the Pile's 210.6 million documents, once

Only sizes are made up, with the Pile's mean and spread; there are no tokens. Every measurement has
a process of its own, so that its peak memory is its own too: the whole process's, Python, NumPy and
the sizes included. The processes take turns.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import click
import numpy as np
from numpy.typing import NDArray

PILE = 210_600_000, 1581  # documents, and tokens in each on average
SEQUENCE_LENGTH = 2048
SEED = 1234
BLEND = 146_432_000, (0.6, 0.3, 0.1)


def make_sizes(documents: int) -> NDArray[np.int32]:
    """Sizes of documents, a chunk at a time, so that making them is not the peak."""
    rng = np.random.default_rng(0)
    spread = 1.45
    sizes = np.empty(documents, np.int32)
    for start in range(0, documents, 1 << 20):
        part = sizes[start : start + (1 << 20)]
        part[:] = rng.lognormal(np.log(PILE[1]) - spread**2 / 2, spread, len(part)).clip(1, 1e7)
    return sizes


def shuffles(sizes: NDArray[np.int32]) -> tuple[float, int, dict[str, int]]:
    """Seconds, and bytes of what comes out: the least that any order needs."""
    samples = int(sizes.sum(dtype=np.int64) - 1) // SEQUENCE_LENGTH
    began = time.perf_counter()
    rng = np.random.RandomState(SEED)
    documents = np.arange(len(sizes), dtype=np.int32)
    rng.shuffle(documents)
    shuffled = np.arange(samples, dtype=np.uint32)
    rng.shuffle(shuffled)
    seconds = time.perf_counter() - began
    return seconds, documents.nbytes + shuffled.nbytes, {"samples": samples}


def order(sizes: NDArray[np.int32]) -> tuple[float, int, dict[str, int]]:
    from pythia_jax.data import build_sample_order

    samples = int(sizes.sum(dtype=np.int64) - 1) // SEQUENCE_LENGTH
    began = time.perf_counter()
    built = build_sample_order(sizes, samples, SEQUENCE_LENGTH, SEED)
    seconds = time.perf_counter() - began
    arrays = built.document_order, built.sample_index, built.shuffle
    return seconds, sum(array.nbytes for array in arrays), {"samples": len(built.shuffle)}


def blend(sizes: NDArray[np.int32]) -> tuple[float, int, dict[str, int]]:
    """Samples of Pythia's whole run, scaled to the documents measured, dealt to three datasets."""
    from pythia_jax.data.blending import blending_indices

    samples = BLEND[0] * len(sizes) // PILE[0]
    began = time.perf_counter()
    dealt = blending_indices(BLEND[1], samples)
    seconds = time.perf_counter() - began
    return seconds, sum(array.nbytes for array in dealt), {"samples": samples}


WORKERS: dict[str, tuple[str, Callable[..., tuple[float, int, dict[str, int]]]]] = {
    "shuffles": ("NumPy's two shuffles", shuffles),
    "order": ("build_sample_order", order),
    "blend": ("blending_indices, 3 datasets", blend),
}


def measure(worker: str, documents: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, "--documents", str(documents), "--worker", worker],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise click.ClickException(f"{worker} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def work(worker: str, documents: int) -> None:
    """What a measuring process does: prints its figures as JSON."""
    sizes = make_sizes(documents)
    seconds, array_bytes, counts = WORKERS[worker][1](sizes)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    tokens = int(sizes.sum(dtype=np.int64))
    print(
        json.dumps({"s": seconds, "bytes": array_bytes, "peak": peak, "tokens": tokens, **counts})
    )


@click.command()
@click.option("--documents", type=int, help="How many.  [default: a tenth of the Pile's]")
@click.option("--full", is_flag=True, help="The Pile's 210.6 million documents, measured once.")
@click.option("--repeats", type=int, default=3, show_default=True)
@click.option("--worker", hidden=True, type=click.Choice(list(WORKERS)))
def main(documents: int | None, full: bool, repeats: int, worker: str | None) -> None:
    """Print a table of time and peak memory, and how they compare."""
    documents = documents or (PILE[0] if full else PILE[0] // 10)
    if worker:
        work(worker, documents)
        return
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in WORKERS}
    for _ in range(1 if full else repeats):
        for name in WORKERS:
            runs[name].append(measure(name, documents))
    middle = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for name, found in runs.items()
    }
    tokens = middle["order"]["tokens"]
    print(f"{documents:,} documents, {tokens / 1e9:.1f} billion tokens, NumPy {np.__version__}\n")
    print("| what | samples | s | arrays MiB | peak MiB | peak / arrays |")
    print("| --- | --: | --: | --: | --: | --: |")
    for name, (label, _) in WORKERS.items():
        row = middle[name]
        print(
            f"| {label} | {row['samples']:,.0f} | {row['s']:.2f} | {row['bytes'] / 2**20:.0f} | "
            f"{row['peak'] / 2**20:.0f} | {row['peak'] / row['bytes']:.2f} |"
        )
    ours, theirs = middle["order"], middle["shuffles"]
    print(
        f"\nThe order takes {ours['s'] / theirs['s']:.2f} times as long as the shuffles alone "
        f"(at most 2), its process {ours['peak'] / ours['bytes']:.2f} times the memory of the "
        "arrays it returns (at most 3)."
    )
    if documents != PILE[0]:
        scale = PILE[0] / documents
        print(
            f"The whole Pile, {scale:.1f} times as many documents, would take about "
            f"{scale * ours['peak'] / 2**30:.1f} GiB and {scale * ours['s']:.0f} s, and more time "
            "for shuffling what fits no cache; --full measures it."
        )


if __name__ == "__main__":
    main()
