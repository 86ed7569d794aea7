"""`pythia-jax lens …`: what a model would say after each of its layers."""

import re
from pathlib import Path
from typing import Any

import click

from pythia_jax.cli.options import CONFIG_HELP, DOTTED, check_first, load_config

_RANGE = re.compile(r"(\d+):(\d+)")


@click.group()
def lens() -> None:
    """What a model would say after each of its layers: the logit lens and the tuned lens.

    \b
        pythia-jax lens show 160m "The Eiffel Tower is in the city of"
        pythia-jax lens fit 160m --data CONFIG --steps 0:250 --rows 128 --out lens.safetensors
        pythia-jax lens show 160m "The Eiffel Tower is in" --tuned lens.safetensors --out lens.png
    """


@lens.command()
@click.argument("model", type=click.Path(path_type=str))
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
@click.option("--revision", help="Of a model on the hub.  [default: main]")
@click.option(
    "--step", type=int, help="Checkpoint of a run folder; of a name on the hub, revision stepN."
)
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
    + CONFIG_HELP.replace("config", "data's config", 1),
)
@click.argument("model", type=click.Path(path_type=str))
@click.option(
    "--data",
    "config",
    required=True,
    metavar="CONFIG",
    help="YAML file of the run, or the prefix of its dataset, with every other key as Pythia's.",
)
@click.option("--steps", required=True, metavar="A:B", help="Of the batches; B is not included.")
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
@click.option("--revision", help="Of a model on the hub.  [default: main]")
@click.option(
    "--step",
    type=int,
    help="Checkpoint of a run folder, or revision stepN; of a Hugging Face folder, its step.",
)
@click.option("--fsdp", type=int, default=1, show_default=True, help="Devices to cut weights over.")
@click.option("--tensor", type=int, default=1, show_default=True, help="Devices to cut heads over.")
@click.pass_context
def fit(ctx: click.Context, model: str, config: str, steps: str, out: Path, **options: Any) -> None:
    from pythia_jax.interp.lens_fitting import fit_of

    check_first(ctx, "MODEL", model)
    match = _RANGE.fullmatch(steps)
    if match is None:
        raise click.UsageError(f"--steps {steps!r}: two numbers, as 0:250 (250 not included)")
    run = load_config(ctx, config, prefix_allowed=True)
    found = fit_of(model, run, int(match[1]), int(match[2]), out, **options)
    click.echo(found.text())
    click.echo(f"written to {out}")
