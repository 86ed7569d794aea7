"""The tokens of training that the rows of an index are of, read again from the run's data."""

import logging
import os

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pythia_jax import configs
from pythia_jax.bridge.model import tokenizer_of
from pythia_jax.configs import RunConfig
from pythia_jax.data import Batches, batches
from pythia_jax.interp import training_rows
from pythia_jax.interp.index import Index
from pythia_jax.interp.result_folder import RUN

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer.json"


class Passages:
    """Tokens and texts of an index's rows.

    data: the run, where its data is not where it was. needed: whether to raise where tokens cannot
    be read; otherwise `readable` is false, and the log says why.

    Raises FileNotFoundError and ValueError where the data is gone, or is not the index's.
    """

    def __init__(self, index: Index, *, data: RunConfig | None = None, needed: bool = True) -> None:
        self._index = index
        self._served: Batches | None = None
        try:
            self._served = _served(index, data)
        except (OSError, ValueError) as error:
            if needed or data is not None:
                raise
            log.warning("%s: the tokens of its rows cannot be read: %s", index.folder, error)
        self.tokenizer = saved_tokenizer(index)
        if self.tokenizer is None and not needed:
            log.warning("%s: came without a tokenizer: there is no text", index.folder)

    @property
    def readable(self) -> bool:
        """Whether there is text."""
        return self._served is not None and self.tokenizer is not None

    def sequence(self, row: int) -> NDArray[np.int32]:
        """The whole sequence that a row is part of, int32 `[seq + 1]`."""
        assert self._served is not None
        key = self._index.rows[row]
        return self._served.read(int(key["step"]), [int(key["slot"])])[0]

    def tokens(self, row: int) -> NDArray[np.int32]:
        """The row's own tokens, int32 `[n]`."""
        key = self._index.rows[row]
        return self.sequence(row)[key["start"] : key["stop"]]

    def documents(self, row: int) -> list[int]:
        """The documents that a row has tokens of, in reading order; empty where they are not known.

        Each is its number in its path of the split.
        """
        key = self._index.rows[row]
        if key["documents"] < 2:
            return [int(key["document"])] if key["documents"] else []
        if self._served is None:
            return []
        return self._served.pieces(int(key["step"]), [int(key["slot"])]).document.tolist()

    def text(self, row: int) -> str:
        assert self.tokenizer is not None
        return self.tokenizer.decode(self.tokens(row).tolist(), skip_special_tokens=False)


def saved_tokenizer(index: Index) -> Tokenizer | None:
    """That of the model, or of the run, that the index was built with."""
    path = index.folder / TOKENIZER
    return tokenizer_of({TOKENIZER: path.read_bytes()}) if path.exists() else None


def _served(index: Index, data: RunConfig | None) -> Batches:
    config = configs.load(index.folder / RUN) if data is None else data
    served = batches(config)
    start, stop = index.settings["steps"]
    if stop > len(served) or training_rows.digest(served, start, stop) != index.settings["rows"]:
        raise ValueError(
            f"{served.source}: these are not the rows that {os.fspath(index.folder)} was built "
            "from: other data, or another order (data.seed, training.steps, batch_size)"
        )
    return served
