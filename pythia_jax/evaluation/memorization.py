"""Which rows of training a model recites: k-extractible memorisation over the order of training.

A row is given by its first k tokens; greedy decoding continues them by l tokens, and the score is
the fraction of these that are the row's own, place by place. A row is memorised, k-extractible, if
its score is 1. Source: Carlini et al., 2021, section 3; Biderman et al., 2023 (Pythia), section
3.2, with k = l = 32.

As upstream (EleutherAI/pythia, predictable-memorization/eval_memorization.py, whose `generate` has
`min_length` = k + l), the end-of-document token is never picked; so a row whose continuation holds
one scores less than 1.
"""

import functools
import hashlib
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Int
from numpy.typing import NDArray
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pythia_jax import sharding
from pythia_jax.bridge import Model
from pythia_jax.bridge.computed_on import computed_on
from pythia_jax.bridge.revisions import load_at, open_at
from pythia_jax.configs import MeshConfig, ModelConfig, RunConfig, Runtime
from pythia_jax.data import Batches, batches
from pythia_jax.evaluation import memorization_files as files
from pythia_jax.evaluation import training_rows
from pythia_jax.model.decode import greedy, serving
from pythia_jax.model.gptneox import AnyArray
from pythia_jax.model.parameters import Params

log = logging.getLogger(__name__)

CACHE_BYTES = 2**30
"""Of keys and values on each device, by which rows scored together are counted if nobody says."""
MOST_ROWS = 1024
"""Upstream's, and the most that are scored together if nobody says."""
_AHEAD = 2  # blocks of rows read ahead


@dataclass(frozen=True)
class Memorization:
    """What was scored: rows `start` to `stop` (not included), and how many were recited whole."""

    path: Path
    start: int
    stop: int
    memorized: int

    @property
    def fraction(self) -> float:
        return self.memorized / (self.stop - self.start)


def score(
    model: Model,
    rows: NDArray[np.integer],
    *,
    prompt_length: int = 32,
    continuation_length: int = 32,
    batch_size: int | None = None,
) -> NDArray[np.float64]:
    """The scores of rows of tokens, `[n, at least prompt + continuation]`, as float64 `[n]`.

    batch_size: rows decoded together; None goes by memory. On the mesh around us, rows are cut over
    its devices.

    Raises ValueError for lengths that do not fit the rows or the model, for tokens out of range,
    and for a batch_size that the mesh cannot cut.
    """
    _check_lengths(prompt_length, continuation_length, rows.shape[1] - 1, model.config)
    width = prompt_length + continuation_length
    _check_tokens(rows[:, :width], model.config.vocab_size, "rows")
    block = _block(model, width, len(rows), batch_size)
    blocks = (rows[at : at + block, :width] for at in range(0, len(rows), block))
    found = list(_matches(model, blocks, prompt_length, block))
    return np.concatenate([np.zeros(0), *found]) / continuation_length


def memorization(
    model: Model,
    config: RunConfig,
    out: str | os.PathLike[str],
    *,
    step: int | None = None,
    start: int = 0,
    stop: int | None = None,
    prompt_length: int = 32,
    continuation_length: int = 32,
    batch_size: int | None = None,
    show_progress: bool = True,
) -> Memorization:
    """Score the rows of a run's training order, or go on doing so, into the CSV `out`.

    Row i is `batches(config)[i // batch][i % batch]`. Lines are appended a block of rows at a time;
    a run that was stopped, or killed, goes on where it was, and gives the same file. Beside it,
    `out`.json says what it is of.

    model: on the mesh around us, over whose devices rows are cut. config: the run's data, and its
        batch size. step: of the model, if it does not tell. stop: the row after the last; None is
        what had been seen at that step.

    Raises ValueError for rows that the data has not, lengths that do not fit, a model whose step is
    not known where it is needed; as `score` and `batches` do; FileExistsError where `out` holds
    other scores; RuntimeError in a run of several processes.
    """
    if jax.process_count() > 1:
        raise RuntimeError(
            "memorisation is scored by one process at a time; give each its own rows (--start, "
            "--stop) and its own file, which are read back together"
        )
    lengths = (prompt_length, continuation_length)
    _check_lengths(*lengths, config.data.sequence_length, model.config)
    served = batches(config)
    step = model.step if step is None else step
    rows = _rows_asked(served, step, start, stop)
    block = _block(model, sum(lengths), len(rows), batch_size)
    settings, computed = _about(model, config, served, step, lengths, start, block)
    written = [str(matches / continuation_length) for matches in range(continuation_length + 1)]
    path = Path(out)
    with (
        files.opened(path, settings, computed, rows=rows, block=block) as file,
        logging_redirect_tqdm(),
        tqdm(
            total=len(rows),
            initial=min(file.next_row, rows.stop) - start,
            unit=" rows",
            desc="memorization",
            disable=not show_progress,
        ) as bar,
    ):
        left = range(file.next_row, rows.stop, block)
        places = [range(at, min(at + block, rows.stop)) for at in left]
        read = functools.partial(_read, served, sum(lengths), model.config.vocab_size)
        for matches in _matches(model, _read_ahead(read, places), prompt_length, block):
            file.append([written[n] for n in matches])
            bar.update(len(matches))
    scores = files.read(path)
    chosen = (scores.memorized >= start) & (scores.memorized < rows.stop)
    return Memorization(path, start, rows.stop, int(chosen.sum()))


