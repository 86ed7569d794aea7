"""Names of tasks: the preset, and that the harness has all of it."""

import pytest
from lm_eval.tasks import TaskManager

from pythia_jax.evaluation import tasks


def test_the_preset_is_expanded_where_it_stands_and_nothing_twice():
    assert tasks.expand("pythia") == list(tasks.PYTHIA)
    assert tasks.expand(["piqa", "pythia, sciq", "mine"]) == [
        "piqa", *(name for name in tasks.PYTHIA if name != "piqa"), "mine",
    ]  # fmt: skip
    assert tasks.expand("a,b,a,,") == ["a", "b"]


def test_every_name_of_the_preset_is_one_of_the_harness():
    index = tasks.manager(tasks.PYTHIA)
    for name in tasks.PYTHIA:
        assert index.match_tasks([name]) == [name]
    # What the published files hold, by the present names.
    parts = {
        "mmlu": ["mmlu_anatomy", "mmlu_world_religions"],
        "crows_pairs": ["crows_pairs_english_gender", "crows_pairs_french"],
        "blimp": ["blimp_wh_island"],
    }
    for group, names in parts.items():
        assert group in index.all_groups or group in index.all_tags
        assert set(names) <= set(index.all_subtasks)


def test_names_that_there_are_none_of_are_refused_together():
    with pytest.raises(ValueError, match=r"does not have: lambda_openai, pica;"):
        tasks.check(["piqa", "lambda_openai", "pica"])


def test_patterns_are_refused_before_a_model_is_loaded():
    with pytest.raises(ValueError, match=r"does not have: lambada_\*"):
        tasks.check(["lambada_*"])


def test_a_task_file_is_refused_with_the_way_to_name_it(tmp_path):
    (tmp_path / "mine.yaml").write_text("task: mine\ndataset_path: json\n")
    with pytest.raises(ValueError, match=r"mine\.yaml; a task file goes by .*\(--include-path\)"):
        tasks.check([str(tmp_path / "mine.yaml")])


def test_what_is_added_to_a_folder_later_is_found(tmp_path, monkeypatch):
    def quick(include_path, include_defaults):  # without the harness's thousands
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", quick)
    with pytest.raises(ValueError, match="does not have: mine, nor"):
        tasks.check(["mine"], tmp_path)
    file = tmp_path / "mine.yaml"
    file.write_text("task: mine\ndataset_path: json\n")
    tasks.check(["mine"], tmp_path)
    file.write_text("task: yours\ndataset_path: json\n")
    tasks.check(["yours"], tmp_path)
    with pytest.raises(ValueError, match="does not have: mine, nor"):
        tasks.check(["mine"], tmp_path)


def test_tasks_of_a_folder_are_found_without_the_harnesss_own(tmp_path):
    (tmp_path / "mine.yaml").write_text("task: mine\ndataset_path: json\n")
    index = tasks.manager(["mine"], tmp_path)
    assert "mine" in index.all_subtasks and "piqa" not in index.all_tasks
    assert "piqa" in tasks.manager(["mine", "piqa"], tmp_path).all_tasks
