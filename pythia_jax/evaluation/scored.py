"""One checkpoint scored: what was asked, the file it is in, and whether that is there before."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pythia_jax import suite
from pythia_jax.bridge.computed_on import computed_on
from pythia_jax.evaluation import names, results, tasks
from pythia_jax.evaluation.questions import Questions
from pythia_jax.files import locked
from pythia_jax.model import parameters
from pythia_jax.training.pod import is_first

AWAY = "choose another folder for the results, or move the file away"


class OtherWeightsError(ValueError):
    """A file holds scores of other weights than those that are to be scored."""


@dataclass(frozen=True)
class Request:
    """What is asked of each checkpoint. tasks: as they are typed, `pythia` too."""

    tasks: tuple[str, ...]
    num_fewshot: int = 0
    limit: int | None = None
    include_path: str | None = None

    @property
    def names(self) -> list[str]:
        """The tasks and groups that are meant, by the harness's names."""
        return tasks.expand(self.tasks)

    def check(self) -> None:
        """Raise what can be said before anything is read: ValueError for names that the harness
        does not know and numbers that cannot be, RuntimeError where lm_eval is not installed."""
        if not self.names:
            raise ValueError("no task is named; name one, or the preset pythia")
        if self.num_fewshot < 0:
            raise ValueError(f"num_fewshot: {self.num_fewshot} must be at least 0")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: {self.limit} must be at least 1")
        tasks.check(self.names, self.include_path)

    def questions(self) -> Questions:
        """The tasks, read for all checkpoints. Raises as `check` and `Questions` do."""
        self.check()
        return Questions(
            self.names,
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            include_path=self.include_path,
        )


@dataclass(frozen=True)
class Checkpoint:
    """Whose scores they are.

    name: of the model. step: None where it is not known. source: where the weights come from, for
    people. arguments: for the harness, its `--model_args`. weights: their hash; None where it is
    not known before they are read. tokens_per_step: where it is known.
    """

    name: str
    step: int | None
    source: str
    arguments: str
    weights: str | None = None
    tokens_per_step: int | None = None

    def path(self, folder: Path, request: Request) -> Path:
        """The file in `folder` that its scores are in."""
        return results.path_of(
            folder, model_name=self.name, step=self.step, num_fewshot=request.num_fewshot
        )


def ask(scorer: Any, questions: Questions) -> dict[str, Any]:
    """The harness's results for the weights of a `scoring.Scorer`."""
    from pythia_jax.evaluation import harness

    return harness.ask(scorer, questions)


def score_into(
    folder: Path,
    request: Request,
    questions: Questions,
    scorer: Any,
    of: Checkpoint,
    *,
    write: bool = True,
) -> dict[str, Any]:
    """Score weights and write the file of it, whole or not at all; the harness's results.

    Of several processes all call it, and the first writes. scorer: a `scoring.Scorer`. write: False
    leaves the file out.
    """
    began = time.perf_counter()
    found = ask(scorer, questions)
    provenance = {
        **computed_on(scorer.params, source=of.source, weights=of.weights),
        "parameters": parameters.count(scorer.config, embedding=False),
        "tasks": sorted(request.names),
        "num_fewshot": request.num_fewshot,
        "limit": request.limit,
        "task_hashes": questions.hashes,
        "seconds": round(time.perf_counter() - began, 3),
    }
    if of.tokens_per_step is not None:
        provenance["tokens_per_step"] = of.tokens_per_step
    repo = of.source.partition(" ")[0]
    if of.step is not None and repo.startswith("EleutherAI/"):
        fault = suite.bad_revision(repo, of.step)
        if fault is not None:
            provenance["known_fault"] = fault
    if write and is_first():
        results.write(
            folder,
            {**found, "config": {**found["config"], "model_args": of.arguments}},
            model_name=of.name,
            step=of.step,
            num_fewshot=request.num_fewshot,
            provenance=provenance,
        )
    return found


def scored_before(
    folder: Path, request: Request, questions: Questions, of: Checkpoint
) -> dict[str, Any] | None:
    """What the file of a checkpoint holds, if it is there and answers the request; None if not.

    Where the hash of the weights is not known, the file must be of the same source.

    Raises OtherWeightsError for a file of other weights, and ValueError for one that was asked
    otherwise or was not written here; both say what differs.
    """
    path = of.path(folder, request)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        kept = ("source", "weights", "tasks", "limit", "task_hashes")
        before = {key: content[results.PROVENANCE][key] for key in kept}
        hashes = {task: (x["settings"], x["rows"]) for task, x in before["task_hashes"].items()}
        versions = dict(content["versions"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: is there, and was not written by a sweep; {AWAY}") from None
    if of.weights is not None and before["weights"] != of.weights:
        raise OtherWeightsError(
            f"{path}: holds scores of other weights, of {before['source']}; {AWAY}"
        )
    if of.weights is None and before["source"] != of.source:
        raise OtherWeightsError(
            f"{path}: holds scores of {before['source']}, not of {of.source}; {AWAY}"
        )
    missing = {*request.names} - {*before["tasks"]} | questions.hashes.keys() - hashes.keys()
    if missing:
        raise ValueError(f"{path}: holds no scores on {', '.join(sorted(missing))}; {AWAY}")
    if before["limit"] != request.limit:
        was, now = (_limit(limit) for limit in (before["limit"], request.limit))
        raise ValueError(f"{path}: holds scores on {was} questions of each task, not {now}; {AWAY}")
    changed = _changed(questions, versions, hashes)
    if changed:
        raise ValueError(f"{path}: holds scores on other questions: {'; '.join(changed)}; {AWAY}")
    return content


def _changed(
    questions: Questions, versions: dict[str, Any], hashes: dict[str, tuple[str, str]]
) -> list[str]:
    """In words, which tasks are not what they were as a file was written."""
    changed = []
    for task, now in questions.hashes.items():
        was, version = versions.get(names.task_name(task)), questions.versions[task]
        settings, rows = hashes[task]
        if was != version:
            changed.append(f"{task} was of version {was}, is of {version}")
        elif settings != now["settings"]:
            changed.append(f"the task file of {task} says something else now")
        elif rows != now["rows"]:
            changed.append(f"the rows of {task} are others now")
    return changed


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """While scores are written into a folder of one model, nobody else does.

    Raises BlockingIOError, which says so, where another process is at it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder / ".sweep.lock", seconds=0))
        except BlockingIOError:
            raise BlockingIOError(
                f"{folder}: another sweep, or a run that scores as it trains, is writing there; "
                "wait for it to end"
            ) from None
        yield


def _limit(limit: int | None) -> str:
    return "all" if limit is None else f"the first {limit}"
