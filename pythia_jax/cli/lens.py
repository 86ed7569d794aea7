"""`pythia-jax lens …`: what a model would say after each of its layers."""

from pathlib import Path
from typing import Any

import click

from pythia_jax.cli.options import (
    CHECKPOINT,
    CHECKPOINT_RECORDED,
    DATA,
    DATA_CONFIG_HELP,
    DOTTED,
    MESH,
    MODEL,
    STEPS,
    load_config,
)


@click.group()
def lens() -> None:
    """What a model would say after each of its layers: the logit lens and the tuned lens.

    \b
        pythia-jax lens show 160m "The Eiffel Tower is in the city of"
        pythia-jax lens fit 160m --data CONFIG --steps 0:250 --rows 128 --out lens.safetensors
        pythia-jax lens show 160m "The Eiffel Tower is in" --tuned lens.safetensors --out lens.png
    """


@lens.command()
@MODEL
@click.argument("prompt")
@click.option(
    "--tuned",
    type=click.Path(exists=True, path_type=Path),
    help="A tuned lens: a file of `lens fit`, or a folder of the package tuned-lens.",
)
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True)
@click.option(
    "--position",
    type=int,
    default=-1,
    show_default=True,
    help="After which token of PROMPT, from 0; below 0 from its end.",
)
@CHECKPOINT
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write every position: a .csv, or layers and positions as a .png or .svg.",
)
def show(
    model: str,
    prompt: str,
    position: int,
    revision: str | None,
    step: int | None,
    out: Path | None,
    **how: Any,
) -> None:
    """Print the likeliest next tokens after each layer, with their probabilities.

    MODEL is a hub id (70m), or a folder of any kind (gs:// too).
    """
    import pythia_jax as pj
    from pythia_jax.interp import lens_reading

    if out is not None:
        lens_reading.check_output(out)
    found = lens_reading.read_prompt(pj.load(model, revision=revision, step=step), prompt, **how)
    click.echo(found.text(position))
    if out is not None:
        found.write(out)
        click.echo(f"written to {out}")


@lens.command(
    context_settings=DOTTED,
    help="Fit a tuned lens to MODEL on the exact training batches of some steps, one update a "
    "batch, and tell how it does on the last of them, which is held out. The paper's lenses took "
    "250 updates of 128 rows. MODEL is a hub id (70m), or a folder of any kind (gs:// too)."
    + DATA_CONFIG_HELP,
)
@MODEL
@DATA
@STEPS
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Safetensors."
)
@click.option(
    "--rows", type=click.IntRange(min=1), help="The first so many of each batch.  [default: all]"
)
@click.option("--batch", type=click.IntRange(min=1), help="Rows at once.  [default: by tokens]")
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Of the first update; it falls linearly to 0.",
)
@CHECKPOINT_RECORDED
@MESH
@click.pass_context
def fit(
    ctx: click.Context,
    model: str,
    config: str,
    steps: tuple[int, int],
    out: Path,
    **options: Any,
) -> None:
    from pythia_jax.interp.lens_fitting import fit_of

    run = load_config(ctx, config, prefix_allowed=True)
    found = fit_of(model, run, *steps, out, **options)
    click.echo(found.text())
    click.echo(f"written to {out}")
