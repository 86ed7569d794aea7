"""Are these checkpoints what their labels say? To be asked before anyone draws a curve from them.

Of a published suite, 86 of the 154 revisions of one model held weights from the end of training
(EleutherAI/pythia#205). An audit finds copies (whole, or of single parameters), labels that do not
fit the weights, steps that are missing, NaN, and a step 0 that training cannot have started from.
"""

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pythia_jax.bridge.revisions import on_all_devices
from pythia_jax.configs import ModelConfig
from pythia_jax.files import write_whole
from pythia_jax.interp import audit_rules as rules
from pythia_jax.interp.audit_known import Known, expected, known_of
from pythia_jax.interp.sketch import DIMENSION, sketch
from pythia_jax.interp.streaming import Arrived, Checkpoints, Stream
from pythia_jax.model import parameters
from pythia_jax.model.parameters import Params
from pythia_jax.training.digests import digests

COLUMNS = ("step", "weights", "norm", "distance", "relative", "verdict")


@dataclass(frozen=True)
class Finding:
    """kind: `copy`, `place`, `missing`, `unreadable`, `nan`, `start`, `known` or `note`.

    fault: whether something is wrong; else it should only be known.
    """

    kind: str
    steps: tuple[int, ...]
    text: str
    fault: bool = True


@dataclass(frozen=True)
class Row:
    """A checkpoint: hash of its weights, their norm, the distance from the checkpoint before it
    that could be compared, as it is and as a share of the norm, and what was found."""

    step: int
    weights: str | None = None
    norm: float | None = None
    distance: float | None = None
    relative: float | None = None
    verdict: str = ""


@dataclass(frozen=True, eq=False)
class Audit:
    """What came of an audit.

    steps, distances: of the checkpoints without NaN, the distance between the weights of each two,
    estimated by sketches to about 1 %; those in `rows` are exact.
    """

    model: str | None
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...]
    steps: tuple[int, ...]
    distances: Float[np.ndarray, "k k"]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not any(finding.fault for finding in self.findings)

    def table(self) -> str:
        """The rows as text."""
        cells = [COLUMNS, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS) - 1)]
        return "\n".join(
            "  ".join(
                [*(cell.rjust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]
            ).rstrip()
            for line in cells
        )

    def verdicts(self) -> list[str]:
        """The findings, a line each; what is wrong comes first."""
        ranked = sorted(self.findings, key=lambda finding: not finding.fault)
        return [f"{'wrong' if f.fault else 'note'}: {f.text}" for f in ranked]

    def save(self, path: str | PathLike[str]) -> None:
        """Write `.json` (all of it) or `.csv` (the rows). Raises ValueError for another name."""
        path = Path(path)
        check_out(path)
        if path.suffix == ".csv":
            lines = [",".join(COLUMNS), *(_comma_separated(row) for row in self.rows)]
            write_whole(path, ("\n".join(lines) + "\n").encode())
            return
        content = {
            "model": self.model,
            "ok": self.ok,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "checkpoints": [dataclasses.asdict(row) for row in self.rows],
            "estimated_distances": {"steps": self.steps, "between": self.distances.tolist()},
        }
        write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def check_out(path: Path) -> None:
    """Raises ValueError for a file that an audit cannot be written as."""
    if path.suffix not in (".json", ".csv"):
        raise ValueError(f"{path}: an audit is written as .json or .csv")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent} to write it in")


