"""`pythia-jax attribute`: which tokens of a prompt speak for the next one."""

from pathlib import Path
from typing import Any

import click

from pythia_jax.cli.options import CHECKPOINT, MODEL


@click.command()
@MODEL
@click.argument("prompt")
@click.option("--target", help="The next token, with its space.  [default: the likeliest]")
@click.option("--against", help="Another token: the difference of the two logits is attributed.")
@click.option(
    "--method",
    type=click.Choice(["integrated-gradients", "input-x-gradient"]),
    default="integrated-gradients",
    show_default=True,
)
@click.option(
    "--points",
    "steps",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="Of integrated gradients; more make the gap smaller.",
)
@CHECKPOINT
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write the scores: a .csv, or a heat map, .png or .svg.",
)
def attribute(
    model: str,
    prompt: str,
    revision: str | None,
    step: int | None,
    out: Path | None,
    **settings: Any,
) -> None:
    """Score each token of PROMPT by what it adds to the log-probability of the next token.

    MODEL is a hub id (70m), or a folder of any kind (gs:// too). Scores are gradients at the
    embeddings, times them; the gap is what they leave unexplained.
    """
    import pythia_jax as pj
    from pythia_jax.interp import token_attribution

    if out is not None:
        token_attribution.check_output(out)
    loaded = pj.load(model, revision=revision, step=step)
    found = token_attribution.attribute(loaded, prompt, **settings)
    click.echo(found.text())
    if out is not None:
        found.write(out)
        click.echo(f"written to {out}")
