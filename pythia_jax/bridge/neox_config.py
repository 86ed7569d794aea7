"""GPT-NeoX YAML files in: a run's plain values, and what of the file is not done here.

Read as GPT-NeoX v1.0 would run it, whose defaults these are too; a key that would make it another
function or another recipe, and cannot be honoured, is an error.
"""

import difflib
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pythia_jax import configs
from pythia_jax.bridge import neox_sections as sections
from pythia_jax.bridge.neox_yaml import LAYOUT, QUIET, UNREAD, Notes, open_files
from pythia_jax.config_parsing import ConfigError
from pythia_jax.suite import SuiteModel


@dataclass(frozen=True)
class NeoxConfig:
    """What GPT-NeoX's files say.

    run: plain values for `configs.from_dict`, every one that the files decide.
    unhonoured: what is done otherwise here, or not at all: key, value, and what happens instead.
    warnings: what the files say that the run they belong to did not do, or that is easily missed.
    sources: the files.
    """

    run: dict[str, Any]
    unhonoured: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    sources: tuple[str, ...] = ()


def read(*paths: str | Path, vocab_size: int | None = None, gpus: int | None = None) -> NeoxConfig:
    """Read one GPT-NeoX file, or several that make up one config.

    vocab_size: ids of the tokenizer before padding, where the files do not tell.
    gpus: on how many the run ran, without which most files do not tell the size of a batch.

    Raises ConfigError for a file that is no YAML, keys that stand twice or are missing, and
    everything that would make it another function or recipe, all in one message.
    """
    settings = open_files(paths)
    settings.require(_REQUIRED)
    notes = Notes(settings)
    for rule in _RULES:
        _hold(rule, notes)
    entry = sections.suite_entry(notes)
    precision = sections.precision_of(notes)
    run = {
        "name": Path(paths[0]).stem,
        "recipe": "pythia_v1",
        "model": sections.model(notes, vocab_size),
        "data": sections.data(notes),
        "tokenizer": sections.tokenizer(settings),
        "initialize_from": sections.initialize_from(notes),
        "optimizer": sections.optimizer(notes, precision),
        "training": {
            "steps": settings.whole("train_iters", 0),
            "batch_size": sections.batch_size(notes, entry, gpus),
            "precision": precision,
            "seed": settings.whole("seed", 1234),
        },
        "checkpoint": sections.checkpoint(notes),
        "evaluation": {
            "every": settings.whole("eval_interval", 1000),
            "steps": settings.whole("eval_iters", 100),
        },
        "logging": {"every": settings.whole("log_interval", 10)},
    }
    if entry is not None:
        _warn_of_faults(notes, entry, precision)
    _list_the_rest(notes)
    if notes.refused:
        raise ConfigError(f"{settings.where}: {'; '.join(notes.refused)}")
    run = {key: value for key, value in run.items() if value is not None}
    try:
        configs.from_dict(run)
    except ConfigError as error:
        raise ConfigError(f"{settings.where}: read as a run, {error}") from None
    return NeoxConfig(run, notes.unhonoured, notes.warnings, tuple(map(str, paths)))


def to_yaml(neox: NeoxConfig) -> str:
    """A config file: `neox.run`, under a comment that lists what was not honoured."""
    lines = [f"From GPT-NeoX's {', '.join(neox.sources)}."] if neox.sources else []
    for title, items in (
        ("Done otherwise here, or not at all:", neox.unhonoured),
        ("Look at:", neox.warnings),
    ):
        if items:
            lines += [title]
            for item in items:
                lines += textwrap.wrap(
                    " ".join(item.split()),
                    width=96,
                    initial_indent="- ",
                    subsequent_indent="  ",
                    break_long_words=False,
                    break_on_hyphens=False,
                )
    header = "".join(f"# {line}\n" for line in lines)
    return header + yaml.safe_dump(neox.run, sort_keys=False, default_flow_style=None, width=100)


_REQUIRED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "seq_length",
    "max_position_embeddings",
    "optimizer",
    "train_iters",
)


class _Rule(NamedTuple):
    """The values that a key may have; any other would make another function or recipe."""

    key: str
    default: object
    allowed: tuple[object, ...]
    why: str


