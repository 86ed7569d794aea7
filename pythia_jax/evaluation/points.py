"""Scores as points of curves: which belong to one line, and all of them as a table."""

import csv
import io
import logging
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pythia_jax.config_parsing import ConfigError
from pythia_jax.data.storage import is_url
from pythia_jax.evaluation import names
from pythia_jax.evaluation.results import Result
from pythia_jax.files import write_whole

log = logging.getLogger(__name__)

AXES = ("step", "tokens", "parameters")
TRAINING = "training"
"""Where a task stands, in metrics that are of metrics.jsonl: `training:loss`."""
COLUMNS = (
    "model", "size", "seed", "version", "step", "tokens", "parameters", "shots", "kind", "harness",
    "source", "task", "metric", "value", "stderr", "notes", "path",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One score of one checkpoint."""

    result: Result
    task: str
    metric: str
    value: float
    stderr: float | None

    def x(self, axis: str) -> int | None:
        """Where it lies on one of `AXES`; None where the file does not tell."""
        return getattr(self.result, axis)


@dataclass(frozen=True)
class Line:
    """What one line of a plot tells apart from the others.

    model: of it and of all its seeds. seed: of seeds drawn one by one.
    """

    model: str
    size: str | None
    deduped: bool
    seeds: bool
    seed: str | None
    version: str | None
    kind: str
    shots: int
    harness: str
    ours: bool
    notes: tuple[str, ...]


def parse_metric(text: str) -> tuple[str, str]:
    """`lambada_openai:acc` as a task and a metric, by their present names.

    Raises ValueError for a text that is none.
    """
    task, colon, metric = text.partition(":")
    if not (task and colon and metric):
        raise ValueError(f"metric {text!r}: give TASK:METRIC, as in lambada_openai:acc")
    return names.task_name(task), names.metric_name(metric)


def points(results: Iterable[Result], metric: str) -> list[Point]:
    """The points of a metric (`lambada_openai:acc`): each checkpoint once, by model and step.

    Two files that give one checkpoint the same number are one point. A file with notes is of
    another line than one without.

    Raises ValueError where two files of one line differ about a checkpoint, and where no file has
    the metric, with the metrics that there are.
    """
    results = list(results)
    task, name = parse_metric(metric)
    found: dict[tuple, Point] = {}
    for result in results:
        score = result.value(task, name)
        if score is None:
            continue
        point = Point(result, task, name, *score)
        key = (line_of(result, seed=result.seed), result.step)
        before = found.setdefault(key, point)
        none = math.isnan(before.value) and math.isnan(point.value)
        if before.value != point.value and not none:
            at = "" if result.step is None else f" at step {result.step}"
            raise ValueError(
                f"two files differ about {task}:{name} of {result.model}{at}: {before.value:g} in "
                f"{before.result.path}, {point.value:g} in {result.path}. Give one of them"
            )
    if not found:
        raise ValueError(f"no file has {task}:{name}; {_there_are(results, task)}")
    return sorted(found.values(), key=lambda p: (p.result.model, p.result.step or 0))


def training_points(runs: Sequence[str | Path], key: str) -> list[Point]:
    """A key of the metrics.jsonl of runs (`loss`, `learning_rate`, `grad_norm`, …) as points.

    A run is called what its config calls it; of several of one name each what its folder is called.

    Raises FileNotFoundError for a run without metrics, ValueError where none has the key.
    """
    from pythia_jax.training.records import read_metrics

    folders = list(dict.fromkeys(str(run).rstrip("/") for run in runs))
    about = [_run(folder) for folder in folders]
    called = [(run.model, run.seed, run.version) for run in about]
    found, keys = [], set()
    for folder, run, name in zip(folders, about, called, strict=True):
        if called.count(name) > 1:
            run = replace(run, model=folder, size=None, deduped=False, seed=None, version=None)
        lines = read_metrics(run.path)
        keys |= {k for line in lines for k in line} - {"step"}
        for line in lines:
            if key in line:
                at = replace(run, step=int(line["step"]))
                found.append(Point(at, TRAINING, key, line[key], None))
    if not found:
        raise ValueError(f"no run has {TRAINING}:{key}; there are {', '.join(sorted(keys))}")
    return found


def _run(folder: str) -> Result:
    """What a run's metrics are of; without scores, and without a step yet."""
    from pythia_jax.bridge.revisions import run_config
    from pythia_jax.model.parameters import count
    from pythia_jax.training.bucket import path_of

    about, tokens, parameters = names.ModelName(folder.rpartition("/")[2]), None, None
    try:
        config = run_config(path_of(folder))
        about = names.model_name(config.name)
        tokens = config.training.batch_size * config.data.sequence_length
        parameters = config.model and count(config.model, embedding=False)
    except (OSError, ConfigError) as error:
        log.warning("%s: its name, tokens and parameters are not known: %s", folder, error)
    return Result(
        model=about.model,
        step=None,
        num_fewshot=0,
        kind="plain",
        harness="",
        path=folder if is_url(folder) else Path(folder) / "metrics.jsonl",
        metrics={},
        size=about.size,
        deduped=about.deduped,
        seed=about.seed,
        version=about.version or ("v1" if about.size else None),
        tokens_per_step=tokens,
        parameters=parameters,
    )


def _there_are(results: Sequence[Result], task: str) -> str:
    metrics = {m for r in results for m in r.metrics.get(task, ()) if not names.is_stderr(m)}
    if metrics:
        return f"of {task} there are {', '.join(sorted(metrics))}"
    tasks = sorted({name for result in results for name in result.metrics})
    more = f" and {len(tasks) - 20} more" if len(tasks) > 20 else ""
    return f"the tasks there are: {', '.join(tasks[:20])}{more}"


def line_of(result: Result, seed: str | None = None) -> Line:
    """The line that a result lies on: that of all its seeds, or of the one given."""
    # `data-seed2` is of the seeds called data-seed.
    family = (result.seed or "").rstrip("0123456789")
    return Line(
        model=result.model + (f"-{family}s" if family and seed is None else ""),
        size=result.size,
        deduped=result.deduped,
        seeds=result.seed is not None and seed is None,
        seed=seed,
        version=result.version,
        kind=result.kind,
        shots=result.num_fewshot,
        harness=result.harness,
        ours=result.ours,
        notes=result.notes,
    )


@dataclass(frozen=True)
class Curve:
    """Points of one line, by x; where it is of several seeds, their mean, least and greatest.

    low, high: one standard error below and above, or the seeds' range; None where not given.
    """

    line: Line
    x: list[int]
    y: list[float]
    low: list[float] | None
    high: list[float] | None
    points: list[Point]


def curves(found: Iterable[Point], axis: str) -> list[Curve]:
    """Points as curves over steps or tokens, smallest model first.

    A mean over seeds is taken at the steps that all of them have; seeds that have none in common
    are drawn one by one. Points that cannot be placed on the axis are left out, in a warning; so
    are scores that are no finite number.
    """
    lines: dict[Line, list[Point]] = defaultdict(list)
    lost = set()
    for point in found:
        if point.x(axis) is None or not math.isfinite(point.value):
            lost.add(point.result.model)
        else:
            lines[line_of(point.result)].append(point)
    if lost:
        log.warning("left out, without %s or a finite score: %s", axis, ", ".join(sorted(lost)))
    drawn = []
    for line, members in lines.items():
        drawn += _of_seeds(line, members, axis) if line.seeds else [_curve(line, members, axis)]
    return sorted(drawn, key=order)


def order(curve: Curve) -> tuple:
    """Curves by size, and what is plain first."""
    result, line = curve.points[0].result, curve.line
    size = result.parameters or math.inf
    return (
        size,
        line.deduped,
        line.version or "",
        line.kind != "plain",
        line.shots,
        bool(line.notes),
        str(line),
    )


def _curve(line: Line, members: Iterable[Point], axis: str) -> Curve:
    members = sorted(members, key=lambda p: p.x(axis) or 0)
    y = [p.value for p in members]
    errors = [p.stderr for p in members]
    low = high = None
    if None not in errors:
        low = [v - (e or 0.0) for v, e in zip(y, errors, strict=True)]
        high = [v + (e or 0.0) for v, e in zip(y, errors, strict=True)]
    return Curve(line, [p.x(axis) or 0 for p in members], y, low, high, members)


def _of_seeds(line: Line, members: list[Point], axis: str) -> list[Curve]:
    by_x: dict[int, list[Point]] = defaultdict(list)
    for point in members:
        by_x[point.x(axis) or 0].append(point)
    seeds = sorted({p.result.seed for p in members if p.result.seed})
    shared = {x: of_x for x, of_x in sorted(by_x.items()) if len(of_x) == len(seeds)}
    if len(seeds) == 1 or not shared:
        by_seed = {s: [p for p in members if p.result.seed == s] for s in seeds}
        return [_curve(line_of(of[0].result, seed=s), of, axis) for s, of in by_seed.items()]
    values = {x: [p.value for p in of_x] for x, of_x in shared.items()}
    return [
        Curve(
            line,
            list(values),
            [statistics.fmean(of_x) for of_x in values.values()],
            [min(of_x) for of_x in values.values()],
            [max(of_x) for of_x in values.values()],
            [p for of_x in shared.values() for p in of_x],
        )
    ]


def over_sizes(found: Iterable[Point], step: int | None) -> list[Curve]:
    """Points at a step, or the last of each model, as curves over non-embedding parameters.

    A line joins the sizes of a family: Pythia, Pythia-deduped, OPT, BLOOM.
    """
    lines: dict[Line, list[Point]] = defaultdict(list)
    lost = set()
    for point in at_step(found, step):
        result = point.result
        if result.parameters is None or not math.isfinite(point.value):
            lost.add(result.model)
            continue
        line = line_of(result)
        lines[replace(line, model=_family(result, line.model), size=None)].append(point)
    if lost:
        log.warning("left out, without parameters or a finite score: %s", ", ".join(sorted(lost)))
    drawn = []
    for line, members in lines.items():
        of_line = _of_seeds if line.seeds else lambda *given: [_curve(*given)]
        drawn += of_line(line, members, "parameters")

    def place(curve: Curve) -> tuple:
        line = curve.line
        return (curve.points[0].result.step is None, line.model, bool(line.notes), str(line))

    return sorted(drawn, key=place)


def _family(result: Result, model: str) -> str:
    if result.size is not None:
        return model.replace(f"pythia-{result.size}", "Pythia")
    family, _, size = model.partition("-")
    return family.upper() if size and names.baseline_parameters(model) else model


def at_step(found: Iterable[Point], step: int | None) -> list[Point]:
    """For each model (each seed by itself) its points at a step, or at its last one.

    There are several where flagged files are beside the good one. Which step is the last is told by
    the files without notes, if there are any. What has no steps (a baseline) stays. Raises
    ValueError where nothing is at the step.
    """
    by_model: dict[Line, list[Point]] = defaultdict(list)
    for point in found:
        line = replace(line_of(point.result, seed=point.result.seed), notes=())
        by_model[line].append(point)
    chosen = []
    for members in by_model.values():
        good = [p for p in members if not p.result.notes] or members
        last = max((p.result.step or 0 for p in good), default=0) if step is None else step
        chosen += [p for p in members if p.result.step in (last, None)]
    if step is not None and not any(p.result.step == step for p in chosen):
        every = (p.result.step for of in by_model.values() for p in of)
        steps = sorted({at for at in every if at is not None})
        raise ValueError(f"no model has a score at step {step}; there are {_some(steps)}")
    return chosen


def _some(steps: Sequence[object]) -> str:
    shown = [str(step) for step in steps]
    return ", ".join(shown if len(shown) <= 30 else [*shown[:15], "…", *shown[-5:]])


def to_csv(found: Iterable[Point], path: str | Path) -> None:
    """Write points as a table, a row each, numbers exactly as they were read."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for point in found:
        r = point.result
        table.writerow(
            (
                r.model, r.size, r.seed, r.version, r.step, r.tokens, r.parameters,
                r.num_fewshot if r.harness else None,
                r.kind, r.harness, "pythia_jax" if r.ours else None, point.task, point.metric,
                repr(point.value), None if point.stderr is None else repr(point.stderr),
                "; ".join((*r.notes, *(("step doubled",) if r.doubled else ()))), r.path,
            )
        )  # fmt: skip
    write_whole(path, text.getvalue().encode())
