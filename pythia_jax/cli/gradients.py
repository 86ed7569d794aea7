"""`pythia-jax gradients …`: an index of the gradients of training, and what is found in it."""

from pathlib import Path
from typing import Any

import click

from pythia_jax.cli.factors import factors
from pythia_jax.cli.options import (
    CHECKPOINT_RECORDED,
    DATA,
    DATA_CONFIG_HELP,
    DOTTED,
    MESH,
    MODEL,
    POD,
    STEPS,
    comes_first,
    in_pod,
    load_config,
)

_FOLDER = click.Path(file_okay=False, path_type=Path)
_SHOWN = 200  # characters of a passage


@click.group()
def gradients() -> None:
    """Index the gradients of training rows, and find the rows most like a passage.

    \b
        pythia-jax gradients build 160m --step 3000 --data CONFIG --steps 2990:3000 --out index
        pythia-jax gradients query index --text "The capital of France is" --completion " Paris"
        pythia-jax gradients export index --to for-bergson
    """


@gradients.command(
    context_settings=DOTTED,
    help="Store the gradient of every training row of some steps, at MODEL's weights: a hub id "
    "(70m), or a folder of any kind (gs:// too). Of each linear module of the layers it is "
    "projected from both sides, in Bergson's format, bit for bit its projection. Rows are the "
    "exact batches, keyed by step, slot, document and token range. A stopped build goes on when "
    "it is started again." + DATA_CONFIG_HELP,
)
@MODEL
@DATA
@STEPS
@click.option("--out", type=_FOLDER, required=True, help="Folder of the index.")
@click.option(
    "--unit",
    type=click.Choice(["sequence", "document"]),
    default="sequence",
    show_default=True,
    help="What a row is of; by document, of its tokens' losses, each in its sequence.",
)
@click.option(
    "--projection-dim",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    help="Rows and columns stored of each module's gradient; 0 stores all of it.",
)
@click.option("--projection-seed", type=int, help="Another projection.  [default: Bergson's]")
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Of what is stored.",
)
@click.option("--rows", type=click.IntRange(min=1), help="A sample of so many sequences.")
@click.option("--batch", type=click.IntRange(min=1), help="Rows at once.  [default: by memory]")
@CHECKPOINT_RECORDED
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of the weights and the computation.",
)
@MESH
@POD
@click.pass_context
def build(
    ctx: click.Context,
    model: str,
    config: str,
    steps: tuple[int, int],
    out: Path,
    projection_dim: int,
    projection_seed: int | None,
    pod: bool,
    **options: Any,
) -> None:
    from pythia_jax.interp.build import build_index_of
    from pythia_jax.interp.projection import Projection

    if not projection_dim and projection_seed is not None:
        raise click.UsageError("--projection-seed goes with a projection (--projection-dim)")
    run = load_config(ctx, config, prefix_allowed=True)
    projection = Projection(projection_dim, projection_seed) if projection_dim else None
    with in_pod(pod, run) as first:
        made = build_index_of(model, run, *steps, out, projection=projection, **options)
    if first:
        numbers, dtype = made.gradients.shape[1], made.gradients.dtype
        click.echo(f"{out}: {len(made):,} rows of {numbers:,} numbers ({dtype})")


@gradients.command(
    context_settings=DOTTED,
    help="The rows of an INDEX whose gradients are most like that of a text's loss."
    + DATA_CONFIG_HELP.replace("config", "config (with --data)", 1),
)
@click.argument("index", type=_FOLDER, callback=comes_first)
@click.option("--text", required=True, help="The passage, or what comes before the completion.")
@click.option(
    "--completion",
    help="The loss is of these tokens alone. Encoded apart: begin it with its space.",
)
@click.option("--metric", type=click.Choice(["dot", "cosine"]), default="dot", show_default=True)
@click.option(
    "--factors",
    type=_FOLDER,
    help="Precondition the query's gradient (pythia-jax gradients factors).",
)
@click.option(
    "--damping", type=float, help="With --factors.  [default: 0.1 of the mean eigenvalue]"
)
@click.option("--top", type=click.IntRange(min=1), default=50, show_default=True)
@click.option(
    "--model",
    help="Where the index's model is; of other weights it is refused.  [default: where it was]",
)
@click.option("--revision", help="With --model: of a model on the hub.")
@click.option("--step", type=int, help="With --model: its checkpoint.")
@MESH
@click.option("--data", "config", metavar="CONFIG", help="Of the run, where its data has moved.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Also write a .parquet or .csv."
)
@click.pass_context
def query(
    ctx: click.Context,
    index: Path,
    text: str,
    config: str | None,
    out: Path | None,
    **options: Any,
) -> None:
    from pythia_jax.interp import querying, tables

    if options["model"] is None and (options["revision"], options["step"]) != (None, None):
        raise click.UsageError("--revision and --step go with --model")
    if config is None and ctx.args:
        raise click.UsageError(f"{ctx.args[0]}: keys of the data's config go with --data CONFIG")
    if out is not None:
        tables.check(out)
    data = None if config is None else load_config(ctx, config, prefix_allowed=True)
    hits = querying.query_of(index, text, data=data, show_progress=True, **options)
    for place, score in enumerate(hits.scores):
        click.echo(f"{place + 1:>4}  {score:.4g}  {hits.described(place)}")
        if hits.texts:
            click.echo(f"      {_short(hits.texts[place])}")
    if out is not None:
        tables.write(out, hits.columns())
        click.echo(f"written to {out}")


def _short(text: str) -> str:
    """A passage on one line, its end left off."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]} …"


@gradients.command()
@click.argument("index", type=_FOLDER)
@click.option("--to", type=_FOLDER, help="Also make a folder of Bergson's files alone, with texts.")
@click.option(
    "--model", help="What it calls the model: a folder of transformers.  [default: the index's]"
)
def export(index: Path, to: Path | None, model: str | None) -> None:
    """Check an INDEX whole: sizes, checksums, keys, no NaN.

    It is in Bergson's format as it lies, for its Attributor and load_gradients; `bergson query`
    also wants the texts, and a model of transformers.
    """
    from pythia_jax.interp import bergson

    if model is not None and to is None:
        raise click.UsageError("--model goes with --to")
    made = bergson.export_index(index, to, model=model)
    if to is None:
        click.echo(f"{index}: whole, and in Bergson's format already")
    else:
        texts = (made / bergson.TEXTS).exists()
        click.echo(
            f"{index}: whole; {made} is for Bergson"
            + (f": bergson query --index {made}" if texts else ", without texts")
        )


gradients.add_command(factors)