def memorization_of(
    source: str | os.PathLike[str],
    config: RunConfig,
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    step: int | None = None,
    dtype: DTypeLike = jnp.float32,
    fsdp: int = 1,
    tensor: int = 1,
    **how: Any,
) -> Memorization:
    """`memorization` of a checkpoint of any kind (`bridge.load`), over all devices that there are.

    revision, step: as for `revisions.load_at`.
    fsdp, tensor: devices that the weights are cut over, for a model that does not fit one; the
    others have copies, and rows of their own. how: other arguments of `memorization`.

    Raises as both do.
    """
    mesh = sharding.make_mesh(MeshConfig(data=-1, fsdp=fsdp, tensor=tensor))
    if fsdp > 1 or tensor > 1:
        opened = open_at(source, revision=revision, step=step)
        sharding.check_fit(mesh, opened.config, math.prod(mesh.shape[a] for a in sharding.ROWS))
    with jax.set_mesh(mesh):
        model = load_at(source, revision=revision, step=step, dtype=dtype)
        return memorization(model, config, out, **how)


def _check_lengths(
    prompt: int, continuation: int, sequence_length: int, model: ModelConfig
) -> None:
    told = f"a prompt of {prompt} tokens and a continuation of {continuation}"
    if prompt < 1 or continuation < 1:
        raise ValueError(f"{told}: both must be at least 1")
    if prompt + continuation > sequence_length + 1:
        raise ValueError(f"{told} do not fit rows of {sequence_length + 1} tokens")
    if prompt + continuation > model.max_position_embeddings:
        raise ValueError(f"{told} do not fit the model's {model.max_position_embeddings} positions")


def _rows_asked(served: Batches, step: int | None, start: int, stop: int | None) -> range:
    """The rows to score; those that the model has not seen are told."""
    seen = None if step is None else step * served.batch_size
    if stop is None:
        if seen is None:
            raise ValueError(
                "the checkpoint does not tell its step, and so not what it has seen; give step "
                "(--step), or the row after the last, stop (--stop)"
            )
        stop = seen
    have = len(served) * served.batch_size
    if stop > have:
        raise ValueError(
            f"rows up to {stop:,} are wanted, but {served.name} has {have:,}: {len(served):,} "
            f"steps of {served.batch_size:,}. Set stop (--stop) to less, or training.steps of the "
            "config to more"
        )
    if not 0 <= start < stop:
        raise ValueError(
            f"rows {start:,} to {stop:,} (not included) are none"
            + (f"; at step {step} the model has seen {seen:,}" if seen is not None else "")
        )
    if seen is not None and stop > seen:
        log.warning(
            "rows from %s on come after step %d: the model has not seen them",
            f"{max(seen, start):,}",
            step,
        )
    return range(start, stop)


