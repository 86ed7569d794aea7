"""Beside a CSV of results, what it is of, as JSON; and in words, how that differs from another."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_HASH = re.compile(r"[0-9a-f]{64}")


def beside(path: Path) -> Path:
    """`NAME.csv.json`, which says what `NAME.csv` is of."""
    return path.with_name(f"{path.name}.json")


def read(path: Path) -> dict[str, Any] | None:
    """What is said beside a CSV; None for one that came alone.

    Raises ValueError if the file that says so is damaged.
    """
    try:
        told = json.loads(beside(path).read_bytes())
        if not isinstance(told, dict):
            raise ValueError("it is no JSON object")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise damaged(path, error) from None
    return told


def damaged(path: Path, reason: object) -> ValueError:
    """What to raise where the file beside a CSV does not say what it should."""
    return ValueError(
        f"{beside(path)} is damaged, so nothing tells what {path.name} is of ({reason}). Restore "
        "it from a copy, or move both away"
    )


def differing(saved: Mapping[str, Any], wanted: Mapping[str, Any], within: str = "") -> list[str]:
    """The keys in which two say something else, in words; hashes are not spelled out.

    within: what the keys are parts of: `model.`.
    """
    said: list[str] = []
    for key in dict.fromkeys([*saved, *wanted]):
        was, now = saved.get(key), wanted.get(key)
        if was == now:
            continue
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            said += differing(was, now, f"{within}{key}.")
        elif _is_hash(was) and _is_hash(now):
            said.append(f"{within}{key} is not the same, by its hash")
        else:
            before, after = ("a hash" if _is_hash(x) else repr(x) for x in (was, now))
            said.append(f"{within}{key} was {before}, is {after}")
    return said


def _is_hash(value: object) -> bool:
    """Whether this is a SHA-256, or several with commas between."""
    return isinstance(value, str) and all(map(_HASH.fullmatch, value.split(", ")))
