"""Bergson's index of the small model: run in the peers' environment by `remake.py`.

    python with_bergson.py MODEL OUT.npz

MODEL is a folder of transformers with a tokenizer. Bergson is run by its own command.
"""

# pyright: reportMissingImports=false
# These are in the peers' environment, not in ours.

import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import case
import numpy as np
from bergson.__main__ import main as bergson
from bergson.collector.collector import create_projection_matrix
from bergson.data import load_gradients
from datasets import Dataset, load_from_disk
from torch import device, float32

RUNS = {
    # A projected row is 8 kB here, a raw one 98 kB, a row by token 12 kB: so few raw ones.
    "projected": (4, ["--projection_dim", "16"]),
    "seeded": (1, ["--projection_dim", "5", "--projection_seed", "7"]),
    "mean": (1, ["--projection_dim", "16", "--loss_reduction", "mean"]),
    "raw": (1, ["--projection_dim", "0"]),
    "tokens": (1, ["--projection_dim", "4", "--attribute_tokens", "True"]),
}
"""Rows and settings of each."""
MATRICES = (("layers.0.mlp.dense_h_to_4h/left", 16, 128), ("layers.1.attention.dense/right", 5, 32))
SMALL = ("info.json", "processor_config.yaml")


def build(model: str, folder: Path, rows: int, settings: list[str]) -> Path:
    ids = case.tokens("rows", 4)[:rows].tolist()
    data = Dataset.from_dict({"input_ids": ids, "text": [str(i) for i in range(rows)]})
    data.save_to_disk(str(folder / "rows"))
    where = [str(folder / "index"), "--model", model, "--dataset", str(folder / "rows")]
    # As from the command line, but in this process: the imports take longer than all the rest.
    command = ["bergson", "build", *where, "--token_batch_size", str(case.POSITIONS), *settings]
    with mock.patch.object(sys, "argv", command):
        bergson()
    return folder / "index"


def main(model: str, out: str) -> None:
    found: dict[str, Any] = {}
    for name, (rows, settings) in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            index = build(model, Path(folder), rows, settings)
            found[name] = np.array(load_gradients(index))
            if name == "tokens":
                found["tokens.offsets"] = np.load(index / "offsets.npy")
            found[f"{name}.loss"] = np.array(load_from_disk(str(index / "data.hf"))["loss"])
            for file in SMALL:
                found[f"{name}.{file}"] = np.array((index / file).read_text())
            found[f"{name}.files"] = np.array(json.dumps(sorted(p.name for p in index.iterdir())))
    for identifier, rows, columns in MATRICES:
        for seed in (None, 7):
            name = identifier if seed is None else f"{identifier}/seed{seed}"
            matrix = create_projection_matrix(
                name, rows, columns, float32, device("cpu"), "rademacher", "jl"
            )
            found[f"matrix {name}"] = matrix.numpy()
    np.savez_compressed(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