def _block(model: Model, width: int, rows: int, batch_size: int | None) -> int:
    """Rows decoded together: a multiple of the parts that the mesh cuts rows into."""
    config, parts = model.config, 1
    mesh = sharding.current()
    if mesh is not None:
        parts = math.prod(mesh.shape[axis] for axis in sharding.ROWS)
    if batch_size is None:
        size = jax.tree.leaves(model.params)[0].dtype.itemsize
        row = 2 * config.num_hidden_layers * width * config.hidden_size * size
        each = max(1, min(CACHE_BYTES // row, MOST_ROWS // parts))
        batch_size = parts * (1 << (each.bit_length() - 1))
    elif batch_size < 1 or batch_size % parts:
        raise ValueError(
            f"batch_size {batch_size}: rows are cut over {parts} devices; give a multiple of that"
        )
    return min(batch_size, -(-rows // parts) * parts)


def _read(served: Batches, width: int, vocab_size: int, rows: range) -> NDArray[np.int32]:
    """The first `width` tokens of rows of the order, `[n, width]`."""
    parts, at = [], rows.start
    while at < rows.stop:
        step, row = divmod(at, served.batch_size)
        count = min(served.batch_size - row, rows.stop - at)
        parts.append(served.read(step, slice(row, row + count))[:, :width])
        at += count
    tokens = np.concatenate(parts)
    _check_tokens(tokens, vocab_size, served.source)
    return tokens


def _check_tokens(tokens: NDArray[np.integer], vocab_size: int, source: str) -> None:
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise ValueError(
            f"{source}: holds token ids {tokens.min()} to {tokens.max()}, but the model's go from "
            f"0 to {vocab_size - 1}; they are not of one tokenizer"
        )


def _read_ahead(
    read: Callable[[range], NDArray[np.int32]], places: list[range]
) -> Iterator[NDArray[np.int32]]:
    """Rows of each place, in order, read while those before are computed with."""
    with ThreadPoolExecutor(1) as reader:
        reading = deque(reader.submit(read, place) for place in places[:_AHEAD])
        try:
            for place in [*places[_AHEAD:], *[None] * _AHEAD]:
                if not reading:
                    return
                rows = reading.popleft().result()
                if place is not None:
                    reading.append(reader.submit(read, place))
                yield rows
        finally:
            reader.shutdown(wait=False, cancel_futures=True)


def _matches(
    model: Model, blocks: Iterator[NDArray[np.integer]], prompt_length: int, block: int
) -> Iterator[NDArray[np.int32]]:
    """How many tokens of each row's continuation were recited; one block is always under way."""
    mesh = jax.sharding.get_mesh()
    place = None if mesh.empty else sharding.sharding(mesh, ("batch", "seq"))
    params = serving(model.params, Runtime())
    before: tuple[jax.Array, int] | None = None
    for rows in blocks:
        filled = np.zeros((block, rows.shape[1]), np.int32)
        filled[: len(rows)] = rows
        given = jax.device_put(filled, place)
        now = _recited(params, given, model.config, prompt_length, model.eod), len(rows)
        if before is not None:
            yield np.asarray(before[0])[: before[1]]
        before = now
    if before is not None:
        yield np.asarray(before[0])[: before[1]]


@functools.partial(jax.jit, static_argnames=("config", "prompt_length", "eod"))
def _recited(
    params: Params,
    rows: Int[AnyArray, "batch width"],
    config: ModelConfig,
    prompt_length: int,
    eod: int,
) -> Int[Array, " batch"]:
    prompts, own = rows[:, :prompt_length], rows[:, prompt_length:]
    new = greedy(params, prompts, config, new_tokens=own.shape[1], never=eod)
    return jnp.sum(new == own, axis=1, dtype=jnp.int32)


def _about(
    model: Model,
    config: RunConfig,
    served: Batches,
    step: int | None,
    lengths: tuple[int, int],
    start: int,
    block: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What decides the scores, and what they are computed on."""
    computed = computed_on(model.params, source=model.source)
    settings = {
        "weights": computed["weights"],
        "model": vars(model.config),
        "rows": training_rows.identity(config),
        # Other tokens of the same sizes have the same index.
        "tokens_of_batch_0": hashlib.sha256(served[0].astype("<i4").tobytes()).hexdigest(),
        "prompt_length": lengths[0],
        "continuation_length": lengths[1],
        "never_picked": model.eod,
        "start": start,
    }
    computed |= {
        "step": step,
        "data": served.source,
        "rows_per_step": served.batch_size,
        "rows_together": block,
    }
    return settings, computed
