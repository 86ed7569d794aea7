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
import yaml
from flax import traverse_util
from numpy.typing import NDArray

import pythia_jax
from pythia_jax import configs, sharding
from pythia_jax.bridge import revisions
from pythia_jax.bridge.model import Model
from pythia_jax.configs import MeshConfig, RunConfig, Runtime
from pythia_jax.data import Batches, batches
from pythia_jax.files import locked, write_whole
from pythia_jax.interp import preflight
from pythia_jax.interp.activations import Sites, known_sites
from pythia_jax.interp.dump_work import DTYPES, File, Work, compiled, row_shapes
from pythia_jax.interp.dumped import INDEX, PROVENANCE, RUN, Dump, open_dump, read_provenance
from pythia_jax.interp.passages import digest_of_rows
from pythia_jax.interp.preflight import in_bytes
from pythia_jax.model.sites import Capture
from pythia_jax.training.agreement import all_say
from pythia_jax.training.provenance import data_identity

log = logging.getLogger(__name__)

FILE_BYTES = 2**28
"""Of a file, about, where a step has as many rows."""
TOKENS = 2**14
"""Tokens that a device computes together, about; on a CPU an eighth of it."""
_SITE = re.compile(r"([\w.]+)(?::(\d+)(?:-(\d+))?)?")
_LOCK = ".lock"


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
    seq = config.data.sequence_length
    asked = known_sites(sites, model.config)
    places = _checked(model, config, served, start, stop, dtype, positions, rows)
    settings = _settings(model, config, served, range(start, stop), asked, places, dtype, rows)
    before = _saved(out, settings)
    if before is not None and (out / INDEX).exists():
        log.info("%s: this dump is finished already", out)
        return open_dump(out)
    shapes = row_shapes(asked, model.config, seq, len(places))
    row_bytes = sum(map(math.prod, shapes.values())) * DTYPES[dtype].itemsize + 4 * (seq + 2)
    chosen = _rows(range(start, stop), served.batch_size, rows)
    together, in_file = _together(batch, before, row_bytes, seq, served.batch_size)
    plan = _plan(chosen, in_file)
    total = sum(len(file.slots) for file in plan)
    there = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    preflight.check_disk(
        out, total * row_bytes, f"a dump of {total:,} rows", there=min(there, total * row_bytes)
    )
    program = compiled(model, (together, seq), asked, places, dtype, runtime)
    failure = None
    try:
        if jax.process_index() == 0:
            _enter(out, settings, _computed(model, config, together, in_file), config)
    except (OSError, ValueError, RuntimeError) as error:
        failure = error
    if not all_say(failure is None):
        raise failure or RuntimeError(f"{out}: another process cannot begin the dump")
    work = Work(
        model, served, out, plan, places, together, DTYPES[dtype], program, _digest(settings)
    )
    told = f"{total:,} rows, {in_bytes(total * row_bytes)}"
    try:
        with _alone(out):
            work.run(told, show_progress)
    except BaseException as error:
        failure = error
        all_say(False)
        raise
    if not all_say(True):
        raise RuntimeError(f"{out}: another process could not write its share of the dump")
    if jax.process_index() == 0:
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
    model: Model,
    config: RunConfig,
    served: Batches,
    start: int,
    stop: int,
    dtype: str,
    positions: Sequence[int] | None,
    rows: int | None,
) -> NDArray[np.int32]:
    """The positions, once all fits together."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: choose from {', '.join(DTYPES)}")
    if rows is not None and rows < 1:
        raise ValueError(f"rows {rows}: at least 1 is wanted")
    if not 0 <= start < stop <= len(served):
        raise ValueError(
            f"steps {start}:{stop} (half-open) are not steps of {served.name}, which has "
            f"{len(served):,}, from 0 on"
        )
    seq, longest = config.data.sequence_length, model.config.max_position_embeddings
    if seq > longest:
        raise ValueError(
            f"data.sequence_length {seq}: the model has {longest} positions; give the config of "
            "the run that it is of"
        )
    if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(model.params)):
        raise ValueError(
            "the model is cut over several processes, and each writes what its own devices hold: "
            "load it on a mesh of jax.local_devices()"
        )
    places = np.arange(seq) if positions is None else np.asarray(positions)
    wrong = places.ndim != 1 or not places.size or places.dtype.kind not in "iu"
    if wrong or places.min() < 0 or places.max() >= seq or len(set(places.tolist())) < places.size:
        raise ValueError(f"positions: places of a row, from 0 to {seq - 1}, each once, are wanted")
    return places.astype("<i4")


def _settings(
    model: Model,
    config: RunConfig,
    served: Batches,
    steps: range,
    sites: Sites,
    places: NDArray[np.int32],
    dtype: str,
    rows: int | None,
) -> dict[str, Any]:
    """All that decides a dump's numbers."""
    data = dataclasses.replace(config.data, test=(), test_weights=())
    if data.split is None:
        data = dataclasses.replace(data, validation=(), validation_weights=())
    identity = data_identity(dataclasses.replace(config, data=data))
    return {
        "weights": revisions.weights_hash(model.params),
        "step": model.step,
        "model": dataclasses.asdict(model.config),
        "data": {"train": identity["train"], "transform": identity.get("transform")},
        "rows": digest_of_rows(served, steps.start, steps.stop),
        "steps": [steps.start, steps.stop],
        "sample": rows,
        "sites": [[site, None] if isinstance(site, str) else [*site] for site in sites],
        "positions": places.tolist(),
        "dtype": dtype,
        "computed_in": jax.tree.leaves(model.params)[0].dtype.name,
    }


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


