"""Files of a counterfactual: which rows are changed, by a table of hits, and what came of it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import pythia_jax
from pythia_jax.configs import RunConfig
from pythia_jax.data import batches
from pythia_jax.files import write_whole
from pythia_jax.interp import tables, training_rows
from pythia_jax.interp.counterfactuals import Counterfactual
from pythia_jax.interp.evaluation_rows import EvaluationRows
from pythia_jax.interp.resuming import told

_SHOWN = 20  # evaluation rows that are printed


def read_weights(path: Path, config: RunConfig, *, drop: bool) -> dict[tuple[int, int], float]:
    """Weights by (step, slot) of a table of hits, .csv or .parquet (`gradients query --out`).

    config: the run whose rows they are. drop: every row listed weighs 0; otherwise its column
    `weight` says what it weighs.

    Raises FileNotFoundError, and ValueError, naming the line, for what is no such table: a column
    missing, no whole number, one row with two weights; for lines of a part of a sequence; and for
    rows of other data than the run's, where a column `data` tells of which they are.
    """
    weights: dict[tuple[int, int], float] = {}
    ours: set[str] = set()
    for name, line in tables.read(path):
        for column in ("step", "slot", *(() if drop else ("weight",))):
            if line.get(column) in (None, ""):
                raise ValueError(f"{name}: column {column} is missing")
        if drop and "weight" in line:
            raise ValueError(
                f"{path} has a column weight, and what is dropped weighs 0: give the file to "
                "--reweight, or leave the column out"
            )
        _refuse_part(name, line, config.data.sequence_length)
        _refuse_other_data(name, line, config, ours)
        place = (_whole(name, line, "step"), _whole(name, line, "slot"))
        weight = 0.0 if drop else _number(name, line["weight"])
        if weights.setdefault(place, weight) != weight:
            raise ValueError(
                f"{name}: step {place[0]}, slot {place[1]} has weight {weight} here, and "
                f"{weights[place]} before"
            )
    if not weights:
        raise ValueError(f"{path}: holds no rows")
    return weights


def _refuse_part(name: str, line: Mapping[str, Any], sequence_length: int) -> None:
    if "start" not in line or "stop" not in line:
        return
    span = (_whole(name, line, "start"), _whole(name, line, "stop"))
    if span[0] > 1 or span[1] < sequence_length + 1:  # token 0 is the target of nothing
        raise ValueError(
            f"{name}: tokens {span[0]}:{span[1]} are a part of a sequence, and the train step "
            "weighs whole ones: one document of a row cannot be left out. To leave out the whole "
            "row, take columns start and stop out of the table"
        )


def _refuse_other_data(
    name: str, line: Mapping[str, Any], config: RunConfig, ours: set[str]
) -> None:
    """ours: what was found to be of the run's data before."""
    told = str(line.get("data") or "")
    if not told or told in ours:
        return
    served = batches(config)
    try:
        same = training_rows.has_label(served, told)
    except ValueError as error:
        raise ValueError(f"{name}: column data: {error}") from None
    if not same:
        raise ValueError(
            f"{name}: is a row of other data, or of another order of it, than {served.source} "
            "(column data: steps, and a digest of their rows): query an index of this run's rows"
        )
    ours.add(told)


def _whole(name: str, line: Mapping[str, Any], column: str) -> int:
    value = _number(name, line[column])
    if value != int(value) or value < 0:
        raise ValueError(f"{name}: {column} {line[column]!r} is no whole number from 0 on")
    return int(value)


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = np.nan
    if not np.isfinite(number):
        raise ValueError(f"{name}: {value!r} is no finite number")
    return number


def check_folder(out: Path) -> None:
    """Refuse, before anything is computed, a folder that results cannot go to."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: there already, and not an empty folder; name another")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.absolute().parent} to make it in")


def write(
    out: Path,
    found: Counterfactual,
    rows: EvaluationRows,
    compared: Mapping[int, list[str]],
    about: Mapping[str, Any],
) -> None:
    """Write `evaluation.csv`, `steps.csv`, `rows.csv` and `counterfactual.json` into a folder.

    about: what the run was, for the last of them.
    """
    out.mkdir(exist_ok=True)
    losses = (found.before, found.base, found.changed, found.effect)
    evaluated = zip(range(len(rows)), rows.lengths.tolist(), *losses, strict=True)
    tables.write_csv(
        out / "evaluation.csv", ("row", "tokens", "before", "base", "changed", "change"), evaluated
    )
    of_steps = zip(
        range(found.start, found.start + found.steps),
        found.base_loss,
        found.changed_loss,
        found.changed_loss - found.base_loss,
        found.distance,
        strict=True,
    )
    columns = ("step", "base_loss", "changed_loss", "change", "distance")
    tables.write_csv(out / "steps.csv", columns, of_steps)
    weights = [(*place, weight) for place, weight in sorted(found.weights.items())]
    tables.write_csv(out / "rows.csv", ("step", "slot", "weight"), weights)
    told_of = {
        **about,
        "from": found.start,
        "train_steps": found.steps,
        "rows_changed": len(found.weights),
        "evaluated_on": rows.name,
        "loss": {
            "before": float(found.before.mean()),
            "base": float(found.base.mean()),
            "changed": float(found.changed.mean()),
            "change": float(found.effect.mean()),
            "unit": "nats a token, mean over rows",
        },
        "distance": {
            "changed_from_base": float(found.distance[-1]),
            "base_from_start": found.moved,
            "by_parameter": found.by_parameter,
        },
        "base_differs_from_run_at": {str(step): names for step, names in compared.items()},
        "pythia_jax": pythia_jax.__version__,
        "jax": jax.__version__,
        "device_kind": jax.devices()[0].device_kind,
    }
    write_whole(out / "counterfactual.json", json.dumps(told_of, indent=1).encode() + b"\n")


def text(found: Counterfactual, rows: EvaluationRows, compared: Mapping[int, list[str]]) -> str:
    """What came of it, for people."""
    zero = sum(weight == 0 for weight in found.weights.values())
    other = len(found.weights) - zero
    named = [f"{zero} rows dropped"] if zero else []
    named += [f"{other} rows reweighted"] if other else []
    end = found.start + found.steps
    lines = [f"checkpoint {found.start} to {end}, {' and '.join(named)}", ""]
    lines.append(f"loss of {rows.name}, in nats a token")
    lines.append(f"{'row':>6}  {'before':>9}  {'base':>9}  {'changed':>9}  {'change':>11}")
    order = np.argsort(-np.abs(found.effect), kind="stable")[:_SHOWN]
    numbers = (found.before, found.base, found.changed)
    for row in order:
        lines.append(_line(str(row), [x[row] for x in numbers], found.effect[row]))
    lines.append(_line("mean", [x.mean() for x in numbers], found.effect.mean()))
    if len(rows) > len(order):
        lines.append(f"({len(order)} of {len(rows)} rows, those changed most)")
    relative = found.distance[-1] / found.moved if found.moved else np.nan
    lines += [
        "",
        f"weights: {found.distance[-1]:.4g} from the base run's, {relative:.2%} of the "
        f"{found.moved:.4g} that these went",
    ]
    lines += [f"base run: {told(step, names)}" for step, names in sorted(compared.items())]
    if not compared:
        lines.append("base run: the run folder holds no checkpoint of these steps to compare with")
    return "\n".join(lines)


def _line(name: str, losses: list[Any], change: Any) -> str:
    shown = "  ".join(f"{loss:>9.5f}" for loss in losses)
    return f"{name:>6}  {shown}  {change:>+11.3e}"
