"""Rows a second from a local .bin: ours, torch's DataLoader as GPT-NeoX uses it, and a raw copy.

    python benchmarks/data_loading.py                # 2 GB, written to a temporary folder

Random tokens in documents as long as the Pile's, in the page cache; batches of 1024 rows of 2049
tokens. Ours come out as int32 `[1024, 2049]`, checked to lie in the vocabulary; torch's as int64,
from a dataset that does what GPT-NeoX's does, one sample at a time, with the same order; the raw
copies as they lie. All take turns in one process, each with a fresh iterator, whose first batches
(as many as it reads ahead) are not timed. Medians over the turns.

Two raw copies: of 4 MB that lie together, which no shuffled order can have, and of 1024 rows that
each lie together somewhere in the file, as a shuffled order of documents that fill a row would.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy as np

from pythia_jax.configs import DataConfig, ModelConfig, RunConfig, TrainingConfig
from pythia_jax.data import Batches, IndexedDatasetWriter, batches
from pythia_jax.data.preshuffled import PreshuffledSamples

LENGTH = 2048
DOCUMENT = 1581  # tokens on average, as in the Pile
SPREAD = 1.45
VOCABULARY = 50277
TORCH = "torch DataLoader, 0 workers"
READ_AHEAD = 4  # batches, at most, that a contender has ready before it is timed

Contender = Callable[[int], Iterator[Any]]
"""From a step on, batches; the iterator may read ahead."""


def write_tokens(prefix: Path, tokens: int) -> None:
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        while writer.num_tokens < tokens:
            sizes = rng.lognormal(np.log(DOCUMENT) - SPREAD**2 / 2, SPREAD, 20_000).astype(np.int64)
            sizes = sizes[np.cumsum(sizes) <= tokens + 10_000_000]
            sizes[-1] += -(writer.num_tokens + sizes.sum()) % (LENGTH + 1)  # whole rows
            writer.add_documents(rng.integers(2, VOCABULARY, sizes.sum(), np.uint16), sizes)


def neox_dataset(served: Batches) -> Any:
    """A torch dataset that does for each sample what GPT-NeoX's does, from the same index maps."""
    import torch

    samples = served.samples
    order: Any = samples.order  # type: ignore[attr-defined]
    dataset: Any = samples.dataset  # type: ignore[attr-defined]

    class NeoxDataset(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.tokens = np.memmap(f"{dataset.prefix}.bin", np.uint8, mode="r")
            self.sizes, self.pointers = np.array(dataset.sizes), np.array(dataset.pointers)

        def __len__(self) -> int:
            return len(order)

        def document(self, position: int, first: int = 0, length: int | None = None) -> Any:
            number = order.document_order[position]
            count = self.sizes[number] - first if length is None else length
            start = self.pointers[number] + first * 2
            return np.frombuffer(self.tokens.data, np.uint16, count=int(count), offset=start)

        def __getitem__(self, index: int) -> dict[str, Any]:
            sample = int(order.shuffle[index])
            (first, offset), (last, end) = order.sample_index[sample : sample + 2].tolist()
            if first == last:
                tokens = self.document(first, offset, end - offset + 1)
            else:
                between = [self.document(position) for position in range(first + 1, last)]
                tokens = np.concatenate(
                    [self.document(first, offset), *between, self.document(last, 0, end + 1)]
                )
            return {"text": np.array(tokens, np.int64)}

    return NeoxDataset()


def torch_loader(served: Batches, workers: int) -> Contender:
    import torch

    torch.set_num_threads(1)
    dataset = neox_dataset(served)

    def start(step: int) -> Iterator[Any]:
        rows = range(step * served.batch_size, len(served) * served.batch_size)
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=served.batch_size, sampler=rows, num_workers=workers, drop_last=True
        )
        return (batch["text"] for batch in loader)

    return start


