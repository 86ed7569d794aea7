"""`pythia-jax evaluate` and `sweep`: scores on tasks, of one checkpoint or many."""

from pathlib import Path
from typing import Any

import click

from pythia_jax.cli.options import MODEL, together

HARNESS = ("run", "ls", "validate")
"""Commands of the harness's own command line."""

_TASKS = together(
    click.option(
        "--tasks",
        required=True,
        help="Names of tasks or groups of the harness, with commas; pythia: those of the paper.",
    ),
    click.option(
        "--num-fewshot",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Examples before each question; tasks that say 0 themselves keep it.",
    ),
    click.option(
        "--limit", type=click.IntRange(min=1), help="Questions of each task.  [default: all]"
    ),
    click.option(
        "--include-path",
        type=click.Path(exists=True, file_okay=False, path_type=str),
        help="Folder of further task files.",
    ),
)


class _Evaluate(click.Command):
    """Hands `run`, `ls` and `validate`, with all that follows, to the harness as it is typed."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] in HARNESS:
            ctx.obj = list(args)
            return []
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        if not isinstance(ctx.obj, list):
            return super().invoke(ctx)
        from pythia_jax.evaluation.harness import run

        return run(ctx.obj)


@click.command(cls=_Evaluate)
@MODEL
@_TASKS
@click.option("--revision", help="Of a model on the hub: step3000, main.  [default: main]")
@click.option(
    "--step",
    type=int,
    help="Checkpoint of a run folder, or revision stepN; with --out, of what a folder of one "
    "checkpoint holds.  [default: the newest]",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write the results as published: OUT/MODEL/zero-shot/NAME_stepN.json.",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="Rows of a batch.  [default: by tokens]"
)
def evaluate(
    model: str,
    tasks: str,
    num_fewshot: int,
    limit: int | None,
    include_path: str | None,
    revision: str | None,
    step: int | None,
    out: Path | None,
    batch_size: int | None,
) -> None:
    """Score MODEL on tasks of the LM Evaluation Harness.

    MODEL is a model on the hub (70m, EleutherAI/pythia-70m), a Hugging Face folder, a GPT-NeoX
    checkpoint (global_stepN) or a run folder (gs:// too).

    \b
        pythia-jax evaluate run --model pythia_jax --model_args pretrained=MODEL ...
        pythia-jax evaluate ls tasks
        pythia-jax evaluate validate --tasks ...

    are the harness's own commands, with every flag of theirs (`evaluate run --help`). A folder
    called run, ls or validate is named ./run.
    """
    from pythia_jax.evaluation.harness import table
    from pythia_jax.evaluation.scored import Request
    from pythia_jax.evaluation.single import evaluate_one

    request = Request(_names(tasks), num_fewshot, limit, include_path)
    found, path = evaluate_one(
        model, request, revision=revision, step=step, out=out, batch_size=batch_size
    )
    click.echo(table(found))
    if path is not None:
        click.echo(f"results are in {path}")


@click.command()
@MODEL
@click.option(
    "--revisions",
    default="steps",
    show_default=True,
    help="steps: all there are. Or steps and half-open ranges, with commas: 0,1,2, "
    "1000:143000:10000 (each of them), 0:1000 (those that there are).",
)
@_TASKS
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Where results go: OUT/MODEL/zero-shot/NAME_stepN.json.",
)
@click.pass_context
def sweep(
    ctx: click.Context,
    model: str,
    revisions: str,
    tasks: str,
    out: Path,
    **settings: Any,
) -> None:
    """Score MODEL at many of its checkpoints.

    MODEL is a model on the hub (its branches stepN), a run folder (gs:// too), or a folder of
    GPT-NeoX's checkpoints (global_stepN). What has its results in OUT is passed over, so the same
    command again goes on where it was stopped.
    """
    from pythia_jax.evaluation.sweep import sweep

    done = sweep(model, revisions=revisions, tasks=_names(tasks), out=out, **settings)
    counts = f"{len(done.written)} checkpoints scored"
    if done.skipped:
        counts += f", {len(done.skipped)} were there"
    click.echo(f"{counts}: results are in {done.folder}")
    for step, why in done.failed.items():
        click.echo(f"step {step} was not scored: {why}", err=True)
    if done.failed:
        ctx.exit(1)


def _names(tasks: str) -> tuple[str, ...]:
    return tuple(name for name in (part.strip() for part in tasks.split(",")) if name)
