"""Being told to leave: by a signal, by Ctrl-C, or by the cloud that wants its machine back."""

import http.client
import logging
import os
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax

log = logging.getLogger(__name__)


class Preempted(RuntimeError):
    """Training was told to leave, and has saved all that is needed to go on."""


class Notices:
    """What this process has been told. reason: of the first notice, in words; None before it."""

    def __init__(self) -> None:
        self.reason: str | None = None

    @property
    def received(self) -> bool:
        return self.reason is not None

    def give(self, reason: str) -> None:
        """Note a reason to leave; only the first counts."""
        self.reason = self.reason or reason


@contextmanager
def notices() -> Iterator[Notices]:
    """Listen for notices to leave: SIGTERM, the first SIGINT, and on TPU VMs the cloud's own.

    A second SIGINT interrupts at once, as Ctrl-C does everywhere. A SIGINT that was ignored, as a
    shell does for what runs in its background, stays so. The handlers there were before come back
    on the way out. Only the main thread may set handlers; in another none is set.

    Enter it after `pod.join`: whether there is a TPU is asked of JAX.
    """
    received, done = Notices(), threading.Event()
    if jax.default_backend() == "tpu":
        for watch in WATCHED:
            name = f"notices of {watch[0]}"
            arguments = (received, done, *watch)
            threading.Thread(target=_watch, args=arguments, name=name, daemon=True).start()
    try:
        with _handlers(received):
            yield received
    finally:
        done.set()


@contextmanager
def _handlers(received: Notices) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    # Neither handler logs: the main thread may be in the middle of doing so.
    def handle(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and interrupted:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            interrupted.append(True)
        received.give(signal.Signals(number).name)

    interrupted: list[bool] = []
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGINT)
        if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        for number in before:
            signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            # None: a handler from outside Python, which cannot be set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


WATCHED = (
    ("preempted", "TRUE", "the cloud takes this spot machine back"),
    (
        "maintenance-event",
        "TERMINATE_ON_HOST_MAINTENANCE",
        "the cloud ends this machine to mend it",
    ),
)
"""Values of Google's metadata server: key of the instance, value that is a notice, what it means.
https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice
https://cloud.google.com/compute/docs/instances/create-use-preemptible
"""
ANSWER_SECONDS = 60
RETRY_SECONDS = 10


def _watch(received: Notices, done: threading.Event, key: str, notice: str, reason: str) -> None:
    """Ask for `key` until its value is `notice`, each time with an answer as soon as it changes."""
    etag, complained = "0", False  # no value's etag, so that the first answer comes at once
    while not done.is_set():
        try:
            value, etag = _ask(key, etag)
        except (http.client.HTTPException, urllib.error.URLError, OSError) as error:
            if not complained:
                log.warning("%s: no answer from the metadata server (%s); asking on", key, error)
            complained = True
            done.wait(RETRY_SECONDS)
            continue
        if value == notice:
            received.give(reason)
            return


def _ask(key: str, etag: str) -> tuple[str, str]:
    """Value of an instance's metadata key, and its etag, once it is another than `etag`'s.

    The server answers after ANSWER_SECONDS at the latest. GCE_METADATA_HOST: host or host:port in
    place of the standard one, as in Google's own libraries.
    """
    host = os.environ.get("GCE_METADATA_HOST") or "metadata.google.internal"
    query = f"wait_for_change=true&last_etag={etag}&timeout_sec={ANSWER_SECONDS}"
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/{key}?{query}",
        headers={"Metadata-Flavor": "Google"},
    )
    # The server is this machine's own; a proxy would answer for another.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=ANSWER_SECONDS + 30) as answer:
        return answer.read().decode().strip(), answer.headers.get("ETag", "0")