def audit(
    checkpoints: Checkpoints,
    *,
    revisions: str | Iterable[int] = "steps",
    config: ModelConfig | None = None,
    show_progress: bool = True,
) -> Audit:
    """Look at every checkpoint of a model, and at the distances between them.

    checkpoints: a model's name on the hub, a run folder (gs:// too), a folder of GPT-NeoX's
    `global_stepN`; or pairs (step, params), steps rising, with their `config`. revisions: as for
    `over_checkpoints`.

    Steps should be those of the suite, of the run's own schedule, or else as regular as most of
    them are. On the mesh around us, or all devices; two checkpoints are held at a time, and 4096
    numbers of every one. A checkpoint that cannot be loaded is a finding.

    Labels are told to be wrong where exchanging two of them shortens the path through all
    checkpoints (`audit_rules.misplaced`). Distances cannot tell a series from its reverse, and of
    fewer than three checkpoints they tell nothing.

    Raises ValueError and FileNotFoundError for checkpoints that are not there at all.
    """
    known = known_of(checkpoints)
    stream = Stream(checkpoints, revisions, config, expected=expected(known))
    with ExitStack() as stack:
        mesh = stack.enter_context(on_all_devices())
        stack.enter_context(logging_redirect_tqdm())
        walk = _Walk(stream, known, mesh)
        total = None if stream.steps is None else len(stream.steps)
        with tqdm(
            total=total, desc=stream.name, unit="checkpoint", disable=not show_progress
        ) as bar:

            def each(arrived: Arrived) -> None:
                walk.one(arrived)
                bar.set_postfix_str(f"step {arrived.step}")
                bar.update()

            # The one before is still held: the next may not come yet.
            stream.visit(each, mesh, ahead=False)
    return walk.concluded(every=revisions == "steps")


