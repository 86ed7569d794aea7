"""Which per-example gradients are asked for: checked, and made into something static."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pythia_jax.configs import ModelConfig
from pythia_jax.interp.collecting import LINEAR
from pythia_jax.interp.projection import Projection, matrices
from pythia_jax.model.gptneox import AnyArray
from pythia_jax.model.parameters import TABLE
from pythia_jax.model.sinks import Units

Unit = Literal["sequence", "document", "token"]
By = Literal["loss", "position"]
Reduction = Literal["sum", "mean", "train"]
EMBEDDINGS = ("embed_in/embedding", "embed_out/kernel")
PATHS = tuple(parameter.path for parameter in TABLE)


@dataclass(frozen=True)
class Plan:
    """What is computed: static, so that one compiled program serves all calls that want the same.

    paths: parameters, in the table's order. want: gradients, their projections or norms. count:
    documents a row.
    """

    paths: tuple[str, ...]
    want: Literal["gradients", "projections", "squares"]
    unit: Unit
    by: By
    count: int | None

    @property
    def units(self) -> Units:
        """Units that the sums of one backward pass are kept apart by."""
        if self.by == "loss":
            return Units()
        return Units(self.count, each=self.unit == "token")


def plan_of(
    parameters: str | Sequence[str],
    projection: Projection | None,
    unit: Unit,
    by: By,
    documents: AnyArray | None,
    count: int | None,
    tokens: AnyArray,
) -> Plan:
    if (unit == "document") != (documents is not None):
        raise ValueError('documents and unit="document" go together: give both or neither')
    if documents is not None:
        count = _count(documents, count, tokens)
    elif count is not None:
        raise ValueError("document_count is given, and no documents are")
    paths = matching(parameters, projected=projection is not None)
    want = "gradients" if projection is None else "projections"
    return Plan(paths, want, unit, by, count)


def check_choices(unit: str, by: str, reduction: str) -> None:
    choices = (
        ("unit", unit, ("sequence", "document", "token")),
        ("by", by, ("loss", "position")),
        ("reduction", reduction, ("sum", "mean", "train")),
    )
    for name, value, known in choices:
        if value not in known:
            raise ValueError(f"{name}={value!r}: choose from {', '.join(known)}")


def _count(documents: AnyArray, count: int | None, tokens: AnyArray) -> int:
    if not isinstance(documents, np.ndarray | jax.Array):
        told = type(documents).__name__
        raise ValueError(f"documents are a {told}: an array is wanted (np.array)")
    if documents.shape != tokens.shape or not jnp.issubdtype(documents.dtype, jnp.integer):
        raise ValueError(
            f"documents of shape {documents.shape} and dtype {documents.dtype}: whole numbers of "
            f"shape {tokens.shape}, one a token, are wanted"
        )
    try:
        largest = int(np.max(np.asarray(documents), initial=-1)) + 1
    except jax.errors.TracerArrayConversionError:
        if count is None:
            raise ValueError("under jax.jit, documents need document_count") from None
        return count
    if count is not None and largest > count:
        raise ValueError(f"documents go to {largest - 1}: document_count={count} is too small")
    if not largest and not count:
        raise ValueError("documents name none: every token is in document -1")
    return count or largest


def matching(parameters: str | Sequence[str], *, projected: bool = False) -> tuple[str, ...]:
    """Paths of the parameter table that a pattern, or one of several, matches; in its order.

    projected: those whose gradients are projected; of all, the linear modules of the layers.

    Raises ValueError for a pattern without a match, and for none.
    """
    patterns = [parameters] if isinstance(parameters, str) else list(parameters)
    matched: set[str] = set()
    for pattern in patterns:
        found = {path for path in PATHS if fnmatchcase(path, pattern)}
        if projected:
            linear = {f"{module}/kernel" for module in LINEAR}
            found &= linear if pattern == "*" else linear | set(EMBEDDINGS)
        if not found:
            what = "linear module" if projected else "parameter"
            raise ValueError(
                f"parameters={pattern!r} matches no {what}; there are {', '.join(PATHS)}"
            )
        matched |= found
    if not matched:
        raise ValueError("parameters names none")
    return tuple(path for path in PATHS if path in matched)


def sides_of(projection: Projection, config: ModelConfig, paths: tuple[str, ...]) -> dict[str, Any]:
    every = matrices(projection, config)
    return {module_of(path): every[module_of(path)] for path in paths}


def module_of(path: str) -> str:
    return path.rsplit("/", 1)[0]
