"""The command line: parse, call one function of the library, print."""

import logging
import sys
from pathlib import Path
from typing import Any

import click

EXPECTED = (ValueError, OSError, IndexError, RuntimeError)
"""What the library raises for bad input, all told in one line; anything else is a bug."""


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


DOTTED = {"ignore_unknown_options": True, "allow_extra_args": True}
CONFIG_HELP = """

    Any key of the config can be set: --optimizer.peak-learning-rate 1e-3 --training.steps 100
"""


@main.command(
    context_settings=DOTTED,
    help="Train CONFIG, or go on with it from its newest checkpoint." + CONFIG_HELP,
)
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--stop-at", type=int, help="Leave at this step, everything saved to go on from it.")
@click.pass_context
def train(ctx: click.Context, config: Path, stop_at: int | None) -> None:
    from pythia_jax.training.trainer import train

    result = train(_load(ctx, config), stop_at=stop_at)
    click.echo(f"checkpoint {result.step} and metrics.jsonl, loss.png are in {result.folder}")


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--max-new-tokens", type=int, default=20, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int)
@click.option("--top-p", type=float)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--step", type=int, help="Checkpoint of a run folder.  [default: the newest]")
def generate(model: Path, prompt: str, step: int | None, **settings: Any) -> None:
    """Continue PROMPT with MODEL, a Hugging Face folder or a run folder."""
    import pythia_jax as pj

    loaded = pj.load(model, step=step)
    if loaded.tokenizer is None:
        raise click.ClickException(f"{model}: has no tokenizer, so a prompt cannot be read")
    (new,) = pj.generate(loaded, [prompt], **settings)
    click.echo(prompt + loaded.tokenizer.decode(new))


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(["hf"]), default="hf", show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of the weights written.  [default: as stored]",
)
@click.option("--max-shard-size", type=int, help="Bytes in a file, before another is begun.")
@click.option("--step", type=int, help="Checkpoint of a run folder.  [default: the newest]")
def convert(
    source: Path,
    target: Path,
    to: str,
    dtype: str | None,
    max_shard_size: int | None,
    step: int | None,
) -> None:
    """Write SOURCE, a run folder or a Hugging Face folder, to the Hugging Face folder TARGET."""
    import pythia_jax as pj

    model = pj.load(source, step=step)
    pj.save_hf(model, target, dtype=dtype, max_shard_size=max_shard_size)
    click.echo(f"{model.source} -> {target}")


@main.group()
def data() -> None:
    """Make and look at .bin/.idx token data."""


@data.command()
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Prefix of the .bin and .idx files.",
)
@click.option(
    "--tokenizer",
    required=True,
    type=click.Path(path_type=Path),
    help="tokenizer.json, or a folder that holds one.",
)
@click.option("--append-eod", is_flag=True, help="End each document with <|endoftext|>.")
@click.option("--text-key", default="text", show_default=True, help="Key of the text in .jsonl.")
@click.option("--pattern", default="*", show_default=True, help="Files taken from folders.")
def tokenize(
    inputs: tuple[Path, ...],
    out: Path,
    tokenizer: Path,
    append_eod: bool,
    text_key: str,
    pattern: str,
) -> None:
    """Tokenize text files, folders and .jsonl INPUTS; one document a file or a line."""
    from tqdm import tqdm

    from pythia_jax.data import tokenize

    with tqdm(unit=" tokens", unit_scale=True, desc="tokenizing") as bar:

        def progress(documents: int, tokens: int) -> None:
            bar.update(tokens - bar.n)
            bar.set_postfix(documents=documents)

        made = tokenize(
            inputs,
            out,
            tokenizer,
            append_eod=append_eod,
            text_key=text_key,
            pattern=pattern,
            progress=progress,
        )
    click.echo(f"{made.prefix}: {made.documents:,} documents, {made.tokens:,} tokens, {made.dtype}")


@data.command(
    context_settings=DOTTED,
    help="Write the batches of steps START to STOP (not "
    "included) as a .npy of [rows, sequence_length + 1]." + CONFIG_HELP,
)
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--start", type=int, required=True)
@click.option("--stop", type=int, required=True)
@click.option(
    "--split",
    type=click.Choice(["train", "validation", "test"]),
    default="train",
    show_default=True,
)
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.pass_context
def batches(ctx: click.Context, config: Path, start: int, stop: int, split: str, out: Path) -> None:
    from pythia_jax.data import batches
    from pythia_jax.data.dump import dump

    loaded = _load(ctx, config)
    digest = dump(batches(loaded, split), start, stop, out)
    rows, width = (stop - start) * loaded.training.batch_size, loaded.data.sequence_length + 1
    click.echo(
        f"{out}: {rows:,} rows of {width:,} tokens, sha256 {digest} (as little-endian int32)"
    )


def _load(ctx: click.Context, config: Path) -> Any:
    """The run config of a command that takes dotted flags."""
    from pythia_jax import configs

    if str(config).startswith("-"):
        # Click cannot know which dotted flags take a value, so it took the first for CONFIG.
        raise click.UsageError(
            f"CONFIG comes before its flags: {ctx.command_path} CONFIG {config} ..."
        )
    return configs.load(config, _dotted(ctx.args))


def _dotted(arguments: list[str]) -> dict[str, str]:
    """`--section.key value` and `--section.key=value` as a dict; anything else is an error."""
    overrides, rest = {}, list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or ("." not in flag.partition("=")[0] and not rest):
            raise click.UsageError(f"what is {flag!r}? Config keys are set as --section.key VALUE")
        name, equals, value = flag[2:].partition("=")
        if not equals:
            if not rest:
                raise click.UsageError(f"{flag} needs a value")
            value = rest.pop(0)
        overrides[name] = value
    return overrides
