"""Gradients made comparable: multiplied by the inverse of a curvature, or taken through Adam."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from pythia_jax.configs import OptimizerConfig, RunConfig
from pythia_jax.interp.factors import Factors
from pythia_jax.interp.gradients import check_finite
from pythia_jax.model.attention import exact
from pythia_jax.model.parameters import TABLE, Params
from pythia_jax.training.optimizer import scale_by_adam
from pythia_jax.training.step import TrainState

DAMPING = 0.1
"""Of the mean eigenvalue of a module: kronfluence's, and Grosse et al.'s (2023)."""


def precondition(
    factors: Factors,
    gradients: Params,
    damping: float | None = None,
    *,
    power: float = -1.0,
) -> Params:
    """(H + damping)^power times each gradient, H the curvature that the factors stand for.

    gradients: a tree as `per_example_gradients` gives it, `[…, layers, in, out]` at a kernel, with
    parameters among `factors.parameters`; K-FAC and EK-FAC want kernel and bias of a module. For
    `autocorrelation`, gradients projected as the factors were. damping: added to every eigenvalue
    of H; a tenth of the mean eigenvalue of the module and layer if left out (of `adam`, the run's
    eps). power: -1, or -1/2, which on both sides of an inner product makes the inverse.

    `adam` divides by sqrt(v) + damping whatever the power is asked to be, so it takes -1 alone.

    Returns a tree like `gradients`, at least float32.

    Raises ValueError for gradients of parameters that the factors do not know, and for a damping
    that is negative or too small to invert the curvature; for a gradient that is no finite number,
    with its row.
    """
    flat = _flat(gradients)
    _check(factors, flat, damping, power)
    check_finite(flat)
    made = _preconditioned(factors, flat, damping, power=float(power))
    told = "the default" if damping is None else damping
    check_finite(
        made,
        "the preconditioned gradient",
        f"the curvature has eigenvalues of 0 or next to it, and damping {told} is too little to "
        "invert them: give more of it",
    )
    return traverse_util.unflatten_dict(made, sep="/")


def adam_factors(state: TrainState, config: RunConfig) -> Factors:
    """Adam's second moments as factors: `precondition` then gives g / (sqrt(v) + eps).

    v is corrected for its bias, as an update does. It is that of gradients in training's units (of
    the mean loss over a whole batch, clipped): take `reduction="train"` or a fixed multiple of it.

    Raises ValueError for a state whose optimizer has seen no gradient.
    """
    adam = _adam(state)
    if int(adam.count) == 0:
        raise ValueError(
            "the optimizer of this state has seen no gradient: take a later checkpoint, or one "
            "with its optimizer's state (archive: state)"
        )
    moments = optax.tree.bias_correction(adam.nu, config.optimizer.betas[1], adam.count)
    found: dict[str, dict[str, Any]] = {}
    for path, value in _flat(moments).items():
        module, _, leaf = path.rpartition("/")
        found.setdefault(module, {})[leaf] = value
    return Factors(found, "adam", eps=config.optimizer.eps)


def adam_updates(state: TrainState, gradients: Params, config: RunConfig) -> Params:
    """What Adam would do with each row's gradient alone, its moments being those of `state`.

    m̂ / (sqrt(v̂) + eps) after one more step of both moments with the gradient, by training's own
    code: before the learning rate and the weight decay, and without the clip. It is what LESS
    takes for the influence of a training row (Xia et al., 2024, §3.1): compare it with plain
    gradients of queries, `pairwise(…, metric="cosine")`. Not linear in the gradient, so its scale
    matters: take `reduction="mean"`, that of a batch of the row alone.

    gradients: a tree with one leading axis, of any of the parameters. Returns a tree like it.

    Raises ValueError for parameters that the state does not have, and what is not finite.
    """
    flat = _flat(gradients)
    adam = _adam(state)
    moments = {name: _flat(tree) for name, tree in (("mu", adam.mu), ("nu", adam.nu))}
    unknown = [path for path in flat if path not in moments["mu"]]
    if unknown:
        raise ValueError(f"the optimizer has no moments of {unknown[0]}")
    own = {name: {path: of[path] for path in flat} for name, of in moments.items()}
    made = _adam_updates(adam._replace(**own), flat, config=config.optimizer)
    check_finite(made)
    return traverse_util.unflatten_dict(made, sep="/")


def _flat(tree: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")


def _adam(state: TrainState) -> Any:
    found = [part for part in state.opt_state if isinstance(part, optax.ScaleByAdamState)]
    if len(found) != 1:
        raise ValueError("the state's optimizer is not training's: it has no moments of Adam's")
    return found[0]


@partial(jax.jit, static_argnames="config")
def _adam_updates(
    adam: Any, gradients: dict[str, Any], *, config: OptimizerConfig
) -> dict[str, Any]:
    # Biases that move several times as far are found in the tree of all parameters, not in a part.
    multiple = config.row_parallel_bias_multiple
    transform = scale_by_adam(replace(config, row_parallel_bias_multiple=1))
    made: Any = jax.vmap(lambda gradient: transform.update(gradient, adam)[0])(gradients)
    summed = {parameter.path for parameter in TABLE if parameter.summed}
    return {path: x * (multiple if path in summed else 1) for path, x in made.items()}


def _check(factors: Factors, flat: dict[str, Any], damping: float | None, power: float) -> None:
    unknown = [path for path in flat if path not in factors.parameters]
    if unknown:
        raise ValueError(
            f"the factors know nothing of {unknown[0]}: take per_example_gradients(…, "
            f"parameters=factors.parameters), which are {', '.join(factors.parameters)}"
        )
    if factors.method in ("kfac", "ekfac"):
        alone = [path for path in flat if f"{_module(path)}/{_other(path)}" not in flat]
        if alone:
            raise ValueError(
                f"{alone[0]} comes without the {_other(alone[0])}: {factors.method} takes both of "
                "a module for one matrix"
            )
    if factors.projection is not None:
        size = factors.projection.dimension
        wrong = [path for path, value in flat.items() if value.shape[-2:] != (size, size)]
        if wrong:
            raise ValueError(
                f"the gradient of {wrong[0]} is not projected to {size} x {size}, as the factors "
                "are: take per_example_gradients(…, projection=factors.projection)"
            )
    if damping is not None and not damping >= 0:
        raise ValueError(f"damping {damping}: 0 or more is wanted")
    if power != -1 and (power != -0.5 or factors.method == "adam"):
        raise ValueError(f"power {power} of {factors.method}: -1 is wanted (or -1/2, but of adam)")


def _module(path: str) -> str:
    return path.rpartition("/")[0]


def _other(path: str) -> str:
    return "bias" if path.endswith("kernel") else "kernel"


@partial(jax.jit, static_argnames="power")
def _preconditioned(
    factors: Factors, flat: dict[str, jax.Array], damping: Any, *, power: float
) -> dict[str, jax.Array]:
    modules: dict[str, dict[str, jax.Array]] = {}
    for path, value in flat.items():
        module, _, leaf = path.rpartition("/")
        wide = jnp.promote_types(value.dtype, jnp.float32)
        modules.setdefault(module, {})[leaf] = value.astype(wide)
    made: dict[str, jax.Array] = {}
    for module, of in modules.items():
        own = factors.modules[module]
        if factors.method in ("kfac", "ekfac"):
            found = _kronecker(own, of, damping, power)
        elif factors.method == "autocorrelation":
            found = _dense(own, of, damping, power)
        elif factors.method == "diagonal":
            found = _diagonal(own, of, damping, power, module.startswith("layers/"))
        else:
            found = _adam_divided(own, of, factors.eps if damping is None else damping)
        made |= {f"{module}/{leaf}": value for leaf, value in found.items()}
    return {path: made[path] for path in flat}


def _kronecker(of: dict[str, Any], gradient: dict[str, Any], damping: Any, power: float) -> Any:
    """Into the basis of eigenvectors, over the damped eigenvalues, and back."""
    joined = jnp.concatenate([gradient["kernel"], gradient["bias"][..., None, :]], axis=-2)
    activation, left = of["activation_vectors"], of["gradient_vectors"]
    if "squares" in of:
        eigenvalues = of["squares"]
    else:
        eigenvalues = of["activation_values"][..., None] * of["gradient_values"][..., None, :]
    product = partial(jnp.einsum, precision=exact(joined))
    turned = product("lik,...lio->...lko", activation, joined)
    turned = product("...lko,lop->...lkp", turned, left)
    turned = turned * _powered(eigenvalues, damping, power)
    turned = product("lik,...lkp->...lip", activation, turned)
    back = product("...lip,lop->...lio", turned, left)
    return {"kernel": back[..., :-1, :], "bias": back[..., -1, :]}


def _dense(of: dict[str, Any], gradient: dict[str, Any], damping: Any, power: float) -> Any:
    kernel = gradient["kernel"]
    rows = kernel.reshape(*kernel.shape[:-2], -1)
    product = partial(jnp.einsum, precision=exact(rows))
    turned = product("lek,...le->...lk", of["vectors"], rows)
    turned = turned * _powered(of["values"], damping, power)
    return {"kernel": product("lek,...lk->...le", of["vectors"], turned).reshape(kernel.shape)}


def _diagonal(
    of: dict[str, Any], gradient: dict[str, Any], damping: Any, power: float, layered: bool
) -> Any:
    """The mean eigenvalue is over all parameters of a module, by layer."""
    if damping is None:
        leaves = [x.reshape(x.shape[0] if layered else 1, -1) for x in of.values()]
        mean = DAMPING * jnp.concatenate(leaves, axis=1).mean(axis=1)
    made = {}
    for leaf, value in gradient.items():
        added = damping
        if damping is None:
            added = mean.reshape(-1, *[1] * (of[leaf].ndim - 1)) if layered else mean[0]
        made[leaf] = value * (of[leaf] + added) ** power
    return made


def _adam_divided(of: dict[str, Any], gradient: dict[str, Any], added: Any) -> Any:
    return {leaf: value / (jnp.sqrt(of[leaf]) + added) for leaf, value in gradient.items()}


def _powered(eigenvalues: Any, damping: Any, power: float) -> jax.Array:
    """Damped, by layer. Rounding leaves eigenvalues just below 0 that are 0."""
    axes = tuple(range(1, eigenvalues.ndim))
    if damping is None:
        damping = DAMPING * eigenvalues.mean(axis=axes, keepdims=True)
    return (jnp.maximum(eigenvalues, 0) + damping) ** power
