"""Fitting factors to the exact batches of training, and keeping them with what they came from."""

import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Int
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pythia_jax import sharding
from pythia_jax.bridge.computed_on import computed_on
from pythia_jax.bridge.revisions import load_at, open_at
from pythia_jax.bridge.start import prepare
from pythia_jax.configs import InitializeConfig, MeshConfig, ModelConfig, RunConfig, Runtime
from pythia_jax.data import Batches, batches
from pythia_jax.interp import preflight, training_rows
from pythia_jax.interp.collecting import LINEAR
from pythia_jax.interp.factors import Factors, Method, fit_factors, save
from pythia_jax.interp.preconditioning import adam_factors
from pythia_jax.interp.projection import Projection
from pythia_jax.model.parameters import TABLE
from pythia_jax.training.feed import read_ahead

log = logging.getLogger(__name__)


def fit_factors_of(
    source: str | os.PathLike[str],
    config: RunConfig,
    start: int,
    stop: int,
    out: str | os.PathLike[str],
    *,
    method: Method = "ekfac",
    empirical: bool = False,
    seed: int = 0,
    projection: Projection | None = None,
    rows: int | None = None,
    batch: int | None = None,
    revision: str | None = None,
    step: int | None = None,
    dtype: DTypeLike = np.float32,
    fsdp: int = 1,
    tensor: int = 1,
    show_progress: bool = True,
) -> Factors:
    """`fit_factors` of a checkpoint of any kind (`pj.load`) on batches of a run, saved in `out`.

    config: of the run whose batches they are, of steps `start` to `stop` (not included).
    seed: draws labels, where they are not those of the data (`empirical`). rows: a sample of so
    many, evenly spread. batch: rows computed together. fsdp, tensor: devices that weights and sums
    are cut over; rows are over all there are.

    Raises what `load`, `batches` and `fit_factors` do; FileExistsError where `out` is; OSError and
    MemoryError, with the numbers, for factors that do not fit on disk or in memory.
    """
    out, served = Path(out), batches(config)
    _check_new(out)
    mesh = sharding.make_mesh(MeshConfig(data=-1, fsdp=fsdp, tensor=tensor))
    model_config = open_at(source, revision=revision, step=step).config
    training_rows.check(config, served, model_config, start, stop, rows)
    if fsdp > 1 or tensor > 1:
        sharding.check_fit(mesh, model_config, sharding.parts_of_rows(mesh))
    _check_room(out, model_config, method, projection)
    chosen = training_rows.sampled(range(start, stop), served.batch_size, rows)
    with jax.set_mesh(mesh):
        walked = _Walked(served, chosen, config.data.sequence_length, batch, mesh, show_progress)
        model = load_at(source, revision=revision, step=step, dtype=dtype)
        log.info("%s: fitting %s to %d rows", model.source, method, walked.rows)
        with logging_redirect_tqdm():
            factors = fit_factors(
                model.params,
                walked,
                model.config,
                method=method,
                empirical=empirical,
                key=None if empirical else jax.random.key(seed),
                projection=projection,
                runtime=Runtime(),
            )
        provenance = {
            **computed_on(model.params, source=model.source),
            "step": model.step,
            "run": config.name,
            **training_rows.identity(config, served, start, stop, rows),
            "rows_together": walked.batch,
            "seed": None if empirical else seed,
        }
    save(factors, out, provenance=provenance)
    return factors


def adam_factors_of(
    source: str | os.PathLike[str],
    config: RunConfig,
    out: str | os.PathLike[str],
    *,
    optimizer_state: str = "checkpoint",
    revision: str | None = None,
    step: int | None = None,
    show_progress: bool = True,
) -> Factors:
    """`adam_factors` of a checkpoint's optimizer state, saved in `out`.

    optimizer_state: as in `initialize_from`: the source's own (`checkpoint`: of a run folder or a
    checkpoint of GPT-NeoX's), or averaged from the gradients of its last K batches (`rebuild:K`),
    which any checkpoint allows whose step is known. config: of the run that it is of.

    Raises what starting a run from there does; FileExistsError where `out` is.
    """
    out = Path(out)
    _check_new(out)
    from_there = InitializeConfig(os.fspath(source), revision, step, optimizer_state)
    # Where no run has been: `prepare` would go on with one that is there.
    place = dataclasses.replace(config.checkpoint, directory=str(out.absolute()))
    config = dataclasses.replace(config, initialize_from=from_there, checkpoint=place)
    filled, initial = prepare(config, show_progress=show_progress)
    assert initial is not None
    mesh = sharding.make_mesh(filled.mesh)
    with jax.set_mesh(mesh):
        state = initial(filled, mesh)
        factors = adam_factors(state, filled)
        preflight.check_disk(out, sum(x.nbytes for x in jax.tree.leaves(factors)), "these factors")
        provenance = {
            **computed_on(state.params, source=os.fspath(source)),
            "revision": revision,
            "step": int(state.step),
            "optimizer_state": optimizer_state,
            "run": config.name,
        }
        save(factors, out, provenance=provenance)
    return factors


