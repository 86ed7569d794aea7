"""What decides which rows a run sees at a step, for results that are true of those rows alone.

Keys are those of the config; in place of paths, whose data may be moved, are hashes:

    data.train              of each dataset, with commas between
    data.transform_source   of the file that defines `data.transform`
    data.seed               only of GPT-NeoX's order, as the next
    training.steps          as many samples are drawn and shuffled; preshuffled rows stay where
                            they are, however long a run is
"""

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pythia_jax import configs
from pythia_jax.bridge import card
from pythia_jax.configs import RunConfig
from pythia_jax.training.provenance import data_identity

_KEYS = ("data.train_weights", "data.split", "data.sequence_length", "training.batch_size")
_TRANSFORM = ("data.transform", "data.transform_from")
_OF_NEOX_ORDER = ("data.seed", "training.steps")
_WHICH_DATA = ("data.train", "deduplicated")


def identity(config: RunConfig) -> dict[str, Any]:
    """What decides the training rows of a run, whose data is looked at.

    Raises as `data.batches` does.
    """
    data = dataclasses.replace(config.data, validation=(), validation_weights=None)
    found = data_identity(dataclasses.replace(config, data=data))
    told = configs.to_dict(config)
    flat = {
        f"{section}.{key}": told[section][key]
        for section in ("data", "training")
        for key in told[section]
    }
    return {
        **_decisive(flat),
        "data.train": ", ".join(each.get("index") or each["rows"] for each in found["train"]),
        "data.transform_source": found.get("transform", {}).get("source_sha256"),
    }


def known_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """As much of `identity` as is known of the training of a model, by its `facts`.

    And `deduplicated`, whether it was the deduplicated Pile, of a published model or an export that
    says so.
    """
    known = _decisive(facts)
    if "hash.train" in facts:
        known["data.train"] = facts["hash.train"]
        # `bridge.run_in` tells it at the end of a sentence.
        source = str(facts.get("hash.transform", "")).rpartition(" ")[2]
        known["data.transform_source"] = None if source in ("", "None") else source
    if facts.get("deduplicated") is not None:
        known["deduplicated"] = facts["deduplicated"]
    return known


def with_name(identity: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An identity, and what the name of its config says of the data, if it is one of Pythia's."""
    told = dict(identity)
    with suppress(ValueError):
        told["deduplicated"] = card.published_facts(name)["deduplicated"]
    return told


def tell_which_data(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two, or what is known of them, both say of which data they are."""
    return any(key in one and key in other for key in _WHICH_DATA)


def _decisive(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Of a config's keys, those that decide rows; those left out are not known."""
    found = {key: flat[key] for key in (*_KEYS, *_TRANSFORM) if key in flat}
    if "data.order" in flat:
        found["data.order"] = flat["data.order"] or "neox"
    if found.get("data.order") != "preshuffled":
        found |= {key: flat[key] for key in _OF_NEOX_ORDER if key in flat}
    return found
