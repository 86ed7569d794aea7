"""`pythia-jax data …`: make, look at and check token data."""

from pathlib import Path

import click

from pythia_jax.cli.options import CONFIG_HELP, DOTTED, load_config


@click.group()
def data() -> None:
    """Make and look at .bin/.idx token data."""


@data.command()
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Prefix of the .bin and .idx files.",
)
@click.option(
    "--tokenizer",
    required=True,
    type=click.Path(path_type=Path),
    help="tokenizer.json, or a folder that holds one.",
)
@click.option("--append-eod", is_flag=True, help="End each document with <|endoftext|>.")
@click.option("--text-key", default="text", show_default=True, help="Key of the text in .jsonl.")
@click.option("--pattern", default="*", show_default=True, help="Files taken from folders.")
def tokenize(
    inputs: tuple[Path, ...],
    out: Path,
    tokenizer: Path,
    append_eod: bool,
    text_key: str,
    pattern: str,
) -> None:
    """Tokenize text files, folders and .jsonl INPUTS; one document a file or a line."""
    from tqdm import tqdm

    from pythia_jax.data import tokenize

    with tqdm(unit=" tokens", unit_scale=True, desc="tokenizing") as bar:

        def progress(documents: int, tokens: int) -> None:
            bar.update(tokens - bar.n)
            bar.set_postfix(documents=documents)

        made = tokenize(
            inputs,
            out,
            tokenizer,
            append_eod=append_eod,
            text_key=text_key,
            pattern=pattern,
            progress=progress,
        )
    click.echo(f"{made.prefix}: {made.documents:,} documents, {made.tokens:,} tokens, {made.dtype}")


@data.command(
    context_settings=DOTTED,
    help="Write the batches of steps START to STOP (not "
    "included) as a .npy of [rows, sequence_length + 1]." + CONFIG_HELP,
)
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--start", type=int, required=True)
@click.option("--stop", type=int, required=True)
@click.option(
    "--split",
    type=click.Choice(["train", "validation", "test"]),
    default="train",
    show_default=True,
)
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.pass_context
def batches(ctx: click.Context, config: Path, start: int, stop: int, split: str, out: Path) -> None:
    from pythia_jax.data import batches
    from pythia_jax.data.dump import dump

    loaded = load_config(ctx, config)
    digest = dump(batches(loaded, split), start, stop, out)
    rows, width = (stop - start) * loaded.training.batch_size, loaded.data.sequence_length + 1
    click.echo(
        f"{out}: {rows:,} rows of {width:,} tokens, sha256 {digest} (as little-endian int32)"
    )
