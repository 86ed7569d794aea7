"""A model scored at many of its checkpoints: the next loads while one is scored.

Each checkpoint's results are written when it is done, in the layout of the published ones, and what
has its file is not scored again: so a sweep that was killed goes on where it stopped.
"""

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pythia_jax.bridge.model import Model
from pythia_jax.bridge.revisions import (
    Loading,
    Source,
    chosen,
    known_tokens_per_step,
    on_all_devices,
    source_of,
    weights_hash,
)
from pythia_jax.evaluation.questions import Questions
from pythia_jax.evaluation.scored import (
    Checkpoint,
    Request,
    alone_in,
    score_into,
    scored_before,
)
from pythia_jax.training.agreement import all_say, from_first
from pythia_jax.training.pod import is_first

log = logging.getLogger(__name__)

PASSED_OVER = (ValueError, OSError)
"""What a checkpoint that cannot be loaded raises."""


@dataclass
class Swept:
    """What came of a sweep, by step.

    folder: where the files are. written: scored now. skipped: scored before.
    failed: why a checkpoint could not be loaded.
    """

    folder: Path
    written: dict[int, Path] = field(default_factory=dict)
    skipped: dict[int, Path] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)


def sweep(
    model: str,
    *,
    out: str | Path,
    tasks: Sequence[str],
    revisions: str | Iterable[int] = "steps",
    num_fewshot: int = 0,
    limit: int | None = None,
    include_path: str | None = None,
    show_progress: bool = True,
) -> Swept:
    """Score checkpoints of a model on tasks of the LM Evaluation Harness.

    model: a name on the hub, a run folder (gs:// too), a folder of GPT-NeoX's `global_stepN`.
    revisions: as for `revisions.chosen`. out: `OUT/{model}/{zero-shot}/{name}_step{N}.json` is
    written. num_fewshot: examples before each question. limit: questions of each task, all if None.
    include_path: a folder of further task files.

    On the mesh around us, or all devices. Two sets of weights are held at most. A checkpoint that
    cannot be loaded is passed over, and told in `failed`. Of several processes all call it, and the
    first writes.

    Raises FileNotFoundError or ValueError, before anything is scored, for a model, steps or tasks
    that are not there, and where a file of `out` holds other scores than are asked for;
    BlockingIOError where another sweep is at work in the same folder, RuntimeError where lm_eval is
    not installed.
    """
    request = Request(tuple(tasks), num_fewshot, limit, include_path)
    source = source_of(model)
    request.check()
    steps = chosen(revisions, source)
    out = Path(out)
    about = {
        step: Checkpoint(
            source.name, step, source.called(step), source.arguments(step), source.weights(step)
        )
        for step in steps
    }
    paths = {step: of.path(out, request) for step, of in about.items()}
    questions = request.questions()
    done = Swept(paths[steps[0]].parent)
    with on_all_devices() as mesh, ExitStack() as held, logging_redirect_tqdm():
        skipped = _begin(held, out, done.folder, request, questions, about)
        done.skipped.update((step, paths[step]) for step in skipped)
        left = {step: of for step, of in about.items() if step not in done.skipped}
        if skipped:
            log.info("%s: %d checkpoints have their results already", source.name, len(skipped))
        with tqdm(left, desc=source.name, unit="checkpoint", disable=not show_progress) as bar:
            _score_all(source, left, (out, request, questions), done, mesh, bar)
    return done


def _begin(
    held: ExitStack,
    out: Path,
    folder: Path,
    request: Request,
    questions: Questions,
    checkpoints: Mapping[int, Checkpoint],
) -> list[int]:
    """Take the folder for ourselves, until `held` is closed; the steps that are scored already.

    The first process looks, and speaks for all of them.
    """
    there: list[int] = []
    error: Exception | None = None
    if is_first():
        try:
            held.enter_context(alone_in(folder))
            there = [
                step
                for step, of in checkpoints.items()
                if scored_before(out, request, questions, of) is not None
            ]
        except (ValueError, OSError) as raised:
            error = raised
    if not all_say(error is None):
        raise error or RuntimeError(f"{folder}: the first process says what is wrong")
    return from_first(there)


def _score_all(
    source: Source,
    left: Mapping[int, Checkpoint],
    asked: tuple[Path, Request, Questions],
    done: Swept,
    mesh: Mesh,
    bar: Any,
) -> None:
    out, request, questions = asked
    scorers, seen, ahead = _Scorers(), dict[str, int](), list(left)

    def load_next() -> Loading | None:
        return Loading(source, ahead.pop(0), mesh) if ahead else None

    coming = load_next()
    try:
        for step, of in left.items():
            assert coming is not None
            bar.set_postfix_str(f"step {step}")
            try:
                model = coming.result()
            except PASSED_OVER as error:
                done.failed[step] = str(error)
                log.warning("step %d: passed over: %s", step, error)
                coming = load_next()
                bar.update()
                continue
            scorer, weights = scorers.of(model), weights_hash(model.params)
            per_step = known_tokens_per_step(model.facts)
            of = dataclasses.replace(of, weights=weights, tokens_per_step=per_step)
            # Before the next is read: it and those being scored are all that is held.
            del model
            coming = load_next()
            _warn_of_same(source, step, seen.setdefault(weights, step))
            score_into(out, request, questions, scorer, of)
            done.written[step] = of.path(out, request)
            bar.update()
    finally:
        if coming is not None:
            coming.abandon()


class _Scorers:
    """The scorer of one checkpoint after the other."""

    def __init__(self) -> None:
        self._scorer: Any = None
        self._of: tuple[Any, ...] = ()

    def of(self, model: Model) -> Any:
        """One with the weights of `model`: the one before, if they are of the same function.

        No other holds weights then.
        """
        from pythia_jax.evaluation.scoring import Scorer

        of = model.config, model.tokenizer_files
        if of == self._of:
            self._scorer = self._scorer.replace(model.params)
        else:
            if self._scorer is not None:
                log.warning("%s: its config or its tokenizer is not as before", model.source)
            self._scorer, self._of = Scorer(model), of
        return self._scorer


def _warn_of_same(source: Source, step: int, before: int) -> None:
    if before == step:
        return
    why = ""
    if (before, step) == (0, 1):
        why = ", as in all of Pythia: the first update has learning rate 0 (pythia#83)"
    log.warning("%s: step%d and step%d hold the same weights%s", source.name, before, step, why)
