"""Files written whole or not at all, and one process at a time."""

import fcntl
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to write, which has its name when the block ends and is gone if it fails.

    What had the name before stays until then.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; name the file to write")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent} to write it in")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            # Else a machine that stops now may keep the name and not what is in it.
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file so that whoever reads it finds the old content or the new.

    One that holds this content already is left alone.
    """
    path = Path(path)
    if path.is_file() and path.read_bytes() == content:
        return
    with written_whole(path) as file:
        file.write(content)


@contextmanager
def locked(path: str | os.PathLike[str], *, seconds: float = math.inf) -> Iterator[None]:
    """Hold a lock on a file, which is made if need be and stays.

    The lock is the operating system's, on an open file, and goes with the process, kill -9
    included. seconds: how long to wait for one that another process holds.

    Raises:
        BlockingIOError: another process still holds it.
        OSError: the file cannot be made, or its file system has no locks.
    """
    with Path(path).open("w") as file:
        end, told = time.monotonic() + seconds, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise
            if not told:
                log.info("%s: waiting for the process that holds it", path)
                told = True
            time.sleep(0.1)
        yield
