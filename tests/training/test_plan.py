"""Plans of a train step: what is reckoned, what is compiled, what is advised."""

import dataclasses
import json
import math

import pytest
from plan_cases import compare_with_golden, compiler, planned, shipped  # noqa: F401

from pythia_jax import configs
from pythia_jax.chips import GIB
from pythia_jax.configs import ConfigError
from pythia_jax.model import parameters
from pythia_jax.training import plan as plan_module
from pythia_jax.training import plan_text
from pythia_jax.training.flops import model_flops
from pythia_jax.training.plan import Memory, Plan, Refusal, State, plan, refusal_of
from pythia_jax.training.plan_advice import advice
from pythia_jax.training.topologies import parse

SMALL = {"training__batch_size": "8", "training__remat": "full"}


@pytest.fixture(scope="module")
def small(compiler: None) -> Plan:  # noqa: F811
    """The smallest model on the smallest slice of four: the one plan that is compiled here."""
    return planned("14m", "v5e:2x2", **SMALL)


@pytest.fixture
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("it was compiled")

    monkeypatch.setattr(plan_module, "compile_step", refuse)


# What the compiler says.


def test_small_plan_is_what_it_was(small: Plan) -> None:
    compare_with_golden(small, "pythia-14m_v5e-2x2")


def test_small_plan_fits_and_adds_up(small: Plan) -> None:
    memory = small.memory
    assert memory is not None and small.fits
    assert memory.arguments + memory.temporaries == memory.peak
    assert 0 < memory.peak < memory.needed == memory.peak + memory.program < small.limit
    assert small.excess == memory.needed - small.limit < 0
    assert (small.attention, small.microbatch, small.mesh["fsdp"]) == ("splash", 2, 4)


def test_the_state_given_up_is_taken_for_the_new_one(small: Plan) -> None:
    # The donated state, tile padding included, is every argument but the batch.
    assert small.memory is not None
    assert small.memory.aliased >= small.state.kept
    assert small.memory.arguments - small.memory.aliased < 2 * small.memory.batch + 2**16


def a_quarter(model: configs.ModelConfig | None) -> float:
    """Parameters on each of 4 devices: all but biases of wide layers are cut along `hidden`."""
    assert model is not None
    return sum(
        math.prod(p.shape(model)) / (4 if "hidden" in p.axes else 1) for p in parameters.TABLE
    )


def test_state_is_12_bytes_a_parameter_and_gradients_4(small: Plan) -> None:
    count = a_quarter(small.config.model)
    assert small.state.parameters == small.state.gradients == 4 * count
    assert small.state.moments == 2 * small.state.parameters
    assert 0 < small.state.counters < 64


def test_no_loop_of_the_loss_moves_the_unembedding(small: Plan) -> None:
    model = small.config.model
    assert model is not None
    size = model.vocab_size * model.hidden_size
    large = [c for c in small.collectives if c.elements >= size]
    assert len(large) >= 2  # gathered for the loss; its gradient reduced
    assert all(c.loops == () for c in large)


def test_the_text_tells_memory_traffic_and_work(small: Plan) -> None:
    told = plan_text.describe(small)
    for words in (
        "pythia-14m on v5e:2x2 (v5litepod-4): 4 chips",
        "attention  splash",
        "native to TPU v5e: bfloat16, int8",
        "parameters",
        "moments of the optimizer",
        "fits, 15.",
        "all-gather",
        "FLOPs a step",
        "At 40% MFU, which is assumed and not measured",
        "chip-hours",
    ):
        assert words in told
    assert "What would help" not in told


def test_the_values_are_plain(small: Plan) -> None:
    values = json.loads(json.dumps(plan_text.to_dict(small)))
    assert values["fits"] is True
    assert values["memory"]["needed"] == values["memory"]["peak"] + values["memory"]["program"]
    assert values["collectives"]["all-gather"]["count"] > 0


