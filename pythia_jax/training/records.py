"""Where metrics are written: metrics.jsonl and TensorBoard always, Weights & Biases when asked."""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from tensorboardX import SummaryWriter

from pythia_jax import configs
from pythia_jax.configs import ConfigError, RunConfig
from pythia_jax.data.storage import is_url
from pythia_jax.files import write_whole
from pythia_jax.training.run_files import METRICS, read_parts

WANDB_ID = "wandb_id"
"""The file of the run folder that holds the run's id at Weights & Biases."""


class Records:
    """The open records of a run, which one process holds.

    start: the checkpoint that the run goes on from; what TensorBoard has of later steps is hidden.
    """

    def __init__(self, config: RunConfig, folder: Path, start: int) -> None:
        self._wandb = start_wandb(config, folder) if config.logging.wandb else None
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        self._events = SummaryWriter(str(folder / "events"), purge_step=start or None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, one event a value. Raises ValueError for NaN and infinity."""
        self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, float(value), step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **values})

    def flush(self) -> None:
        """Have all that was written in the files."""
        self._file.flush()
        self._events.flush()

    def close(self, *, failed: bool) -> None:
        self._file.close()
        self._events.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(failed))


def require_wandb(config: RunConfig) -> ModuleType | None:
    """The library of Weights & Biases, if `logging.wandb` asks for it.

    Raises ConfigError if it is asked for and not installed; call it before anything is computed.
    """
    if config.logging.wandb is None:
        return None
    try:
        import wandb  # type: ignore[import-not-found]

        # Where it is not installed, a folder of that name, as wandb itself leaves, is imported.
        if hasattr(wandb, "init"):
            return wandb
    except ImportError:
        pass
    raise ConfigError(
        f"logging.wandb: {config.logging.wandb!r}: Weights & Biases is not installed; "
        "`pip install wandb`, or leave the key out (metrics.jsonl and TensorBoard are always there)"
    )


def start_wandb(config: RunConfig, folder: Path) -> Any:
    """A run at Weights & Biases; the one that this folder began, if it has begun one.

    Values are drawn over our `step`, not over wandb's own counter, which takes no step twice: of
    steps that are done again after a crash, both values are shown.
    """
    wandb = require_wandb(config)
    assert wandb is not None
    file = folder / WANDB_ID
    if not file.is_file():
        write_whole(file, secrets.token_hex(4).encode())
    run = wandb.init(
        project=config.logging.wandb,
        name=config.name,
        id=file.read_text(encoding="utf-8").strip(),
        resume="allow",
        dir=str(folder),
        config=configs.to_dict(config),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def drop_lines_from(path: Path, step: int) -> list[dict[str, float]]:
    """Drop the lines of `step` and later, and a last line that was cut off, from a metrics file.

    Returns the lines that were dropped.
    """
    if not path.is_file():
        return []
    lines = read_metrics(path)
    kept = [line for line in lines if line["step"] < step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    partial.replace(path)
    return [line for line in lines if line["step"] >= step]


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The lines of a metrics file, or of a run folder at a gs:// URL, where they lie in parts.

    A line cut off by a crash is left out.
    """
    content = read_parts(os.fspath(path)) if is_url(path) else Path(path).read_bytes()
    lines = []
    for text in content.decode("utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines
