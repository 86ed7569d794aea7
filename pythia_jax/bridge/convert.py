"""Any kind of checkpoint to any other, a layer at a time; nothing is left half-written."""

import dataclasses
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from jax.typing import DTypeLike
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pythia_jax import suite
from pythia_jax.bridge import (
    card,
    hf_config,
    hf_in,
    hf_out,
    hub,
    neox_in,
    neox_out,
    replacing,
    run_in,
    run_out,
)
from pythia_jax.bridge.opened import Opened
from pythia_jax.configs import ModelConfig
from pythia_jax.data.storage import is_url
from pythia_jax.model.parameters import TABLE, Parameter
from pythia_jax.training.bucket import path_of
from pythia_jax.training.checkpoints import RESUME, SCHEDULED

Kind = Literal["hf", "orbax", "neox"]
"""What a checkpoint may be written as: a folder for `transformers`, a step of one of our run
folders, a folder of GPT-NeoX's."""
_ONLY = {"max_shard_size": "hf", "as_pythia": "hf", "model_parallel": "neox"}
"""Arguments that mean something for one kind only."""


def open_any(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    step: int | None = None,
    config: ModelConfig | None = None,
    cache_dir: str | Path | None = None,
) -> Opened:
    """A checkpoint of any kind, wherever it lies; of its weights nothing has been read yet.

    path_or_id: a Hugging Face folder, a GPT-NeoX folder, a run folder (gs:// too), or the name of
        a model on the hub; a folder that is there goes before a name.
    revision: of a model on the hub. step: which checkpoint of a run folder (None is the newest), of
        GPT-NeoX's `global_stepN` folders, or of a model on the hub, revision stepN.
    config: the model of a GPT-NeoX folder that does not tell.

    Raises FileNotFoundError, with all that was looked for, where there is nothing, ValueError for
    arguments that do not go together, and ConfigError and CheckpointError for what is there and
    cannot be used.
    """
    if is_url(path_or_id):
        _refuse(path_or_id, "a run folder on a bucket", revision=revision, config=config)
        return run_in.open_folder(path_of(path_or_id), step)
    folder = Path(path_or_id)
    if folder.is_dir():
        return _open_folder(folder, revision, step, config)
    name = folder.as_posix()
    if folder.exists() or not hub.is_hub_name(name):
        raise FileNotFoundError(_nothing(folder))
    _refuse(name, "a model on the hub", config=config)
    try:
        found = hub.fetch(name, revision=revision, step=step, cache_dir=cache_dir)
    except (FileNotFoundError, ConnectionError) as error:
        raise type(error)(f"{error}. There is no folder {name} here either") from error
    return _from_hub(hf_in.open_folder(found), hub.hub_id(name), revision, step)


def _open_folder(
    folder: Path, revision: str | None, step: int | None, config: ModelConfig | None
) -> Opened:
    _refuse(folder, "a folder", revision=revision)
    if hf_config.is_hf_folder(folder):
        _refuse(folder, "a Hugging Face folder, of one checkpoint", step=step, config=config)
        return hf_in.open_folder(folder)
    if run_in.is_run_folder(folder):
        _refuse(folder, "a run folder", config=config)
        return run_in.open_folder(folder, step)
    chosen = folder if step is None else folder / f"global_step{step}"
    if neox_in.is_neox_folder(chosen):
        return neox_in.open_folder(chosen, config)
    if not neox_in.is_neox_folder(folder):
        raise FileNotFoundError(_nothing(folder))
    opened = neox_in.open_folder(folder, config)
    if opened.step != step:
        raise FileNotFoundError(f"{folder}: holds step {opened.step}, and no global_step{step}")
    return opened


def _from_hub(opened: Opened, repo: str, revision: str | None, step: int | None) -> Opened:
    """With what is known of a model by its name."""
    at = revision if revision is not None else "main" if step is None else f"step{step}"
    facts = {}
    if repo.startswith("EleutherAI/"):
        with suppress(ValueError):  # EleutherAI has other models too
            facts = card.published_facts(repo)
    known = hub.STEP.fullmatch(at)
    if known is not None:
        step = int(known[1])
    elif facts and at == "main":
        step = suite.TOTAL_STEPS
    facts = {**opened.facts, **facts}
    return dataclasses.replace(opened, source=f"{repo} {at}", step=step, facts=facts)


def _refuse(name: object, what: str, **arguments: object) -> None:
    for argument, value in arguments.items():
        if value is not None:
            flag = argument if argument == "config" else _flag(argument)
            raise ValueError(f"{name} is {what}, for which {flag} means nothing; drop it")


def _flag(argument: str) -> str:
    """An argument as Python has it, and as the command line does."""
    return f"{argument} (--{argument.replace('_', '-')})"


