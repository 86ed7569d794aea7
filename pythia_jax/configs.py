"""Run configurations: frozen dataclasses, checked when made, read from and written to YAML.

`ModelConfig` says which function a model computes; `Runtime` says how it is computed on this
machine (dtype, attention kernel, rematerialisation); `RunConfig` is everything a training run
needs. Every mistake is one `ConfigError` that names the key, the value and, for an unknown key,
the nearest one that exists.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from pythia_jax import suite
from pythia_jax.config_parsing import ConfigError, Section, build, read_yaml, require, set_dotted
from pythia_jax.files import write_whole

EXACT_GELU = ("gelu", "gelu_python")
TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate")


def _size_fields(name: str) -> dict[str, Any]:
    try:
        entry = suite.lookup(name)
    except ValueError as error:
        raise ConfigError(f"model.size: {error}") from None
    return {
        key: getattr(entry, key)
        for key in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
            "initializer",
        )
    }


@dataclass(frozen=True)
class ModelConfig(Section, where="model"):
    """The function a GPT-NeoX model computes. Fields carry Hugging Face's names.

    `initializer` alone does not change the function: it is the distribution that training
    starts from (`small_wang` for 14m to 2.8b, `normal_scaled` for 6.9b and 12b).
    `intermediate_size` of -1 stands for 4 x `hidden_size`.
    """

    _shorthands: ClassVar = {"size": _size_fields}

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int = 50304
    intermediate_size: int = -1
    max_position_embeddings: int = 2048
    rotary_pct: float = 0.25
    rotary_emb_base: float = 10000.0
    layer_norm_eps: float = 1e-5
    hidden_act: str = "gelu_pytorch_tanh"
    use_parallel_residual: bool = True
    initializer: Literal["small_wang", "normal_scaled"] = "small_wang"

    def _check(self) -> None:
        if self.intermediate_size == -1:
            object.__setattr__(self, "intermediate_size", 4 * self.hidden_size)
        for name, value in vars(self).items():
            if isinstance(value, int) and not isinstance(value, bool):
                require(value >= 1, f"model.{name}", value, "it must be at least 1")
        require(
            self.hidden_size % self.num_attention_heads == 0,
            "model.num_attention_heads",
            self.num_attention_heads,
            f"heads must divide hidden_size ({self.hidden_size})",
        )
        require(
            0.0 <= self.rotary_pct <= 1.0,
            "model.rotary_pct",
            self.rotary_pct,
            "it is a share of each head, between 0 and 1",
        )
        require(
            self.rotary_size % 2 == 0,
            "model.rotary_pct",
            self.rotary_pct,
            f"int(head size {self.head_size} x rotary_pct) = {self.rotary_size} must be even",
        )
        require(
            self.rotary_emb_base > 0,
            "model.rotary_emb_base",
            self.rotary_emb_base,
            "it must be > 0",
        )
        require(
            self.layer_norm_eps > 0, "model.layer_norm_eps", self.layer_norm_eps, "it must be > 0"
        )
        known = EXACT_GELU + TANH_GELU
        require(
            self.hidden_act in known,
            "model.hidden_act",
            self.hidden_act,
            f"choose one of {', '.join(known)}",
        )

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_size(self) -> int:
        """Leading dimensions of each head that are rotated."""
        return int(self.head_size * self.rotary_pct)

    @property
    def tanh_gelu(self) -> bool:
        return self.hidden_act in TANH_GELU

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "ModelConfig":
        """From plain values, every key and type checked; raises ConfigError."""
        return build(cls, mapping, "model")

    @classmethod
    def from_size(cls, name: str, **overrides: Any) -> "ModelConfig":
        """The model of a suite size (`70m`, `pythia-70m-deduped`, old names too)."""
        return build(cls, {**overrides, "size": name}, "model")


@dataclass(frozen=True)
class Runtime(Section, where="runtime"):
    """How a model is computed; none of it changes the function, only its rounding, speed, memory.

    dtype: of the computation; None takes that of the parameters. LayerNorm statistics, softmax,
        rotary angles and the loss are at least float32 whatever it says.
    attention: `xla` works in blocks of queries and never holds all scores; `einsum` holds them;
        `auto` takes `xla`, or `einsum` where the sites asked for need scores or pattern.
    remat: what the backward pass recomputes: nothing (`none`), all but matrix products and what
        attention gave (`dots`), or each block whole (`full`).
    scan_layers: one compiled block run by `jax.lax.scan`, or every layer compiled on its own.
    loss: `fused` forms the gradient of the unembedding in the forward pass (one derivative in
        reverse, any number forward); `remat` recomputes chunks, for reverse over reverse.
    loss_chunk: tokens whose logits exist at once.
    """

    dtype: Literal["float32", "bfloat16", "float64"] | None = None
    attention: Literal["auto", "xla", "einsum"] = "auto"
    remat: Literal["none", "dots", "full"] = "none"
    scan_layers: bool = True
    loss: Literal["fused", "remat"] = "fused"
    loss_chunk: int = 512

    def _check(self) -> None:
        require(self.loss_chunk >= 1, "runtime.loss_chunk", self.loss_chunk, "at least 1 token")


@dataclass(frozen=True)
class DataConfig(Section, where="data"):
    """Where tokens lie and in which order they are served.

    train, validation, test: prefixes of datasets, mixed by weight, in equal shares by default.
    split: or how to divide the documents of the one train path: shares for training, validation
        and test, `969,30,1` or `969/30/1`; what is left out is 0.
    order: `neox`, GPT-NeoX v1.0's, from `seed`, or `preshuffled`, rows as they lie. Left open, it
        is `neox`, and data that looks shuffled already is refused.
    documents: prefix of the index of what preshuffled rows were made from.
    """

    train: tuple[str, ...] = ()
    train_weights: tuple[float, ...] | None = None
    validation: tuple[str, ...] = ()
    validation_weights: tuple[float, ...] | None = None
    test: tuple[str, ...] = ()
    test_weights: tuple[float, ...] | None = None
    split: str | None = None
    order: Literal["neox", "preshuffled"] | None = None
    documents: str | None = None
    transform: None = None
    sequence_length: int = 2048
    seed: int = 1234

    def _check(self) -> None:
        require(
            self.sequence_length >= 1,
            "data.sequence_length",
            self.sequence_length,
            "it must be at least 1",
        )
        require(
            0 <= self.seed < 2**32, "data.seed", self.seed, "NumPy takes seeds from 0 to 2**32 - 1"
        )
        for name in ("train", "validation", "test"):
            paths, weights = getattr(self, name), getattr(self, f"{name}_weights")
            require(
                len(paths) <= 254, f"data.{name}", len(paths), "a blend has at most 254 datasets"
            )
            if weights is None:
                continue
            require(
                len(weights) == len(paths),
                f"data.{name}_weights",
                weights,
                f"{len(weights)} weights do not match {len(paths)} paths in data.{name}",
            )
            require(
                all(w > 0 for w in weights),
                f"data.{name}_weights",
                weights,
                "weights must be positive",
            )
        if self.split is not None:
            self._check_split(self.split)
        if self.order == "preshuffled":
            self._check_preshuffled()
        else:
            require(
                self.documents is None,
                "data.documents",
                self.documents,
                "it names what preshuffled rows were made from; set data.order to preshuffled",
            )

    def _check_split(self, split: str) -> None:
        require(
            len(self.train) == 1 and not (self.validation or self.test),
            "data.split",
            split,
            "it divides the one path of data.train, beside no data.validation or data.test",
        )
        try:
            shares = self.split_shares
        except ValueError:
            shares = None
        require(
            shares is not None
            and len(shares) == 3
            and all(0 <= share < math.inf for share in shares)
            and sum(shares) > 0,
            "data.split",
            split,
            "give shares for training, validation and test, as in 969,30,1 or 969/30/1",
        )

    def _check_preshuffled(self) -> None:
        key, reason = "data.order", "rows that lie in order are of one dataset a split"
        for name in ("train", "validation", "test"):
            paths = getattr(self, name)
            require(len(paths) <= 1, key, self.order, f"{reason}, but data.{name} has {len(paths)}")
        require(self.split is None, key, self.order, f"{reason}; data.split divides documents")

    @property
    def split_shares(self) -> tuple[float, ...] | None:
        """The shares that `split` gives to train, validation and test; None without it."""
        if self.split is None:
            return None
        shares = tuple(map(float, self.split.split("," if "," in self.split else "/")))
        return shares + (0.0,) * (3 - len(shares))

    def has(self, name: str) -> bool:
        """Whether a split (`train`, `validation`, `test`) is given any data."""
        if self.split_shares is None:
            return bool(getattr(self, name))
        return self.split_shares[("train", "validation", "test").index(name)] > 0


@dataclass(frozen=True)
class OptimizerConfig(Section, where="optimizer"):
    """Decoupled AdamW under GPT-NeoX v1.0's schedule; the defaults are pythia-70m's."""

    peak_learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    schedule: Literal["neox_v1"] = "neox_v1"
    warmup_fraction: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    gradient_clip: float = 1.0

    def _check(self) -> None:
        peak, floor = self.peak_learning_rate, self.min_learning_rate
        require(peak > 0, "optimizer.peak_learning_rate", peak, "it must be > 0")
        require(
            0 <= floor <= peak,
            "optimizer.min_learning_rate",
            floor,
            f"it must lie between 0 and peak_learning_rate ({peak})",
        )
        require(
            0 <= self.warmup_fraction < 1,
            "optimizer.warmup_fraction",
            self.warmup_fraction,
            "it is a share of the steps, from 0 to less than 1",
        )
        require(
            all(0 <= b < 1 for b in self.betas),
            "optimizer.betas",
            self.betas,
            "each must be from 0 to less than 1",
        )
        for name in ("eps", "gradient_clip"):
            value = getattr(self, name)
            require(value > 0, f"optimizer.{name}", value, "it must be > 0")
        require(
            self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "it must be >= 0"
        )


@dataclass(frozen=True)
class TrainingConfig(Section, where="training"):
    """How long, how wide and in which precision. `batch_size` is rows a step, over all devices."""

    steps: int = 143000
    batch_size: int = 1024
    gradient_accumulation: int = 1
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    attention: Literal["auto", "xla", "einsum"] = "auto"
    remat: Literal["none", "dots", "full"] = "full"
    on_nonfinite: Literal["stop"] = "stop"
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
    """Held-out loss: `steps` batches every `every` training steps, as upstream counts them."""

    every: int = 100000
    steps: int = 10

    def _check(self) -> None:
        require(self.every >= 1, "evaluation.every", self.every, "it must be at least 1")
        require(self.steps >= 0, "evaluation.steps", self.steps, "it must be at least 0")


@dataclass(frozen=True)
class MeshConfig(Section, where="mesh"):
    """Devices along each axis; -1 takes what is left. One device serves a run for now."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    slices: int = 1

    def _check(self) -> None:
        for name in ("data", "fsdp", "tensor", "slices"):
            value = getattr(self, name)
            require(value in (1, -1), f"mesh.{name}", value, "a run uses one device for now")


