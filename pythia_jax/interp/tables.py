"""Tables in files: CSV, and Parquet where pyarrow is installed. Which, the name's end says."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pythia_jax.files import write_whole, written_whole

ENDS = (".parquet", ".csv")


def check(path: Path) -> None:
    """Refuse, before anything is computed, a table that could not be written.

    Raises ValueError for another end of its name, FileNotFoundError for a folder that is not there,
    RuntimeError where Parquet is asked for and pyarrow is missing.
    """
    if path.suffix not in ENDS:
        raise ValueError(f"{path}: end it in {' or '.join(ENDS)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent} to write it in")
    if path.suffix == ".parquet":
        _pyarrow(path)


def write(path: Path, columns: Mapping[str, Any]) -> None:
    """Write columns of equal length, by name. Raises as `check` does."""
    check(path)
    if path.suffix == ".csv":
        write_csv(path, list(columns), zip(*columns.values(), strict=True))
        return
    arrow = _pyarrow(path)
    with written_whole(path) as file:
        arrow.parquet.write_table(arrow.table(dict(columns)), file)


def write_csv(path: Path, columns: Sequence[str], lines: Iterable[Iterable[Any]]) -> None:
    """A table, whole or not at all; numbers with all their digits."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)  # lines end in CR LF, else a CR in a text would not be quoted
    writer.writerow(columns)
    for line in lines:
        writer.writerow([x.item() if isinstance(x, np.generic) else x for x in line])
    write_whole(path, text.getvalue().encode())


def read(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What to call each line of a table in a message, and its values by column.

    Raises FileNotFoundError, and otherwise as `check` does.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    if path.suffix not in ENDS:
        raise ValueError(f"{path}: a table ends in {' or '.join(ENDS)}")
    if path.suffix == ".parquet":
        for number, line in enumerate(_pyarrow(path).parquet.read_table(path).to_pylist()):
            yield f"{path}: row {number}", line
        return
    with path.open(newline="", encoding="utf-8") as file:
        for number, line in enumerate(csv.DictReader(file), 2):
            yield f"{path}: line {number}", line


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise RuntimeError(
            f"{path}: Parquet takes pyarrow, which is not installed: "
            "pip install 'pythia-jax[parquet]', or name a .csv"
        ) from None
    return pyarrow
