"""Sections of a config, whatever their keys: plain values in, checked frozen dataclasses out.

A `Section` is checked when it is made. `build` makes one from a mapping, `read_yaml` reads the
mapping from a file, and `set_dotted` puts one value, as typed on a command line, into it.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeGuard, TypeVar

import yaml


class ConfigError(ValueError):
    """A configuration that cannot be: the message names the key, the value and what would do."""


def require(holds: bool, key: str, value: object, need: str) -> None:
    if not holds:
        raise ConfigError(f"{key}: {value!r} is not possible: {need}")


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of the config: its fields are checked when it is made, from YAML or in Python.

    Each field becomes what its annotation says, or a `ConfigError` tells which key cannot; then
    `_check` looks at the values. `where` is the section's name in messages. `_shorthands` are
    keys of text that are no fields but stand for some; fields written beside one override it.
    """

    _where: ClassVar[str]
    _shorthands: ClassVar[Mapping[str, Callable[[str], Mapping[str, Any]]]] = {}

    def __init_subclass__(cls, where: str) -> None:
        cls._where = where

    def __post_init__(self) -> None:
        prefix = f"{self._where}." if self._where else ""
        for name, hint in _hints(type(self)).items():
            object.__setattr__(self, name, _convert(getattr(self, name), hint, f"{prefix}{name}"))
        self._check()

    def _check(self) -> None:
        """Raises ConfigError for a value that has the right type and still cannot be."""


S = TypeVar("S", bound=Section)


def build(cls: type[S], mapping: object, where: str) -> S:
    """The section `cls` from a mapping, every key checked; making it checks the values.

    where: the section's place in the file, for messages; empty at the top.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where or 'config'}: {mapping!r} should be a section of keys")
    values = dict(mapping)
    prefix = f"{where}." if where else ""
    for key, fields_of in cls._shorthands.items():
        if key in values:
            values = {**fields_of(_convert(values.pop(key), str, f"{prefix}{key}")), **values}
    hints = _hints(cls)
    for key in values:
        if key not in hints:
            known = [*hints, *cls._shorthands]
            hint = _nearest(str(key), known) or f"; the known ones are {', '.join(known)}"
            raise ConfigError(f"{prefix}{key}: unknown key{hint}")
    for f in dataclasses.fields(cls):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in values:
            raise ConfigError(f"{prefix}{f.name}: missing, and it has no default")
    return cls(**values)


def read_yaml(path: Path) -> dict[Any, Any]:
    """What a YAML file of sections holds; raises `ConfigError`, with its name, if it is none."""
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
    return mapping


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


def set_dotted(mapping: dict[str, Any], dotted: str, text: str, top: type[Section]) -> None:
    """Put `text`, read as YAML, under a dotted key; dashes in the key count as underscores.

    top: the section that `mapping` is for; where it wants text, it gets `text` as typed.
    """
    *sections, key = dotted.replace("-", "_").split(".")
    hint = _hint_at(top, [*sections, key])
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


def _hint_at(top: type[Section], keys: list[str]) -> Any:
    """What the value under these keys should be; None where there is no such key."""
    hint: Any = top
    for key in keys:
        if not _is_section(hint):
            return None
        hint = str if key in hint._shorthands else _hints(hint).get(key)
        hint = next((h for h in typing.get_args(hint) if _is_section(h)), hint)
    return hint


def _is_text(hint: Any) -> bool:
    return hint is str or hint == str | None


def _is_section(hint: Any) -> TypeGuard[type[Section]]:
    return isinstance(hint, type) and issubclass(hint, Section)


@cache
def _hints(cls: type[Section]) -> dict[str, Any]:
    """The types of a section's fields, by name."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
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
    if _is_section(hint):
        if isinstance(value, hint):
            return value
        # An empty section in YAML reads as None.
        return build(hint, {} if value is None else value, key)
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
            require(math.isfinite(number), key, number, "it must be finite")
            return number
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{key}: {value!r} should be {_TYPE_NAMES.get(hint, hint)}")


_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
