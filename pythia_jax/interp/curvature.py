"""Second order: products with the Hessian and its relatives, its largest eigenvalues, its spectrum.

The function differentiated is training's: the mean loss over all tokens, in nats. Wherever tokens
are asked for, a list of batches will do; the mean is over the tokens of all of them, and no more
than one batch is worked on at a time.

Curvature wants float32 (or float64) throughout: with bfloat16 products are rounded to three
digits, and the Hessian is no longer symmetric. In float32 every product of matrices is exact to
float32 on TPUs and GPUs too (`pythia_jax.model.attention.exact`).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pythia_jax import sharding
from pythia_jax.configs import ModelConfig, Runtime
from pythia_jax.interp import preflight
from pythia_jax.interp.gradients import per_example_gradients
from pythia_jax.model import kernels, parameters
from pythia_jax.model.attention import exact
from pythia_jax.model.gptneox import AnyArray, check_tokens, hidden_states, unembed
from pythia_jax.model.loss import loss
from pythia_jax.model.parameters import Params
from pythia_jax.model.quantize import check_floats
from pythia_jax.training.step import microbatches

Batches = Int[AnyArray, "batch seq+1"] | Sequence[Int[AnyArray, "batch seq+1"]]


def twice_differentiable(runtime: Runtime) -> Runtime:
    """`runtime` with attention that has second derivatives: `xla` where it was left open.

    Raises ValueError if a kernel was asked for by name that has first derivatives only.
    """
    if runtime.attention in kernels.FUSED:
        raise ValueError(
            f"attention kernel {runtime.attention!r} has first derivatives only, and second ones "
            "are wanted here; ask for 'xla', 'einsum' or 'auto'"
        )
    return replace(runtime, attention="xla") if runtime.attention == "auto" else runtime


def hvp(
    params: Params,
    tokens: Batches,
    config: ModelConfig,
    vector: Params,
    *,
    runtime: Runtime = Runtime(),
) -> Params:
    """The Hessian of the mean loss times `vector`, a tree like `params`.

    Forward over reverse (Pearlmutter, 1994): about three gradients' time, twice one's memory.

    Raises ValueError for tokens that do not fit, an attention kernel without second derivatives,
    and a product that is no finite number, with what made it so: the vector, a parameter, or a row.
    Inside `jax.jit` the last cannot be told: look at what comes out.
    """
    return _product(_hvp, params, tokens, config, runtime)(vector)


def ggn_vp(
    params: Params,
    tokens: Batches,
    config: ModelConfig,
    vector: Params,
    *,
    runtime: Runtime = Runtime(),
) -> Params:
    """The generalised Gauss-Newton matrix Jᵀ H J of the mean loss times `vector`.

    J is the Jacobian of the logits, H the Hessian of the cross-entropy by them (Schraudolph,
    2002): positive semi-definite, and the Hessian without the curvature of the network itself.
    It is also the Fisher matrix of the tokens, each given those before it, divided by their number.

    Raises ValueError as `hvp`.
    """
    return _product(_ggn_vp, params, tokens, config, runtime)(vector)


def fisher_diagonal(
    params: Params,
    tokens: Batches,
    config: ModelConfig,
    *,
    runtime: Runtime = Runtime(),
) -> Params:
    """The mean over rows of each row's squared gradient, in nats², like `params`.

    A row's gradient is that of its summed loss, the log-probability of the row, so that this is
    the diagonal of the empirical Fisher matrix: of the rows as they are, not of ones drawn from
    the model. Each device has the gradient of one row at a time.

    Raises ValueError for tokens that do not fit, and a row whose gradient is not finite.
    """
    total, rows = None, 0
    for batch in _batches(tokens, config):
        part, finite = _sum_of_squares(params, jnp.asarray(batch), config=config, runtime=runtime)
        _check_rows(finite)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
        rows += batch.shape[0]
    return jax.tree.map(lambda x: x / rows, total)


def hessian_top_eigenvalues(
    params: Params,
    tokens: Batches,
    config: ModelConfig,
    k: int,
    iterations: int,
    key: jax.Array,
    *,
    runtime: Runtime = Runtime(),
) -> tuple[Float[Array, " k"], Params, Float[Array, " k"]]:
    """The k largest eigenvalues of the Hessian, by Lanczos with full reorthogonalisation.

    iterations: products with the Hessian (k more measure the residuals); the basis takes that many
    copies of the parameters, lying as they do on a mesh. key: of the random start. An eigenvalue
    that occurs twice is found once, unless the start's whole Krylov space is exhausted.

    Returns (eigenvalues, largest first; unit eigenvectors, a tree with a leading axis of k;
    ‖H v − λ v‖ of each). A residual bounds the distance to the nearest true eigenvalue; where it
    is not small, take more iterations.

    Raises ValueError for impossible k or iterations, and as `hvp`; MemoryError with the numbers
    for what does not fit.
    """
    check_floats(params)
    _check_iterations(iterations, parameters.count(config))
    if not 1 <= k <= iterations:
        raise ValueError(f"k = {k}: from 1 to the number of iterations ({iterations}) is wanted")
    _check_room(params, tokens, config, runtime, iterations, k)
    product = _product(_hvp, params, tokens, config, runtime)
    start = _random(params, key, jax.random.normal)
    diagonal, off, basis = lanczos(product, start, iterations, key)
    values, weights = jnp.linalg.eigh(_tridiagonal(diagonal, off))
    values, weights = values[::-1][:k], weights[:, ::-1][:, :k]
    vectors = _combined(basis, weights)
    residuals = []
    for i in range(k):
        vector = jax.tree.map(lambda x, i=i: x[i], vectors)
        residuals.append(_left(product(vector), vector, values[i]))
    return values, vectors, jnp.stack(residuals)


def hessian_density(
    params: Params,
    tokens: Batches,
    config: ModelConfig,
    iterations: int,
    key: jax.Array,
    *,
    probes: int = 4,
    points: int = 1000,
    width: float = 0.01,
    runtime: Runtime = Runtime(),
) -> tuple[Float[Array, " points"], Float[Array, " points"]]:
    """The density of the Hessian's eigenvalues, by stochastic Lanczos quadrature.

    Each probe is a random vector of signs, whose Lanczos matrix gives the nodes and weights of a
    quadrature with 2 x iterations exact moments (Ghorbani et al., 2019, algorithm 2); every node is
    drawn as a normal distribution, `width` of the whole range of nodes wide. More probes make it
    less noisy, more iterations sharper.

    Returns (grid, density), `points` of each; the density integrates to 1.

    Raises as `hessian_top_eigenvalues`, and ValueError for impossible probes.
    """
    check_floats(params)
    _check_iterations(iterations, parameters.count(config))
    if probes < 1 or points < 2 or width <= 0:
        raise ValueError(f"{probes} probes, {points} points, width {width}: all must be positive")
    _check_room(params, tokens, config, runtime, iterations)
    product = _product(_hvp, params, tokens, config, runtime)
    nodes, weights = [], []
    for own in jax.random.split(key, probes):
        start = _random(params, own, jax.random.rademacher)
        diagonal, off = lanczos(product, start, iterations, own)[:2]
        values, vectors = jnp.linalg.eigh(_tridiagonal(diagonal, off))
        nodes.append(values)
        weights.append(vectors[0] ** 2 / probes)
    return _smoothed(jnp.concatenate(nodes), jnp.concatenate(weights), points, width)


def lanczos(
    product: Callable[[Params], Params], start: Params, iterations: int, key: jax.Array
) -> tuple[Float[Array, " n"], Float[Array, " n-1"], Params]:
    """The symmetric map `product` in an orthonormal basis that makes it tridiagonal.

    Every new vector is made orthogonal to all earlier ones, twice over. Where nothing is left of
    it, the space that the start can reach is exhausted; then the basis goes on from a random
    vector, and the off-diagonal entry is 0.

    Returns (diagonal, off-diagonal, basis: a tree with a leading axis of `iterations`).
    """
    vector, basis = _first_vector(start, iterations)
    diagonal, off = [], []
    for i in range(iterations):
        vector, basis, alpha, beta = _next_vector(product(vector), vector, basis, key, i)
        diagonal.append(alpha)
        off.append(beta)
    return jnp.stack(diagonal), jnp.stack(off)[:-1], basis


@partial(jax.jit, static_argnums=1)
def _first_vector(start: Params, iterations: int) -> tuple[Params, Params]:
    scale = 1 / _norm(start)
    vector = jax.tree.map(lambda x: x * scale, start)
    basis = jax.tree.map(lambda x: jnp.zeros((iterations, *x.shape), x.dtype), vector)
    return vector, jax.tree.map(lambda b, v: b.at[0].set(v), basis, vector)


@partial(jax.jit, donate_argnums=2)
def _next_vector(
    image: Params, vector: Params, basis: Params, key: jax.Array, i: jax.Array | int
) -> tuple[Params, Params, jax.Array, jax.Array]:
    """The vector after this one, whose image it is, and its two entries of the matrix."""
    rest = _orthogonal(image, basis)
    size, before = _norm(rest), _norm(image)
    # No more than what rounding leaves of a vector that lies in the basis.
    gone = size <= 100 * jnp.finfo(size.dtype).eps * before
    other = _orthogonal(_random(vector, jax.random.fold_in(key, i + 1), jax.random.normal), basis)
    scale = 1 / jnp.where(gone, _norm(other), size)
    fresh = jax.tree.map(lambda a, b: jnp.where(gone, b, a) * scale, rest, other)
    basis = jax.tree.map(lambda b, v: b.at[i + 1].set(v, mode="drop"), basis, fresh)
    return fresh, basis, _dot(image, vector), jnp.where(gone, 0, size)


def _orthogonal(vector: Params, basis: Params) -> Params:
    """What is left of `vector` without its part in the basis; rows that are still 0 take none."""
    for _ in range(2):
        shares = sum(
            jnp.tensordot(b, v, axes=v.ndim, precision=exact(v))
            for b, v in zip(jax.tree.leaves(basis), jax.tree.leaves(vector), strict=True)
        )
        inside = _combined(basis, shares)
        vector = jax.tree.map(jnp.subtract, vector, inside)
    return vector


@jax.jit
def _combined(basis: Params, weights: Any) -> Params:
    """Sums over the basis with these weights, `[n]`, or `[n, k]` for k of them."""
    return jax.tree.map(
        lambda b: jnp.tensordot(weights.T.astype(b.dtype), b, axes=1, precision=exact(b)), basis
    )


def _product(
    one: Callable[..., Params],
    params: Params,
    tokens: Batches,
    config: ModelConfig,
    runtime: Runtime,
) -> Callable[[Params], Params]:
    """Vectors to the mean of `one(params, batch, vector)` over batches, each by its tokens."""
    check_floats(params)
    runtime = twice_differentiable(runtime)
    batches = _batches(tokens, config)
    sizes = [batch.shape[0] * (batch.shape[1] - 1) for batch in batches]

    def product(vector: Params) -> Params:
        _check_like(vector, params)
        total = None
        for batch, size in zip(batches, sizes, strict=True):
            share = size / sum(sizes)
            part = one(params, jnp.asarray(batch), vector, share, config=config, runtime=runtime)
            total = part if total is None else jax.tree.map(jnp.add, total, part)
        assert total is not None
        if (finite := known(_finite(total))) is not None and not finite:
            raise ValueError(f"the product is not finite: {_why(params, vector, batches, rows)}")
        return total

    def rows(batch: Any) -> jax.Array:
        return _sum_of_squares(params, jnp.asarray(batch), config=config, runtime=runtime)[1]

    return product


@jax.jit
def _finite(tree: Params) -> Bool[Array, ""]:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def _why(
    params: Params, vector: Params, batches: list[Any], rows: Callable[[Any], jax.Array]
) -> str:
    """What made a product of these be no finite number. rows: which of a batch have a gradient."""
    for what, tree in (("parameter", params), ("the vector's", vector)):
        for parameter, value in parameters.items(tree):
            if not _finite({"": value}):
                return f"{what} {parameter.path} is not"
    for number, batch in enumerate(batches):
        if not (fine := np.asarray(rows(batch))).all():
            return f"nor is the gradient of row {np.argmin(fine)} of batch {number}"
    return (
        f"every row's gradient is, so it overflowed; the vector's length is {_norm(vector):.3g}, "
        "give a shorter one"
    )


@partial(jax.jit, static_argnames=("config", "runtime"))
def _hvp(
    params: Params,
    tokens: jax.Array,
    vector: Params,
    share: float,
    *,
    config: ModelConfig,
    runtime: Runtime,
) -> Params:
    gradient = jax.grad(lambda p: share * loss(p, tokens, config, runtime=runtime))
    return jax.jvp(gradient, (params,), (vector,))[1]


@partial(jax.jit, static_argnames=("config", "runtime"))
def _ggn_vp(
    params: Params,
    tokens: jax.Array,
    vector: Params,
    share: float,
    *,
    config: ModelConfig,
    runtime: Runtime,
) -> Params:
    """The gradient of Σ <H J v, logits>, H J v being held still, chunk by chunk of positions."""
    inputs, seq = tokens[:, :-1], tokens.shape[1] - 1
    length = max(1, min(seq, runtime.loss_chunk // tokens.shape[0]))

    def outputs(params: Params) -> jax.Array:
        return hidden_states(params, inputs, config, runtime=runtime)[0]

    moved = jax.jvp(outputs, (params,), (vector,))

    def paired(params: Params) -> jax.Array:
        hidden = outputs(params)

        @jax.checkpoint
        def step(total: jax.Array, parts: tuple) -> tuple[jax.Array, None]:
            x, still, dx = parts
            curved = _curved(params, vector, still, dx)
            return total + (jax.lax.stop_gradient(curved) * unembed(params, x)).sum(), None

        chunks = jax.tree.map(partial(_chunked, length=length), (hidden, *moved))
        # Positions that fill up the last chunk are 0, and so do not move: they add nothing.
        total = jnp.zeros([], jnp.promote_types(hidden.dtype, jnp.float32))
        return share / inputs.size * jax.lax.scan(step, total, chunks)[0]

    return jax.grad(paired)(params)


def _curved(params: Params, vector: Params, hidden: jax.Array, d_hidden: jax.Array) -> jax.Array:
    """The Hessian of the cross-entropy by the logits, times the logits' tangent."""
    logits, d_logits = jax.jvp(unembed, (params, hidden), (vector, d_hidden))
    p = jax.nn.softmax(logits, axis=-1)
    return p * (d_logits - (p * d_logits).sum(axis=-1, keepdims=True))


