"""Attention: the plain kernels compute one function, and so do their derivatives of every order,
on one device and on a mesh; the chooser never replaces a kernel that was asked for."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from on_a_mesh import on_eight_devices
from reference import distance

from pythia_jax import sharding
from pythia_jax.configs import MeshConfig, ModelConfig, Runtime
from pythia_jax.model import attention, kernels
from pythia_jax.model.sites import SITES

KERNELS = ("xla", "einsum")
LENGTHS = (1, 2, 63, 64, 65, 200, 513)


def attend(q, k, v, kernel):
    return attention.attend(q, k, v, kernel, lambda site, value: value)


def inputs(seq, seed=0, batch=2, heads=3, head=8):
    """Queries wide enough for patterns that are neither flat nor one-hot."""
    rng = np.random.default_rng(seed)
    shape = (batch, seq, heads, head)
    return [(scale * rng.standard_normal(shape)).astype(np.float32) for scale in (3, 1, 1)]


def softmax_attention(q, k, v):
    """In NumPy and float64, written out."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    hidden = np.arange(q.shape[1])[None, :] > np.arange(q.shape[1])[:, None]
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("seq", LENGTHS)
def test_kernels_equal_a_softmax_in_float64(seq, kernel):
    q, k, v = inputs(seq)
    got = np.asarray(jax.jit(attend, static_argnums=3)(q, k, v, kernel))
    assert got.dtype == np.float32
    assert np.abs(got - softmax_attention(q, k, v)).max() <= 4e-6


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("seq", [1, 65, 200])
def test_kernels_in_bfloat16_stay_near_a_softmax_in_float64(seq, kernel):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs(seq))
    got = jax.jit(attend, static_argnums=3)(q, k, v, kernel)
    assert got.dtype == jnp.bfloat16
    assert distance(got.astype(jnp.float32), softmax_attention(q, k, v)) <= 1e-2


@pytest.mark.parametrize("kernel", KERNELS)
def test_scores_far_beyond_the_range_of_exp_stay_finite(kernel):
    q, k, v = inputs(130)
    run = jax.jit(lambda q: attend(1000 * q, 10 * k, v, kernel))
    got = np.asarray(run(q))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, softmax_attention(1000 * q, 10 * k, v), atol=1e-2)
    gradient = jax.jit(jax.grad(lambda q: run(q).sum()))(q)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_equal_keys_give_running_means_of_values(kernel):
    q, k, v = inputs(90)
    k = np.broadcast_to(k[:, :1], k.shape)
    means = np.cumsum(v, axis=1) / np.arange(1, 91)[None, :, None, None]
    np.testing.assert_allclose(attend(q, k, v, kernel), means, atol=2e-6)


def second_derivatives(kernel, qkv, directions):
    """Gradient, Hessian product forward over reverse, and reverse over reverse."""
    rng = np.random.default_rng(1)
    probe = rng.standard_normal(qkv[0].shape).astype(np.float32)

    def scalar(qkv):
        q, k, v = qkv
        return (jnp.sin(attend(q, k, v, kernel)) * probe).sum()

    def projected(qkv):
        pieces = jax.tree.map(lambda g, d: (g * d).sum(), jax.grad(scalar)(qkv), directions)
        return sum(pieces)

    gradient, forward = jax.jvp(jax.grad(scalar), (qkv,), (directions,))
    return gradient, forward, jax.grad(projected)(qkv)


@pytest.mark.parametrize("seq", [2, 150])
def test_second_derivatives_of_both_kernels_are_equal(seq):
    qkv, directions = inputs(seq, batch=1, heads=2, head=4), inputs(seq, 5, 1, 2, 4)
    run = jax.jit(second_derivatives, static_argnums=0)
    blocks, plain = run("xla", qkv, directions), run("einsum", qkv, directions)
    for got, wanted in zip(jax.tree.leaves(blocks), jax.tree.leaves(plain), strict=True):
        assert distance(got, wanted) <= 2e-5
    # Both modes give one Hessian.
    for got, wanted in zip(blocks[1], blocks[2], strict=True):
        assert distance(got, wanted) <= 2e-5


