"""Fused kernels: Splash, run by Pallas's interpreter or compiled for TPUs that are not here, equals
the plain kernels; cuDNN is asked for in its own terms; who can run where is a table."""

import functools
import os
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import distance

from pythia_jax import sharding
from pythia_jax.model import attention, kernels

# libtpu, which compiles for TPUs that are not here, must neither look for one nor lock others out.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

SPLASH = functools.partial(kernels.splash, interpret=True)


def inputs(seq, head, batch=2, heads=2, seed=0):
    """Scaled queries, keys, values, and a direction for the cotangent, `[batch, seq, heads, …]`."""
    rng = np.random.default_rng(seed)
    shape = (batch, seq, heads, head)
    scales = (3 * head**-0.5, 1, 1, 1)
    return [(scale * rng.standard_normal(shape)).astype(np.float32) for scale in scales]


def einsum(q, k, v):
    """The plain kernel that holds all scores, of queries that are scaled already."""
    return attention.attend(q * q.shape[-1] ** 0.5, k, v, "einsum", lambda site, value: value)


def value_and_gradients(kernel, q, k, v, direction):
    def run(q, k, v, direction):
        z, pullback = jax.vjp(kernel, q, k, v)
        return z, *pullback(direction)

    return jax.jit(run)(q, k, v, direction)


@pytest.mark.parametrize(
    ("seq", "head"),
    [(1, 64), (100, 80), (128, 128), (130, 32), (200, 256), (640, 16)],
)
def test_splash_equals_the_plain_kernel_forward_and_backward(seq, head):
    arguments = inputs(seq, head)
    got = value_and_gradients(SPLASH, *arguments)
    wanted = value_and_gradients(einsum, *arguments)
    for ours, plain in zip(got, wanted, strict=True):
        assert ours.shape == plain.shape and ours.dtype == np.float32
        assert np.abs(ours - plain).max() <= 2e-5 * max(1, np.abs(plain).max())


