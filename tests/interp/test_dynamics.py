"""Anything over checkpoints: as a plain loop gives it, compiled once, never computed twice."""

import gc
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import random_tokens

import pythia_jax as pj
from pythia_jax.bridge.model import Model
from pythia_jax.bridge.revisions import weights_hash
from pythia_jax.configs import ModelConfig
from pythia_jax.interp import dynamics, preflight
from pythia_jax.interp.dynamics import gradient_cosines, over_checkpoints, read_curves
from pythia_jax.interp.gradients import gradient_norms
from pythia_jax.interp.lenses import lens_losses
from pythia_jax.interp.measures import (
    gradient_norm_curve,
    lens_curve,
    noise_scale_curve,
    token_loss_curve,
)
from pythia_jax.interp.noise_scale import gradient_noise_scale
from pythia_jax.interp.result_folder import alone
from pythia_jax.model.parameters import Params
from pythia_jax.training.checkpoints import SCHEDULED

sys.path.append(str(Path(__file__).parent))
from checkpoint_cases import as_neox, as_revisions, write_steps  # type: ignore[import-not-found]
from hub_server import HubServer, hub_server  # type: ignore[import-not-found]
from swept import make_config, write_run  # type: ignore[import-not-found]

STEPS = (0, 1, 3, 6)


class Sizes(NamedTuple):
    """A tree of more than one kind."""

    largest: jax.Array
    by_name: dict[str, Any]


def sizes(params: Params, config: ModelConfig) -> Sizes:
    kernel = params["layers"]["mlp"]["dense_h_to_4h"]["kernel"]
    assert kernel.shape[0] == config.num_hidden_layers
    return Sizes(
        jnp.max(params["embed_in"]["embedding"]),
        {"rows": jnp.sum(kernel, axis=-1), "short": [kernel[0, 0, :3].astype(jnp.bfloat16)]},
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("home"), STEPS)


@pytest.fixture(scope="module")
def models(tiny: Path) -> dict[int, Model]:
    return {step: pj.load(tiny, step=step) for step in STEPS}


@pytest.fixture(scope="module")
def config(models: dict[int, Model]) -> ModelConfig:
    return models[0].config


def looped(models: dict[int, Model], fn: Any) -> Any:
    each = [jax.device_get(fn(model.params, model.config)) for model in models.values()]
    return jax.tree.map(lambda *values: np.stack(values), *each)


def assert_same(found: Any, wanted: Any, **how: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, np.asarray(other, np.float32), **how)


