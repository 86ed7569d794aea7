"""Reading a config: what is wrong is said in one line, by key, value and what would do."""

import re

import pytest
from config_cases import INFINITY, NAN, SMALL, error_of

from pythia_jax import configs
from pythia_jax.configs import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    Runtime,
    TrainingConfig,
    from_dict,
    to_dict,
)


@pytest.mark.parametrize(
    ("mapping", "key", "nearest"),
    [
        ({"modle": {}}, "modle", "model"),
        ({"model": {**SMALL, "hidden_szie": 64}}, "model.hidden_szie", "hidden_size"),
        ({"model": {"sise": "70m"}}, "model.sise", "size"),
        ({"optimizer": {"peak_lr": 1.0}}, "optimizer.peak_lr", None),
        ({"optimizer": {"weight_decy": 1.0}}, "optimizer.weight_decy", "weight_decay"),
        ({"training": {"step": 3}}, "training.step", "steps"),
        ({"checkpoint": {"extra_step": []}}, "checkpoint.extra_step", "extra_steps"),
        ({"data": {"sequence_len": 64}}, "data.sequence_len", "sequence_length"),
        ({"evaluation": {"evry": 3}}, "evaluation.evry", "every"),
        ({"logging": {"Every": 3}}, "logging.Every", "every"),
        ({3: "x"}, "3", None),
        ({None: "x"}, "None", None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_unknown_key_is_an_error_that_names_the_nearest(mapping, key, nearest):
    message = error_of(mapping)
    assert message.startswith(f"{key}: unknown key")
    if nearest:
        assert message.endswith(f"nearest known one is '{nearest}'")


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("training.steps", "many", "a whole number"),
        ("training.steps", 1.5, "a whole number"),
        ("training.steps", True, "a whole number"),
        ("training.steps", None, "a whole number"),
        ("training.steps", [3], "a whole number"),
        ("training.precision", "float8", "bfloat16"),
        ("training.precision", None, "bfloat16"),
        ("training.remat", True, "text"),
        ("optimizer.eps", "tiny", "a number"),
        ("optimizer.eps", True, "a number"),
        ("optimizer.eps", None, "a number"),
        ("optimizer.eps", [1e-8], "a number"),
        ("optimizer.betas", 0.9, "a list"),
        ("optimizer.betas", [0.9], "2 items"),
        ("optimizer.betas", [0.9, "x"], "a number"),
        ("optimizer.schedule", "linear", "neox_v1"),
        ("data.train", "one/path", "a list"),
        ("data.train", [3], "text"),
        ("data.train", {"a": 1}, "a list"),
        ("data.order", 3, "neox, preshuffled"),
        ("data.order", ["neox"], "neox, preshuffled"),
        ("name", 3, "text"),
        ("data", 3, "a section"),
        ("data", [1], "a section"),
        ("model", "70m", "a section"),
        ("model.size", 70, "text"),
        ("model.use_parallel_residual", "yes please", "true or false"),
        ("model.use_parallel_residual", 1, "true or false"),
        ("model.hidden_act", 3, "text"),
    ],
    ids=str,
)
def test_wrong_type_is_an_error_that_names_key_value_and_type(key, value, wanted):
    *sections, last = key.split(".")
    mapping = {last: value}
    if sections == ["model"] and last != "size":
        mapping = {**SMALL, **mapping}
    for section in reversed(sections):
        mapping = {section: mapping}
    message = error_of(mapping)
    assert message.startswith(key)
    assert repr(value) in message or "'x'" in message or "[0]: 3" in message
    assert wanted in message


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (TrainingConfig, {"steps": 2.5}, "training.steps: 2.5 should be a whole number"),
        (TrainingConfig, {"precision": "half"}, "training.precision: 'half' is not one of"),
        (CheckpointConfig, {"archive": "typo"}, "checkpoint.archive: 'typo' is not one of"),
        (CheckpointConfig, {"extra_steps": 3}, "checkpoint.extra_steps: 3 should be a list"),
        (OptimizerConfig, {"peak_learning_rate": INFINITY}, "peak_learning_rate: inf"),
        (OptimizerConfig, {"weight_decay": NAN}, "optimizer.weight_decay: nan"),
        (OptimizerConfig, {"betas": (0.9,)}, "optimizer.betas: (0.9,) should have 2 items"),
        (DataConfig, {"train": "abc"}, "data.train: 'abc' should be a list"),
        (DataConfig, {"seed": True}, "data.seed: True should be a whole number"),
        (ModelConfig, {**SMALL, "hidden_size": 48.0}, "model.hidden_size: 48.0 should be"),
        (ModelConfig, {**SMALL, "hidden_size": "48"}, "model.hidden_size: '48' should be"),
        (EvaluationConfig, {"every": "often"}, "evaluation.every: 'often' should be"),
        (MeshConfig, {"data": 1.0}, "mesh.data: 1.0 should be"),
        (LoggingConfig, {"every": None}, "logging.every: None should be"),
        (RunConfig, {"name": 70}, "name: 70 should be text"),
        (RunConfig, {"training": 3}, "training: 3 should be a section"),
        (Runtime, {"scan_layers": 1}, "runtime.scan_layers: 1 should be true or false"),
    ],
    ids=str,
)
def test_wrong_types_are_refused_when_made_in_python_too(section, values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        section(**values)


def test_what_is_made_in_python_is_as_if_read_from_a_file():
    made = RunConfig(data=DataConfig(train=["a"], train_weights=[1]))  # type: ignore[arg-type]
    assert made == from_dict({"data": {"train": ["a"], "train_weights": [1]}})
    assert hash(made) == hash(from_dict(to_dict(made)))
    assert type(OptimizerConfig(gradient_clip=1).gradient_clip) is float


def test_missing_field_of_a_model_is_named():
    message = error_of({"model": {"hidden_size": 48}})
    assert message.startswith("model.num_hidden_layers: missing")


def test_empty_sections_and_empty_files_are_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    for text in ("", "# nothing\n", "data:\noptimizer:\n", "{}\n"):
        file.write_text(text)
        assert configs.load(file) == RunConfig()


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "0.001", ".001", "'1e-3'"])
def test_a_float_may_be_written_in_every_usual_way(text, tmp_path):
    # YAML 1.1 takes 1e-3, without a point, for text.
    file = tmp_path / "run.yaml"
    file.write_text(f"optimizer: {{peak_learning_rate: {text}}}\n")
    assert configs.load(file).optimizer.peak_learning_rate == 0.001
    overridden = configs.load(file, {"optimizer.min_learning_rate": text.strip("'")})
    assert overridden.optimizer.min_learning_rate == 0.001


