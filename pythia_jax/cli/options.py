"""What commands share: MODEL and which checkpoint, the devices, CONFIG and its dotted flags."""

import logging
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

EXPECTED = (ValueError, OSError, IndexError, RuntimeError, MemoryError)
"""What the library raises for bad input, all told in one line; anything else is a bug."""

DOTTED = {"ignore_unknown_options": True, "allow_extra_args": True}
CONFIG_HELP = """

Any key of the config can be set:

\b
    --optimizer.peak-learning-rate 1e-3 --training.steps 100
"""
DATA_CONFIG_HELP = """

Any key of the data's config can be set:

\b
    --data.seed 5 --training.batch-size 256
"""
PREFIX_HELP = """

CONFIG is a YAML file, or the prefix of a dataset (hf:// and the like too), looked at with every
other key as Pythia had it."""
SPLIT = click.option(
    "--split",
    type=click.Choice(["train", "validation", "test"]),
    default="train",
    show_default=True,
)
RANGE = re.compile(r"(\d+):(\d+)")


class StepRange(click.ParamType):
    """A:B as `(A, B)`. That A is below B, and B there, is asked of the data."""

    name = "A:B"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = RANGE.fullmatch(value)
        if match is None:
            self.fail(f"{value!r}: two numbers, as 2990:3000 (3000 not included)", param, ctx)
        return int(match[1]), int(match[2])


def together(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """One decorator that adds several options, in this order."""

    def decorate(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def comes_first(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """`check_first` as the callback of an argument."""
    check_first(ctx, param.human_readable_name, str(value))
    return value


MODEL = click.argument("model", type=click.Path(path_type=str), callback=comes_first)
_REVISION = click.option("--revision", help="Of a model on the hub.  [default: main]")
CHECKPOINT = together(
    _REVISION,
    click.option(
        "--step", type=int, help="Checkpoint of a run folder; of a name on the hub, revision stepN."
    ),
)
CHECKPOINT_RECORDED = together(
    _REVISION,
    click.option(
        "--step",
        type=int,
        help="Checkpoint of a run folder, or revision stepN; of a Hugging Face folder, its step.",
    ),
)
"""Of commands that write down which checkpoint their results are of."""
MESH = together(
    click.option(
        "--fsdp", type=int, default=1, show_default=True, help="Devices to cut weights over."
    ),
    click.option(
        "--tensor", type=int, default=1, show_default=True, help="Devices to cut heads over."
    ),
)
POD = click.option("--pod", is_flag=True, help="Be one of several processes (docs/pods.md).")
DATA = click.option(
    "--data",
    "config",
    required=True,
    metavar="CONFIG",
    help="YAML file of the run, or the prefix of its dataset, with every other key as Pythia's.",
)
STEPS = click.option(
    "--steps", type=StepRange(), required=True, help="Of the batches; B is not included."
)


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


@contextmanager
def in_pod(pod: bool, run: Any) -> Iterator[bool]:
    """With --pod the block is of one of a run's processes; whether it is the one that speaks.

    run: the config, whose heartbeat it goes by.
    """
    from pythia_jax.training.pod import failing_at_once, is_first, join

    if not pod:
        yield True
        return
    heartbeat = run.distributed.heartbeat_seconds
    join(heartbeat)
    if not is_first():
        logging.getLogger("pythia_jax").setLevel(logging.WARNING)
    with failing_at_once(heartbeat, _tell):
        yield is_first()


def _tell(error: BaseException) -> None:
    """What ends a process of a pod, as the command line tells it of any other."""
    wanted = click.get_current_context().find_root().params.get("traceback")
    if isinstance(error, EXPECTED) and not wanted:
        click.echo(f"Error: {error}", err=True)
    else:
        traceback.print_exception(error)


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
