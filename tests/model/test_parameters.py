"""The table of parameters: counts, initialisation, names, decay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import TINY, random_params
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from pythia_jax.bridge import hf_config
from pythia_jax.configs import ModelConfig
from pythia_jax.model import parameters
from pythia_jax.model.parameters import TABLE

# Total, non-embedding, not decayed, tensors: those of the Hugging Face model cards (70m to 2.8b)
# and total = 2 V h + L (12 h^2 + 13 h) + 2 h.
COUNTS = {
    "14m": (14_067_712, 1_189_888, 10_240, 76),
    "31m": (30_494_720, 4_739_072, 20_480, 76),
    "70m": (70_426_624, 18_915_328, 40_960, 76),
    "160m": (162_322_944, 85_056_000, 121_344, 148),
    "410m": (405_334_016, 302_311_424, 321_536, 292),
    "1b": (1_011_781_632, 805_736_448, 430_080, 196),
    "1.4b": (1_414_647_808, 1_208_602_624, 643_072, 292),
    "2.8b": (2_775_208_960, 2_517_652_480, 1_070_080, 388),
    "6.9b": (6_857_302_016, 6_444_163_072, 1_712_128, 388),
    "12b": (11_846_072_320, 11_327_027_200, 2_406_400, 436),
}
# GPT-NeoX's init_functions.py: small_init and wang_init; for the two largest normal and
# scaled_normal, whatever the paper's table says (EleutherAI/pythia#135).
DEVIATIONS = {
    "14m": (0.0559017, 0.0294628),
    "31m": (0.0395285, 0.0208333),
    "70m": (0.0279508, 0.0147314),
    "160m": (0.0228218, 0.00601407),
    "410m": (0.0197642, 0.00260417),
    "1b": (0.0139754, 0.00276214),
    "1.4b": (0.0139754, 0.00184142),
    "2.8b": (0.0125, 0.00123526),
    "6.9b": (0.02, 0.0025),
    "12b": (0.02, 0.00235702),
}


@pytest.mark.parametrize("size", COUNTS)
def test_numbers_of_parameters_are_those_of_the_suite(size):
    config = ModelConfig.from_size(size)
    total, without_embeddings, undecayed, tensors = COUNTS[size]
    assert parameters.count(config) == total
    assert parameters.count(config, embedding=False) == without_embeddings
    leaves = jax.tree.leaves(parameters.abstract(config))
    assert sum(leaf.size for leaf in leaves) == total
    mask = jax.tree.leaves(parameters.decay_mask())
    pairs = zip(leaves, mask, strict=True)
    assert sum(leaf.size for leaf, decayed in pairs if not decayed) == undecayed
    assert sum(len(parameter.hf_names(config)) for parameter in TABLE) == tensors


def test_biases_and_norms_are_not_decayed_and_all_else_is():
    paths = {p.path for p in TABLE if not p.decayed}
    assert paths == {p.path for p in TABLE if p.path.rsplit("/", 1)[1] in ("bias", "scale")}
    assert len(paths) == 10
    assert jax.tree.structure(parameters.decay_mask()) == jax.tree.structure(
        parameters.abstract(TINY)
    )


@pytest.mark.parametrize("size", DEVIATIONS)
def test_standard_deviations_are_those_that_each_size_began_with(size):
    deviations = parameters.standard_deviations(ModelConfig.from_size(size))
    for name, expected in zip(("input", "output"), DEVIATIONS[size], strict=True):
        assert float(f"{deviations[name]:.6g}") == expected


@pytest.mark.parametrize("initializer", ["small_wang", "normal_scaled"])
def test_a_draw_has_these_standard_deviations_and_mean_zero(initializer):
    config = ModelConfig(256, 4, 4, vocab_size=1000, initializer=initializer)
    deviations = parameters.standard_deviations(config)
    params = parameters.init_parameters(config, jax.random.key(0))
    for parameter, array in parameters.items(params):
        value = np.asarray(array, np.float64)
        assert value.shape == parameter.shape(config)
        if parameter.init in ("zeros", "ones"):
            assert (value == (parameter.init == "ones")).all()
            continue
        expected = deviations[parameter.init]
        error = 5 * expected / np.sqrt(value.size)
        assert abs(value.mean()) <= error
        assert abs(value.std() - expected) <= error
        # Gaussian, not uniform or cut: kurtosis 3.
        assert abs((value**4).mean() / expected**4 - 3) <= 0.15


def test_which_parameters_draw_from_which_distribution():
    drawn = {p.path: p.init for p in TABLE if p.decayed}
    assert drawn == {
        "embed_in/embedding": "input",
        "layers/attention/query_key_value/kernel": "input",
        "layers/attention/dense/kernel": "output",
        "layers/mlp/dense_h_to_4h/kernel": "input",
        "layers/mlp/dense_4h_to_h/kernel": "output",
        "embed_out/kernel": "input",
    }


def test_init_depends_on_the_key_and_on_nothing_else():
    one, again, other = (
        parameters.init_parameters(TINY, jax.random.key(seed)) for seed in (1, 1, 2)
    )
    jitted = jax.jit(parameters.init_parameters, static_argnums=0)(TINY, jax.random.key(1))
    for parameter, array in parameters.items(one):
        others = [dict_of(tree)[parameter.path] for tree in (again, other, jitted)]
        np.testing.assert_array_equal(array, others[0])
        assert parameter.decayed == bool((np.asarray(array) != np.asarray(others[1])).any())
        np.testing.assert_allclose(array, others[2], rtol=1e-6)


def test_no_two_parameters_or_layers_begin_alike():
    params = parameters.init_parameters(TINY, jax.random.key(0))
    firsts = []
    for parameter, array in parameters.items(params):
        if parameter.decayed:
            rows = array if parameter.stacked else array[None]
            deviation = parameters.standard_deviations(TINY)[parameter.init]
            firsts += [tuple(np.round(np.ravel(row)[:4] / deviation, 3)) for row in rows]
    assert len(set(firsts)) == len(firsts) == 2 + 4 * TINY.num_hidden_layers


def test_init_takes_a_dtype():
    params = parameters.init_parameters(TINY, jax.random.key(0), jnp.bfloat16)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("size", ["14m", "160m", "1b", "12b"])
def test_names_and_shapes_equal_those_of_transformers(size):
    config = ModelConfig.from_size(size)
    fields = hf_config.config_json(config, "float16", eod=0)
    with torch.device("meta"):
        theirs = GPTNeoXForCausalLM(GPTNeoXConfig(**fields)).state_dict()
    # transformers 5 calls it lm_head in memory, embed_out in files.
    theirs["embed_out.weight"] = theirs.pop("lm_head.weight")
    ours = {}
    for parameter in TABLE:
        shape = parameter.shape(config)[int(parameter.stacked) :]
        shape = shape[::-1] if parameter.transposed else shape
        ours.update(dict.fromkeys(parameter.hf_names(config), shape))
    assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    assert all(tensor.numel() for tensor in theirs.values())
    assert sum(tensor.numel() for tensor in theirs.values()) == COUNTS[size][0]


def test_tree_is_a_plain_dict_with_the_fields_names():
    def paths(tree, prefix=""):
        for key, value in tree.items():
            assert type(tree) is dict
            if isinstance(value, dict):
                yield from paths(value, f"{prefix}{key}/")
            else:
                yield f"{prefix}{key}"

    params = random_params(TINY)
    assert sorted(paths(params)) == sorted(p.path for p in TABLE)
    assert set(params) == {"embed_in", "layers", "final_layer_norm", "embed_out"}
    assert params["layers"]["attention"]["query_key_value"]["kernel"].shape == (3, 48, 144)


def test_every_parameter_has_its_own_path_and_names():
    for field in ("path", "hf", "neox"):
        assert len({getattr(p, field) for p in TABLE}) == len(TABLE) == 16


def dict_of(params):
    return {parameter.path: array for parameter, array in parameters.items(params)}


def test_names_in_gpt_neox_are_those_of_its_pipeline():
    config = ModelConfig.from_size("70m")
    names = [name for parameter in TABLE for name in parameter.neox_names(config)]
    assert len(names) == len(set(names)) == 76
    assert {"0.word_embeddings.weight", "9.norm.weight", "9.norm.bias"} <= set(names)
    assert "10.final_linear.weight" in names
    assert {name.split(".")[0] for name in names} == {"0", *map(str, range(2, 8)), "9", "10"}
    assert {"2.attention.query_key_value.bias", "7.mlp.dense_4h_to_h.weight"} <= set(names)
