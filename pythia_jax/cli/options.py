"""What commands share: a CONFIG argument with dotted flags that set any of its keys."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

DOTTED = {"ignore_unknown_options": True, "allow_extra_args": True}
CONFIG_HELP = """

    Any key of the config can be set:

    \b
        --optimizer.peak-learning-rate 1e-3 --training.steps 100
"""
PREFIX_HELP = """

    CONFIG is a YAML file, or the prefix of a dataset (hf:// and the like too), looked at with
    every other key as Pythia had it."""
SPLIT = click.option(
    "--split",
    type=click.Choice(["train", "validation", "test"]),
    default="train",
    show_default=True,
)


def load_config(
    ctx: click.Context,
    config: str | Path,
    *,
    more: Mapping[str, str] | None = None,
    prefix_allowed: bool = False,
) -> Any:
    """The run config of a command that takes dotted flags.

    more: keys that options of the command set. prefix_allowed: what does not end in .yaml or .yml
    is the prefix of a dataset, and the config all defaults with it as `data.train`.
    """
    from pythia_jax import configs

    check_first(ctx, "CONFIG", str(config))
    overrides = {**(more or {}), **dotted(ctx.args)}
    if prefix_allowed and not str(config).endswith((".yaml", ".yml")):
        return configs.for_data(str(config), overrides)
    return configs.load(config, overrides)


def check_first(ctx: click.Context, name: str, value: str) -> None:
    """Refuse a flag in the place of the argument `name`, of a command that takes dotted flags.

    Click cannot know which of these take a value, and so took the first for the argument.
    """
    if value.startswith("-"):
        raise click.UsageError(
            f"{name} comes before its flags: {ctx.command_path} {name} {value} ..."
        )


def dotted(arguments: list[str]) -> dict[str, str]:
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
