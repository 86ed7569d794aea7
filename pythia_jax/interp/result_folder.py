"""A folder of results that is written over hours: by one writer at a time, and on after a stop.

Its `provenance.json` tells what they are of: `settings`, all that decides the numbers, and
`computed`, what they came from. Who asks for the same settings goes on with what is there.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pythia_jax.files import locked, write_whole
from pythia_jax.training.pod import is_first

PROVENANCE, RUN = "provenance.json", "run.yaml"


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Only this call writes to `out` while the block lasts; of several processes of one call, the
    first holds the lock for all.

    Raises RuntimeError where another call does, FileNotFoundError if there is no folder to put it
    in.
    """
    if not is_first():
        yield
        return
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.absolute().parent} to put it in")
    lock = out.with_name(f".{out.name}.lock")
    with ExitStack() as held:
        try:
            held.enter_context(locked(lock, seconds=0))
        except BlockingIOError:
            told = f"{out}: another process is writing there; wait for it to end"
            raise RuntimeError(told) from None
        held.callback(lock.unlink, missing_ok=True)
        yield


def begun(folder: Path, settings: Mapping[str, Any], what: str) -> dict[str, Any] | None:
    """What was `computed` of the results that are in a folder; None if there are none.

    settings: those asked for, which must be its own. what: what such results are called.

    Raises FileExistsError for others, naming the settings that differ, or for what are none;
    ValueError where nothing tells what they are of.
    """
    if not (folder / PROVENANCE).exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"{folder}: there already, and no {what}; name another folder")
        return None
    told = read_provenance(folder, what)
    differing = _differing(told["settings"], json.loads(json.dumps(settings)))
    if differing:
        raise FileExistsError(
            f"{folder} holds another {what}: {'; '.join(differing)}. Ask for the same to go on "
            "with it, or name another folder"
        )
    return told["computed"]


def check_together(asked: int | None, before: Mapping[str, Any], out: Path) -> int:
    """Rows computed together, of results that were begun before. Raises FileExistsError where
    others are asked for."""
    rows = before["rows_together"]
    if asked not in (None, rows):
        raise FileExistsError(
            f"{out} was begun with {rows} rows together (batch), and {asked} would round "
            f"otherwise: give --batch {rows} to go on, or name another folder"
        )
    return rows


def write_provenance(
    folder: Path, settings: Mapping[str, Any], computed: Mapping[str, Any]
) -> None:
    """Say what the results are of."""
    about = {"settings": settings, "computed": computed}
    write_whole(folder / PROVENANCE, json.dumps(about, indent=1).encode() + b"\n")


def read_provenance(folder: Path, what: str) -> dict[str, Any]:
    """What results, finished or not, are of. Raises ValueError if that is damaged."""
    path = folder / PROVENANCE
    try:
        told = json.loads(path.read_bytes())
        if not all(isinstance(told[key], dict) for key in ("settings", "computed")):
            raise ValueError("it has not both of settings and computed")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged, so nothing tells what the {what} is of ({error}); restore it "
            "from a copy, or move the folder away"
        ) from None
    return told


def _differing(before: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs, key by key, those within a section too."""
    differing = []
    for key in dict.fromkeys([*before, *wanted]):
        was, now = before.get(key), wanted.get(key)
        if was == now:
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            differing += [f"{key}.{inner}" for inner in _differing(was, now)]
        else:
            differing.append(f"{key} was {was!r}, is {now!r}")
    return differing
