"""Run configurations: frozen dataclasses, checked when made, read from and written to YAML.

`ModelConfig` says which function a model computes; `Runtime` says how it is computed on this
machine (dtype, attention kernel, rematerialisation); `RunConfig` is everything a training run
needs. Every mistake is one `ConfigError` that names the key, the value and, for an unknown key,
the nearest one that exists.
"""

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from pythia_jax import suite

EXACT_GELU = ("gelu", "gelu_python")
TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate")


class ConfigError(ValueError):
    """A configuration that cannot be: the message names the key, the value and what would do."""


def _require(holds: bool, key: str, value: object, need: str) -> None:
    if not holds:
        raise ConfigError(f"{key}: {value!r} is not possible: {need}")


class _Section:
    """A section of the config: its fields are checked when it is made, from YAML or in Python.

    Each field becomes what its annotation says, or a `ConfigError` tells which key cannot; then
    `_check` looks at the values. `where` is the section's name in messages.
    """

    _where: ClassVar[str]

    def __init_subclass__(cls, where: str) -> None:
        cls._where = where

    def __post_init__(self) -> None:
        prefix = f"{self._where}." if self._where else ""
        for name, hint in _hints(type(self)).items():
            object.__setattr__(self, name, _convert(getattr(self, name), hint, f"{prefix}{name}"))
        self._check()

    def _check(self) -> None:
        """Raises ConfigError for a value that has the right type and still cannot be."""


