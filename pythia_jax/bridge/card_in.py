"""What the model card of a Hugging Face folder says of license and data, for the card of an export.

Its front matter is read, as the hub reads it, and of a card that we wrote the table of its data
too. A card that says nothing, or nothing that can be kept, is no error: weights need none.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pythia_jax.bridge import card

log = logging.getLogger(__name__)

_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_DEDUPLICATED = {
    "EleutherAI/pile": False,
    "EleutherAI/the_pile": False,
    "the_pile": False,
    "EleutherAI/the_pile_deduplicated": True,
}
"""Names that the Pile has on the hub, and whether that is the deduplicated one."""


def facts_of(folder: Path) -> dict[str, Any]:
    """Facts for a card (`pythia_jax.bridge.card`) from the folder's README.md; none without one.

    Read are `license` with its name and link, and `datasets`, from which follows the corpus where
    it is the Pile. What stands there and cannot be kept is warned of.
    """
    path = folder / "README.md"
    if not path.is_file():
        return {}
    content = path.read_bytes()
    text = content.decode("utf-8", errors="replace")
    matter = _front_matter(path, text)
    facts: dict[str, Any] = {}
    for key, keep in (
        ("license", _license),
        ("license_name", _line),
        ("license_link", _line),
        ("datasets", _datasets),
    ):
        value = matter.get(key)
        if value is None or (key, value) == ("license", "unknown"):
            continue
        kept = keep(value)
        if kept is None:
            log.warning("%s: %s: %.80r is not kept, for it is malformed", path, key, value)
        else:
            facts["dataset" if key == "datasets" else key] = kept
    named = facts.get("dataset")
    if isinstance(named, str) and named in _DEDUPLICATED:
        facts |= {"corpus": "the Pile", "deduplicated": _DEDUPLICATED[named]}
    return facts | (_told(text) if card.is_ours(content) else {})


def _front_matter(path: Path, text: str) -> Mapping[Any, Any]:
    found = _FRONT_MATTER.match(text)
    if found is None:
        return {}
    try:
        matter = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        log.warning("%s: its front matter is no valid YAML, so nothing of it is kept", path)
        return {}
    return matter if isinstance(matter, Mapping) else {}


def _license(value: object) -> str | None:
    return value if isinstance(value, str) and card.LICENSE.fullmatch(value) else None


def _line(value: object) -> str | None:
    return value if isinstance(value, str) and value.isprintable() else None


def _datasets(value: object) -> str | list[str] | None:
    """Ids of data sets: one as it is, of several a list."""
    given: list[object] = value if isinstance(value, list) else [value]
    names = [name for name in given if isinstance(name, str) and card.DATASET.fullmatch(name)]
    if not names or len(names) < len(given):
        return None
    return names[0] if len(names) == 1 else names


def _told(text: str) -> dict[str, Any]:
    """What the tables in a card of ours say of the data, and of weights that were rounded."""
    rows = dict(
        re.findall(r"^\| (Corpus|Deduplicated|Were rounded to) \| (.*) \|\r?$", text, re.MULTILINE)
    )
    facts: dict[str, Any] = {}
    for label, key in (("Corpus", "corpus"), ("Were rounded to", "quantized")):
        if rows.get(label, "unknown") != "unknown":
            facts[key] = re.sub(r"\\([|\\<])", r"\1", rows[label])
    if rows.get("Deduplicated") in ("yes", "no"):
        facts["deduplicated"] = rows["Deduplicated"] == "yes"
    return facts