def over(fn: Any, checkpoints: Any, **how: Any) -> dynamics.OverCheckpoints:
    return over_checkpoints(fn, checkpoints, show_progress=False, **how)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that something was computed of."""
    steps: list[int] = []
    compute = dynamics._Work._compute

    def counting(self: Any, params: Params, config: ModelConfig, step: int) -> Any:
        steps.append(step)
        return compute(self, params, config, step)

    monkeypatch.setattr(dynamics._Work, "_compute", counting)
    return steps


def test_it_is_what_a_plain_loop_gives(tiny: Path, models: dict[int, Model]) -> None:
    found = over(sizes, tiny)
    assert found.steps.tolist() == list(STEPS) and found.missing == {}
    assert_same(found.values, looped(models, sizes), rtol=1e-6)
    assert found.weights == tuple(weights_hash(model.params) for model in models.values())
    some = over(sizes, str(tiny), revisions="0:4:3")
    assert some.steps.tolist() == [0, 3]
    np.testing.assert_array_equal(some.values.largest, found.values.largest[[0, 2]])


def test_pairs_of_step_and_parameters_are_taken_as_they_come(
    models: dict[int, Model], config: ModelConfig
) -> None:
    held: list[int] = []

    def come() -> Iterator[tuple[int, Params]]:
        for step, model in models.items():
            held.append(step)
            yield step, model.params

    found = over(sizes, come(), config=config)
    assert found.steps.tolist() == held == list(STEPS)
    assert_same(found.values, looped(models, sizes), rtol=1e-6)
    as_numpy = [(step, jax.device_get(model.params)) for step, model in models.items()]
    assert over(sizes, as_numpy, config=config).weights == found.weights


def test_what_does_not_fit_is_refused_with_the_numbers_and_nothing_is_kept(
    models: dict[int, Model], config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [(step, model.params) for step, model in models.items()]
    size = sum(x.nbytes for x in jax.tree.leaves(models[0].params))
    monkeypatch.setattr(preflight, "host_memory", lambda: size)
    with pytest.raises(MemoryError, match=f"takes .* {preflight.in_bytes(size)} are free; cut"):
        over(sizes, pairs, config=config, out=tmp_path / "out", name="sizes")
    assert not list(tmp_path.rglob("*.npz"))


def test_it_is_traced_and_compiled_once(tiny: Path) -> None:
    events, counts = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: events.append(event)
    )
    traces: list[int] = []

    def traced(params: Params, config: ModelConfig) -> jax.Array:
        traces.append(1)
        return params["final_layer_norm"]["scale"]

    each = dynamics._Work._one

    def watching(self: Any, arrived: Any) -> None:
        each(self, arrived)
        time.sleep(0.2)  # for the next one to be loaded
        counts.append(sum("backend_compile" in event for event in events))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamics._Work, "_one", watching)
        jax.clear_caches()
        over(traced, tiny)
    assert len(traces) == 1
    assert counts[0] > 0 and counts == [counts[0]] * len(STEPS)


def test_two_sets_of_weights_are_held_at_most(tiny: Path) -> None:
    held: list[int] = []
    compute = dynamics._Work._compute

    def watching(self: Any, params: Params, config: ModelConfig, step: int) -> Any:
        found = compute(self, params, config, step)
        time.sleep(0.5)  # for the next one to be loaded
        gc.collect()
        shape = params["embed_in"]["embedding"].shape
        held.append(sum(array.shape == shape for array in jax.live_arrays()) - before)
        return found

    gc.collect()
    before = sum(array.shape == (304, 32) for array in jax.live_arrays())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamics._Work, "_compute", watching)
        over(lambda params, config: params["final_layer_norm"]["scale"], tiny)
    assert held == [2, 2, 2, 1]


# Kept in a folder.


def test_what_is_there_is_not_computed_again(
    tiny: Path, models: dict[int, Model], tmp_path: Path, computed: list[int]
) -> None:
    out = tmp_path / "out"
    first = over(sizes, tiny, revisions="0,1", out=out, name="sizes")
    assert computed == [0, 1] and first.steps.tolist() == [0, 1]
    found = over(sizes, tiny, out=out, name="sizes")
    assert computed == [0, 1, 3, 6]
    assert_same(found.values, looped(models, sizes), rtol=1e-6)
    again = over(sizes, tiny, out=out, name="sizes")
    assert computed == [0, 1, 3, 6] and again.weights == found.weights
    assert_same(again.values, found.values)
    (tmp_path / "elsewhere").symlink_to(tiny)
    over(sizes, tmp_path / "elsewhere", out=out, name="sizes")
    pairs = [(step, model.params) for step, model in models.items()]
    with pytest.raises(ValueError, match="holds model 'tiny', not None"):
        over(sizes, pairs, config=models[0].config, out=out, name="sizes")
    assert computed == [0, 1, 3, 6]
    kept = read_curves(out)
    assert kept["steps"].tolist() == list(STEPS)
    np.testing.assert_array_equal(kept["values/by_name/rows"], found.values.by_name["rows"])
    assert {path.name for path in out.rglob("*") if path.is_file()} == {
        "about.json", "curves.npz", *(f"{step}.npz" for step in STEPS),
    }  # fmt: skip


def test_pairs_are_known_by_their_weights(
    models: dict[int, Model], config: ModelConfig, tmp_path: Path, computed: list[int]
) -> None:
    pairs = [(step, model.params) for step, model in models.items()]
    over(sizes, pairs[:2], config=config, out=tmp_path / "out", name="sizes")
    over(sizes, pairs, config=config, out=tmp_path / "out", name="sizes")
    assert computed == [0, 1, 3, 6]
    with pytest.raises(ValueError, match=r"3\.npz: of other weights, those of step 3"):
        over(sizes, [(3, models[6].params)], config=config, out=tmp_path / "out", name="sizes")


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pythia_jax.interp import dynamics
compute, calls = dynamics._Work._compute, []

def deadly(self, params, config, step):
    calls.append(step)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return compute(self, params, config, step)

dynamics._Work._compute = deadly
run, out = sys.argv[2:]
dynamics.over_checkpoints(
    lambda params, config: params["final_layer_norm"]["scale"], run, out=out, name="scale",
    show_progress=False,
)
"""


def test_a_killed_call_goes_on_with_what_it_had(
    tiny: Path, models: dict[int, Model], tmp_path: Path, computed: list[int]
) -> None:
    package, out = str(Path(pj.__file__).parents[1]), tmp_path / "out"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, package, str(tiny), str(out)], check=False, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(FileNotFoundError, match="has not ended"):
        read_curves(out)

    def scale(params: Params, config: ModelConfig) -> jax.Array:
        return params["final_layer_norm"]["scale"]

    found = over(scale, tiny, out=out, name="scale")
    assert computed == [3, 6]
    assert_same(found.values, looped(models, scale))


