"""Servers on this machine that behave as remote ones do at their worst."""

import json
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class RangeServer(ThreadingHTTPServer):
    """Serves `files` (path → bytes) by ranges, with faults drawn from a seeded generator.

    faults: share of requests answered 503, 429, by a dropped connection or by a cut-off body.
    delay: seconds that an answer may take.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, files: dict[str, bytes] | None = None, *, faults=0.0, delay=0.0, seed=0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = dict(files or {})
        self.faults, self.delay = faults, delay
        self.random, self.lock = random.Random(seed), threading.Lock()
        self.statuses: dict[str, list[int]] = {}  # answers to give first, per path; 0 is silence
        self.honour_ranges, self.shift = True, 0
        self.back: RangeServer | None = None  # where this server redirects to, with a ticket
        self.tickets: set[str] | None = None  # needed to be served here, if not None
        self.expire_every = 0  # all tickets go after so many requests, if not 0
        self.revoked = False  # this server gives only tickets that do not work
        self.token: str | None = None  # a hub's
        self.requests: list[tuple[str, str, str | None]] = []
        self.sent = self.busy = self.busiest = self.admitted = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        """Clients that hang up are what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: RangeServer

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            server.requests.append((self.command, self.path, self.headers.get("Range")))
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
            fault = server.random.choice(FAULTS) if server.random.random() < server.faults else None
            pause = server.random.random() * server.delay
        try:
            time.sleep(pause)
            self.serve(fault)
        finally:
            with server.lock:
                server.busy -= 1

    def serve(self, fault: str | int | None) -> None:
        server, split = self.server, urlsplit(self.path)
        path = unquote(split.path)
        planned = server.statuses.get(path)
        status = planned.pop(0) if planned else None
        if status == 0:
            time.sleep(3)
        if status or isinstance(fault, int):
            return self.answer(int(status or fault or 0), b"not now")
        if fault == "drop":
            return self.hang_up()
        if server.token and self.headers.get("Authorization") != f"Bearer {server.token}":
            return self.answer(401, b"who are you?")
        if path.startswith("/api/"):
            return self.api(path)
        if server.back is not None:
            return self.redirect(path, server.back)
        if not self.has_ticket(split.query):
            return self.answer(403, b"<Error>Request has expired</Error>")
        self.send_range(path, fault)

    def has_ticket(self, query: str) -> bool:
        server = self.server
        if server.tickets is None:
            return True
        (ticket,) = parse_qs(query).get("ticket", [""])
        with server.lock:
            if ticket not in server.tickets:
                return False
            server.admitted += 1
            if server.expire_every and server.admitted % server.expire_every == 0:
                server.tickets.clear()
        return True

    def redirect(self, path: str, back: RangeServer) -> None:
        path = re.sub(r"^/datasets/[^/]+/[^/]+/resolve/[^/]+", "", path)
        if path not in back.files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        with back.lock:
            ticket = str(self.server.random.random())
            if back.tickets is not None and not self.server.revoked:
                back.tickets.add(ticket)
        headers = {
            "Location": f"{back.url}{path}?ticket={ticket}",
            "X-Linked-Size": str(len(back.files[path])),
            "X-Linked-Etag": f'"{hash(back.files[path])}"',
            "X-Repo-Commit": "c0ffee",
        }
        self.answer(302, b"", headers)

    def api(self, path: str) -> None:
        """What of the hub's interface the readers use."""
        files = self.server.back.files if self.server.back else self.server.files
        tree = re.fullmatch(r"/api/datasets/org/repo/tree/(main|v1)(?:/(.*))?", path)
        if tree is None:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        folder = f"/{tree[2]}/" if tree[2] else "/"
        listed = [
            {"type": "file", "path": name[1:], "size": len(content), "oid": "0" * 40}
            for name, content in files.items()
            if name.startswith(folder) and "/" not in name[len(folder) :]
        ]
        if not listed:
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        self.answer(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})

    def send_range(self, path: str, fault: str | int | None) -> None:
        server = self.server
        content = server.files.get(path)
        if content is None:
            return self.answer(404, b"no such file")
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None or not server.honour_ranges:
            return self.answer(200, content)
        start, stop = int(asked[1]) + server.shift, min(int(asked[2]) + 1, len(content))
        if start >= len(content):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
        self.answer(206, content[start:stop], headers, cut=fault == "cut")

    def answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: bool = False
    ) -> None:
        if self.command != "HEAD":
            with self.server.lock:
                self.server.sent += len(body)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut and len(body) > 1:
            self.wfile.write(body[: len(body) // 2])
            return self.hang_up()
        self.wfile.write(body)

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()


FAULTS = (503, 429, "drop", "cut")


@contextmanager
def serving(*servers: RangeServer) -> Iterator[None]:
    threads = [
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        for server in servers
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def files_of(prefix: str, content: Any, shard: int | None = None) -> dict[str, bytes]:
    """Files as a server has them: one `.bin`, or shards."""
    content = bytes(content)
    if shard is None:
        return {f"{prefix}.bin": content}
    count = len(content) // shard + 1
    return {
        f"{prefix}-{i:05d}-of-{count - 1:05d}.bin": content[i * shard : (i + 1) * shard]
        for i in range(count)
    }
