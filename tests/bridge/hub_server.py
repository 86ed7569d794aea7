"""A stand-in for the Hugging Face hub: as much of its interface as `huggingface_hub` asks for.

Models, their branches and commits; files by range, large ones behind a redirect to another host, as
the hub's are; uploads, small ones inside a commit and large ones as git-lfs objects. No xet.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".pt")
"""Files that the hub keeps as git-lfs objects."""


@dataclass(frozen=True)
class Request:
    """host: `hub`, or `store`, where large files lie. path: unquoted, without the query."""

    method: str
    host: str
    path: str
    headers: dict[str, str]


@dataclass(frozen=True)
class Commit:
    """files: name → sha256 of the content."""

    id: str
    title: str
    description: str
    parent: str | None
    files: dict[str, str]


@dataclass
class Repo:
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    private: bool = False


class HubServer:
    """url: what `HF_ENDPOINT` is to be. requests: all that were made, in order.

    down: answers 503 to everything while set. gated: models whose files are refused.
    """

    def __init__(self, root: Path) -> None:
        self.blobs = root / "blobs"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.gated: set[str] = set()
        self.down = False
        self.drops: list[tuple[str, int]] = []
        self.failures: list[tuple[str, int]] = []
        self.lock = threading.RLock()
        self.url = self.store_url = ""

    def use(self, monkeypatch: Any, cache: Path) -> None:
        """Make this process take the server for the hub.

        `huggingface_hub` reads its environment once, at import, and the functions at its top keep
        the endpoint of then: code that is to be tested makes an `HfApi()` for every use.
        """
        from huggingface_hub import constants

        for name, value in {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
        }.items():
            monkeypatch.setattr(constants, name, value)

    def environment(self, cache: Path) -> dict[str, str]:
        """With these variables a new process takes the server for the hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def add(
        self, repo: str, revision: str, files: dict[str, bytes], *, title: str = "added"
    ) -> str:
        """A commit with these files alone on a branch, made if need be; its id."""
        with self.lock:
            there = self.repos.setdefault(repo, Repo())
            return self.commit(there, revision, {n: self.put(c) for n, c in files.items()}, title)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        with self.lock:
            there = self.repos[repo]
            commit = there.commits[there.branches[revision]]
            return {name: self.content(sha) for name, sha in commit.files.items()}

    def branches(self, repo: str) -> list[str]:
        with self.lock:
            return list(self.repos[repo].branches)

    def log(self, repo: str, revision: str = "main") -> list[Commit]:
        """Commits of a branch, the newest first."""
        with self.lock:
            there, found = self.repos[repo], []
            next_id: str | None = there.branches[revision]
            while next_id is not None:
                found.append(there.commits[next_id])
                next_id = found[-1].parent
            return found

    def drop_once(self, path_suffix: str, after_bytes: int) -> None:
        """The next answer with content whose path ends so breaks off after this many bytes."""
        self.drops.append((path_suffix, after_bytes))

    def fail_once(self, path_part: str, status: int = 500) -> None:
        """The next request whose path contains this is answered so; say it twice for two."""
        self.failures.append((path_part, status))

    # What the handlers do with it.

    def put(self, content: bytes) -> str:
        sha = hashlib.sha256(content).hexdigest()
        (self.blobs / sha).write_bytes(content)
        return sha

    def content(self, sha: str) -> bytes:
        return (self.blobs / sha).read_bytes()

    def commit(
        self, repo: Repo, branch: str, files: dict[str, str], title: str, description: str = ""
    ) -> str:
        parent = repo.branches.get(branch)
        facts = [branch, parent, title, len(repo.commits), sorted(files.items())]
        made = hashlib.sha1(json.dumps(facts).encode()).hexdigest()
        repo.commits[made] = Commit(made, title, description, parent, dict(files))
        repo.branches[branch] = made
        return made

    def resolve(self, repo: Repo, revision: str) -> Commit | None:
        return repo.commits.get(repo.branches.get(revision, revision))

    def entry(self, name: str, sha: str) -> dict[str, Any]:
        """A file as listings of the hub show it."""
        content = self.content(sha)
        shown = {"type": "file", "path": name, "size": len(content), "oid": git_sha(content)}
        if name.endswith(LARGE):
            shown["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 134}
        return shown


def git_sha(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def hub_server(root: Path) -> Iterator[HubServer]:
    """A hub whose files lie under `root`, until the block ends."""
    hub = HubServer(root)
    with ExitStack() as stack:
        for host, handler in (("hub", _Hub), ("store", _Store)):
            server = _Server(("127.0.0.1", 0), handler)
            server.hub, server.host = hub, host
            stack.callback(server.server_close)
            thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
            thread.start()
            stack.callback(server.shutdown)
            setattr(hub, "url" if host == "hub" else "store_url", server.url)
        yield hub


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    hub: HubServer
    host: str

    @property
    def url(self) -> str:
        # Two names, for the hub's large files are on another host, which gets no token.
        name = "127.0.0.1" if self.host == "hub" else "localhost"
        return f"http://{name}:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server  # type: ignore[assignment]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def answer(self) -> None:
        split = urlsplit(self.path)
        self.quoted, self.query = split.path, parse_qs(split.query)
        hub, path = self.server.hub, unquote(split.path)
        self.body = self.read_body()
        with hub.lock:
            headers = {name.lower(): value for name, value in self.headers.items()}
            hub.requests.append(Request(self.command, self.server.host, path, headers))
            failure = next((f for f in hub.failures if f[0] in path), None)
            if failure is not None:
                hub.failures.remove(failure)
        if hub.down or failure is not None:
            return self.send(503 if failure is None else failure[1], b"not now")
        with hub.lock:
            self.route(hub, path)

    def route(self, hub: HubServer, path: str) -> None:
        raise AssertionError("every handler has its own")

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def send(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, value: Any, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), Content_Type="application/json")

    def send_file(self, name: str, content: bytes, **headers: str) -> None:
        """A file or the range of it that is asked for, broken off where that is wanted."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        total, status = len(content), 200
        if wanted is not None:
            start, stop = int(wanted[1]), int(wanted[2] or total - 1) + 1
            if start >= total:
                return self.send(416, Content_Range=f"bytes */{total}")
            content, status = content[start:stop], 206
            headers["Content_Range"] = f"bytes {start}-{min(stop, total) - 1}/{total}"
        drops = self.server.hub.drops
        drop = next((d for d in drops if name.endswith(d[0])), None)
        if drop is None or self.command == "HEAD":
            return self.send(status, content, Accept_Ranges="bytes", **headers)
        drops.remove(drop)
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: drop[1]])
        self.close_connection = True


class _Store(_Handler):
    """Where large files lie: `/get/SHA/NAME`, `/put/SHA`."""

    def route(self, hub: HubServer, path: str) -> None:
        _, verb, sha, *_ = path.split("/", 3)
        if verb == "get" and (hub.blobs / sha).is_file():
            return self.send_file(path, hub.content(sha), ETag=f'"{sha}"')
        if verb == "put" and self.command == "PUT" and hub.put(self.body) == sha:
            return self.send(200)
        self.send(400, b"not what it says")


class _Hub(_Handler):
    """The interface itself."""

    def route(self, hub: HubServer, path: str) -> None:
        special = {
            "/api/repos/create": self.create,
            "/api/validate-yaml": lambda: self.send_json({"errors": [], "warnings": []}),
            "/api/whoami-v2": lambda: self.send_json({"type": "user", "name": "tester"}),
        }
        if path in special:
            return special[path]()
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.batch(found[1])
        # Branch names may hold slashes, quoted.
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.quoted):
            return self.file(*(unquote(part) for part in found.groups()))
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([\w-]+))?(?:/([^/]+))?", self.quoted)
        if found is None:
            return self.error(404, "Other", f"{path}: not played here")
        name, verb, revision = (None if part is None else unquote(part) for part in found.groups())
        repo = hub.repos.get(name or "")
        if repo is None:
            return self.error(401, "RepoNotFound", "Repository not found")
        if verb == "refs":
            return self.refs(repo)
        if verb == "branch":
            return self.branch(repo, revision or "")
        commit = hub.resolve(repo, revision or "main")
        if commit is None:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if verb in (None, "revision"):
            shown = [{"rfilename": file} for file in commit.files]
            about = {"id": name, "modelId": name, "sha": commit.id, "private": repo.private}
            return self.send_json({**about, "siblings": shown, "tags": [], "downloads": 0})
        if verb == "tree":
            return self.send_json([hub.entry(*item) for item in commit.files.items()])
        if verb == "paths-info":
            asked = set(parse_qs(self.body.decode())["paths"])
            return self.send_json([hub.entry(*i) for i in commit.files.items() if i[0] in asked])
        if verb == "commits":
            return self.send_json([self.shown(c) for c in hub.log(name or "", revision or "main")])
        if verb == "preupload":
            return self.preupload(commit)
        if verb == "commit":
            return self.take_commit(name or "", repo, revision or "main", commit)
        self.error(404, "Other", f"{path}: not played here")

    def error(self, status: int, code: str, message: str) -> None:
        content = json.dumps({"error": message}).encode()
        self.send(status, content, X_Error_Code=code, X_Error_Message=message)

    def shown(self, commit: Commit) -> dict[str, Any]:
        about = {"title": commit.title, "message": commit.description}
        return {"id": commit.id, "authors": [], "date": "2023-01-01T00:00:00.000Z", **about}

    def refs(self, repo: Repo) -> None:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
            for name, commit in repo.branches.items()
        ]
        self.send_json({"branches": branches, "converts": [], "tags": []})

    def branch(self, repo: Repo, name: str) -> None:
        if self.command == "DELETE":
            repo.branches.pop(name, None)
            return self.send_json({})
        if name in repo.branches:
            return self.error(409, "Conflict", f"Reference already exists: {name}")
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        commit = self.server.hub.resolve(repo, start)
        if commit is None:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {start}")
        repo.branches[name] = commit.id
        self.send_json({})

    def file(self, name: str, revision: str, file: str) -> None:
        hub = self.server.hub
        repo = hub.repos.get(name)
        if repo is None:
            return self.error(401, "RepoNotFound", "Repository not found")
        commit = hub.resolve(repo, revision)
        if commit is None:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if name in hub.gated:
            return self.error(403, "GatedRepo", f"Access to model {name} is restricted")
        sha = commit.files.get(file)
        if sha is None:
            return self.error(404, "EntryNotFound", "Entry not found")
        content = hub.content(sha)
        if not file.endswith(LARGE):
            etag = f'"{git_sha(content)}"'
            return self.send_file(file, content, ETag=etag, X_Repo_Commit=commit.id)
        place = f"{hub.store_url}/get/{sha}/{quote(file)}?signed=yes"
        self.send(
            302,
            Location=place,
            X_Repo_Commit=commit.id,
            X_Linked_Size=str(len(content)),
            X_Linked_Etag=f'"{sha}"',
        )

    def create(self) -> None:
        hub, asked = self.server.hub, json.loads(self.body)
        name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        status = 409 if name in hub.repos else 200
        if status == 200:
            hub.repos[name] = Repo(private=asked.get("visibility") == "private")
            first = {".gitattributes": hub.put(b"*.safetensors filter=lfs\n")}
            hub.commit(hub.repos[name], "main", first, "initial commit")
        self.send_json({"url": f"{hub.url}/{name}", "id": name}, status)

    def preupload(self, commit: Commit) -> None:
        hub, answers = self.server.hub, []
        for file in json.loads(self.body)["files"]:
            name, sha = file["path"], commit.files.get(file["path"])
            large = name.endswith(LARGE)
            oid = None if sha is None else sha if large else git_sha(hub.content(sha))
            mode = "lfs" if large else "regular"
            answers.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send_json({"files": answers})

    def batch(self, name: str) -> None:
        hub, objects = self.server.hub, []
        if name not in hub.repos:
            return self.error(401, "RepoNotFound", "Repository not found")
        for asked in json.loads(self.body)["objects"]:
            shown = {"oid": asked["oid"], "size": asked["size"]}
            if not (hub.blobs / asked["oid"]).is_file():
                shown["actions"] = {"upload": {"href": f"{hub.store_url}/put/{asked['oid']}"}}
            objects.append(shown)
        self.send_json({"transfer": "basic", "objects": objects})

    def take_commit(self, name: str, repo: Repo, branch: str, parent: Commit) -> None:
        """A commit, as lines of JSON: all of it, or nothing."""
        hub, files, about = self.server.hub, dict(parent.files), {}
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                about = value
            elif item["key"] == "file":
                files[value["path"]] = hub.put(base64.b64decode(value["content"]))
            elif item["key"] == "lfsFile":
                if not (hub.blobs / value["oid"]).is_file():
                    return self.error(400, "Other", f"{value['path']}: was not uploaded")
                files[value["path"]] = value["oid"]
            else:
                gone = value["path"].rstrip("/")
                for file in [f for f in files if f == gone or f.startswith(f"{gone}/")]:
                    del files[file]
        if about.get("parentCommit") not in (None, parent.id):
            return self.error(412, "Other", "A commit has happened since")
        made = hub.commit(repo, branch, files, about["summary"], about.get("description", ""))
        url = f"{hub.url}/{name}/commit/{made}"
        self.send_json({"success": True, "commitOid": made, "commitUrl": url, "hookOutput": ""})
