"""Being one process of several: joining the others, agreeing with them, failing without them."""

import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pythia_jax.training.preemption import Preempted

ADDRESS, COUNT, NUMBER = ENVIRONMENT = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
)
"""host:port of process 0, how many processes there are, and which of them, from 0, this one is."""


def join(heartbeat_seconds: int) -> None:
    """Join this process to the others of its pod, before anything else is asked of JAX.

    Who they are is told by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, and
    without the latter two by what JAX finds out itself on TPU VMs, GKE, Slurm and Open MPI.

    heartbeat_seconds: a process not heard of for so long is dead; JAX then aborts the others
    (SIGABRT).

    Raises ValueError where the variables are set in part or make no sense, or where neither they
    nor the machine say who the others are.
    """
    told = _told()
    initialize = partial(jax.distributed.initialize, heartbeat_timeout_seconds=heartbeat_seconds)
    # JAX takes SIGTERM for a preemption service of its own, and keeps it from ending the process.
    with _signals_as_they_were():
        if told is not None:
            # What the environment says counts alone, inside a Slurm job too.
            initialize(*told, cluster_detection_method="deactivate")
            return
        try:
            initialize()
        except ValueError as error:
            raise ValueError(
                "--pod: JAX finds no pod around this process (TPU VM, GKE, Slurm, Open MPI); start "
                f"it there, or through launch/local_pod.py, or set {', '.join(ENVIRONMENT)}"
            ) from error


def is_first() -> bool:
    """Whether this process speaks for all: writes shared files, shows progress."""
    return jax.process_index() == 0


def _told() -> tuple[str, int, int] | None:
    """Address, count and number as the environment has them; None if it has not the latter two."""
    address, count, number = values = [os.environ.get(name, "") for name in ENVIRONMENT]
    if not (count or number):
        return None
    missing = [name for name, value in zip(ENVIRONMENT, values, strict=True) if not value]
    if missing:
        raise ValueError(f"{', '.join(missing)}: not set; {COUNT} and {NUMBER} want all three")
    if not (count.isdecimal() and number.isdecimal() and int(number) < int(count)):
        raise ValueError(
            f"{COUNT}={count}, {NUMBER}={number}: must be whole numbers, the second below the first"
        )
    if not address.rpartition(":")[2].isdecimal():
        raise ValueError(f"{ADDRESS}={address}: must be host:port")
    return address, int(count), int(number)


@contextmanager
def _signals_as_they_were() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        # None: a handler from outside Python, which cannot be set again.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


class Vote:
    """What any process of a pod has seen, told to all of them, one call late.

    Every process makes the same calls in the same order, one a step, and all get the same answer
    at the same call, so they can act on it together (a collective save, an end). The exchange is a
    computation on the mesh, queued behind the step before it; its answer is asked for a call
    later, when the device has had a step's time for it.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._alone = len({d.process_index for d in mesh.devices.flat}) == 1
        self._devices = mesh.devices.size
        # One row a device, whatever the mesh's axes are.
        self._rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._any = jax.jit(lambda rows: jnp.max(rows, axis=0), out_shardings=everywhere)
        self._before: jax.Array | None = None

    def vote(self, *flags: bool) -> tuple[bool, ...]:
        """With one process the flags themselves; with several, the OR of the call before.

        The first call of several answers False throughout. A flag handed in at the call that tells
        of it counts as told. The number of flags stays the same.
        """
        if self._alone:
            return tuple(map(bool, flags))
        before = np.zeros(len(flags)) if self._before is None else np.asarray(self._before)
        if before.shape != (len(flags),):
            raise ValueError(f"{len(flags)} flags after {before.shape[0]}; they must stay the same")
        told = tuple(map(bool, before))
        # What is told now will be acted on now; asked for again, it would be told again.
        asked = [flag and not known for flag, known in zip(flags, told, strict=True)]
        rows = jax.make_array_from_callback(
            (self._devices, len(flags)), self._rows, lambda _: np.asarray(asked, np.int32)[None]
        )
        self._before = self._any(rows)
        return told


@contextmanager
def failing_at_once(
    heartbeat_seconds: int, tell: Callable[[BaseException], object] = traceback.print_exception
) -> Iterator[None]:
    """Around the work of a process of a pod: an error ends it now, with its message and status 1.

    A process that fails would otherwise take leave of the others first, which wait for it in a
    collective; when the heartbeat's time is over JAX aborts it, and its own status is lost.

    tell: says what happened, on standard error. What comes from JAX's runtime may be no fault of
    this process but a peer's death (a closed connection): JAX is then given its time to find
    that out and abort, before the error counts as this process's own.

    An end that all processes come to together (SystemExit, Preempted) passes through.
    """
    try:
        yield
    except (SystemExit, Preempted):
        raise
    except KeyboardInterrupt:
        _flush()
        os._exit(128 + signal.SIGINT)
    except BaseException as error:
        tell(error)
        _flush()
        if jax.process_count() > 1 and _may_be_a_peers(error):
            time.sleep(2 * heartbeat_seconds)
        os._exit(1)


PEERS = re.compile(
    "(ABORTED|CANCELLED|DATA_LOSS|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE|UNKNOWN)"
    ": "
)
"""Codes under which JAX's runtime tells of a lost peer: as JaxRuntimeError, or as ValueError where
a collective fails as it is started."""


def _may_be_a_peers(error: BaseException | None) -> bool:
    """Whether the error, or one that it came of, may be the death of another process."""
    while error is not None:
        if isinstance(error, RuntimeError | ValueError) and PEERS.match(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
