"""Prompts in a file, their continuations in another: JSON lines, gone on with after a stop.

A line of the one is an object with a text under `prompt` or token ids under `tokens`; the line of
the other has all of it, and

    continuation  the new text, if the model has a tokenizer
    new_tokens    its ids
    ended         eod, stop or length
    logprobs      if asked for, of each new token, in nats

Until all are there, rows lie in OUT.partial in the order in which they were done, below a line that
says what they are of. A run that goes on with it must have the same settings, and gives the same
file: but for the rounding of sums, a row depends on its line and the settings alone.
"""

import hashlib
import json
import logging
import math
import os
import re
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from tokenizers import Tokenizer
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pythia_jax import sharding
from pythia_jax.bridge import Model, Opened, load, open_any
from pythia_jax.bridge.computed_on import computed_on
from pythia_jax.bridge.model import tokenizer_of
from pythia_jax.configs import MeshConfig, ModelConfig
from pythia_jax.evaluation.sidecars import differing
from pythia_jax.files import locked, write_whole, written_whole
from pythia_jax.model.decode import dtype_of
from pythia_jax.model.generation import (
    Continuation,
    NotFiniteError,
    check_prompt,
    check_settings,
    continuations,
    encoded,
)

log = logging.getLogger(__name__)

ADDED = ("continuation", "new_tokens", "ended", "logprobs")
"""Keys of a row that a prompt's line may not have."""
_TOLD = 5  # bad lines that an error names


@dataclass(frozen=True)
class Settings:
    """What decides the rows, beside the model and the prompts: arguments of `pj.generate`.

    seed: of it each line has a seed of its own. logprobs: whether they are written.
    """

    max_new_tokens: int = 20
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    cache_dtype: str | None = None
    logprobs: bool = False

    def drawing(self) -> dict[str, Any]:
        """Those of `continuations` but the seed."""
        kept = asdict(self)
        del kept["seed"], kept["logprobs"]
        return kept


@dataclass(frozen=True)
class Prompts:
    """The prompts of a file.

    lines: the line of each, from 1. tokens: of each. sha256: of the file.
    """

    path: Path
    lines: list[int]
    tokens: list[Sequence[int]] = field(repr=False)
    sha256: str


@dataclass(frozen=True)
class Generated:
    """What was done: `rows` in `path`, of which `before` were there already; tokens made now."""

    path: Path
    rows: int
    before: int
    tokens: int


def generate_file(
    model: Model,
    prompts: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    batch_size: int = 16,
    show_progress: bool = True,
    **settings: Any,
) -> Generated:
    """Continue every prompt of a file, or go on doing so.

    model: on the mesh around us, if there is one. batch_size: rows at a time; it decides nothing
    else. settings: those of `Settings`.

    Raises ValueError, which names the lines, for prompts that cannot be continued, and as
    `pj.generate` does; FileExistsError where `out` is there, or where what a stop left of it is of
    other settings; RuntimeError where another process is writing it.
    """
    asked, path = Settings(**settings), Path(out)
    _check_out(path)
    check_settings(model.tokenizer, batch_size=batch_size, **asked.drawing())
    found = read(prompts, model.config, model.tokenizer, asked.max_new_tokens)
    return _generate(model, found, path, asked, batch_size, show_progress)


def generate_file_of(
    source: str | os.PathLike[str],
    prompts: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    step: int | None = None,
    dtype: DTypeLike = jnp.float32,
    fsdp: int = 1,
    tensor: int = 1,
    batch_size: int = 16,
    show_progress: bool = True,
    **settings: Any,
) -> Generated:
    """`generate_file` of a checkpoint of any kind (`pj.load`), over all devices that there are.

    fsdp, tensor: devices that the weights are cut over, for a model that does not fit one; the
    others have copies, and rows of their own. Prompts are looked at before weights are read.

    Raises as both do.
    """
    asked, path = Settings(**settings), Path(out)
    _check_out(path)
    which = {"revision": revision, "step": step}
    with opened_on_devices(source, **which, data=-1, fsdp=fsdp, tensor=tensor) as opened:
        tokenizer = tokenizer_of(opened.tokenizer_files)
        check_settings(tokenizer, batch_size=batch_size, **asked.drawing())
        found = read(prompts, opened.config, tokenizer, asked.max_new_tokens)
        model = load(source, **which, dtype=dtype)
        return _generate(model, found, path, asked, batch_size, show_progress)


