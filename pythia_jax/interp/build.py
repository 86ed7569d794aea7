"""Building a gradient index over the exact batches of training.

Chunk after chunk of rows goes through one compiled program: a forward and a backward pass, with
sinks that leave each row's gradient of the linear modules and nothing else. While a chunk is
computed, the next one is read and the one before it is written.
"""

import dataclasses
import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from numpy.typing import NDArray
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import pythia_jax
from pythia_jax import sharding
from pythia_jax.bridge import Model
from pythia_jax.bridge.revisions import load_at, open_at, weights_hash
from pythia_jax.configs import MeshConfig, RunConfig, Runtime
from pythia_jax.data import Batches, batches, load_tokenizer
from pythia_jax.data.storage import is_url
from pythia_jax.interp import bergson, index_writer, preflight, result_folder, training_rows
from pythia_jax.interp.chunks import Chunks
from pythia_jax.interp.index import (
    GRADIENTS,
    PRECISIONS,
    ROW,
    Index,
    layout,
    open_index,
    table,
    unfinished,
    width,
)
from pythia_jax.interp.passages import TOKENIZER
from pythia_jax.interp.preflight import Memory, in_bytes, in_time
from pythia_jax.interp.projection import Projection
from pythia_jax.interp.result_folder import PROVENANCE, RUN
from pythia_jax.training.agreement import all_say

log = logging.getLogger(__name__)

PROJECTION = Projection()
"""Of an index, if nobody says otherwise."""
_AHEAD = 2  # chunks read ahead, and as many on their way to the disk


def build_index(
    model: Model,
    config: RunConfig,
    start: int,
    stop: int,
    out: str | os.PathLike[str],
    *,
    unit: Literal["sequence", "document"] = "sequence",
    projection: Projection | None = PROJECTION,
    precision: str = "float32",
    rows: int | None = None,
    batch: int | None = None,
    opened: dict[str, Any] | None = None,
    runtime: Runtime = Runtime(),
    show_progress: bool = True,
) -> Index:
    """Build an index of the batches of steps `start` to `stop` (not included), or go on with it.

    A row is the gradient of a sequence's summed losses in nats, or with `unit="document"` of those
    of one document's tokens in it, in context. A stopped build goes on at the chunk that was being
    written, and gives the same bytes as one made in one go. In a run of several processes, on a
    mesh over all of them, all call this together and share the folder.

    model: on the mesh around us. config: the run whose data, order and batch size they are.
    projection: None stores whole gradients. precision: of what is stored. rows: a sample of so many
    sequences, evenly spread. batch: rows computed together; None goes by memory. opened: the
    arguments of `load` that made the model, by which a query finds it again.

    Raises ValueError for what does not fit together and for a gradient that cannot be stored,
    naming the row; FileExistsError if `out` is something else, with the settings that differ;
    OSError and MemoryError with the numbers, before anything is written, for what does not fit.
    """
    out = Path(out)
    served, wanted = batches(config), Wanted(unit, projection, precision, rows)
    _check(model, config, served, start, stop, wanted)
    settings = _settings(model, config, served, start, stop, wanted)
    settings["compute_dtype"] = runtime.dtype
    with result_folder.alone(out):
        before = index_writer.saved(out, settings)
        if (out / PROVENANCE).exists():
            log.info("%s: this index is finished already", out)
            return open_index(out)
        length = config.data.sequence_length + 1
        found = table(served, length, range(start, stop), unit, rows)
        if not len(found):
            raise ValueError(f"steps {start} to {stop}: no document has a token to predict")
        dtype = PRECISIONS[precision]
        row_bytes = width(layout(model.config, projection)[0]) * dtype.itemsize
        _check_disk(out, len(found), row_bytes)
        if before is not None:
            batch = result_folder.check_together(batch, before, out)
        chunks, memory = _compiled(model, served, found, length, batch, projection, dtype, runtime)
        computed = _computed(model, config, chunks, opened)
        files = _files(model, config, out, wanted, len(found), computed)
        writer = index_writer.enter(out, found, row_bytes, settings, computed, files)
        told = f"{len(found):,} rows, {in_bytes(len(found) * row_bytes)}"
        if memory.free is not None:
            told += f"; {in_bytes(memory.wanted)} of memory of {in_bytes(memory.free)} free"
        with _bar(chunks, writer.done, show_progress) as bar:
            try:
                _run(chunks, writer, told, bar)
            finally:
                writer.close()
        index_writer.finish(out)
    return open_index(out)


