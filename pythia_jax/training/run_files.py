"""The files of a run beside its checkpoints, wherever the run folder lies.

In a folder of this machine they are written where they stay, under a lock. Of a run folder on a
bucket they are written into a working folder under the cache folder, and uploaded at checkpoints,
under a lease. Nothing on a bucket can be appended to, so what metrics.jsonl has grown by goes up
as a numbered part: `metrics/000004.jsonl`. The first part of an attempt that went on from step S
is `metrics/000003-from-S.jsonl`: it takes the place of all lines of step S and later before it.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pythia_jax.configs import RunConfig
from pythia_jax.data.order_cache import cache_folder
from pythia_jax.files import locked
from pythia_jax.training.bucket import AnyPath, Bucket, path_of
from pythia_jax.training.lease import Lease
from pythia_jax.training.pod import is_first
from pythia_jax.training.provenance import enter_run

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
FETCHED = ("config.yaml", "data.json", "tokenizer.json", "wandb_id")
"""Files of a run folder that are compared, or gone on with, when a run is."""
LOCK_SECONDS = 30
"""How long to wait for the lock of a process that was told to end, or killed, and has yet to go."""
_PART = re.compile(r"metrics/(\d{6,})(?:-from-(\d+))?\.jsonl")


class RunFiles:
    """place: the run folder. folder: where its files are written on this machine."""

    def __init__(self, place: AnyPath, folder: Path) -> None:
        self.place, self.folder = place, folder

    def begin(self, start: int) -> None:
        """Called when metrics.jsonl has been cut to what lies before step `start`."""

    def check(self) -> None:
        """Raise LeaseError if the folder is another run's by now; cheap, for every step."""

    def upload(self) -> None:
        """Bring what has been written to where the run folder lies, before a checkpoint follows.

        Raises LeaseError if that is another run's by now, OSError if it cannot be written.
        """


class BucketFiles(RunFiles):
    """The files of a run folder on a bucket. Only the holder of the lease makes one."""

    def __init__(self, place: AnyPath, folder: Path, bucket: Bucket, lease: Lease) -> None:
        super().__init__(place, folder)
        self._bucket, self._lease = bucket, lease
        self._sent: dict[Path, tuple[int, int]] = {}
        self._parts = 0
        self._begun = False
        self._from: int | None = None  # the step that the next part is to name
        self._fetched = self._position = 0  # bytes of metrics.jsonl

    def fetch(self) -> None:
        """Bring here what a run goes on with, in place of what an earlier attempt left here."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif not path.name.startswith("."):
                path.unlink()
        for name, content in self._bucket.read_many(FETCHED).items():
            (self.folder / name).write_bytes(content)
            self._sent[self.folder / name] = _state(self.folder / name)
        parts = self._bucket.read_many(self._bucket.names("metrics/"))
        self._parts = 1 + max((int(m[1]) for m in map(_PART.fullmatch, parts) if m), default=-1)
        (self.folder / METRICS).write_bytes(merged(parts))
        self._fetched = _state(self.folder / METRICS)[0]

    def begin(self, start: int) -> None:
        self._begun = True
        self._position = _state(self.folder / METRICS)[0]
        self._from = start

    def check(self) -> None:
        self._lease.check()

    def upload(self) -> None:
        self._lease.confirm()
        # The config last: where it is, the others are.
        for path in sorted(self._changed(), key=lambda path: path.name == "config.yaml"):
            state = _state(path)
            self._bucket.write(path.relative_to(self.folder).as_posix(), path.read_bytes())
            self._sent[path] = state
        if self._begun:
            self._upload_metrics()

    def _changed(self) -> list[Path]:
        """Files that are not on the bucket as they are here.

        Not those of our own book-keeping, nor what Weights & Biases keeps for itself.
        """
        return [
            path
            for path in self.folder.rglob("*")
            if path.is_file()
            and path != self.folder / METRICS
            and not path.name.startswith(".")
            and path.relative_to(self.folder).parts[0] != "wandb"
            and self._sent.get(path) != _state(path)
        ]

    def _upload_metrics(self) -> None:
        with (self.folder / METRICS).open("rb") as file:
            file.seek(self._position)
            grown = file.read()
        dropped = self._from is not None and self._position < self._fetched
        if not grown and not dropped:
            return
        since = "" if self._from is None else f"-from-{self._from}"
        self._bucket.write(f"metrics/{self._parts:06d}{since}.jsonl", grown)
        self._parts += 1
        self._position += len(grown)
        self._from = None


def merged(parts: Mapping[str, bytes]) -> bytes:
    """metrics.jsonl, from its parts by name; names that are none are passed over."""
    lines: list[bytes] = []
    found = [match for match in map(_PART.fullmatch, parts) if match]
    for match in sorted(found, key=lambda match: int(match[1])):
        if match[2] is not None:
            lines = [line for line in lines if json.loads(line)["step"] < int(match[2])]
        lines += parts[match[0]].splitlines()
    return b"".join(line + b"\n" for line in lines)


def read_parts(url: str) -> bytes:
    """metrics.jsonl of the run folder at a gs:// URL. Raises FileNotFoundError if it has none."""
    bucket = Bucket(str(path_of(url)))
    names = bucket.names("metrics/")
    if not names:
        raise FileNotFoundError(f"{url}: no metrics (metrics/000000-….jsonl) there")
    return merged(bucket.read_many(names))


@contextmanager
def run_folder(config: RunConfig) -> Iterator[RunFiles]:
    """Make or take over the run folder, and keep every other run out of it.

    One process of a run does so for all of them. On a bucket, what has been written is uploaded
    at the end as well, whatever the end is.
    """
    place = path_of(config.checkpoint.directory)
    folder = place if isinstance(place, Path) else working_folder(str(place))
    if not is_first():
        yield RunFiles(place, folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder / ".lock", seconds=LOCK_SECONDS))
        except BlockingIOError:
            raise RuntimeError(
                f"{place}: another process is training in this folder, and still was after "
                f"{LOCK_SECONDS} seconds"
            ) from None
        if isinstance(place, Path):
            enter_run(config, folder.absolute())
            yield RunFiles(place, folder)
            return
        bucket = Bucket(str(place))
        lease = held.enter_context(Lease(bucket, folder / ".lease"))
        files = BucketFiles(place, folder, bucket, lease)
        files.fetch()
        enter_run(config, folder, named=str(place))
        files.upload()
        try:
            yield files
        except BaseException:
            try:
                files.upload()
            except Exception as error:  # what is under way already says more
                log.error("%s: the last metrics and reports are not there: %s", place, error)
            raise
        files.upload()


def working_folder(url: str) -> Path:
    """Where the files of a run folder on a bucket are written on this machine."""
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    return cache_folder() / "runs" / name


def _state(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns
