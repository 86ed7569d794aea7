"""Meshes and rules: what fits, what is refused with the numbers, what no mesh leaves alone."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from pythia_jax import sharding
from pythia_jax.configs import ConfigError, MeshConfig, ModelConfig
from pythia_jax.model.parameters import TABLE


@pytest.mark.parametrize(
    ("sizes", "devices", "shape"),
    [
        ({}, 8, (1, 1, 8, 1)),
        ({}, 1, (1, 1, 1, 1)),
        ({"data": 2, "tensor": 2}, 8, (1, 2, 2, 2)),
        ({"data": -1, "fsdp": 4}, 32, (1, 8, 4, 1)),
        ({"slices": 2, "tensor": 4}, 64, (2, 1, 8, 4)),
        ({"data": 8, "fsdp": 1}, 8, (1, 8, 1, 1)),
    ],
)
def test_the_open_axis_takes_what_is_left(sizes, devices, shape):
    assert sharding.mesh_shape(MeshConfig(**sizes), devices) == shape


@pytest.mark.parametrize(
    ("sizes", "devices"),
    [({"data": 3}, 8), ({"fsdp": 4}, 8), ({"data": 16}, 8), ({"fsdp": 1}, 2), ({"fsdp": 2}, 1)],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused_with_the_numbers(sizes, devices):
    with pytest.raises(ConfigError, match=rf"mesh: .* does not fit {devices} device"):
        sharding.mesh_shape(MeshConfig(**sizes), devices)


def test_two_open_axes_and_empty_ones_are_refused():
    with pytest.raises(
        ConfigError, match=r"mesh\.data and mesh\.fsdp.*one axis takes what is left"
    ):
        MeshConfig(data=-1)
    for size in (0, -2):
        with pytest.raises(ConfigError, match=r"mesh\.tensor"):
            MeshConfig(tensor=size)


MODEL = ModelConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=6, vocab_size=96)


@pytest.mark.parametrize(
    ("shape", "microbatch", "numbers"),
    [
        ((1, 1, 1, 4), 8, r"tensor = 4 .*num_attention_heads = 6"),
        ((1, 1, 5, 1), 10, r"fsdp = 5 .*hidden_size = 48"),
        ((1, 4, 2, 1), 12, r"slices x data x fsdp = 8 .* = 12"),
        ((2, 3, 1, 1), 9, r"slices x data x fsdp = 6 .* = 9"),
    ],
)
def test_a_mesh_that_cannot_cut_model_or_batch_is_refused_with_the_numbers(
    shape, microbatch, numbers
):
    mesh = jax.sharding.AbstractMesh(shape, sharding.AXES)
    with pytest.raises(ConfigError, match=numbers):
        sharding.check_fit(mesh, MODEL, microbatch)  # type: ignore[arg-type]


def test_a_mesh_that_fits_is_taken():
    mesh = jax.sharding.AbstractMesh((1, 2, 2, 2), sharding.AXES)
    sharding.check_fit(mesh, MODEL, 8)  # type: ignore[arg-type]


def test_two_axes_of_an_array_cannot_lie_on_one_of_the_mesh():
    with pytest.raises(ValueError, match="fsdp of the mesh twice"):
        sharding.spec(("batch", "hidden"))
    with pytest.raises(ValueError, match="tensor of the mesh twice"):
        sharding.spec(("heads", "mlp"))
    assert sharding.spec(("batch", "seq", "mlp")) == P(("slices", "data", "fsdp"), None, "tensor")


def test_every_parameter_has_a_place_and_every_matrix_is_cut():
    for parameter in TABLE:
        assert len(sharding.spec(parameter.axes)) == len(parameter.axes)
        cut = {place for axis in parameter.axes for place in sharding.RULES[axis]}
        matrix = len(parameter.axes) - parameter.stacked == 2
        assert cut == {"fsdp", "tensor"} if matrix else cut <= {"tensor"}, parameter.path


def test_without_a_mesh_nothing_is_added():
    x = jnp.ones((4, 4))
    for mesh in (None, sharding.make_mesh(MeshConfig(), jax.devices()[:1])):

        def f(x):
            halved = sharding.by_shard(lambda y: y / 2, (("batch", "seq"),), ("batch", "seq"))(x)
            return sharding.constrain(halved, ("batch", "seq"))

        plain = str(jax.make_jaxpr(lambda x: x / 2)(x))
        if mesh is None:
            assert str(jax.make_jaxpr(f)(x)) == plain
        else:
            with jax.set_mesh(mesh):
                assert str(jax.make_jaxpr(f)(x)) == plain