def test_a_folder_of_something_else_is_refused_and_left_alone(
    tiny: Path, models: dict[int, Model], tmp_path: Path, computed: list[int]
) -> None:
    out = tmp_path / "out"
    over(sizes, tiny, revisions="0,1", out=out, name="sizes")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    del computed[:]

    def other(params: Params, config: ModelConfig) -> jax.Array:
        return params["final_layer_norm"]["scale"]

    with pytest.raises(ValueError, match="name= is wanted with out="):
        over(sizes, tiny, out=out)
    with pytest.raises(ValueError, match="holds name 'sizes', not 'others'; choose another"):
        over(sizes, tiny, out=out, name="others")
    with pytest.raises(ValueError, match="holds values of shapes"):
        over(other, tiny, out=out, name="sizes")
    # Of the same name, and step 6, which is asked for, is not in the folder; but step 1 is.
    (tmp_path / "other").mkdir()
    namesake = make_config(tmp_path / "other", checkpoint={"extra_steps": [1]})
    bigger = write_steps(namesake, dict.fromkeys((1, 6), models[6].params))
    with pytest.raises(ValueError, match=r"1\.npz: of other weights, those of .* step 1"):
        over(sizes, bigger, revisions="6", out=out, name="sizes")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="strange: holds something else"):
        over(sizes, tiny, out=tmp_path / "strange", name="sizes")
    with alone(out), pytest.raises(RuntimeError, match="another process is writing there"):
        over(sizes, tiny, out=out, name="sizes")
    assert not computed
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 2"):
        over(sizes, tiny, revisions="2", out=tmp_path / "none", name="sizes")
    assert not (tmp_path / "none").exists()


# What is missing.


def test_a_checkpoint_that_cannot_be_loaded_is_told_passed_over_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, computed: list[int]
) -> None:
    run = write_run(tmp_path, (0, 1, 2))
    whole = {}
    for path in (run / SCHEDULED / "1").rglob("*"):
        if path.parent.name == "d":
            whole[path] = path.read_bytes()
            path.write_bytes(os.urandom(len(whole[path])))
    with caplog.at_level(logging.WARNING, logger="pythia_jax"):
        found = over(sizes, run, out=tmp_path / "out", name="sizes")
    assert found.steps.tolist() == [0, 2] and list(found.missing) == [1]
    assert "step 1: passed over" in caplog.text
    assert all(np.isfinite(leaf).all() and len(leaf) == 2 for leaf in jax.tree.leaves(found.values))
    for path, content in whole.items():
        path.write_bytes(content)
    found = over(sizes, run, out=tmp_path / "out", name="sizes")
    assert found.steps.tolist() == [0, 1, 2] and not found.missing
    assert computed == [0, 2, 1]


def test_what_is_not_finite_is_never_among_the_values(
    models: dict[int, Model], config: ModelConfig
) -> None:
    broken = jax.tree.map(lambda x: x, models[3].params)
    broken["layers"]["mlp"]["dense_h_to_4h"]["kernel"] *= jnp.nan
    pairs = [(0, models[0].params), (3, broken), (6, models[6].params)]
    found = over(sizes, pairs, config=config)
    assert found.steps.tolist() == [0, 6]
    assert found.missing == {3: "what it gives is not finite: by_name/rows, by_name/short/0"}
    with pytest.raises(ValueError, match="nothing was computed of any checkpoint: step 3: what"):
        over(sizes, [(3, broken)], config=config)


def test_pairs_that_do_not_fit_are_refused(models: dict[int, Model], config: ModelConfig) -> None:
    params = models[0].params
    with pytest.raises(ValueError, match="give config="):
        over(sizes, [(0, params)])
    with pytest.raises(ValueError, match="step 0 comes after step 1"):
        over(sizes, [(1, params), (0, params)], config=config)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    with pytest.raises(ValueError, match=r"step 1: \S+ is bfloat16, and was float32 in the first"):
        over(lambda params, config: jnp.ones(()), [(0, params), (1, half)], config=config)
    with pytest.raises(ValueError, match="config= is for pairs"):
        over(sizes, "EleutherAI/pythia-70m", config=config)


# Other kinds of checkpoints.


def test_a_folder_of_gpt_neox_gives_the_same(
    tiny: Path, models: dict[int, Model], tmp_path: Path, computed: list[int]
) -> None:
    folder = as_neox(tiny, tmp_path / "neox", {step: step for step in (0, 3, 6)})
    found = over(sizes, folder, out=tmp_path / "out", name="sizes")
    assert found.steps.tolist() == [0, 3, 6]
    some = {step: models[step] for step in (0, 3, 6)}
    assert_same(found.values, looped(some, sizes), rtol=1e-6)
    over(sizes, folder, out=tmp_path / "out", name="sizes")
    assert computed == [0, 3, 6]
    folder.rename(tmp_path / "away")
    with pytest.raises(ValueError, match="holds model 'neox', not 'away'"):
        over(sizes, tmp_path / "away", out=tmp_path / "out", name="sizes")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_server(tmp_path / "hub") as running:
        running.use(monkeypatch, tmp_path / "cache")
        yield running


