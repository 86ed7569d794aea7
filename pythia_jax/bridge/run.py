"""Our own run folders as models: parameters from Orbax, config and tokenizer from beside them."""

from pathlib import Path

from jax.typing import DTypeLike

from pythia_jax import configs
from pythia_jax.bridge.model import Model
from pythia_jax.configs import ConfigError
from pythia_jax.training.checkpoints import load_params


def is_run_folder(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def load(folder: Path, step: int | None, dtype: DTypeLike) -> Model:
    """The model of a run at a step (the newest if None).

    Raises ConfigError for a config without a model and FileNotFoundError for a missing step or
    tokenizer.
    """
    config = configs.load(folder / "config.yaml")
    if config.model is None:
        raise ConfigError(f"{folder / 'config.yaml'}: model: missing")
    step, params = load_params(folder, config, step, dtype)
    return Model(
        params=params,
        config=config.model,
        tokenizer_files=_tokenizer_files(config.tokenizer),
        source=f"{folder} step {step}",
    )


def _tokenizer_files(tokenizer: str | None) -> dict[str, bytes]:
    if tokenizer is None:
        return {}
    path = Path(tokenizer)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the run's tokenizer is not there (config key tokenizer)")
    return {"tokenizer.json": path.read_bytes()}
