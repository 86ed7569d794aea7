"""Do models know numbers better that they saw more often? Counts and scores, and the two together.

`count` goes through the training rows of a run (`term_counts`), `score` asks checkpoints for sums
and products (`arithmetic`), `points` puts every score beside how often its number had been seen by
then. Source: section 4.3 of the Pythia paper; EleutherAI/pythia, case-studies/term_frequency.
"""

import csv
import hashlib
import io
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from tqdm import tqdm

from pythia_jax.bridge.computed_on import computed_on
from pythia_jax.bridge.model import Model
from pythia_jax.bridge.revisions import (
    Loading,
    Source,
    chosen,
    load_at,
    name_of,
    on_all_devices,
    source_of,
)
from pythia_jax.configs import RunConfig
from pythia_jax.data import batches, load_tokenizer
from pythia_jax.evaluation import arithmetic, sidecars, term_counts, training_rows
from pythia_jax.evaluation.scoring import Scorer
from pythia_jax.evaluation.sidecars import differing
from pythia_jax.evaluation.sweep import PASSED_OVER
from pythia_jax.evaluation.term_windows import number_key
from pythia_jax.files import locked, write_whole

log = logging.getLogger(__name__)

COLUMNS = ("model", "step", "operation", "shots", "x1", "correct", "total", "accuracy")
"""Of a CSV of scores."""
_WHOLE = ("step", "shots", "x1", "correct", "total")


@dataclass(frozen=True)
class Score:
    """How many questions of one task a checkpoint answered rightly."""

    model: str
    step: int
    operation: str
    shots: int
    x1: int
    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.total


@dataclass(frozen=True)
class Asked:
    """What came of asking: the scores added, and why checkpoints could not be loaded, by step."""

    scores: list[Score]
    failed: dict[int, str]


@dataclass(frozen=True)
class CountedScore:
    """A score, and how often its x1 had been seen in training by then."""

    score: Score
    count: int


def count(
    config: RunConfig,
    folder: str | Path,
    *,
    tokenizer: str | Path,
    start: int = 0,
    stop: int | None = None,
    every: int = 1000,
    workers: int = 1,
    clean_up: bool = False,
    progress: bool = True,
) -> int:
    """Count the numbers in a run's training rows into files of a folder.

    config: a run; its sections data and training decide its rows. Everything else is as for
    `term_counts.count`, whose result this returns and whose errors it raises; stop is the end of
    training by default.
    """
    served, loaded = batches(config), load_tokenizer(tokenizer)
    stop = len(served) if stop is None else stop
    with tqdm(unit=" rows", desc="counting", delay=0.5, disable=not progress) as bar:

        def show(rows: int, of: int) -> None:
            bar.total = of
            bar.update(rows - bar.n)

        return term_counts.count(
            served,
            loaded,
            folder,
            start,
            stop,
            about={
                **training_rows.identity(config),
                "tokenizer": hashlib.sha256(loaded.to_str().encode()).hexdigest(),
                "clean_up": clean_up,
            },
            name=config.name,
            every=every,
            workers=workers,
            clean_up=clean_up,
            progress=show,
        )