def _saved(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What was `computed` of the dump that is there; None if there is none.

    Raises FileExistsError for another dump, naming the settings that differ, or what is none.
    """
    if not (out / PROVENANCE).exists():
        if out.exists() and (not out.is_dir() or any(p.name != _LOCK for p in out.iterdir())):
            raise FileExistsError(f"{out}: there already, and no dump; name another folder")
        return None
    told = read_provenance(out)
    was, now = (
        traverse_util.flatten_dict(json.loads(json.dumps(s)), sep=".", keep_empty_nodes=True)
        for s in (told["settings"], settings)
    )
    differing = [
        f"{key} was {was.get(key)!r}, is {now.get(key)!r}"
        for key in dict.fromkeys([*was, *now])
        if was.get(key) != now.get(key)
    ]
    if differing:
        raise FileExistsError(
            f"{out} holds another dump: {'; '.join(differing)}. Ask for the same to go on with it, "
            "or name another folder"
        )
    return told["computed"]


def _enter(
    out: Path, settings: dict[str, Any], computed: dict[str, Any], config: RunConfig
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        for path in out.glob(".step-*.partial"):  # of writes that were cut off
            path.unlink()
        if (out / PROVENANCE).exists():
            return
        write_whole(out / RUN, yaml.safe_dump(configs.to_dict(config), sort_keys=False).encode())
        about = {"settings": settings, "computed": computed}
        write_whole(out / PROVENANCE, json.dumps(about, indent=1).encode() + b"\n")


def _finish(
    out: Path,
    plan: list[File],
    shapes: dict[str, tuple[int, ...]],
    places: NDArray[np.int32],
) -> None:
    """Write the index, by which a dump is known to be whole."""
    (out / _LOCK).unlink(missing_ok=True)
    told = {
        "rows": sum(len(file.slots) for file in plan),
        "positions": places.tolist(),
        "row_shapes": {name: list(shape) for name, shape in shapes.items()},
        "files": [
            {"file": file.name, "step": file.step, "slots": list(file.slots)} for file in plan
        ],
    }
    write_whole(out / INDEX, json.dumps(told).encode() + b"\n")


class _alone:
    """Keeps other runs from writing the same dump; process 0 holds the lock for all of its own."""

    def __init__(self, out: Path) -> None:
        self._out, self._lock = out, locked(out / _LOCK, seconds=0)

    def __enter__(self) -> None:
        if jax.process_index() > 0:
            return
        try:
            self._lock.__enter__()
        except BlockingIOError:
            raise RuntimeError(f"{self._out}: another process is writing this dump") from None

    def __exit__(self, *error: Any) -> None:
        if jax.process_index() == 0:
            self._lock.__exit__(*error)


def _together(
    batch: int | None, before: dict[str, Any] | None, row_bytes: int, seq: int, batch_size: int
) -> tuple[int, int]:
    """Rows computed together, and rows of a file; of a dump begun earlier, those that it has."""
    parts, mesh = 1, sharding.current()
    if mesh is not None:
        parts = math.prod(mesh.shape[axis] for axis in sharding.ROWS)
    if before is not None:
        together, in_file = before["rows_together"], before["rows_in_file"]
        if batch not in (None, together):
            raise FileExistsError(
                f"the dump was begun with {together} rows together (batch), and {batch} would "
                f"round otherwise: give --batch {together} to go on, or name another folder"
            )
    else:
        tokens = TOKENS // 8 if jax.default_backend() == "cpu" else TOKENS
        together = batch or min(max(1, tokens // seq), -(-batch_size // parts)) * parts
        in_file = max(1, min(FILE_BYTES // row_bytes, batch_size) // together) * together
    if together < 1 or together % parts:
        raise ValueError(
            f"batch {together}: rows are cut over {parts} devices; give a multiple of that"
        )
    return together, in_file


def _rows(steps: range, batch_size: int, sample: int | None) -> Iterator[tuple[int, list[int]]]:
    """Each step with those of its rows that are wanted."""
    everything = len(steps) * batch_size
    count = everything if sample is None else min(sample, everything)
    numbers = np.arange(count) * everything // count
    for place, step in enumerate(steps):
        ends = np.searchsorted(numbers, [place * batch_size, (place + 1) * batch_size])
        yield step, (numbers[slice(*ends)] - place * batch_size).tolist()


def _plan(chosen: Iterator[tuple[int, list[int]]], in_file: int) -> list[File]:
    return [
        File(step, tuple(slots[first : first + in_file]))
        for step, slots in chosen
        for first in range(0, len(slots), in_file)
    ]


def _digest(settings: dict[str, Any]) -> str:
    """By which a file is known to be of a dump."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