def test_splash_in_bfloat16_stays_near_float32():
    arguments = inputs(150, 64)
    wanted = value_and_gradients(einsum, *arguments)
    got = value_and_gradients(SPLASH, *(jnp.asarray(x, jnp.bfloat16) for x in arguments))
    for ours, plain in zip(got, wanted, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert distance(ours.astype(jnp.float32), plain) <= 1.5e-2


def test_per_example_gradients_of_splash_are_those_of_each_example():
    q, k, v, _ = inputs(70, 32, batch=3)

    def gradient(q, k, v):
        return jax.grad(lambda q: (SPLASH(q[None], k[None], v[None]) ** 2).sum())(q)

    together, alone = jax.jit(jax.vmap(gradient))(q, k, v), jax.jit(gradient)
    for row in range(3):
        assert distance(together[row], alone(q[row], k[row], v[row])) <= 2e-6


def plainly(kernel, q, k, v):
    return (kernel(q, k, v) ** 2).sum()


def in_layers(kernel, q, k, v, policy=None):
    """The kernel twice over, as in a model: in a scan, under rematerialisation."""

    def layer(x, _):
        return kernel(x, k, v), None

    layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    return (jax.lax.scan(layer, q, None, length=2)[0] ** 2).sum()


BEYOND = {
    "jvp": lambda f, q: jax.jvp(f, (q,), (q,)),
    "linearize": lambda f, q: jax.linearize(f, q)[1](q),
    "forward over reverse": lambda f, q: jax.jvp(jax.grad(f), (q,), (q,)),
    "reverse over reverse": lambda f, q: jax.grad(lambda q: (jax.grad(f)(q) ** 2).sum())(q),
}


REFUSED = (ValueError, NotImplementedError)
"""The first while tracing, the second while lowering, in the same words."""


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("where", [plainly, in_layers])
@pytest.mark.parametrize("how", BEYOND)
def test_other_derivatives_of_a_fused_kernel_are_refused_in_one_error(how, where, jitted):
    q, k, v, _ = inputs(8, 32, batch=1, heads=1)
    run = functools.partial(BEYOND[how], lambda q: where(SPLASH, q, k, v))
    with pytest.raises(REFUSED, match=r"'splash'.*reverse only.*attention='xla'"):
        (jax.jit(run) if jitted else run)(q)


def test_tangents_that_do_not_reach_attention_pass_in_forward_mode():
    q, k, v, _ = inputs(8, 32, batch=1, heads=1)
    q, k, v = (jnp.asarray(x) for x in (q, k, v))

    def run(scale):
        return (scale * SPLASH(q, k, v)).sum()

    value, tangent = jax.jvp(run, (2.0,), (1.0,))
    np.testing.assert_allclose(value, 2 * tangent, rtol=1e-6)


def equations(jaxpr):
    """All equations of a jaxpr, those inside its calls and loops too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize(
    ("policy", "calls"),
    [
        (jax.checkpoint_policies.nothing_saveable, 3),
        (jax.checkpoint_policies.save_only_these_names(kernels.KEPT), 2),
        (jax.checkpoint_policies.everything_saveable, 2),
    ],
)
def test_what_is_kept_by_name_spares_the_forward_kernel_in_the_backward_pass(policy, calls):
    q, k, v, _ = inputs(8, 32, batch=1, heads=1)
    gradient = jax.grad(lambda q: in_layers(SPLASH, q, k, v, policy))
    found = [
        e for e in equations(jax.make_jaxpr(gradient)(q).jaxpr) if "pallas" in str(e.primitive)
    ]
    assert len(found) == calls


def test_one_copy_of_the_output_is_kept_by_name():
    q, k, v, _ = inputs(128, 32, batch=1, heads=2)
    policy = jax.checkpoint_policies.save_only_these_names(kernels.KEPT)
    gradient = jax.grad(lambda q: in_layers(SPLASH, q, k, v, policy))
    scans = [e for e in equations(jax.make_jaxpr(gradient)(q).jaxpr) if e.primitive.name == "scan"]
    kept = sorted(
        v.aval.shape for v in scans[0].outvars if v.aval.ndim > 2 and v.aval.shape[0] == 2
    )
    # Of both layers: the carry that each began with, z with its heads merged, the logsumexp.
    assert kept == [(2, 1, 2, 128), (2, 1, 128, 2, 32), (2, 1, 128, 64)]


@pytest.mark.parametrize(("dtype", "wanted"), [("float32", "HIGHEST"), ("bfloat16", "DEFAULT")])
def test_products_of_float32_are_exact_inside_splash_whatever_is_set_around_it(dtype, wanted):
    q = jnp.zeros((1, 128, 1, 64), dtype)
    gradient = jax.grad(lambda q: SPLASH(q, q, q).astype("float32").sum())
    other = "default" if wanted == "HIGHEST" else "highest"
    with jax.default_matmul_precision(other):
        found = list(equations(jax.make_jaxpr(gradient)(q).jaxpr))
    products = [e.params["precision"] for e in found if e.primitive.name == "dot_general"]
    assert len(products) >= 7  # Scores and their mixture forward; five products backward.
    assert {str(side) for product in products for side in product} == {wanted}


# Who can run where.

BF16, F16, F32, F64 = "bfloat16", "float16", "float32", "float64"
V5E, H100, A100, L4 = "TPU v5 lite", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB", "NVIDIA L4"


@pytest.mark.parametrize(
    ("platform", "kind", "head", "dtype", "wanted"),
    [
        *(("tpu", V5E, head, BF16, "splash") for head in (32, 64, 80, 128, 256)),
        ("tpu", "TPU v4", 64, BF16, "splash"),
        ("tpu", "TPU v5p", 64, BF16, "splash"),
        ("tpu", "TPU v6 lite", 64, BF16, "splash"),
        ("tpu", "TPU7x", 64, BF16, "splash"),
        ("tpu", V5E, 64, F32, "splash"),
        ("tpu", V5E, 64, F16, "xla"),
        ("tpu", V5E, 64, F64, "xla"),
        ("tpu", V5E, 16, BF16, "xla"),
        ("tpu", V5E, 512, BF16, "xla"),
        ("tpu", "TPU v2", 64, BF16, "xla"),
        ("tpu", "TPU v3", 64, BF16, "xla"),
        *(("gpu", kind, 64, dtype, "cudnn") for kind in (A100, H100, L4) for dtype in (BF16, F16)),
        ("cuda", "", 128, BF16, "cudnn"),
        ("gpu", A100, 64, F32, "xla"),
        ("gpu", A100, 80, BF16, "cudnn"),
        ("gpu", A100, 256, BF16, "xla"),
        ("gpu", "", 256, BF16, "xla"),
        *(
            ("gpu", f"NVIDIA {kind}", 256, BF16, "cudnn")
            for kind in ("H100 PCIe", "H200", "GH200 480GB", "B200", "GB200", "B300 SXM6 AC")
        ),
        ("gpu", H100, 264, BF16, "xla"),
        ("gpu", H100, 20, BF16, "xla"),
        ("gpu", "Tesla V100-SXM2-16GB", 64, F16, "xla"),
        ("gpu", "Tesla T4", 64, F16, "xla"),
        ("gpu", "NVIDIA GeForce RTX 2080 Ti", 64, F16, "xla"),
        ("gpu", "NVIDIA GeForce RTX 3090", 64, F16, "cudnn"),
        ("gpu", "AMD Instinct MI300X", 64, BF16, "xla"),
        ("rocm", "", 64, BF16, "xla"),
        ("cpu", "cpu", 64, BF16, "xla"),
    ],
)
def test_auto_takes_the_fused_kernel_where_it_can_run(platform, kind, head, dtype, wanted):
    assert kernels.pick("auto", head, dtype, platform, kind) == wanted
    if wanted in kernels.FUSED:
        assert kernels.pick(wanted, head, dtype, platform, kind) == wanted


@pytest.mark.parametrize("plain", ["xla", "einsum"])
@pytest.mark.parametrize("platform", ["tpu", "gpu", "cpu"])
def test_plain_kernels_run_anywhere(plain, platform):
    assert kernels.pick(plain, 7, F64, platform) == plain


@pytest.mark.parametrize(
    ("kernel", "platform", "kind", "head", "dtype", "why"),
    [
        ("splash", "cpu", "cpu", 64, BF16, "runs on TPUs, not on cpu"),
        ("splash", "gpu", H100, 64, BF16, "runs on TPUs, not on gpu"),
        ("splash", "tpu", "TPU v3", 64, BF16, "needs a TPU v4 or later, not TPU v3"),
        ("splash", "tpu", V5E, 64, F16, "bfloat16 and float32, not float16"),
        ("splash", "tpu", V5E, 16, BF16, "head sizes 32 to 256, not 16"),
        ("cudnn", "cpu", "cpu", 64, BF16, "runs on NVIDIA's GPUs, not on cpu"),
        ("cudnn", "tpu", V5E, 64, BF16, "runs on NVIDIA's GPUs, not on TPU v5 lite"),
        ("cudnn", "gpu", "AMD Instinct MI300X", 64, BF16, "not on AMD Instinct MI300X"),
        ("cudnn", "gpu", "Tesla T4", 64, F16, "needs an Ampere GPU or later, not Tesla T4"),
        ("cudnn", "gpu", H100, 64, F32, "bfloat16 and float16, not float32"),
        ("cudnn", "gpu", A100, 256, BF16, f"up to 128 on {A100}, not 256"),
        ("cudnn", "gpu", "", 256, BF16, "up to 128 before Hopper, not 256"),
        ("cudnn", "gpu", H100, 36, BF16, "multiples of 8"),
    ],
)
def test_kernel_asked_for_by_name_that_cannot_run_is_an_error(
    kernel, platform, kind, head, dtype, why
):
    with pytest.raises(ValueError, match=f"{kernel!r}.*{why}.*ask for 'xla'.*'auto'"):
        kernels.pick(kernel, head, dtype, platform, kind)


# cuDNN, asked for in its own terms.


@pytest.fixture
def lowered_for_cuda(monkeypatch):
    """Lowers for CUDA without a GPU: only the check that cuDNN is installed is passed over."""
    found = [m for name, m in sys.modules.items() if name.endswith("fused_attention_stablehlo")]
    if not found or not hasattr(found[0], "check_cudnn_version"):
        pytest.skip("this release of jax keeps its check for cuDNN elsewhere")
    monkeypatch.setattr(found[0], "check_cudnn_version", lambda: 91000)

    def lower(f, *arguments):
        return jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()

    return lower


@pytest.mark.parametrize(("kept", "forward"), [(True, 1), (False, 2)])
def test_cudnn_is_called_causal_unscaled_and_once_if_its_results_are_kept(
    kept, forward, lowered_for_cuda
):
    q = jax.ShapeDtypeStruct((2, 100, 3, 80), jnp.bfloat16)
    policy = jax.checkpoint_policies.save_only_these_names(*[kernels.KEPT] * kept)

    def loss(q, k, v):
        return in_layers(kernels.cudnn, q, k, v, policy).astype(jnp.float32)

    text = lowered_for_cuda(jax.grad(loss, (0, 1, 2)), q, q, q)
    assert text.count("@__cudnn$fmhaSoftmax(") == forward
    assert text.count("@__cudnn$fmhaSoftmaxBackward(") == 1
    calls = [line for line in text.splitlines() if "__cudnn$fmha" in line]
    for call in calls:
        assert r"fmha_scale\22: 1.0" in call and r"mask_type\22: \22CAUSAL" in call
        assert "2x100x3x80xbf16" in call


@pytest.mark.parametrize("how", BEYOND)
def test_other_derivatives_of_cudnn_are_refused_in_one_error(how, lowered_for_cuda):
    q = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)
    run = functools.partial(BEYOND[how], lambda q: in_layers(kernels.cudnn, q, q, q))
    with pytest.raises(REFUSED, match=r"'cudnn'.*reverse only.*attention='xla'"):
        lowered_for_cuda(run, q)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("head", [64, 80, 128])
@pytest.mark.parametrize("seq", [1, 100, 2048])
def test_cudnn_equals_the_plain_kernel_on_a_gpu(seq, head):
    arguments = inputs(seq, head)
    wanted = value_and_gradients(einsum, *arguments)
    got = value_and_gradients(kernels.cudnn, *(jnp.asarray(x, jnp.bfloat16) for x in arguments))
    for ours, plain in zip(got, wanted, strict=True):
        assert distance(ours.astype(jnp.float32), plain) <= 1.5e-2


# Splash, compiled for TPUs that are not here.


def compiled_layers(
    topology, kernel, head, dtype=jnp.bfloat16, *, fsdp=2, tensor=2, kept=True, **bounds
):
    """Two layers of attention, in scan and remat: 16 rows of 2048 and 8 heads, cut over a mesh."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **bounds).devices
    grid = np.array(devices[: fsdp * tensor]).reshape(1, 1, fsdp, tensor)
    mesh = jax.sharding.Mesh(grid, sharding.AXES)
    lies = sharding.sharding(mesh, attention.HEADS)
    q = jax.ShapeDtypeStruct((16, 2048, 8, head), dtype, sharding=lies)
    policy = jax.checkpoint_policies.save_only_these_names(*[kernels.KEPT] * kept)

    def loss(q, k, v):
        def attend(q, k, v):
            return attention.attend(q, k, v, kernel, lambda site, value: value)

        return in_layers(attend, q, k, v, policy).astype(jnp.float32)

    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, q, q).compile()


