"""Programs that stand in for gcloud, kubectl and Slurm's: they record their calls and play along.

Each is a small Python file on PATH; what they share lies in one folder, the world.
"""

import json
import os
import stat
import sys
import time
from pathlib import Path

HEAD = """#!{python}
import json, os, shutil, signal, subprocess, sys
from pathlib import Path
WORLD = Path({world!r})
NAME = Path(sys.argv[0]).name
with open(WORLD / "calls.jsonl", "a") as file:
    file.write(json.dumps([NAME, *sys.argv[1:]]) + "\\n")
FLAGS = dict(a[2:].partition("=")[::2] for a in sys.argv[1:] if a.startswith("--"))
WORDS = [a for a in sys.argv[1:] if not a.startswith("-")]
def put(name, text): (WORLD / name).write_text(text)
def read(name, other=""): return (WORLD / name).read_text() if (WORLD / name).exists() else other
"""

# A slice of two workers, whose homes are folders. `plan` in the world: how each training ends.
GCLOUD = """
verb, name = WORDS[3], WORDS[4]
homes = [WORLD / f"home-{i}" for i in range(2)]
def machines_gone():
    for home in homes:
        pid = home / "pythia_jax/train.pid"
        if pid.exists():
            try: os.killpg(int(pid.read_text()), signal.SIGKILL)
            except ProcessLookupError: pass
        shutil.rmtree(home, ignore_errors=True)
states = json.loads(read("states", "[]"))
if verb == "create":
    assert not states, "ALREADY_EXISTS"
    put("states", json.dumps(["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]))
elif not states:
    sys.exit(f"ERROR: (gcloud) NOT_FOUND: Resource '{name}' was not found")
elif verb == "describe":
    if (WORLD / "preempt").exists():
        (WORLD / "preempt").unlink()
        machines_gone()
        states = ["SUSPENDING", "SUSPENDED"]
    print(states[0])
    put("states", json.dumps(states[1:] or states))
    if states == ["ACTIVE"]:
        for home in homes: home.mkdir(exist_ok=True)
elif verb == "delete":
    machines_gone()
    (WORLD / "states").unlink()
elif states != ["ACTIVE"]:
    sys.exit(f"ERROR: {name} is {states[0]}")
elif verb == "scp":
    if read("refuse"):
        put("refuse", read("refuse")[1:])
        sys.exit("ERROR: connection refused")
    for home in homes: shutil.copy(WORDS[4], home)
elif verb == "ssh":
    status = 0
    for i, home in enumerate(homes):
        path = f"{WORLD}/worker-bin:{os.environ['PATH']}"
        env = {**os.environ, "HOME": str(home), "HOSTNAME": f"{name}-w-{i}", "PATH": path}
        out = None
        if "output-directory" in FLAGS:
            out = open(Path(FLAGS["output-directory"]) / f"{i}.log", "w")
        command = ["bash", "-c", FLAGS["command"]]
        status = subprocess.run(command, cwd=home, env=env, stdout=out).returncode or status
    sys.exit(status)
"""

# uv on a worker: its `pip install` makes a Python that only knows how to play training.
UV = """
if sys.argv[1] == "pip":
    extra = sys.argv[-1]
    assert extra == "./source[tpu,bucket]" and Path("source/pyproject.toml").exists(), extra
    assert "jax==" in Path(sys.argv[sys.argv.index("--constraint") + 1]).read_text()
    python = Path(".venv/bin/python")
    python.parent.mkdir(parents=True)
    shutil.copy(WORLD / "worker-bin/train", python)
"""

# Training: ten steps further in the bucket, then the end that the plan has for this start.
TRAIN = """
import time
if "pythia_jax" not in sys.argv:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
me = int(os.environ.get("SLURM_PROCID") or os.environ["HOSTNAME"].rpartition("-")[2])
starts = WORLD / f"starts-{me}"
attempt = len(starts.read_text().split()) if starts.exists() else 0
end = read("plan").split()[attempt]
step = 10 * attempt
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
with open(starts, "a") as file: file.write(f"{step}\\n")
while min(len(read(f"starts-{i}").split()) for i in range(2)) <= attempt:
    time.sleep(0.01)  # until both are there, as in jax.distributed
print(f"process {me} from step {step}", flush=True)
if end == "preempted":
    if me == 0: (WORLD / "preempt").touch()
    time.sleep(600)
if end == "hangs":
    time.sleep(600 if me else 0)
    sys.exit(75)
if end == "until-told":
    while not told: time.sleep(0.01)
    end = "75"
if end == "abort": os.abort()
if end == "fails":
    if me: time.sleep(600)
    print("RuntimeError: no such file: data.bin")
    end = "1"
sys.exit(int(end))
"""

