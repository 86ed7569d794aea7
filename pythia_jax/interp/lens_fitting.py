"""A tuned lens from the exact training batches of some steps, into a file."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from pythia_jax import sharding
from pythia_jax.bridge.model import Model
from pythia_jax.bridge.revisions import load_at
from pythia_jax.configs import MeshConfig, RunConfig
from pythia_jax.data import Batches, batches
from pythia_jax.interp import preflight, training_rows, tuned_lens
from pythia_jax.interp.lenses import LensLosses, TunedLens, lens_losses


@dataclass(frozen=True, eq=False)
class Fitted:
    """What became of a fit, on the rows of the last step, which it has not seen.

    Means over tokens, `[lens]` each, of the logit lens and of the tuned one.
    """

    before: LensLosses
    after: LensLosses
    held_out: int

    def text(self) -> str:
        """A line for each lens."""
        lines = [
            f"on step {self.held_out}, which was held out; nats a token",
            "lens   KL: logit   tuned   loss: logit   tuned   agreement: logit  tuned",
        ]
        for layer, row in enumerate(zip(*self.before, *self.after, strict=True)):
            loss, kl, agree, loss_after, kl_after, agree_after = map(float, row)
            lines.append(
                f"{layer:>4}  {kl:>10.4f} {kl_after:>7.4f}  {loss:>12.4f} {loss_after:>7.4f}  "
                f"{agree:>17.3f} {agree_after:>6.3f}"
            )
        return "\n".join(lines)


def fit_of(
    source: str | os.PathLike[str],
    config: RunConfig,
    start: int,
    stop: int,
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    step: int | None = None,
    rows: int | None = None,
    batch: int | None = None,
    learning_rate: float = 1.0,
    fsdp: int = 1,
    tensor: int = 1,
    show_progress: bool = True,
) -> Fitted:
    """Fit a tuned lens to a checkpoint (`pj.load`), one update a training batch, and write it.

    config: the run whose batches they are, of steps `start` to `stop` (not included); the last of
    them is held out. rows: the first so many of each batch; None is all. batch: of them, computed
    together; None goes by tokens. fsdp, tensor: devices that the weights are cut over.

    Raises FileExistsError if `out` is there, ValueError for what does not fit together, and as
    `pj.load` and `tuned_lens.fit` do.
    """
    out, served = Path(out), batches(config)
    if out.exists():
        raise FileExistsError(f"{out}: is there already; name another file, or move it away")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.parent} to write it in")
    if not 0 <= start < stop - 1 or stop > len(served):
        raise ValueError(
            f"steps {start}:{stop} (half-open): at least two are wanted, one to fit and one to "
            f"hold out, of the {len(served):,} of {served.name}"
        )
    if rows is not None and not 1 <= rows <= served.batch_size:
        raise ValueError(f"rows {rows}: from 1 to {served.batch_size}, the rows of a batch")
    mesh = sharding.make_mesh(MeshConfig(data=-1, fsdp=fsdp, tensor=tensor), jax.local_devices())
    with jax.set_mesh(mesh):
        model = load_at(source, revision=revision, step=step)
        training_rows.check(config, served, model.config, start, stop)
        taken = slice(rows)

        def inputs() -> Iterator[NDArray[np.int32]]:
            numbers = range(start, stop - 1)
            for number in preflight.timed(numbers, len(numbers), "the updates that are left"):
                yield served.read(number, taken)[:, :-1]

        lens = tuned_lens.fit(
            model.params,
            inputs(),
            model.config,
            steps=stop - 1 - start,
            learning_rate=learning_rate,
            rows=batch,
            show_progress=show_progress,
        )
        found = [_losses(model, each, served, stop - 1, taken, batch) for each in (None, lens)]
        about = {"source": model.source, "step": model.step, "data": config.name}
        told = {key: str(value) for key, value in about.items() if value is not None}
        tuned_lens.save(lens, out, {**told, "steps": f"{start}:{stop - 1}"})
    return Fitted(*found, held_out=stop - 1)


def _losses(
    model: Model,
    lens: TunedLens | None,
    served: Batches,
    step: int,
    taken: slice,
    batch: int | None,
) -> LensLosses:
    """Means over the rows of a step, some of them at a time."""
    tokens = served.read(step, taken)
    together = training_rows.together(batch, len(tokens), tokens.shape[1] - 1)
    parts: list[list[Float[NDArray, "lens rows"]]] = []
    for first in range(0, len(tokens), together):
        own = tokens[first : first + together]
        filled = np.resize(own, (together, tokens.shape[1]))
        found = lens_losses(model.params, filled, model.config, lens=lens)
        parts.append([np.asarray(x)[:, : len(own)] for x in found])
    return LensLosses(*(np.concatenate(x, axis=1).mean(axis=1) for x in zip(*parts, strict=True)))  # type: ignore[arg-type]
