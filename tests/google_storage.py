"""A stand-in for Google Cloud Storage: buckets in memory, behind its JSON interface.

It answers what gcsfs (Orbax's files), google-cloud-storage and TensorStore (arrays, ours) ask:
reads by range, listings, uploads in one piece or several, copies, and conditions on generations.
"""

import base64
import hashlib
import json
import re
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

OBJECT = re.compile(r"(?:/download|/upload)?/storage/v1/b/([^/]+)/o(?:/([^/]*)(/.*)?)?")
MISMATCH, NOT_MODIFIED = 412, 304


class GoogleStorage(ThreadingHTTPServer):
    """objects: by (bucket, key), content and generation. Every bucket is there but "missing".

    down: answers 503 to everything while set.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[tuple[str, str], tuple[bytes, int]] = {}
        self.uploads: dict[str, tuple[str, str, bytearray]] = {}
        self.lock = threading.RLock()
        self.generation = 1000
        self.down = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """With these variables a process takes this server for Google's."""
        return {
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "STORAGE_EMULATOR_HOST": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "test",
            "NO_GCE_CHECK": "true",
            "FSSPEC_GCS_TOKEN": "anon",
            # Zonal and hierarchical buckets, which gcsfs asks for over gRPC, are not played here.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        with self.lock:
            return sorted(k for b, k in self.objects if b == bucket and k.startswith(prefix))

    def content(self, bucket: str, key: str) -> bytes:
        return self.objects[bucket, key][0]

    def put(self, bucket: str, key: str, content: bytes) -> int:
        with self.lock:
            self.generation += 1
            self.objects[bucket, key] = (bytes(content), self.generation)
            return self.generation

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Killed clients hang up; that is what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: GoogleStorage

    def log_message(self, format: str, *args: object) -> None: ...

    def do_GET(self) -> None:
        self.handle_one()

    do_POST = do_PUT = do_DELETE = do_HEAD = do_GET

    def handle_one(self) -> None:
        body = self.body()
        split = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(split.query).items()}
        with self.server.lock:
            if self.server.down:
                return self.fail(503)
            bucket = re.fullmatch(r"/storage/v1/b/([^/]+)", split.path)
            if bucket:
                return self.say({"kind": "storage#bucket", "name": bucket[1], "id": bucket[1]})
            found = OBJECT.fullmatch(split.path)
            if found is None:
                return self.fail(404)
            where, key, action = unquote(found[1]), found[2] and unquote(found[2]), found[3]
            if split.path.startswith("/upload/"):
                return self.upload(where, query, body)
            if not key:
                return self.list(where, query)
            if action:
                return self.copy(where, key, action)
            return self.object(where, key, query)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def object(self, bucket: str, key: str, query: dict[str, str]) -> None:
        content, generation = self.server.objects.get((bucket, key), (None, 0))
        if int(query.get("ifGenerationMatch", generation)) != generation:
            return self.fail(MISMATCH)
        if content is None:
            return self.fail(404)
        if int(query.get("ifGenerationNotMatch", -1)) == generation:
            return self.fail(NOT_MODIFIED)
        if self.command == "DELETE":
            del self.server.objects[bucket, key]
            return self.answer(204, b"")
        if query.get("alt") != "media":
            return self.say(self.about(bucket, key))
        headers = {"x-goog-generation": str(generation), "x-goog-hash": "md5=" + _md5(content)}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            return self.answer(200, content, headers)
        start, stop = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
        if start >= len(content):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self.answer(206, content[start:stop], headers)

    def list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        first, stop = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
        items, prefixes = [], []
        for key in self.server.keys(bucket, prefix):
            if not first <= key < stop:
                continue
            head, mark, _ = key[len(prefix) :].partition(delimiter or "\0")
            if mark:
                prefixes.append(prefix + head + mark)
            else:
                items.append(self.about(bucket, key))
        self.say({"items": items, "prefixes": list(dict.fromkeys(prefixes))})

    def copy(self, bucket: str, key: str, action: str) -> None:
        target = re.fullmatch(r"/(?:rewriteTo|copyTo|moveTo)(?:/b/([^/]+))?/o/([^/]+)", action)
        if target is None or (bucket, key) not in self.server.objects:
            return self.fail(404)
        into, name = unquote(target[1] or bucket), unquote(target[2])
        self.server.put(into, name, self.server.content(bucket, key))
        if action.startswith("/moveTo"):
            del self.server.objects[bucket, key]
        about = self.about(into, name)
        self.say({"done": True, "resource": about} if "rewrite" in action else about)

    def upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        if bucket == "missing":
            return self.fail(404)
        if "upload_id" in query:
            return self.upload_part(query["upload_id"], body)
        if query["uploadType"] == "resumable":
            key = query.get("name") or json.loads(body)["name"]
            number = str(len(self.server.uploads))
            self.server.uploads[number] = (bucket, key, bytearray())
            place = f"{self.server.url}/upload/storage/v1/b/{quote(bucket)}/o?upload_id={number}"
            return self.answer(200, b"{}", {"Location": place})
        if query["uploadType"] == "multipart":
            mark = re.search('boundary="?([^"]+)', self.headers["Content-Type"])
            assert mark is not None
            _, about, content, _ = body.split(b"--" + mark[1].encode(), 3)
            key = json.loads(re.split(rb"\r?\n\r?\n", about, maxsplit=1)[1])["name"]
            # One line end belongs to the boundary after it.
            content = re.split(rb"\r?\n\r?\n", content, maxsplit=1)[1][:-1]
        else:
            key, content = query["name"], body
        generation = self.server.objects.get((bucket, key), (b"", 0))[1]
        if int(query.get("ifGenerationMatch", generation)) != generation:
            return self.fail(MISMATCH)
        self.server.put(bucket, key, content)
        self.say(self.about(bucket, key))

    def upload_part(self, number: str, body: bytes) -> None:
        bucket, key, content = self.server.uploads[number]
        content += body
        extent = self.headers.get("Content-Range", "")
        if extent.endswith("/*"):
            return self.answer(308, b"", {"Range": f"bytes=0-{len(content) - 1}"})
        self.server.put(bucket, key, bytes(content))
        self.say(self.about(bucket, key))

    def about(self, bucket: str, key: str) -> dict[str, Any]:
        content, generation = self.server.objects[bucket, key]
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": key,
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(content)),
            "md5Hash": _md5(content),
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def say(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def fail(self, status: int) -> None:
        said = json.dumps({"error": {"code": status, "message": f"status {status}"}}).encode()
        self.answer(status, b"" if status == NOT_MODIFIED else said)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _md5(content: bytes) -> str:
    return base64.b64encode(hashlib.md5(content).digest()).decode()


@cache
def running() -> GoogleStorage:
    """The server of this process: TensorStore reads its address once, so there is one for all."""
    server = GoogleStorage()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server