def build_index_of(
    source: str | os.PathLike[str],
    config: RunConfig,
    start: int,
    stop: int,
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    step: int | None = None,
    dtype: DTypeLike = jnp.float32,
    fsdp: int = 1,
    tensor: int = 1,
    **how: Any,
) -> Index:
    """`build_index` of a checkpoint of any kind (`pj.load`), over all devices that there are.

    fsdp, tensor: devices that the weights are cut over, for a model that does not fit one; the
    others have copies, and rows of their own. how: other arguments of `build_index`.

    Raises as both do.
    """
    mesh = sharding.make_mesh(MeshConfig(data=-1, fsdp=fsdp, tensor=tensor))
    if fsdp > 1 or tensor > 1:
        model_config = open_at(source, revision=revision, step=step).config
        sharding.check_fit(mesh, model_config, sharding.parts_of_rows(mesh))
    folder = not is_url(source) and Path(source).exists()
    opened = {
        "path_or_id": str(Path(source).resolve() if folder else source),
        "revision": revision,
        "step": step,
        "dtype": jnp.dtype(dtype).name,
    }
    with jax.set_mesh(mesh):
        model = load_at(source, revision=revision, step=step, dtype=dtype)
        if folder or is_url(source):
            opened["step"] = model.step  # the newest of today may not be that of a query
        return build_index(model, config, start, stop, out, opened=opened, **how)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is stored of each batch."""

    unit: str
    projection: Projection | None
    precision: str
    rows: int | None


def _check(
    model: Model, config: RunConfig, served: Batches, start: int, stop: int, wanted: Wanted
) -> None:
    if wanted.unit not in ("sequence", "document"):
        raise ValueError(f"unit {wanted.unit!r}: choose sequence or document")
    if wanted.precision not in PRECISIONS:
        raise ValueError(f"precision {wanted.precision!r}: choose from {', '.join(PRECISIONS)}")
    training_rows.check(config, served, model.config, start, stop, wanted.rows)
    if model.step is not None and stop > model.step:
        log.info(
            "batches from step %d on come after the model's step %d: it has not seen them",
            max(start, model.step),
            model.step,
        )


def _settings(
    model: Model, config: RunConfig, served: Batches, start: int, stop: int, wanted: Wanted
) -> dict[str, Any]:
    """All that decides an index's numbers."""
    return {
        "weights": weights_hash(model.params),
        "step": model.step,
        "model": dataclasses.asdict(model.config),
        **training_rows.identity(config, served, start, stop, wanted.rows),
        "unit": wanted.unit,
        "projection": None if wanted.projection is None else dataclasses.asdict(wanted.projection),
        "precision": wanted.precision,
        "computed_in": jax.tree.leaves(model.params)[0].dtype.name,
    }


def _computed(
    model: Model, config: RunConfig, chunks: Chunks, opened: dict[str, Any] | None
) -> dict[str, Any]:
    """What an index came from."""
    return {
        "source": model.source,
        "opened": opened,
        "run": config.name,
        "rows_together": chunks.batch,
        "loss": "sum over the row's tokens, nats",
        "bergson": bergson.VERSION,
        "pythia_jax": pythia_jax.__version__,
        "jax": jax.__version__,
        "device_kind": jax.devices()[0].device_kind,
        "devices": 1 if sharding.current() is None else jax.sharding.get_mesh().size,
        "processes": jax.process_count(),
    }


