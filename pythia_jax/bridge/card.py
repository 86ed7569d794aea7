"""The model card: README.md of an exported folder, from what is known of the training.

`facts` of an `Opened` is flat. Names that are read here:

- the keys of a run's config with their dots: `training.batch_size`, `optimizer.betas`, ...;
- `name`: of the run; `tokens_seen`;
- `corpus`: in words; `dataset`: its id on the hub, or several; `deduplicated`: True or False;
- `license`: `apache-2.0` for the suite's own weights; `license_name`, `license_link`: what the hub
  wants of one that it does not know, `other`;
- `hash.WHAT`: of data, `version.WHAT`: of a library;
- `quantized`: how the weights were rounded, and of what, in words.

What is not there is said to be unknown, or left out; nothing is guessed.
"""

import json
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from pythia_jax import suite
from pythia_jax.bridge.angles import Difference
from pythia_jax.bridge.opened import Opened
from pythia_jax.configs import EXACT_GELU, TANH_GELU, OptimizerConfig
from pythia_jax.model import parameters

LICENSE = re.compile(r"[\w.+-]+")
"""An identifier of a license, as the hub has them."""
DATASET = re.compile(r"(?:[\w.-]+/)?[\w.-]+")
"""Id of a data set on the hub; old ones have no ORG."""

_MARK = (
    "<!-- Written by pythia_jax. An export replaces this file as long as this line is in it. -->"
)
_TRAINING = (
    ("Training steps of the whole run", "training.steps"),
    ("Rows a step", "training.batch_size"),
    ("Tokens a row", "data.sequence_length"),
    ("Precision of the computation", "training.precision"),
    ("Seed of the weights", "training.seed"),
    ("Learning rate, peak", "optimizer.peak_learning_rate"),
    ("Learning rate, at the end", "optimizer.min_learning_rate"),
    ("Schedule", "optimizer.schedule"),
    ("Updates the schedule is laid out over, where not all", "optimizer.decay_steps"),
    ("Share of the steps for warm-up", "optimizer.warmup_fraction"),
    ("First update at rate 0", "optimizer.warmup_from_zero"),
    ("AdamW's betas", "optimizer.betas"),
    ("AdamW's epsilon", "optimizer.eps"),
    ("Bias correction one step ahead", "optimizer.bias_correction_ahead"),
    ("Adam's counter begun anew at steps", "optimizer.restarts"),
    ("Row-parallel biases move so many times as far", "optimizer.row_parallel_bias_multiple"),
    ("Float16 gradients halved where the loss scale doubles", "training.doubled_scale_quirk"),
    ("Weight decay, decoupled, not of norms and biases", "optimizer.weight_decay"),
    ("Gradients clipped to norm", "optimizer.gradient_clip"),
    ("Initial weights", "model.initializer"),
    ("Weights that it began from", "initialize_from.model"),
    ("At step", "initialize_from.step"),
    ("With the optimizer's state", "initialize_from.optimizer_state"),
    ("Recipe", "recipe"),
)
_DATA = (
    ("Order of the rows", "data.order"),
    ("Seed of the order", "data.seed"),
)


def text(opened: Opened, config: Mapping[str, Any], difference: Difference | None) -> str:
    """The card of a checkpoint that is exported with this `config.json`.

    difference: what exporting costs a model trained with half-precision rotary angles.
    """
    facts = opened.facts
    name = str(facts.get("name") or "A GPT-NeoX language model")
    parts = [
        _front_matter(facts),
        _MARK,
        f"# {_cell(name)}",
        "A causal language model of the GPT-NeoX architecture, in the shape of "
        "[Pythia](https://github.com/EleutherAI/pythia): a suite made to study how language models "
        "learn. Exported by pythia_jax for `transformers`.",
        _table("This checkpoint", _checkpoint(opened, config)),
        _table("Training", _training(facts)),
        _table("Data", _data(facts)),
        _function(opened, config, difference),
        _USE,
        f"## License\n\n{_license(facts)}",
        _CITATION,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def is_ours(content: bytes) -> bool:
    """Whether a README.md is one that we wrote and nobody has claimed."""
    return _MARK.encode() in content.splitlines()


def published_facts(name: str) -> dict[str, Any]:
    """What is known of a published run of the suite, by any of its names (`suite.lookup`).

    Raises ValueError for a name that is not of the suite.
    """
    entry, run = suite.lookup(name), suite.hub_id(name).rpartition("/")[2]
    deduped = run.endswith("-deduped")
    # Which of two it ran in is not recorded (`suite.SUITE["1b"].known_faults`).
    precision = None if run == "pythia-1b-deduped" else entry.precision
    optimizer = OptimizerConfig(entry.peak_learning_rate, entry.min_learning_rate)
    return {
        "name": run,
        "corpus": "the Pile",
        "dataset": "EleutherAI/the_pile_deduplicated" if deduped else "EleutherAI/pile",
        "deduplicated": deduped,
        "data.sequence_length": suite.SEQUENCE_LENGTH,
        "training.steps": suite.TOTAL_STEPS,
        "license": "apache-2.0",
        "training.batch_size": suite.BATCH_SIZE,
        "training.precision": precision,
        "model.hidden_act": "gelu_pytorch_tanh",
        "model.rotary_precision": precision,
        **{f"optimizer.{key}": value for key, value in vars(optimizer).items()},
    }


def tokens_seen(opened: Opened) -> int | None:
    """Tokens that the weights have been trained on; None where that is not known."""
    facts = opened.facts
    if "tokens_seen" in facts:
        return int(facts["tokens_seen"])
    rows, tokens = facts.get("training.batch_size"), facts.get("data.sequence_length")
    if opened.step is None or rows is None or tokens is None:
        return None
    return opened.step * int(rows) * int(tokens)


def _front_matter(facts: Mapping[str, Any]) -> str:
    lines = ["---", f"license: {facts.get('license', 'unknown')}", "library_name: transformers"]
    for key in ("license_name", "license_link"):
        if facts.get(key) is not None:
            lines.append(f"{key}: {json.dumps(str(facts[key]), ensure_ascii=False)}")
    lines += ["tags:"]
    lines += ["- pytorch", "- causal-lm", "- pythia"]
    named = facts.get("dataset")
    datasets = [] if named is None else list(named) if isinstance(named, list | tuple) else [named]
    for dataset in datasets:
        if not DATASET.fullmatch(str(dataset)):
            raise ValueError(f"dataset {dataset!r} is no data set's id on the hub, ORG/NAME")
    if datasets:
        lines += ["datasets:", *(f"- {dataset}" for dataset in datasets)]
    return "\n".join([*lines, "---"])


def _checkpoint(opened: Opened, config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    shape = opened.config
    tokens = tokens_seen(opened)
    return [
        ("Training step", "unknown" if opened.step is None else f"{opened.step:,}"),
        ("Tokens seen", "unknown" if tokens is None else f"{tokens:,}"),
        ("Parameters", f"{parameters.count(shape):,}"),
        ("Parameters without embeddings", f"{parameters.count(shape, embedding=False):,}"),
        ("Layers", shape.num_hidden_layers),
        ("Width", shape.hidden_size),
        ("Heads", f"{shape.num_attention_heads} of {shape.head_size}"),
        ("Vocabulary, padding included", f"{shape.vocab_size:,}"),
        ("Positions", f"{shape.max_position_embeddings:,}"),
        ("Weights stored in", config["torch_dtype"]),
        *([("Were rounded to", opened.facts["quantized"])] if "quantized" in opened.facts else []),
    ]


def _training(facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    # Of switches that have no place, such as restarts that there were none of, nothing is said.
    rows = [(label, facts[key]) for label, key in _TRAINING if facts.get(key) not in (None, [], ())]
    if not rows:
        rows = [("Optimizer, schedule, batch and precision", "unknown")]
    return rows + _prefixed(facts, "version.", "Version of {}")


def _data(facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    deduplicated = facts.get("deduplicated")
    known = "unknown" if deduplicated is None else "yes" if deduplicated else "no"
    rows = [("Corpus", facts.get("corpus") or facts.get("dataset") or "unknown")]
    rows.append(("Deduplicated", known))
    if facts.get("data.train"):
        # Their names alone: where they lay is nobody's business.
        rows.append(("Files", [PurePath(path).name for path in facts["data.train"]]))
    rows += [(label, facts[key]) for label, key in _DATA if facts.get(key) is not None]
    return rows + _prefixed(facts, "hash.", "Hash of the data, {}")


def _prefixed(facts: Mapping[str, Any], prefix: str, label: str) -> list[tuple[str, Any]]:
    names = sorted(key for key in facts if key.startswith(prefix))
    return [(label.format(key.removeprefix(prefix)), facts[key]) for key in names]


def _table(title: str, rows: list[tuple[str, Any]]) -> str:
    lines = [f"| {_cell(label)} | {_cell(value)} |" for label, value in rows]
    return "\n".join([f"## {title}", "", "| | |", "| --- | --- |", *lines])


def _cell(value: Any) -> str:
    """A value on one line that no mark-up can get out of."""
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    return re.sub(r"([|\\<])", r"\\\1", " ".join(str(value).split()))


def _function(opened: Opened, config: Mapping[str, Any], difference: Difference | None) -> str:
    """Which function is exported, beside the one that was trained."""
    served = str(config["hidden_act"])
    # A run's config tells what was trained; a folder's, only what is served.
    trained = opened.facts.get("model.hidden_act")
    lines = [
        "## The function",
        "",
        f"- Activation: `config.json` says `{served}` ({_gelu(served)}). "
        + (
            "In training it was unknown which." if trained is None else _activation(trained, served)
        ),
    ]
    precision = opened.facts.get("model.rotary_precision")
    if difference is not None:
        lines.append(f"- Rotary angles: {difference.in_words()}.")
    elif precision is None:
        lines.append("- Rotary angles: float32 when the model is served; in training, unknown.")
    elif precision == "float32":
        lines.append("- Rotary angles: float32, in training and when the model is served.")
    else:
        lines.append(
            f"- Rotary angles: {precision} in training, float32 when the model is served, so it "
            "computes a slightly other function than was trained."
        )
    return "\n".join(lines)


def _activation(trained: str, served: str) -> str:
    if _gelu(trained) == _gelu(served):
        return "It was trained with the same."
    return (
        f"It was trained with {_gelu(trained)}, so what is served is not quite the function that "
        "was trained."
    )


def _gelu(name: str) -> str:
    kinds = {**dict.fromkeys(EXACT_GELU, "exact GELU"), **dict.fromkeys(TANH_GELU, "tanh GELU")}
    return kinds[name]


_USE = """\
## Intended use

Research on language models: how they learn in the course of training, what goes on inside them,
and experiments that need a checkpoint whose data and recipe are known. It may be fine-tuned and
deployed under its license; whoever does so should study its risks and biases for that use first.

## Out of scope

It is not made to be deployed as it is, and it is no product. It has not been trained to follow
instructions or to hold a conversation, and it should not be used where people read its output as
advice or fact, nor without a person who checks it. It writes the languages of its training data
only; for Pythia's, that is English.

## Limits and biases

The model gives the tokens that were likely in its training text, and likely is not the same as
true: do not rely on it for facts. What it writes may be offensive or harmful, even if the prompt
is not. Text from the web carries prejudices about gender, religion, race and much else, and the
model has learned them; the Pile's are documented in section 6 of its paper
([Gao et al., 2020](https://arxiv.org/abs/2101.00027)). It may repeat pieces of its training text
word for word. Early checkpoints write no sensible text at all; they are there to be studied."""


def _license(facts: Mapping[str, Any]) -> str:
    known = facts.get("license")
    if known is None:
        return (
            "None is stated: whoever publishes these weights chooses one. The weights of the "
            "Pythia suite itself are under Apache 2.0."
        )
    if known == "apache-2.0":
        return "Apache 2.0, as the Pythia suite."
    more = [facts[key] for key in ("license_name", "license_link") if facts.get(key) is not None]
    said = f"{_cell(known)}, as the card of the weights that these were made from states"
    return f"{said}: {_cell(more)}." if more else f"{said}."


_CITATION = """\
## Citation

The suite, its data order and its recipe:

```bibtex
@inproceedings{biderman2023pythia,
  title = {Pythia: A Suite for Analyzing Large Language Models Across Training and Scaling},
  author = {Biderman, Stella and Schoelkopf, Hailey and Anthony, Quentin Gregory and Bradley,
            Herbie and O'Brien, Kyle and Hallahan, Eric and Khan, Mohammad Aflah and Purohit,
            Shivanshu and Prashanth, USVSN Sai and Raff, Edward and Skowron, Aviya and Sutawika,
            Lintang and van der Wal, Oskar},
  booktitle = {International Conference on Machine Learning},
  pages = {2397--2430},
  year = {2023},
  organization = {PMLR}
}
```"""
