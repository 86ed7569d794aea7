"""Several real processes score as one does; the first of them alone writes."""

import json
import os
import sys
from pathlib import Path

import pytest
from small_models import write_tasks
from swept import write_run

from launch.local_pod import run_pod
from pythia_jax.evaluation import results
from pythia_jax.evaluation.scored import Request
from pythia_jax.evaluation.single import evaluate_one

pytest.importorskip("lm_eval")


@pytest.mark.slow
def test_processes_give_the_results_of_one_and_the_first_writes_them(tmp_path: Path) -> None:
    run, tasks, out = write_run(tmp_path, (0, 1)), tmp_path / "tasks", tmp_path / "out"
    names = write_tasks(tasks)
    script = Path(__file__).with_name("scoring_process.py")
    command = [sys.executable, str(script), str(run), str(tasks), str(out)]
    env = {**os.environ, "PYTHONPATH": str(script.parents[2])}
    pod = run_pod(command, 2, devices_per_process=2, env=env, say=lambda _: None)
    assert pod.statuses == (0, 0), pod.output
    first, second = (
        json.loads(line.removeprefix("found "))
        for lines in pod.output
        for line in lines
        if line.startswith("found ")
    )
    assert first == second
    assert first["written"] == [[0], [1]] and first["skipped"] == [[], [0]]
    # The second has no files, and goes by what the first finds.
    assert not (out / "1").exists()
    written = {result.step: result for result in results.read([out / "0"])}
    assert set(written) == {0, 1}

    alone, _ = evaluate_one(str(run), Request(tuple(names), include_path=str(tasks)), step=0)
    for task in names:
        for metric, value in alone["results"][task].items():
            if isinstance(value, float):
                assert first["results"][task][metric] == pytest.approx(value, rel=1e-4), task
        metric, value = next(iter(written[0].metrics[task].items()))
        assert value == pytest.approx(alone["results"][task][f"{metric},none"], rel=1e-4)
