"""`pythia-jax update`: what one optimizer step changed."""

from pathlib import Path
from typing import Any

import click

from pythia_jax.cli.counterfactual import RUN_HELP, RUN_OPTIONS, run_config
from pythia_jax.cli.options import CONFIG_HELP, DOTTED, MODEL


@click.command(
    context_settings=DOTTED,
    help="What the step from checkpoint --step of MODEL to the next one changed: the run's own "
    "optimizer step on its own batch, by layer and cause, and split by the rows of the batch."
    + RUN_HELP
    + CONFIG_HELP,
)
@MODEL
@click.option("--step", type=int, required=True, help="Its checkpoint, and the step's batch.")
@click.option(
    "--rows", type=click.IntRange(min=1), help="Look at so many rows only, evenly spread."
)
@click.option("--top", type=click.IntRange(min=1), default=10, show_default=True, help="To print.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for parameters.csv, rows.csv and update.json.",
)
@RUN_OPTIONS
@click.pass_context
def update(
    ctx: click.Context,
    model: str,
    step: int,
    rows: int | None,
    top: int,
    out: Path | None,
    config: Path | None,
    **how: Any,
) -> None:
    from pythia_jax.interp import update_files as files
    from pythia_jax.interp.counterfactual_files import check_folder
    from pythia_jax.interp.resuming import told
    from pythia_jax.interp.updates import update_of

    run = run_config(ctx, model, config)
    if out is not None:
        check_folder(out)
    found, differing = update_of(model, run, step=step, rows=rows, **how)
    click.echo(files.text(found, told(step + 1, differing), top=top))
    if out is not None:
        files.write(out, found, differing, {"model": model, "run": run.name, **how})
        click.echo(f"written to {out}")
