"""The command line: parse, call one function of the library, print."""

import logging
import signal
import sys
from pathlib import Path
from typing import Any

import click

from pythia_jax.cli.activations import activations
from pythia_jax.cli.attribute import attribute
from pythia_jax.cli.audit import audit
from pythia_jax.cli.bridge import convert, tell
from pythia_jax.cli.counterfactual import counterfactual
from pythia_jax.cli.data import data
from pythia_jax.cli.evaluate import evaluate, sweep
from pythia_jax.cli.generate import generate
from pythia_jax.cli.gradients import gradients
from pythia_jax.cli.intervene import intervene
from pythia_jax.cli.lens import lens
from pythia_jax.cli.memorization import memorization
from pythia_jax.cli.options import (
    CONFIG_HELP,
    DOTTED,
    EXPECTED,
    POD,
    dotted,
    in_pod,
    load_config,
)
from pythia_jax.cli.plan import plan
from pythia_jax.cli.plots import plot
from pythia_jax.cli.quantize import quantize
from pythia_jax.cli.term_frequency import term_frequency
from pythia_jax.cli.update import update

START_AGAIN = 75
"""Exit status of `train` when it was told to leave and has saved everything (EX_TEMPFAIL)."""

INTERRUPTED = 128 + signal.SIGINT
"""Exit status after Ctrl-C; of `train` after a second one."""


class _Group(click.Group):
    """Turns the library's own errors into one line, unless --traceback asks for all of it."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EXPECTED as error:
            if ctx.params.get("traceback") or isinstance(
                error, (click.exceptions.Exit, BrokenPipeError)
            ):
                raise
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            click.echo("Interrupted", err=True)
            ctx.exit(INTERRUPTED)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--traceback", is_flag=True, help="Show where an error came from.")
@click.version_option(package_name="pythia-jax")
def main(traceback: bool) -> None:
    """Pythia in JAX: train, evaluate, open up and export GPT-NeoX models."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("pythia_jax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.ERROR)


@main.command()
@click.option("--out", type=click.Path(path_type=Path), default="quickstart", show_default=True)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    multiple=True,
    help="File or folder to learn from; may be repeated.  [default: Python's own library]",
)
def quickstart(out: Path, text: tuple[Path, ...]) -> None:
    """Text to tokens to a trained, resumed, evaluated, exported model, in about three minutes."""
    from pythia_jax.quickstart import quickstart

    summary = quickstart(out, text, say=click.echo)
    click.echo(summary.text())