@pytest.mark.usefixtures("compiler")
def test_a_step_too_large_is_refused_by_the_compiler_with_what_to_change() -> None:
    made = planned("14m", "v5e:2x2", training__batch_size="8192", training__remat="none")
    assert not made.fits and made.memory is None
    refusal = made.refusal
    assert refusal is not None and refusal.compiled
    assert refusal.limit == made.limit < refusal.needed
    told = plan_text.describe(made)
    assert "DOES NOT FIT" in told
    assert "--training.remat dots" in told
    assert "--training.gradient-accumulation 2" in told
    assert "--topology v5e:2x4" in told


# What arithmetic says.


@pytest.mark.usefixtures("compiler", "nothing_compiled")
def test_a_state_that_is_too_large_is_never_compiled() -> None:
    made = planned("12b", "v5e:2x2")
    assert made.refusal is not None and not made.refusal.compiled
    count = a_quarter(made.config.model)
    assert made.refusal.needed == pytest.approx(16 * count, abs=100)  # and the counters
    # What would do: the first slice that holds 16 bytes of each parameter.
    assert 16 * count / 2 > made.limit > 16 * count / 4
    assert advice(made) == [
        "--topology v5e:4x4: 16 chips a slice; state and gradients 11.0 of 15.75 GiB each, cut "
        "over all of them"
    ]


