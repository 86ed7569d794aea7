"""Anything of a checkpoint, over many of them: streamed, compiled once, and not computed twice.

Before a curve is drawn from published checkpoints, `audit` should have looked at them.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pythia_jax.bridge.revisions import on_all_devices
from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.interp import preflight
from pythia_jax.interp.gradient_plan import matching
from pythia_jax.interp.kept import Kept
from pythia_jax.interp.measures import Measure, digest_of
from pythia_jax.interp.sketch import sketch
from pythia_jax.interp.streaming import Arrived, Checkpoints, Stream
from pythia_jax.model.gptneox import AnyArray
from pythia_jax.model.loss import loss
from pythia_jax.model.parameters import Params
from pythia_jax.model.quantize import check_floats
from pythia_jax.training.agreement import all_say, from_first
from pythia_jax.training.digests import name_of

log = logging.getLogger(__name__)

Measured = Callable[[Params, ModelConfig], Any]


@dataclass(frozen=True, eq=False)
class OverCheckpoints:
    """What came of it.

    steps: of the checkpoints, in order. values: the function's tree, each array with a leading
    axis of checkpoints. weights: the hash of each one's weights. missing: the steps that there is
    nothing of, and why.
    """

    steps: Int[np.ndarray, " checkpoints"]
    values: Any
    weights: tuple[str, ...]
    missing: dict[int, str]


def over_checkpoints(
    fn: Measured,
    checkpoints: Checkpoints,
    *,
    revisions: str | Iterable[int] = "steps",
    config: ModelConfig | None = None,
    out: str | PathLike[str] | None = None,
    name: str | None = None,
    show_progress: bool = True,
) -> OverCheckpoints:
    """`fn(params, config)` of many checkpoints of a model, stacked.

    fn: pure, to a tree of arrays; traced and compiled once. `token_loss_curve` and the like make
        such functions. What it closes over is a constant of the program; of a
        `jax.tree_util.Partial`, the arrays are arguments.
    checkpoints: a model's name on the hub, a run folder (gs:// too), a folder of GPT-NeoX's
        `global_stepN`; or pairs (step, params), steps rising, with their `config`.
    revisions: of a model: steps, or as text `steps` (all there are), `0,1,2`,
        `1000:143000:10000` (half-open, each of them), `0:1000` (those that there are).
    out: a folder in which every checkpoint's values are kept as soon as they are there. The same
        call again goes on where it was stopped, kill -9 included, and `OUT/curves.npz` holds them
        stacked in the end. name: what `fn` is, so that values of another are not taken for its
        own; must change when what `fn` computes does. The functions of this package have theirs.

    On the mesh around us, or all devices; two sets of weights are held at most. A checkpoint that
    cannot be loaded, or of which a value is not finite, is told, passed over, and listed in
    `missing`.

    Raises ValueError and FileNotFoundError, before anything is computed, for checkpoints that are
    not there and a folder that holds something else; MemoryError, with the numbers, for what does
    not fit; ValueError where every checkpoint is missing; RuntimeError where another call is
    writing into the folder.
    """
    name = getattr(fn, "name", None) if name is None else name
    if out is not None and not name:
        raise ValueError(
            "name= is wanted with out=: what the function computes, on which tokens, so that its "
            "values are never mixed with another's"
        )
    stream = Stream(checkpoints, revisions, config)
    with ExitStack() as stack:
        mesh = stack.enter_context(on_all_devices())
        stack.enter_context(logging_redirect_tqdm())
        work = _Work(fn, mesh, stream)
        if out is not None:
            work.kept = Kept(Path(out), str(name), stream)
            work.kept.check(work.shapes)
            stack.enter_context(work.kept.alone())
        work.run(show_progress)
    return work.result()


@dataclass
class _Work:
    """One call of `over_checkpoints`."""

    fn: Measured
    mesh: Mesh
    stream: Stream
    kept: Kept | None = None
    found: dict[int, list[np.ndarray]] = field(default_factory=dict)
    weights: dict[int, str] = field(default_factory=dict)
    missing: dict[int, str] = field(default_factory=dict)
    _tree: Any = None
    _compiled: Any = None
    _types: Any = None

    def shapes(self, config: ModelConfig, params: Params) -> dict[str, list[Any]]:
        """Shape and dtype of each value, by name: what the function gives for this model."""
        shaped = jax.eval_shape(lambda params: self.fn(params, config), params)
        self._tree = jax.tree.structure(shaped)
        return _described(shaped)

    def run(self, show_progress: bool) -> None:
        stream, left = self.stream, self.stream.steps
        if left is not None and self.kept is not None:
            for step in left:
                if (there := self.kept.read(step)) is not None:
                    self.found[step], self.weights[step] = there
            if self.found:
                told = "%s: %d checkpoints have their values already"
                log.info(told, self.kept.folder, len(self.found))
            there = [step for step in left if step in self.found]
            if not all_say(there == from_first(there)):
                raise ValueError(f"{self.kept.folder}: not every process sees the same files there")
            left = [step for step in left if step not in self.found]
        total = None if left is None else len(left)
        with tqdm(
            total=total, desc=stream.name, unit="checkpoint", disable=not show_progress
        ) as bar:

            def each(arrived: Arrived) -> None:
                self._one(arrived)
                bar.set_postfix_str(f"step {arrived.step}")
                bar.update()

            stream.visit(each, self.mesh, steps=left)

    def _one(self, arrived: Arrived) -> None:
        step = arrived.step
        if arrived.missing is not None:
            self.missing[step] = arrived.missing
            return
        weights = self.stream.weights(arrived)
        self._tell_same(step, weights)
        if self.kept is not None and (there := self.kept.read(step, weights)) is not None:
            self.found[step], self.weights[step] = there
            return
        assert arrived.config is not None
        computed = self._compute(arrived.params, arrived.config, step)
        names = list(_described(computed))
        values = [_plain(value) for value in jax.tree.leaves(computed)]
        wrong = [n for n, v in zip(names, values, strict=True) if not np.isfinite(v).all()]
        if wrong:
            listed = ", ".join(name or "the value" for name in wrong)
            self.missing[step] = f"what it gives is not finite: {listed}"
            log.warning("step %d: passed over: %s", step, self.missing[step])
            return
        self.found[step], self.weights[step] = values, weights
        if self.kept is not None:
            self.kept.begin(arrived.config, _described(computed))
            self.kept.write(step, values, weights, arrived.called)

    def _compute(self, params: Params, config: ModelConfig, step: int) -> Any:
        if self._compiled is None:
            self._types = _dtypes(params)
            whole = jax.sharding.NamedSharding(self.mesh, jax.P())  # any process can read it
            jitted = jax.jit(_called, static_argnums=2, out_shardings=whole)
            self._compiled = jitted.lower(_argument(self.fn), params, config).compile()
            preflight.check_memory(
                "a function of one checkpoint, beside the weights of the next one,",
                (1, params),
                program=lambda: self._compiled,
            )
        found = _dtypes(params)
        changed = [name for name, dtype in found.items() if self._types[name] != dtype]
        if changed:
            was, now = (types[changed[0]] for types in (self._types, found))
            raise ValueError(
                f"step {step}: {changed[0]} is {now}, and was {was} in the first checkpoint; give "
                "all of them in one dtype"
            )
        computed = self._compiled(_argument(self.fn), params)
        self._tree = jax.tree.structure(computed)
        return jax.device_get(computed)

    def _tell_same(self, step: int, weights: str) -> None:
        same = [before for before, known in self.weights.items() if known == weights]
        if not same or same[0] == step:
            return
        pair = tuple(sorted((same[0], step)))
        why = "audit them before drawing a curve"
        if pair == (0, 1):
            why = "as in all of Pythia: the first update has learning rate 0 (pythia#83)"
        name = self.stream.name or "checkpoints"
        log.warning("%s: step%d and step%d hold the same weights; %s", name, *pair, why)

    def result(self) -> OverCheckpoints:
        if not self.found:
            why = next(iter(self.missing.items()), None)
            told = "there is none" if why is None else f"step {why[0]}: {why[1]}"
            raise ValueError(f"nothing was computed of any checkpoint: {told}")
        steps = sorted(self.found)
        columns = [np.stack(column) for column in zip(*map(self.found.get, steps), strict=True)]
        if self.kept is not None:
            self.kept.finish(steps, columns)
        return OverCheckpoints(
            steps=np.array(steps),
            values=jax.tree.unflatten(self._tree, columns),
            weights=tuple(self.weights[step] for step in steps),
            missing=self.missing,
        )


def _called(fn: Any, params: Params, config: ModelConfig) -> Any:
    return fn(params, config)


def _argument(fn: Measured) -> Any:
    """As an argument of a compiled function, its arrays as values of that."""
    held = isinstance(fn, Measure | jax.tree_util.Partial)
    return fn if held else jax.tree_util.Partial(fn)


def _described(tree: Any) -> dict[str, list[Any]]:
    """Name → shape and dtype, as they are kept."""
    return {
        name_of(path): [list(np.shape(leaf)), _kept_dtype(np.dtype(leaf.dtype)).name]
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _dtypes(tree: Any) -> dict[str, str]:
    return {name_of(path): leaf.dtype.name for path, leaf in jax.tree.leaves_with_path(tree)}


def _kept_dtype(dtype: np.dtype) -> np.dtype:
    """NumPy's files know no bfloat16."""
    return np.dtype(np.float32) if dtype.name == "bfloat16" else dtype


