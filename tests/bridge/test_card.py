"""The model card: what is known stands in it, what is not known is not made up."""

from dataclasses import replace
from typing import Any

import pytest
import yaml
from hf_folders import our_model
from reference import TINY

import pythia_jax as pj
from pythia_jax import configs
from pythia_jax.bridge import card, hf_out
from pythia_jax.bridge.angles import Difference
from pythia_jax.bridge.hf_config import config_json
from pythia_jax.bridge.opened import from_model
from pythia_jax.configs import DataConfig, OptimizerConfig, RunConfig, TrainingConfig
from pythia_jax.model import parameters

RUN = RunConfig(
    name="my-run",
    model=replace(TINY, hidden_act="gelu_pytorch_tanh"),
    data=DataConfig(("/home/me/pile_text_document", "code"), sequence_length=32, seed=77),
    training=TrainingConfig(steps=500, batch_size=16, precision="float32"),
    optimizer=OptimizerConfig(peak_learning_rate=3e-4, min_learning_rate=1e-5),
)


def flat(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def opened(step=None, **facts: Any):
    names = {key.replace("__", "."): value for key, value in facts.items()}
    return replace(from_model(our_model()), step=step, facts=names)


def written(opened, difference=None, **config):
    served = {**config_json(opened.config, "float16", 0), **config}
    return card.text(opened, served, difference)


def front_matter(text):
    start, matter, body = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(matter), body


def rows(text):
    """Label → value of every table."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    cells = [line.strip("|").split(" | ") for line in lines]
    return {row[0].strip(): row[1].strip() for row in cells if len(row) == 2}


def test_front_matter_is_what_the_hub_reads(tmp_path):
    matter, _ = front_matter(written(opened()))
    assert matter == {
        "license": "unknown",
        "library_name": "transformers",
        "tags": ["pytorch", "causal-lm", "pythia"],
    }
    matter, _ = front_matter(written(opened(dataset="EleutherAI/the_pile_deduplicated")))
    assert matter["datasets"] == ["EleutherAI/the_pile_deduplicated"]
    published = replace(opened(), facts=card.published_facts("70m"))
    assert front_matter(written(published))[0]["license"] == "apache-2.0"


def test_dataset_that_is_no_id_is_an_error_and_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="ORG/NAME"):
        hf_out.save(opened(dataset="the Pile\ntags: [x]"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_card_of_a_run_has_its_facts():
    facts = {**dict(flat(configs.to_dict(RUN))), "hash.train": "abc123", "version.jax": "0.10.2"}
    text = written(replace(opened(), config=RUN.model, step=250, facts=facts))
    found = rows(text)
    assert "# my-run" in text
    assert found["Training step"] == "250"
    assert found["Tokens seen"] == f"{250 * 16 * 32:,}"
    assert found["Training steps of the whole run"] == "500"
    assert found["Rows a step"] == "16"
    assert found["Precision of the computation"] == "float32"
    assert found["Learning rate, peak"] == "0.0003"
    assert found["Learning rate, at the end"] == "1e-05"
    assert found["AdamW's betas"] == "0.9, 0.95"
    assert found["Schedule"] == "neox_v1"
    assert found["Seed of the order"] == "77"
    assert found["Files"] == "pile_text_document, code"
    assert found["Hash of the data, train"] == "abc123"
    assert found["Version of jax"] == "0.10.2"
    assert found["First update at rate 0"] == found["Bias correction one step ahead"] == "True"
    assert "Adam's counter begun anew at steps" not in found  # there were no restarts
    assert "It was trained with the same." in text
    assert "Rotary angles: float32, in training and when the model is served." in text
    # What it does not know of its data.
    assert found["Corpus"] == found["Deduplicated"] == "unknown"


def test_card_has_the_models_size_whatever_is_known():
    found = rows(written(opened()))
    assert found["Parameters"] == f"{parameters.count(TINY):,}"
    assert found["Parameters without embeddings"] == f"{parameters.count(TINY, embedding=False):,}"
    assert (found["Layers"], found["Width"], found["Heads"]) == ("3", "48", "3 of 16")
    assert found["Weights stored in"] == "float16"


def test_what_is_unknown_is_said_to_be_unknown():
    text = written(opened())
    found = rows(text)
    unknown = {label for label, value in found.items() if value == "unknown"}
    assert unknown == {
        "Training step",
        "Tokens seen",
        "Optimizer, schedule, batch and precision",
        "Corpus",
        "Deduplicated",
    }
    assert "In training it was unknown which." in text
    assert "in training, unknown" in text
    assert "datasets" not in text.split("---")[1]


@pytest.mark.parametrize(("known", "said"), [(True, "yes"), (False, "no"), (None, "unknown")])
def test_deduplicated_is_yes_no_or_unknown(known, said):
    assert rows(written(opened(deduplicated=known)))["Deduplicated"] == said


@pytest.mark.parametrize(
    ("step", "facts", "tokens"),
    [
        (None, {"tokens_seen": 5}, 5),
        (3, {"training__batch_size": 4, "data__sequence_length": 8}, 96),
        (0, {"training__batch_size": 4, "data__sequence_length": 8}, 0),
        (3, {"training__batch_size": 4}, None),
        (None, {"training__batch_size": 4, "data__sequence_length": 8}, None),
    ],
)
def test_tokens_seen_are_counted_where_all_is_known(step, facts, tokens):
    assert card.tokens_seen(opened(step=step, **facts)) == tokens


def test_other_activation_than_was_trained_is_told():
    trained = opened(model__hidden_act="gelu_pytorch_tanh")
    text = written(trained, hidden_act="gelu")
    assert "trained with tanh GELU, so what is served is not quite the function" in text
    assert "trained with the same" in written(trained, hidden_act="gelu_new")


def test_half_precision_angles_are_told_with_what_they_cost():
    difference = Difference("float16", 0.123, 4.5e-6, rows=2, first=1792, last=2047)
    text = written(opened(), difference)
    for part in ("float16", "0.123", "4.5e-06", "positions 1792 to 2047"):
        assert part in text
    told = written(opened(model__rotary_precision="float16"))
    assert "float16 in training, float32 when the model is served" in told


@pytest.mark.parametrize(
    ("name", "run", "deduplicated", "dataset"),
    [
        ("70m", "pythia-70m", False, "EleutherAI/pile"),
        (
            "EleutherAI/pythia-1b-deduped",
            "pythia-1b-deduped",
            True,
            "EleutherAI/the_pile_deduplicated",
        ),
        ("pythia-13b-deduped", "pythia-12b-deduped", True, "EleutherAI/the_pile_deduplicated"),
    ],
)
def test_published_runs_are_known(name, run, deduplicated, dataset):
    facts = card.published_facts(name)
    text = card.text(replace(opened(step=3000), facts=facts), config_json(TINY, "float16", 0), None)
    assert front_matter(text)[0]["datasets"] == [dataset]
    found = rows(text)
    assert f"# {run}\n" in text and found["Deduplicated"] == ("yes" if deduplicated else "no")
    assert found["Tokens seen"] == "6,291,456,000"
    assert (
        found["Learning rate, peak"]
        == {"70m": "0.001", "1b": "0.00025", "12b": "0.00012"}[run.split("-")[1]]
    )


def test_precision_that_is_not_recorded_is_not_guessed():
    assert card.published_facts("1b")["training.precision"] == "bfloat16"
    facts = card.published_facts("1b-deduped")
    text = card.text(replace(opened(), facts=facts), config_json(TINY, "float16", 0), None)
    assert "Precision of the computation" not in text and "in training, unknown" in text


def test_text_of_facts_cannot_get_out_of_its_place():
    text = written(opened(name="a | b\n## c <script>", corpus="x | y\n| z | w |"))
    assert "# a \\| b ## c \\<script>\n" in text
    assert rows(text)["Corpus"].startswith("x \\")
    assert "| z | w |" not in text


def test_card_has_every_part_of_a_model_card():
    text = written(opened())
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        *("## This checkpoint", "## Training", "## Data", "## The function"),
        *("## Intended use", "## Out of scope", "## Limits and biases", "## License"),
        "## Citation",
    ]
    assert "biderman2023pythia" in text


def test_card_that_somebody_claimed_is_not_overwritten(tmp_path):
    pj.save_hf(our_model(), tmp_path / "out")
    path = tmp_path / "out" / "README.md"
    pj.save_hf(our_model(), tmp_path / "out")
    mine = path.read_text().replace(card._MARK, "Trained for my thesis.")
    path.write_text(mine)
    with pytest.raises(FileExistsError, match=r"README\.md"):
        pj.save_hf(our_model(), tmp_path / "out")
    assert path.read_text() == mine
