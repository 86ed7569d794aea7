"""What is told of an update: a table for people, CSV and JSON for what comes after."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import pythia_jax
from pythia_jax.files import write_whole
from pythia_jax.interp.tables import write_csv
from pythia_jax.interp.updates import PARTS, Update
from pythia_jax.model.parameters import TABLE

PARAMETER_COLUMNS = (
    "parameter",
    "layer",
    "gradient",
    "change",
    "cosine",
    *(f"{kind}_{part}" for kind in ("norm", "share") for part in PARTS),
)


def by_group(values: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Sums of `[…, layers]` or `[…]` by path: of the embedding, each layer, norm, unembedding."""
    found: dict[str, Any] = {}
    for path in (parameter.path for parameter in TABLE):
        value = values[path]
        if path.startswith("layers/"):
            for layer in range(layers):
                name = f"layer {layer}"
                found[name] = found.get(name, 0) + np.asarray(value)[..., layer]
        else:
            name = path.partition("/")[0]
            found[name] = found.get(name, 0) + np.asarray(value)
    return found


def text(found: Update, differing: str, *, top: int = 10) -> str:
    """The update by layer, and the rows that did most."""
    clipped = "" if found.clip == 1 else f", multiplied by {found.clip:.4g} to clip it"
    lines = [
        f"step {found.step}: loss {found.loss:.5f}, learning rate {found.learning_rate:.4g}, "
        f"gradient norm {found.gradient_norm:.4g}{clipped}",
        "",
        f"{'':>16}  {'gradient':>9}  {'change':>9}  {'cosine':>7}  of the change: "
        + "  ".join(f"{part:>8}" for part in PARTS),
    ]
    for name, numbers in groups(found).items():
        shares = "  ".join(f"{numbers[part]:>8.1%}" for part in PARTS)
        lines.append(
            f"{name:>16}  {numbers['gradient']:>9.3g}  {numbers['change']:>9.3g}  "
            f"{numbers['cosine']:>7.3f}  {'':>14} {shares}"
        )
    lines += [
        "",
        "cosine: of the change and minus the gradient; of the change: what each part is of it",
        "",
        f"{'row':>6}  {'loss':>9}  {'after':>9}  {'change':>10}  {'predicted':>10}  "
        f"{'norm':>9}  {'dot':>10}",
    ]
    dots, norms, predicted = found.row_dots, found.row_norms, found.predicted
    for i in np.argsort(-np.abs(dots), kind="stable")[:top]:
        before, after = found.losses_before[i], found.losses_after[i]
        lines.append(
            f"{found.rows[i]:>6}  {before:>9.5f}  {after:>9.5f}  {after - before:>+10.2e}  "
            f"{predicted[i]:>+10.2e}  {norms[i]:>9.3g}  {dots[i]:>+10.2e}"
        )
    lines.append(
        f"({min(top, len(dots))} of {len(dots)} rows looked at, of {found.batch}; norm, and dot "
        "with the change: of the row's part of the clipped gradient)"
    )
    if len(dots) == found.batch:
        lines.append(
            f"dots of all rows add up to {dots.sum():+.4e}, the batch's is {found.batch_dot:+.4e}"
        )
    return "\n".join([*lines, *([f"the state after is {differing}"] if differing else [])])


def groups(found: Update) -> dict[str, dict[str, float]]:
    """Norm of gradient and change, their cosine, and the shares of `PARTS`, by layer; and `all`."""
    layers = max((v.size for p, v in found.change.items() if p.startswith("layers/")), default=0)
    square = {path: value**2 for path, value in found.change.items()}
    sums = {
        "gradient": by_group({p: v**2 for p, v in found.gradient.items()}, layers),
        "change": by_group(square, layers),
        "dot": by_group(
            {
                p: np.nan_to_num(v) * found.gradient[p] * found.change[p]
                for p, v in found.cosine.items()
            },
            layers,
        ),
    }
    for part in PARTS:
        given = {p: np.nan_to_num(v) * square[p] for p, v in found.shares[part].items()}
        sums[part] = by_group(given, layers)
    whole = {name: sum(of.values()) for name, of in sums.items()}
    made = {}
    for group in [*sums["change"], "all"]:
        own = {name: whole[name] if group == "all" else of[group] for name, of in sums.items()}
        moved = own["change"] or np.nan
        lengths = np.sqrt(own["gradient"] * own["change"]) or np.nan
        made[group] = {
            "gradient": float(np.sqrt(own["gradient"])),
            "change": float(np.sqrt(own["change"])),
            "cosine": float(own["dot"] / lengths),
            **{part: float(own[part] / moved) for part in PARTS},
        }
    return made


def write(out: Path, found: Update, differing: list[str] | None, about: Mapping[str, Any]) -> None:
    """Write `parameters.csv`, `rows.csv` and `update.json` into a folder."""
    out.mkdir(exist_ok=True)
    write_csv(out / "parameters.csv", PARAMETER_COLUMNS, _parameter_lines(found))
    layers = max((v.size for p, v in found.change.items() if p.startswith("layers/")), default=0)
    by_layer = {
        "dot": by_group(found.dots, layers),
        "norm": {
            name: np.sqrt(value)
            for name, value in by_group({p: v**2 for p, v in found.norms.items()}, layers).items()
        },
    }
    columns = {
        "row": found.rows,
        "loss": found.losses_before,
        "loss_after": found.losses_after,
        "change": found.losses_after - found.losses_before,
        "predicted": found.predicted,
        "norm": found.row_norms,
        "dot": found.row_dots,
        **{f"{kind} {name}": value for kind, of in by_layer.items() for name, value in of.items()},
    }
    lines = zip(*columns.values(), strict=True)
    write_csv(out / "rows.csv", list(columns), lines)
    told = {
        **about,
        "step": found.step,
        "loss": found.loss,
        "learning_rate": found.learning_rate,
        "gradient_norm": found.gradient_norm,
        "clip": found.clip,
        "by_layer": groups(found),
        "rows": {"looked_at": len(found.rows), "of": found.batch},
        "dot": {"of_rows": float(found.row_dots.sum()), "of_batch": found.batch_dot},
        "differs_from_next_checkpoint": differing,
        "pythia_jax": pythia_jax.__version__,
        "jax": jax.__version__,
        "device_kind": jax.devices()[0].device_kind,
    }
    # NaN is no JSON: where nothing changed there is no cosine.
    content = json.dumps(_plain(told), indent=1, allow_nan=False).encode()
    write_whole(out / "update.json", content + b"\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _parameter_lines(found: Update) -> Iterator[list[Any]]:
    for path in (parameter.path for parameter in TABLE):
        norms = found.change[path]
        for layer in range(norms.size) if norms.ndim else (None,):
            values = [found.gradient, found.change, found.cosine]
            values += [kind[part] for kind in (found.parts, found.shares) for part in PARTS]
            numbers = [v[path] if layer is None else v[path][layer] for v in values]
            yield [path, "" if layer is None else layer, *map(float, numbers)]
