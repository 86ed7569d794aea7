"""Scores on tasks while a run trains, of the weights in training: nothing is copied to disk."""

import logging
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pythia_jax.bridge.model import Model
from pythia_jax.bridge.revisions import weights_hash
from pythia_jax.configs import ConfigError, RunConfig
from pythia_jax.evaluation import results
from pythia_jax.evaluation.names import is_stderr
from pythia_jax.evaluation.questions import Questions
from pythia_jax.evaluation.scored import (
    Checkpoint,
    OtherWeightsError,
    Request,
    alone_in,
    score_into,
    scored_before,
)
from pythia_jax.model.parameters import Params
from pythia_jax.training.agreement import all_say
from pythia_jax.training.bucket import path_of
from pythia_jax.training.pod import is_first
from pythia_jax.training.provenance import read_tokenizer
from pythia_jax.training.trainer import Evaluate

log = logging.getLogger(__name__)

FOLDER = "evals"
"""Where the results lie, in the run folder; `sweep RUN --out RUN/evals` takes them for its own."""


def evaluator(config: RunConfig) -> Evaluate | None:
    """What scores a run's weights as `evaluation` asks; None if it names no tasks.

    Give it to `train(config, evaluate=...)`. Scores that lie in `evals/` for the very same weights,
    as they do where a run goes on from the checkpoint that they are of, are taken from there; a
    file of these weights that was asked otherwise stays, which is told once. Of several processes
    all take part, each with the harness and its data sets, and one writes.

    Raises ConfigError for tasks that the harness does not know, and without a tokenizer;
    RuntimeError where lm_eval is not installed; what the harness raises for rows that it cannot
    get.
    """
    asked = config.evaluation
    if not asked.tasks:
        return None
    request = Request(asked.tasks, asked.num_fewshot, asked.limit, asked.include_path)
    try:
        request.check()
    except ValueError as error:
        raise ConfigError(f"evaluation.tasks: {error}") from None
    place = path_of(config.checkpoint.directory)
    tokenizer = read_tokenizer(config, place if isinstance(place, Path) else Path())
    if tokenizer is None:
        raise ConfigError("evaluation.tasks: tasks are text, and the run has no tokenizer; name it")
    model = config.model
    assert model is not None
    results.path_of(FOLDER, model_name=config.name, step=0)  # a name that a file can have
    tokens_per_step = config.training.batch_size * config.data.sequence_length
    questions = request.questions()
    scorers: list[Any] = []
    told: list[str] = []

    def evaluate(params: Params, step: int, folder: Path) -> Mapping[str, float]:
        from pythia_jax.evaluation.scoring import Scorer

        where = place.resolve() if isinstance(place, Path) else place
        of = Checkpoint(
            name=config.name,
            step=step,
            source=f"{where} step {step}",
            arguments=f"pretrained={where},step={step}",
            weights=weights_hash(params),
            tokens_per_step=tokens_per_step,
        )
        with ExitStack() as held:
            found, kept = _there(held, folder / FOLDER, request, questions, of)
            # The folder may be that of one process alone, and all must go the same way.
            if all_say(found is not None) and found is not None:
                return scores(found)
            if kept and not told:
                told.append(kept)
                log.warning("scores go to metrics.jsonl alone, told once: %s", kept)
            if scorers:
                scorers.append(scorers.pop().replace(params))
            else:
                files = {"tokenizer.json": tokenizer}
                scorers.append(Scorer(Model(params, model, files)))
            into = (folder / FOLDER, request, questions, scorers[0], of)
            return scores(score_into(*into, write=not kept))

    return evaluate


def _there(
    held: ExitStack, folder: Path, request: Request, questions: Questions, of: Checkpoint
) -> tuple[dict[str, Any] | None, str]:
    """What the file of a checkpoint holds, if it answers; and why none may be written, if so.

    The process that writes has the folder for itself then, until `held` is closed.
    """
    kept = ""
    if is_first():
        try:
            held.enter_context(alone_in(of.path(folder, request).parent))
        except OSError as error:
            kept = str(error)
    try:
        return scored_before(folder, request, questions, of), kept
    except OtherWeightsError:
        return None, kept  # of an earlier attempt, that came to others
    except ValueError as error:
        return None, kept or str(error)


def scores(found: Mapping[str, Any]) -> dict[str, float]:
    """The scores of a results dict by their names in metrics.jsonl, `evals/sciq/acc`.

    Without standard errors, and without what is no number: a new model's perplexity may be none.
    """
    return {
        f"{FOLDER}/{task}/{name}": value
        for task, values in results.numbers(found["results"]).items()
        for name, value in values.items()
        if not is_stderr(name) and math.isfinite(value)
    }
