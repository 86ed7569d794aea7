"""Bergson's side of a gradient index: the files that its readers want, and plain copies for it.

Format: Bergson 2.5.1 (data.py, gradients.py, query/), `projection_version` 2. Its Attributor opens
an index of ours as it lies; `bergson query`, which also prints texts and loads a model of
transformers, wants a copy that `export_index` makes.
"""

import errno
import io
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from pythia_jax.configs import ModelConfig, RunConfig
from pythia_jax.interp.index import CHECKS, GRADIENTS, INFO, Index, layout, open_index
from pythia_jax.interp.preflight import check_disk
from pythia_jax.interp.projection import Projection

VERSION = "2.5.1"
"""Of Bergson, whose format this is."""
_BLOCK_BYTES = 2**26
_PTH = ("normalizers.pth", "hessians.pth", "hessians_eigen.pth")
TEXTS = "texts.jsonl"


def files(
    config: ModelConfig, projection: Projection | None, rows: int, dtype: np.dtype
) -> dict[str, bytes]:
    """What lies beside gradients.bin: name → content. `config.yaml` is another (`run_file`)."""
    modules, _ = layout(config, projection)
    info = {
        "attribute_tokens": False,
        "num_items": rows,
        "num_grads": rows,
        "grad_sizes": {name: place.stop - place.start for name, place in modules.items()},
        "base_dtype": dtype.name,
    }
    processor = {
        "projection_dim": None if projection is None else projection.dimension,
        "reshape_to_square": False,
        "projection_type": "rademacher",
        "projection_target": "per_module",
        "projection_scale": "jl",
        "include_bias": False,
        "projection_seed": None if projection is None else projection.seed,
        "projection_version": 2,
    }
    return {
        INFO: json.dumps(info, indent=2).encode(),
        "processor_config.yaml": yaml.safe_dump(processor, sort_keys=False).encode(),
        **{name: _empty_pth(name) for name in _PTH},
    }


def run_file(
    folder: Path, model: str, projection: Projection | None, texts: Path | None = None
) -> bytes:
    """`config.yaml`, by which `bergson query` finds the model and the texts."""
    found: dict[str, Any] = {
        "run_path": str(folder.absolute()),
        "model": model,
        "projection_dim": 0 if projection is None else projection.dimension,
    }
    if projection is not None and projection.seed is not None:
        found["projection_seed"] = projection.seed
    if texts is not None:
        found["data"] = {"dataset": str(texts.absolute()), "split": "train"}
    steps = [{"build": {"index_cfg": found, "preprocess_cfg": {}}}]
    about = {"steps": steps, "metadata": {"bergson_version": VERSION}}
    return yaml.safe_dump(about, sort_keys=False).encode()


def model_of(computed: Mapping[str, Any]) -> str:
    """What `config.yaml` calls the model, by what an index was computed with."""
    opened = computed["opened"]
    return computed["source"] if opened is None else opened["path_or_id"]


def check(index: Index, *, show_progress: bool = True) -> None:
    """Read a whole index, and hold it against what was written down of it.

    Raises ValueError, naming the row, where bytes have changed, a number is not finite, a row is
    there twice, or Bergson's files do not say what ours do.
    """
    dtype = index.gradients.dtype
    wanted = files(index.model_config, index.projection, len(index), dtype)
    for name, content in wanted.items():
        there = index.folder / name
        if not there.exists() or there.read_bytes() != content:
            raise ValueError(f"{there}: is not what the index is, by its provenance.json")
    keys = np.unique(np.array(index.rows[["step", "slot", "start", "stop"]]))
    if len(keys) != len(index):
        raise ValueError(f"{index.folder / 'rows.npy'}: some rows are there twice")
    checks = np.load(index.folder / CHECKS)
    if checks.shape != (len(index),):
        raise ValueError(f"{index.folder / CHECKS} is damaged")
    block = max(1, _BLOCK_BYTES // (index.gradients.shape[1] * dtype.itemsize))
    with tqdm(total=len(index), unit=" rows", desc="checking", disable=not show_progress) as bar:
        for start in range(0, len(index), block):
            part = np.ascontiguousarray(index.gradients[start : start + block])
            for row, octets in enumerate(part.view(np.uint8), start):
                if zlib.crc32(octets.data) != checks[row]:
                    raise ValueError(
                        f"{index.folder}: row {row} ({index.name_of(row)}) is damaged: its bytes "
                        "are not those that were written; build the index again"
                    )
            bad = np.flatnonzero(~np.isfinite(part).all(axis=1))
            if bad.size:
                row = start + int(bad[0])
                raise ValueError(
                    f"{index.folder}: row {row} ({index.name_of(row)}) holds a number that is "
                    "not finite"
                )
            bar.update(len(part))


def export_index(
    folder: str | os.PathLike[str],
    to: str | os.PathLike[str] | None = None,
    *,
    model: str | None = None,
    data: RunConfig | None = None,
    show_progress: bool = True,
) -> Path:
    """Check an index, and make of it a folder of Bergson's own files alone, if `to` names one.

    Its gradients are a hard link where `to` is on the same disk, else a copy. With the texts of
    its rows (where tokens can be read and a tokenizer is known) `bergson query` works on it.

    model: what its config.yaml calls the model, a folder of transformers or a name on the hub; None
        is where the index's came from. data: the run, where its data has moved.

    Raises as `check` and `open_index` do; FileExistsError if `to` is there.
    """
    index = open_index(folder)
    check(index, show_progress=show_progress)
    if to is None:
        return index.folder
    out = Path(to)
    if out.exists():
        raise FileExistsError(f"{out}: there already; name a folder that is not")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        _write(index, partial, out, model, data, show_progress)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def _write(
    index: Index,
    partial: Path,
    out: Path,
    model: str | None,
    data: RunConfig | None,
    show_progress: bool,
) -> None:
    from pythia_jax.interp.passages import Passages

    link_or_copy(index.folder / GRADIENTS, partial / GRADIENTS)
    dtype, projection = index.gradients.dtype, index.projection
    made = files(index.model_config, projection, len(index), dtype)
    passages = Passages(index, data=data, needed=False)
    if passages.readable:
        with (partial / TEXTS).open("w", encoding="utf-8") as file:
            rows = tqdm(range(len(index)), unit=" rows", desc="texts", disable=not show_progress)
            for row in rows:
                file.write(json.dumps({"text": passages.text(row)}, ensure_ascii=False) + "\n")
    texts = out / TEXTS if passages.readable else None
    computed = index.provenance["computed"]
    made["config.yaml"] = run_file(out, model or model_of(computed), projection, texts)
    for name, content in made.items():
        (partial / name).write_bytes(content)


def link_or_copy(source: Path, target: Path, *, link: Callable = os.link) -> None:
    """A hard link, or, on another disk or one without links, a copy."""
    try:
        link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        check_disk(target, source.stat().st_size, "the copy")
        shutil.copyfile(source, target)


def _empty_pth(name: str) -> bytes:
    """An empty dict, as torch saves it."""
    stem = name.removesuffix(".pth")
    out = io.BytesIO()
    entries: Mapping[str, bytes] = {
        "data.pkl": b"\x80\x02}.",
        "byteorder": b"little",
        "version": b"3\n",
    }
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for entry, content in entries.items():
            # Without a date of its own the file is the same whenever it is made.
            archive.writestr(zipfile.ZipInfo(f"{stem}/{entry}"), content)
    return out.getvalue()