_RULES = (
    _Rule("pos_emb", "learned", ("rotary",), "positions are rotary here"),
    _Rule("no_weight_tying", False, (True,), "embedding and unembedding are not tied here"),
    _Rule("norm", "layernorm", ("layernorm",), "there is only layernorm here"),
    _Rule("activation", "gelu", ("gelu",), "there is only gelu here"),
    _Rule("onnx_safe", False, (False,), "it computes gelu with a constant of its own"),
    _Rule("hidden_dropout", 0.1, (0,), "there is no dropout here; Pythia had 0"),
    _Rule("attention_dropout", 0.1, (0,), "there is no dropout here; Pythia had 0"),
    _Rule("lr_decay_style", "linear", ("cosine",), "the schedule is a cosine here"),
    _Rule("eod_mask_loss", False, (False,), "every token counts in the loss here"),
    _Rule("weight_by_num_documents", False, (False,), "give the weights that it comes to"),
    _Rule("use_mup", False, (False,), "there is no muP here"),
    _Rule("use_bnb_optimizer", False, (False,), "Adam's state is float32 here"),
    _Rule("no_load_optim", False, (False,), "GPT-NeoX then makes no optimizer"),
    _Rule("scheduler", None, (None, {}), "DeepSpeed's schedules are not here"),
    _Rule("deepspeed_extra_args", None, (None, {}), "nothing is known of them here"),
    # Of later GPT-NeoX, which v1.0 would not have taken.
    _Rule("use_bias_in_norms", True, (True,), "norms have a bias here"),
    _Rule("use_bias_in_attn_linear", True, (True,), "attention has biases here"),
    _Rule("use_qk_layernorm", False, (False,), "queries and keys have no norm here"),
    _Rule("sliding_window_width", None, (None,), "attention reaches all the way back here"),
    _Rule("moe_num_experts", 1, (1,), "there are no experts here"),
    _Rule("lr_decay_fraction", None, (None,), "write lr-decay-iters"),
    _Rule("pack_impl", "packed", ("packed",), "documents are packed end to end here"),
    _Rule("train_impl", "normal", ("normal",), "training is next-token prediction here"),
)


def _hold(rule: _Rule, notes: Notes) -> None:
    value = notes.settings.get(rule.key, rule.default)
    same_kind = [v for v in rule.allowed if isinstance(v, bool) == isinstance(value, bool)]
    if value not in same_kind:
        notes.refuse(rule.key, rule.why, rule.default)


def _warn_of_faults(notes: Notes, entry: SuiteModel, precision: str) -> None:
    """Pass on what the suite knows of this size's training file, where this file says it too."""
    s = notes.settings
    trained = [path for path in s.get("train_data_paths", []) if isinstance(path, str)]
    flash = "flash" in str(s.get("attention_config"))
    head = entry.hidden_size // entry.num_attention_heads
    for words, holds in (
        ("says fp16", precision == "float16"),
        ("asks for flash attention", flash and head > 128),
        ("folder says", any("pile_deduped/pile_20B" in path for path in trained)),
        ("sets no initializer", "init_method" not in s),
    ):
        if holds:
            faults = [fault for fault in entry.known_faults if words in fault]
            notes.warnings += [f"the suite's {entry.size}: {fault}" for fault in faults]


def _list_the_rest(notes: Notes) -> None:
    """Sort the keys that nothing above asked for, one line a kind."""
    s = notes.settings
    # Asked for above to look at them, and still not followed.
    layout = [name for name in s.values if name in LAYOUT and name in s]
    unread = [name for name in s.rest() if name in UNREAD]
    if layout:
        notes.unhonoured.append(
            f"{', '.join(map(s.spelling, layout))}: speed, memory and layout, which mesh, "
            "training.remat and training.gradient_accumulation decide here"
        )
    if unread:
        notes.unhonoured.append(
            f"{', '.join(map(s.spelling, unread))}: GPT-NeoX derives these from other keys, or "
            "reads them for nothing that is here"
        )
    for name in s.rest():
        if name not in LAYOUT | QUIET | UNREAD:
            known = [*s.taken, *LAYOUT, *QUIET, *UNREAD]
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0].replace("_", "-")
            what = f"unknown key, passed over; the nearest known one is {near!r}"
            notes.unhonoured.append(f"{s.spelling(name)}: {s.values[name]!r}: {what}")
