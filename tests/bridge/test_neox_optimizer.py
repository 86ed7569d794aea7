"""GPT-NeoX's optimizer states, written by torch as DeeperSpeed does, read into a train state."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from neox_folders import (
    CONFIG,
    DynamicLossScaler,
    Pipeline,
    as_torch_state,
    flat_groups,
    groups_of,
    partitions,
    pipelines,
    write,
    write_zero,
)

from pythia_jax import configs, sharding
from pythia_jax.bridge.neox_optimizer import has_train_state, train_state
from pythia_jax.bridge.opened import CheckpointError
from pythia_jax.training.step import init_state, jitted_train_step, state_shardings

STEPS = 6


def run_config(precision="float32", **optimizer):
    return configs.from_dict(
        {
            "model": dataclasses.asdict(CONFIG),
            "data": {"sequence_length": 16},
            "optimizer": {"warmup_fraction": 0.1, "peak_learning_rate": 1e-2, **optimizer},
            "training": {"steps": 20, "batch_size": 4, "precision": precision, "remat": "none"},
        }
    )


def batch(step):
    return np.random.default_rng(step).integers(0, CONFIG.vocab_size, (4, 17))


def trained(config, state, start, stop):
    for step in range(start, stop):
        state, metrics = jitted_train_step(state, batch(step), config=config)
        assert metrics["updated"]
    return state


def kept(state):
    """On the host: a train step gives up the state that it is given."""
    return jax.tree.map(np.array, state)


@pytest.fixture(scope="module")
def ran():
    """The state of step 6 of a run, and that of step 11."""
    config = run_config()
    before = kept(trained(config, init_state(config), 0, STEPS))
    after = kept(trained(config, jax.tree.map(jnp.asarray, before), STEPS, STEPS + 5))
    return before, after


def trees(state):
    adam = state.opt_state[1]
    return {"fp32": state.params, "exp_avg": adam.mu, "exp_avg_sq": adam.nu}


def assert_same_state(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    named = zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True)
    for (path, x), y in named:
        assert x.dtype == y.dtype, path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def weights(save, state, ranks=1, step=STEPS, **more):
    return write(save, CONFIG, pipelines(state.params, CONFIG, ranks), step, **more)


FORMS = [
    *(("elastic", data, ranks, most) for data in (2, 4) for ranks in (1, 2) for most in (10**9,)),
    *(("elastic", data, 1, 10_000) for data in (2, 4)),
    ("elastic", 3, 2, 10_000),
    ("rigid", 2, 1, 10**9),
    ("rigid", 4, 1, 10_000),
    ("later", 3, 2, 10**9),
]


@pytest.mark.parametrize(("form", "data", "ranks", "most"), FORMS)
def test_a_zero_1_checkpoint_goes_on_as_if_never_stopped(tmp_path, ran, form, data, ranks, most):
    before, after = ran
    config = run_config()
    folder = weights(tmp_path, before, ranks)
    how = {} if form == "elastic" else {"count": STEPS + 1}
    write_zero(folder, CONFIG, trees(before), data, ranks=ranks, most=most, form=form, **how)
    assert has_train_state(tmp_path)
    found = train_state(tmp_path, config)
    assert_same_state(found, before)
    assert_same_state(trained(config, found, STEPS, STEPS + 5), after)


def test_the_cases_have_padding_and_several_intervals():
    cases = {(data, most) for _, data, _, most in FORMS}
    flat = [sum(p.numel() for p in group) for group in groups_of(Pipeline(CONFIG, 1))]
    cut = {case: [partitions(torch.zeros(n), *case) for n in flat] for case in cases}
    padded = [g for case in cut.values() for g in case if any(pad for rank in g for _, pad in rank)]
    several = [g for case in cut.values() for g in case if len(g[0]) > 1]
    assert padded and several and any(g is h for g in several for h in padded)


def stage_0(before, form, rank=0):
    """`optimizer` of an mp_rank file: FP16_Optimizer's, or torch's own."""
    if form == "flat":
        flat = flat_groups(trees(before), CONFIG, 1)[rank]
        moments = [
            [{"exp_avg": m, "exp_avg_sq": v}]
            for m, v in zip(flat["exp_avg"], flat["exp_avg_sq"], strict=True)
        ]
        base = as_torch_state(moments, STEPS + 1)
        return {
            "dynamic_loss_scale": False,
            "cur_scale": 1,
            "optimizer_state_dict": base,
            "fp32_groups_flat": flat["fp32"],
        }
    lists = {
        kind: groups_of(pipelines(tree, CONFIG, 1, add=kind == "fp32")[rank])
        for kind, tree in trees(before).items()
    }
    moments = [
        [{"exp_avg": m.detach(), "exp_avg_sq": v.detach()} for m, v in zip(ms, vs, strict=True)]
        for ms, vs in zip(lists["exp_avg"], lists["exp_avg_sq"], strict=True)
    ]
    base = as_torch_state(moments, STEPS + 1)
    if form == "torch":
        return base
    masters = [[p.detach() for p in group] for group in lists["fp32"]]
    return {"optimizer_state_dict": base, "fp32_groups": masters}


@pytest.mark.parametrize("form", ["flat", "lists", "torch"])
@pytest.mark.parametrize("sequential", [False, True])
def test_without_zero_the_state_lies_beside_the_weights(tmp_path, ran, form, sequential):
    before, _ = ran
    dtype = torch.float32 if form == "torch" else torch.bfloat16
    optimizer = stage_0(before, form)
    weights(tmp_path, before, sequential=sequential, dtype=dtype, optimizer=optimizer)
    assert has_train_state(tmp_path)
    assert_same_state(train_state(tmp_path, run_config()), before)


def fewer_masters(state):
    state["fp32_groups_flat"] = state["fp32_groups_flat"][:1]


def three_groups(state):
    state["optimizer_state_dict"]["param_groups"] *= 2
    del state["fp32_groups_flat"]


def counter_of_text(state):
    state["optimizer_state_dict"]["param_groups"][0]["step"] = "7"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (fewer_masters, "form that is not known"),
        (three_groups, "in 4 parameter groups"),
        (counter_of_text, "Adam's counter is a str"),
    ],
)
def test_a_state_beside_the_weights_that_is_no_such_is_refused(tmp_path, ran, change, told):
    state = stage_0(ran[0], "flat")
    change(state)
    weights(tmp_path, ran[0], dtype=torch.bfloat16, optimizer=state)
    with pytest.raises(CheckpointError, match=rf"mp_rank_00_model_states\.pt: .*{told}"):
        train_state(tmp_path, run_config())


def test_half_weights_alone_are_no_masters(tmp_path, ran):
    weights(tmp_path, ran[0], optimizer=stage_0(ran[0], "torch"))
    with pytest.raises(CheckpointError, match=r"where float32 numbers .* there is float16"):
        train_state(tmp_path, run_config())


def test_one_group_holds_all_where_nothing_is_decayed(tmp_path, ran):
    """With weight-decay 0 GPT-NeoX makes one group, in the order of the modules."""
    before, _ = ran
    parts = {
        kind: list(pipelines(tree, CONFIG, 1, add=kind == "fp32")[0].parameters())
        for kind, tree in trees(before).items()
    }
    flat = {
        kind: torch.cat([p.detach().reshape(-1) for p in tensors])
        for kind, tensors in parts.items()
    }
    masters = [flat.pop("fp32")]
    base = as_torch_state([[flat]], STEPS + 1)
    optimizer = {"optimizer_state_dict": base, "fp32_groups_flat": masters}
    weights(tmp_path, before, optimizer=optimizer)
    assert_same_state(train_state(tmp_path, run_config()), before)


def test_ranks_hold_the_moments_of_a_row_parallel_bias_each_and_half_the_bias(tmp_path, ran):
    """Adam on each of n copies with the gradient of their sum is one step of n times the length."""
    before, _ = ran
    write_zero(weights(tmp_path, before, 2), CONFIG, trees(before), 2, ranks=2)
    config = run_config(row_parallel_bias_multiple=2)
    found = train_state(tmp_path, config)
    assert_same_state(found, before)
    after = trained(config, found, STEPS, STEPS + 1)
    adam, rate = after.opt_state[1], configs_rate(config)
    for name in ("attention", "mlp"):
        layer = "dense" if name == "attention" else "dense_4h_to_h"
        bias, m, v = (
            np.asarray(tree["layers"][name][layer]["bias"], np.float64)
            for tree in (before.params, adam.mu, adam.nu)
        )
        count = STEPS + 2
        step = (m / (1 - 0.9**count)) / (np.sqrt(v / (1 - 0.95**count)) + 1e-8)
        copies = [bias / 2 - rate * step, bias / 2 - rate * step]
        ours = np.asarray(after.params["layers"][name][layer]["bias"])
        np.testing.assert_allclose(ours, sum(copies), rtol=1e-4, atol=1e-9)
        assert not np.allclose(ours, bias - rate * step, rtol=1e-4, atol=1e-9)


def configs_rate(config):
    """The learning rate of update 6: 20 steps, 2 of them warm-up, cosine over all of them."""
    assert config.optimizer.schedule == "neox_v1"
    peak, floor = config.optimizer.peak_learning_rate, config.optimizer.min_learning_rate
    return max(peak / 2 * (1 + np.cos(np.pi * (STEPS - 2) / 20)), floor)


def test_counters_are_the_checkpoints_own(tmp_path, ran):
    before, _ = ran
    skipped = {"lr_scheduler": {"num_iters": STEPS - 2}, "skipped_steps": 2}
    folder = weights(tmp_path / "a", before, **skipped)
    write_zero(folder, CONFIG, trees(before), 2)
    found = train_state(folder, run_config())
    assert (int(found.step), int(found.updates)) == (STEPS, STEPS - 2)
    assert int(found.opt_state[1].count) == STEPS - 2 + 1
    restarted = train_state(folder, run_config(restarts=(4,)))
    assert int(restarted.opt_state[1].count) == 2 + 1
    plain = train_state(folder, run_config(bias_correction_ahead=False))
    assert int(plain.opt_state[1].count) == STEPS - 2
    folder = weights(tmp_path / "b", before, lr_scheduler=None, skipped_steps=1)
    write_zero(folder, CONFIG, trees(before), 2, form="rigid", count=3)
    found = train_state(folder, run_config())
    assert (int(found.updates), int(found.opt_state[1].count)) == (STEPS - 1, 3)
    folder = weights(tmp_path / "c", before, lr_scheduler=None, global_steps=None)
    write_zero(folder, CONFIG, trees(before), 2)
    with pytest.raises(CheckpointError, match="num_iters"):
        train_state(folder, run_config())


def test_the_loss_scale_goes_on_too(tmp_path, ran):
    before, _ = ran
    folder = weights(tmp_path, before)
    scaler = DynamicLossScaler(
        cur_scale=512.0, cur_iter=STEPS + 10, last_overflow_iter=14, cur_hysteresis=1
    )
    write_zero(folder, CONFIG, trees(before), 2, scaler=scaler)
    scale = train_state(folder, run_config("float16")).loss_scale
    assert scale is not None
    # Its own count of steps is 10 ahead of the run's.
    found = (float(scale.scale), int(scale.hysteresis), int(scale.last_overflow))
    assert found == (512, 1, 4)
    assert train_state(folder, run_config("bfloat16")).loss_scale is None


def test_a_scale_that_never_moved_is_none_to_go_on_from(tmp_path, ran):
    """bfloat16's, of 1, from which float16 would take thousands of steps to get away."""
    weights(tmp_path, ran[0], dtype=torch.bfloat16, optimizer=stage_0(ran[0], "flat"))
    scale = train_state(tmp_path, run_config("float16")).loss_scale
    assert scale is not None
    assert (float(scale.scale), int(scale.last_overflow)) == (4096, STEPS - 1)


