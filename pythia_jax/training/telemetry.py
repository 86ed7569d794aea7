"""What a run tells about itself: metrics.jsonl, TensorBoard events, a progress bar, loss.png."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm

from pythia_jax.configs import RunConfig


class NonFiniteError(RuntimeError):
    """The loss or the gradient stopped being a number; nothing computed from it was saved."""


class Telemetry:
    """Records the metrics of steps, each one step late, so that the device never waits for us.

    A context manager. `start` is the checkpoint that the run goes on from: lines of later steps,
    left by a run that was cut off, are dropped and written anew.
    """

    def __init__(
        self, config: RunConfig, start: int, schedule: Callable[[int], Any], show_progress: bool
    ) -> None:
        folder = Path(config.checkpoint.directory)
        self._config = config
        self._schedule = schedule
        self._path = folder / "metrics.jsonl"
        drop_lines_from(self._path, start)
        self._file = self._path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(folder / "events"), purge_step=start or None)
        self._bar = tqdm(
            total=config.training.steps,
            initial=start,
            desc=config.name,
            unit="step",
            disable=not show_progress,
            dynamic_ncols=True,
        )
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._since, self._steps_since, self._data_wait = time.perf_counter(), 0, 0.0

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.flush()
        self._bar.close()
        self._events.close()
        self._file.close()

    def step(self, step: int, metrics: dict[str, jax.Array], data_wait: float) -> None:
        """Take the metrics of batch `step`, still being computed; record those before it."""
        self.flush()
        self._pending = (step, metrics)
        self._data_wait += data_wait

    def flush(self) -> None:
        """Wait for the last step and record it. Raises NonFiniteError if it failed."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in metrics.items()}
        self._require_numbers(step, values)
        self._steps_since += 1
        self._bar.update()
        if step % self._config.logging.every and step != self._config.training.steps - 1:
            return
        now = time.perf_counter()
        seconds = now - self._since
        rows = self._steps_since * self._config.training.batch_size
        values |= {
            "learning_rate": float(self._schedule(step)),
            "tokens_per_second": rows * self._config.data.sequence_length / seconds,
            "step_time_s": seconds / self._steps_since,
            "data_wait_s": self._data_wait / self._steps_since,
        }
        self._since, self._steps_since, self._data_wait = now, 0, 0.0
        self.write(step, values)
        speed = f"{values['tokens_per_second']:,.0f}"
        self._bar.set_postfix({"loss": f"{values['loss']:.3f}", "tokens/s": speed})

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl and one TensorBoard event a value.

        Raises NonFiniteError, with nothing written, if a value is no number.
        """
        self._require_numbers(step, values)
        self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def _require_numbers(self, step: int, values: dict[str, float]) -> None:
        if not all(map(math.isfinite, values.values())):
            raise NonFiniteError(
                f"step {step}: {values}; the newest checkpoint in {self._path.parent} is from "
                "before it. Lower the learning rate, or look at the batch with `data batches`"
            )

    def restart_clock(self) -> None:
        """Leave what was done since the last step (saving, evaluating) out of the speed.

        Steps, seconds and waits begin anew together, or a mean of them would be wrong.
        """
        self._since, self._steps_since, self._data_wait = time.perf_counter(), 0, 0.0


def drop_lines_from(path: Path, step: int) -> None:
    """Drop the lines of `step` and later, and a last line that was cut off, from a metrics file."""
    if not path.is_file():
        return
    kept = [line for line in read_metrics(path) if line["step"] < step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    partial.replace(path)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics file; one cut off by a crash is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def plot_loss(folder: Path, title: str) -> Path:
    """Draw `loss.png` from a run folder's metrics: training loss, held-out loss, learning rate."""
    # Slow to import, and only wanted here.
    from matplotlib.figure import Figure

    lines = read_metrics(folder / "metrics.jsonl")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    styles: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("training", "loss", {"color": "#0072B2", "linewidth": 1.5}),
        ("held out", "validation_loss", {"color": "#D55E00", "marker": "o", "linestyle": "--"}),
    )
    for name, key, style in styles:
        chosen = [line for line in lines if key in line]
        if chosen:
            x, y = [line["step"] for line in chosen], [line[key] for line in chosen]
            axes.plot(x, y, label=name, **style)
    rate = axes.twinx()
    chosen = [line for line in lines if "learning_rate" in line]
    x, y = [line["step"] for line in chosen], [line["learning_rate"] for line in chosen]
    rate.plot(x, y, color="#999999", linewidth=1)
    rate.set_ylabel("learning rate", color="#666666")
    rate.set_ylim(bottom=0)
    axes.set_zorder(rate.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    path = folder / "loss.png"
    figure.savefig(path, dpi=150)
    return path
