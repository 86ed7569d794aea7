"""`pythia-jax activations dump`: values inside a model, on the exact training rows."""

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
    POD,
    RANGE,
    STEPS,
    in_pod,
    load_config,
)


@click.group()
def activations() -> None:
    """Values at named places inside a model.

    \b
        pythia-jax activations dump 160m --step 3000 --data CONFIG --steps 2990:3000 \\
            --sites resid_post:3,mlp.post:1-2 --dtype float16 --out dump
    """


@activations.command(
    context_settings=DOTTED,
    help="Write values at sites of MODEL for every training row of some steps: safetensors, some "
    "rows of a step in each, with their tokens and their places in the batch. MODEL is a hub id "
    "(70m), or a folder of any kind (gs:// too). A stopped dump goes on when it is started again."
    + DATA_CONFIG_HELP,
)
@MODEL
@DATA
@STEPS
@click.option(
    "--sites",
    required=True,
    metavar="SITE[:LAYER[-LAYER]],…",
    help="resid_post:3,mlp.post:1-2,ln_final; 1-2 is layers 1 and 2, no layer is all of them.",
)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder."
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    default="float32",
    show_default=True,
    help="Of what is stored; it is computed in float32.",
)
@click.option(
    "--positions", metavar="0,5,32:64", help="Only these places of a row.  [default: all]"
)
@click.option("--rows", type=click.IntRange(min=1), help="A sample of so many rows, evenly spread.")
@click.option("--batch", type=click.IntRange(min=1), help="Rows at once.  [default: by tokens]")
@CHECKPOINT_RECORDED
@MESH
@POD
@click.pass_context
def dump(
    ctx: click.Context,
    model: str,
    config: str,
    steps: tuple[int, int],
    sites: str,
    out: Path,
    positions: str | None,
    pod: bool,
    **options: Any,
) -> None:
    from pythia_jax.interp.dump import dump_of, parse_sites

    run = load_config(ctx, config, prefix_allowed=True)
    places = None if positions is None else _places(positions)
    asked = parse_sites(sites)
    with in_pod(pod, run) as first:
        made = dump_of(model, run, *steps, asked, out, positions=places, **options)
    if first:
        click.echo(
            f"{out}: {len(made):,} rows, {len(made.positions):,} positions each, of "
            f"{', '.join(made.shapes)}"
        )


def _places(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        match = RANGE.fullmatch(part.strip())
        if match is None and not part.strip().isdecimal():
            raise click.UsageError(
                f"--positions {text}: numbers and half-open ranges, as 0,5,32:64"
            )
        found += range(int(match[1]), int(match[2])) if match else [int(part)]
    return found
