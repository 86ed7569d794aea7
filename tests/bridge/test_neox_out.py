"""GPT-NeoX folders out, and in again."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import torch
from neox_folders import CONFIG, pipelines, write
from reference import random_params

from pythia_jax.bridge import Model, neox_out
from pythia_jax.bridge.neox_in import open_folder
from pythia_jax.bridge.opened import from_model
from pythia_jax.model.parameters import TABLE, map_parameters

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def model(dtype="float32", config=CONFIG, change=lambda _, x: x):
    params = map_parameters(
        lambda p, x: change(p, np.asarray(x).astype(DTYPES[dtype])), random_params(config)
    )
    return from_model(Model(params=params, config=config, stored_dtype=dtype))


def bits(opened):
    return {
        (p.path, layer): (opened.read(p, layer).dtype.name, opened.read(p, layer).tobytes())
        for p in TABLE
        for layer in opened.layers(p)
    }


def halves_of_subnormals(parameter, value):
    """Smallest numbers of the dtype, odd multiples of the unit among them, in summed biases."""
    if not parameter.summed:
        return value
    tiny = np.frombuffer(b"\x01\0\0\0"[: value.itemsize], value.dtype)[0]
    steps = np.resize(np.arange(-40, 41), value.shape)
    steps = np.where(steps == 0, -0.0, steps)
    return (steps * tiny.astype(np.float64)).astype(value.dtype)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["pipeline", "sequential"])
def test_out_and_in_again_is_the_identity(tmp_path, dtype, ranks, layout):
    for name, change in (("a", lambda _, x: x), ("b", halves_of_subnormals)):
        before = model(dtype, change=change)
        neox_out.save(before, tmp_path / name, step=7, model_parallel=ranks, layout=layout)
        after = open_folder(tmp_path / name)
        assert (after.config, after.stored_dtype, after.step) == (CONFIG, dtype, 7)
        assert bits(after) == bits(before)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("sequential", [False, True])
def test_in_and_out_again_gives_the_files_that_torch_wrote(tmp_path, ranks, sequential):
    made = pipelines(random_params(CONFIG), CONFIG, ranks)
    theirs = write(tmp_path / "theirs", CONFIG, made, sequential=sequential)
    layout = "sequential" if sequential else "pipeline"
    opened = open_folder(theirs)
    neox_out.save(opened, tmp_path / "ours", model_parallel=ranks, layout=layout)
    ours = tmp_path / "ours" / theirs.name
    names = sorted(p.name for p in theirs.glob("*.pt"))
    assert names == sorted(p.name for p in ours.glob("*.pt"))
    for name in names:
        a, b = torch.load(theirs / name, weights_only=False), torch.load(ours / name)
        assert (tmp_path / "ours" / "latest").read_text() == theirs.name
        if name.startswith("mp_rank"):
            assert a["args"].items() <= b["args"].items()
            assert b["iteration"] == 3
            a, b = a["module"] or {}, b["module"] or {}
        assert list(a) == list(b)
        for key in a:
            assert a[key].dtype == b[key].dtype == torch.float16
            assert torch.equal(a[key], b[key]), key


def test_modules_take_what_is_written_strictly(tmp_path):
    before = model("float32")
    neox_out.save(before, tmp_path / "x", model_parallel=2)
    made = pipelines(random_params(CONFIG), CONFIG, 2)
    for rank, pipeline in enumerate(made):
        expected = {k: v.clone() for k, v in pipeline.state_dict().items()}
        for place, module in pipeline.named_children():
            path = tmp_path / "x/global_step0" / f"layer_{int(place):02d}-model_{rank:02d}"
            state = torch.load(f"{path}-model_states.pt")
            module.load_state_dict(state, strict=True)
        for name, value in pipeline.state_dict().items():
            assert torch.equal(value, expected[name]), name


def test_another_dtype_rounds_and_refuses_what_it_cannot_hold(tmp_path):
    neox_out.save(model("float32"), tmp_path / "x", dtype="bfloat16", model_parallel=2)
    after = open_folder(tmp_path / "x")
    assert after.stored_dtype == "bfloat16"
    for parameter in (p for p in TABLE if not p.summed):
        value = model("float32").read(parameter, 0).astype(ml_dtypes.bfloat16)
        assert after.read(parameter, 0).tobytes() == value.tobytes()
    large = model("float32", change=lambda p, x: x * 0 + 1e6 if "norm" in p.path else x)
    with pytest.raises(ValueError, match="float16 cannot"):
        neox_out.save(large, tmp_path / "y", dtype="float16")
    with pytest.raises(ValueError, match="int8"):
        neox_out.save(large, tmp_path / "y", dtype="int8")
    assert not (tmp_path / "y").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]


@pytest.mark.parametrize(
    ("config", "ranks", "told"),
    [
        (CONFIG, 3, "3 model-parallel ranks cannot share the 128 rows"),
        (CONFIG, 8, "8 model-parallel ranks cannot share the 4 heads"),
        (dataclasses.replace(CONFIG, vocab_size=129), 2, "129 rows"),
        (dataclasses.replace(CONFIG, intermediate_size=100), 1, "4 x hidden_size = "),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_numbers(tmp_path, config, ranks, told):
    with pytest.raises(ValueError, match=told):
        neox_out.save(model(config=config), tmp_path / "x", model_parallel=ranks)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("vocab", [50304, 50432, 50688])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gpt_neox_pads_the_tokenizer_to_the_vocabulary(vocab, ranks):
    divisor = neox_out._divisor(dataclasses.replace(CONFIG, vocab_size=vocab), ranks)
    padded = 50277
    while padded % (divisor * ranks):  # megatron/tokenizer, _vocab_size_with_padding
        padded += 1
    assert padded == vocab


def test_steps_of_one_model_lie_beside_each_other(tmp_path):
    neox_out.save(model(), tmp_path / "x", step=1)
    before = (tmp_path / "x" / "global_step1" / "mp_rank_00_model_states.pt").read_bytes()
    neox_out.save(model(), tmp_path / "x", step=2, model_parallel=2)
    assert (tmp_path / "x" / "latest").read_text() == "global_step2"
    after = (tmp_path / "x" / "global_step1" / "mp_rank_00_model_states.pt").read_bytes()
    assert after == before
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == [
        "global_step1",
        "global_step2",
        "latest",
    ]


def test_another_model_is_not_written_beside_or_over_the_steps_of_one(tmp_path):
    neox_out.save(model(), tmp_path / "x", step=1)
    other = dataclasses.replace(CONFIG, hidden_size=32, intermediate_size=128)
    for step in (1, 2):
        with pytest.raises(FileExistsError, match="global_step1 is of another model"):
            neox_out.save(model(config=other), tmp_path / "x", step=step)
    assert (tmp_path / "x" / "latest").read_text() == "global_step1"


def test_only_an_export_is_replaced(tmp_path):
    neox_out.save(model(), tmp_path / "x", step=2)
    (tmp_path / "x" / "global_step2" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(FileExistsError):
        neox_out.save(model(), tmp_path / "x", step=3)
    assert (tmp_path / "x" / "latest").read_text() == "global_step2"
