"""`pythia-jax data verify`, `shard`, `unshard`: the files of a dataset themselves."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click


@click.command()
@click.argument("prefixes", nargs=-1, required=True, metavar="PREFIX...")
@click.option(
    "--hashes",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File of lines 'name sha256', or as sha256sum writes; every file must be in it.",
)
@click.option("--vocab-size", type=int, help="Token ids must be below it.")
@click.option("--no-index", is_flag=True, help="For preshuffled data kept without its .idx.")
def verify(
    prefixes: tuple[str, ...], hashes: Path | None, vocab_size: int | None, no_index: bool
) -> None:
    """Check datasets: structure, token ids and, with --hashes, the SHA-256 of every file.

    What is wrong is listed, one line each, and the exit status is then 1.
    """
    from pythia_jax.data.verify import verify

    with _bytes_bar("checking") as progress:
        wrong = verify(prefixes, hashes, vocab_size, progress, index=not no_index)
    for line in wrong:
        click.echo(line)
    if wrong:
        raise click.exceptions.Exit(1)
    looked_at = ["structure", "token ids" if vocab_size else "token ids (of any vocabulary)"]
    looked_at += [] if hashes is None else ["hashes"]
    click.echo(f"{', '.join(prefixes)}: right: {', '.join(looked_at)}")


@click.command()
@click.argument("prefix")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Prefix of the shards.")
@click.option("--shard-bytes", type=int, help="Bytes of all but the last.  [default: 5000000000]")
def shard(prefix: str, out: Path, shard_bytes: int | None) -> None:
    """Write a dataset's tokens as OUT-00000-of-000NN.bin, for tools that want shards."""
    from pythia_jax.data.shards import SHARD_BYTES, shard

    with _bytes_bar("sharding") as progress:
        written = shard(prefix, out, SHARD_BYTES if shard_bytes is None else shard_bytes, progress)
    click.echo(f"{written[0]}: {len(written)} files in all")


@click.command()
@click.argument("prefix")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Prefix of the .bin.")
def unshard(prefix: str, out: Path) -> None:
    """Write a dataset's shards as one OUT.bin, for tools that want it; we read shards in place."""
    from pythia_jax.data.shards import unshard

    with _bytes_bar("merging") as progress:
        written = unshard(prefix, out, progress)
    click.echo(" ".join(map(str, written)))


@contextmanager
def _bytes_bar(verb: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar in bytes, drawn from the first of them on."""
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, desc=verb) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