@dataclass
class _Walk:
    """From checkpoint to checkpoint."""

    stream: Stream
    known: Known
    mesh: Mesh
    rows: dict[int, Row] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    hashes: dict[int, str] = field(default_factory=dict)
    parts: dict[int, dict[str, str]] = field(default_factory=dict)
    places: dict[int, np.ndarray] = field(default_factory=dict)
    _bad: dict[str, list[int]] = field(default_factory=dict)
    _absent: list[int] = field(default_factory=list)
    _before: Params | None = None
    _sketch: Any = 0.0

    def one(self, arrived: Arrived) -> None:
        step = arrived.step
        bad = self.known.bad(step)
        if bad is not None:
            self._bad.setdefault(bad, []).append(step)
        if arrived.missing is not None:
            self.rows[step] = Row(step)
            if arrived.absent:
                self._absent.append(step)
            else:
                text = f"step {step} cannot be loaded: {arrived.missing}"
                self._find("unreadable", (step,), text)
            return
        params = arrived.params
        self.hashes[step] = self.stream.weights(arrived)
        large = {f"params/{p.path}" for p in parameters.TABLE if p.decayed}
        found = digests({"params": params})
        self.parts[step] = {name.removeprefix("params/"): found[name] for name in large}
        whole = jax.sharding.NamedSharding(self.mesh, jax.P())
        looks = jax.device_get(jax.jit(_looked, out_shardings=whole)(params))
        norm = math.sqrt(sum(look["squares"].astype(np.float64).sum() for look in looks.values()))
        self.rows[step] = Row(step, self.hashes[step], norm)
        nan = [path for path, look in looks.items() if look["bad"]]
        if nan:
            self._find("nan", (step,), f"step {step} is not finite in {', '.join(nan)}")
            return
        if step == 0 and self.known.fresh and arrived.config is not None:
            self._start(looks, arrived.config)
        if self._before is not None:
            squares, between = jax.device_get(
                jax.jit(_between, out_shardings=whole)(self._before, params)
            )
            distance = math.sqrt(sum(rows.astype(np.float64).sum() for rows in squares))
            self.rows[step] = dataclasses.replace(
                self.rows[step], distance=distance, relative=distance / norm if norm else None
            )
            # Differences summed: the sketch of a small one is not lost in that of the weights.
            self._sketch = self._sketch + between.astype(np.float64)
        else:
            self._sketch = np.zeros(DIMENSION)
        self.places[step] = self._sketch
        self._before = params

    def _find(self, kind: str, steps: tuple[int, ...], text: str, *, fault: bool = True) -> None:
        self.findings.append(Finding(kind, steps, text, fault))

    def _start(self, looks: dict[str, dict[str, np.ndarray]], config: ModelConfig) -> None:
        """Hold step 0 against the distributions that training starts from."""
        initializer = self.known.initializer
        tried = ("small_wang", "normal_scaled") if initializer is None else (initializer,)
        wrong = [_unlike_start(looks, dataclasses.replace(config, initializer=i)) for i in tried]
        if all(wrong):
            told = f"step 0 is not what training starts from: {min(wrong, key=len)[0]}"
            if initializer is None:
                told += " (but how this model was initialised is not known)"
            self._find("start", (0,), told, fault=initializer is not None)

    def concluded(self, *, every: bool) -> Audit:
        steps = sorted(self.places)
        distances = _distances([self.places[step] for step in steps])
        kept = self._copies(steps, distances)
        self._partial_copies()
        at = [steps.index(step) for step in kept]
        self._places(kept, distances[np.ix_(at, at)])
        self._gaps(every)
        for why, bad in self._bad.items():
            self._find("known", tuple(bad), f"{_listed(bad)} {why}")
        self.findings += [Finding("note", (), text, fault=False) for text in self.known.notes]
        verdicts = defaultdict(list)
        for finding in self.findings:
            for step in finding.steps:
                if finding.fault and finding.kind not in verdicts[step]:
                    verdicts[step].append(finding.kind)
        for step in verdicts:
            self.rows.setdefault(step, Row(step))
        rows = (
            dataclasses.replace(self.rows[step], verdict=", ".join(verdicts[step]))
            for step in sorted(self.rows)
        )
        return Audit(self.stream.name, tuple(rows), tuple(self.findings), tuple(steps), distances)

    def _gaps(self, every: bool) -> None:
        if self._absent:
            whose = f", by {self.known.schedule} schedule" if self.known.schedule else ""
            text = f"{_listed(self._absent)} should be there{whose}, and is not"
            self._find("missing", tuple(self._absent), text)
        gaps = rules.gaps(list(self.rows)) if self.known.steps is None and every else []
        if gaps:
            text = f"{_listed(gaps)} is not there, and the other steps are regular"
            self._find("missing", tuple(gaps), text)

    def _copies(self, steps: list[int], distances: np.ndarray) -> list[int]:
        """Tell the copies; the steps that are left without them."""
        groups = rules.groups(self.hashes)
        alone = sorted(set(steps) - {step for group in groups for step in group})
        kept = set(steps)
        for group in groups:
            own = [group[0]]
            for before, step in pairwise(group):
                why = self.known.unmoved(before, step)
                if why:
                    text = f"step {before} and step {step} hold the same weights, {why}"
                    self._find("copy", (before, step), text, fault=False)
                    kept.discard(step)
                else:
                    own.append(step)
            if len(own) < 2:
                continue
            whose = rules.original(own, alone, steps, distances) if own[0] in kept else None
            text = f"{_listed(own)} hold the same weights"
            text += "" if whose is None else f", which seem to be those of step {whose}"
            self._find("copy", tuple(own), text)
            kept -= {step for step in own if step != (own[0] if whose is None else whose)}
        return sorted(kept)

    def _partial_copies(self) -> None:
        for before, step, names in rules.returns(self.parts):
            text = f"of step {step}, {', '.join(sorted(names))} is that of step {before}"
            self._find("copy", (before, step), text)

    def _places(self, steps: list[int], distances: np.ndarray) -> None:
        if len(steps) < rules.FEWEST:
            text = f"too few checkpoints to compare ({len(steps)}) to tell whether labels fit"
            self._find("note", (), text, fault=False)
            return
        seems, untold = rules.misplaced(steps, distances)
        told = untold <= rules.UNTOLD * (len(steps) - 1)
        if not told:
            text = (
                f"updates go back and forth: of {untold} of {len(steps) - 1} neighbouring steps, "
                "distances do not tell which comes first"
            )
            self._find("note", (), text, fault=False)
        for step, other in seems.items():
            if seems.get(other) != step:
                text = f"step {step} seems to hold step {other}"
                self._find("place", (step,), text, fault=told)
            elif step < other:
                text = f"step {step} and step {other} seem to hold each other's weights"
                self._find("place", (step, other), text, fault=told)
        order = [steps.index(seems.get(step, step)) for step in steps]
        for place in rules.strangers(range(len(steps)), distances[np.ix_(order, order)]):
            step = steps[order[place]]
            text = f"step {step} lies far from its neighbours, which are near to each other"
            self._find("place", (step,), text)


