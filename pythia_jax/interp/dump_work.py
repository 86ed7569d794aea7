"""The work of a dump of activations: rows through the model, chunk after chunk, into files."""

import logging
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pythia_jax import sharding
from pythia_jax.bridge.model import Model
from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.data import Batches
from pythia_jax.interp import preflight, tensor_files
from pythia_jax.interp.activations import Sites, activations
from pythia_jax.interp.preflight import in_time
from pythia_jax.model.gptneox import check_tokens
from pythia_jax.model.parameters import Params
from pythia_jax.model.sites import SITES, site_shape

log = logging.getLogger(__name__)

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}


@dataclass(frozen=True)
class File:
    """Some rows of one step, and the file they go to."""

    step: int
    slots: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"step-{self.step:06d}-rows-{self.slots[0]}-{self.slots[-1] + 1}.safetensors"


class Work:
    """The files of this process that are not there yet.

    program: from `compiled`, for so many rows `together`. digest: by which a file is known to be of
    this dump.
    """

    def __init__(
        self,
        model: Model,
        served: Batches,
        out: Path,
        plan: list[File],
        places: NDArray[np.int32],
        together: int,
        dtype: np.dtype,
        program: Any,
        digest: str,
    ) -> None:
        self._model, self._served, self._out = model, served, out
        self._places, self._together, self._dtype = places, together, dtype
        self._program = program
        self._metadata = {"dump": digest}
        own = plan[jax.process_index() :: jax.process_count()]
        self._all = sum(len(file.slots) for file in own)
        self._files = [file for file in own if not self._whole(file)]

    def run(self, told: str, show: bool) -> None:
        left = sum(len(file.slots) for file in self._files)
        show = show and jax.process_index() == 0
        began, first = time.perf_counter(), True
        with (
            logging_redirect_tqdm(),
            tqdm(
                total=self._all,
                initial=self._all - left,
                unit=" rows",
                desc="activations",
                disable=not show,
            ) as bar,
            ThreadPoolExecutor(1) as disk,
        ):
            writing: Future | None = None
            gathered: list[tuple[NDArray, dict[str, NDArray]]] = []
            for file, chunk, tokens, values in self._computed():
                if first:
                    seconds = (time.perf_counter() - began) * left / len(chunk)
                    log.info("%s; about %s", told, in_time(seconds))
                    first = False
                gathered.append((tokens, values))
                bar.update(len(chunk))
                if sum(len(tokens) for tokens, _ in gathered) == len(file.slots):
                    if writing is not None:
                        writing.result()
                    writing = disk.submit(self._write, file, gathered)
                    gathered = []
            if writing is not None:
                writing.result()

    def _computed(self) -> Iterator[tuple[File, NDArray, NDArray, dict[str, NDArray]]]:
        """Chunk by chunk: while one is computed the next is read, and the one before fetched."""
        chunks = (
            (file, np.array(file.slots[first : first + self._together]))
            for file in self._files
            for first in range(0, len(file.slots), self._together)
        )
        reading, computing = deque(), deque()
        with ThreadPoolExecutor(1) as reader:

            def read_next() -> None:
                for file, slots in chunks:
                    reading.append((file, slots, reader.submit(self._read, file.step, slots)))
                    return

            for _ in range(2):
                read_next()
            while reading or computing:
                if reading:
                    file, slots, future = reading.popleft()
                    tokens = future.result()
                    read_next()
                    filled = np.resize(tokens, (self._together, tokens.shape[1]))
                    made = self._program(self._model.params, sharding.place_rows(filled))
                    computing.append((file, slots, tokens, made))
                if len(computing) > 1 or not reading:
                    file, slots, tokens, made = computing.popleft()
                    yield file, slots, tokens, self._fetched(file.step, slots, made)

    def _read(self, step: int, slots: NDArray) -> NDArray[np.int32]:
        tokens = self._served.read(step, slots)
        check_tokens(tokens, self._model.config)
        return tokens

    def _fetched(self, step: int, slots: NDArray, made: Any) -> dict[str, NDArray]:
        values, faults = made
        for name, fault in faults.items():
            bad = np.flatnonzero(np.asarray(fault)[: len(slots)])
            if bad.size:
                row = int(bad[0])
                what = (
                    "is no finite number"
                    if np.asarray(fault)[row] == 1
                    else f"is beyond what {self._dtype.name} can hold: store bfloat16 or float32"
                )
                raise ValueError(f"step {step}, slot {slots[row]}: a value at {name} {what}")
        return {name: np.asarray(value)[: len(slots)] for name, value in values.items()}

    def _write(self, file: File, gathered: list[tuple[NDArray, dict[str, NDArray]]]) -> None:
        joined = {
            name: np.concatenate([values[name] for _, values in gathered])
            for name in gathered[0][1]
        }
        arrays = {
            "tokens": np.concatenate([tokens for tokens, _ in gathered]).astype("<i4"),
            "slots": np.array(file.slots, "<i4"),
            "positions": self._places,
            **joined,
        }
        tensor_files.write(
            self._out / file.name, arrays, {**self._metadata, "step": str(file.step)}
        )

    def _whole(self, file: File) -> bool:
        """Whether a file is there already, whole and of this dump."""
        path = self._out / file.name
        try:
            places, metadata = tensor_files.read(path)
        except (OSError, ValueError):
            return False
        rows = places["slots"].shape[0] if "slots" in places else 0
        return metadata.get("dump") == self._metadata["dump"] and rows == len(file.slots)