def _nothing(path: Path) -> str:
    """What was looked for at a path, and not found."""
    moved = replacing.interrupted(path)
    if moved is not None:
        return (
            f"{path}: an export was killed as it was replacing this folder; what it held is whole "
            f"in {moved}. Move that back to {path}, or export again"
        )
    if (hint := _part_of_run(path)) is not None:
        return hint
    kinds = (
        "a Hugging Face folder (config.json), a run folder (config.yaml) or a GPT-NeoX folder "
        "(layer_*-model_*-model_states.pt or mp_rank_*_model_states.pt, or `latest`)"
    )
    if path.is_dir():
        return f"{path}: this folder is neither {kinds.replace(' or a GPT', ' nor a GPT')}"
    if path.exists():
        return f"{path} is a file; wanted is {kinds}"
    return (
        f"{path}: there is no such folder; wanted is {kinds}, a run folder at gs://BUCKET/RUN, or "
        "the name of a model on the hub (ORG/NAME, or one of the suite such as pythia-70m)"
    )


def _part_of_run(path: Path) -> str | None:
    """What to ask for in place of a folder inside of a run folder."""
    own = path.absolute()
    for inside in (own, own.parent):
        run = inside.parent
        if inside.name not in (SCHEDULED, RESUME) or not run_in.is_run_folder(run):
            continue
        named = Path(os.path.relpath(run)) if not path.is_absolute() else run
        step = "" if inside == own or not own.name.isdigit() else f" with --step {int(own.name)}"
        return f"{path}: a part of a run folder; did you mean {named}{step}?"
    return None


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: Kind = "hf",
    revision: str | None = None,
    step: int | None = None,
    config: ModelConfig | None = None,
    dtype: DTypeLike | None = None,
    max_shard_size: int | str | None = None,
    as_pythia: bool | None = None,
    model_parallel: int | None = None,
    tokenizer: Path | None = None,
    cache_dir: str | Path | None = None,
    show_progress: bool = True,
) -> Opened:
    """Write a checkpoint of any kind (`open_any`) to a folder, as `to` says; returns what was read.

    In memory are a few layers at a time, at least the largest tensor, and no more for a larger
    model. Steps of one model may be converted to one run folder, one after the other.

    step: as for `open_any`; of a Hugging Face folder, which does not tell, the step that it is of.
    dtype: None keeps the one the weights are stored in. max_shard_size, as_pythia: of a Hugging
    Face folder, `hf_out.save` tells. model_parallel: ranks of a GPT-NeoX folder; None is 1.
    tokenizer: a `tokenizer.json`, or a folder that holds one, in place of the source's own.

    Raises as `open_any` and the writers do (`hf_out`, `run_out`, `neox_out`), and ValueError where
    the target would take the place of the source, or for an argument of another kind. What was at
    the target stays if anything fails.
    """
    given = {
        "max_shard_size": max_shard_size,
        "as_pythia": as_pythia or None,
        "model_parallel": model_parallel,
    }
    if to not in get_args(Kind):
        raise ValueError(f"to={to!r} is not one of {', '.join(get_args(Kind))}")
    for name, kind in _ONLY.items():
        if given[name] is not None and kind != to:
            raise ValueError(
                f"{_flag(name)} is of conversions to {kind}, and this is one to {to}; drop it, or "
                f"choose {_flag('to')} {kind}"
            )
    folder = Path(target)
    if is_url(target):
        raise ValueError(f"{target}: conversions are written to folders of this machine")
    check_apart(source, folder)
    files = None if tokenizer is None else hf_config.read_tokenizer(tokenizer)
    told = to != "hf" and not is_url(source) and hf_config.is_hf_folder(Path(source))
    opened = open_any(
        source,
        revision=revision,
        step=None if told else step,
        config=config,
        cache_dir=cache_dir,
    )
    if told:
        opened = dataclasses.replace(opened, step=step)
    if files is not None:
        opened = dataclasses.replace(opened, tokenizer_files=files)
    with logging_redirect_tqdm(), shown(opened, show_progress) as watched:
        if to == "hf":
            hf_out.save(
                watched,
                folder,
                dtype=dtype,
                max_shard_size=max_shard_size,
                as_pythia=bool(as_pythia),
            )
        elif to == "neox":
            ranks = 1 if model_parallel is None else model_parallel
            neox_out.save(watched, folder, dtype=dtype, model_parallel=ranks)
        else:
            run_out.save(watched, folder, dtype=dtype)
    return opened


def check_apart(source: str | os.PathLike[str], target: Path) -> None:
    """Refuse to write over what is read."""
    if is_url(source) or not Path(source).exists():
        return
    if Path(source).resolve().is_relative_to(target.resolve()):
        raise ValueError(f"{target}: {source} lies there, and would be lost; choose another place")


@contextmanager
def shown(opened: Opened, show: bool, what: str = "converting") -> Iterator[Opened]:
    """The checkpoint with a bar that goes on as its tensors are read."""
    total = sum(len(opened.layers(parameter)) for parameter in TABLE)
    lock, seen = threading.Lock(), set()
    with tqdm(total=total, unit=" tensors", desc=what, disable=not show) as bar:

        def read(parameter: Parameter, layer: int) -> np.ndarray:
            value = opened.read(parameter, layer)
            with lock:
                bar.update((parameter.path, layer) not in seen)
                seen.add((parameter.path, layer))
            return value

        yield dataclasses.replace(opened, read=read)
