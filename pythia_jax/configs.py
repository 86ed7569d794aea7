"""Run configurations: frozen dataclasses, checked when made, read from and written to YAML.

`RunConfig` is everything a training run needs; `ModelConfig` and `Runtime`, of
`pythia_jax.model_config`, say which function is computed and how. Every mistake is one
`ConfigError` that names the key, the value and, for an unknown key, what it may have meant.
"""

import copy
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from pythia_jax.config_parsing import ConfigError, Section, build, read_yaml, require, set_dotted
from pythia_jax.data_config import DataConfig
from pythia_jax.files import write_whole
from pythia_jax.model_config import (
    EXACT_GELU,
    TANH_GELU,
    Attention,
    ModelConfig,
    Runtime,
    check_remat,
)
from pythia_jax.recipe import OptimizerConfig, Recipe, fill_in

__all__ = [
    "EXACT_GELU",
    "TANH_GELU",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "DistributedConfig",
    "EvaluationConfig",
    "InitializeConfig",
    "LoggingConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "Runtime",
    "TrainingConfig",
    "for_data",
    "from_dict",
    "load",
    "overridden",
    "save",
    "to_dict",
]


@dataclass(frozen=True)
class TrainingConfig(Section, where="training"):
    """How long, how wide and in which precision. `batch_size` is rows a step, over all devices.

    precision: of the computation; parameters and the optimizer's moments are float32 always.
        `float16` scales the loss as GPT-NeoX does.
    attention, remat: `Runtime` says what they mean.
    on_nonfinite: a loss or gradient that is no number changes no parameter; `stop` ends the run,
        `skip` goes on with the next batch.
    doubled_scale_quirk: whether, in float16, the gradient of a step at which the loss scale doubles
        is divided by the doubled scale, and so halved; else by the scale that it was made with.
    """

    steps: int = 143000
    batch_size: int = 1024
    gradient_accumulation: int = 1
    precision: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    attention: Attention = "auto"
    remat: str = "full"
    on_nonfinite: Literal["stop", "skip"] = "stop"
    doubled_scale_quirk: bool = True
    seed: int = 1234

    def _check(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation"):
            value = getattr(self, name)
            require(value >= 1, f"training.{name}", value, "it must be at least 1")
        require(
            self.batch_size % self.gradient_accumulation == 0,
            "training.gradient_accumulation",
            self.gradient_accumulation,
            f"it must divide batch_size ({self.batch_size})",
        )
        check_remat("training.remat", self.remat)
        require(0 <= self.seed < 2**32, "training.seed", self.seed, "seeds go from 0 to 2**32 - 1")


@dataclass(frozen=True)
class CheckpointConfig(Section, where="checkpoint"):
    """Which steps are kept for good (`every`, `extra_steps`, the last) and which only to resume."""

    directory: str = ""
    every: int = 1000
    extra_steps: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    archive: Literal["state", "params"] = "state"
    resume_every_minutes: float = 15.0
    keep_resume: int = 2

    def _check(self) -> None:
        require(self.every >= 1, "checkpoint.every", self.every, "it must be at least 1")
        require(
            all(step >= 0 for step in self.extra_steps),
            "checkpoint.extra_steps",
            self.extra_steps,
            "steps count from 0",
        )
        require(
            not set(self.directory) & set("[]*?"),
            "checkpoint.directory",
            self.directory,
            "Orbax reads [ ] * ? in a path as a pattern, and could not restore from it",
        )
        require(
            self.resume_every_minutes > 0,
            "checkpoint.resume_every_minutes",
            self.resume_every_minutes,
            "it must be > 0",
        )
        require(
            self.keep_resume >= 1, "checkpoint.keep_resume", self.keep_resume, "keep at least 1"
        )


@dataclass(frozen=True)
class EvaluationConfig(Section, where="evaluation"):
    """Held-out loss: `steps` batches every `every` training steps, as upstream counts them.

    tasks: of the LM Evaluation Harness (`pythia`: those of the paper), a list or text with commas,
    scored every `tasks_every` steps and at the end; with 0, at every checkpoint that stays.
    num_fewshot: examples before each question. limit: questions of each task, all if None.
    include_path: more task files.
    """

    every: int = 100000
    steps: int = 10
    tasks: tuple[str, ...] = ()
    tasks_every: int = 0
    num_fewshot: int = 0
    limit: int | None = None
    include_path: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.tasks, str):  # as --tasks takes them
            object.__setattr__(self, "tasks", tuple(self.tasks.split(",")))
        super().__post_init__()

    def _check(self) -> None:
        require(self.every >= 1, "evaluation.every", self.every, "it must be at least 1")
        for key in ("steps", "tasks_every", "num_fewshot"):
            value = getattr(self, key)
            require(value >= 0, f"evaluation.{key}", value, "it must be at least 0")
        limit = 1 if self.limit is None else self.limit
        require(limit >= 1, "evaluation.limit", self.limit, "it must be at least 1")


