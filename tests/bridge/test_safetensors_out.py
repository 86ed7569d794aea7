"""Safetensors files written tensor by tensor: the library's own bytes, with little in memory."""

import threading

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file

from pythia_jax.bridge import safetensors_out
from pythia_jax.bridge.safetensors_out import DTYPES, Tensor, write

SHAPES = {"b.weight": (130, 48), "a.10": (7,), "a.2": (3, 1), "embed_out": (33, 5), "é": (1, 1)}


def arrays(dtype="float32", shapes=SHAPES):
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape).astype(DTYPES[dtype]) for name, shape in shapes.items()
    }


def tensors(values):
    return [Tensor(name, value.shape, lambda v=value: v) for name, value in values.items()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_file_is_the_librarys_own_byte_for_byte(dtype, tmp_path):
    values = arrays(dtype)
    save_file(values, tmp_path / "theirs", metadata={"format": "pt"})
    write(tmp_path / "ours", tensors(values), dtype)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    with safe_open(tmp_path / "ours", framework="numpy") as handle:
        assert handle.metadata() == {"format": "pt"}


@pytest.mark.parametrize("block", [1, 1000, 1 << 20])
def test_transposed_and_strided_values_are_written_in_rows(block, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_out, "BLOCK", block)
    value = arrays()["b.weight"]
    write(tmp_path / "ours", tensors({"turned": value.T, "some": value[::3, 1::2]}), "float32")
    found = load_file(tmp_path / "ours")
    np.testing.assert_array_equal(found["turned"].numpy(), value.T)
    np.testing.assert_array_equal(found["some"].numpy(), value[::3, 1::2])


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize(
    "source", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16], ids=str
)
def test_values_are_rounded_as_torch_rounds_them(source, target, tmp_path):
    value = np.random.default_rng(1).standard_normal((40, 60)).astype(source)
    write(tmp_path / "ours", tensors({"x": value.T}), target)
    wanted = torch.tensor(value.astype(np.float64)).to(getattr(torch, target)).T
    assert torch.equal(load_file(tmp_path / "ours")["x"], wanted)


@pytest.mark.parametrize("block", [100, 1 << 20])
@pytest.mark.parametrize(("dtype", "value"), [("float16", 65520.0), ("bfloat16", 3.4e38)])
def test_values_that_the_dtype_cannot_hold_are_an_error(dtype, value, block, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_out, "BLOCK", block)
    values = arrays()
    values["b.weight"][90, 3] = -value
    with pytest.raises(ValueError, match=rf"b\.weight holds .*which {dtype} cannot.*float32"):
        write(tmp_path / "ours", tensors(values), dtype)


def test_infinities_and_nans_that_were_there_are_kept(tmp_path):
    value = np.array([np.inf, -np.inf, np.nan, 1.0], np.float32)
    write(tmp_path / "ours", tensors({"x": value}), "float16")
    np.testing.assert_array_equal(load_file(tmp_path / "ours")["x"].float().numpy(), value)


def test_shape_other_than_promised_is_an_error(tmp_path):
    wrong = Tensor("x", (4, 5), lambda: np.zeros((5, 4), np.float32))
    with pytest.raises(ValueError, match=r"x has shape \(5, 4\), \(4, 5\)"):
        write(tmp_path / "ours", [wrong], "float32")


def test_reads_at_one_time_are_together_no_larger_than_the_largest_tensor(tmp_path):
    lock, now, most = threading.Lock(), [0], [0]
    together = threading.Event()
    shapes = {f"{i:02}": (10 if i % 5 else 40, 25) for i in range(30)}

    def tensor(name, shape):
        size = 4 * shape[0] * shape[1]

        def read():
            with lock:
                now[0] += size
                most[0] = max(most[0], now[0])
                if now[0] > size:
                    together.set()
            if not together.is_set():
                together.wait(0.05)
            with lock:
                now[0] -= size
            return np.full(shape, int(name), np.float32)

        return Tensor(name, shape, read)

    write(tmp_path / "ours", [tensor(*item) for item in shapes.items()], "float32")
    assert most[0] <= 4 * 40 * 25 and together.is_set()
    found = load_file(tmp_path / "ours")
    assert all((found[name] == int(name)).all() for name in shapes)
