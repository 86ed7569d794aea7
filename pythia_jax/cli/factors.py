"""`pythia-jax gradients factors`: what a query's gradient is preconditioned with."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from pythia_jax.cli.options import (
    CHECKPOINT_RECORDED,
    DATA,
    DATA_CONFIG_HELP,
    DOTTED,
    MESH,
    MODEL,
    StepRange,
    load_config,
)

OF_BATCHES = {
    *("steps", "labels", "seed", "rows", "batch", "dtype", "fsdp", "tensor"),
    *("projection_dim", "projection_seed"),
}
"""Options that say how batches are gone through."""


@click.command(
    context_settings=DOTTED,
    help="Fit factors of the curvature of MODEL's loss to training batches, for `gradients query "
    "--factors`. MODEL is a hub id (70m), or a folder of any kind (gs:// too).\n\n"
    "ekfac and kfac: Kronecker factors of each linear module; autocorrelation: of projected "
    "gradients (TrackStar's); diagonal: mean squares; adam: the second moments of the optimizer's "
    "state, for which no batch is read." + DATA_CONFIG_HELP,
)
@MODEL
@DATA
@click.option("--steps", type=StepRange(), help="Of the batches; B is not included. Not for adam.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="A new folder."
)
@click.option(
    "--method",
    type=click.Choice(["ekfac", "kfac", "autocorrelation", "diagonal", "adam"]),
    default="ekfac",
    show_default=True,
)
@click.option(
    "--labels",
    type=click.Choice(["sampled", "true"]),
    help="Drawn from the model (the Fisher matrix), or the data's own (the empirical one).  "
    "[default: sampled; of autocorrelation, true]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of sampled labels.")
@click.option(
    "--projection-dim",
    type=click.IntRange(min=1),
    help="autocorrelation: the index's.  [default: 16]",
)
@click.option("--projection-seed", type=int, help="autocorrelation: the index's.")
@click.option(
    "--optimizer-state",
    metavar="KIND",
    help="adam: checkpoint, or rebuild:K from the K batches before.  [default: checkpoint]",
)
@click.option("--rows", type=click.IntRange(min=1), help="A sample of so many sequences.")
@click.option(
    "--batch", type=click.IntRange(min=1), help="Rows at once.  [default: about 2048 tokens]"
)
@CHECKPOINT_RECORDED
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of the weights and the computation; sums are float32.",
)
@MESH
@click.pass_context
def factors(
    ctx: click.Context,
    model: str,
    config: str,
    method: str,
    steps: tuple[int, int] | None,
    out: Path,
    optimizer_state: str | None,
    **options: Any,
) -> None:
    from pythia_jax.interp.factor_fitting import adam_factors_of, fit_factors_of
    from pythia_jax.interp.projection import Projection

    run = load_config(ctx, config, prefix_allowed=True)
    if method == "adam":
        given = [
            option.opts[0]
            for option in ctx.command.params
            if option.name in OF_BATCHES
            and ctx.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
        ]
        if given:
            raise click.UsageError(f"adam reads no batches: leave out {', '.join(given)}")
        made = adam_factors_of(
            model,
            run,
            out,
            optimizer_state=optimizer_state or "checkpoint",
            revision=options["revision"],
            step=options["step"],
        )
        click.echo(f"{out}: Adam's second moments of {len(made.parameters)} parameters")
        return
    if optimizer_state is not None:
        raise click.UsageError("--optimizer-state goes with --method adam")
    if steps is None:
        raise click.UsageError(f"--method {method} reads batches: give --steps A:B")
    size, seed = options.pop("projection_dim"), options.pop("projection_seed")
    if method != "autocorrelation" and (size is not None or seed is not None):
        raise click.UsageError("a projection goes with --method autocorrelation")
    projection = Projection(size or 16, seed) if method == "autocorrelation" else None
    labels = options.pop("labels") or ("true" if projection else "sampled")
    how = {"method": method, "empirical": labels == "true", "projection": projection}
    made = fit_factors_of(model, run, *steps, out, **how, **options)
    click.echo(f"{out}: {method} factors of {made.rows:,} rows ({made.tokens:,} tokens)")