@dataclass(frozen=True)
class MeshConfig(Section, where="mesh"):
    """Devices along each axis; -1, for one of them, takes what the others leave.

    data: copies of the parameters, each with rows of its own. fsdp: rows of their own too, but the
    parameters are cut between them. tensor: heads and the width of the MLP are cut. slices: TPU
    slices joined by the data-centre network, each with copies of the parameters.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    slices: int = 1

    def _check(self) -> None:
        for name, size in vars(self).items():
            require(size >= 1 or size == -1, f"mesh.{name}", size, "at least 1, or -1 for the rest")
        open_axes = [name for name, size in vars(self).items() if size == -1]
        require(
            len(open_axes) <= 1,
            " and ".join(f"mesh.{name}" for name in open_axes),
            -1,
            "one axis takes what is left; give the others a size (mesh.fsdp is -1 unless set)",
        )


@dataclass(frozen=True)
class DistributedConfig(Section, where="distributed"):
    """Several processes in one run. One that is silent for `heartbeat_seconds` ends the others."""

    heartbeat_seconds: int = 100

    def _check(self) -> None:
        seconds = self.heartbeat_seconds
        require(seconds >= 1, "distributed.heartbeat_seconds", seconds, "it must be at least 1")


@dataclass(frozen=True)
class LoggingConfig(Section, where="logging"):
    """One line of metrics every so many steps. wandb: a Weights & Biases project to log to."""

    every: int = 10
    wandb: str | None = None

    def _check(self) -> None:
        require(self.every >= 1, "logging.every", self.every, "it must be at least 1")


@dataclass(frozen=True)
class InitializeConfig(Section, where="initialize_from"):
    """Weights that a run starts from, in place of fresh ones; `bridge.start` reads them.

    model: whatever `pj.load` takes. revision: of a model on the hub; of a run folder, `stepN`
        chooses the checkpoint, where that is not the one of `step`.
    step: the place in data and schedule where training begins; batches 0 to `step` - 1 count as
        seen. Left open, it is the source's own.
    optimizer_state: Adam's moments: the source's own (`checkpoint`), averaged from the gradients
        of the last K batches before `step` (`rebuild:K`), or none (`zero`).
    """

    model: str
    revision: str | None = None
    step: int | None = None
    optimizer_state: str = "zero"

    def _check(self) -> None:
        require(bool(self.model), "initialize_from.model", self.model, "name a model to start from")
        if self.step is not None:
            require(self.step >= 0, "initialize_from.step", self.step, "steps count from 0")
        require(
            re.fullmatch(r"checkpoint|zero|rebuild:[1-9]\d*", self.optimizer_state) is not None,
            "initialize_from.optimizer_state",
            self.optimizer_state,
            "choose checkpoint, zero, or rebuild:K with K batches, as in rebuild:60",
        )

    @property
    def rebuilt_from(self) -> int | None:
        """K of `rebuild:K`, else None."""
        kind, _, batches = self.optimizer_state.partition(":")
        return int(batches) if kind == "rebuild" else None


@dataclass(frozen=True)
class RunConfig(Section, where=""):
    """A training run. `model` may be left out where only the data is looked at.

    recipe: whose values `from_dict` and `load` give to the keys that are left out; those of
        `pythia_v1` are the defaults, and what each size was trained with. Made in Python, a config
        has what it is given.
    """

    name: str = "run"
    recipe: Recipe = "pythia_v1"
    model: ModelConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: str | None = None
    initialize_from: InitializeConfig | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def _check(self) -> None:
        if not self.checkpoint.directory:
            named = dataclasses.replace(self.checkpoint, directory=f"runs/{self.name}")
            object.__setattr__(self, "checkpoint", named)
        if self.model is not None:
            require(
                self.data.sequence_length <= self.model.max_position_embeddings,
                "data.sequence_length",
                self.data.sequence_length,
                f"the model has {self.model.max_position_embeddings} positions",
            )
        late = [step for step in self.optimizer.restarts if step >= self.training.steps]
        require(
            not late,
            "optimizer.restarts",
            self.optimizer.restarts,
            f"training ends at step {self.training.steps} (training.steps), so nothing begins anew "
            f"at {', '.join(map(str, late))}",
        )
        begin = self.begins_at
        require(
            begin <= self.training.steps,
            "initialize_from.step",
            begin,
            f"training ends at step {self.training.steps} (training.steps)",
        )

    @property
    def begins_at(self) -> int:
        """The first checkpoint: 0, or where `initialize_from` says."""
        source = self.initialize_from
        return 0 if source is None or source.step is None else source.step

    @property
    def runtime(self) -> Runtime:
        """How this run computes its model."""
        training = self.training
        return Runtime(dtype=training.precision, attention=training.attention, remat=training.remat)

    @property
    def checkpoint_steps(self) -> tuple[int, ...]:
        """Steps whose checkpoints stay: `extra_steps`, multiples of `every`, and the last.

        Of a run that starts from weights, also its first; there are none before that.
        """
        steps, checkpoint = self.training.steps, self.checkpoint
        scheduled = {*checkpoint.extra_steps, *range(checkpoint.every, steps, checkpoint.every)}
        ends = {steps} if self.initialize_from is None else {self.begins_at, steps}
        return tuple(sorted(s for s in scheduled | ends if self.begins_at <= s <= steps))


def from_dict(mapping: Mapping[str, Any]) -> RunConfig:
    """A `RunConfig` from nested plain values. `model.size` stands for the fields of that size, and
    `recipe` for what the other keys do not say.

    Raises `ConfigError` for unknown keys, wrong types and impossible values.
    """
    return build(RunConfig, fill_in(mapping) if isinstance(mapping, Mapping) else mapping, "")


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested plain values (dicts, lists, numbers, strings); `from_dict` takes them back."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return value

    return plain(dataclasses.asdict(config))


def load(path: str | Path, overrides: Mapping[str, str] | None = None) -> RunConfig:
    """Read a YAML file; `overrides` maps dotted keys (`optimizer.peak-learning-rate`) to text.

    Raises `ConfigError` for anything that is wrong: with the file's name or, where an override
    made it so, with that one's, as the flag that it is on the command line.
    """
    return overridden(read_yaml(Path(path)), overrides or {}, str(path))


def for_data(prefix: str, overrides: Mapping[str, str] | None = None) -> RunConfig:
    """A config of defaults, Pythia's, whose training data is the dataset at `prefix`."""
    return overridden({"data": {"train": [prefix]}}, overrides or {}, prefix)