def test_revisions_of_the_hub_give_the_same(
    server: HubServer, models: dict[int, Model], tmp_path: Path, computed: list[int]
) -> None:
    as_revisions(server, "someone/tiny", tmp_path / "hf", models)
    server.add("someone/tiny", "step9", {"config.json": b"{}"})
    found = over(sizes, "someone/tiny", out=tmp_path / "out", name="sizes")
    assert found.steps.tolist() == list(STEPS)
    assert list(found.missing) == [9] and "has no weights" in found.missing[9]
    assert_same(found.values, looped(models, sizes), rtol=1e-6)
    again = over(sizes, "someone/tiny", revisions="0:9", out=tmp_path / "out", name="sizes")
    assert computed == list(STEPS)
    assert_same(again.values, found.values)
    about = json.loads((tmp_path / "out" / "about.json").read_bytes())
    assert (about["model"], about["name"]) == ("tiny", "sizes")


# What is made for curves.


@pytest.mark.slow
def test_curves_are_those_of_the_functions_that_they_are_named_after(
    tiny: Path, models: dict[int, Model], config: ModelConfig
) -> None:
    tokens, some = random_tokens(config, 3, 13), {step: models[step] for step in (0, 3)}
    cases: list[Any] = [
        (lens_curve(tokens, layers=(0, 2)), lambda p, c: lens_losses(p, tokens, c, layers=(0, 2))),
        (token_loss_curve(tokens), lambda p, c: pj.token_losses(p, tokens, c)),
        (
            gradient_norm_curve(tokens, parameters="layers/mlp/*", reduction="mean"),
            lambda p, c: gradient_norms(p, tokens, c, parameters="layers/mlp/*", reduction="mean"),
        ),
    ]
    for curve, plain in cases:
        found = over(curve, tiny, revisions="0,3")
        assert_same(found.values, looped(some, plain), rtol=2e-4, atol=1e-5)


@pytest.mark.slow
def test_the_noise_scale_over_checkpoints_is_that_of_each(
    tiny: Path, models: dict[int, Model], config: ModelConfig
) -> None:
    tokens = random_tokens(config, 3, 13)
    found = over(noise_scale_curve(tokens), tiny, revisions="0,3")
    wanted = looped(
        {step: models[step] for step in (0, 3)},
        lambda params, config: gradient_noise_scale(params, tokens, config)["whole"],
    )
    assert_same(found.values["whole"], wanted, rtol=1e-3)


def test_curves_have_the_name_of_their_tokens(config: ModelConfig) -> None:
    tokens = random_tokens(config, 3, 13)
    assert token_loss_curve(tokens).name != token_loss_curve(tokens[:2]).name
    with pytest.raises(ValueError, match="noise scale wants"):
        noise_scale_curve(tokens[:1])
    with pytest.raises(ValueError, match="matches no parameter"):
        gradient_norm_curve(tokens, parameters="layers/nothing")


@pytest.mark.slow
def test_cosines_are_those_of_the_gradients(
    tiny: Path, models: dict[int, Model], config: ModelConfig
) -> None:
    tokens = random_tokens(config, 3, 13)
    rows, gradient_of = [], jax.jit(jax.grad(pj.loss), static_argnums=2)
    for model in models.values():
        gradient = gradient_of(model.params, tokens, config)["layers"]
        rows.append(
            np.concatenate([np.asarray(x, float).ravel() for x in jax.tree.leaves(gradient)])
        )
    norms = np.array([np.linalg.norm(row) for row in rows])
    cosines = np.array([[a @ b for a in rows] for b in rows]) / norms / norms[:, None]
    whole = gradient_cosines(
        tiny, tokens, parameters="layers/*", dimension=None, show_progress=False
    )
    assert whole.steps.tolist() == list(STEPS)
    np.testing.assert_allclose(whole.cosines, cosines, atol=1e-3)
    np.testing.assert_allclose(whole.norms, norms, rtol=1e-3)
    sketched = gradient_cosines(tiny, tokens, parameters="layers/*", show_progress=False)
    np.testing.assert_allclose(sketched.cosines, cosines, atol=5 / np.sqrt(8192))
    np.testing.assert_allclose(sketched.norms, norms, rtol=1e-3)