def check_compiled(compiled, calls):
    """So many runs of the kernel, no scores of a whole sequence, nothing sent to other devices."""
    text = compiled.as_text()
    assert len(re.findall(r'custom_call_target="tpu_custom_call"', text)) == calls
    assert not re.search(r"\[[\d,]*2048,2048\]", text)
    assert not re.search(r"all-gather|all-to-all|all-reduce|collective-permute", text)


def test_splash_compiles_for_a_sharded_tpu_holds_no_scores_and_sends_nothing():
    compiled = compiled_layers("v5e:2x2", "auto", 64)
    check_compiled(compiled, calls=2)
    scores = 8 * 4 * 2048**2 * 2  # Of a device's rows and heads, in bytes, bfloat16.
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < scores


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("head", [32, 80, 128, 256])
def test_splash_compiles_for_every_head_size(head, dtype):
    check_compiled(compiled_layers("v5e:2x2", "splash", head, dtype, kept=False), calls=3)


@pytest.mark.slow
@pytest.mark.parametrize("head", [64, 256])
@pytest.mark.parametrize(
    ("topology", "options"),
    [
        (
            "v4:2x2x1",
            {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)},
        ),
        ("v5p:2x2x1", {}),
        ("v6e:2x2", {}),
        ("tpu7x:2x2x1", {}),
    ],
)
def test_splash_compiles_for_every_generation_that_has_it(topology, options, head):
    check_compiled(compiled_layers(topology, "auto", head, **options), calls=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "dtype"), [("v3:2x2", jnp.bfloat16), ("v5e:2x2", jnp.float16)]
)
def test_auto_compiles_the_plain_kernel_where_splash_cannot_run(topology, dtype):
    compiled = compiled_layers(topology, "auto", 64, dtype)
    check_compiled(compiled, calls=0)
    with pytest.raises(ValueError, match=r"'splash'.*ask for 'xla'"):
        compiled_layers(topology, "splash", 64, dtype)