def raw_copies(served: Batches, prefix: Path) -> dict[str, Contender]:
    tokens = np.asarray(np.memmap(f"{prefix}.bin", np.uint16, mode="r"))
    rows, width = served.batch_size, LENGTH + 1
    places = np.random.default_rng(1).permutation(len(tokens) // (rows * width)).tolist()

    def together(step: int) -> Iterator[Any]:
        for place in places[step:]:
            yield np.array(tokens[place * rows * width : (place + 1) * rows * width])

    def apart(step: int) -> Iterator[Any]:
        starts = np.random.default_rng(step).integers(0, len(tokens) - width, (len(places), rows))
        for batch in starts.tolist():
            copied = np.empty((rows, width), np.uint16)
            for row, start in enumerate(batch):
                copied[row] = tokens[start : start + width]
            yield copied

    return {"raw copy, 4 MB together": together, "raw copy, row by row": apart}


def in_order(served: Batches, prefix: Path) -> Batches:
    """Batches of the same file read as if its rows were shuffled already."""
    rows_alone = prefix.with_name("rows")  # the index beside the other name is not of rows
    rows_alone.with_suffix(".bin").hardlink_to(prefix.with_suffix(".bin"))
    rows = PreshuffledSamples(str(rows_alone), LENGTH)
    steps = len(rows) // served.batch_size
    return replace(served, samples=rows, num_batches=steps)


def contenders(served: Batches, prefix: Path) -> dict[str, Contender]:
    from pythia_jax.configs import MeshConfig
    from pythia_jax.sharding import make_mesh
    from pythia_jax.training.feed import GlobalBatches, read_ahead

    lying = in_order(served, prefix)
    placed = GlobalBatches(served, make_mesh(MeshConfig()))
    return {
        "pythia_jax, batches[step]": lambda step: map(served.__getitem__, range(step, len(served))),
        "pythia_jax, read_ahead": lambda step: read_ahead(placed, step, len(served)),
        "pythia_jax, preshuffled rows": lambda step: map(
            lying.__getitem__, range(step, len(lying))
        ),
        **{f"torch DataLoader, {n} workers": torch_loader(served, n) for n in (0, 1, 2)},
        **raw_copies(served, prefix),
    }


def rows_a_second(start: Contender, step: int, count: int, batch_size: int) -> float:
    iterator = start(step)
    for _ in islice(iterator, READ_AHEAD):
        pass
    began = time.perf_counter()
    for _ in islice(iterator, count):
        pass
    return count * batch_size / (time.perf_counter() - began)


@click.command()
@click.option("--gigabytes", default=2.0, show_default=True, help="Of tokens.")
@click.option("--batch-size", default=1024, show_default=True)
@click.option("--batches", "count", default=30, show_default=True, help="Timed in each turn.")
@click.option("--repeats", default=5, show_default=True, help="Turns of each.")
def main(gigabytes: float, batch_size: int, count: int, repeats: int) -> None:
    """Print a table of rows a second, and how ours compares."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PYTHIA_JAX_CACHE"] = folder  # the order goes when the tokens go
        prefix = Path(folder) / "tokens"
        write_tokens(prefix, int(gigabytes * 1e9) // 2)
        steps = (prefix.with_suffix(".bin").stat().st_size // 2 - 1) // LENGTH // batch_size - 1
        if steps < READ_AHEAD + count:
            raise click.UsageError(f"{gigabytes} GB are {steps} batches; --batches {count} is more")
        config = RunConfig(
            model=ModelConfig.from_size("70m"),
            data=DataConfig(train=(str(prefix),), sequence_length=LENGTH),
            training=TrainingConfig(steps=steps * 1000 // 1005, batch_size=batch_size),
        )
        served = batches(config)
        running = contenders(served, prefix)
        ours, theirs = (next(running[name](3)) for name in ("pythia_jax, batches[step]", TORCH))
        if not np.array_equal(ours, theirs.numpy()):
            raise click.ClickException("torch's dataset serves other rows than ours")
        speeds: dict[str, list[float]] = {name: [] for name in running}
        first_steps = np.random.default_rng(0).integers(
            0, len(served) - count - READ_AHEAD, repeats
        )
        for step in first_steps.tolist():
            for name, start in running.items():
                speeds[name].append(rows_a_second(start, step, count, batch_size))
    print_table({name: statistics.median(found) for name, found in speeds.items()})


def print_table(speeds: dict[str, float]) -> None:
    shuffled = ("pythia_jax, batches[step]", "pythia_jax, read_ahead")
    ours = max(speeds[name] for name in shuffled)
    print("| what | rows/s | GB/s of tokens | our best is |\n| --- | --: | --: | --: |")
    for name, speed in speeds.items():
        gigabytes = speed * (LENGTH + 1) * 2 / 1e9
        print(f"| {name} | {speed:,.0f} | {gigabytes:.2f} | {ours / speed:.2f} × |")
    torch = max(speed for name, speed in speeds.items() if name.startswith("torch"))
    print(f"\nOurs reads {ours / torch:.1f} times as many rows as torch's best (aim: 5).")
    together, apart = speeds["raw copy, 4 MB together"], speeds["raw copy, row by row"]
    lying = speeds["pythia_jax, preshuffled rows"]
    print(
        f"Of a raw copy (aim: half): shuffled documents {ours / together:.2f} of one that lies "
        f"together and {ours / apart:.2f} of one row by row; preshuffled rows, which lie together, "
        f"{lying / together:.2f}."
    )


if __name__ == "__main__":
    main()
