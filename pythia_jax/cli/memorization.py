"""`pythia-jax memorization`: which training rows a model recites."""

from pathlib import Path
from typing import Any

import click

from pythia_jax.cli.options import (
    CHECKPOINT_RECORDED,
    DATA,
    DATA_CONFIG_HELP,
    DOTTED,
    MESH,
    MODEL,
    load_config,
)


@click.command(
    context_settings=DOTTED,
    help="Score which rows of training MODEL recites: --prompt-length tokens in, greedy decoding "
    "of --continuation-length more, the fraction that is the row's own. MODEL is a hub id (70m), "
    "or a folder of any kind (gs:// too). A stopped run goes on when it is started again."
    + DATA_CONFIG_HELP,
)
@MODEL
@DATA
@CHECKPOINT_RECORDED
@click.option("--start", type=int, default=0, show_default=True, help="First row.")
@click.option("--stop", type=int, help="Row after the last.  [default: all seen at that step]")
@click.option("--prompt-length", type=int, default=32, show_default=True)
@click.option("--continuation-length", type=int, default=32, show_default=True)
@click.option("--batch-size", type=int, help="Rows decoded together.  [default: by memory]")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of the weights and the computation; upstream's was float16.",
)
@MESH
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="CSV: index,score"
)
@click.option(
    "--plot",
    "picture",
    type=click.Path(path_type=Path, dir_okay=False),
    help="PNG or SVG: memorised fraction over training, held against a Poisson process.",
)
@click.pass_context
def memorization(
    ctx: click.Context, model: str, config: str, out: Path, picture: Path | None, **options: Any
) -> None:
    from pythia_jax.evaluation import figures
    from pythia_jax.evaluation import memorization_plots as plots
    from pythia_jax.evaluation.memorization import memorization_of

    run = load_config(ctx, config, prefix_allowed=True)
    if picture is not None:
        figures.check(picture)
    found = memorization_of(model, run, out, **options)
    click.echo(
        f"rows {found.start:,} to {found.stop:,} (not included): {found.memorized:,} recited whole "
        f"({100 * found.fraction:.3g} %); scores are in {out}, what of in {out}.json"
    )
    if picture is not None:
        click.echo(f"{plots.plot(out, picture)}; drawn in {picture}")
