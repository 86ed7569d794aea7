"""`pythia-jax plan`: what a run would need on TPUs that are not here."""

import json
from pathlib import Path

import click

from pythia_jax.cli.options import CONFIG_HELP, DOTTED, load_config


@click.command(
    context_settings=DOTTED,
    help="Compile the train step of CONFIG for a TPU that is not here, and tell its memory, its "
    "collectives and its work. The exit status is 0 only if it fits." + CONFIG_HELP,
)
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--topology",
    required=True,
    help="One slice: the grid of its chips (v5e:4x4), or the cloud's type (v5litepod-16, v4-32).",
)
@click.option(
    "--slices", type=click.IntRange(min=1), help="So many of them.  [default: mesh.slices]"
)
@click.option(
    "--mfu",
    type=float,
    default=0.4,
    show_default=True,
    help="Share of the peak that is assumed where time is told.",
)
@click.option("--sweep", is_flag=True, help="Try layouts of the mesh, remat and accumulation.")
@click.option(
    "--json",
    "out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write it there as well, with sizes in bytes.",
)
@click.pass_context
def plan(
    ctx: click.Context,
    config: Path,
    topology: str,
    slices: int | None,
    mfu: float,
    sweep: bool,
    out: Path | None,
) -> None:
    from pythia_jax.training import topologies

    topologies.prepare_environment()
    from pythia_jax.files import write_whole
    from pythia_jax.training import plan_sweep, plan_text
    from pythia_jax.training.plan import plan

    loaded = load_config(ctx, config)
    place = topologies.parse(topology, slices or max(1, loaded.mesh.slices))
    if sweep:
        swept = plan_sweep.sweep(loaded, place, mfu)
        told, fits = plan_sweep.describe(swept), bool(swept.ranked)
        values: object = plan_sweep.to_dict(swept)
    else:
        made = plan(loaded, place, mfu)
        told, fits, values = plan_text.describe(made), made.fits, plan_text.to_dict(made)
    click.echo(told)
    if out is not None:
        write_whole(out, (json.dumps(values, indent=1) + "\n").encode())
    if not fits:
        ctx.exit(1)
