"""A lease on a run folder on a bucket, where there are no locks.

The object `.lease` names its holder and says until when it holds. The holder renews it every few
seconds; one that is killed does so no more, and the next run takes over. Every write of it is
conditional on the generation before, so of two that write at once one is told no.
"""

import json
import logging
import os
import secrets
import socket
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pythia_jax.files import write_whole
from pythia_jax.training.bucket import Bucket

log = logging.getLogger(__name__)

OBJECT = ".lease"
LIFE_S = 60.0
"""A lease not renewed for so long may be taken over. Clocks of machines differ by less."""
RENEW_S = 15.0


class LeaseError(RuntimeError):
    """The run folder is another run's."""


class Lease:
    """The lease on the run folder of `bucket`; a context manager, held while it is entered.

    mark: a file on this machine that remembers our own lease. The caller keeps other processes of
    this machine out of it; so a lease that it remembers is of a process that is dead, and need
    not be waited for.

    Entering raises LeaseError, with its name, if another run holds the lease. Whether it lives is
    found out first, by waiting until it renews the lease or its time is over.
    """

    def __init__(self, bucket: Bucket, mark: Path) -> None:
        self._bucket, self._mark = bucket, mark
        self._owner = secrets.token_hex(16)
        self._generation = b""
        self._renewed = 0.0
        self._lost: str | None = None
        self._lock, self._leaving = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        self._take()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.set()
        with self._lock:
            if self._lost is None:
                try:
                    self._bucket.write(OBJECT, None, if_generation=self._generation)
                except OSError as error:
                    log.warning("%s: stays until it ends by itself: %s", self._place, error)

    def check(self) -> None:
        """Raise LeaseError if the lease is known to be lost; cheap, for every step."""
        if self._lost is not None:
            raise LeaseError(
                f"{self._bucket.url}: another run has taken over this folder ({self._lost}), so "
                "nothing more is written into it; this process had not renewed its lease in time"
            )

    def confirm(self) -> None:
        """Raise LeaseError unless the lease is surely ours now; to be called before writing."""
        with self._lock:
            if self._lost is None and time.monotonic() - self._renewed > LIFE_S / 2:
                self._renew()
        self.check()

    def _take(self) -> None:
        seen, since = None, time.monotonic()
        while True:
            content, generation = self._bucket.read(OBJECT)
            held = None if content is None else _parsed(content)
            if held is not None and not self._is_ours(held):
                if seen not in (None, generation):
                    raise LeaseError(
                        f"{self._bucket.url}: another run is training in this folder: "
                        f"{_who(held)}. Wait for it, stop it, or choose another "
                        "checkpoint.directory"
                    )
                # A clock that is far ahead of ours must not keep us out for ever.
                waited = time.monotonic() - since
                left = min(held["until"] - time.time(), LIFE_S - waited)
                if left > 0:
                    if seen is None:
                        log.info("%s: %s; waiting whether it lives", self._place, _who(held))
                    seen = generation
                    time.sleep(min(left, LIFE_S / 30))
                    continue
                log.warning("%s: taken over from %s, which is gone", self._place, _who(held))
            write_whole(self._mark, self._owner.encode())
            if self._write(generation):
                return

    def _is_ours(self, held: dict[str, Any]) -> bool:
        """Whether a lease is this one, or of a dead process of this machine."""
        before = self._mark.read_text() if self._mark.is_file() else self._owner
        return held["owner"] in (self._owner, before)

    def _keep(self) -> None:
        while not self._leaving.wait(RENEW_S) and self._lost is None:
            with self._lock:
                if self._leaving.is_set():
                    return
                try:
                    self._renew()
                except OSError as error:  # the next round may do better
                    log.warning("%s: not renewed: %s", self._place, error)

    def _renew(self) -> None:
        if self._write(self._generation):
            return
        content, generation = self._bucket.read(OBJECT)
        held = None if content is None else _parsed(content)
        if held is not None and held["owner"] == self._owner:
            self._generation, self._renewed = generation, time.monotonic()
            return
        self._lost = "its lease is gone" if held is None else _who(held)

    def _write(self, generation: bytes) -> bool:
        before = time.monotonic()
        about = {
            "owner": self._owner,
            "who": f"process {os.getpid()} on {socket.gethostname()}",
            "until": time.time() + LIFE_S,
        }
        content = json.dumps(about).encode()
        written = self._bucket.write(OBJECT, content, if_generation=generation)
        if written is None:
            return False
        self._generation, self._renewed = written, before
        return True

    @property
    def _place(self) -> str:
        return f"{self._bucket.url}/{OBJECT}"


def _parsed(content: bytes) -> dict[str, Any]:
    """What a lease says; one that says nothing readable is held by someone all the same."""
    try:
        held = json.loads(content)
        datetime.fromtimestamp(held["until"], UTC)
        return {"owner": held["owner"], "who": held["who"], "until": held["until"]}
    except (ValueError, TypeError, LookupError, OverflowError, OSError):
        return {"owner": "", "who": "nobody knows whom", "until": time.time() + LIFE_S}


def _who(held: dict[str, Any]) -> str:
    until = datetime.fromtimestamp(held["until"], UTC)
    return f"{held['who']}, until {until:%Y-%m-%d %H:%M:%S} UTC unless renewed"
