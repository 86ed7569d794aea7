"""Checkpoints of one model, one after the other, on the mesh around us."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from os import PathLike

import jax
from jax.sharding import Mesh

from pythia_jax.bridge.revisions import Loading, Source, chosen, source_of, weights_hash
from pythia_jax.configs import ModelConfig
from pythia_jax.model import parameters
from pythia_jax.model.parameters import Params
from pythia_jax.training.digests import name_of

log = logging.getLogger(__name__)

Checkpoints = str | PathLike[str] | Iterable[tuple[int, Params]]
"""A model with many checkpoints (its name on the hub, a run folder, gs:// too, a folder of
GPT-NeoX's `global_stepN`), or pairs (step, parameters), steps rising."""
PASSED_OVER = (ValueError, OSError)
"""What a checkpoint that cannot be loaded raises."""


@dataclass(frozen=True, eq=False)
class Arrived:
    """A checkpoint on the mesh; or why there is none, in `missing`, and nothing else.

    called: what provenance calls it. absent: whether it is not there at all.
    """

    step: int
    params: Params = dataclasses.field(default_factory=dict, repr=False)
    config: ModelConfig | None = None
    called: str = ""
    missing: str | None = None
    absent: bool = False


class Stream:
    """The checkpoints that are asked for.

    name: of the model; None of pairs. steps: those asked for, in order; None of pairs, which tell
    theirs as they come. source: of a model.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        revisions: str | Iterable[int] = "steps",
        config: ModelConfig | None = None,
        *,
        expected: Callable[[Source], Iterable[int]] | None = None,
    ) -> None:
        """revisions: as `bridge.revisions.chosen` takes them. config: of pairs, and of them alone.
        expected: steps that a source should have; asked for with the others.

        Raises ValueError and FileNotFoundError for what is not there or cannot be asked for.
        """
        self.source: Source | None = None
        self.steps: list[int] | None = None
        self._config = config
        if not isinstance(checkpoints, str | PathLike):
            if config is None:
                raise ValueError("pairs of step and parameters come without a config: give config=")
            if revisions != "steps":
                raise ValueError("revisions are of a model; of pairs, give those that are wanted")
            self._pairs = iter(checkpoints)
            return
        if config is not None:
            raise ValueError(f"{checkpoints}: has its own config; config= is for pairs")
        self.source = source = source_of(str(checkpoints))
        if expected is not None:
            there = source.there
            also = expected(source)
            # As if on the hub: of steps that are named and not there, loading tells.
            source = replace(source, there=lambda: sorted({*there(), *also}), remote=True)
        self.steps = chosen(revisions, source)

    @property
    def name(self) -> str | None:
        return None if self.source is None else self.source.name

    def weights(self, arrived: Arrived) -> str:
        """The hash of a checkpoint's weights."""
        known = None if self.source is None else self.source.weights(arrived.step)
        return weights_hash(arrived.params) if known is None else known

    def visit(
        self,
        each: Callable[[Arrived], None],
        mesh: Mesh,
        *,
        steps: Sequence[int] | None = None,
        ahead: bool = True,
    ) -> None:
        """Call `each` with every checkpoint, or with those of `steps`, in order.

        ahead: whether the next one loads meanwhile, which takes room for two. Checkpoints whose
        config is not that of the first cannot be compared, and come as missing.
        """
        if self.source is None:
            self._visit_pairs(each, mesh)
            return
        left, first = list(self.steps or () if steps is None else steps), None
        coming: Loading | None = None
        try:
            while left:
                step = left.pop(0)
                loading = Loading(self.source, step, mesh) if coming is None else coming
                coming = loading  # given up, should waiting for it be interrupted
                arrived = _result(self.source, loading, step)
                coming = None
                if arrived.config is not None and first is None:
                    first = arrived.config
                if arrived.config is not None and arrived.config != first:
                    arrived = Arrived(step, missing="its config is not that of the ones before")
                if ahead and left:
                    coming = Loading(self.source, left[0], mesh)
                if arrived.missing is not None:
                    log.warning("step %d: passed over: %s", step, arrived.missing)
                each(arrived)
                del arrived
        finally:
            if coming is not None:
                coming.abandon()

    def _visit_pairs(self, each: Callable[[Arrived], None], mesh: Mesh) -> None:
        assert self._config is not None
        places, wanted = parameters.shardings(mesh), parameters.abstract(self._config)
        last = -1
        for number, params in self._pairs:
            step = int(number)
            if step <= last:
                raise ValueError(f"step {step} comes after step {last}: steps must rise, from 0 on")
            last = step
            _check(step, params, wanted)
            each(Arrived(step, jax.device_put(params, places), self._config, f"step {step}"))


def _result(source: Source, loading: Loading, step: int) -> Arrived:
    try:
        model = loading.result()
    except PASSED_OVER as error:
        return Arrived(step, missing=str(error), absent=isinstance(error, FileNotFoundError))
    return Arrived(step, model.params, model.config, source.called(step))


def _check(step: int, params: Params, wanted: Params) -> None:
    """Refuse parameters that are not those of the config."""
    shapes = [
        {name_of(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (params, wanted)
    ]
    wrong = sorted(n for n in {*shapes[0], *shapes[1]} if shapes[0].get(n) != shapes[1].get(n))
    if wrong:
        found, asked = (of.get(wrong[0], "not there") for of in shapes)
        raise ValueError(f"step {step}: {wrong[0]} is {found}, and by the config {asked}")
