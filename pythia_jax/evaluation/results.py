"""Evaluation results on disk: the files published with Pythia, the harness's own, and ours.

Published: `pythia-70m-deduped/zero-shot/70m-deduped_step3000.json`, with `results` (task → metric →
number), `versions` and `config` of the harness of 2022; ours have the same layout and schema, and
`provenance` beside it. The present harness: `results_DATE.json`.
"""

import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pythia_jax.evaluation import names
from pythia_jax.files import write_whole

log = logging.getLogger(__name__)

PROVENANCE = "provenance"
"""Key, in the files that we write, of what they were made from."""

OLD_HARNESS = "2022"

KINDS = ("plain", "batch-size", "baseline", "intervention", "long-intervention")

_STEM = re.compile(
    r"(?P<kind>(?:long-)?intervention-|baseline-)?(?P<name>.+?)(?:-(?P<shots>\d+)shot)?"
    r"[-_](?:global_)?step(?P<step>\d+)(?:_+eval_results_.*)?"
)
_HALVED = ("160m", "410m", "1.4b")
_HALVED_STEPS = 71_500
"""v0 of these sizes was trained for so many steps, of twice the tokens."""


@dataclass(frozen=True)
class Result:
    """The scores of one checkpoint, of one file.

    model, size, deduped, seed, version, tokens_per_step: as in `names.ModelName`; a seed's model is
        that of all its seeds.
    step: as today's hub calls it: those of v0 files that carry half of it are doubled, and
        `doubled` is set. None for a model with one checkpoint only (OPT, BLOOM).
    num_fewshot: examples before each question, by the folder where it says so.
    kind: one of `KINDS`.
    harness: `2022`, or the version of the present one (`0.4` where the file does not tell).
    ours: whether pythia_jax computed the scores.
    parameters: non-embedding, where known.
    path: of the file; a URL of a run on a bucket.
    metrics: task → metric → value, by their present names; standard errors as `acc_stderr`.
    notes: what makes the scores doubtful, or other than those of the same step.
    """

    model: str
    step: int | None
    num_fewshot: int
    kind: str
    harness: str
    path: Path | str
    metrics: Mapping[str, Mapping[str, float]]
    size: str | None = None
    deduped: bool = False
    seed: str | None = None
    version: str | None = None
    tokens_per_step: int | None = None
    parameters: int | None = None
    ours: bool = False
    doubled: bool = False
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> int | None:
        """Tokens trained on."""
        if self.step is None or self.tokens_per_step is None:
            return None
        return self.step * self.tokens_per_step

    def value(self, task: str, metric: str) -> tuple[float, float | None] | None:
        """A score and its standard error, by present names; None where the file has it not.

        `blimp` and `mmlu` are, where a file has their parts alone, what the present harness makes
        of them: a mean over tasks, and over questions. Those have no standard error here.
        """
        scores = self.metrics.get(task, {})
        if metric in scores:
            return scores[metric], scores.get(names.stderr_name(metric))
        return self._of_group(task, metric) if task in names.GROUPS else None

    def _of_group(self, task: str, metric: str) -> tuple[float, None] | None:
        prefix, number = names.GROUPS[task]
        parts = [
            scores
            for name, scores in self.metrics.items()
            if name.startswith(prefix) and name not in names.MMLU_PARTS and metric in scores
        ]
        if len(parts) != number:
            return None
        weights = [1.0] * number
        if task == "mmlu":
            sizes = [_questions(scores, metric) for scores in parts]
            if None in sizes:
                return None
            weights = [size or 0.0 for size in sizes]
        total = sum(w * scores[metric] for w, scores in zip(weights, parts, strict=True))
        return total / sum(weights), None


def _questions(scores: Mapping[str, float], metric: str) -> float | None:
    """How many questions there were: of a mean p of ones and zeros, se² = p(1 - p) / (n - 1)."""
    p, error = scores[metric], scores.get(names.stderr_name(metric))
    return round(p * (1 - p) / error**2 + 1) if error else None