def _plain(value: Any) -> np.ndarray:
    array = np.asarray(value)
    return array.astype(_kept_dtype(array.dtype), copy=False)


@dataclass(frozen=True, eq=False)
class GradientCosines:
    """Of the gradients of one batch at many checkpoints.

    cosines: between those of each two. norms: of each. missing: as of `OverCheckpoints`.
    """

    steps: Int[np.ndarray, " checkpoints"]
    cosines: Float[np.ndarray, "checkpoints checkpoints"]
    norms: Float[np.ndarray, " checkpoints"]
    missing: dict[int, str]


def gradient_cosines(
    checkpoints: Checkpoints,
    tokens: Int[AnyArray, "batch seq+1"],
    *,
    parameters: str | Sequence[str] = "*",
    dimension: int | None = 8192,
    revisions: str | Iterable[int] = "steps",
    config: ModelConfig | None = None,
    out: str | PathLike[str] | None = None,
    runtime: Runtime = Runtime(),
    show_progress: bool = True,
) -> GradientCosines:
    """Cosines between the gradients of a batch's mean loss at each two checkpoints.

    parameters: pattern or patterns over the paths of the parameter table. dimension: of the count
    sketch that is kept of each gradient (a power of two), of which the cosines have an error of
    about 1 / √dimension; None keeps the gradients whole, on this host. The other arguments are
    those of `over_checkpoints`, and so is what is raised; also ValueError for a pattern without a
    match.
    """
    paths = matching(parameters)
    how = f"of {', '.join(paths)}, {'whole' if dimension is None else f'sketch {dimension}'}"
    fn = Measure(
        np.asarray(tokens),
        _Gradient(paths, dimension, runtime),
        f"gradient {how}, {runtime}, {digest_of(tokens)}",
    )
    done = over_checkpoints(
        fn,
        checkpoints,
        revisions=revisions,
        config=config,
        out=out,
        show_progress=show_progress,
    )
    rows = done.values["gradient"].astype(np.float64)
    lengths = np.sqrt((rows**2).sum(-1))
    zero = done.steps[lengths == 0]
    if zero.size:
        raise ValueError(f"the gradient at step {zero[0]} is 0: it has no direction")
    unit = rows / lengths[:, None]
    return GradientCosines(done.steps, unit @ unit.T, done.values["norm"], done.missing)


@dataclass(frozen=True)
class _Gradient:
    paths: tuple[str, ...]
    dimension: int | None
    runtime: Runtime

    def __call__(self, params: Params, tokens: Any, config: ModelConfig) -> dict[str, jax.Array]:
        check_floats(params)
        tree = jax.grad(loss)(params, tokens, config, runtime=self.runtime)
        chosen = [
            leaf for path, leaf in jax.tree.leaves_with_path(tree) if name_of(path) in self.paths
        ]
        squares = sum(jax.numpy.sum(leaf.astype(jax.numpy.float32) ** 2) for leaf in chosen)
        if self.dimension is None:
            row = jax.numpy.concatenate([leaf.reshape(-1) for leaf in chosen])
        else:
            row = sketch(tree, self.dimension, self.paths)
        return {"gradient": row, "norm": jax.numpy.sqrt(squares)}


def read_curves(out: str | PathLike[str]) -> dict[str, np.ndarray]:
    """The stacked values that `over_checkpoints` left in a folder, by name, and `steps`."""
    path = Path(out) / "curves.npz"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; the call that makes it has not ended")
    with np.load(path) as kept:
        return {name: kept[name] for name in kept.files}
