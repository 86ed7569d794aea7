"""`Model`: parameters, the function they belong to, and a tokenizer, from whatever they came."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from pythia_jax.configs import ModelConfig
from pythia_jax.data.tokenize import EOD_TOKEN
from pythia_jax.model.parameters import Params


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded model.

    stored_dtype: what the weights were stored in; exports keep it unless told otherwise.
    tokenizer_files: the tokenizer's files by name, byte for byte. source: where it came from.
    step: the training step that it is the checkpoint of, where that is known. facts: what is known
    of the training, for a model card.
    """

    params: Params
    config: ModelConfig
    tokenizer_files: dict[str, bytes] = field(default_factory=dict, repr=False)
    stored_dtype: str = "float32"
    source: str = ""
    step: int | None = None
    facts: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, or None if it came without. Raises ValueError if it cannot be read."""
        return tokenizer_of(self.tokenizer_files)

    @property
    def eod(self) -> int:
        """Id of the end of a document: `<|endoftext|>`, 0 in every Pythia."""
        return eod_of(self.tokenizer_files)


def tokenizer_of(files: Mapping[str, bytes]) -> Tokenizer | None:
    """The tokenizer in `tokenizer_files`, or None. Raises ValueError if it cannot be read.

    It neither cuts nor pads, where its file says that it should: texts are read whole.
    """
    content = files.get("tokenizer.json")
    return None if content is None else _parse_tokenizer(content)


def eod_of(files: Mapping[str, bytes]) -> int:
    """Id of `<|endoftext|>` in `tokenizer_files`; 0, as in every Pythia, where it is not known."""
    tokenizer = tokenizer_of(files)
    known = None if tokenizer is None else tokenizer.token_to_id(EOD_TOKEN)
    return 0 if known is None else known


def dtype_name(dtype: DTypeLike) -> str:
    """The name of a dtype; empty for what JAX does not know as one."""
    try:
        return jnp.dtype(dtype).name
    except TypeError:
        return ""


@functools.lru_cache(maxsize=8)
def _parse_tokenizer(content: bytes) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # what `tokenizers` raises has no narrower type
        raise ValueError(f"tokenizer.json is not a tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
