"""The table of the suite: its checkpoints, its shapes, and the names it answers to."""

import math
import re

import pytest

from pythia_jax import suite
from pythia_jax.suite import (
    BAD_REVISIONS,
    CHECKPOINT_STEPS,
    SUITE,
    bad_revision,
    hub_id,
    lookup,
)

SIZES = ["14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b"]
OLD_NAMES = {
    "19m": "70m",
    "125m": "160m",
    "350m": "410m",
    "800m": "1b",
    "1.3b": "1.4b",
    "2.7b": "2.8b",
    "6.7b": "6.9b",
    "13b": "12b",
}


def test_suite_holds_ten_sizes_smallest_first():
    assert list(SUITE) == SIZES
    assert all(model.size == size for size, model in SUITE.items())


def test_checkpoints_are_154_and_sum_to_the_known_total():
    assert len(CHECKPOINT_STEPS) == 154
    assert sum(CHECKPOINT_STEPS) == 10_297_023
    assert CHECKPOINT_STEPS[:12] == (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
    assert CHECKPOINT_STEPS[-1] == suite.TOTAL_STEPS == 143_000
    assert list(CHECKPOINT_STEPS) == sorted(set(CHECKPOINT_STEPS))


def test_whole_run_sees_the_known_number_of_rows_and_tokens():
    rows = suite.TOTAL_STEPS * suite.BATCH_SIZE
    assert rows == 146_432_000
    assert rows * suite.SEQUENCE_LENGTH == 299_892_736_000


@pytest.mark.parametrize("model", SUITE.values(), ids=lambda model: model.size)
def test_original_layout_makes_batches_of_1024_rows(model):
    replicas = model.gpus // model.model_parallel
    assert model.micro_batch * model.gradient_accumulation * replicas == suite.BATCH_SIZE


@pytest.mark.parametrize("model", SUITE.values(), ids=lambda model: model.size)
def test_vocabulary_is_padded_to_128_for_each_model_parallel_gpu(model):
    unit = 128 * model.model_parallel
    assert model.vocab_size == math.ceil(suite.TOKENIZER_VOCAB_SIZE / unit) * unit


@pytest.mark.parametrize("model", SUITE.values(), ids=lambda model: model.size)
def test_heads_divide_width_and_mlp_is_four_times_wider(model):
    assert model.hidden_size % model.num_attention_heads == 0
    assert model.intermediate_size == 4 * model.hidden_size


@pytest.mark.parametrize("model", SUITE.values(), ids=lambda model: model.size)
def test_minimum_learning_rate_is_a_tenth_of_the_peak(model):
    assert model.min_learning_rate == pytest.approx(model.peak_learning_rate / 10, rel=1e-12)


def test_only_the_two_largest_started_from_the_default_initializer():
    assert [s for s, m in SUITE.items() if m.initializer == "normal_scaled"] == ["6.9b", "12b"]
    assert {m.initializer for m in SUITE.values()} == {"small_wang", "normal_scaled"}


def test_only_1b_was_trained_in_bfloat16():
    assert [s for s, m in SUITE.items() if m.precision == "bfloat16"] == ["1b"]
    assert {m.precision for m in SUITE.values()} == {"float16", "bfloat16"}


def test_eight_sizes_have_a_deduplicated_run():
    assert [size for size, model in SUITE.items() if not model.deduped] == ["14m", "31m"]
    assert sum(len(model.names) for model in SUITE.values()) == 18


@pytest.mark.parametrize(
    "size, words",
    [
        ("14m", ["standard Pile"]),
        ("31m", ["standard Pile"]),
        ("1b", ["fp16", "2.5e-4"]),
        ("2.8b", ["86 of the 154"]),
        ("6.9b", ["scaled_normal", "2 times as far"]),
        ("12b", ["scaled_normal", "4 times as far", "step50000", "step32000", "not valid YAML"]),
    ],
)
def test_known_faults_are_told(size, words):
    told = " ".join(SUITE[size].known_faults)
    assert [word for word in words if word not in told] == []


def test_bad_revisions_are_those_that_the_faults_tell_of():
    # 86 hold the final weights, and of step143000 that is right.
    assert len(BAD_REVISIONS["pythia-2.8b"]) == 85
    assert set(BAD_REVISIONS["pythia-2.8b"]) < set(CHECKPOINT_STEPS)
    assert bad_revision("EleutherAI/pythia-2.8b", 143_000) is None
    assert bad_revision("EleutherAI/pythia-2.8b", 66_000) is None
    assert bad_revision("EleutherAI/pythia-2.8b-deduped", 1000) is None
    assert "pythia#205" in str(bad_revision("EleutherAI/pythia-2.8b", 65_000))
    assert "pythia#206" in str(bad_revision("pythia-12b", 58_000))
    assert "pythia#108" in str(bad_revision("EleutherAI/pythia-12b-deduped", 32_000))
    assert "pythia#203" in str(bad_revision("EleutherAI/pythia-160m-weight-seed2", 0))
    told = " ".join(fault for model in SUITE.values() for fault in model.known_faults)
    for run, steps in BAD_REVISIONS.items():
        # What is told of seeds is told under their size, without the name in full.
        assert run.rpartition("-")[2] in told
        threads = {found for reason in steps.values() for found in re.findall(r"\w+#\d+", reason)}
        assert threads and all(thread in told for thread in threads)


@pytest.mark.parametrize("size", SIZES)
def test_lookup_knows_every_way_to_write_a_name(size):
    model = SUITE[size]
    for name in (size, size.upper(), f"pythia-{size}", f"EleutherAI/pythia-{size}"):
        assert lookup(name) is model
    for run in model.names:
        assert lookup(run) is lookup(f"EleutherAI/{run}") is model
        assert hub_id(run) == hub_id(run.removeprefix("pythia-")) == f"EleutherAI/{run}"


@pytest.mark.parametrize("old, size", OLD_NAMES.items())
def test_old_names_lead_to_the_renamed_sizes(old, size):
    assert SUITE[size].old_name == old
    assert lookup(old) is lookup(f"pythia-{old}") is SUITE[size]
    assert lookup(f"EleutherAI/pythia-{old}-deduped") is SUITE[size]
    assert hub_id(f"pythia-{old}-deduped") == f"EleutherAI/pythia-{size}-deduped"


@pytest.mark.parametrize(
    "name",
    [
        *("15m", "pythia-70", "pythia-410m-dedup", "pythia-14m-deduped", "1.5b", "pythia-12b-v0"),
        *("", "gpt2", "EleutherAI/gpt-neox-20b", "70m-deduped-deduped"),
    ],
)
def test_unknown_name_is_an_error_that_names_the_sizes(name):
    with pytest.raises(ValueError, match="no model of the suite") as error:
        lookup(name)
    assert repr(name) in str(error.value)
    assert "14m, 31m, 70m, 160m" in str(error.value)
    assert "all but 14m, 31m have a deduplicated run" in str(error.value)
    with pytest.raises(ValueError):
        hub_id(name)
