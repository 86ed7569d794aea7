"""What a run is: another one is refused in its folder, other surroundings are told."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from small_runs import Make

from pythia_jax import configs, data
from pythia_jax.configs import ConfigError
from pythia_jax.training import provenance
from pythia_jax.training.trainer import run_folder, train


def test_another_config_is_refused_and_the_run_is_left_alone(make_config: Make) -> None:
    train(make_config(), stop_at=2, show_progress=False)
    changed = make_config(data={"seed": 7}, training={"batch_size": 8})
    with pytest.raises(ConfigError, match=r"data\.seed was 1234, is 7.*training\.batch_size"):
        train(changed, show_progress=False)
    assert train(make_config(), stop_at=3, show_progress=False).resumed_from == 2


def test_what_does_not_change_the_run_may_change(make_config: Make) -> None:
    with run_folder(make_config()):
        pass
    with run_folder(make_config(data={"order": "neox", "test_weights": None})):
        pass


def test_ids_outside_the_vocabulary_are_refused_before_the_first_step(make_config: Make) -> None:
    config = make_config(model={"vocab_size": 60})
    with pytest.raises(ValueError, match=r"corpus\.bin: .*token ids are not 0 to 59"):
        train(config, show_progress=False)
    assert not Path(config.checkpoint.directory).exists()


def test_another_validation_order_is_refused(make_config: Make) -> None:
    with run_folder(make_config()):
        pass
    with (
        pytest.raises(ConfigError, match=r"evaluation\.every was 8, is 4"),
        run_folder(make_config(evaluation={"every": 4})),
    ):
        pass


@pytest.mark.parametrize("content", ["", "{}", "model: [", "model: {hidden_size: 3", "\0"])
def test_a_damaged_config_of_a_run_is_told(make_config: Make, content: str) -> None:
    config = make_config()
    saved = Path(config.checkpoint.directory) / "config.yaml"
    with run_folder(config):
        pass
    saved.write_text(content)
    with pytest.raises(ConfigError, match=r"config\.yaml is damaged"), run_folder(config):
        pass
    assert saved.read_text() == content


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_damaged_record_of_the_data_is_told(make_config: Make, content: str) -> None:
    config = make_config()
    with run_folder(config):
        pass
    (Path(config.checkpoint.directory) / "data.json").write_text(content)
    with pytest.raises(ConfigError, match=r"data\.json is damaged"), run_folder(config):
        pass


@pytest.mark.parametrize("split", ["train", "validation"])
def test_data_may_move_but_not_change(make_config: Make, tmp_path: Path, split: str) -> None:
    config = make_config()
    with run_folder(config):
        pass
    for suffix in (".bin", ".idx"):
        shutil.copy(tmp_path / f"corpus{suffix}", tmp_path / f"moved{suffix}")
    moved = make_config(data={split: [str(tmp_path / "moved")]})
    with run_folder(moved):
        pass
    assert configs.load(tmp_path / "run" / "config.yaml") == moved
    other = data.IndexedDatasetWriter(tmp_path / "moved", np.dtype(np.uint16))
    with other as writer:
        writer.add(np.zeros(5000, np.uint16))
    with pytest.raises(ConfigError, match=rf"other data: data\.{split}"), run_folder(moved):
        pass
    with run_folder(config):
        pass


def test_the_run_folder_takes_its_tokenizer_along(make_config: Make, tmp_path: Path) -> None:
    source = tmp_path / "elsewhere" / "tokenizer.json"
    source.parent.mkdir()
    source.write_text('{"a": 1}')
    of_file = dataclasses.replace(make_config(), tokenizer=str(source))
    of_folder = dataclasses.replace(make_config(), tokenizer=str(source.parent))
    copy = tmp_path / "run" / "tokenizer.json"
    for config in (of_file, of_folder):
        with run_folder(config):
            assert copy.read_text() == '{"a": 1}'
    source.write_text('{"a": 2}')
    with pytest.raises(ConfigError, match="another tokenizer"), run_folder(of_file):
        pass
    source.unlink()
    with run_folder(of_file):
        assert copy.read_text() == '{"a": 1}'


def test_a_missing_tokenizer_is_told_before_training(make_config: Make, tmp_path: Path) -> None:
    config = dataclasses.replace(make_config(), tokenizer=str(tmp_path / "gone.json"))
    with pytest.raises(ConfigError, match=r"tokenizer: .*gone\.json"):
        train(config, show_progress=False)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_other_surroundings_are_told(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config()
    train(config, stop_at=2, show_progress=False)
    with caplog.at_level("INFO", "pythia_jax"):
        train(config, stop_at=3, show_progress=False)
    assert "bit for bit" in caplog.text
    real = provenance.surroundings
    monkeypatch.setattr(provenance, "surroundings", lambda *a: {**real(*a), "cores": 77})
    with caplog.at_level("WARNING", "pythia_jax"):
        train(config, stop_at=4, show_progress=False)
    assert "equal to rounding only" in caplog.text and "-> 77" in caplog.text


def test_surroundings_are_the_runtime_the_mesh_and_the_cores(make_config: Make) -> None:
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    now = provenance.surroundings(make_config(), one)
    assert now == json.loads(json.dumps(now)), "it must come back from a checkpoint as it went"
    assert now["runtime"]["dtype"] == "float32" and now["runtime"]["remat"] == "none"
    assert now["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1, "slices": 1}
    assert len(now["cpus"]) == now["cores"]
    changed = partial(provenance.changed_surroundings, now)
    assert changed(now) == []
    assert changed({**now, "cpus": [90]}) == []
    assert changed({**now, "cores": 77}) == [f"cores {now['cores']} -> 77"]
    other = make_config(training={"remat": "full", "attention": "einsum"})
    other = provenance.surroundings(other, one)
    assert changed(other) == [
        "runtime.attention auto -> einsum",
        "runtime.remat none -> full",
    ]