def bytes_of(config: ModelConfig, method: Method, projection: Projection | None = None) -> int:
    """Bytes of the factors that `fit_factors` makes of all linear modules, in float32."""
    total = 0
    for parameter in TABLE:
        module, _, leaf = parameter.path.rpartition("/")
        if module not in LINEAR or leaf != "kernel":
            continue
        layers, width, out = parameter.shape(config)
        inputs = width + 1
        if method == "autocorrelation":
            squared = (projection or Projection()).dimension ** 2
            numbers = squared * (squared + 1)
        elif method == "diagonal":
            numbers = inputs * out
        else:
            numbers = inputs * (inputs + 1) + out * (out + 1)
            numbers += inputs * out * (method == "ekfac")
        total += 4 * layers * numbers
    return total


class _Walked:
    """Rows of the run's batches, so many together, as often as they are asked for; read ahead."""

    def __init__(
        self,
        served: Batches,
        chosen: Iterable[tuple[int, np.ndarray]],
        seq: int,
        batch: int | None,
        mesh: Mesh,
        show_progress: bool,
    ) -> None:
        self._served = served
        self._keys = [(step, slot) for step, slots in chosen for slot in slots.tolist()]
        self._show, self._times = show_progress, 0
        # Rows are placed by a thread, which has no mesh around it.
        self._place = sharding.sharding(mesh, ("batch", "seq"))
        self.batch = training_rows.together(batch, self.rows, seq)
        parts = sharding.parts_of_rows()
        for size in (min(self.batch, self.rows), self.rows % self.batch):
            if size % parts:
                raise ValueError(
                    f"{self.rows} rows, {self.batch} together: {parts} devices cannot share "
                    f"{size} of them; give --rows and --batch that are multiples of {parts}"
                )

    @property
    def rows(self) -> int:
        return len(self._keys)

    def __len__(self) -> int:
        return -(-self.rows // self.batch)

    def __getitem__(self, chunk: int) -> Int[Array, "batch seq+1"]:
        keys = self._keys[chunk * self.batch : (chunk + 1) * self.batch]
        read = [
            self._served.read(step, [slot for _, slot in of_step])
            for step, of_step in groupby(keys, key=itemgetter(0))
        ]
        return jax.device_put(np.concatenate(read), self._place)

    def __iter__(self) -> Iterator[Int[Array, "batch seq+1"]]:
        self._times += 1
        told = f"factors, pass {self._times}"
        with tqdm(total=self.rows, desc=told, unit=" rows", disable=not self._show) as bar:
            batches = read_ahead(self, 0, len(self))  # type: ignore[arg-type]
            for tokens in preflight.timed(batches, len(self), f"the rest of {told}"):
                yield tokens
                bar.update(len(tokens))


def _check_new(out: Path) -> None:
    if out.exists():
        raise FileExistsError(f"{out}: is there already; choose another place for the factors")


def _check_room(
    out: Path, config: ModelConfig, method: Method, projection: Projection | None
) -> None:
    """Refuse what cannot fit; sums, and a matrix in float64, want more than the factors do."""
    wanted = bytes_of(config, method, projection)
    preflight.check_disk(out, wanted, f"a model's {method} factors")
    free = preflight.host_memory()
    told = preflight.in_bytes(wanted)
    if free is not None and 2 * wanted > free:
        raise MemoryError(
            f"{method} factors of this model are {told}, and their sums as much again; "
            f"{preflight.in_bytes(free)} of memory are free"
        )
    log.info("%s factors of this model: %s", method, told)
