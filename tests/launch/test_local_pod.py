"""A pod of processes on this machine: told their places, ended together, started again."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch import local_pod
from launch.local_pod import Pod, PodResult, run_pod
from launch.outcomes import as_exit_status, in_words, worth_a_restart

SCRIPT = Path(local_pod.__file__)


def run(code: str, processes: int = 2, **settings) -> tuple[PodResult, list[str]]:
    """A pod of plain Python; `me` is the process's number."""
    lines: list[str] = []
    header = "import os, signal, sys, time; me = int(os.environ['JAX_PROCESS_ID'])\n"
    command = [sys.executable, "-c", header + code]
    return run_pod(command, processes, say=lines.append, **settings), lines


@pytest.mark.parametrize(
    ("status", "worth", "words"),
    [
        (0, False, "done"),
        (1, False, "exit status 1"),
        (2, False, "exit status 2"),
        (75, True, "saved, to be started again (exit status 75)"),
        (134, True, "SIGABRT"),
        (-6, True, "SIGABRT"),
        (137, True, "SIGKILL"),
        (-15, True, "SIGTERM"),
        (139, False, "SIGSEGV"),
        (130, False, "SIGINT"),
        (250, False, "exit status 250"),
    ],
)
def test_what_is_worth_a_restart(status: int, worth: bool, words: str) -> None:
    assert worth_a_restart(status) is worth
    assert in_words(status) == words
    assert 0 <= as_exit_status(status) < 256


def test_processes_are_told_their_places_and_lines_carry_the_number() -> None:
    code = "print(*(os.environ[f'JAX_{n}'] for n in sys.argv[1:]))"
    names = ["PROCESS_ID", "NUM_PROCESSES", "PLATFORMS", "NUM_CPU_DEVICES", "COORDINATOR_ADDRESS"]
    lines: list[str] = []
    command = [sys.executable, "-c", "import os, sys\n" + code, *names]
    result = run_pod(command, 3, devices_per_process=2, say=lines.append)
    assert (result.status, result.first, result.statuses) == (0, None, (0, 0, 0))
    addresses = {line.rpartition(" ")[2] for line in lines}
    assert len(addresses) == 1 and addresses.pop().startswith("127.0.0.1:")
    assert sorted(line.rpartition(" ")[0] for line in lines) == [
        "[0] 0 3 cpu 2",
        "[1] 1 3 cpu 2",
        "[2] 2 3 cpu 2",
    ]


def test_the_first_failure_ends_all_and_shows_its_last_lines(tmp_path: Path) -> None:
    code = f"""
stuck = {str(tmp_path)!r}
if me == 1:
    while len(os.listdir(stuck)) < 2: time.sleep(0.01)
    print(*range(100), sep="\\n")
    sys.exit("no such file")
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as in a collective
open(os.path.join(stuck, str(me)), "w").close()
time.sleep(600)
"""
    started = time.monotonic()
    result, lines = run(code, 3)
    assert (result.status, result.first) == (1, 1)
    assert result.statuses == (-9, 1, -9)
    assert time.monotonic() - started < local_pod.GRACE_SECONDS + 10
    told = "\n".join(lines)
    tail = told.partition("process 1 ended first, by exit status 1:")[2].split()
    assert tail == [*map(str, range(71, 100)), "no", "such", "file"]


