"""`pythia-jax quantize`: a checkpoint in int8, and what that loses."""

import signal
import sys
from pathlib import Path
from typing import Any

import click

from pythia_jax.cli.options import CHECKPOINT, MODEL


@click.command()
@MODEL
@click.argument("target", type=click.Path(path_type=str), required=False)
@click.option("--bits", type=int, default=8, show_default=True)
@click.option(
    "--activations",
    type=click.Choice(["float", "dynamic"]),
    default="float",
    show_default=True,
    help="What weights are multiplied with; dynamic: int8 too, with a scale for each token.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of what stays in floats: norms and biases.  [default: as stored]",
)
@click.option("--keep-embeddings", is_flag=True, help="Leave both embeddings in floats.")
@click.option("--report", is_flag=True, help="Tell what is lost; without TARGET, only that.")
@click.option(
    "--text",
    type=click.Path(exists=True, path_type=Path),
    help="With --report: a file or folder of text, for perplexity before and after, and errors of "
    "outputs and logits.",
)
@click.option("--data", "prefix", metavar="PREFIX", help="Or a dataset, tokens already.")
@CHECKPOINT
def quantize(
    model: str,
    target: str | None,
    report: bool,
    text: Path | None,
    prefix: str | None,
    **options: Any,
) -> None:
    """Write MODEL to the folder TARGET in int8: a quarter of float32, half of float16.

    MODEL is a hub id (70m), or a folder of any kind (gs:// too). TARGET is a Hugging Face folder,
    which every command opens; one in int8 that is there is replaced, one in floats is not. Matrices
    become int8, with a scale for each output channel; norms and biases stay. The report comes once
    TARGET is whole, which stays if there can be none.
    """
    # As Ctrl-C does: what is half-written goes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if not report and (text is not None or prefix is not None):
        raise click.UsageError("--text and --data go with --report")
    if text is not None and prefix is not None:
        raise click.UsageError("give one of --text and --data")
    if not report and target is None:
        raise click.UsageError("name the folder to write: quantize MODEL TARGET, or --report")
    if target is not None:
        from pythia_jax.bridge.quantize import quantize

        written = quantize(model, target, **options)
        click.echo(f"{written.source} -> {target}")
    if report:
        from pythia_jax.evaluation import quantized

        found = quantized.report(model, text=text, prefix=prefix, **options)
        click.echo(found.table())
        if target is not None:
            found.save(Path(target))
