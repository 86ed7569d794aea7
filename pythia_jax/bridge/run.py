"""Our own run folders as models: parameters from Orbax, config and tokenizer from beside them."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jax.typing import DTypeLike

from pythia_jax import configs
from pythia_jax.bridge.model import Model
from pythia_jax.configs import ConfigError
from pythia_jax.training.bucket import AnyPath, Bucket
from pythia_jax.training.checkpoints import load_params

log = logging.getLogger(__name__)


def is_run_folder(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def load(folder: AnyPath, step: int | None, dtype: DTypeLike) -> Model:
    """The model of a run at a step (the newest if None), from a run folder here or on a bucket.

    Raises ConfigError for a config without a model and FileNotFoundError for a missing step, or
    where a bucket holds no run. A missing tokenizer is told in the log: the weights are there all
    the same.
    """
    with _at_hand(folder) as here:
        config = configs.load(here / "config.yaml")
        if config.model is None:
            raise ConfigError(f"{folder / 'config.yaml'}: model: missing")
        tokenizer_files = _tokenizer_files(here, config.tokenizer, folder)
    asked, (step, params) = step, load_params(folder, config, step, dtype)
    if asked is None and step == 0:
        log.warning("%s: its newest checkpoint is of step 0, so nothing is trained yet", folder)
    return Model(
        params=params,
        config=config.model,
        tokenizer_files=tokenizer_files,
        source=f"{folder} step {step}",
    )


@contextmanager
def _at_hand(folder: AnyPath) -> Iterator[Path]:
    """A folder of this machine with the small files of a run folder."""
    if isinstance(folder, Path):
        yield folder
        return
    found = Bucket(str(folder)).read_many(["config.yaml", "tokenizer.json"])
    if "config.yaml" not in found:
        raise FileNotFoundError(f"{folder}: there is no run folder (no config.yaml)")
    with tempfile.TemporaryDirectory() as here:
        for name, content in found.items():
            (Path(here) / name).write_bytes(content)
        yield Path(here)


def _tokenizer_files(here: Path, tokenizer: str | None, folder: AnyPath) -> dict[str, bytes]:
    # The run's own copy first: the path in its config may be relative to where it was trained.
    places = [here / "tokenizer.json"]
    if tokenizer is not None:
        named = Path(tokenizer)
        places.append(named / "tokenizer.json" if named.is_dir() else named)
    for path in places:
        if path.is_file():
            return {"tokenizer.json": path.read_bytes()}
    if tokenizer is not None:
        log.warning(
            "%s: loaded without a tokenizer: there is neither %s nor %s (config key tokenizer); "
            "copy the tokenizer to the first to have it",
            folder,
            folder / "tokenizer.json",
            places[1],
        )
    return {}