def test_children_of_a_process_end_with_it() -> None:
    code = """
import subprocess
if me == 0:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("child", child.pid, flush=True)
    time.sleep(600)
time.sleep(1)
sys.exit(1)
"""
    result, lines = run(code)
    (child,) = [int(line.split()[-1]) for line in lines if line.startswith("[0] child")]
    assert result.first == 1
    end = time.monotonic() + 10
    while running(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not running(child)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_one_that_saved_leaves_the_others_time_to_save_too() -> None:
    result, _ = run("time.sleep(1.5 * me); sys.exit(75)", 3)
    assert result.statuses == (75, 75, 75)
    assert result.status == 75


@pytest.mark.parametrize("end", ["sys.exit(75)", "os.abort()", "os.kill(os.getpid(), 9)"])
def test_what_is_worth_it_is_started_again_until_it_is_done(tmp_path: Path, end: str) -> None:
    code = f"""
count = os.path.join({str(tmp_path)!r}, str(me))
open(count, "a").write("x")
if me == 0 and os.path.getsize(count) < 3:
    {end}
"""
    result, lines = run(code, restarts=5)
    assert (result.status, result.starts) == (0, 3)
    assert sum("starting again" in line for line in lines) == 2


def test_restarts_come_to_an_end_and_errors_are_not_restarted() -> None:
    result, _ = run("sys.exit(75)", restarts=2)
    assert (result.status, result.starts) == (75, 3)
    result, _ = run("sys.exit(1)", restarts=2)
    assert (result.status, result.starts) == (1, 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_once_and_nothing_is_started_again(number: int) -> None:
    code = (
        "import signal, sys, time\n"
        "seen = []\n"
        f"signal.signal({int(number)}, lambda *_: seen.append(1))\n"
        "print('ready', flush=True)\n"
        "while not seen: time.sleep(0.01)\n"
        "time.sleep(0.3)\n"
        "print('seen', len(seen))\n"
        "sys.exit(75)\n"
    )
    command = [
        sys.executable,
        str(SCRIPT),
        "2",
        "--restarts",
        "3",
        "--",
        sys.executable,
        "-c",
        code,
    ]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert launcher.stdout is not None
    assert sorted(launcher.stdout.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
    os.killpg(launcher.pid, number)  # as a terminal does
    told = launcher.stdout.read()
    launcher.stdout.close()
    assert launcher.wait(30) == 75
    assert told.count("seen 1") == 2 and "starting again" not in told


def test_an_interrupt_is_not_told_as_an_error_of_a_process() -> None:
    result, lines = run("print('last words'); time.sleep(0.5); sys.exit(130)")
    assert as_exit_status(result.status) == 130
    assert sorted(lines[:-1]) == ["[0] last words", "[1] last words"]
    assert lines[-1].endswith("of 2: SIGINT")


def test_leaving_a_pod_early_kills_it() -> None:
    with Pod([sys.executable, "-c", "import time; time.sleep(600)"], 2) as pod:
        assert [p.poll() for p in pod.processes] == [None, None]
    assert [p.poll() for p in pod.processes] == [-9, -9]


def test_a_pod_runs_outside_the_main_thread_too() -> None:
    results: list[PodResult] = []
    thread = threading.Thread(target=lambda: results.append(run("print(me)")[0]))
    thread.start()
    thread.join(60)
    assert [r.statuses for r in results] == [(0, 0)]


def test_dry_run_prints_the_training_command_and_runs_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    flags = ["config.yaml", "--training.steps", "20"]
    assert local_pod.main(["2", "--devices-per-process", "4", *flags, "--dry-run"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    train = "-m pythia_jax train config.yaml --training.steps 20 --pod"
    assert first.endswith(f"{train} --distributed.heartbeat-seconds 10")
    assert "JAX_PROCESS_ID=0 JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4" in first
    assert "JAX_PROCESS_ID=1" in second


def test_a_heartbeat_of_ones_own_is_kept() -> None:
    own = ["c.yaml", "--distributed.heartbeat-seconds=30"]
    assert local_pod.training_command(own)[-3:] == [*own, "--pod"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["2"], "give a CONFIG"),
        (["2", "--training.steps", "20"], "give a CONFIG"),
        (["2", "--"], "give a CONFIG"),
        (["0", "config.yaml"], "processes: 0; must be at least 1"),
        (["2", "--devices-per-process", "0", "config.yaml"], "devices_per_process: 0"),
        (["2", "config.yaml", "--", "true"], "what is 'config.yaml'?"),
        (["two", "config.yaml"], "invalid int value"),
    ],
)
def test_bad_arguments_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        local_pod.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