# `jobset` and `pods` in the world: lists of answers, the last of which stays.
KUBECTL = """
if "get" in WORDS:
    kind = "jobset" if "jobset" in WORDS else "pods"
    answers = json.loads(read(kind))
    print(json.dumps(answers[0]))
    put(kind, json.dumps(answers[1:] or answers))
elif "logs" in WORDS:
    print("Traceback\\nRuntimeError: no such file: data.bin")
elif "apply" in WORDS:
    put("applied.yaml", Path(FLAGS["filename"]).read_text())
"""

# Slurm: sbatch runs the job here and now, with two tasks, and again as often as it is requeued.
SLURM = """
if NAME == "sbatch":
    count = 0
    script = Path(WORDS[0]).read_text()
    (log,) = [x.partition("=")[2] for x in script.splitlines() if "--output" in x]
    log = Path(log.replace("%j", "77"))
    log.parent.mkdir(parents=True, exist_ok=True)
    while True:
        env = {**os.environ, "SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": str(count)}
        env["SLURM_SUBMIT_DIR"] = str(WORLD)
        with open(log, "a") as out:
            ended = subprocess.run(["bash", WORDS[0]], env=env, stdout=out, stderr=out).returncode
        if not (WORLD / "requeue").exists(): break
        (WORLD / "requeue").unlink()
        count += 1
    put("state", "COMPLETED" if ended == 0 else "FAILED")
    print("Submitted batch job 77")
elif NAME == "srun":
    at = sys.argv.index("bash")
    tasks = [subprocess.Popen(sys.argv[at:], env={**os.environ, "SLURM_PROCID": str(i)},
                              start_new_session=True) for i in range(2)]
    first = tasks[0].wait()
    if first == 75:
        tasks[1].wait()
    elif first != 0:  # --kill-on-bad-exit
        assert FLAGS["kill-on-bad-exit"] == "1"
        os.killpg(tasks[1].pid, signal.SIGKILL)
    sys.exit(max(t.wait() % 256 if t.wait() >= 0 else 128 - t.wait() for t in tasks))
elif NAME == "scontrol":
    assert WORDS == ["requeue", "77"]
    (WORLD / "requeue").touch()
elif NAME == "sacct":
    print(read("state"))
"""


class World:
    """The folder that the stand-ins share."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder / "world", folder / "world" / "bin"
        self.bin.mkdir(parents=True)
        (self.folder / "worker-bin").mkdir()
        for name, body in {"gcloud": GCLOUD, "kubectl": KUBECTL}.items():
            self._add(f"bin/{name}", body)
        for name in ("sbatch", "srun", "scontrol", "sacct", "scancel"):
            self._add(f"bin/{name}", SLURM)
        self._add("worker-bin/uv", UV)
        # A worker's patience with what it ends is short here.
        quick = self.folder / "worker-bin/sleep"
        quick.write_text("#!/bin/sh\n")
        quick.chmod(0o755)
        self._add("worker-bin/train", TRAIN.replace("{python!r}", repr(sys.executable)))

    def _add(self, name: str, body: str) -> None:
        path = self.folder / name
        head = HEAD.replace("{python}", sys.executable).replace("{world!r}", repr(str(self.folder)))
        path.write_text(head + body)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def set(self, name: str, value: object) -> None:
        text = value if isinstance(value, str) else json.dumps(value)
        (self.folder / name).write_text(text)

    def read(self, name: str) -> str:
        return (self.folder / name).read_text()

    def wait_for(self, *names: str) -> None:
        """Until the files are there, and are not empty."""
        end = time.monotonic() + 30
        while not all((self.folder / n).exists() and self.read(n) for n in names):
            assert time.monotonic() < end, names
            time.sleep(0.01)

    def starts(self) -> list[list[int]]:
        """Of each process, the step that each of its starts went on from."""
        return [[int(s) for s in self.read(f"starts-{i}").split()] for i in range(2)]

    def calls(self, program: str | None = None) -> list[list[str]]:
        """The command lines there were, the program's name first."""
        if not (self.folder / "calls.jsonl").exists():
            return []
        calls = [json.loads(line) for line in self.read("calls.jsonl").splitlines()]
        return [call for call in calls if program in (None, call[0])]

    def verbs(self, *unwanted: str) -> list[str]:
        """What gcloud was asked to do with the queued resource."""
        verbs = [call[4] for call in self.calls("gcloud")]
        return [verb for verb in verbs if verb not in unwanted]

    def alive(self) -> list[int]:
        """Processes that run in a worker's home."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    where = os.readlink(entry / "cwd")
                    zombie = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
                except OSError:
                    continue
                if where.startswith(f"{self.folder}/home-") and not zombie:
                    found.append(int(entry.name))
        return found
