"""Values of checkpoints in a folder, one file each: what is there need not be computed again.

`OUT/about.json` says what they are values of, `OUT/steps/N.npz` holds those of step N with the hash
of the weights, and `OUT/curves.npz` all of them stacked, once all are there.
"""

import dataclasses
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pythia_jax.configs import ModelConfig
from pythia_jax.files import write_whole
from pythia_jax.interp import result_folder
from pythia_jax.interp.streaming import Stream
from pythia_jax.model import parameters
from pythia_jax.model.parameters import Params
from pythia_jax.training.pod import is_first

Shapes = dict[str, list[Any]]
_AWAY = "choose another folder, or move this one away"
_ABOUT = "about"
"""Name, among the arrays of a file, of what they belong to."""


class Kept:
    """The values of one function at one model's checkpoints, in a folder."""

    def __init__(self, folder: Path, name: str, stream: Stream) -> None:
        self.folder = folder
        self._name, self._stream = name, stream
        self._about = self._read_about()

    def check(self, shapes: Callable[[ModelConfig, Params], Shapes]) -> None:
        """Refuse a folder that holds something else. Nothing is written.

        shapes: what the function gives for a config and abstract parameters.

        Raises ValueError, which says what differs.
        """
        if self._about is None:
            return
        about = self._about
        for key, now in (("name", self._name), ("model", self._stream.name)):
            if about[key] != now:
                raise ValueError(f"{self.folder}: holds {key} {about[key]!r}, not {now!r}; {_AWAY}")
        config = ModelConfig(**about["config"])
        found = shapes(config, parameters.abstract(config))
        if found != about["shapes"]:
            raise ValueError(
                f"{self.folder}: holds values of shapes {about['shapes']}, and wanted are {found}; "
                f"{_AWAY}"
            )
        source = self._stream.source
        if source is not None:
            there = None if source.remote else set(source.there())
            for path in self._files():
                if there is None or int(path.stem) in there:
                    self.read(int(path.stem), source.weights(int(path.stem)))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Only this call writes here, as `result_folder.alone`. Makes the folder."""
        if is_first():
            (self.folder / "steps").mkdir(parents=True, exist_ok=True)
        with result_folder.alone(self.folder):
            if is_first():
                for left in (self.folder / "steps").glob(".*.partial"):
                    left.unlink()  # by a process that was killed
            yield

    def read(self, step: int, weights: str | None = None) -> tuple[list[np.ndarray], str] | None:
        """The values of a step and the hash of its weights; None if they are not there.

        weights: their hash, where it is known; else they must be of the same source.

        Raises ValueError for values of other weights.
        """
        path = self._path(step)
        if self._about is None or not path.is_file():
            return None
        try:
            with np.load(path) as file:
                about = json.loads(str(file[_ABOUT]))
                values = [file[_key(i)] for i in range(len(self._about["shapes"]))]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: cannot be read ({error}); delete it") from None
        source = self._stream.source
        if weights is None and source is not None and source.remote is False:
            weights = source.weights(step)
        if weights is not None and about["weights"] != weights:
            raise ValueError(f"{path}: of other weights, those of {about['source']}; {_AWAY}")
        if weights is None and source is not None and about["source"] != source.called(step):
            called = source.called(step)
            raise ValueError(f"{path}: of {about['source']}, not of {called}; {_AWAY}")
        return values, about["weights"]

    def begin(self, config: ModelConfig, shapes: Shapes) -> None:
        """Say what the values are, before the first of them."""
        about = {
            "name": self._name,
            "model": self._stream.name,
            "config": dataclasses.asdict(config),
            "shapes": shapes,
        }
        if self._about is None and is_first():
            write_whole(self.folder / "about.json", json.dumps(about, indent=1).encode())
        self._about = self._about or about
        if self._about["config"] != about["config"]:
            raise ValueError(f"{self.folder}: holds values of another config; {_AWAY}")

    def write(self, step: int, values: Sequence[np.ndarray], weights: str, source: str) -> None:
        if not is_first():
            return
        about = json.dumps({"step": step, "source": source, "weights": weights})
        arrays = {_key(i): value for i, value in enumerate(values)}
        write_whole(self._path(step), _npz({_ABOUT: np.array(about), **arrays}))

    def finish(self, steps: Sequence[int], columns: Sequence[np.ndarray]) -> None:
        """All of them in one file, for whatever reads NumPy's."""
        if not is_first():
            return
        assert self._about is not None
        # So that none is called steps.
        names = [f"values/{name}" if name else "values" for name in self._about["shapes"]]
        arrays = dict(zip(names, columns, strict=True))
        write_whole(self.folder / "curves.npz", _npz({"steps": np.array(steps), **arrays}))

    def _read_about(self) -> dict[str, Any] | None:
        path = self.folder / "about.json"
        if path.is_file():
            try:
                about = json.loads(path.read_bytes())
                return {key: about[key] for key in ("name", "model", "config", "shapes")}
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}: is not of values over checkpoints; {_AWAY}") from None
        if self.folder.exists() and (not self.folder.is_dir() or self._strange()):
            raise ValueError(f"{self.folder}: holds something else; {_AWAY}")
        return None

    def _strange(self) -> bool:
        return bool({path.name for path in self.folder.iterdir()} - {"steps"})

    def _files(self) -> list[Path]:
        return sorted(path for path in (self.folder / "steps").glob("*.npz"))

    def _path(self, step: int) -> Path:
        return self.folder / "steps" / f"{step}.npz"


def _key(index: int) -> str:
    return f"value_{index}"


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()
