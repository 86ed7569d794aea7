"""`pythia-jax intervene`: a run gone on with, its data changed from a step on."""

from pathlib import Path
from typing import Any

import click

from pythia_jax.cli.options import CONFIG_HELP, DOTTED, MODEL, load_config


@click.command(
    context_settings=DOTTED,
    help="Train MODEL on from checkpoint --step to --until with its data changed, all else as in "
    "the base run. MODEL is a run folder, a GPT-NeoX checkpoint, a hub id, a Hugging Face folder."
    + CONFIG_HELP,
)
@MODEL
@click.option("--step", type=int, required=True, help="Where to begin: the first batch changed.")
@click.option("--until", type=int, required=True, help="The last checkpoint.")
@click.option(
    "--data",
    "config",
    required=True,
    type=click.Path(path_type=Path),
    help="CONFIG of the base run (config.yaml of its folder).",
)
@click.option(
    "--transform",
    required=True,
    help="swap_pronouns, swap_pronouns_upstream, swap_pronouns_reverse, or MODULE:FUNCTION: "
    "(step, rows) -> rows.",
)
@click.option("--out", required=True, help="Run folder to write (gs:// too).")
@click.option(
    "--optimizer-state",
    default="checkpoint",
    show_default=True,
    help="checkpoint (of a run folder or GPT-NeoX's), rebuild:K (from the unchanged batches of the "
    "last K steps) or zero.",
)
@click.option("--revision", help="Of a model on the hub.  [default: that of --step]")
@click.pass_context
def intervene(ctx: click.Context, model: str, config: Path, **given: Any) -> None:
    from pythia_jax.cli import START_AGAIN
    from pythia_jax.evaluation.intervene import intervene
    from pythia_jax.training.preemption import Preempted

    base = load_config(ctx, config)
    try:
        result = intervene(model, base, **given)
    except Preempted as notice:
        click.echo(f"Stopped: {notice}", err=True)
        ctx.exit(START_AGAIN)
    click.echo(f"checkpoint {result.step} and metrics.jsonl, loss.png are in {result.folder}")
