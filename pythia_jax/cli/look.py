"""`pythia-jax data view`, `find` and `document`: what training saw, and when."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from pythia_jax.cli.options import CONFIG_HELP, DOTTED, PREFIX_HELP, SPLIT, counted, load_config

TOKENIZER = click.option(
    "--tokenizer",
    help="tokenizer.json, a folder that holds one, or a hub id.  [default: the config's]",
)


@click.command(
    context_settings=DOTTED,
    help="Show what the model saw at a step: ids or text, with the documents it is made of."
    + PREFIX_HELP
    + CONFIG_HELP,
)
@click.argument("config")
@click.option("--step", type=int, required=True, help="From 0.")
@click.option("--row", type=int, multiple=True, help="Only this row of the batch; may repeat.")
@click.option("--rows", metavar="A:B", help="Rows A to B, B not included.  [default: 0:4]")
@SPLIT
@click.option("--text", is_flag=True, help="Decoded text instead of ids.")
@TOKENIZER
@click.pass_context
def view(
    ctx: click.Context,
    config: str,
    step: int,
    row: tuple[int, ...],
    rows: str | None,
    split: str,
    text: bool,
    tokenizer: str | None,
) -> None:
    from pythia_jax.data import batches
    from pythia_jax.data.view import view

    loaded = load_config(ctx, config, prefix_allowed=True)
    chosen = _row_numbers(row, rows)
    shown = _tokenizer(tokenizer or loaded.tokenizer) if text else None
    served = batches(loaded, split)
    click.echo(view(served, step, slice(0, 4) if chosen is None else chosen, shown))
    if chosen is None and served.batch_size > 4:
        click.echo(
            f"\nRows 4 to {served.batch_size - 1} are not shown; --rows 4:8 shows more, "
            f"--row {served.batch_size - 1} the last alone.",
            err=True,
        )


@click.command(
    context_settings=DOTTED,
    help="Find every (step, row, position) at which training saw a sequence of tokens: position "
    "is that of its first token in the row. Reads every batch from START to STOP (not included)."
    + PREFIX_HELP
    + CONFIG_HELP,
)
@click.argument("config")
@click.option("--text", help="Searched as the tokenizer writes it.")
@click.option("--tokens", metavar="IDS", help="Token ids: 510,3158,8516.")
@click.option("--start", type=int, default=0, show_default=True)
@click.option("--stop", type=int, help="[default: the end of the split]")
@SPLIT
@TOKENIZER
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="JSON lines of step, row, position; while the search goes on, under OUT.partial.",
)
@click.pass_context
def find(
    ctx: click.Context,
    config: str,
    text: str | None,
    tokens: str | None,
    start: int,
    stop: int | None,
    split: str,
    tokenizer: str | None,
    out: Path | None,
) -> None:
    from tqdm import tqdm

    from pythia_jax.data import batches
    from pythia_jax.data.find import find

    if (text is None) == (tokens is None):
        raise click.UsageError("search for what? Give --text or --tokens, one of them")
    loaded = load_config(ctx, config, prefix_allowed=True)
    if text is None:
        sequence = _ids(tokens or "")
    else:
        sequence = _encode(text, tokenizer or loaded.tokenizer)
    served = batches(loaded, split)
    stop = len(served) if stop is None else stop
    found = 0
    with (
        tqdm(total=stop - start, unit=" steps", desc="searching") as bar,
        _lines(out) as write,
    ):

        def progress(done: int) -> None:
            bar.update(done - bar.n)

        for place in find(served, sequence, start, stop, progress):
            found += 1
            bar.set_postfix(found=found, refresh=False)
            bar.write("step {} row {} position {}".format(*place))
            write(place._asdict())
    places = counted(found, "place")
    click.echo(f"{places} in steps {start} to {stop} (not included) of {served.name}")


@click.command(
    context_settings=DOTTED,
    help="Show the steps and rows in which document NUMBER of CONFIG was seen."
    + PREFIX_HELP
    + CONFIG_HELP,
)
@click.argument("config")
@click.argument("number", type=int)
@click.option("--source", type=int, default=0, show_default=True, help="Which path of the split.")
@SPLIT
@click.pass_context
def document(ctx: click.Context, config: str, number: int, source: int, split: str) -> None:
    from pythia_jax.data import batches
    from pythia_jax.data.find import epochs, sightings

    served = batches(load_config(ctx, config, prefix_allowed=True), split)
    seen = list(sightings(served, number, source))
    for place in seen:
        click.echo(
            f"step {place.step} row {place.row} · its tokens {place.offset}:"
            f"{place.offset + place.length} at {place.position}:{place.position + place.length}"
        )
    rows, steps = len({place[:2] for place in seen}), len({place.step for place in seen})
    drawn = counted(epochs(served.samples, source), "epoch")
    click.echo(
        f"document {number} of {served.source}: in {counted(rows, 'row')} of "
        f"{counted(steps, 'step')}; {served.name} draws from {drawn}"
    )


def _row_numbers(row: tuple[int, ...], rows: str | None) -> list[int] | slice | None:
    """The rows asked for by `--row` or `--rows`; None where neither is given."""
    if rows is None:
        return list(row) or None
    if row:
        raise click.UsageError("give --row or --rows, one of them")
    first, colon, last = rows.partition(":")
    if not colon or not all(part.isdecimal() for part in (first or "0", last or "0")):
        raise click.UsageError(f"--rows {rows}: give a half-open range, --rows 0:16")
    return slice(int(first or 0), int(last) if last else None)


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise click.UsageError(f"--tokens {text}: give ids, --tokens 510,3158,8516") from None


def _tokenizer(path: str | None) -> Any:
    from pythia_jax.data import load_tokenizer

    if path is None:
        raise click.UsageError("text needs a tokenizer: give --tokenizer, or set it in the config")
    return load_tokenizer(path)


def _encode(text: str, tokenizer: str | None) -> list[int]:
    """The ids of a text to search for; says what they are, since only they are searched for."""
    loaded = _tokenizer(tokenizer)
    ids = loaded.encode(text, add_special_tokens=False).ids
    parts = " ".join(repr(loaded.decode([token], skip_special_tokens=False)) for token in ids)
    click.echo(f"searching for {' '.join(map(str, ids))} ({parts})", err=True)
    if not text[:1].isspace():
        click.echo(
            "These ids alone are found: in running text the same words may be other tokens, for "
            f"one after a space; search for {' ' + text!r} too.",
            err=True,
        )
    return ids


@contextmanager
def _lines(out: Path | None) -> Iterator[Callable[[dict[str, int]], None]]:
    """Writes JSON lines, each at once; the file has its name when all of them are in it."""
    if out is None:
        yield lambda _: None
        return
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.parent} to write it in")
    partial = out.with_name(f"{out.name}.partial")
    with partial.open("w", encoding="utf-8", buffering=1) as file:
        yield lambda record: print(json.dumps(record), file=file)
    partial.replace(out)