@pytest.mark.parametrize("kernel", KERNELS)
def test_per_example_gradients_are_those_of_each_example(kernel):
    q, k, v = inputs(70, batch=3)

    def gradient(q, k, v):
        return jax.grad(lambda q: (attend(q[None], k[None], v[None], kernel) ** 2).sum())(q)

    together, alone = jax.jit(jax.vmap(gradient))(q, k, v), jax.jit(gradient)
    for row in range(3):
        assert distance(together[row], alone(q[row], k[row], v[row])) <= 2e-6


def shapes_in(jaxpr):
    """Shapes of all values that a jaxpr computes, those inside its calls and loops too."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield getattr(variable.aval, "shape", ())
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from shapes_in(inner)


def blocks(platform):
    """`xla`, as it works on a platform."""

    def run(q, k, v):
        return attention._blockwise_attention(q * q.shape[-1] ** -0.5, k, v, platform)

    return run


PLATFORMS = ("cpu", "tpu", "gpu")


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_platforms_blocks_equal_a_softmax_in_float64_and_differentiate_twice(platform):
    q, k, v = inputs(130)
    run = jax.jit(blocks(platform))
    assert np.abs(run(q, k, v) - softmax_attention(q, k, v)).max() <= 2e-6

    def curvature(kernel):
        gradient = jax.grad(lambda q: (jnp.sin(kernel(q, k, v)) * v).sum())
        return jax.jit(lambda q: jax.jvp(gradient, (q,), (k,)))(q)

    plain = functools.partial(attend, kernel="einsum")
    for got, wanted in zip(curvature(blocks(platform)), curvature(plain), strict=True):
        assert distance(got, wanted) <= 2e-5


def holds_all_scores(kernel):
    q, k, v = inputs(512, batch=1, heads=1)
    jaxpr = jax.make_jaxpr(jax.grad(lambda q: kernel(q, k, v).sum()))(q)
    return any(shape[-2:] == (512, 512) for shape in shapes_in(jaxpr.jaxpr))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_blocks_never_hold_all_scores_forward_and_backward(platform):
    assert not holds_all_scores(blocks(platform))
    assert holds_all_scores(functools.partial(attend, kernel="einsum"))


def test_on_a_tpu_blocks_hold_the_scores_of_one_row_at_a_time():
    q, k, v = inputs(512, batch=4, heads=3)
    jaxpr = jax.make_jaxpr(jax.grad(lambda q: blocks("tpu")(q, k, v).sum()))(q)
    scores = [s for s in shapes_in(jaxpr.jaxpr) if len(s) == 4 and s[-2] == 64 and s[-1] > 8]
    assert scores and {s[:2] for s in scores} == {(1, 3)}


def test_kernels_on_a_mesh_equal_those_on_one_device_and_send_nothing():
    script = Path(__file__).with_name("kernels_on_a_mesh.py")
    report = on_eight_devices(script)
    assert set(report) == {"xla", "einsum", "xla on a tpu", "splash"}
    for kernel, (furthest, collectives) in report.items():
        assert furthest <= 2e-6, kernel
        assert collectives == [], kernel


@pytest.mark.parametrize("site", ["attn.scores", "attn.pattern"])
def test_auto_takes_einsum_where_scores_are_wanted_and_says_so(site, caplog):
    with caplog.at_level("INFO", logger="pythia_jax"):
        assert attention.choose(Runtime(), {site}) == "einsum"
    assert "einsum" in caplog.text and site in caplog.text


def test_auto_stays_open_for_all_other_sites_without_a_word(caplog):
    others = set(SITES) - {"attn.scores", "attn.pattern"}
    with caplog.at_level("INFO", logger="pythia_jax"):
        assert attention.choose(Runtime(), others) == "auto"
    assert not caplog.text


def test_auto_is_blocks_on_a_cpu():
    q, k, v = inputs(130)
    np.testing.assert_array_equal(attend(q, k, v, "auto"), attend(q, k, v, "xla"))


@pytest.mark.parametrize("kernel", kernels.FUSED)
def test_fused_kernel_asked_for_on_a_cpu_is_an_error(kernel):
    q, k, v = inputs(64, head=64)
    with pytest.raises(ValueError, match=rf"{kernel!r} runs on.*not on cpu; ask for 'xla'"):
        attend(q, k, v, kernel)


def test_mesh_says_what_will_compute_and_else_the_default_device():
    here = jax.devices()[0]
    assert attention._device() == (here.platform, here.device_kind)
    with jax.default_device(here):
        assert attention._device() == (here.platform, here.device_kind)
    with jax.default_device("cpu"):
        assert attention._device()[0] == "cpu"
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), [here])):
        assert attention._device() == (here.platform, here.device_kind)


SMALL = ModelConfig(512, 2, 8)


def test_resolve_names_the_kernel_and_changes_nothing_else():
    runtime = Runtime(dtype="bfloat16", remat="full")
    resolved = attention.resolve(runtime, SMALL, "tpu", "TPU v5 lite")
    assert resolved == Runtime(dtype="bfloat16", remat="full", attention="splash")


@pytest.mark.parametrize(
    ("dtype", "platform", "sites", "wanted"),
    [
        ("bfloat16", "gpu", (), "cudnn"),
        ("float32", "gpu", (), "xla"),
        (None, "gpu", (), "xla"),
        ("bfloat16", "cpu", (), "xla"),
        ("bfloat16", "tpu", ("attn.scores",), "einsum"),
        ("bfloat16", "tpu", ("attn.z",), "splash"),
    ],
)
def test_resolve_looks_at_dtype_platform_and_sites(dtype, platform, sites, wanted):
    resolved = attention.resolve(Runtime(dtype=dtype), SMALL, platform, sites=sites)
    assert resolved.attention == wanted


def test_resolve_refuses_what_was_asked_for_and_cannot_be():
    with pytest.raises(ValueError, match="'splash' runs on TPUs, not on cpu"):
        attention.resolve(Runtime(attention="splash"), SMALL, "cpu")
    with pytest.raises(ValueError, match=r"'splash' never holds attn\.pattern"):
        attention.resolve(Runtime(attention="splash"), SMALL, "tpu", sites=("attn.pattern",))
    for plain in ("xla", "einsum"):
        assert attention.resolve(Runtime(attention=plain), SMALL, "tpu").attention == plain


@pytest.mark.parametrize("site", ["attn.scores", "attn.pattern"])
def test_kernel_asked_for_by_name_is_not_replaced_in_silence(site):
    with pytest.raises(ValueError, match=rf"'xla'.*{site}.*'einsum'"):
        attention.choose(Runtime(attention="xla"), {site})
    assert attention.choose(Runtime(attention="einsum"), {site}) == "einsum"


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    config = ModelConfig(16, 1, 1, vocab_size=8, rotary_pct=1.0)
    q, k, _ = inputs(1, batch=1, heads=1, head=16)

    def at(x, position):
        return np.asarray(attention.rotate(jnp.asarray(x), np.array([position]), config)).ravel()

    assert abs(np.linalg.norm(at(q, 1000)) - np.linalg.norm(q)) <= 1e-5
    assert abs(at(q, 107) @ at(k, 100) - at(q, 1307) @ at(k, 1300)) <= 1e-3
    np.testing.assert_array_equal(at(q, 0), q.ravel())


def test_rotation_leaves_what_lies_behind_the_rotary_part():
    config = ModelConfig(16, 1, 1, vocab_size=8, rotary_pct=0.25)
    q = inputs(9, batch=1, heads=1, head=16)[0]
    rotated = np.asarray(attention.rotate(jnp.asarray(q), np.arange(9), config))
    np.testing.assert_array_equal(rotated[..., 4:], q[..., 4:])
    assert (rotated[:, 1:, :, :4] != q[:, 1:, :, :4]).all()


def test_positions_of_each_row_may_differ():
    config = ModelConfig(16, 1, 1, vocab_size=8, rotary_pct=0.5)
    q = jnp.asarray(inputs(4, batch=2, heads=1, head=16)[0])
    positions = np.array([[0, 1, 2, 3], [7, 8, 9, 10]])
    together = attention.rotate(q, positions, config)
    for row in range(2):
        alone = attention.rotate(q[row : row + 1], positions[row], config)
        np.testing.assert_array_equal(together[row], alone[0])


def test_rotary_angles_stay_float32_in_bfloat16():
    config = ModelConfig(16, 1, 1, vocab_size=8, rotary_pct=1.0)
    q = jnp.asarray(inputs(4, batch=1, heads=1, head=16)[0], jnp.bfloat16)
    far = np.arange(2000, 2004)
    half = attention.rotate(q, far, config)
    assert half.dtype == jnp.bfloat16
    whole = attention.rotate(q.astype(jnp.float32), far, config)
    assert distance(half.astype(jnp.float32), whole) < 4e-3
