"""One of several processes that score a run's checkpoints; `test_scoring_processes.py` starts them.

    python scoring_process.py RUN TASKS OUT

RUN: a run folder. TASKS: a folder of task files, all of which are asked. OUT: a folder; each
process has one of its own below it, as on hosts that share no disk. Prints one JSON object, after
the word `found`.
"""

import json
import sys
from pathlib import Path

import jax

from pythia_jax.evaluation.scored import Request
from pythia_jax.evaluation.single import evaluate_one
from pythia_jax.evaluation.sweep import Swept, sweep
from pythia_jax.training.pod import join


def main() -> None:
    run, tasks, out = sys.argv[1:]
    join(heartbeat_seconds=10)
    names = sorted(path.stem for path in Path(tasks).glob("*.yaml"))
    own = Path(out) / str(jax.process_index())

    def swept(revisions: str) -> Swept:
        how = {"tasks": names, "include_path": tasks, "show_progress": False}
        return sweep(run, out=own, revisions=revisions, **how)

    first, then = swept("0"), swept("steps")
    one, _ = evaluate_one(run, Request(tuple(names), include_path=tasks), step=0)
    report = {
        "written": [[*first.written], [*then.written]],
        "skipped": [[*first.skipped], [*then.skipped]],
        "results": one["results"],
    }
    print("found", json.dumps(report))


if __name__ == "__main__":
    main()
