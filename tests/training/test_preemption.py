"""Notices to leave are heard once, and what was there before comes back."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import jax
import pytest

from pythia_jax.training import preemption
from pythia_jax.training.preemption import notices


def until(true: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def hit(number: int) -> None:
    """Send this process a signal; Python runs its handler before the next line."""
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Ctrl-C as in a terminal: a shell ignores it for what it runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_notice_and_the_old_handlers_come_back(number: int) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with notices() as received:
        assert not received.received and received.reason is None
        hit(number)
        assert received.received and received.reason == signal.Signals(number).name
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_handlers_come_back_after_an_error_too() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), notices():
        _ = 1 / 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_ctrl_c_interrupts_at_once_and_a_second_sigterm_does_not() -> None:
    with notices() as received:
        hit(signal.SIGTERM)
        hit(signal.SIGTERM)
        hit(signal.SIGINT)  # the first of its kind
        assert received.reason == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            hit(signal.SIGINT)


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with notices() as received:
            hit(signal.SIGINT)
            assert not received.received
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_sets_no_handlers() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def listen() -> None:
        with notices() as received:
            seen.append((signal.getsignal(signal.SIGTERM), received.received))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join(30)
    assert seen == [(before, False)]


class Metadata(ThreadingHTTPServer):
    """Google's metadata server, as far as it tells of an end: values by key, waited for by etag."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.values = {"preempted": "FALSE", "maintenance-event": "NONE"}
        self.changed = threading.Condition()
        self.asked: list[str] = []
        self.failures = 0  # how many requests to answer 503

    def set(self, key: str, value: str) -> None:
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()


class _Handler(BaseHTTPRequestHandler):
    server: Metadata

    def log_message(self, format: str, *args: object) -> None: ...

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(split.query).items()}
        key = split.path.removeprefix("/computeMetadata/v1/instance/")
        server = self.server
        with server.changed:
            server.asked.append(key)
            if self.headers.get("Metadata-Flavor") != "Google" or key not in server.values:
                return self.answer(403, "")
            if server.failures:
                server.failures -= 1
                return self.answer(503, "")
            if query.get("wait_for_change") == "true":
                server.changed.wait_for(
                    lambda: etag(server.values[key]) != query.get("last_etag"),
                    timeout=float(query.get("timeout_sec", 60)),
                )
            self.answer(200, server.values[key])

    def answer(self, status: int, value: str) -> None:
        self.send_response(status)
        self.send_header("ETag", etag(value))
        self.send_header("Content-Length", str(len(value)))
        self.end_headers()
        self.wfile.write(value.encode())


def etag(value: str) -> str:
    return value.encode().hex() or "none"


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metadata]:
    """The server, this process taken for one on a TPU VM, and impatient."""
    server = Metadata()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody there: it must not be asked
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(preemption, "ANSWER_SECONDS", 1)
    monkeypatch.setattr(preemption, "RETRY_SECONDS", 0.05)
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("key", "value"),
    [("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")],
)
def test_the_clouds_notice_is_heard_as_it_comes(metadata: Metadata, key: str, value: str) -> None:
    with notices() as received:
        assert until(lambda: metadata.asked.count(key) >= 2), "it waits for a change, by etag"
        assert not received.received
        metadata.set(key, value)
        assert until(lambda: received.received, seconds=0.9), "told at once, not at the next round"
        assert received.reason and "machine" in received.reason


def test_a_notice_given_before_training_began_is_heard(metadata: Metadata) -> None:
    metadata.set("preempted", "TRUE")
    with notices() as received:
        assert until(lambda: received.received)


def test_a_migration_is_no_reason_to_leave(metadata: Metadata) -> None:
    with notices() as received:
        metadata.set("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")
        assert until(lambda: metadata.asked.count("maintenance-event") >= 3)
        assert not received.received


def test_a_server_that_fails_is_asked_again(
    metadata: Metadata, caplog: pytest.LogCaptureFixture
) -> None:
    metadata.failures = 6
    with notices() as received:
        metadata.set("preempted", "TRUE")
        assert until(lambda: received.received)
    assert metadata.failures == 0
    assert 1 <= caplog.text.count("no answer from the metadata server") <= 2, "once for each key"


def test_elsewhere_nobody_asks_the_metadata_server(
    metadata: Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with notices():
        time.sleep(0.2)
    assert metadata.asked == []


def test_a_process_that_listens_outlives_sigterm_and_ends_as_it_wants() -> None:
    code = (
        "import sys, time\n"
        "from pythia_jax.training.preemption import notices\n"
        "with notices() as received:\n"
        "    print('ready', flush=True)\n"
        "    while not received.received: time.sleep(0.01)\n"
        "sys.exit(75)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    child.terminate()
    assert child.wait(30) == 75
    child.stdout.close()