def score(
    model: str,
    out: str | Path,
    *,
    operations: Sequence[str] = ("times",),
    shots: Sequence[int] = (16,),
    revisions: str | None = None,
    revision: str | None = None,
    step: int | None = None,
    progress: bool = True,
) -> Asked:
    """Ask checkpoints of a model, and write how each x1 came out to a CSV.

    A line is `model,step,operation,shots,x1,correct,total,accuracy`. What a file that is there
    already holds is kept and not asked again, so this goes on where it was killed, and checkpoints
    of several models may be gathered in one file. Beside it, `OUT.json` says what each checkpoint's
    lines were computed on, and what is known of the rows that it was trained on.

    Args:
        model: with revisions as for `revisions.source_of`, else as for `revisions.load_at`.
        out: the CSV; its folder must be there.
        operations: of `arithmetic.OPERATIONS`.
        shots: numbers of solved examples.
        revisions: many checkpoints, as for `revisions.chosen`, of which the next loads while one is
            asked; else one, by revision or step. Of many, those that cannot be loaded are passed
            over, and told in `failed`.

    Raises:
        ValueError: something asked for cannot be, or OUT is no such file, or the step is not known.
        FileNotFoundError: there is no such model, step or folder.
        RuntimeError: another process is adding to OUT.
    """
    out = Path(out)
    for operation in operations:
        for count in shots:
            arithmetic.check(operation, count)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.parent} to write it in")
    if revisions is not None and (revision is not None or step is not None):
        raise ValueError("revisions names the checkpoints; drop revision and step")
    wanted = list(dict.fromkeys((operation, count) for operation in operations for count in shots))
    with _alone_with(out), on_all_devices() as mesh:
        sheet = _Sheet(out, wanted, read_scores(out) if out.exists() else [], progress)
        before, failed = len(sheet.scores), dict[int, str]()
        if revisions is not None:
            source = source_of(model)
            failed = _ask_many(source, chosen(revisions, source), sheet, mesh)
        else:
            loaded = load_at(model, revision=revision, step=step)
            if loaded.step is None:
                raise ValueError(f"{model}: does not tell which step it is of; give the step")
            sheet.ask(name_of(model), loaded.step, loaded)
    return Asked(sheet.scores[before:], failed)


def _ask_many(source: Source, steps: Sequence[int], sheet: "_Sheet", mesh: Mesh) -> dict[int, str]:
    """Ask the checkpoints that have questions left; why some could not be loaded, by step."""
    for step in steps:
        weights = source.weights(step)
        if weights is not None:
            sheet.check_same(source.name, step, weights)
    left = [step for step in steps if sheet.left(source.name, step)]
    failed, ahead = dict[int, str](), list(left)

    def load_next() -> Loading | None:
        return Loading(source, ahead.pop(0), mesh) if ahead else None

    coming = load_next()
    try:
        for step in left:
            assert coming is not None
            try:
                loaded = coming.result()
            except PASSED_OVER as error:
                failed[step] = str(error)
                log.warning("step %d: passed over: %s", step, error)
                coming = load_next()
                continue
            coming = load_next()
            sheet.ask(source.name, step, loaded)
            del loaded  # before the one after the next is read: two are held at most
    finally:
        if coming is not None:
            coming.abandon()
    return failed


@dataclass
class _Sheet:
    """A CSV of scores that is being added to. wanted: operations and shots, of each checkpoint."""

    out: Path
    wanted: list[tuple[str, int]]
    scores: list[Score]
    progress: bool

    def left(self, name: str, step: int) -> list[tuple[str, int]]:
        """What a checkpoint is still to be asked."""
        have = {(s.operation, s.shots) for s in self.scores if (s.model, s.step) == (name, step)}
        return [each for each in self.wanted if each not in have]

    def check_same(self, name: str, step: int, weights: str) -> None:
        """Raises ValueError where the file holds scores of other weights under the same name."""
        before = (sidecars.read(self.out) or {}).get(_key(name, step))
        if before is not None and before["weights"] != weights:
            raise ValueError(
                f"{self.out}: holds scores of other weights of {name} step {step}, of "
                f"{before['source']}; choose another file"
            )

    def ask(self, name: str, step: int, model: Model) -> None:
        """Ask a checkpoint what is left, and write each operation's scores."""
        about = {
            **computed_on(model.params, source=model.source),
            "max_new_tokens": arithmetic.MAX_NEW_TOKENS,
            "seed": arithmetic.SEED,
            "trained_on": training_rows.known_of(model.facts),
        }
        self.check_same(name, step, about["weights"])
        asked = self.left(name, step)
        if not asked:
            return
        tokenizer, scorer = model.tokenizer, Scorer(model)
        if tokenizer is None:
            raise ValueError(f"{model.source}: has no tokenizer, so questions cannot be read")
        for operation, shots in asked:
            log.info("%s step %d: %s, %d shots", name, step, operation, shots)
            found = arithmetic.correct(scorer, tokenizer, operation, shots, progress=self.progress)
            self.scores += [
                Score(name, step, operation, shots, x1, right, len(arithmetic.SECOND))
                for x1, right in zip(arithmetic.FIRST, found, strict=True)
            ]
            _write(self.out, self.scores, {_key(name, step): about})


