"""What is brought to a machine: code, config, and the versions of libraries to install."""

import gzip
import importlib.metadata
import io
import re
import tarfile
import tomllib
from pathlib import Path

from launch.commands import ROOT

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "pythia_jax", "configs", "launch/worker")


def packed(config: Path) -> bytes:
    """Code, CONFIG and constraints as a .tar.gz; of the same files the same bytes."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if "__pycache__" in entry.name:
            return None
        entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname = 0, 0, 0, "", ""
        return entry

    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for source in SOURCES:
            archive.add(ROOT / source, source, filter=plain)
        archive.add(config, "config.yaml", filter=plain)
        pins = constraints().encode()
        entry = tarfile.TarInfo("constraints.txt")
        entry.size = len(pins)
        archive.addfile(entry, io.BytesIO(pins))
    return gzip.compress(raw.getvalue(), mtime=0)


def constraints() -> str:
    """The versions of our dependencies that this machine has, in pip's words.

    A slice made again days later gets the same, so that the run goes on bit for bit.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [re.split(r"[^\w.-]", wanted)[0] for wanted in project["dependencies"]]
    lines = [f"{name}=={importlib.metadata.version(name)}" for name in sorted([*names, "jaxlib"])]
    return "\n".join(lines) + "\n"
