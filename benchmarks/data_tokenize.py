"""`data tokenize` beside the tokenizers library's own batch encoding, on the same cores.

    python benchmarks/data_tokenize.py --tokenizer tokenizer.json

Ours goes from a .jsonl file to .bin and .idx. Theirs is `Tokenizer.encode_batch_fast` of a list of
texts in memory, which reads and writes nothing, and leaves its tokens in the library's own objects.
They take turns in one process, each with a tokenizer of its own, on the same number of threads.
The text is the source of Python's own library, repeated. Each file comes round again, so caches of
words help both alike, more than they would on text that is all new.
"""

import datetime
import json
import os
import platform
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import chain, repeat
from pathlib import Path

import click

TRAINED_ON = 5_000_000  # bytes of text, for the tokenizer that is made where none is given


@click.command(help=__doc__)
@click.option("--tokenizer", help="File, folder or hub id.  [default: a BPE of 4096, made here]")
@click.option("--megabytes", type=float, default=50, show_default=True, help="Of text.")
@click.option("--repeats", type=int, default=3, show_default=True)
@click.option("--workers", type=int, help="Threads of both.  [default: all cores]")
@click.option("--out", type=click.Path(path_type=Path), help="JSON of the same numbers.")
def main(
    tokenizer: str | None, megabytes: float, repeats: int, workers: int | None, out: Path | None
) -> None:
    workers = workers or len(os.sched_getaffinity(0))
    # The library reads it when it starts its threads, at the first batch, and not again.
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from tokenizers import Tokenizer

    from pythia_jax.data import load_tokenizer, tokenize

    texts = list(_texts(megabytes * 1e6))
    size = sum(len(text.encode()) for text in texts) / 1e6
    made = load_tokenizer(tokenizer) if tokenizer else _trained(texts)
    ours, theirs = (Tokenizer.from_str(made.to_str()) for _ in range(2))
    times: dict[str, list[float]] = {"pythia_jax": [], "encode_batch_fast": []}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "texts.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        for _ in range(repeats):
            seconds, encodings = _timed(lambda: theirs.encode_batch_fast(texts))
            times["encode_batch_fast"].append(seconds)
            expected = sum(len(encoding) for encoding in encodings)
            del encodings
            seconds, result = _timed(
                lambda: tokenize(source, Path(folder) / "out", ours, workers=workers)
            )
            times["pythia_jax"].append(seconds)
            if result.tokens != expected:
                raise click.ClickException(f"{result.tokens} tokens, but {expected} of theirs")
    rows = {
        name: {
            "s": statistics.median(seconds),
            "MB/s": size / statistics.median(seconds),
            "tokens/s": expected / statistics.median(seconds),
        }
        for name, seconds in times.items()
    }
    ratio = rows["pythia_jax"]["MB/s"] / rows["encode_batch_fast"]["MB/s"]
    click.echo(
        f"{datetime.date.today()}, {platform.machine()}, {workers} threads, "
        f"Python {platform.python_version()}, tokenizers {version('tokenizers')}; {size:.1f} MB, "
        f"{len(texts):,} documents, {expected:,} tokens, {made.get_vocab_size():,} entries; "
        f"medians of {repeats}\n\n| | s | MB/s | tokens/s |\n| --- | --: | --: | --: |"
    )
    for name, row in rows.items():
        click.echo(f"| {name} | {row['s']:.2f} | {row['MB/s']:.2f} | {row['tokens/s']:,.0f} |")
    click.echo(f"\nratio {ratio:.3f} (to be at least 0.8)")
    if out is not None:
        out.write_text(json.dumps({"rows": rows, "ratio": ratio, "times": times}, indent=1))


def _texts(size: float) -> Iterator[str]:
    """Python's own library, file by file, over and over, until there are `size` bytes."""
    files = [
        path
        for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
        if "site-packages" not in path.parts
    ]
    for path in chain.from_iterable(repeat(files)):
        text = path.read_text(encoding="utf-8", errors="replace")
        if text:
            yield text
            size -= len(text.encode())
        if size <= 0:
            return


def _trained(texts: list[str]):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    chosen, size = [], 0
    for text in texts:
        chosen.append(text)
        size += len(text.encode())
        if size > TRAINED_ON:
            break
    made.train_from_iterator(chosen, trainer)
    return made


def _timed(call: Callable):
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