def _key(name: str, step: int) -> str:
    """Of a checkpoint in what is said beside a CSV."""
    return f"{name} step {step}"


@contextmanager
def _alone_with(out: Path) -> Iterator[None]:
    try:
        with locked(out.with_name(f".{out.name}.lock"), seconds=0):
            yield
    except BlockingIOError:
        raise RuntimeError(
            f"{out}: another process is adding to this file; wait for it to end"
        ) from None


def read_scores(path: str | Path) -> list[Score]:
    """The lines of a CSV that `score` wrote.

    Raises FileNotFoundError, and ValueError for what is no such file or holds a score twice.
    """
    scores: list[Score] = []
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        for line in reader:
            try:
                step, shots, x1, right, total = (int(line[key]) for key in _WHOLE)
                name, operation = line["model"], line["operation"]
                scores.append(Score(name, step, operation, shots, x1, right, total))
            except (KeyError, TypeError, ValueError):
                raise ValueError(
                    f"{path}, line {reader.line_num}: not a line that `term-frequency score` wrote "
                    f"({', '.join(COLUMNS)})"
                ) from None
    asked = [(s.model, s.step, s.operation, s.shots, s.x1) for s in scores]
    if len(set(asked)) < len(asked):
        twice = next(each for i, each in enumerate(asked) if each in asked[:i])
        raise ValueError(f"{path}: holds {twice} twice (model, step, operation, shots, x1)")
    return scores


def _write(out: Path, scores: Iterable[Score], told: dict[str, Any]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((*astuple(score), score.accuracy) for score in scores)
    about = (sidecars.read(out) or {}) | told
    write_whole(sidecars.beside(out), json.dumps(about, indent=1).encode())
    write_whole(out, text.getvalue().encode())


def points(scores: Iterable[Score], counts: str | Path) -> list[CountedScore]:
    """Every score beside how often its x1 had been seen in a window of numbers before its step.

    counts: the folder of `count`, with all steps from 0 to each of the scores'.

    Raises as `term_counts.read`.
    """
    scores = list(scores)
    steps, numbers = sorted({s.step for s in scores}), sorted({s.x1 for s in scores})
    seen = term_counts.read_at(counts, [number_key(number) for number in numbers], steps)
    return [
        CountedScore(score, int(seen[steps.index(score.step), numbers.index(score.x1)]))
        for score in scores
    ]


def read_points(files: Iterable[str | Path], counts: str | Path) -> list[CountedScore]:
    """`points` of files of `score`, which are held against what was counted.

    Checkpoints of which nothing tells whether they were trained on the rows counted are warned of.

    Raises ValueError where a checkpoint was trained on other rows than were counted, and as
    `read_scores` and `points` do.
    """
    identity, name = term_counts.read_about(counts)
    counted = identity if name is None else training_rows.with_name(identity, name)
    scores, unknown = list[Score](), list[str]()
    for path in map(Path, files):
        told, read = sidecars.read(path) or {}, read_scores(path)
        for checkpoint in dict.fromkeys(_key(score.model, score.step) for score in read):
            known = told.get(checkpoint, {}).get("trained_on", {})
            both = [key for key in known if key in counted]
            others = differing(
                {key: counted[key] for key in both}, {key: known[key] for key in both}
            )
            if others:
                raise ValueError(
                    f"{path}: {checkpoint} was trained on other rows than were counted in "
                    f"{counts}: {'; '.join(others)}; count those of its run into another folder"
                )
            if not training_rows.tell_which_data(known, counted):
                unknown.append(checkpoint)
        scores += read
    if unknown:
        log.warning(
            "%s: nothing tells whether the rows counted are those of %s",
            counts,
            ", ".join(unknown),
        )
    return points(scores, counts)
