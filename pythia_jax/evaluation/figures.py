"""Pictures as files: which kinds there are, and how all of them are written."""

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from pythia_jax.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = (".png", ".svg")
TABLE = ".csv"


def check(path: str | os.PathLike[str], *, table: bool = False) -> str:
    """The ending of a file's name in small letters: that of a picture or, if asked for, a table.

    Raises ValueError for another, which is best known before anything is computed.
    """
    suffix = Path(path).suffix.lower()
    known = (*PICTURES, TABLE) if table else PICTURES
    if suffix not in known:
        listed = ", ".join(known[:-1])
        raise ValueError(f"{os.fspath(path)}: the name of the file ends in {listed} or {known[-1]}")
    return suffix


def save(figure: "Figure", path: str | os.PathLike[str]) -> None:
    """Write a figure, whole or not at all; the same bytes for the same figure.

    Raises ValueError as `check` does.
    """
    import matplotlib

    kind, picture = check(path)[1:], io.BytesIO()
    # Without the date, and with ids in an SVG that do not depend on chance.
    about = {"Date": None} if kind == "svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": "pythia_jax"}):
        figure.savefig(picture, format=kind, dpi=150, metadata=about)
    write_whole(path, picture.getvalue())
