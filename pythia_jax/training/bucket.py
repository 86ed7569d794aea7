"""Run folders on a bucket of Google Cloud Storage: which they are, and their objects.

Orbax writes checkpoints there by itself (arrays through TensorStore, the rest through gcsfs). All
other objects are read and written here, through TensorStore, which knows conditions on generations.
S3 is not served: Orbax hands arrays to TensorStore's drivers for files and for Google's storage
only.
"""

import importlib.util
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import tensorstore as ts
from etils import epath

from pythia_jax.configs import ConfigError
from pythia_jax.data import links
from pythia_jax.data.links import PassingFault, Refused
from pythia_jax.data.storage import is_url

AnyPath = Path | epath.Path
"""A folder or file on this machine, or on a bucket."""


def path_of(directory: str | os.PathLike[str]) -> AnyPath:
    """A run folder: a path as it is given, or the place on a bucket that a gs:// URL names.

    Raises ConfigError for other URLs, and where what writes to buckets is not installed.
    """
    directory = os.fspath(directory)
    if not is_url(directory):
        return Path(directory)
    scheme, _, rest = directory.partition("://")
    if scheme != "gs":
        raise ConfigError(
            f"{directory!r} is no place for a run folder: of all URLs only gs:// is served, for "
            "Orbax, which writes checkpoints, knows no other bucket. Give one, or a folder that "
            "all processes see"
        )
    bucket, _, key = rest.rstrip("/").partition("/")
    if not bucket or not key:
        raise ConfigError(f"{directory!r}: name a bucket and a folder in it, gs://BUCKET/RUN")
    if importlib.util.find_spec("gcsfs") is None:
        raise ConfigError(
            f"{directory!r}: run folders on a bucket need gcsfs: pip install 'pythia-jax[bucket]'"
        )
    _see_what_others_write()
    return epath.Path(f"gs://{bucket}/{key}")


def _see_what_others_write() -> None:
    """Keep gcsfs from remembering listings.

    TensorStore and other processes write past it, and Orbax deletes by what a listing shows.
    """
    from fsspec.config import conf

    conf.setdefault("gcs", {})["use_listings_cache"] = False
    # One way for all: where TensorFlow is installed, etils would go through that instead.
    os.environ.setdefault("EPATH_USE_TF", "false")


class Bucket:
    """The objects below a gs:// URL, by their names relative to it.

    What fails in passing is tried again for some minutes. All methods raise ConnectionError when
    that was in vain, PermissionError and OSError for what will not get better.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        spec = links.resolve(f"{self.url}/").spec
        self._store = ts.KvStore.open(spec, context=links.context()).result()

    def read(self, name: str) -> tuple[bytes | None, bytes]:
        """An object, None if there is none, and its generation (which "none" has too)."""
        found = self._done(name, lambda: self._store.read(name))
        content = found.value if found.state == "value" else None
        return content, found.stamp.generation

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        """Objects by name, many at once; those that are not there are left out."""
        asked = {name: self._store.read(name) for name in names}
        found = {}
        for name, future in asked.items():
            # Repeats, where there must be any, one by one.
            first = iter([future])
            answer = self._done(name, lambda f=first, n=name: next(f, None) or self._store.read(n))
            if answer.state == "value":
                found[name] = answer.value
        return found

    def write(
        self, name: str, content: bytes | None, *, if_generation: bytes | None = None
    ) -> bytes | None:
        """Write an object whole, delete it if `content` is None; returns the new generation.

        if_generation: only if it has this one; None is returned if it has another. It may also
        have that other because this very call was repeated after its answer was lost.
        """
        try:
            stamp = self._done(
                name, lambda: self._store.write(name, content, if_equal=if_generation)
            )
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.url}: there is no bucket of that name") from None
        return stamp.generation or None

    def names(self, prefix: str) -> list[str]:
        """The names that begin with `prefix`, in order."""
        keys = ts.KvStore.KeyRange(prefix.encode(), prefix.encode() + b"\xff")
        found = self._done(prefix, lambda: self._store.list(keys))
        return sorted(name.decode() for name in found)

    def _done(self, name: str, ask: Callable[[], Any]) -> Any:
        place = f"{self.url}/{name}"

        def attempt() -> Any:
            try:
                return ask().result(timeout=links.TIMEOUT_S)
            except TimeoutError as error:
                raise PassingFault(f"no answer in {links.TIMEOUT_S:g} s") from error
            except (ValueError, NotImplementedError) as error:
                raise links.fault_of(place, error) from None

        try:
            return links.patiently(place, attempt)
        except Refused as error:
            raise links.refusal(place, error.status, error.detail) from None
