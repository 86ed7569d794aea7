"""Files written whole or not at all, and one process at a time."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file so that whoever reads it finds the old content or the new.

    One that holds this content already is left alone.
    """
    path = Path(path)
    if path.is_file() and path.read_bytes() == content:
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def locked(path: str | os.PathLike[str], *, wait: bool = True) -> Iterator[None]:
    """Hold a lock on a file, which is made if need be and stays.

    The lock is the operating system's, on an open file, and goes with the process, kill -9
    included.

    Raises:
        BlockingIOError: another process holds it, and we do not want to wait.
        OSError: the file cannot be made, or its file system has no locks.
    """
    with Path(path).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            log.info("%s: waiting for the process that holds it", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