@dataclass(frozen=True)
class ModelConfig(_Section, where="model"):
    """The function a GPT-NeoX model computes. Fields carry Hugging Face's names.

    `initializer` alone does not change the function: it is the distribution that training
    starts from (`small_wang` for 14m to 2.8b, `normal_scaled` for 6.9b and 12b).
    `intermediate_size` of -1 stands for 4 x `hidden_size`.
    """

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
        for name in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
            "intermediate_size",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            _require(value >= 1, f"model.{name}", value, "it must be at least 1")
        _require(
            self.hidden_size % self.num_attention_heads == 0,
            "model.num_attention_heads",
            self.num_attention_heads,
            f"heads must divide hidden_size ({self.hidden_size})",
        )
        _require(
            0.0 <= self.rotary_pct <= 1.0,
            "model.rotary_pct",
            self.rotary_pct,
            "it is a share of each head, between 0 and 1",
        )
        _require(
            self.rotary_size % 2 == 0,
            "model.rotary_pct",
            self.rotary_pct,
            f"int(head size {self.head_size} x rotary_pct) = {self.rotary_size} must be even",
        )
        _require(
            self.rotary_emb_base > 0,
            "model.rotary_emb_base",
            self.rotary_emb_base,
            "it must be > 0",
        )
        _require(
            self.layer_norm_eps > 0, "model.layer_norm_eps", self.layer_norm_eps, "it must be > 0"
        )
        known = EXACT_GELU + TANH_GELU
        _require(
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
        return _build(cls, mapping, "model")

    @classmethod
    def from_size(cls, name: str, **overrides: Any) -> "ModelConfig":
        """The model of a suite size (`70m`, `pythia-70m-deduped`, old names too)."""
        return _build(cls, {**overrides, "size": name}, "model")


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
class Runtime(_Section, where="runtime"):
    """How a model is computed; none of it changes the function, only its rounding, speed, memory.

    dtype: of the computation; None takes that of the parameters. LayerNorm statistics, softmax,
        rotary angles and the loss are at least float32 whatever it says.
    attention: `xla` works in blocks of queries and never holds all scores; `einsum` holds them;
        `auto` takes `xla`, or `einsum` where the sites asked for need scores or pattern.
    remat: what the backward pass recomputes: nothing (`none`), all but matrix products (`dots`),
        or each block whole (`full`).
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
        _require(self.loss_chunk >= 1, "runtime.loss_chunk", self.loss_chunk, "at least 1 token")


@dataclass(frozen=True)
class DataConfig(_Section, where="data"):
    """Where tokens lie and in which order they are served (GPT-NeoX v1.0's, from `seed`)."""

    train: tuple[str, ...] = ()
    train_weights: tuple[float, ...] | None = None
    validation: tuple[str, ...] = ()
    validation_weights: tuple[float, ...] | None = None
    test: tuple[str, ...] = ()
    test_weights: tuple[float, ...] | None = None
    split: str | None = None
    order: Literal["neox", "preshuffled"] = "neox"
    documents: None = None
    transform: None = None
    sequence_length: int = 2048
    seed: int = 1234

    def _check(self) -> None:
        _require(
            self.sequence_length >= 1,
            "data.sequence_length",
            self.sequence_length,
            "it must be at least 1",
        )
        _require(
            0 <= self.seed < 2**32, "data.seed", self.seed, "NumPy takes seeds from 0 to 2**32 - 1"
        )
        for name in ("train", "validation", "test"):
            paths, weights = getattr(self, name), getattr(self, f"{name}_weights")
            if weights is None:
                continue
            _require(
                len(weights) == len(paths),
                f"data.{name}_weights",
                weights,
                f"{len(weights)} weights do not match {len(paths)} paths in data.{name}",
            )
            _require(
                all(w > 0 for w in weights),
                f"data.{name}_weights",
                weights,
                "weights must be positive",
            )


@dataclass(frozen=True)
class OptimizerConfig(_Section, where="optimizer"):
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
        _require(peak > 0, "optimizer.peak_learning_rate", peak, "it must be > 0")
        _require(
            0 <= floor <= peak,
            "optimizer.min_learning_rate",
            floor,
            f"it must lie between 0 and peak_learning_rate ({peak})",
        )
        _require(
            0 <= self.warmup_fraction < 1,
            "optimizer.warmup_fraction",
            self.warmup_fraction,
            "it is a share of the steps, from 0 to less than 1",
        )
        _require(
            all(0 <= b < 1 for b in self.betas),
            "optimizer.betas",
            self.betas,
            "each must be from 0 to less than 1",
        )
        for name in ("eps", "gradient_clip"):
            _require(
                getattr(self, name) > 0,
                f"optimizer.{name}",
                getattr(self, name),
                "it must be > 0",
            )
        _require(
            self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "it must be >= 0"
        )


@dataclass(frozen=True)
class TrainingConfig(_Section, where="training"):
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
            _require(value >= 1, f"training.{name}", value, "it must be at least 1")
        _require(
            self.batch_size % self.gradient_accumulation == 0,
            "training.gradient_accumulation",
            self.gradient_accumulation,
            f"it must divide batch_size ({self.batch_size})",
        )
        _require(0 <= self.seed < 2**32, "training.seed", self.seed, "seeds go from 0 to 2**32 - 1")


@dataclass(frozen=True)
class CheckpointConfig(_Section, where="checkpoint"):
    """Which steps are kept for good (`every`, `extra_steps`, the last) and which only to resume."""

    directory: str = ""
    every: int = 1000
    extra_steps: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    archive: Literal["state", "params"] = "state"
    resume_every_minutes: float = 15.0
    keep_resume: int = 2

    def _check(self) -> None:
        _require(self.every >= 1, "checkpoint.every", self.every, "it must be at least 1")
        _require(
            all(step >= 0 for step in self.extra_steps),
            "checkpoint.extra_steps",
            self.extra_steps,
            "steps count from 0",
        )
        _require(
            not set(self.directory) & set("[]*?"),
            "checkpoint.directory",
            self.directory,
            "Orbax reads [ ] * ? in a path as a pattern, and could not restore from it",
        )
        _require(
            self.resume_every_minutes > 0,
            "checkpoint.resume_every_minutes",
            self.resume_every_minutes,
            "it must be > 0",
        )
        _require(
            self.keep_resume >= 1, "checkpoint.keep_resume", self.keep_resume, "keep at least 1"
        )


@dataclass(frozen=True)
class EvaluationConfig(_Section, where="evaluation"):
    """Held-out loss: `steps` batches every `every` training steps, as upstream counts them."""

    every: int = 100000
    steps: int = 10

    def _check(self) -> None:
        _require(self.every >= 1, "evaluation.every", self.every, "it must be at least 1")
        _require(self.steps >= 0, "evaluation.steps", self.steps, "it must be at least 0")


@dataclass(frozen=True)
class MeshConfig(_Section, where="mesh"):
    """Devices along each axis; -1 takes what is left. One device serves a run for now."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    slices: int = 1

    def _check(self) -> None:
        for name in ("data", "fsdp", "tensor", "slices"):
            value = getattr(self, name)
            _require(value in (1, -1), f"mesh.{name}", value, "a run uses one device for now")


@dataclass(frozen=True)
class LoggingConfig(_Section, where="logging"):
    """One line of metrics every so many steps."""

    every: int = 10

    def _check(self) -> None:
        _require(self.every >= 1, "logging.every", self.every, "it must be at least 1")


@dataclass(frozen=True)
class RunConfig(_Section, where=""):
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
            _require(
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
    return _build(RunConfig, mapping, "")


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
    try:
        mapping = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader) or {}
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(mapping, dict):
        raise ConfigError(f"{path}: expected sections of keys, found {type(mapping).__name__}")
    for key, text in (overrides or {}).items():
        _set_dotted(mapping, key, text)
    try:
        return from_dict(mapping)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def save(config: RunConfig, path: str | Path) -> None:
    """Write the effective config as YAML; whoever reads the file finds the old or the new one."""
    text = yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=100)
    path, content = Path(path), text.encode()
    if path.is_file() and path.read_bytes() == content:
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one section; YAML's own loader keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key_node, _ in node.value:
            if keys.count(key_node.value) > 1:
                line = key_node.start_mark.line + 1
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key_node.value!r} stands twice in one section, line {line}"
                )
        return super().construct_mapping(node, deep)


def _set_dotted(mapping: dict[str, Any], dotted: str, text: str) -> None:
    *sections, key = dotted.replace("-", "_").split(".")
    hint = _hint_at([*sections, key])
    for section in sections:
        inner = mapping.get(section)
        if inner is None:
            inner = mapping[section] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{dotted}: {section!r} is a value, not a section")
        mapping = inner
    try:
        value = yaml.safe_load(text)
        if _is_text(hint):
            # As typed, for a run may be called 70; YAML would read a number.
            value = None if value is None and hint is not str else text
        elif typing.get_origin(hint) is tuple and _is_text(typing.get_args(hint)[0]):
            value = yaml.load(text, yaml.BaseLoader)
    except yaml.YAMLError:
        value = text
    mapping[key] = value


def _hint_at(keys: list[str]) -> Any:
    """What the value under these keys of a run config should be; None where there is no such."""
    if keys == ["model", "size"]:
        return str
    hint: Any = RunConfig
    for key in keys:
        hint = _hints(hint).get(key) if dataclasses.is_dataclass(hint) else None
        hint = next((h for h in typing.get_args(hint) if dataclasses.is_dataclass(h)), hint)
    return hint


def _is_text(hint: Any) -> bool:
    return hint is str or hint == str | None


@cache
def _hints(cls: Any) -> dict[str, Any]:
    """The types of a section's fields, by name."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def _build(cls: type, mapping: object, where: str) -> Any:
    """The section `cls` from a mapping, every key checked; making it checks the values."""
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where or 'config'}: {mapping!r} should be a section of keys")
    values = dict(mapping)
    if cls is ModelConfig and "size" in values:
        size = _convert(values.pop("size"), str, "model.size")
        values = {**_size_fields(size), **values}
    hints = _hints(cls)
    known = [*hints, "size"] if cls is ModelConfig else [*hints]
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in hints:
            raise ConfigError(f"{prefix}{key}: unknown key{_nearest(str(key), known)}")
    for f in fields(cls):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in values:
            raise ConfigError(f"{prefix}{f.name}: missing, and it has no default")
    return cls(**values)


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"; the nearest known one is {close[0]!r}" if close else ""


def _convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as the type `hint`, or a `ConfigError` that names the key and the type."""
    if hint is type(None):
        if value is None:
            return None
        raise ConfigError(f"{key}: {value!r}: this key is reserved; only null is supported for now")
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        return None if value is None else _convert(value, options[0], key)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, typing.cast(type, hint)):
            return value
        # An empty section in YAML reads as None.
        return _build(typing.cast(type, hint), {} if value is None else value, key)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value in choices:
            return value
        shown = ", ".join(map(str, choices))
        raise ConfigError(
            f"{key}: {value!r} is not one of {shown}{_nearest(str(value), list(map(str, choices)))}"
        )
    if origin is tuple:
        inner = typing.get_args(hint)
        if isinstance(value, (str, Mapping)) or not isinstance(value, (list, tuple)):
            raise ConfigError(f"{key}: {value!r} should be a list")
        if inner[-1] is not Ellipsis and len(value) != len(inner):
            raise ConfigError(f"{key}: {value!r} should have {len(inner)} items")
        return tuple(_convert(item, inner[0], f"{key}[{i}]") for i, item in enumerate(value))
    if hint is float and not isinstance(value, bool):
        # YAML 1.1 reads 1e-3, which has no point, as text.
        try:
            number = float(value)
        except (TypeError, ValueError):
            pass
        else:
            _require(math.isfinite(number), key, number, "it must be finite")
            return number
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{key}: {value!r} should be {_TYPE_NAMES.get(hint, hint)}")


_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
