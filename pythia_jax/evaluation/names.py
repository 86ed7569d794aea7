"""What the names in result files mean: of models and baselines, of tasks, of metrics.

The harness of 2022, with which Pythia was published, and the present one call some things by other
names. Here the present name is the name, and `acc,none` is written `acc`.
"""

import re
from dataclasses import dataclass
from functools import cache

from pythia_jax import suite

TOKENS_PER_STEP = suite.BATCH_SIZE * suite.SEQUENCE_LENGTH
"""Tokens that Pythia saw in a step: 2,097,152."""

PRESENT_METRICS = {"ppl": "perplexity", "likelihood_difference": "likelihood_diff"}
"""Metrics of the harness of 2022 by another name → the present one."""

_OLD_MMLU = "hendrycksTest"

GROUPS = {"blimp": ("blimp_", 67), "mmlu": ("mmlu_", 57)}
"""Groups that old files hold only the parts of: how those are called, and how many there are."""

MMLU_PARTS = ("mmlu_humanities", "mmlu_other", "mmlu_social_sciences", "mmlu_stem")
"""Groups within the group."""

# Layers and width, from config.json of facebook/opt-* and bigscience/bloom-* on the hub.
_OPT = {
    "125m": (12, 768),
    "350m": (24, 1024),
    "1.3b": (24, 2048),
    "2.7b": (32, 2560),
    "6.7b": (32, 4096),
    "13b": (40, 5120),
    "30b": (48, 7168),
    "66b": (64, 9216),
    "175b": (96, 12288),
}
_BLOOM = {
    "560m": (24, 1024),
    "1b1": (24, 1536),
    "1b7": (24, 2048),
    "3b": (30, 2560),
    "7b1": (30, 4096),
    "176b": (70, 14336),
}


_COUNTS = ("zero", "one", "two", "three", "four", "five")
_SHOTS = re.compile(rf"({'|'.join(_COUNTS)}|\d+)-shot")


def shots_name(shots: int) -> str:
    """How a number of examples before each question is called: `zero-shot`, `25-shot`."""
    return f"{_COUNTS[shots] if shots < len(_COUNTS) else shots}-shot"


def shots_of(name: str) -> int | None:
    """The number that `shots_name` gave this name; None for another name."""
    found = _SHOTS.fullmatch(name)
    if found is None:
        return None
    return int(found[1]) if found[1].isdigit() else _COUNTS.index(found[1])


def task_name(name: str) -> str:
    """A task by its present name: `hendrycksTest-anatomy` is `mmlu_anatomy`."""
    if name == _OLD_MMLU:
        return "mmlu"
    if name.startswith(f"{_OLD_MMLU}-"):
        return f"mmlu_{name.removeprefix(f'{_OLD_MMLU}-')}"
    return name


def metric_name(name: str) -> str:
    """A metric by its present name, without the filter `none`: `ppl` is `perplexity`.

    Standard errors follow their metric (`ppl_stderr`); other filters stay (`exact_match,strict`).
    """
    plain, comma, kept = name.partition(",")
    ending = "_stderr" if plain.endswith("_stderr") else ""
    plain = plain.removesuffix("_stderr")
    filtered = "" if kept == "none" else comma + kept
    return PRESENT_METRICS.get(plain, plain) + ending + filtered


def stderr_name(metric: str) -> str:
    """The name of a metric's standard error: `acc_stderr`, `exact_match_stderr,strict`."""
    plain, comma, kept = metric.partition(",")
    return f"{plain}_stderr{comma}{kept}"


def is_stderr(metric: str) -> bool:
    """Whether `stderr_name` made this name."""
    return metric.partition(",")[0].endswith("_stderr")


@dataclass(frozen=True)
class ModelName:
    """What the name of a model says.

    model: as today's hub calls it (`pythia-70m-deduped`), without what stands in the other fields.
    size, deduped, seed: of Pythia's; seed is `seed3`, `data-seed1`, `weight-seed2`.
    version: `v0` (before January 2023) or `v1` of Pythia's; None if the name says neither.
    tokens_per_step: of Pythia's; of its batch-size variants another number.
    long: the longer of the two interventions on 1.4b.
    """

    model: str
    size: str | None = None
    deduped: bool = False
    seed: str | None = None
    version: str | None = None
    tokens_per_step: int | None = None
    long: bool = False


_SIZES = {name: m.size for m in suite.SUITE.values() for name in (m.size, m.old_name or m.size)}
_PYTHIA = re.compile(
    r"(?:pythia-)?(?:(?P<version>v0|v1(?:\.1)?)-)?(?P<size>"
    + "|".join(re.escape(size) for size in sorted(_SIZES, key=len, reverse=True))
    + r")(?:-bf16)?(?P<deduped>-deduped)?(?:-(?P<seed>(?:data-|weight-)?seed\d+))?"
    r"(?P<long>-long)?(?:-(?P<millions>[\d.]+)MtokBS)?(?P<late>-v0)?"
)


def model_name(name: str) -> ModelName:
    """What a name says: of a folder, a file, or the hub (`EleutherAI/pythia-v1.1-70m-deduped`).

    The standard 1b is also called 1b-bf16. Names that are none of Pythia's are kept as they are.
    """
    short = name.removeprefix("EleutherAI/")
    found = _PYTHIA.fullmatch(short.removeprefix("v0-"))
    if found is None:
        return ModelName(name.strip("/").rpartition("/")[2])
    size = _SIZES[found["size"]]
    model = f"pythia-{size}{found['deduped'] or ''}"
    tokens = TOKENS_PER_STEP
    if found["millions"]:
        model += f"-{found['millions']}MtokBS"
        tokens = round(float(found["millions"]) * 2**20)
    version = found["version"] and found["version"][:2]
    if short.startswith("v0-") or found["late"] or found["size"] != size:
        version = "v0"
    return ModelName(
        model=model,
        size=size,
        deduped=found["deduped"] is not None,
        seed=found["seed"],
        version=version,
        tokens_per_step=tokens,
        long=found["long"] is not None,
    )


def baseline_parameters(name: str) -> int | None:
    """Non-embedding parameters of an OPT or BLOOM model (`opt-1.3b`); None of any other.

    Both have 12 d² + 13 d in a layer of width d and layer norms at the ends: BLOOM two, OPT one.
    opt-350m normalises after its sublayers and so has none at the end, but two projections between
    its width and that of its embedding, 512.
    """
    family, _, size = name.lower().partition("-")
    shape = {"opt": _OPT, "bloom": _BLOOM}.get(family, {}).get(size)
    if shape is None:
        return None
    layers, width = shape
    ends = {"opt": 2 * width, "bloom": 4 * width}[family]
    if (family, size) == ("opt", "350m"):
        ends = 2 * 512 * width
    return layers * (12 * width**2 + 13 * width) + ends


@cache
def pythia_parameters(size: str) -> int:
    """Non-embedding parameters of a size of the suite."""
    from pythia_jax.configs import ModelConfig
    from pythia_jax.model.parameters import count

    return count(ModelConfig.from_size(size), embedding=False)
