"""Where a remote file lies right now: a TensorStore spec for every scheme, and listings.

    gs://BUCKET/KEY, s3://BUCKET/KEY    credentials as Google's and Amazon's tools find them; for
                                        other servers of S3's protocol, AWS_ENDPOINT_URL
    http://, https://                   any server that serves byte ranges; redirects are followed
                                        here, since TensorStore does not
    hf://datasets/ORG/REPO[@REVISION]/PATH    a dataset repository of the Hugging Face Hub; token
                                        and HF_ENDPOINT as huggingface_hub finds them
    file:///PATH                        read as the remote ones are, many ranges at once: for
                                        network file systems, where a memory map waits page by page

A link that a redirect led to may expire; resolving its location again renews it.
"""

import http.client
import logging
import os
import random
import re
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import Request, urlopen

T = TypeVar("T")
log = logging.getLogger(__name__)

TIMEOUT_S = 120.0  # with no answer at all for so long, a request is made again
ATTEMPTS = 8
FIRST_DELAY_S = 1.0  # before the second attempt; each further one waits twice as long
LONGEST_DELAY_S = 30.0

IN_FLIGHT = 64  # requests at once, of one call and of the whole process

# How TensorStore's message begins where one may try again.
_PASSING = ("ABORTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "INTERNAL")
_CODE = re.compile(r"(?:HTTP code |http_response_code=')(\d{3})")
_HF = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/(?P<path>.+)")


class PassingFault(Exception):
    """Something that may well work if tried again."""


class Refused(Exception):
    """A server's lasting answer, with its HTTP status; an expired link gives one too."""

    def __init__(self, status: int, detail: object):
        super().__init__(status, detail)
        self.status, self.detail = status, detail


@dataclass(frozen=True)
class Link:
    """How to reach one remote file."""

    spec: dict[str, Any]  # of the TensorStore key-value store whose key "" is the file
    size: int | None = None  # bytes, where the scheme can tell
    version: str | None = None  # changes with the content, where the scheme can tell


def resolve(location: str) -> Link:
    """Finds the way to a file; repeats what fails in passing.

    Raises:
        FileNotFoundError: there is no such file.
        PermissionError: it may not be read.
        ConnectionError: the server does not answer.
        RuntimeError: hf:// without huggingface_hub.
        ValueError: an unknown scheme, or a server that cannot serve ranges.
    """
    scheme = location.partition("://")[0].lower()
    if scheme not in _RESOLVERS:
        raise ValueError(
            f"{location}: unknown scheme {scheme!r}; a dataset may lie at a path or at "
            f"{', '.join(f'{known}://' for known in _RESOLVERS)}"
        )
    return patiently(location, lambda: _RESOLVERS[scheme](location))


def patiently(name: str, attempt: Callable[[], T]) -> T:
    """Makes an attempt until it raises no `PassingFault`, with growing pauses.

    Raises:
        ConnectionError: no attempt of the last minutes worked.
    """
    failures = 0
    while True:
        try:
            return attempt()
        except PassingFault as fault:
            failures += 1
            pause(name, fault, failures)


def pause(name: str, fault: PassingFault, failures: int) -> None:
    """Waits after so many failures in a row; a bit at random, so that processes spread out.

    Raises:
        ConnectionError: there were too many of them.
    """
    if failures >= ATTEMPTS:
        raise ConnectionError(
            f"{name}: cannot be read, {failures} attempts failed: {str(fault)[:300]}; check the "
            "network and the server, then try again"
        ) from None
    delay = min(FIRST_DELAY_S * 2 ** (failures - 1), LONGEST_DELAY_S) * random.uniform(0.5, 1)
    if failures > 1:
        log.info("%s: %.200s; attempt %d in %.0f s", name, fault, failures + 1, delay)
    time.sleep(delay)


def refusal(name: str, status: int, detail: object = "") -> OSError:
    """The error for a lasting refusal of a server."""
    if status in (401, 403):
        return PermissionError(
            f"{name}: the server refuses to show it (HTTP {status}); check the address, your "
            "credentials, and that you have been given access"
        )
    if status in (404, 410):
        return FileNotFoundError(f"{name}: no such file (HTTP {status})")
    return OSError(f"{name}: the server answers HTTP {status}: {str(detail)[:300]}")


def fault_of(location: str, error: Exception) -> Exception:
    """What an error of TensorStore means: a `PassingFault`, `Refused`, or an OSError for good.

    It raises one type for everything and says in words what was wrong.
    """
    detail = str(error)
    kind, code = detail.partition(":")[0], _CODE.search(detail)
    status = int(code[1]) if code else 0
    if kind in _PASSING or (status and is_passing(status)):
        return PassingFault(detail)
    if status or kind == "PERMISSION_DENIED":
        return Refused(status or 403, detail)
    return OSError(f"{location}: cannot be read: {detail[:300]}")


def is_passing(status: int) -> bool:
    """Whether an HTTP status says to try again later."""
    return status in (408, 425, 429) or (status >= 500 and status not in (501, 505))


def list_files(prefix: str) -> dict[str, int | None] | None:
    """Locations that start with a prefix, and their sizes where a listing has them.

    None where the scheme has no listings, or this bucket shows none to us.
    """
    scheme = prefix.partition("://")[0].lower()
    lister = _LISTERS.get(scheme)
    return None if lister is None else patiently(prefix, lambda: lister(prefix))


@cache
def context() -> Any:
    """What all stores of this process share: a bound on requests, a few quick repeats."""
    import tensorstore as ts

    spec: dict[str, Any] = {"file_io_concurrency": {"limit": IN_FLIGHT}}
    for scheme in ("http", "s3", "gcs"):
        spec[f"{scheme}_request_concurrency"] = {"limit": IN_FLIGHT}
        # Longer pauses are ours: in them, TensorStore would look as silent as a dead server.
        spec[f"{scheme}_request_retries"] = {
            "max_retries": 4,
            "initial_delay": "50ms",
            "max_delay": "1s",
        }
    return ts.Context(spec)


def _bucket(location: str) -> Link:
    """gs:// and s3://; the key is taken as it is written, as gsutil and aws do."""
    scheme, _, rest = location.partition("://")
    bucket, _, key = rest.partition("/")
    if not bucket or not key:
        raise ValueError(f"{location}: name a bucket and a key, {scheme}://BUCKET/KEY")
    spec: dict[str, Any] = {"driver": "gcs", "bucket": bucket, "path": key}
    if scheme.lower() == "s3":
        spec["driver"] = "s3"
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if endpoint:
            spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
        elif region:
            spec["aws_region"] = region
    return Link(spec)


def _list_bucket(prefix: str) -> dict[str, int | None] | None:
    import tensorstore as ts

    spec = _bucket(prefix).spec
    key = spec.pop("path")
    root = prefix.removesuffix(key)
    # Keys are ordered by bytes, and no byte of UTF-8 is 0xff.
    keys = ts.KvStore.KeyRange(key.encode(), key.encode() + b"\xff")
    try:
        store = ts.KvStore.open(spec, context=context()).result()
        found = store.list(keys).result(timeout=TIMEOUT_S)
    except TimeoutError as error:
        raise PassingFault("the listing takes too long") from error
    except ValueError as error:
        fault = fault_of(prefix, error)
        if isinstance(fault, Refused):  # what may not be listed may still be read by name
            return None
        raise fault from None
    return {root + name.decode(errors="replace"): None for name in found}


def _file(location: str) -> Link:
    path = _file_path(location)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{location}: no such file")
    return Link({"driver": "file", "path": path}, os.path.getsize(path))


def _file_path(location: str) -> str:
    host, _, path = location[len("file://") :].partition("/")
    if host not in ("", "localhost"):
        raise ValueError(f"{location}: a file on another machine; write file:///PATH")
    return "/" + unquote(path)


def _list_folder(prefix: str) -> dict[str, int | None]:
    folder, stem = os.path.split(_file_path(prefix))
    if not os.path.isdir(folder):
        return {}
    with os.scandir(folder) as entries:
        return {
            prefix + quote(entry.name[len(stem) :]): entry.stat().st_size
            for entry in entries
            if entry.name.startswith(stem) and entry.is_file()
        }


def _http(location: str) -> Link:
    """Asks for the first byte: follows redirects, learns the length, sees that ranges work."""
    address = quote(location, safe=":/?#[]@!$&'()*+,;=%~")
    if not urlsplit(address).netloc:
        raise ValueError(f"{location}: names no server")
    asked = {"Range": "bytes=0-0", "Accept-Encoding": "identity", "User-Agent": "pythia-jax"}
    try:
        with urlopen(Request(address, headers=asked), timeout=TIMEOUT_S) as answer:
            final, status = answer.url, answer.status
            extent = answer.headers.get("Content-Range", "")
    except HTTPError as error:
        error.close()
        final, status, extent = error.url, error.code, error.headers.get("Content-Range", "")
        if is_passing(status):
            raise PassingFault(f"HTTP {status}") from None
        if status != 416:
            raise refusal(location, status, error.reason) from None
    except http.client.InvalidURL as error:
        raise ValueError(f"{location}: {error}") from None
    except (URLError, OSError, http.client.HTTPException) as error:
        if isinstance(getattr(error, "reason", error), ssl.SSLCertVerificationError):
            raise OSError(f"{location}: {error}; the server is not who it says it is") from None
        raise PassingFault(error) from error
    size = re.fullmatch(r"bytes (?:0-0|\*)/(\d+)", extent.strip())
    if size is None:
        raise ValueError(
            f"{location}: the server does not serve byte ranges (it answered HTTP {status} to a "
            "request for the first byte); download the files, or put them on a server that does"
        )
    return Link({"driver": "http", "base_url": final}, int(size[1]))


def _hf(location: str) -> Link:
    """The link that the hub redirects a file to, with the size that it tells."""
    repo, revision, path = _hf_parts(location)
    hub, api = _hub(location)
    url = hub.hf_hub_url(repo, path, repo_type="dataset", revision=revision, endpoint=api.endpoint)
    found = _of_hub(location, lambda: api.get_hf_file_metadata(url=url, timeout=TIMEOUT_S))
    spec: dict[str, Any] = {"driver": "http", "base_url": found.location}
    token = hub.get_token()
    if token and urlsplit(found.location).netloc == urlsplit(api.endpoint).netloc:
        # Small files are served by the hub itself, which must know who asks; links elsewhere are
        # signed, and the token is none of their business.
        spec["headers"] = [f"Authorization: Bearer {token}"]
    return Link(spec, found.size, found.etag)


def _list_repo(prefix: str) -> dict[str, int | None]:
    repo, revision, path = _hf_parts(prefix)
    hub, api = _hub(prefix)
    root = prefix.removesuffix(path)
    folder = path.rpartition("/")[0] or None

    def listed() -> dict[str, int | None]:
        tree = api.list_repo_tree(repo, folder, revision=revision, repo_type="dataset")
        return {
            root + file.path: file.size
            for file in tree
            if isinstance(file, hub.hf_api.RepoFile) and file.path.startswith(path)
        }

    try:
        return _of_hub(prefix, listed)
    except FileNotFoundError:
        if folder is None:
            raise  # no such repository or revision
        return {}


def _hf_parts(location: str) -> tuple[str, str | None, str]:
    match = _HF.fullmatch(location)
    if match is None:
        raise ValueError(
            f"{location}: write hf://datasets/ORG/REPO/PREFIX, with @REVISION after REPO if it is "
            "not the newest"
        )
    revision = match["revision"]
    return match["repo"], unquote(revision) if revision else None, match["path"]


def _hub(location: str) -> tuple[Any, Any]:
    """huggingface_hub and its client, at the endpoint that the environment names."""
    try:
        import huggingface_hub
    except ImportError:
        raise RuntimeError(
            f"{location}: hf:// needs huggingface_hub: pip install 'pythia-jax[hf]'"
        ) from None
    endpoint = os.environ.get("HF_ENDPOINT")
    return huggingface_hub, huggingface_hub.HfApi(
        endpoint=endpoint.rstrip("/") if endpoint else None
    )


def _of_hub(location: str, ask: Callable[[], T]) -> T:
    """Asks the hub, and sorts its errors into passing and lasting ones."""
    try:
        return ask()
    except Exception as error:  # its client's exceptions have changed from release to release
        kinds = {kind.__name__ for kind in type(error).__mro__}
        status = getattr(getattr(error, "response", None), "status_code", None)
        if (status is not None and is_passing(status)) or "TransportError" in kinds:
            raise PassingFault(error) from error
        if "GatedRepoError" in kinds or status in (401, 403):
            raise PermissionError(
                f"{location}: the hub refuses to show it; accept its terms on the hub, or log in "
                f"(`hf auth login`, HF_TOKEN). {str(error).splitlines()[0][:200]}"
            ) from None
        if status is not None or "EntryNotFoundError" in kinds:
            raise FileNotFoundError(
                f"{location}: not on the hub: {' '.join(str(error).split())[:300]}"
            ) from None
        if isinstance(error, OSError | ValueError):
            raise type(error)(f"{location}: {error}") from None
        raise


_RESOLVERS: dict[str, Callable[[str], Link]] = {
    "gs": _bucket,
    "s3": _bucket,
    "http": _http,
    "https": _http,
    "hf": _hf,
    "file": _file,
}
_LISTERS: dict[str, Callable[[str], dict[str, int | None] | None]] = {
    "gs": _list_bucket,
    "s3": _list_bucket,
    "hf": _list_repo,
    "file": _list_folder,
}