def test_biases_that_will_not_move_as_in_the_run_are_told(tmp_path, ran, caplog):
    write_zero(weights(tmp_path, ran[0], 2), CONFIG, trees(ran[0]), 2, ranks=2)
    train_state(tmp_path, run_config(row_parallel_bias_multiple=2))
    assert "row_parallel_bias_multiple" not in caplog.text
    train_state(tmp_path, run_config())
    assert "row_parallel_bias_multiple: 1. Set it to 2" in caplog.text


def test_the_state_is_laid_on_the_mesh_around_it(tmp_path, ran):
    before, _ = ran
    write_zero(weights(tmp_path, before), CONFIG, trees(before), 2)
    config = run_config()
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        found = train_state(tmp_path, config)
    places = state_shardings(config, mesh)
    for (path, x), place in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(places), strict=True
    ):
        assert x.sharding == place, path
    assert_same_state(found, before)


def test_what_is_missing_or_of_another_form_is_one_error(tmp_path, ran):
    before, _ = ran
    config = run_config()
    folder = weights(tmp_path, before)
    assert not has_train_state(folder)
    with pytest.raises(CheckpointError, match="no optimizer state"):
        train_state(folder, config)
    write_zero(folder, CONFIG, trees(before), 4)
    (folder / "zero_pp_rank_3_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match="by 4 data-parallel ranks, and 3 have a file"):
        train_state(folder, config)
    (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"missing, of them zero_pp_rank_1_mp_rank_00"):
        train_state(folder, config)


def spoilt(folder, change):
    path = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    tree = torch.load(path, weights_only=False)
    change(tree["optimizer_state_dict"], tree)
    torch.save(tree, path)


def stage_3(state, _):
    state["zero_stage"] = 3


def unknown_form(state, _):
    del state["local_sub_partitions_of_fp32_groups"]


def no_moments(state, _):
    state["base_optimizer_state"] = state["base_optimizer_state"][:1]


def half_moments(state, _):
    moments = state["base_optimizer_state"][0][0]
    moments["exp_avg"] = moments["exp_avg"].half()


def shorter(state, _):
    moments = state["base_optimizer_state"][1][0]
    moments["exp_avg_sq"] = moments["exp_avg_sq"][:-1]


def longer(state, _):
    masters = state["local_sub_partitions_of_fp32_groups"][0]
    masters[0] = torch.cat([masters[0], torch.ones(3)])


def other_names(_, tree):
    tree["param_shapes"]["9.adapter.weight"] = torch.Size([2])


def fewer_names(_, tree):
    tree["param_shapes"].pop("2.attention.dense.bias")


def no_names(_, tree):
    tree["param_shapes"] = [1, 2]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (stage_3, "ZeRO stage 3"),
        (unknown_form, "form that is not known"),
        (no_moments, "no Adam state of parameter group 1"),
        (half_moments, "there is float16"),
        (shorter, "numbers of exp_avg_sq"),
        (longer, "numbers of fp32"),
        (other_names, "9.adapter.weight"),
        (fewer_names, "2.attention.dense.bias|numbers of"),
        (no_names, "param_shapes does not name"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(tmp_path, ran, change, told):
    folder = weights(tmp_path, ran[0])
    write_zero(folder, CONFIG, trees(ran[0]), 1)
    spoilt(folder, lambda state, tree: change(state, tree))
    with pytest.raises(CheckpointError, match=told):
        train_state(folder, run_config())


def test_another_models_weights_are_refused_before_the_state_is_read(tmp_path, ran):
    write_zero(weights(tmp_path, ran[0]), CONFIG, trees(ran[0]), 2)
    config = run_config()
    deeper = dataclasses.replace(CONFIG, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match="missing"):
        train_state(tmp_path, dataclasses.replace(config, model=deeper))
