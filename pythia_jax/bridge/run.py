"""Our own run folders as models: parameters from Orbax, config and tokenizer from beside them."""

import logging
from pathlib import Path

from jax.typing import DTypeLike

from pythia_jax import configs
from pythia_jax.bridge.model import Model
from pythia_jax.configs import ConfigError
from pythia_jax.training.checkpoints import load_params

log = logging.getLogger(__name__)


def is_run_folder(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def load(folder: Path, step: int | None, dtype: DTypeLike) -> Model:
    """The model of a run at a step (the newest if None).

    Raises ConfigError for a config without a model and FileNotFoundError for a missing step. A
    missing tokenizer is told in the log: the weights are there all the same.
    """
    config = configs.load(folder / "config.yaml")
    if config.model is None:
        raise ConfigError(f"{folder / 'config.yaml'}: model: missing")
    step, params = load_params(folder, config, step, dtype)
    return Model(
        params=params,
        config=config.model,
        tokenizer_files=_tokenizer_files(folder, config.tokenizer),
        source=f"{folder} step {step}",
    )


def _tokenizer_files(folder: Path, tokenizer: str | None) -> dict[str, bytes]:
    # The run's own copy first: the path in its config may be relative to where it was trained.
    places = [folder / "tokenizer.json"]
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
            *places,
        )
    return {}
