"""One checkpoint on disk: what is written beside its arrays, and reading it back, checked.

`<step>/state/` holds the arrays as Orbax writes them, `<step>/surroundings/` one JSON object: the
step, whether the arrays are a whole state, their digests, what the run was computed on, and a hash
of all this. Orbax hands back flipped bits without a word, so every restore forms the digests anew.
"""

import errno
import hashlib
import json
import logging
import math
import sys
import warnings
from functools import cache
from inspect import iscoroutine
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from pythia_jax.training.agreement import all_say
from pythia_jax.training.bucket import AnyPath
from pythia_jax.training.digests import Digests, changed, digests, name_of

log = logging.getLogger(__name__)

SEAL = "sha256"
"""Key of the hash of the other keys."""
PASSING = (
    "DEADLINE_EXCEEDED",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "UNAUTHENTICATED",
    "UNAVAILABLE",
)
"""What errors say that tell nothing of the checkpoint: memory, rights, the network."""
MACHINE = (errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ENOMEM)
"""Errors of the operating system that tell nothing of it either."""
NETWORK = ("aiohttp.", "gcsfs.", "google.api_core.", "google.auth.", "google.cloud.", "requests.")
"""Modules whose errors tell nothing of it either; what is not there is a FileNotFoundError."""
MEMORY_GB = 8
"""What may be in flight between storage and devices at once, besides one whole array."""


class DamagedError(RuntimeError):
    """A checkpoint is not what was saved."""


def sealed(about: dict[str, Any]) -> dict[str, Any]:
    """What is written beside a state, with its hash."""
    return {**about, SEAL: _hash(about)}


def read_about(path: AnyPath) -> dict[str, Any]:
    """What was written beside the state in the folder `path` of a step. Raises DamagedError."""
    try:
        about = json.loads((path / "surroundings" / "metadata").read_bytes())
        if not isinstance(about, dict):
            raise ValueError("no JSON object")
    except Exception as error:
        raise judged(error, f"{path}: what was saved beside the state cannot be read") from error
    seal = about.pop(SEAL, None)
    if seal != _hash(about):
        raise DamagedError(f"{path}: surroundings/metadata differs from what was saved")
    if str(about.get("step")) != path.name:
        raise DamagedError(f"{path}: holds step {about.get('step')}, not what its name says")
    return about


def read_state(path: AnyPath, like: Any, saved: Digests) -> Any:
    """The arrays of a step, as `like` says (shapes, dtypes, shardings), with the digests `saved`.

    `like` may be a part of what was saved. Every process takes part and all raise together: where
    one of them cannot read its share, none goes on. Raises DamagedError with the names.
    """
    state, failure = None, None
    try:
        state = _read(path, like)
    except DamagedError as error:
        failure = error
    if not all_say(failure is None):
        raise failure or DamagedError(f"{path}: another process cannot read its share of it")
    if wrong := changed(saved, digests(state)):
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        names = ", ".join(wrong[:3]) + more
        raise DamagedError(f"{path}: {names} differ{'s' * (len(wrong) == 1)} from what was saved")
    return state


def _read(path: AnyPath, like: Any) -> Any:
    largest = max(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(like))
    # The handler by itself: a checkpointer around it would wait for all processes at its end, and
    # one that failed would never come.
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=MEMORY_GB + largest // 10**9)
    args = ocp.args.PyTreeRestore(  # type: ignore[call-arg]
        item=like,
        restore_args=ocp.checkpoint_utils.construct_restore_args(like),
        partial_restore=True,
    )
    _hush_stragglers()
    try:
        state = handler.restore(epath.Path(path / "state"), args=args)
        for where, leaf in jax.tree.leaves_with_path(state):
            # Orbax gives back the description of an array that is not there.
            if not isinstance(leaf, jax.Array):
                raise ValueError(f"{name_of(where)} is missing")
        return state
    except Exception as error:
        log.debug("%s", path, exc_info=True)
        failure = judged(error, f"{path}: cannot be read")
    finally:
        handler.close()
    raise failure


@cache
def _hush_stragglers() -> None:
    """Keep reads that end, or are given up, after one has failed from printing a traceback each.

    Orbax closes its event loop at the first failure, TensorStore finds it closed, and what was not
    waited for goes at some later time. A hundred tracebacks would bury the one message that
    matters.
    """
    before, orbax = sys.unraisablehook, str(Path(ocp.__file__).parent)

    def hook(event: Any) -> None:
        theirs = iscoroutine(event.object) and event.object.cr_code.co_filename.startswith(orbax)
        if not theirs and str(event.exc_value) != "Event loop is closed":
            before(event)

    def told_already(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "was never retrieved" in text and ("orbax" in text or "OCDBT" in text)

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(lambda record: not told_already(record))
    warnings.filterwarnings("ignore", "coroutine '_read_array_index.*was never awaited")


def judged(error: Exception, what: str) -> DamagedError:
    """The error as damage, in words; raised as it is where it tells nothing of the checkpoint."""
    text, theirs = str(error), f"{type(error).__module__}.".startswith(NETWORK)
    machine = isinstance(error, OSError) and error.errno in MACHINE
    passing = MemoryError | PermissionError | ConnectionError | TimeoutError
    machine = machine or theirs or isinstance(error, passing)
    if machine or any(word in text for word in PASSING):
        raise error
    lines = text.strip().splitlines() or [type(error).__name__]
    return DamagedError(f"{what} ({type(error).__name__}: {lines[0][:300]})")


def _hash(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
