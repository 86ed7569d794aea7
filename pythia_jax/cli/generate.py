"""`pythia-jax generate`: text from any checkpoint, to the terminal or from file to file."""

import json
from pathlib import Path
from typing import Any

import click

from pythia_jax.cli.options import CHECKPOINT, MESH, MODEL

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@MODEL
@click.argument("prompt", required=False)
@click.option(
    "--file",
    "prompts",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help='In place of PROMPT: JSON lines, each with a text, {"prompt": …}, or ids, {"tokens": …}.',
)
@click.option("--out", type=_FILE, help="With --file: JSON lines, those of it and what is new.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help="With --file: rows at a time.  [default: 16]",
)
@click.option("--max-new-tokens", type=click.IntRange(min=0), default=20, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 is greedy.",
)
@click.option("--top-k", type=click.IntRange(min=1), help="Of the so many likeliest tokens.")
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, min_open=True, max=1),
    help="Of the fewest tokens whose probabilities reach it.",
)
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Above 1, tokens of the text so far are less likely.",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option("--stop", multiple=True, metavar="TEXT", help="Ends the text before it; may repeat.")
@click.option(
    "--cache",
    "cache_dtype",
    type=click.Choice(["bfloat16", "int8"]),
    help="Of the keys and values kept.  [default: that of the computation]",
)
@click.option("--logprobs", is_flag=True, help="Also that of each new token, in nats.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of the computation, and of weights that are not int8.",
)
@CHECKPOINT
@MESH
def generate(
    model: str,
    prompt: str | None,
    prompts: Path | None,
    out: Path | None,
    batch_size: int | None,
    **how: Any,
) -> None:
    """Continue PROMPT, or every line of a file, with MODEL.

    MODEL is a hub id (70m), or a folder of any kind (gs:// too).

    \b
        pythia-jax generate 70m "def hello_world():"
        pythia-jax generate 70m --file prompts.jsonl --out out.jsonl

    The text comes to the terminal as it is made. From file to file, what is done is kept, and the
    same command goes on after a stop.
    """
    if how["temperature"] == 0 and (how["top_k"] or how["top_p"]):
        raise click.UsageError("--top-k and --top-p go with --temperature above 0; 0 is greedy")
    if (prompt is None) == (prompts is None):
        raise click.UsageError("give one of PROMPT and --file FILE")
    if prompts is None:
        for name, value in (("--out", out), ("--batch-size", batch_size)):
            if value is not None:
                raise click.UsageError(f"{name} goes with --file FILE")
        assert prompt is not None
        _to_terminal(model, prompt, **how)
        return
    if out is None:
        raise click.UsageError("--file goes with --out FILE")
    from pythia_jax.prompts import generate_file_of

    done = generate_file_of(model, prompts, out, batch_size=batch_size or 16, **how)
    there = f", {done.before:,} of them there before" if done.before else ""
    click.echo(
        f"{done.rows:,} rows{there}; {done.tokens:,} tokens made; they are in {out}", err=True
    )


def _to_terminal(
    model: str,
    prompt: str,
    *,
    revision: str | None,
    step: int | None,
    dtype: str,
    fsdp: int,
    tensor: int,
    logprobs: bool,
    **settings: Any,
) -> None:
    import pythia_jax as pj
    from pythia_jax.model.generation import continuations
    from pythia_jax.prompts import opened_on_devices

    which = {"revision": revision, "step": step}
    with opened_on_devices(model, **which, data=1, fsdp=fsdp, tensor=tensor) as opened:
        if "tokenizer.json" not in opened.tokenizer_files:
            raise click.ClickException(f"{model}: has no tokenizer, so a prompt cannot be read")
        loaded = pj.load(model, **which, dtype=dtype)
        tokenizer = loaded.tokenizer
        assert tokenizer is not None
        typed = Typed(prompt, tokenizer)
        (row,) = continuations(
            loaded, [prompt], batch_size=1, on_tokens=lambda _, new: typed.add(new), **settings
        )
    assert row.text is not None
    typed.end(row.text)
    if logprobs:
        for token, score in zip(row.tokens, row.logprobs, strict=True):
            text = json.dumps(tokenizer.decode([token], False), ensure_ascii=False)
            click.echo(f"{score:>10.4f}  {token:>6}  {text}", err=True)
        click.echo(f"{sum(row.logprobs):>10.4f}  nats in {len(row.tokens)} tokens", err=True)


class Typed:
    """A prompt and its continuation on the terminal, as tokens come; characters wait till whole."""

    def __init__(self, prompt: str, tokenizer: Any) -> None:
        self._prompt, self._tokenizer = prompt, tokenizer
        self._tokens: list[int] = []
        self._shown = ""

    def add(self, tokens: list[int]) -> None:
        self._tokens += tokens
        self._show(self._tokenizer.decode(self._tokens).rstrip("\N{REPLACEMENT CHARACTER}"))

    def end(self, text: str) -> None:
        """text: all of the continuation."""
        self._show(text)
        click.echo()

    def _show(self, text: str) -> None:
        # The prompt comes with the first of its text: one that is refused is not echoed.
        new = text[len(self._shown) :]
        click.echo(self._prompt + new, nl=False)
        self._prompt, self._shown = "", self._shown + new