def read(paths: Iterable[str | Path]) -> list[Result]:
    """The results in files, and in all `.json` files below folders.

    Raises FileNotFoundError for a path that is not there; ValueError, which names them all, for
    files that hold no results, and where there are none. Those below a folder are left out, which
    a warning tells with the names of the first.
    """
    results: dict[Path, list[Result]] = {}
    refused, left_out = [], []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path}: there is no such file or folder")
        for file in _files(path) if path.is_dir() else [path]:
            if file.resolve() in results:
                continue
            try:
                results[file.resolve()] = list(read_file(file))
            except ValueError as error:
                (left_out if path.is_dir() else refused).append(str(error))
    if refused:
        raise ValueError(f"no results to read: {'; '.join(refused)}")
    if left_out:
        more = f"; and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        log.warning("%d files left out: %s%s", len(left_out), "; ".join(left_out[:5]), more)
    found = [result for of_file in results.values() for result in of_file]
    if not found:
        raise ValueError(f"{', '.join(map(str, paths))}: no file of results (.json) there")
    return found


def _files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*.json")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def read_file(path: Path) -> Iterator[Result]:
    """The results of one file: one, or, of the present harness, one for each number of shots.

    Raises ValueError, which names the file, for one that holds none.
    """
    content = _content(path)
    config = content.get("config") if isinstance(content.get("config"), dict) else {}
    assert config is not None
    present = "configs" in content or "n-shot" in content
    made = content.get(PROVENANCE)
    if isinstance(made, dict) and {"model", "step", "num_fewshot"} <= set(made):
        yield _ours(path, content["results"], made, config)
        return
    result = _published(path, config, numbers(content["results"]))
    if not present:
        yield result
        return
    shots = content.get("n-shot") or {}
    version = content.get("lm_eval_version")
    result = replace(
        result,
        harness=version if isinstance(version, str) and version else "0.4",
        ours=config.get("model") in ("pythia_jax", "PythiaJax"),
    )
    given = {names.task_name(task): number for task, number in shots.items()}
    every = {number for number in given.values() if isinstance(number, int)} or {0}
    for number in sorted(every):
        # A group has no number of shots where its tasks have several, or the version tells none.
        usual = number if len(every) == 1 else None
        chosen = {t: m for t, m in result.metrics.items() if given.get(t, usual) == number}
        if chosen:
            yield replace(result, num_fewshot=number, metrics=chosen)


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from None
    if not isinstance(content, dict) or "results" not in content:
        raise ValueError(f"{path} has no `results`")
    found = content["results"]
    if isinstance(found, list):
        raise ValueError(f"{path}: `results` is a list, as in the published WinoBias files")
    if not isinstance(found, dict) or not all(isinstance(m, dict) for m in found.values()):
        raise ValueError(f"{path}: `results` is not a table of tasks and their metrics")
    if not numbers(found):
        raise ValueError(f"{path}: there is no number in `results`")
    return content


