"""`pythia-jax term-frequency`: do models know numbers better that they saw more often?"""

import os
import time
from pathlib import Path
from typing import Any

import click

from pythia_jax.cli.options import CONFIG_HELP, DOTTED, MODEL, PREFIX_HELP, load_config

_FOLDER = click.Path(file_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)


@click.group("term-frequency")
def term_frequency() -> None:
    """Accuracy on sums and products against how often a number was seen in training.

    \b
        pythia-jax term-frequency count CONFIG --out counts
        pythia-jax term-frequency score MODEL --revisions 13000:144000:26000 --out scores.csv
        pythia-jax term-frequency plot scores.csv --counts counts --out frequency.png
    """


@term_frequency.command(
    "count",
    context_settings=DOTTED,
    help="Count numbers, pairs of numbers, and numbers with units of time in the training rows of "
    "steps START to STOP (not included), on all cores. What OUT holds already is not counted "
    "again: the same command goes on where it was stopped, and machines that share OUT may count "
    "parts of one run." + PREFIX_HELP + CONFIG_HELP,
)
@click.argument("config")
@click.option("--start", type=int, default=0, show_default=True)
@click.option("--stop", type=int, help="[default: the end of training]")
@click.option(
    "--every",
    type=int,
    default=1000,
    show_default=True,
    help="Steps of a file: counts are known up to each multiple of it.",
)
@click.option(
    "--tokenizer",
    help="tokenizer.json, a folder that holds one, or a hub id.  [default: the config's]",
)
@click.option("--workers", type=int, help="Processes.  [default: one a core]")
@click.option(
    "--clean-up",
    is_flag=True,
    help="Without the space before punctuation in decoded text, as transformers had it then.",
)
@click.option("--out", type=_FOLDER, required=True, help="Folder; gets steps-000000-001000.npz …")
@click.pass_context
def count(
    ctx: click.Context,
    config: str,
    tokenizer: str | None,
    workers: int | None,
    out: Path,
    **settings: Any,
) -> None:
    from pythia_jax.evaluation.term_frequency import count

    loaded = load_config(ctx, config, prefix_allowed=True)
    chosen = tokenizer or loaded.tokenizer
    if chosen is None:
        raise click.UsageError("text needs a tokenizer: give --tokenizer, or set it in the config")
    workers = _cores() if workers is None else workers
    began = time.perf_counter()
    rows = count(loaded, out, tokenizer=chosen, workers=workers, **settings)
    rate = rows / (time.perf_counter() - began)
    processes = f"{workers} process{'' if workers == 1 else 'es'}"
    told = (
        f"{rows:,} rows counted, {rate:,.0f} a second on {processes}"
        if rows
        else "nothing left to count"
    )
    click.echo(f"{told}; counts are in {out}")


@term_frequency.command("score")
@MODEL
@click.option(
    "--operation",
    type=click.Choice(["times", "plus"]),
    multiple=True,
    default=("times",),
    show_default=True,
    help="May be repeated.",
)
@click.option(
    "--shots",
    type=int,
    multiple=True,
    default=(16,),
    show_default=True,
    help="Solved examples before a question; may be repeated. Upstream had 0, 2, 4, 8 and 16.",
)
@click.option(
    "--revisions",
    help="Many checkpoints: steps (all there are), or steps and half-open ranges, with commas: "
    "0,1,2, 13000:144000:26000.",
)
@click.option("--revision", help="Of a model on the hub: step3000, main.  [default: main]")
@click.option(
    "--step",
    type=int,
    help="Checkpoint of a run folder, or revision stepN; for a Hugging Face folder, the step that "
    "it is of.  [default: the newest]",
)
@click.option("--out", type=_FILE, required=True, help="CSV; what is there is added to.")
@click.pass_context
def score(
    ctx: click.Context,
    model: str,
    operation: tuple[str, ...],
    shots: tuple[int, ...],
    out: Path,
    **which: Any,
) -> None:
    """Ask MODEL 5,000 sums or products, 50 of each number from 0 to 99.

    MODEL is a model on the hub (70m), or a folder of any kind (gs:// too). What OUT holds already
    is not asked again: the same command goes on where it was stopped, and one file may gather
    checkpoints and models. Of many checkpoints, those that cannot be loaded are passed over.
    """
    from pythia_jax.evaluation.term_frequency import score

    done = score(model, out, operations=operation, shots=shots, **which)
    asked: dict[tuple[str, int, str, int], list[float]] = {}
    for each in done.scores:
        key = (each.model, each.step, each.operation, each.shots)
        asked.setdefault(key, []).append(each.accuracy)
    for (name, step, what, count), accuracies in asked.items():
        mean = sum(accuracies) / len(accuracies)
        click.echo(f"{name} step {step}: {what}, {count} shots: {mean:.4f} of answers right")
    added = done.scores or done.failed
    told = f"{len(done.scores):,} scores added" if added else "nothing left to ask"
    click.echo(f"{told}; scores are in {out}")
    for step, why in done.failed.items():
        click.echo(f"step {step} was not asked: {why}", err=True)
    if done.failed:
        ctx.exit(1)


@term_frequency.command("plot")
@click.argument("scores", type=_FILE, nargs=-1, required=True)
@click.option("--counts", type=_FOLDER, required=True, help="The folder of `count`.")
@click.option("--out", type=_FILE, required=True, help=".png or .svg; .csv for the numbers.")
def plot(scores: tuple[Path, ...], counts: Path, out: Path) -> None:
    """Draw SCORES, files of `score`, against how often each number was seen by then.

    Scores of models that were trained on other rows than were counted are refused.

    Prints, for each checkpoint, the mean accuracy on the tenth of the numbers seen most, less that
    on the tenth seen least.
    """
    from pythia_jax.evaluation import figures, term_plot
    from pythia_jax.evaluation.term_frequency import read_points

    figures.check(out, table=True)
    found = read_points(scores, counts)
    written = term_plot.write(found, out)
    for (model, operation, shots, step), chosen in term_plot.checkpoints(found):
        gap = term_plot.gap(chosen)
        click.echo(f"{model} step {step}: {operation}, {shots} shots: gap {gap:+.4f}")
    click.echo(f"{len(found):,} points are in {written}")


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
