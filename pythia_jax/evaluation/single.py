"""One checkpoint, of any kind, scored on tasks."""

from pathlib import Path
from typing import Any

from pythia_jax.bridge.revisions import (
    arguments_of,
    is_run,
    is_told_its_step,
    known_tokens_per_step,
    load_at,
    name_of,
    on_all_devices,
    weights_hash,
)
from pythia_jax.evaluation.scored import Checkpoint, Request, ask, score_into
from pythia_jax.training.agreement import all_say
from pythia_jax.training.pod import is_first


def evaluate_one(
    model: str,
    request: Request,
    *,
    revision: str | None = None,
    step: int | None = None,
    out: Path | None = None,
    batch_size: int | None = None,
) -> tuple[dict[str, Any], Path | None]:
    """Score a checkpoint; the harness's results, and the file they are in if `out` is given.

    model, revision, step: as for `pythia_jax.load`; the step that a Hugging Face folder is of may
    be told. out: `OUT/{name}/{zero-shot}/{name}_step{N}.json` is written, without `_step{N}` where
    that is not known. batch_size: rows of a batch, in place of packing them by tokens.

    On the mesh around us, or all devices. Raises as `pythia_jax.load` and `Request.check` do, and
    FileExistsError for a file that is there already.
    """
    from pythia_jax.evaluation.scoring import Scorer

    if step is not None and out is None and is_told_its_step(model):
        raise ValueError(f"{model}: is one checkpoint, so step {step} chooses none; drop it")
    questions = request.questions()
    with on_all_devices():
        loaded = load_at(model, revision=revision, step=step)
        if out is None:
            return ask(Scorer(loaded, batch_rows=batch_size), questions), None
        # A run's newest is of the step that it was found to be of; what others are was said.
        at = loaded.step if step is None and is_run(model) else step
        of = Checkpoint(
            name=name_of(model),
            step=loaded.step,
            source=loaded.source,
            arguments=arguments_of(model, revision=revision, step=at),
            weights=weights_hash(loaded.params),
            tokens_per_step=known_tokens_per_step(loaded.facts),
        )
        path = of.path(out, request)
        # The first process writes, and its folder may be its own.
        if not all_say(not (is_first() and path.exists())):
            raise FileExistsError(
                f"{path}: is there already; move it away, or choose another --out"
            )
        scorer = Scorer(loaded, batch_rows=batch_size)
        return score_into(out, request, questions, scorer, of), path