def test_whole_numbers_serve_as_floats_and_not_the_other_way(tmp_path):
    assert type(from_dict({"optimizer": {"gradient_clip": 1}}).optimizer.gradient_clip) is float
    file = tmp_path / "run.yaml"
    file.write_text("{}")
    with pytest.raises(ConfigError, match=r"training\.steps: 1000\.0 should be a whole number"):
        configs.load(file, {"training.steps": "1000.0"})


def test_dotted_overrides_reach_every_section_with_dashes_or_underscores(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: {size: 14m}\noptimizer: {weight_decay: 0.5}\n")
    config = configs.load(
        file,
        {
            "optimizer.peak-learning-rate": "2e-3",
            "optimizer.betas": "[0.8, 0.9]",
            "training.batch_size": "16",
            "data.train": "[a, b-c]",
            "model.vocab-size": "512",
            "model.use-parallel-residual": "false",
            "name": "other-name",
            "tokenizer": "null",
            "checkpoint.extra-steps": "[]",
        },
    )
    assert config.optimizer.peak_learning_rate == 2e-3
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.optimizer.weight_decay == 0.5
    assert config.training.batch_size == 16
    assert config.data.train == ("a", "b-c")
    assert config.model == ModelConfig.from_size("14m", vocab_size=512, use_parallel_residual=False)
    assert (config.name, config.tokenizer) == ("other-name", None)
    assert config.checkpoint.directory == "runs/other-name"
    assert config.checkpoint.extra_steps == ()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optimizer.peak-lerning-rate": "1"}, "--optimizer.peak-lerning-rate: unknown key"),
        ({"optimizer.eps.more": "1"}, "--optimizer.eps.more: 'eps' is a value"),
        ({"name.more": "1"}, "--name.more: 'name' is a value"),
        ({"training.steps": "many"}, "--training.steps: 'many'"),
        ({"training.steps": "0"}, "--training.steps: 0"),
        ({"training.steps": ""}, "--training.steps: None"),
        ({"": "1"}, "--: unknown key"),
        ({"training.": "1"}, "--training.: unknown key"),
        ({"training": "3"}, "--training: 3 should be a section"),
        ({"training": "{steps: 0}"}, "--training: training.steps: 0 is not possible"),
        ({"training.steps": "["}, "--training.steps: '['"),
        ({"trainign.steps": "3"}, "--trainign.steps: trainign: unknown key"),
        ({"optimizer.betas": "[0, x]"}, "--optimizer.betas[1]: 'x'"),
        ({"name": "y", "training.seed": "-1"}, "--training.seed: -1"),
        (
            {"training.batch-size": "9", "training.gradient-accumulation": "2"},
            "--training.gradient-accumulation: 2 is not possible: it must divide batch_size (9)",
        ),
    ],
    ids=str,
)
def test_wrong_override_is_an_error_that_names_the_flag(overrides, message, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("name: x\noptimizer: {eps: 1.0e-8}\n")
    with pytest.raises(ConfigError) as error:
        configs.load(file, overrides)
    assert str(error.value).startswith(message)
    assert str(file) not in str(error.value)
    assert "nearest known one is 'peak_learning_rate'" in str(error.value) or "lerning" not in (
        message
    )


def test_an_error_that_no_flag_sets_names_the_file_and_flags_that_bring_it_about(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("training: {batch_size: 8, gradient_accumulation: 2}\n")
    with pytest.raises(ConfigError) as error:
        configs.load(file, {"name": "y", "training.batch-size": "9"})
    flags, key = "--name, --training.batch-size", "training.gradient_accumulation: 2"
    assert str(error.value).startswith(f"{file} with {flags}: {key} is not possible")
    with pytest.raises(ConfigError, match=r"^--training\.steps: 0 is not possible"):
        configs.for_data("some/prefix", {"training.steps": "0"})
    file.write_text("training: {gradient_accumulation: 3}\n")
    with pytest.raises(ConfigError, match=f"^{file}: training.gradient_accumulation: 3"):
        configs.load(file, {"name": "y"})


def test_text_keys_keep_what_was_typed(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("tokenizer: a.json\ndata: {train: [a]}\n")
    config = configs.load(
        file,
        {
            "name": "70",
            "checkpoint.directory": "2024",
            "model.size": "70m",
            "tokenizer": "1e3",
            "data.train": "[2024, 1e3]",
        },
    )
    assert (config.name, config.checkpoint.directory, config.tokenizer) == ("70", "2024", "1e3")
    assert config.data.train == ("2024", "1e3")
    assert configs.load(file, {"data.split": "969,30,1"}).data.split == "969,30,1"
    assert configs.load(file, {"name": "true", "tokenizer": "~"}).tokenizer is None
    assert configs.load(file, {"name": "null"}).name == "null"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"training: {steps: 0}", "training.steps: 0"),
        (b"trainin: {}", "'training'"),
        (b"- a\n- b\n", "sections"),
        (b"just text", "sections"),
        (b"a: [", "not valid YAML"),
        (b"training: {steps: 3}\ntraining: {steps: 4}", "'training' stands twice"),
        (b"a: \xff\xfe", "cannot be read"),
        (b"name: a\n\x00", "not valid YAML"),
        (b"!!python/object:os.system x", "not valid YAML"),
    ],
    ids=str,
)
def test_wrong_file_is_one_error_that_names_the_file(content, message, tmp_path):
    file = tmp_path / "some run.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        configs.load(file)
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)


def test_missing_file_and_folder_are_config_errors(tmp_path):
    with pytest.raises(ConfigError, match="there is no such config file"):
        configs.load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        configs.load(tmp_path)