@main.command()
def suite() -> None:
    """The ten models: sizes, learning rates, revisions and known faults."""
    from pythia_jax.configs import ModelConfig
    from pythia_jax.model.parameters import count
    from pythia_jax.suite import CHECKPOINT_STEPS, COMMON_FAULTS, SUITE

    header = ("size", "layers", "width", "heads", "parameters", "non-embedding", "peak lr")
    header += ("batch/GPU", "GPUs", "runs", "faults")
    rows, faults = [], []
    for entry in SUITE.values():
        config = ModelConfig.from_size(entry.size)
        notes = []
        for fault in entry.known_faults:
            if fault not in faults:
                faults.append(fault)
            notes.append(str(faults.index(fault) + 1))
        rows.append(
            (
                entry.size,
                str(entry.num_hidden_layers),
                str(entry.hidden_size),
                str(entry.num_attention_heads),
                f"{count(config):,}",
                f"{count(config, embedding=False):,}",
                f"{entry.peak_learning_rate:g}",
                f"{entry.micro_batch} x {entry.gradient_accumulation}",
                str(entry.gpus),
                "both" if entry.deduped else "standard",
                ",".join(notes) or "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        click.echo("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    click.echo(
        f"\nRevisions: step0, step1, step2, step4 … step512, step1000 … step143000, "
        f"{len(CHECKPOINT_STEPS)} of each run. Runs: 'both' is the standard and the deduplicated "
        "Pile (pythia-SIZE, pythia-SIZE-deduped)."
    )
    click.echo("\nKnown faults")
    for i, fault in enumerate(faults):
        click.echo(f"  {i + 1:>3}  {fault}")
    for fault in COMMON_FAULTS:
        click.echo(f"  all  {fault}")


@main.command(
    context_settings=DOTTED,
    help="Train CONFIG, or go on with it from its newest checkpoint." + CONFIG_HELP,
)
@click.argument("config", type=click.Path(path_type=Path), required=False)
@click.option("--stop-at", type=int, help="Leave at this step, everything saved to go on from it.")
@POD
@click.option("--profile", type=click.IntRange(min=0), default=0, help="Trace so many steps.")
@click.option(
    "--from", "model", help="Begin with these weights: a hub id, or a folder of any kind."
)
@click.option("--revision", help="With --from: of a model on the hub.  [default: that of --step]")
@click.option(
    "--step",
    type=int,
    help="With --from: where in data and schedule to begin; of a folder of several, which "
    "checkpoint; of a name on the hub, its revision stepN.",
)
@click.option(
    "--optimizer-state",
    help="With --from: checkpoint (of a run folder or GPT-NeoX's), rebuild:K (from the batches of "
    "the last K steps) or zero.  [default: zero]",
)
@click.option(
    "--from-neox",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A GPT-NeoX YAML file in place of CONFIG; may be repeated.",
)
@click.option("--gpus", type=int, help="With --from-neox: how many the run was on.")
@click.option("--vocab-size", type=int, help="With --from-neox: of the tokenizer, unpadded.")
@click.pass_context
def train(
    ctx: click.Context,
    config: Path | None,
    stop_at: int | None,
    pod: bool,
    profile: int,
    **given: Any,
) -> None:
    from pythia_jax.bridge.start import prepare
    from pythia_jax.evaluation.in_training import evaluator
    from pythia_jax.training.preemption import Preempted
    from pythia_jax.training.trainer import train

    run = _run_of(ctx, config, given)
    try:
        with in_pod(pod, run) as first:
            run, initial = prepare(run)
            result = train(
                run,
                initial=initial,
                evaluate=evaluator(run),
                stop_at=stop_at,
                profile_steps=profile,
            )
    except Preempted as notice:
        click.echo(f"Stopped: {notice}", err=True)
        ctx.exit(START_AGAIN)
    if first:
        say = "checkpoint {} and metrics.jsonl, loss.png are in {}"
        click.echo(say.format(result.step, result.folder))


_START = ("model", "revision", "step", "optimizer_state")
"""Options of `train` that are keys of `initialize_from`."""


def _run_of(ctx: click.Context, config: Path | None, given: dict[str, Any]) -> Any:
    """The run that `train` is asked for: a CONFIG or GPT-NeoX's files, and where it begins."""
    start = {key: str(given[key]) for key in _START if given[key] is not None}
    if start and "model" not in start:
        raise click.UsageError(f"--{next(iter(start)).replace('_', '-')} goes with --from MODEL")
    overrides = {f"initialize_from.{key}": value for key, value in start.items()}
    files, asked = given["from_neox"], {key: given[key] for key in ("gpus", "vocab_size")}
    if not files:
        for key, value in asked.items():
            if value is not None:
                raise click.UsageError(f"--{key.replace('_', '-')} goes with --from-neox FILE")
        if config is None:
            raise click.UsageError("Missing argument 'CONFIG'.")
        return load_config(ctx, config, more=overrides)
    from pythia_jax import configs
    from pythia_jax.bridge import neox_config

    # Click takes a dotted flag for CONFIG, where there is none.
    if config is not None and not str(config).startswith("-"):
        raise click.UsageError(f"CONFIG ({config}) and --from-neox FILE: give one of them")
    flags = dotted([*(() if config is None else (str(config),)), *ctx.args])
    read = neox_config.read(*files, **asked)
    tell(read, flags)
    return configs.overridden(read.run, {**overrides, **flags}, str(files[-1]))


for command in (
    activations,
    attribute,
    audit,
    convert,
    counterfactual,
    data,
    evaluate,
    generate,
    gradients,
    intervene,
    lens,
    memorization,
    plan,
    plot,
    quantize,
    sweep,
    term_frequency,
    update,
):
    main.add_command(command)
