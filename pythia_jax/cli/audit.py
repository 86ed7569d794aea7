"""`pythia-jax audit`: whether a model's checkpoints are what their labels say."""

from pathlib import Path

import click

from pythia_jax.cli.options import MODEL, counted


@click.command()
@MODEL
@click.option(
    "--revisions",
    default="steps",
    show_default=True,
    help="steps: all there are, and all there should be. Or steps and half-open ranges, with "
    "commas: 0,1,2, 1000:143000:10000 (each of them), 0:1000 (those that there are).",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write it to F.json (findings, checkpoints, all distances) or F.csv (the table).",
)
@click.pass_context
def audit(ctx: click.Context, model: str, revisions: str, out: Path | None) -> None:
    """Look for copies, wrong labels, gaps and NaN among the checkpoints of MODEL.

    MODEL is a model on the hub (its branches stepN), a run folder (gs:// too), or a folder of
    GPT-NeoX's checkpoints (global_stepN). Every checkpoint is read once.

    The table has a line a checkpoint: the hash of its weights, their norm, and the distance from
    the checkpoint before. The exit status is 1 if anything is wrong.
    """
    from pythia_jax.interp.auditing import audit as look
    from pythia_jax.interp.auditing import check_out

    if out is not None:
        check_out(out)
    found = look(model, revisions=revisions)
    click.echo(found.table())
    for line in found.verdicts():
        click.echo(line)
    wrong = sum(finding.fault for finding in found.findings)
    told = counted(wrong, "finding") if wrong else "nothing is wrong"
    click.echo(f"{counted(len(found.rows), 'checkpoint')} of {found.model}: {told}")
    if out is not None:
        found.save(out)
        click.echo(f"written to {out}")
    if wrong:
        ctx.exit(1)
