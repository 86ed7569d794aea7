"""A checkpoint of any kind as a Hugging Face folder in int8, a layer at a time."""

import dataclasses
import os
from pathlib import Path
from typing import Literal, get_args

from jax.typing import DTypeLike
from tqdm.contrib.logging import logging_redirect_tqdm

from pythia_jax.bridge import hf_out
from pythia_jax.bridge.convert import check_apart, open_any, shown
from pythia_jax.bridge.int8 import BITS, Scheme, read_dynamic
from pythia_jax.bridge.opened import Opened
from pythia_jax.data.storage import is_url

Activations = Literal["float", "dynamic"]
"""What int8 weights are multiplied with: floats, or int8 with a scale a token, found on the way."""


def quantize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    bits: int = BITS,
    activations: Activations = "float",
    keep_embeddings: bool = False,
    dtype: DTypeLike | None = None,
    revision: str | None = None,
    step: int | None = None,
    cache_dir: str | Path | None = None,
    show_progress: bool = True,
) -> Opened:
    """Write a checkpoint of any kind (`open_any`) to a folder in int8; returns what was read.

    Matrices become int8 with a float32 scale an output channel (`pythia_jax.model.quantize`), norms
    and biases stay floats. `pythia_jax.load` opens the folder as any other. In memory is as much as
    in `convert`.

    activations: what the matrices are to be multiplied with. keep_embeddings: leave both embeddings
    in floats. dtype: of what stays in floats; None keeps the one it is stored in.

    A model in int8 that is there already is replaced. Raises FileExistsError for one in floats,
    ValueError for other bits, for what is quantised already and for weights that are not finite,
    and as `open_any` and `hf_out.save` do. What was at the target stays if anything fails.
    """
    scheme = scheme_of(bits, activations, keep_embeddings)
    folder = Path(target)
    if is_url(target):
        raise ValueError(f"{target}: quantised models are written to folders of this machine")
    check_apart(source, folder)
    if (folder / "config.json").exists() and read_dynamic(folder) is None:
        raise FileExistsError(
            f"{folder}: holds a model in floats, whose place this would take; name another folder, "
            "or move it away"
        )
    opened = open_floats(source, revision=revision, step=step, cache_dir=cache_dir)
    # Where it lies is nobody's business: of a folder, its name.
    there = is_url(source) or Path(source).exists()
    made_from = Path(opened.source).name if there else opened.source
    facts = {**opened.facts, "quantized": f"{scheme.in_words()}; from {made_from}"}
    named = dataclasses.replace(opened, facts=facts)
    with logging_redirect_tqdm(), shown(named, show_progress, "quantizing") as watched:
        hf_out.save(watched, folder, dtype=dtype, scheme=scheme)
    return opened


def scheme_of(bits: int, activations: Activations, keep_embeddings: bool) -> Scheme:
    """What becomes int8. Raises ValueError for what there is not."""
    if bits != BITS:
        raise ValueError(f"bits (--bits) {bits}: only {BITS} is known here")
    if activations not in get_args(Activations):
        raise ValueError(
            f"activations (--activations) {activations!r} is not one of "
            f"{', '.join(get_args(Activations))}"
        )
    return Scheme(dynamic=activations == "dynamic", embeddings=not keep_embeddings)


def open_floats(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    step: int | None = None,
    cache_dir: str | Path | None = None,
) -> Opened:
    """A checkpoint whose weights have not been rounded; raises ValueError for another."""
    opened = open_any(source, revision=revision, step=step, cache_dir=cache_dir)
    if opened.int8 is not None:
        raise ValueError(
            f"{source}: is in int8 already, and rounding it again would lose more; name the "
            "checkpoint that it was made from"
        )
    return opened