def _chunked(x: jax.Array, length: int) -> jax.Array:
    """`[batch, seq, hidden]` as `[chunk, batch, length, hidden]`, the last filled up with zeros."""
    batch, seq, hidden = x.shape
    x = jnp.pad(x, [(0, 0), (0, -seq % length), (0, 0)])
    return jnp.moveaxis(x.reshape(batch, -1, length, hidden), 1, 0)


@partial(jax.jit, static_argnames=("config", "runtime"))
def _sum_of_squares(
    params: Params, tokens: jax.Array, *, config: ModelConfig, runtime: Runtime
) -> tuple[Params, Bool[Array, " batch"]]:
    """Sums over rows, and which rows were finite."""
    at_once = sharding.parts_of_rows()

    def add(total: Params, rows: jax.Array) -> tuple[Params, jax.Array]:
        gradients = per_example_gradients(params, rows, config, runtime=runtime)
        squares = jax.tree.map(lambda g: g * g, gradients)
        total = jax.tree.map(lambda t, s: t + s.sum(axis=0), total, squares)
        sizes = [s.sum(axis=range(1, s.ndim)) for s in jax.tree.leaves(squares)]
        return total, jnp.isfinite(sum(sizes))

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, "f4")), params)
    parts = microbatches(tokens, tokens.shape[0] // at_once)
    total, finite = jax.lax.scan(add, zeros, parts)
    return total, finite.ravel()


def _smoothed(
    nodes: jax.Array, weights: jax.Array, points: int, width: float
) -> tuple[jax.Array, jax.Array]:
    low, high = nodes.min(), nodes.max()
    sigma = width * jnp.maximum(high - low, 1e-6)
    grid = jnp.linspace(low - 6 * sigma, high + 6 * sigma, points)
    bells = jnp.exp(-(((grid[:, None] - nodes) / sigma) ** 2) / 2)
    return grid, (bells * weights).sum(axis=1) / (sigma * np.sqrt(2 * np.pi))


def _check_rows(finite: jax.Array) -> None:
    values = known(finite)
    if values is not None and not values.all():
        raise ValueError(f"the gradient of row {np.argmin(values)} of a batch is not finite")


def _check_room(
    params: Params,
    tokens: Batches,
    config: ModelConfig,
    runtime: Runtime,
    iterations: int,
    vectors: int = 0,
) -> None:
    """Refuse a basis that does not fit, beside a product and what is made from it."""
    runtime = twice_differentiable(runtime)
    largest = max(_batches(tokens, config), key=lambda batch: batch.size)

    def product() -> Any:
        tokens = jnp.asarray(largest)
        return _hvp.lower(params, tokens, params, 1.0, config=config, runtime=runtime).compile()

    preflight.check_memory(
        f"Lanczos with {iterations} vectors of the size of the parameters",
        (iterations + vectors + 4, params),
        program=product,
        advice="take fewer iterations, or cut the model over more devices",
    )


def known(x: Any) -> np.ndarray | None:
    """`x` as NumPy's; None inside a transformation, where it has no value yet."""
    try:
        return np.asarray(x)
    except jax.errors.TracerArrayConversionError:
        return None


def _batches(tokens: Batches, config: ModelConfig) -> list[Any]:
    batches = list(tokens) if isinstance(tokens, Sequence) else [tokens]
    if not batches or any(getattr(b, "ndim", None) != 2 for b in batches):
        raise ValueError(
            "tokens: a batch [batch, seq + 1], or a list of one or more of them, is wanted"
        )
    for batch in batches:
        check_tokens(batch, config)
    return batches


def _check_like(vector: Params, params: Params) -> None:
    got, wanted = (jax.tree.map(jnp.shape, tree) for tree in (vector, params))
    if got != wanted:
        raise ValueError("the vector is not a tree of the parameters' names and shapes")


def _check_iterations(iterations: int, size: int) -> None:
    if not 1 <= iterations <= size:
        raise ValueError(
            f"{iterations} iterations: from 1 to the number of parameters ({size}) is possible"
        )


@partial(jax.jit, static_argnums=2)
def _random(like: Params, key: jax.Array, draw: Callable) -> Params:
    """Every parameter from a key of its own, and where it lies on the mesh."""
    table = parameters.TABLE

    def leaf(parameter: parameters.Parameter, x: jax.Array) -> jax.Array:
        own = jax.random.fold_in(key, table.index(parameter))
        return sharding.constrain(draw(own, x.shape, x.dtype), parameter.axes)

    return parameters.map_parameters(leaf, like)


@jax.jit
def _left(image: Params, vector: Params, value: jax.Array) -> jax.Array:
    """‖H v − λ v‖."""
    return _norm(jax.tree.map(lambda h, v: h - value * v, image, vector))


def _dot(a: Params, b: Params) -> jax.Array:
    # Not jnp.vdot: it would flatten, and a flattened sharded array is gathered.
    products = jax.tree.map(lambda x, y: (x * y).sum(), a, b)
    return jnp.stack(jax.tree.leaves(products)).sum()


def _norm(tree: Params) -> jax.Array:
    return jnp.sqrt(_dot(tree, tree))


def _tridiagonal(diagonal: jax.Array, off: jax.Array) -> jax.Array:
    return jnp.diag(diagonal) + jnp.diag(off, 1) + jnp.diag(off, -1)
