"""Activations of the exact training rows, written to files: what sparse autoencoders learn from.

Rows go through the model some at a time; some of these make a file. A file has its name when it is
whole, so a dump that was stopped goes on where it was: what is there is left alone. Of several
processes each has the model on its own devices, and writes every so-many-th file.
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

import pythia_jax
from pythia_jax import sharding
from pythia_jax.bridge import revisions
from pythia_jax.bridge.model import Model
from pythia_jax.configs import MeshConfig, RunConfig, Runtime
from pythia_jax.data import batches
from pythia_jax.files import write_whole
from pythia_jax.interp import preflight, result_folder, training_rows
from pythia_jax.interp.activations import known_sites
from pythia_jax.interp.dump_work import DTYPES, File, Work, compiled, row_shapes
from pythia_jax.interp.dumped import INDEX, KIND, Dump, open_dump
from pythia_jax.interp.preflight import in_bytes
from pythia_jax.interp.result_folder import PROVENANCE, RUN
from pythia_jax.model.sites import Capture
from pythia_jax.training.agreement import all_say
from pythia_jax.training.pod import is_first

log = logging.getLogger(__name__)

FILE_BYTES = 2**28
"""Of a file, about, where a step has as many rows."""
_SITE = re.compile(r"([\w.]+)(?::(\d+)(?:-(\d+))?)?")


def dump_activations(
    model: Model,
    config: RunConfig,
    start: int,
    stop: int,
    sites: Capture,
    out: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    positions: Sequence[int] | None = None,
    rows: int | None = None,
    batch: int | None = None,
    runtime: Runtime = Runtime(),
    show_progress: bool = True,
) -> Dump:
    """Write values at sites for the training rows of steps `start` to `stop` (not included).

    Called again, it goes on where it was stopped, and the files are the same, byte for byte.

    model: on the mesh around us, which is of this process's own devices. config: the run whose
    data, order and batch size they are. sites: names, or pairs (name, layers). dtype: to store
    them in: float16, bfloat16 or float32. positions: places of a row; None is all. Of a site with
    two axes of positions it is the first, that of the query. rows: a sample of so many, evenly
    spread. batch: rows computed together; None goes by tokens.

    Raises ValueError for what does not fit together, and for a value that is no number or that
    `dtype` cannot hold, with its row and site; FileExistsError if `out` is something else, with the
    settings that differ; OSError and MemoryError with the numbers, before anything is written, for
    what does not fit; RuntimeError where another process writes the same dump.
    """
    out, served = Path(out), batches(config)
    asked = known_sites(sites, model.config)
    training_rows.check(config, served, model.config, start, stop, rows)
    places = _checked(model, config, dtype, positions)
    settings = {
        "weights": revisions.weights_hash(model.params),
        "step": model.step,
        "model": dataclasses.asdict(model.config),
        **training_rows.identity(config, served, start, stop, rows),
        "sites": [[site, None] if isinstance(site, str) else [*site] for site in asked],
        "positions": places.tolist(),
        "dtype": dtype,
        "computed_in": jax.tree.leaves(model.params)[0].dtype.name,
    }
    with result_folder.alone(out):
        before = result_folder.begun(out, settings, KIND)
        if before is not None and (out / INDEX).exists():
            log.info("%s: this dump is finished already", out)
            return open_dump(out)
        shapes = row_shapes(asked, model.config, config.data.sequence_length, len(places))
        row_bytes = _row_bytes(shapes, DTYPES[dtype], config)
        together, in_file = _together(batch, before, row_bytes, config, served.batch_size, out)
        plan = _plan(training_rows.sampled(range(start, stop), served.batch_size, rows), in_file)
        told = _check_disk(out, plan, row_bytes)
        shape = (together, config.data.sequence_length)
        program = compiled(model, shape, asked, places, dtype, runtime)
        all_say(True)  # each has looked, before the first begins
        if is_first():
            _begin(out, settings, _computed(model, config, together, in_file), config)
        all_say(True)
        digest = _digest(settings)
        work = Work(model, served, out, plan, places, together, DTYPES[dtype], program, digest)
        work.run(told, show_progress)
        all_say(True)
        if is_first():
            _finish(out, plan, shapes, places)
        all_say(True)
    return open_dump(out)


def dump_of(
    source: str | os.PathLike[str],
    config: RunConfig,
    start: int,
    stop: int,
    sites: Capture,
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    step: int | None = None,
    fsdp: int = 1,
    tensor: int = 1,
    **how: Any,
) -> Dump:
    """`dump_activations` of a checkpoint of any kind (`pj.load`), over this process's devices.

    fsdp, tensor: devices that the weights are cut over, for a model that does not fit one; the
    others have copies, and rows of their own. how: other arguments of `dump_activations`.

    Raises as both do.
    """
    mesh = sharding.make_mesh(
        MeshConfig(data=-1, fsdp=fsdp, tensor=tensor), devices=jax.local_devices()
    )
    with jax.set_mesh(mesh):
        model = revisions.load_at(source, revision=revision, step=step)
        return dump_activations(model, config, start, stop, sites, out, **how)


def parse_sites(text: str) -> list[str | tuple[str, tuple[int, ...]]]:
    """Sites as a command line names them: `resid_post:3,mlp.post:1-2,ln_final`.

    `:3` is one layer, `:1-2` layers 1 and 2, a name alone all of them. Raises ValueError.
    """
    layers: dict[str, list[int] | None] = {}
    for part in text.split(","):
        match = _SITE.fullmatch(part.strip())
        if match is None or (match[3] is not None and int(match[3]) < int(match[2])):
            raise ValueError(
                f"sites: {part!r} of {text!r}: a site, with layers if not all: resid_post, "
                "resid_post:3, mlp.post:1-2 (both of them)"
            )
        name = match[1]
        if match[2] is None:
            layers[name] = None
        elif layers.setdefault(name, []) is not None:
            found = layers[name]
            assert found is not None
            found += range(int(match[2]), int(match[3] or match[2]) + 1)
    return [name if of is None else (name, tuple(dict.fromkeys(of))) for name, of in layers.items()]


def _checked(
    model: Model, config: RunConfig, dtype: str, positions: Sequence[int] | None
) -> NDArray[np.int32]:
    """The positions, once all fits together."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: choose from {', '.join(DTYPES)}")
    if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(model.params)):
        raise ValueError(
            "the model is cut over several processes, and each writes what its own devices hold: "
            "load it on a mesh of jax.local_devices()"
        )
    seq = config.data.sequence_length
    places = np.arange(seq) if positions is None else np.asarray(positions)
    wrong = places.ndim != 1 or not places.size or places.dtype.kind not in "iu"
    if wrong or places.min() < 0 or places.max() >= seq or len(set(places.tolist())) < places.size:
        raise ValueError(f"positions: places of a row, from 0 to {seq - 1}, each once, are wanted")
    return places.astype("<i4")