def overridden(mapping: dict[str, Any], overrides: Mapping[str, str], name: str) -> RunConfig:
    """A `RunConfig` from plain values, some set anew by dotted keys; `name` is where they are from.

    Raises `ConfigError` as `load` does.
    """
    changed = copy.deepcopy(mapping)
    try:
        for key, text in overrides.items():
            set_dotted(changed, key, text, RunConfig)
        return from_dict(changed)
    except ConfigError as error:
        message = str(error)
    key = re.split(r":|\[", message)[0].replace("-", "_")
    for flag in overrides:
        told = flag.replace("-", "_")
        if told == key:
            raise ConfigError(f"--{flag}{message[len(key) :]}")
        if told.startswith(f"{key}.") or key.startswith(f"{told}."):
            raise ConfigError(f"--{flag}: {message}")
    try:
        from_dict(mapping)
    except ConfigError:
        raise ConfigError(f"{name}: {message}") from None
    flags = ", ".join(f"--{flag}" for flag in overrides)
    raise ConfigError(f"{name} with {flags}: {message}")


def save(config: RunConfig, path: str | Path, comment: str = "") -> None:
    """Write the effective config as YAML; whoever reads the file finds the old or the new one.

    comment: lines for its head.
    """
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    text = yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=100)
    write_whole(path, f"{head}{text}".encode())