@pytest.mark.usefixtures("compiler", "nothing_compiled")
def test_copies_of_a_state_that_is_too_large_are_to_be_cut() -> None:
    made = planned("12b", "v5e:4x8", mesh__data="8", mesh__fsdp="4")
    assert advice(made)[0].startswith("--mesh.data 1 --mesh.fsdp 32:")


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mesh__fsdp": "3"}, "does not fit 4 devices"),
        ({"mesh__tensor": "4", "training__batch_size": "7"}, None),
        ({"training__batch_size": "6"}, "does not divide"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(
    overrides: dict[str, str], message: str | None, nothing_compiled: None
) -> None:
    if message is None:  # A row of the batch needs no device of its own along `tensor`.
        with pytest.raises(AssertionError, match="it was compiled"):
            planned("14m", "v5e:2x2", **overrides)
        return
    with pytest.raises(ConfigError, match=message):
        planned("14m", "v5e:2x2", **overrides)


@pytest.mark.parametrize("mfu", [0.0, -0.1, 1.5])
def test_a_share_of_the_peak_is_a_share(mfu: float) -> None:
    with pytest.raises(ValueError, match="mfu"):
        plan(shipped("14m"), parse("v5e:2x2"), mfu)


def test_a_config_without_a_model_cannot_be_planned() -> None:
    with pytest.raises(ConfigError, match="model: missing"):
        plan(configs.for_data("some/prefix"), parse("v5e:2x2"))


# Parts, on a plan made by hand.


def made_by_hand(size: str = "1.4b", topology: str = "v5e:4x4", **overrides: str) -> Plan:
    config, place = shipped(size, **overrides), parse(topology)
    assert config.model is not None
    training = config.training
    fsdp = place.devices // config.mesh.tensor // config.mesh.data
    parts = fsdp * config.mesh.tensor
    size_of = 4 * parameters.count(config.model) // parts
    return Plan(
        config=config,
        topology=place,
        mesh={"slices": 1, "data": config.mesh.data, "fsdp": fsdp, "tensor": config.mesh.tensor},
        attention="splash",
        state=State(size_of, 2 * size_of, 40, size_of),
        memory=None,
        refusal=Refusal(20 * GIB, round(15.75 * GIB), compiled=True),
        flops=model_flops(config.model, training.batch_size, config.data.sequence_length),
        mfu=0.4,
    )


def test_advice_takes_one_step_at_a_time() -> None:
    full = {"training__remat": "full", "training__gradient_accumulation": "2"}
    flags = [line.split(":")[0] for line in advice(made_by_hand(training__remat="none"))]
    assert flags[0] == "--training.remat dots"
    flags = [line.split(":")[0] for line in advice(made_by_hand(training__remat="dots"))]
    assert flags[0] == "--training.remat full"
    flags = [line.split(":")[0] for line in advice(made_by_hand(training__remat="attn.z"))]
    assert flags[0] == "--training.remat full"
    flags = [line.split(":")[0] for line in advice(made_by_hand(**full))]
    assert flags == ["--training.gradient-accumulation 4", "--topology v5e"]


def test_one_row_a_device_leaves_only_more_cuts() -> None:
    last = {"training__remat": "full", "training__gradient_accumulation": "64"}
    flags = [line.split(":")[0] for line in advice(made_by_hand(**last))]
    assert flags == ["--mesh.tensor 2 --mesh.fsdp 8", "--topology v5e"]


def test_a_larger_slice_is_named_with_the_accumulation_it_allows() -> None:
    (line,) = (
        line
        for line in advice(made_by_hand(training__gradient_accumulation="64"))
        if line.startswith("--topology")
    )
    assert line.startswith("--topology v5e:4x8: 32 chips")
    assert "--training.gradient-accumulation 32 or less" in line


def test_the_largest_slice_has_no_larger_one() -> None:
    assert "other chips" in advice(made_by_hand("12b", "v5e:16x16"))[-1]


def test_seconds_are_flops_at_the_assumed_share_of_the_peak() -> None:
    made = made_by_hand()
    assert made.seconds == pytest.approx(made.flops / (16 * 197e12 * 0.4))
    half = dataclasses.replace(made, mfu=0.2)
    assert half.seconds == pytest.approx(2 * made.flops / (16 * 197e12 * 0.4))


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_a_precision_that_is_not_native_has_a_warning_and_no_time(precision: str) -> None:
    made = made_by_hand(training__precision=precision)
    fitting = dataclasses.replace(made, refusal=None, memory=Memory(GIB, 0, GIB, 0, 2 * GIB))
    assert not made.native and made.seconds is None
    told = plan_text.describe(fitting)
    assert f"does not multiply {precision} as it is" in told
    assert "no peak is stated" in told
    assert "warning" not in plan_text.describe(made_by_hand())


def test_what_only_just_does_not_fit_does_not_fit() -> None:
    made = dataclasses.replace(made_by_hand(), refusal=None)
    at_limit = Memory(GIB, 0, GIB, program=GIB, peak=made.limit - GIB)
    assert dataclasses.replace(made, memory=at_limit).fits
    above = dataclasses.replace(at_limit, peak=made.limit - GIB + 1)
    assert not dataclasses.replace(made, memory=above).fits
    assert dataclasses.replace(made, memory=above).excess == 1


def test_both_messages_of_the_compiler_are_read() -> None:
    early = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (30.50G) exceeds available HBM (15.75G)."
    )
    assert refusal_of(early) == Refusal(round(30.5 * GIB), round(15.75 * GIB), compiled=True)
    late = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.
Used 36.72G of 15.75G hbm. Exceeded hbm capacity by 20.97G.

Total hbm usage >= 37.23G:
    reserved        522.00M
    program          36.20G
    arguments       0B

Output size 0B; shares 0B with arguments.

Program hbm requirement 36.20G:
    HLO temp         36.20G (100.0% utilization)

  Largest program allocations in hbm:

  1. Size: 3.00G
     Operator: op_name="jit(train_step)/while/body/dot_general"
     Shape: bf16[12,8,2048,8192]{3,2,1,0:T(8,128)(2,1)}
     Unpadded size: 3.00G
     XLA label: fusion.12
     Allocation type: HLO temp
     ==========================

  2. Size: 768.00M
     Shape: f32[8,2048,12288]{2,1,0:T(8,128)}
     Unpadded size: 768.00M
"""
    refusal = refusal_of(late)
    assert refusal is not None
    assert refusal.needed == round(36.72 * GIB)
    assert refusal.largest == (
        "3.00G bf16[12,8,2048,8192]{3,2,1,0:T(8,128)(2,1)} dot_general",
        "768.00M f32[8,2048,12288]{2,1,0:T(8,128)}",
    )
    assert refusal_of("INTERNAL: something else") is None
