"""Several real processes: they vote alike, and the end of one is the end of all."""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from launch.local_pod import PodResult, run_pod
from pythia_jax.training import pod
from pythia_jax.training.pod import Vote, join

START = """
import os, signal, sys, time
import jax, numpy as np
from pythia_jax.training.pod import Vote, failing_at_once, join
from pythia_jax.training.preemption import Preempted, notices
join({heartbeat})
me = jax.process_index()
vote = Vote(jax.make_mesh((jax.device_count(),), ("data",))).vote
"""


def pod_of(tmp_path: Path, code: str, *, heartbeat: int = 10, devices: int = 1) -> PodResult:
    """Run `code` in two processes, each joined to the other and with `me` and `vote` at hand."""
    script = tmp_path / "script.py"
    script.write_text(START.format(heartbeat=heartbeat) + code)
    command = [sys.executable, "-u", str(script)]
    return run_pod(command, 2, devices_per_process=devices, say=lambda _: None)


def said(result: PodResult, word: str) -> list[list[str]]:
    """Of each process, its lines that begin with `word`, without it."""
    return [
        [line.removeprefix(word).strip() for line in lines if line.startswith(word)]
        for lines in result.output
    ]


def test_with_one_process_a_vote_is_what_it_was_given() -> None:
    vote = Vote(Mesh(np.array(jax.devices()[:1]), ("data",))).vote
    assert vote(True, False) == (True, False)
    assert vote(False, False) == (False, False)
    assert vote() == ()


@pytest.mark.parametrize("devices", [1, 2])
def test_two_processes_get_the_same_answers_one_call_late(tmp_path: Path, devices: int) -> None:
    code = """
given = [[(0, 0), (1, 0), (0, 0), (1, 0), (0, 0), (0, 0)],
         [(0, 0), (0, 1), (0, 0), (1, 1), (0, 1), (0, 0)]][me]
for flags in given:
    print("got", *(int(x) for x in vote(*map(bool, flags))))
"""
    result = pod_of(tmp_path, code, devices=devices)
    assert result.statuses == (0, 0), result.output
    # The last but one call hands in what that very call tells: it is not told again.
    expected = ["0 0", "0 0", "1 1", "0 0", "1 1", "0 0"]
    assert said(result, "got") == [expected, expected]


def test_a_process_told_to_leave_takes_the_other_along(tmp_path: Path) -> None:
    code = """
with failing_at_once(10), notices() as received:
    for step in range(2000):
        if vote(received.received)[0]:
            print("left at", step)
            sys.exit(75)
        if me == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
"""
    result = pod_of(tmp_path, code)
    assert result.statuses == (75, 75), result.output
    # Heard after the vote of step 3, handed in at step 4, known to both at step 5.
    assert said(result, "left at") == [["5"], ["5"]]


LOOP = """
with failing_at_once({heartbeat}):
    for step in range(2000):
        vote(False)
        if me == {who} and step == 5:
            print("last words", flush=True)
            {what}
        time.sleep(0.02)
"""


def test_a_killed_process_ends_the_pod_within_seconds(tmp_path: Path) -> None:
    lines: list[str] = []
    script = tmp_path / "script.py"
    end = LOOP.format(heartbeat=10, who=1, what="os.kill(os.getpid(), signal.SIGKILL)")
    script.write_text(START.format(heartbeat=10) + end)
    started = time.monotonic()
    result = run_pod([sys.executable, "-u", str(script)], 2, say=lines.append)
    assert (result.first, result.status) == (1, -9)
    assert result.statuses[0] != 0
    assert time.monotonic() - started < 60
    told = "\n".join(lines)
    assert "process 1 ended first, by SIGKILL:" in told
    assert "last words" in told.partition("ended first")[2]


def test_without_a_launcher_jax_aborts_what_a_killed_process_left(tmp_path: Path) -> None:
    """What a host of a slice sees of another's end: no launcher of ours runs across them."""
    script = tmp_path / "script.py"
    end = LOOP.format(heartbeat=3, who=1, what="os.kill(os.getpid(), signal.SIGKILL)")
    script.write_text(START.format(heartbeat=3) + end)
    wrapper = tmp_path / "alone.py"  # hides the first end from the launcher until both have ended
    wrapper.write_text(
        "import subprocess, sys, time\n"
        f"ended = subprocess.run([sys.executable, '-u', {str(script)!r}]).returncode\n"
        "print('ended', ended, round(time.time()), flush=True)\n"
    )
    result = run_pod([sys.executable, str(wrapper)], 2, say=lambda _: None)
    (((survivor, then),), ((killed, first),)) = [
        [line.split() for line in lines] for lines in said(result, "ended")
    ]
    assert (survivor, killed) == ("-6", "-9")
    assert int(then) - int(first) <= 3 + 7, "the heartbeat's 3 seconds and a few"


@pytest.mark.parametrize("who", [0, 1])
def test_an_error_ends_the_pod_with_its_message_and_status_1(tmp_path: Path, who: int) -> None:
    started = time.monotonic()
    end = LOOP.format(heartbeat=100, who=who, what="raise ValueError('no such thing')")
    result = pod_of(tmp_path, end, heartbeat=100)
    assert (result.first, result.status) == (who, 1)
    assert result.output[who][-1] == "ValueError: no such thing"
    assert time.monotonic() - started < 60, "nobody waits for the heartbeat of 100 seconds"


def test_an_end_that_all_come_to_passes_through(tmp_path: Path) -> None:
    code = """
try:
    with failing_at_once(10):
        raise Preempted("told to leave")
except Preempted:
    sys.exit(75)
"""
    assert pod_of(tmp_path, code).statuses == (75, 75)


def test_errors_that_may_be_a_peers_are_told_from_a_processs_own() -> None:
    gloo = ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
    wrapped = RuntimeError("checkpoint 5 could not be saved")
    wrapped.__cause__ = jax.errors.JaxRuntimeError("UNAVAILABLE: tasks are unhealthy")
    memory = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    assert [pod._may_be_a_peers(error) for error in (gloo, wrapped)] == [True, True]
    assert [pod._may_be_a_peers(error) for error in (memory, ValueError("bad"))] == [False, False]


def test_joining_leaves_sigterm_as_it_was(tmp_path: Path) -> None:
    code = "vote(); print('still', signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)"
    assert said(pod_of(tmp_path, code), "still") == [["True"], ["True"]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"JAX_PROCESS_ID": "1"}, "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES: not set"),
        (("host:1", "2", "2"), "JAX_NUM_PROCESSES=2, JAX_PROCESS_ID=2: must be whole numbers"),
        (("host:1", "two", "0"), "JAX_NUM_PROCESSES=two"),
        (("host", "2", "0"), "JAX_COORDINATOR_ADDRESS=host: must be host:port"),
    ],
)
def test_a_half_told_pod_is_refused(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str] | tuple[str, ...], message: str
) -> None:
    if isinstance(settings, tuple):
        settings = dict(zip(pod.ENVIRONMENT, settings, strict=True))
    for name in pod.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        join(10)


def test_a_process_without_a_pod_is_refused() -> None:
    code = "from pythia_jax.training.pod import join; join(10)"
    bare = {"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=bare, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ValueError: --pod: JAX finds no pod around this process" in done.stderr
