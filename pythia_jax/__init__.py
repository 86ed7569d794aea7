"""pythia_jax: EleutherAI's Pythia in JAX, as pure functions over one tree of parameters.

Names of dimensions, everywhere: `batch` rows of a batch, `seq` positions, `layer`, `hidden` the
residual stream, `heads` and `head` (the size of one), `mlp` the inner width, `vocab`. Token
arrays are `[batch, seq + 1]`, inputs and labels in one, except for `forward`, which takes
`[batch, seq]`. Losses are in nats. Steps and rows count from 0.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pythia_jax import data, interp
    from pythia_jax.bridge import load, save_hf
    from pythia_jax.bridge.model import Model
    from pythia_jax.bridge.quantize import quantize
    from pythia_jax.configs import ModelConfig, RunConfig, Runtime
    from pythia_jax.configs import load as load_config
    from pythia_jax.model.generation import generate
    from pythia_jax.model.gptneox import forward
    from pythia_jax.model.loss import loss, token_losses
    from pythia_jax.model.parameters import init_parameters

__version__ = "0.1.0"

# Imported when first asked for, so that data and configs can be used without importing jax.
_HOMES = {
    "data": ("pythia_jax.data", None),
    "load": ("pythia_jax.bridge", "load"),
    "save_hf": ("pythia_jax.bridge", "save_hf"),
    "Model": ("pythia_jax.bridge.model", "Model"),
    "quantize": ("pythia_jax.bridge.quantize", "quantize"),
    "ModelConfig": ("pythia_jax.configs", "ModelConfig"),
    "RunConfig": ("pythia_jax.configs", "RunConfig"),
    "Runtime": ("pythia_jax.configs", "Runtime"),
    "load_config": ("pythia_jax.configs", "load"),
    "generate": ("pythia_jax.model.generation", "generate"),
    "forward": ("pythia_jax.model.gptneox", "forward"),
    "interp": ("pythia_jax.interp", None),
    "loss": ("pythia_jax.model.loss", "loss"),
    "token_losses": ("pythia_jax.model.loss", "token_losses"),
    "init_parameters": ("pythia_jax.model.parameters", "init_parameters"),
}

__all__ = [
    "Model",
    "ModelConfig",
    "RunConfig",
    "Runtime",
    "data",
    "forward",
    "generate",
    "init_parameters",
    "interp",
    "load",
    "load_config",
    "loss",
    "quantize",
    "save_hf",
    "token_losses",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pythia_jax' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    imported = importlib.import_module(module)
    return imported if attribute is None else getattr(imported, attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