def _files(
    model: Model,
    config: RunConfig,
    out: Path,
    wanted: Wanted,
    rows: int,
    computed: dict[str, Any],
) -> dict[str, bytes]:
    """What an index holds besides gradients, rows and provenance."""
    projection = wanted.projection
    made = bergson.files(model.config, projection, rows, PRECISIONS[wanted.precision])
    made["config.yaml"] = bergson.run_file(out, bergson.model_of(computed), projection)
    made[RUN] = training_rows.run_file(config)
    tokenizer = model.tokenizer_files.get("tokenizer.json")
    if tokenizer is None and config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer).to_str().encode()
    if tokenizer is not None:
        made[TOKENIZER] = tokenizer
    return made


def _check_disk(out: Path, rows: int, row_bytes: int) -> None:
    there = unfinished(out) / GRADIENTS
    written = there.stat().st_blocks * 512 if there.exists() else 0
    wanted = rows * (row_bytes + ROW.itemsize + 4)
    preflight.check_disk(out, wanted, f"an index of {rows:,} rows", there=written)


def _compiled(
    model: Model,
    served: Batches,
    rows: NDArray[Any],
    length: int,
    batch: int | None,
    projection: Projection | None,
    dtype: np.dtype,
    runtime: Runtime,
) -> tuple[Chunks, Memory]:
    """The program for as many rows as asked for, or as fit."""
    parts = sharding.parts_of_rows()
    size = training_rows.together(batch, len(rows), length - 1)
    while True:
        last = batch is not None or size == parts
        try:
            chunks = Chunks(
                model.params,
                model.config,
                served,
                rows,
                length=length,
                batch=size,
                projection=projection,
                dtype=dtype,
                runtime=runtime,
            )
            memory = preflight.memory_of(chunks.compiled, outputs=1 + _AHEAD)
            if all_say(memory.fits):
                return chunks, memory
            if last:
                advice = "give a smaller --batch" if size > parts else "cut the model: --fsdp"
                raise preflight.refusal(memory, f"an index {size} rows at a time ({advice})")
        except jax.errors.JaxRuntimeError as error:
            # The compiler for TPUs refuses what does not fit.
            if last or "RESOURCE_EXHAUSTED" not in str(error):
                raise
        size = max(1, size // parts // 2) * parts


@contextmanager
def _bar(chunks: Chunks, done: int, show: bool) -> Iterator[tqdm]:
    with (
        logging_redirect_tqdm(),
        tqdm(
            total=len(chunks.rows),
            initial=min(done * chunks.batch, len(chunks.rows)),
            unit=" rows",
            desc="gradients",
            disable=not show or jax.process_index() > 0,
        ) as bar,
    ):
        yield bar


def _run(chunks: Chunks, writer: index_writer.IndexWriter, told: str, bar: tqdm) -> None:
    """Compute and write the chunks that are left."""
    left = deque(range(writer.done, len(chunks)))
    began = time.perf_counter()

    def write(computed: Any) -> None:
        writer.write(computed.number, chunks.fetch(computed))

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as disk:
        reading = deque(
            reader.submit(chunks.read, left.popleft()) for _ in range(min(_AHEAD, len(left)))
        )
        first, writing = writer.done, deque()
        number = first
        try:
            while reading:
                given = reading.popleft().result()
                if left:
                    reading.append(reader.submit(chunks.read, left.popleft()))
                writing.append(disk.submit(write, chunks.compute(number, given)))
                if number == first:
                    writing[0].result()
                    seconds = (time.perf_counter() - began) * (len(chunks) - first)
                    log.info("%s; about %s", told, in_time(seconds))
                if len(writing) >= _AHEAD:
                    _written(writing.popleft(), chunks, bar)
                number += 1
            while writing:
                _written(writing.popleft(), chunks, bar)
        finally:
            for thread in (reader, disk):
                thread.shutdown(wait=True, cancel_futures=True)


def _written(writing: Any, chunks: Chunks, bar: tqdm) -> None:
    writing.result()
    bar.update(min(chunks.batch, len(chunks.rows) - bar.n))
