"""Names of tasks: the paper's preset, our own task files, and the harness's index of them all."""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

TASKS_FOLDER = Path(__file__).parent / "task_files"
"""Tasks and groups that the harness does not have, in its own format."""
PRESET = "pythia"
PYTHIA = (
    "lambada_openai",
    "piqa",
    "winogrande",
    "wsc",
    "arc_easy",
    "arc_challenge",
    "sciq",
    "logiqa",
    "blimp",
    "wikitext",
    "mmlu",
    "crows_pairs",
)
"""Task groups of the Pythia paper, by the harness's present names: hendrycksTest is mmlu now, and
crows_pairs are the English and the French ones, whole and by kind. The harness has a group of the
same name, without crows_pairs; the preset goes before it."""
MISSING = "evaluating takes the LM Evaluation Harness: pip install 'pythia-jax[eval]'"


def expand(names: str | Iterable[str]) -> list[str]:
    """The tasks and groups that are meant, each once: `pythia` stands for `PYTHIA`.

    names: one or several, each of them several with commas between.
    """
    typed = [names] if isinstance(names, str) else names
    single = [name.strip() for part in typed for name in part.split(",") if name.strip()]
    meant = [task for name in single for task in (PYTHIA if name == PRESET else (name,))]
    return list(dict.fromkeys(meant))


def check(names: Iterable[str], include_path: str | Path | None = None) -> None:
    """Raise ValueError for names that the harness does not have, and in `include_path` neither.

    A folder that is not there is a FileNotFoundError, the harness not being installed a
    RuntimeError.
    """
    manager(tuple(names), include_path)


def folders(include_path: str | Path | None) -> list[Path]:
    """Where the harness looks besides its own tasks: ours, then the caller's, which go first.

    Raises FileNotFoundError if the caller's is no folder.
    """
    if include_path is None:
        return [TASKS_FOLDER]
    if not Path(include_path).is_dir():
        raise FileNotFoundError(f"include_path {include_path}: there is no such folder of tasks")
    return [TASKS_FOLDER, Path(include_path).absolute()]


def manager(names: Iterable[str], include_path: str | Path | None = None) -> "TaskManager":
    """An index in which all of these names are found. Raises as `check` does."""
    names = list(names)
    where = tuple(folders(include_path))
    own = _index(where, _files(where), False)
    # Reading the harness's thousands of files takes seconds, and is left out where nothing of
    # theirs is asked for. A group of ours may have tasks of theirs in it.
    if set(names) <= set(own.all_subtasks):
        return own
    whole = _index(where, _files(where), True)
    # Not a pattern either: what is asked for names results, and decides what is there already.
    unknown = sorted(set(names) - set(whole.all_tasks))
    if unknown:
        nor = "" if include_path is None else f", nor are they in {include_path}"
        help_ = "`pythia-jax evaluate ls tasks` lists them"
        if any(name.endswith((".yaml", ".yml")) for name in unknown):
            help_ = (
                "a task file goes by the name after `task:` in it, and its folder by include_path "
                "(--include-path)"
            )
        raise ValueError(
            f"tasks that the harness does not have: {', '.join(unknown)}{nor}; {help_}"
        )
    return whole


def _files(folders: Iterable[Path]) -> tuple[tuple[str, int], ...]:
    """What folders of task files hold, and of when each file is: an index is of just that."""
    found = (path for folder in folders for path in folder.rglob("*.y*ml"))
    return tuple(sorted((str(path), path.stat().st_mtime_ns) for path in found))


@functools.lru_cache(maxsize=4)
def _index(
    paths: tuple[Path, ...], files: tuple[tuple[str, int], ...], include_defaults: bool
) -> "TaskManager":
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError:
        raise RuntimeError(MISSING) from None
    return TaskManager(include_path=list(paths), include_defaults=include_defaults)
