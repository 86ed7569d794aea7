"""`pythia-jax counterfactual`: training again without some of its rows."""

from pathlib import Path
from typing import Any

import click

from pythia_jax.cli.options import CONFIG_HELP, DOTTED, MODEL, load_config, together

_FILE = click.Path(dir_okay=False, path_type=Path)
RUN_HELP = (
    "\n\nMODEL is a run folder. With --data CONFIG it is anything that `train --from` takes, and "
    "--optimizer-state says where the optimizer's moments come from."
)


RUN_OPTIONS = together(
    click.option(
        "--data",
        "config",
        type=click.Path(path_type=Path),
        help="CONFIG of the run.  [default: config.yaml of the run folder]",
    ),
    click.option(
        "--optimizer-state",
        default="checkpoint",
        show_default=True,
        help="checkpoint (of a run folder or GPT-NeoX's), rebuild:K (from the batches of the last "
        "K steps) or zero.",
    ),
    click.option("--revision", help="Of a model on the hub.  [default: that of the step]"),
)
"""Options of a command that goes on with a run."""


def run_config(ctx: click.Context, model: str, config: Path | None) -> Any:
    """The config of the run that MODEL is of."""
    own = Path(model) / "config.yaml"
    if config is None and not own.is_file():
        raise click.UsageError(
            f"{model} is no run folder here (no config.yaml): give --data CONFIG"
        )
    return load_config(ctx, own if config is None else config)


@click.command(
    context_settings=DOTTED,
    help="Train MODEL on from checkpoint --from for --train-steps steps, once as it was and once "
    "with some rows of its batches dropped or reweighted, and report the difference: the ground "
    "truth for any score of influence."
    + RUN_HELP
    + "\n\nA table of rows has columns step and slot, as `gradients query --out` writes it. A row "
    "is a whole sequence; one document of it cannot be dropped, since the train step weighs rows. "
    "The divisor of the batch stays." + CONFIG_HELP,
)
@MODEL
@click.option("--from", "step", type=int, required=True, help="The checkpoint to begin at.")
@click.option("--drop", type=_FILE, help="A .csv or .parquet of rows that are left out.")
@click.option("--reweight", type=_FILE, help="One with a column weight; 1 changes nothing.")
@click.option(
    "--train-steps", "steps", type=click.IntRange(min=1), required=True, help="How many steps."
)
@click.option(
    "--eval",
    "source",
    metavar="F.npy|PREFIX",
    help="What the loss is measured on: rows of ids, or documents of a dataset.",
)
@click.option("--eval-text", "sentence", metavar="TEXT", help="A text in place of --eval.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for evaluation.csv, steps.csv, rows.csv and counterfactual.json.",
)
@RUN_OPTIONS
@click.pass_context
def counterfactual(
    ctx: click.Context,
    model: str,
    step: int,
    drop: Path | None,
    reweight: Path | None,
    steps: int,
    source: str | None,
    sentence: str | None,
    out: Path | None,
    config: Path | None,
    **how: Any,
) -> None:
    from pythia_jax.interp import counterfactual_files as files
    from pythia_jax.interp.counterfactuals import counterfactual_of
    from pythia_jax.interp.evaluation_rows import evaluation_rows, text_row

    run = run_config(ctx, model, config)
    table = drop or reweight
    if table is None or (drop and reweight):
        raise click.UsageError("which rows? Give --drop or --reweight, one of them")
    if (source is None) == (sentence is None):
        raise click.UsageError("the loss of what? Give --eval or --eval-text, one of them")
    if run.model is None:
        raise click.UsageError("model: missing in the config; set it (--model.size 70m)")
    if out is not None:
        files.check_folder(out)
    weights = files.read_weights(table, run, drop=drop is not None)
    if source is not None:
        rows = evaluation_rows(source, run.model)
    else:
        assert sentence is not None
        saved = Path(model) / "tokenizer.json"
        tokenizer = saved if saved.is_file() else run.tokenizer
        if tokenizer is None:
            raise click.UsageError("text needs a tokenizer: set it in the config (--tokenizer F)")
        rows = text_row(sentence, run.model, tokenizer)
    found, compared = counterfactual_of(
        model, run, weights, step=step, steps=steps, rows=rows, **how
    )
    click.echo(files.text(found, rows, compared))
    if out is not None:
        about = {"model": model, "run": run.name, "rows": str(table), **how}
        files.write(out, found, rows, compared, about)
        click.echo(f"written to {out}")