@dataclass(frozen=True)
class LoggingConfig(Section, where="logging"):
    """One line of metrics every so many steps."""

    every: int = 10

    def _check(self) -> None:
        require(self.every >= 1, "logging.every", self.every, "it must be at least 1")


@dataclass(frozen=True)
class RunConfig(Section, where=""):
    """A training run. `model` may be left out where only the data is looked at."""

    name: str = "run"
    model: ModelConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: str | None = None
    initialize_from: None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
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

    @property
    def runtime(self) -> Runtime:
        """How this run computes its model."""
        training = self.training
        return Runtime(dtype=training.precision, attention=training.attention, remat=training.remat)

    @property
    def checkpoint_steps(self) -> tuple[int, ...]:
        """Steps whose checkpoints stay: `extra_steps`, multiples of `every`, and the last."""
        steps, checkpoint = self.training.steps, self.checkpoint
        scheduled = {*checkpoint.extra_steps, *range(checkpoint.every, steps, checkpoint.every)}
        return tuple(sorted(step for step in {*scheduled, steps} if step <= steps))


def from_dict(mapping: Mapping[str, Any]) -> RunConfig:
    """A `RunConfig` from nested plain values. `model.size` stands for the fields of that size.

    Raises `ConfigError` for unknown keys, wrong types and impossible values.
    """
    return build(RunConfig, mapping, "")


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

    Raises `ConfigError` with the file's name for anything that is wrong in it.
    """
    path = Path(path)
    mapping = _override(read_yaml(path), overrides)
    try:
        return from_dict(mapping)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def for_data(prefix: str, overrides: Mapping[str, str] | None = None) -> RunConfig:
    """A config of defaults, Pythia's, whose training data is the dataset at `prefix`."""
    return from_dict(_override({"data": {"train": [prefix]}}, overrides))


def _override(mapping: dict[str, Any], overrides: Mapping[str, str] | None) -> dict[str, Any]:
    for key, text in (overrides or {}).items():
        set_dotted(mapping, key, text, RunConfig)
    return mapping


def save(config: RunConfig, path: str | Path) -> None:
    """Write the effective config as YAML; whoever reads the file finds the old or the new one."""
    text = yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=100)
    write_whole(path, text.encode())
