"""Where metrics go: one file that crashes do not spoil, and Weights & Biases where asked."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from small_runs import Make

from pythia_jax import configs
from pythia_jax.configs import ConfigError
from pythia_jax.training.records import Records, drop_lines_from, read_metrics, require_wandb


def test_a_cut_off_line_is_dropped_from_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "loss": 2.0}\n{"st')
    assert drop_lines_from(path, 1) == [{"step": 1, "loss": 2.0}]
    assert path.read_text() == '{"step": 0, "loss": 1.0}\n'


def test_dropping_from_a_run_that_has_no_metrics_makes_no_file(tmp_path: Path) -> None:
    assert drop_lines_from(tmp_path / "metrics.jsonl", 3) == []
    assert list(tmp_path.iterdir()) == []


def test_a_line_is_on_disk_when_it_is_written_and_holds_no_nan(
    make_config: Make, tmp_path: Path
) -> None:
    records = Records(make_config(), tmp_path, start=0)
    records.write(3, {"loss": 0.5, "skipped": True})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 3, "loss": 0.5, "skipped": true}\n'
    with pytest.raises(ValueError, match="JSON"):
        records.write(4, {"loss": float("nan")})
    assert (tmp_path / "metrics.jsonl").read_text() == text
    records.close(failed=False)


class FakeWandb(ModuleType):
    """A stand-in for wandb that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[dict[str, Any]] = []

    def init(self, **how: Any) -> Any:
        run: dict[str, Any] = {"how": how, "axes": {}, "logged": [], "finished": None}
        self.runs.append(run)

        def axis(name: str, step_metric: str | None = None) -> None:
            run["axes"][name] = step_metric

        return SimpleNamespace(
            define_metric=axis,
            log=run["logged"].append,
            finish=lambda exit_code: run.update(finished=exit_code),
        )


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_weights_and_biases_gets_what_the_file_gets_over_our_own_steps(
    make_config: Make, wandb: FakeWandb, tmp_path: Path
) -> None:
    config = make_config(logging={"wandb": "pythia"})
    records = Records(config, tmp_path, start=0)
    records.write(0, {"loss": 2.0})
    records.write(10, {"loss": 1.0, "skipped": True})
    records.close(failed=True)
    (run,) = wandb.runs
    assert run["logged"] == read_metrics(tmp_path / "metrics.jsonl")
    assert run["axes"] == {"step": None, "*": "step"}
    assert (run["how"]["project"], run["how"]["name"]) == ("pythia", "run")
    assert run["how"]["config"] == configs.to_dict(config)
    json.dumps(run["how"]["config"])
    assert run["finished"] == 1


def test_a_resumed_run_goes_on_under_the_id_kept_in_its_folder(
    make_config: Make, wandb: FakeWandb, tmp_path: Path
) -> None:
    config = make_config(logging={"wandb": "pythia"})
    for folder in ("a", "a", "b"):
        (tmp_path / folder).mkdir(exist_ok=True)
        Records(config, tmp_path / folder, start=0).close(failed=False)
    ids = [run["how"]["id"] for run in wandb.runs]
    assert ids[0] == ids[1] != ids[2]
    assert all(run["how"]["resume"] == "allow" for run in wandb.runs)


def test_weights_and_biases_is_left_alone_unless_asked_for(
    make_config: Make, wandb: FakeWandb, tmp_path: Path
) -> None:
    assert require_wandb(make_config()) is None
    Records(make_config(), tmp_path, start=0).close(failed=False)
    assert wandb.runs == [] and not (tmp_path / "wandb_id").exists()


@pytest.mark.parametrize("leftover", [False, True])
def test_asking_for_what_is_not_installed_is_one_clear_error(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, leftover: bool
) -> None:
    # None in sys.modules makes an import fail; an empty module is what a folder of wandb's gives.
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb") if leftover else None)
    with pytest.raises(ConfigError, match=r"logging\.wandb: 'pythia': .*pip install wandb"):
        require_wandb(make_config(logging={"wandb": "pythia"}))
