"""Factors of a model's curvature, module by module, fitted to a stream of rows; their files.

Of a linear module with inputs a, cotangents g of its outputs and a row's gradient G = Σ_t a_t g_tᵀ
(its bias is one more input that is always 1), with means over all tokens or all rows:

- `kfac`: A = mean of a aᵀ and S = mean of g gᵀ over tokens; the Fisher matrix of a token is taken
  for A ⊗ S (Martens and Grosse, 2015).
- `ekfac`: the same bases of eigenvectors, and in them the true second moments over rows,
  Λ = mean of (Q_Aᵀ G Q_S)² (George et al., 2018; Grosse et al., 2023).
- `autocorrelation`: R = mean of φ φᵀ over rows, of projected gradients φ (Chang et al., 2024).
- `diagonal`: the mean of G² over rows.

The Fisher matrix is of labels drawn from the model; with the labels of the data it is the
"empirical" one. K-FAC's scale is that of a token, the others' that of a row, as in kronfluence.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

import pythia_jax
from pythia_jax import sharding
from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.interp import preflight
from pythia_jax.interp.collecting import LINEAR
from pythia_jax.interp.factor_sums import (
    Rows,
    covariances,
    projected_moments,
    sample_labels,
    squares,
    squares_in_basis,
    summed,
)
from pythia_jax.interp.projection import Projection, matrices, module_name
from pythia_jax.model.parameters import Params

__all__ = ["Factors", "Method", "about", "fit_factors", "load", "sample_labels", "save"]

log = logging.getLogger(__name__)

Method = Literal["kfac", "ekfac", "autocorrelation", "diagonal"]
ABOUT = "factors.json"


@struct.dataclass
class Factors:
    """What `precondition` needs, by module, arrays with a leading layer axis where it has layers.

    method: that of `fit_factors`, or `adam` (`pythia_jax.interp.preconditioning.adam_factors`).
    modules: of `kfac` and `ekfac`, `activation_values [in + 1]`, `activation_vectors
        [in + 1, in + 1]` (columns; the last row is the bias's), `gradient_values [out]`,
        `gradient_vectors [out, out]`, and of `ekfac` `squares [in + 1, out]` besides; of
        `autocorrelation`, `values [p²]` and `vectors [p², p²]`; of `diagonal` and `adam`, one
        array a parameter, named and shaped as it is.
    rows, tokens: that the means are over. empirical: whether with the labels of the data.
    projection: of `autocorrelation`. eps: of `adam`, added to the square root.
    """

    modules: dict[str, dict[str, Any]]
    method: str = struct.field(pytree_node=False)
    rows: int = struct.field(pytree_node=False, default=0)
    tokens: int = struct.field(pytree_node=False, default=0)
    empirical: bool = struct.field(pytree_node=False, default=False)
    projection: Projection | None = struct.field(pytree_node=False, default=None)
    eps: float = struct.field(pytree_node=False, default=0.0)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Paths of the parameters that the factors are of: `per_example_gradients(parameters=)`."""
        if self.method in ("diagonal", "adam"):
            return tuple(f"{module}/{leaf}" for module, of in self.modules.items() for leaf in of)
        leaves = ("kernel",) if self.method == "autocorrelation" else ("kernel", "bias")
        return tuple(f"{module}/{leaf}" for module in self.modules for leaf in leaves)

    def covariances(self, module: str) -> tuple[np.ndarray, np.ndarray]:
        """(A, S) of `kfac` and `ekfac`, `[layers, in + 1, in + 1]` and `[layers, out, out]`."""
        of = {name: np.asarray(array) for name, array in self.modules[module].items()}
        activation, gradient = (
            (of[f"{side}_vectors"] * of[f"{side}_values"][:, None])
            @ of[f"{side}_vectors"].swapaxes(-1, -2)
            for side in ("activation", "gradient")
        )
        return activation, gradient


def fit_factors(
    params: Params,
    batches: Rows | Iterable[Rows],
    config: ModelConfig,
    *,
    method: Method = "ekfac",
    empirical: bool = False,
    key: jax.Array | None = None,
    projection: Projection | None = None,
    modules: Sequence[str] = LINEAR,
    runtime: Runtime = Runtime(),
) -> Factors:
    """Factors of the linear modules of the layers, from batches that are gone through one by one.

    batches: a batch `[batch, seq + 1]` or many of them; `ekfac` goes through them twice. The loss
    is summed over a row, in nats, and every token counts. Batches of one size compile once.
    empirical: the labels of the data (the usual choice of `autocorrelation`); otherwise labels are
    drawn from the model, with `key`: batch n's with `fold_in(key, n)` (`sample_labels`).
    projection: of `autocorrelation`; `Projection()` if left out.

    Sums are float32 (float64 of float64 parameters), on a mesh cut over `fsdp`; eigenvectors are
    found on the host in float64, a module of one layer at a time, and the factors stay there. The
    smallest eigenvalue of each module is logged: far below 0 it would mean that sums overflowed.
    Besides sums and eigenvectors, one module's gradients of a batch's rows exist at a time.

    Raises ValueError for options that do not go together, batches that do not fit or cannot be
    gone through twice, and for sums that are not finite or all zero, with their module.
    """
    _check(method, empirical, key, projection, batches, modules)
    walked: Iterable[Rows] = [batches] if getattr(batches, "ndim", None) == 2 else batches  # type: ignore[assignment]
    sums_of = partial(
        summed,
        params,
        walked,
        config,
        modules=tuple(modules),
        key=None if empirical else key,
        runtime=runtime,
    )
    found: dict[str, dict[str, Any]]
    if method == "diagonal":
        sums, rows, tokens = sums_of(squares)
        found = {module: _means(sums[module], rows, module) for module in modules}
    elif method == "autocorrelation":
        projection = projection or Projection()
        sides = {module: matrices(projection, config)[module] for module in modules}
        sums, rows, tokens = sums_of(projected_moments, aux=sides)
        found = {m: _eigen(sums[m]["projected"], m, "projected", rows) for m in modules}
    else:
        sums, rows, tokens = sums_of(covariances)
        found = {module: _bases(sums[module], module, tokens) for module in modules}
        if method == "ekfac":
            aux = {module: _aux(of) for module, of in found.items()}
            sums, *_ = sums_of(squares_in_basis, aux=aux)
            for module, of in found.items():
                of |= _means(sums[module], rows, module)
    return Factors(found, method, rows, tokens, empirical, projection)


def _check(
    method: str, empirical: bool, key: Any, projection: Any, batches: Any, modules: Sequence[str]
) -> None:
    if method not in get_args(Method):
        raise ValueError(f"method={method!r}: choose from {', '.join(get_args(Method))}")
    if empirical == (key is not None):
        raise ValueError(
            "labels are drawn from the model with key=jax.random.key(…), or are those of the data "
            "with empirical=True: give one of the two"
        )
    if projection is not None and method != "autocorrelation":
        raise ValueError(f"projection goes with method='autocorrelation', not {method!r}")
    if method == "ekfac" and iter(batches) is batches:
        raise ValueError("ekfac goes through the batches twice: give a list of them, or Batches")
    for module in modules:
        if module not in LINEAR:
            raise ValueError(f"no factors of {module!r}: choose from {', '.join(LINEAR)}")
    if jax.process_count() > 1:
        raise ValueError("factors are fitted by one process, with all of its devices")


# From sums to bases, on the host.


def _means(sums: dict[str, jax.Array], rows: int, module: str) -> dict[str, np.ndarray]:
    found = {}
    for name, array in sums.items():
        mean = np.asarray(array)
        for layer, own in enumerate(mean):
            _check_sums(own, f"mean of squared gradients of {module_name(module, layer)}")
        found[name] = mean / np.asarray(rows, mean.dtype)
    return found


def _bases(sums: dict[str, jax.Array], module: str, tokens: int) -> dict[str, np.ndarray]:
    """Eigenvalues and eigenvectors of A and S, layer by layer."""
    found = {}
    for side in ("activation", "gradient"):
        ones = sums["activation_sum"] if side == "activation" else None
        made = _eigen(sums[side], module, side, tokens, ones)
        found |= {f"{side}_{name}": array for name, array in made.items()}
    return found


def _eigen(
    sums: jax.Array, module: str, what: str, count: int, ones: jax.Array | None = None
) -> dict[str, np.ndarray]:
    """`values` and `vectors` of each layer's mean, a bias's row and column of `ones` put on."""
    values, vectors = [], []
    layers = tqdm(range(sums.shape[0]), f"{module}: {what}", leave=False, disable=None)
    for layer in layers:
        matrix = np.asarray(sums[layer], np.float64)
        if ones is not None:
            last = np.asarray(ones[layer], np.float64)[:, None]
            matrix = np.block([[matrix, last], [last.T, np.full((1, 1), float(count))]])
        name = module_name(module, layer)
        found = _eigh(matrix / count, f"{what} covariance of {name}")
        values.append(found[0].astype(sums.dtype))
        vectors.append(found[1].astype(sums.dtype))
    lowest = [own[0] / own[-1] for own in values]
    log.info("%s, %s: smallest eigenvalue %.1e of the largest", module, what, min(lowest))
    return {"values": np.stack(values), "vectors": np.stack(vectors)}


def _eigh(matrix: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    _check_sums(matrix, name)
    return np.linalg.eigh((matrix + matrix.T) / 2)


def _check_sums(array: np.ndarray, name: str) -> None:
    if not np.isfinite(array).all():
        raise ValueError(
            f"the {name} is not finite: a row's gradient is not, or the compute dtype is too "
            "narrow; pythia_jax.interp.gradient_norms names the row"
        )
    if not array.any():
        raise ValueError(f"the {name} is all zero: the gradient does not reach it, or underflows")


def _aux(bases: dict[str, np.ndarray]) -> dict[str, Any]:
    """Eigenvectors on the devices, on a mesh cut over `fsdp`."""
    vectors = bases["activation_vectors"]
    cut = {"kernel": vectors[:, :-1], "gradient": bases["gradient_vectors"]}
    placed = {name: _placed(array) for name, array in cut.items()}
    return {**placed, "bias": jnp.asarray(vectors[:, -1])}


def _placed(array: np.ndarray) -> Any:
    mesh = sharding.current()
    if mesh is None or array.shape[1] % mesh.shape["fsdp"]:
        return jnp.asarray(array)
    place = sharding.sharding(jax.sharding.get_mesh(), ("layers", "hidden", "stream"))
    return jax.device_put(array, place)


# Files.


def save(
    factors: Factors, folder: str | Path, *, provenance: Mapping[str, Any] | None = None
) -> None:
    """Write a folder: `factors.json`, and a safetensors file for each layer of each module.

    Arrays are brought to the host one layer of a module at a time. provenance: what else
    `factors.json` is to tell: model, hash of its weights, data. The folder appears when it is
    complete.

    Raises FileExistsError where there is something already.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder}: is there already; choose another place for the factors")
    told = {
        "method": factors.method,
        "rows": factors.rows,
        "tokens": factors.tokens,
        "empirical": factors.empirical,
        "projection": factors.projection and asdict(factors.projection),
        "eps": factors.eps,
        "modules": {
            module: {name: list(np.shape(array)) for name, array in of.items()}
            for module, of in factors.modules.items()
        },
        "smallest_eigenvalues": {
            f"{module}: {name}": float(np.min(np.asarray(array)[..., 0]))
            for module, of in factors.modules.items()
            for name, array in of.items()
            if name.endswith("values")
        },
        "versions": {"pythia_jax": pythia_jax.__version__, "jax": jax.__version__},
        "provenance": dict(provenance or {}),
    }
    text = json.dumps(told, indent=2) + "\n"
    partial_folder = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial_folder.mkdir(parents=True)
    try:
        for module, of in factors.modules.items():
            for name, layer in _files(module, of):
                own = {k: np.asarray(a if layer is None else a[layer]) for k, a in of.items()}
                save_file(own, partial_folder / name, metadata={"method": factors.method})
        (partial_folder / ABOUT).write_text(text)
        partial_folder.rename(folder)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def load(folder: str | Path) -> Factors:
    """Factors that `save` wrote, on the host.

    Raises FileNotFoundError where there are none, ValueError for files that are not whole, and
    MemoryError with the numbers for more than there is room for.
    """
    folder = Path(folder)
    told = about(folder)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    preflight.check_host(size, f"{folder}: these factors")
    modules: dict[str, dict[str, Any]] = {}
    for module, shapes in told["modules"].items():
        layers = []
        for name, layer in _files(module, shapes):
            own = load_file(folder / name)
            for array, shape in shapes.items():
                wanted = shape if layer is None else shape[1:]
                if array not in own or list(own[array].shape) != wanted:
                    raise ValueError(f"{folder / name}: {array} is not there in the shape {wanted}")
            layers.append(own)
        stack = np.stack if module.startswith("layers/") else lambda arrays: arrays[0]
        modules[module] = {array: stack([own[array] for own in layers]) for array in shapes}
    projection = told["projection"] and Projection(**told["projection"])
    kept = {name: told[name] for name in ("method", "rows", "tokens", "empirical", "eps")}
    return Factors(modules, projection=projection, **kept)


def about(folder: str | Path) -> dict[str, Any]:
    """What `factors.json` tells of saved factors. Raises FileNotFoundError where there are none."""
    path = Path(folder) / ABOUT
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: holds no factors (there is no {ABOUT} in it)")
    return json.loads(path.read_text())


def _files(module: str, arrays: Mapping[str, Any]) -> list[tuple[str, int | None]]:
    """File names and layers of a module; arrays, or their shapes."""
    if not module.startswith("layers/"):
        return [(f"{module.replace('/', '.')}.safetensors", None)]
    first = next(iter(arrays.values()))
    count = first[0] if isinstance(first, list) else len(first)
    return [(f"{module_name(module, layer)}.safetensors", layer) for layer in range(count)]