@contextmanager
def opened_on_devices(
    source: str | os.PathLike[str],
    *,
    revision: str | None,
    step: int | None,
    data: int,
    fsdp: int,
    tensor: int,
) -> Iterator[Opened]:
    """A checkpoint, its weights not read yet, with a mesh around us that its model fits.

    data: copies of the weights; -1 is as many as there are devices for.

    Raises ConfigError for a mesh that does not fit the devices or the model, and as `open_any`.
    """
    devices = jax.devices()[: None if data == -1 else data * fsdp * tensor]
    mesh = sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)
    opened = open_any(source, revision=revision, step=step)
    sharding.check_fit(mesh, opened.config, math.prod(mesh.shape[a] for a in sharding.ROWS))
    with jax.set_mesh(mesh):
        yield opened


def read(
    path: str | os.PathLike[str],
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    max_new_tokens: int,
) -> Prompts:
    """The prompts of a file, each looked at.

    Raises FileNotFoundError, and ValueError, which names the lines, for prompts that are empty, no
    JSON, not of the vocabulary or too long.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: is no file, and prompts are read from one, twice")
    digest, lines, tokens, wrong = hashlib.sha256(), [], [], []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            digest.update(line)
            if line.isspace():
                continue
            try:
                row = _tokens(_record(line), tokenizer)
                check_prompt(row, config, max_new_tokens)
            except ValueError as error:
                wrong.append(f"line {number}: {error}")
            else:
                lines.append(number)
                tokens.append(array("i", row))
    if wrong:
        more = f"; and {len(wrong) - _TOLD:,} more" if len(wrong) > _TOLD else ""
        raise ValueError(f"{path}: {'; '.join(wrong[:_TOLD])}{more}")
    if not lines:
        raise ValueError(f'{path}: holds no prompts; give a line like {{"prompt": "Once"}} of each')
    return Prompts(path, lines, tokens, digest.hexdigest())


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return record


def _tokens(record: dict[str, Any], tokenizer: Tokenizer | None) -> list[int]:
    if ("prompt" in record) == ("tokens" in record):
        raise ValueError("give one of prompt (text) and tokens (ids)")
    taken = [key for key in ADDED if key in record]
    if taken:
        raise ValueError(f"has the key {taken[0]}, which is written here; rename it")
    if "tokens" in record:
        tokens = record["tokens"]
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise ValueError("tokens is no list of token ids")
        return tokens
    text = record["prompt"]
    if not isinstance(text, str):
        raise ValueError("prompt is no text; token ids go under tokens")
    if tokenizer is None:
        raise ValueError("prompt is text, and the model has no tokenizer; give tokens")
    return encoded(text, tokenizer)


def _check_out(path: Path) -> None:
    if path.exists():
        raise FileExistsError(f"{path}: is there already; name another file, or move it away")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent} to write it in")


def _generate(
    model: Model,
    prompts: Prompts,
    out: Path,
    asked: Settings,
    batch_size: int,
    show_progress: bool,
) -> Generated:
    made, total = 0, len(prompts.lines)
    settings, computed = _about(model, prompts, asked, batch_size)
    with _partial(out, settings, computed) as rows:
        left = [i for i, line in enumerate(prompts.lines) if line not in rows.places]
        before = total - len(left)
        if before:
            log.info("%s: %d of %d rows are there; going on", rows.path, before, total)
        began = time.perf_counter()
        seeds = [_seed(asked.seed, prompts.lines[i]) for i in left]
        with (
            logging_redirect_tqdm(),
            tqdm(
                total=total,
                initial=before,
                unit=" rows",
                desc="generate",
                disable=not show_progress,
            ) as bar,
        ):
            tokens = [prompts.tokens[i] for i in left]
            how = {"batch_size": batch_size, "seed": seeds, **asked.drawing()}
            try:
                for row in continuations(model, tokens, **how):
                    rows.add(prompts.lines[left[row.index]], _written(row, asked.logprobs))
                    made += len(row.tokens)
                    rate = made / (time.perf_counter() - began)
                    bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
                    bar.update()
            except NotFiniteError as error:
                line = prompts.lines[left[error.index]]
                raise ValueError(f"{prompts.path}: line {line}: {error.why}") from None
        _write(prompts, rows, out)
    rows.path.unlink()
    return Generated(out, total, before, made)


def _seed(seed: int, line: int) -> int:
    """Of a line, whichever others are generated with it: 32 bits of both."""
    return int(np.random.SeedSequence((seed, line)).generate_state(1)[0])


def _about(
    model: Model, prompts: Prompts, asked: Settings, batch_size: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What decides the rows, and what they are computed on."""
    computed = computed_on(model.params, source=model.source)
    tokenizer = model.tokenizer_files.get("tokenizer.json")
    settings = {
        "dtype": dtype_of(model.params),
        "weights": computed["weights"],
        "model": vars(model.config),
        "tokenizer": None if tokenizer is None else hashlib.sha256(tokenizer).hexdigest(),
        "prompts": prompts.sha256,
        **asdict(asked),
    }
    return settings, {**computed, "rows_together": batch_size}


