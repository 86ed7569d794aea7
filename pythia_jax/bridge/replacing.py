"""A folder written beside its target and moved there whole, for every writer of folders.

What lay at the target stays until the new folder is complete, and only what the writer calls its
own is ever deleted. A process that is killed loses nothing: the next one puts things right.
"""

import glob
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(folder: Path, ours: Callable[[Path], bool]) -> Iterator[Path]:
    """An empty folder to write, which takes the place of `folder` when the block ends.

    ours: whether a folder that holds something may be deleted to make room. It may raise
        FileExistsError itself, to tell what in it is in the way. Empty folders are not asked about.

    If the block fails, `folder` is as it was, and folders made for it are gone. One left between
    two moves by a process that was killed is put back first, and what such processes left
    half-written is cleared.

    Raises FileExistsError if something that is not ours lies at `folder`, and ValueError if we
    stand in it.
    """
    folder = folder.resolve()
    if Path.cwd().is_relative_to(folder):
        raise ValueError(f"{folder} is the current folder, which cannot be replaced; name another")
    made = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    whole = interrupted(folder)
    if whole is not None:
        _refuse_what_is_not_ours(whole, ours)
        whole.rename(folder)
    _refuse_what_is_not_ours(folder, ours)
    _remove_stale(folder)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    _discard(_replaced(folder), partial, ours)
    partial.mkdir()
    try:
        yield partial
        _swap(partial, folder, ours)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # somebody else may have put something there
            for parent in made:
                parent.rmdir()
        raise


def interrupted(folder: Path) -> Path | None:
    """Where what was at `folder` lies whole, if a process was killed as it replaced it."""
    replaced = _replaced(folder.resolve())
    return replaced if not folder.exists() and replaced.is_dir() else None


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def _swap(partial: Path, folder: Path, ours: Callable[[Path], bool]) -> None:
    """Put `partial` in the place of `folder`."""
    if not folder.exists():
        partial.rename(folder)
        return
    _refuse_what_is_not_ours(folder, ours)  # it may have come while we wrote
    replaced = _replaced(folder)
    folder.rename(replaced)
    try:
        partial.rename(folder)
    except BaseException:
        replaced.rename(folder)
        raise
    _discard(replaced, partial, ours)


def _discard(replaced: Path, free: Path, ours: Callable[[Path], bool]) -> None:
    """Delete an older folder, under the name `free`: what is called `replaced` is always whole."""
    if replaced.exists():
        _refuse_what_is_not_ours(replaced, ours)
        replaced.rename(free)
        shutil.rmtree(free, ignore_errors=True)


def _refuse_what_is_not_ours(folder: Path, ours: Callable[[Path], bool]) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; choose another place")
    if any(folder.iterdir()) and not ours(folder):
        raise FileExistsError(
            f"{folder} holds something else than would be written there, and it would be lost; "
            "move it away or choose another place"
        )


def _remove_stale(folder: Path) -> None:
    """Delete what processes that are gone have left half-written for `folder`."""
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.partial-*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdecimal() and not _is_running(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    if os.name != "posix":
        return True  # elsewhere, signal 0 is not a question
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's, and alive
    return True