def _names(sites: Sites, config: ModelConfig) -> dict[str, tuple[str, int | None]]:
    """What is stored: name → its site, and its place among the layers captured."""
    found: dict[str, tuple[str, int | None]] = {}
    for item in sites:
        site, layers = (item, None) if isinstance(item, str) else item
        if SITES[site][0] != "layer":
            found[site] = (site, None)
            continue
        layers = range(config.num_hidden_layers) if layers is None else layers
        found |= {f"{site}.{layer}": (site, place) for place, layer in enumerate(layers)}
    return found


def row_shapes(
    sites: Sites, config: ModelConfig, seq: int, positions: int
) -> dict[str, tuple[int, ...]]:
    """The shape of one row of each name."""
    shapes = {}
    for name, (site, _) in _names(sites, config).items():
        axes, shape = SITES[site], list(site_shape(site, config, 1, seq))
        shape[axes.index("seq")] = positions
        shapes[name] = tuple(shape[axes.index("batch") + 1 :])
    return shapes


def compiled(
    model: Model,
    shape: tuple[int, int],
    sites: Sites,
    places: NDArray[np.int32],
    dtype: str,
    runtime: Runtime,
) -> Any:
    """The program for some rows. Raises MemoryError where it cannot fit."""
    mesh = jax.sharding.get_mesh()
    place = None if mesh.empty else sharding.sharding(mesh, ("batch", "seq"))
    # The last token of a row is the target of the one before it, and nothing's context.
    tokens = jax.ShapeDtypeStruct((shape[0], shape[1] + 1), jnp.int32, sharding=place)
    program = partial(
        _stored,
        config=model.config,
        sites=sites,
        places=tuple(places.tolist()),
        dtype=dtype,
        runtime=runtime,
    )
    made = jax.jit(program).lower(model.params, tokens).compile()
    memory = preflight.memory_of(made, outputs=3)
    if not memory.fits:
        raise preflight.refusal(
            memory, f"a dump {shape[0]} rows at a time (give a smaller --batch, or fewer sites)"
        )
    return made


def _stored(
    params: Params,
    tokens: jax.Array,
    *,
    config: ModelConfig,
    sites: Sites,
    places: tuple[int, ...],
    dtype: str,
    runtime: Runtime,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """What is stored of some rows, by name, and by row whether it can be: 0, 1 (not finite), 2."""
    found = activations(params, tokens[:, :-1], config, sites, runtime=runtime)
    chosen = np.array(places)
    values, faults = {}, {}
    for name, (site, layer) in _names(sites, config).items():
        axes = SITES[site][1:] if layer is not None else SITES[site]
        value = found[site] if layer is None else found[site][layer]
        value = jnp.take(value, chosen, axis=axes.index("seq"))
        narrow = value.astype(DTYPES[dtype])
        rest = tuple(range(1, value.ndim))
        wrong = [~jnp.isfinite(x).all(axis=rest) for x in (value, narrow)]
        values[name] = narrow
        faults[name] = jnp.where(wrong[0], 1, jnp.where(wrong[1], 2, 0))
    return values, faults