def _looked(params: Params) -> dict[str, dict[str, jax.Array]]:
    """Of each parameter: how many numbers are none, sums by row, and what norms and biases differ
    by from their start. Rows are added up on the host, in float64."""

    def look(parameter: parameters.Parameter, value: jax.Array) -> dict[str, jax.Array]:
        value = _wide(value)
        start = 1.0 if parameter.init == "ones" else 0.0
        return {
            "bad": jnp.sum(~jnp.isfinite(value)),
            "sums": jnp.sum(value, axis=-1),
            "squares": jnp.sum(value**2, axis=-1),
            "off": jnp.max(jnp.abs(value - start)),
        }

    return {p.path: look(p, value) for p, value in parameters.items(params)}


def _between(before: Params, params: Params) -> tuple[list[jax.Array], jax.Array]:
    """The difference: squares by row, and its sketch."""
    difference = jax.tree.map(lambda now, was: _wide(now) - _wide(was), params, before)
    squares = [jnp.sum(value**2, axis=-1) for value in jax.tree.leaves(difference)]
    return squares, sketch(difference)


def _wide(value: jax.Array) -> jax.Array:
    return value.astype(jnp.promote_types(value.dtype, jnp.float32))


def _unlike_start(looks: dict[str, dict[str, np.ndarray]], config: ModelConfig) -> list[str]:
    """What of a step 0 cannot have been drawn from the distributions of its initialiser.

    A standard deviation may be off by 2 % (published weights are rounded) and by five of its own
    standard errors.
    """
    deviations, wrong = parameters.standard_deviations(config), []
    for parameter in parameters.TABLE:
        look, size = looks[parameter.path], math.prod(parameter.shape(config))
        if parameter.init in ("zeros", "ones"):
            if look["off"] > 0:
                wrong.append(f"{parameter.path} is not all {parameter.init}")
            continue
        wanted = deviations[parameter.init]
        mean = look["sums"].astype(np.float64).sum() / size
        found = math.sqrt(max(look["squares"].astype(np.float64).sum() / size - mean**2, 0.0))
        if abs(found - wanted) > wanted * (0.02 + 5 / math.sqrt(2 * size)):
            wrong.append(
                f"{parameter.path} has a standard deviation of {found:.3g}, not {wanted:.3g} "
                f"({config.initializer})"
            )
        elif abs(mean) > wanted * (0.02 + 5 / math.sqrt(size)):
            wrong.append(f"{parameter.path} has a mean of {mean:.3g}, not 0")
    return wrong


def _distances(places: list[np.ndarray]) -> np.ndarray:
    """Between each two of a list of vectors; each difference is formed, so equal ones give 0."""
    stacked = np.array(places).reshape(len(places), -1)
    rows = [np.sqrt(((stacked - one) ** 2).sum(-1)) for one in stacked]
    return np.array(rows).reshape(len(places), len(places))


def _listed(steps: list[int]) -> str:
    head = ", ".join(map(str, steps[:-1]))
    return f"step {head} and {steps[-1]}" if head else f"step {steps[-1]}"


def _cells(row: Row) -> tuple[str, ...]:
    numbers = ("" if v is None else f"{v:.4g}" for v in (row.norm, row.distance, row.relative))
    return (str(row.step), (row.weights or "")[:12], *numbers, row.verdict)


def _comma_separated(row: Row) -> str:
    values = dataclasses.asdict(row)
    values["verdict"] = row.verdict.replace(", ", "; ")
    return ",".join("" if values[c] is None else str(values[c]) for c in COLUMNS)
