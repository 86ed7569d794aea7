"""Rows that a model's loss is measured on: a file of ids, documents of a dataset, or a text."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pythia_jax import sharding
from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.data import load_tokenizer, open_dataset
from pythia_jax.model.gptneox import check_tokens
from pythia_jax.model.loss import token_losses
from pythia_jax.model.parameters import Params

MOST = 4096
"""Rows that are taken of a file or a dataset; more would be a benchmark of its own."""
_TOKENS = 2**14
"""Tokens that are computed together, about."""


@dataclass(frozen=True, eq=False)
class EvaluationRows:
    """Token ids, and how many of each row count.

    tokens: int32 `[rows, width]`, filled up with 0. lengths: tokens of each row, `[rows]`. name:
    what they are of.
    """

    tokens: Int[NDArray, "rows width"]
    lengths: Int[NDArray, " rows"]
    name: str

    def __len__(self) -> int:
        return len(self.tokens)

    def losses(
        self, params: Params, config: ModelConfig, *, runtime: Runtime = Runtime()
    ) -> Float[NDArray, " rows"]:
        """Of each row, the mean loss in nats a token, of all its tokens but the first.

        On the ambient mesh, in the dtype of the parameters unless `runtime` says otherwise.
        """
        parts = sharding.parts_of_rows()
        width = self.tokens.shape[1]
        together = max(1, min(_TOKENS // width, len(self)) // parts) * parts
        found = []
        for first in range(0, len(self), together):
            tokens = self.tokens[first : first + together]
            lengths = self.lengths[first : first + together]
            missing = together - len(tokens)
            given = np.pad(tokens, [(0, missing), (0, 0)]), np.pad(lengths, (0, missing))
            placed = map(sharding.place_rows, given)
            values = _losses(params, *placed, config=config, runtime=runtime)
            found.append(np.asarray(values)[: len(tokens)])
        return np.concatenate(found)


def evaluation_rows(source: str | Path, config: ModelConfig) -> EvaluationRows:
    """The rows of a file or a dataset.

    source: `F.npy`, whole numbers, `[rows, width]` or `[width]`; or the prefix of a .bin/.idx pair,
    of which each document is a row, up to the model's positions.

    Raises FileNotFoundError for what is not there, and ValueError for what cannot be evaluated: ids
    outside the vocabulary, rows that are too long or too short, too many of them.
    """
    source = str(source)
    if source.endswith(".npy"):
        return _rows(_of_file(Path(source)), config, source)
    dataset = open_dataset(source)
    _check_count(len(dataset), source)
    longest = config.max_position_embeddings + 1
    rows = [np.asarray(dataset[i])[:longest] for i in range(len(dataset))]
    return _rows([row for row in rows if len(row) > 1], config, source)


def text_row(text: str, config: ModelConfig, tokenizer: str | Path | Tokenizer) -> EvaluationRows:
    """One row: the tokens of a text.

    Raises ValueError for one that is too long or too short.
    """
    loaded = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(str(tokenizer))
    ids = np.array(loaded.encode(text, add_special_tokens=False).ids, np.int32)
    return _rows([ids], config, f"the text {text!r}")


def _rows(rows: list[NDArray], config: ModelConfig, source: str) -> EvaluationRows:
    """Checked, and filled up."""
    longest = config.max_position_embeddings + 1
    if not rows:
        raise ValueError(f"{source}: holds no row of two tokens or more to evaluate")
    lengths = np.array([len(row) for row in rows], np.int32)
    if lengths.min() < 2 or lengths.max() > longest:
        wrong = int(np.flatnonzero((lengths < 2) | (lengths > longest))[0])
        raise ValueError(
            f"{source}: row {wrong} has {lengths[wrong]} tokens; from 2 to {longest}, one more "
            "than the model's positions, can be evaluated"
        )
    tokens = np.zeros((len(rows), int(lengths.max())), np.int32)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = row
    check_tokens(tokens, config)
    return EvaluationRows(tokens, lengths, source)


@partial(jax.jit, static_argnames=("config", "runtime"))
def _losses(
    params: Params, tokens: jax.Array, lengths: jax.Array, *, config: ModelConfig, runtime: Runtime
) -> jax.Array:
    nll = token_losses(params, tokens, config, runtime=runtime)
    counted = jnp.arange(1, tokens.shape[1]) < lengths[:, None]
    means = jnp.where(counted, nll, 0).sum(axis=1) / jnp.maximum(lengths - 1, 1)
    return sharding.constrain(means, ("layers",))  # whole on every device


def _of_file(path: Path) -> list[NDArray]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        ids = np.load(path)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: no array can be read from it ({error})") from None
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        raise ValueError(
            f"{path}: {ids.dtype.name} of shape {ids.shape}: token ids, [rows, width], are wanted"
        )
    rows = ids.reshape(-1, ids.shape[-1])
    _check_count(len(rows), str(path))
    return list(rows)


def _check_count(count: int, source: str) -> None:
    if count > MOST:
        raise ValueError(
            f"{source}: {count:,} rows, and up to {MOST:,} are evaluated; write those that are "
            "wanted into an .npy file"
        )