def _written(row: Continuation, logprobs: bool) -> dict[str, Any]:
    """A row as the file has it, beside what its prompt's line has."""
    text = {} if row.text is None else {"continuation": row.text}
    scores = {"logprobs": row.logprobs} if logprobs else {}
    return {**text, "new_tokens": row.tokens, "ended": row.ended, **scores}


class _Rows:
    """The rows that are there, in OUT.partial: a line that says what they are of, then one each.

    places: where in the file the row of a line of prompts begins.
    """

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self._file = path, file
        self.places: dict[int, int] = {}
        self._end = 0

    def enter(self, settings: dict[str, Any], computed: dict[str, Any]) -> None:
        """Hold the file against what is asked, and find its rows; part of one is cut off."""
        about: dict[str, Any] = {}
        self._file.seek(0)
        try:
            for line in self._file:
                if not line.endswith(b"\n"):
                    break
                row = json.loads(line)
                if not about:
                    about = {key: row[key] for key in ("settings", "computed")}
                else:
                    self.places[int(row["line"])] = self._end
                self._end += len(line)
            others = differing(about["settings"], settings)
            changed = differing(about["computed"], computed)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{self.path}: is damaged, or was not written by generate; move it away to begin "
                "anew"
            ) from None
        if others:
            raise FileExistsError(
                f"{self.path} holds other rows: {'; '.join(others)}. Ask for the same to go on "
                "with it, name another file, or move it away to begin anew"
            )
        if changed:
            log.warning("%s: went on otherwise than begun: %s", self.path, "; ".join(changed))
        self._file.truncate(self._end)

    def add(self, line: int, row: dict[str, Any]) -> None:
        """Write a row, which is there when this returns, should the process be killed."""
        text = json.dumps({"line": line, **row}).encode() + b"\n"
        self._file.write(text)
        self._file.flush()
        self.places[line] = self._end
        self._end += len(text)

    def row(self, line: int) -> dict[str, Any]:
        self._file.seek(self.places[line])
        row = json.loads(self._file.readline())
        del row["line"]
        return row


@contextmanager
def _partial(out: Path, settings: dict[str, Any], computed: dict[str, Any]) -> Iterator[_Rows]:
    """The rows of what is to be `out`, whether or not there are any yet."""
    path = out.with_name(f"{out.name}.partial")
    settings, computed = json.loads(json.dumps([settings, computed]))
    try:
        with locked(out.with_name(f".{out.name}.lock"), seconds=0):
            _check_out(out)
            for left in out.parent.iterdir():
                # Of one that was killed while it wrote OUT (`written_whole`).
                if re.fullmatch(rf"\.{re.escape(out.name)}\.\d+\.partial", left.name):
                    left.unlink()
            if not path.exists():
                about = {"settings": settings, "computed": computed}
                write_whole(path, json.dumps(about).encode() + b"\n")
            with path.open("a+b") as file:
                rows = _Rows(path, file)
                rows.enter(settings, computed)
                try:
                    yield rows
                finally:
                    if not rows.places:  # of settings that were refused, for one
                        path.unlink()
    except BlockingIOError:
        raise RuntimeError(f"{out}: another process is writing this file") from None


def _write(prompts: Prompts, rows: _Rows, out: Path) -> None:
    """Every prompt's line with what was added to it, in their order."""
    places = set(prompts.lines)
    with prompts.path.open("rb") as source:
        if hashlib.file_digest(source, "sha256").hexdigest() != prompts.sha256:
            raise ValueError(
                f"{prompts.path}: has changed while it was generated from; put it back as it was, "
                f"and the same command makes {out} of {rows.path}"
            )
        source.seek(0)
        with written_whole(out) as file:
            for number, line in enumerate(source, 1):
                if number in places:
                    row = {**json.loads(line), **rows.row(number)}
                    file.write(json.dumps(row).encode() + b"\n")