def _computed(model: Model, config: RunConfig, together: int, in_file: int) -> dict[str, Any]:
    """What a dump came from."""
    return {
        "source": model.source,
        "run": config.name,
        "rows_together": together,
        "rows_in_file": in_file,
        "pythia_jax": pythia_jax.__version__,
        "jax": jax.__version__,
        "device_kind": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
    }


def _begin(
    out: Path, settings: dict[str, Any], computed: dict[str, Any], config: RunConfig
) -> None:
    out.mkdir(exist_ok=True)
    for path in out.glob(".step-*.partial"):  # of writes that were cut off
        path.unlink()
    if not (out / PROVENANCE).exists():
        result_folder.write_provenance(out, settings, computed)
    if not (out / RUN).exists():
        write_whole(out / RUN, training_rows.run_file(config))


def _finish(
    out: Path,
    plan: list[File],
    shapes: dict[str, tuple[int, ...]],
    places: NDArray[np.int32],
) -> None:
    """Write the index, by which a dump is known to be whole."""
    told = {
        "rows": sum(len(file.slots) for file in plan),
        "positions": places.tolist(),
        "row_shapes": {name: list(shape) for name, shape in shapes.items()},
        "files": [
            {"file": file.name, "step": file.step, "slots": list(file.slots)} for file in plan
        ],
    }
    write_whole(out / INDEX, json.dumps(told).encode() + b"\n")


def _row_bytes(shapes: dict[str, tuple[int, ...]], dtype: np.dtype, config: RunConfig) -> int:
    tokens_and_slot = 4 * (config.data.sequence_length + 2)
    return sum(map(math.prod, shapes.values())) * dtype.itemsize + tokens_and_slot


def _check_disk(out: Path, plan: list[File], row_bytes: int) -> str:
    """How much will be written, in words."""
    rows = sum(len(file.slots) for file in plan)
    wanted = rows * row_bytes
    there = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    preflight.check_disk(out, wanted, f"a dump of {rows:,} rows", there=min(there, wanted))
    return f"{rows:,} rows, {in_bytes(wanted)}"


def _together(
    batch: int | None,
    before: dict[str, Any] | None,
    row_bytes: int,
    config: RunConfig,
    batch_size: int,
    out: Path,
) -> tuple[int, int]:
    """Rows computed together, and rows of a file; of a dump begun earlier, those that it has."""
    if before is not None:
        batch = result_folder.check_together(batch, before, out)
    together = training_rows.together(batch, batch_size, config.data.sequence_length)
    if before is not None:
        return together, before["rows_in_file"]
    return together, max(1, min(FILE_BYTES // row_bytes, batch_size) // together) * together


def _plan(chosen: Iterator[tuple[int, NDArray[Any]]], in_file: int) -> list[File]:
    return [
        File(step, tuple(slots[first : first + in_file].tolist()))
        for step, slots in chosen
        for first in range(0, len(slots), in_file)
    ]


def _digest(settings: dict[str, Any]) -> str:
    """By which a file is known to be of a dump."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
