"""How a process ended, in words, and whether to start it again: the one place that decides this."""

import signal
import sys
from collections.abc import Iterable, Sequence

DONE = 0
SAVED = 75
"""EX_TEMPFAIL of sysexits.h: `pythia-jax train` was told to leave, and has saved."""
INTERRUPTED = 128 + signal.SIGINT
"""Somebody's second Ctrl-C, in a pod also their first while it is starting."""
LOST = (signal.SIGABRT, signal.SIGKILL, signal.SIGTERM)
"""Signals that end a process through no fault of its own: JAX aborts one whose peer died; machines
that are taken away kill, and so does the system when memory runs out."""
WORTH_A_RESTART = (SAVED, *(128 + number for number in LOST))
"""As exit statuses: 75, 134, 137, 143."""
TAIL = 30
"""Lines shown of a process that failed."""


def as_exit_status(status: int) -> int:
    """What a shell would say: 128 + N for a death by signal N, which Python has as -N."""
    return 128 - status if status < 0 else status


def worth_a_restart(status: int) -> bool:
    """Whether a process that ended so is to be started again; takes -N and 128 + N for signal N."""
    return as_exit_status(status) in WORTH_A_RESTART


def of_all(statuses: Iterable[int]) -> int:
    """What the ends of a pod's processes amount to, where nobody knows which of them was the first.

    An error that no restart would mend goes before one that it would, and that before 0.
    """
    ended = [as_exit_status(status) for status in statuses]
    errors = [status for status in ended if status != DONE and not worth_a_restart(status)]
    return next(iter(errors or filter(None, ended)), DONE)


def in_words(status: int) -> str:
    """`exit status 1`, `SIGABRT`, …"""
    status = as_exit_status(status)
    if status == DONE:
        return "done"
    if status == SAVED:
        return f"saved, to be started again (exit status {SAVED})"
    try:
        return signal.Signals(status - 128).name
    except ValueError:
        return f"exit status {status}"


def tail(lines: Iterable[str], count: int = TAIL) -> str:
    """The last lines, indented to stand out from a launcher's own."""
    return "\n".join(f"    {line}" for line in list(lines)[-count:])


def main(arguments: Sequence[str]) -> None:
    """For shell scripts: print what the statuses amount to, and `again` or `end`."""
    status = of_all(map(int, arguments))
    print(status, "again" if worth_a_restart(status) else "end")


if __name__ == "__main__":
    main(sys.argv[1:])