def numbers(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Scores and standard errors by present names: what else the harness keeps of a task is left
    out (its alias, how many questions there were, a standard error `N/A`).

    found: task → metric → value, of a file or as the harness returns them.
    """
    metrics = {}
    for task, scores in found.items():
        kept = {
            names.metric_name(name): float(value)
            for name, value in scores.items()
            if isinstance(value, int | float)
            and not isinstance(value, bool)
            and name not in ("sample_len", "sample_count")
        }
        if kept:
            metrics[names.task_name(task)] = kept
    return metrics


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """model_args, which is a text `a=b,c=d` or a dict."""
    given = config.get("model_args")
    if isinstance(given, dict):
        return given
    pairs = (part.partition("=") for part in str(given or "").split(","))
    return {key.strip(): value for key, equals, value in pairs if equals}


def _published(
    path: Path, config: Mapping[str, Any], metrics: Mapping[str, Mapping[str, float]]
) -> Result:
    """A file of the harness, by its place and name, and by its config where those do not tell."""
    arguments = _arguments(config)
    pretrained = str(arguments.get("pretrained") or "").rstrip("/")
    stem, notes = _STEM.fullmatch(path.stem), []
    revision = _step(arguments)
    if stem is not None:
        name, step = stem["name"], int(stem["step"])
    else:
        name, step = _source(pretrained or path.stem)
        # Of a run folder, ours tells the harness which checkpoint is the newest.
        told = (revision, _whole(config, "model_step"), step)
        step = next((number for number in told if number is not None), None)
    kind = ((stem and stem["kind"]) or "").rstrip("-")
    for known in ("intervention", "baseline"):
        if path.parent.name == known or name.rpartition("/")[2].startswith(f"{known}-"):
            kind = kind or known
            name = name.rpartition("/")[2].removeprefix(f"{known}-")
    about = names.model_name(name)
    version = about.version or _version(path, config) if about.size else None
    # Revisions of the hub are called by true steps.
    counted = stem is not None or revision is None
    doubled = counted and _halved(about.size, version, step, arguments)
    if kind == "intervention" and about.long:
        kind = "long-intervention"
    if about.tokens_per_step not in (None, names.TOKENS_PER_STEP):
        kind = kind or "batch-size"
    said = config.get("num_fewshot")
    shots = names.shots_of(path.parent.name)
    if shots is None:
        shots = said if isinstance(said, int) else int((stem and stem["shots"]) or 0)
    elif isinstance(said, int) and said != shots:
        notes.append(f"its config says {names.shots_name(said)}")
    if stem is not None and revision is not None and revision != step:
        notes.append(f"its config says step {revision}")
    notes += _limited(config)
    return Result(
        model=about.model,
        step=2 * step if doubled and step is not None else step,
        num_fewshot=shots,
        kind=kind or "plain",
        harness=OLD_HARNESS,
        path=path,
        metrics=metrics,
        size=about.size,
        deduped=about.deduped,
        seed=about.seed,
        version=version,
        tokens_per_step=_whole(config, "tokens_per_step") or about.tokens_per_step,
        parameters=_whole(config, "non_embedding_parameters") or _parameters(about),
        doubled=doubled and step is not None,
        notes=tuple(notes),
    )


def _source(pretrained: str) -> tuple[str, int | None]:
    """A model's name, and the step that its folder tells: run/global_step3000, run_step3000."""
    folder, _, last = pretrained.rpartition("/")
    alone = re.fullmatch(r"(?:global_)?step(\d+)", last)
    if alone and folder:
        return folder, int(alone[1])
    found = _STEM.fullmatch(last)
    return (found["name"], int(found["step"])) if found else (pretrained, None)


def _whole(config: Mapping[str, Any], key: str) -> int | None:
    """A number that our model tells the harness of itself."""
    found = config.get(key)
    return found if isinstance(found, int) else None


def _limited(config: Mapping[str, Any]) -> list[str]:
    """A note on the harness's `limit`: a number of questions, or, below 1, a part of them."""
    limit = config.get("limit")
    if not isinstance(limit, int | float) or not limit:
        return []
    return [f"first {limit:g} questions" if limit >= 1 else f"first {limit:g} of the questions"]


def _halved(
    size: str | None, version: str | None, step: int | None, arguments: Mapping[str, Any]
) -> bool:
    """Whether steps count batches of twice as many tokens; GPT-NeoX's own files tell."""
    planned = arguments.get("train_iters")
    if size is None:
        return False
    if isinstance(planned, int):
        return planned == _HALVED_STEPS
    return version == "v0" and size in _HALVED and (step or 0) <= _HALVED_STEPS


def _step(arguments: Mapping[str, Any]) -> int | None:
    """The step that model_args name: `revision=step3000`, ours `step=3000`."""
    for key in ("revision", "step"):
        found = re.fullmatch(r"(?:step)?(\d+)", str(arguments.get(key, "")))
        if found:
            return int(found[1])
    return None


def _version(path: Path, config: Mapping[str, Any]) -> str:
    """v0 was scored within GPT-NeoX, or lies in a folder that says so."""
    near = path.absolute().parts[-4:-1]
    in_v0 = any(re.match(r"(?:pythia-)?v0(?:$|-)", part) for part in near)
    return "v0" if in_v0 or config.get("model") == "neox" else "v1"


def _parameters(about: names.ModelName) -> int | None:
    if about.size is not None:
        return names.pythia_parameters(about.size)
    return names.baseline_parameters(about.model)


def _ours(
    path: Path, found: Mapping[str, Any], made: Mapping[str, Any], config: Mapping[str, Any]
) -> Result:
    about = names.model_name(str(made["model"]))
    notes = _limited(config)
    if made.get("known_fault"):
        notes.append(str(made["known_fault"]))
    return Result(
        model=about.model,
        step=made["step"],
        num_fewshot=made["num_fewshot"],
        kind=made.get("kind") or "plain",
        harness=str(made.get("lm_eval") or "0.4"),
        path=path,
        metrics=numbers(found),
        size=about.size,
        deduped=about.deduped,
        seed=about.seed,
        version=about.version or ("v1" if about.size else None),
        tokens_per_step=made.get("tokens_per_step") or about.tokens_per_step,
        parameters=made.get("parameters") or _parameters(about),
        ours=True,
        notes=tuple(notes),
    )


def path_of(
    folder: str | Path, *, model_name: str, step: int | None, num_fewshot: int | None = 0
) -> Path:
    """Where `write` puts a file: `FOLDER/pythia-70m/five-shot/70m-5shot_step3000.json`.

    model_name: as anyone calls it; of `EleutherAI/pythia-70m` the last part counts. num_fewshot:
    None, each task's own, lies with zero. Raises ValueError for a name that is none.
    """
    name = model_name.rstrip("/").rpartition("/")[2]
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        raise ValueError(f"model_name {model_name!r}: letters, digits and . _ + - make a file name")
    shots = num_fewshot or 0
    stem = name.removeprefix("pythia-") + (f"-{shots}shot" if shots else "")
    file = f"{stem}.json" if step is None else f"{stem}_step{step}.json"
    return Path(folder) / name / names.shots_name(shots) / file


def write(
    folder: str | Path,
    results: Mapping[str, Any],
    *,
    model_name: str,
    step: int | None,
    num_fewshot: int | None = 0,
    provenance: Mapping[str, Any],
) -> Path:
    """Write what the harness returned for one checkpoint, whole or not at all; its path.

    The schema is that of the published files, with metrics by their present names. provenance is
    kept beside it; of it `read` takes `kind` (one of `KINDS`), `known_fault`, and what plots of
    models that are none of Pythia's need: `tokens_per_step` and `parameters` (non-embedding).

    Raises ValueError for results without a number, and as `path_of` does.
    """
    path = path_of(folder, model_name=model_name, step=step, num_fewshot=num_fewshot)
    metrics = numbers(results["results"])
    if not metrics:
        raise ValueError(f"{path}: no task gave a number; nothing to write")
    shots = {task: n for task, n in (results.get("n-shot") or {}).items() if n}
    if num_fewshot is None and shots:
        log.warning("%s: lies with zero-shot, but of its tasks are not: %s", path, shots)
    config = dict(results.get("config") or {})
    versions = results.get("versions") or {}
    content = {
        "results": metrics,
        "versions": {names.task_name(task): version for task, version in versions.items()},
        "config": {
            "model": "pythia_jax",
            "model_args": config.get("model_args"),
            "num_fewshot": num_fewshot,
            "batch_size": config.get("batch_size"),
            "device": config.get("device"),
            "no_cache": not config.get("use_cache"),
            "limit": config.get("limit"),
            "bootstrap_iters": config.get("bootstrap_iters"),
            "description_dict": {},
        },
        PROVENANCE: {
            "model": model_name,
            "step": step,
            "num_fewshot": num_fewshot or 0,
            "lm_eval": results.get("lm_eval_version"),
            "questions": results.get("n-samples"),
            **provenance,
        },
    }
    kind = content[PROVENANCE].get("kind") or "plain"
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: one of {', '.join(KINDS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    # As the harness writes: a perplexity may be Infinity, which Python's readers take.
    write_whole(path, json.dumps(content, indent=2, default=_plain).encode())
    return path


def _plain(value: Any) -> Any:
    """What JSON has no form for: a number of NumPy's as a number, else as text."""
    number = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else None
    if isinstance(number, bool | int | float) and not (
        isinstance(number, float) and math.isnan(number)
    ):
        return number
    return str(value)
