"""`pythia-jax activations dump`: values inside a model, on the exact training rows."""

import logging
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from pythia_jax.cli.options import CONFIG_HELP, DOTTED, check_first, load_config

_RANGE = re.compile(r"(\d+):(\d+)")


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
@click.option("--revision", help="Of a model on the hub.  [default: main]")
@click.option(
    "--step",
    type=int,
    help="Checkpoint of a run folder, or revision stepN; of a Hugging Face folder, its step.",
)
@click.option("--fsdp", type=int, default=1, show_default=True, help="Devices to cut weights over.")
@click.option("--tensor", type=int, default=1, show_default=True, help="Devices to cut heads over.")
@click.option("--pod", is_flag=True, help="Be one of several processes (docs/pods.md).")
@click.pass_context
def dump(
    ctx: click.Context,
    model: str,
    config: str,
    steps: str,
    sites: str,
    out: Path,
    positions: str | None,
    pod: bool,
    **options: Any,
) -> None:
    from pythia_jax.interp.dump import dump_of, parse_sites
    from pythia_jax.training.pod import failing_at_once, is_first, join

    check_first(ctx, "MODEL", model)
    match = _RANGE.fullmatch(steps)
    if match is None:
        raise click.UsageError(f"--steps {steps!r}: two numbers, as 2990:3000 (3000 not included)")
    run = load_config(ctx, config, prefix_allowed=True)
    places = None if positions is None else _places(positions)
    asked = parse_sites(sites)
    heartbeat = run.distributed.heartbeat_seconds
    if pod:
        join(heartbeat)
        if not is_first():
            logging.getLogger("pythia_jax").setLevel(logging.WARNING)
    with failing_at_once(heartbeat) if pod else nullcontext():
        start, stop = map(int, match.groups())
        made = dump_of(model, run, start, stop, asked, out, positions=places, **options)
    if is_first():
        click.echo(
            f"{out}: {len(made):,} rows, {len(made.positions):,} positions each, of "
            f"{', '.join(made.shapes)}"
        )


def _places(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None and not part.strip().isdecimal():
            raise click.UsageError(
                f"--positions {text}: numbers and half-open ranges, as 0,5,32:64"
            )
        found += range(int(match[1]), int(match[2])) if match else [int(part)]
    return found
