"""Result files of three makers read as one, and ours written as the published ones are."""

import json
import logging
import math
import random

import pytest
from result_files import lambada, old_file, returned
from swept import make_config, write_run, write_task

from pythia_jax.evaluation import names, results

SCORES = {"lambada_openai": {"ppl": 138.45, "ppl_stderr": 5.9, "acc": 0.19, "acc_stderr": 0.005}}


def read_one(path):
    (result,) = results.read([path])
    return result


# Places and names of files published with Pythia, and what each is of.
PLACES = [
    ("pythia-v1/pythia-70m/zero-shot/70m_step0.json", "pythia-70m", "v1", 0, 0, "plain"),
    (
        "pythia-v1/pythia-1.4b-deduped/five-shot/1.4b-deduped-5shot_step103000.json",
        *("pythia-1.4b-deduped", "v1", 103000, 5, "plain"),
    ),
    # The standard 1b lies under another name, and some of its zero-shot files say 5shot.
    (
        "pythia-v1/pythia-1b-bf16/zero-shot/1b-bf16-5shot_step1000.json",
        *("pythia-1b", "v1", 1000, 0, "plain"),
    ),
    (
        "pythia-v1/pythia-160m-0.5MtokBS/160m-0.5MtokBS_step12000.json",
        *("pythia-160m-0.5MtokBS", "v1", 12000, 5, "batch-size"),
    ),
    (
        "pythia-v1/pythia-70m-deduped/baseline/baseline-70m-deduped_step134000.json",
        *("pythia-70m-deduped", "v1", 134000, 0, "baseline"),
    ),
    (
        "pythia-v1/pythia-1.4b-deduped/intervention/intervention-1.4b-deduped_step137000.json",
        *("pythia-1.4b-deduped", "v1", 137000, 0, "intervention"),
    ),
    (
        "pythia-v1/pythia-1.4b-deduped/intervention/intervention-1.4b-deduped-long_step115000.json",
        *("pythia-1.4b-deduped", "v1", 115000, 0, "long-intervention"),
    ),
    (
        "pythia-v0/pythia-70m/zero-shot/"
        "pythia-70m-0shot-global_step33000_eval_results_11-25-2022-06-49-01.json",
        *("pythia-70m", "v0", 33000, 0, "plain"),
    ),
    (
        "pythia-v0/pythia-2.8b/zero-shot/"
        "pythia-2.8b-0shot-global_step103000__eval_results_11-25-2022-03-57-52.json",
        *("pythia-2.8b", "v0", 103000, 0, "plain"),
    ),
    # Half of the steps of today's names: twice the tokens were in each.
    (
        "pythia-v0/pythia-1.4b/five-shot/"
        "pythia-1.4b-5shot-global_step51500_eval_results_12-29-2022-16-51-02.json",
        *("pythia-1.4b", "v0", 103000, 5, "plain"),
    ),
    # By the sizes' names of 2022: 1.3b is 1.4b, 350m is 410m, 19m is 70m.
    (
        "bias-evals/intervention-350m-deduped-step67000_eval_results_01-21-2023-22-12-15.json",
        *("pythia-410m-deduped", "v0", 134000, 0, "intervention"),
    ),
    (
        "bias-evals/long-intervention-1.3b-deduped-step57000_eval_results_01-23-2023-14-05-01.json",
        *("pythia-1.4b-deduped", "v0", 114000, 0, "long-intervention"),
    ),
    (
        "bias-evals/pythia-19m-deduped-step103000_eval_results_01-20-2023-15-59-23.json",
        *("pythia-70m-deduped", "v0", 103000, 0, "plain"),
    ),
]


@pytest.mark.parametrize("place, model, version, step, shots, kind", PLACES)
def test_a_published_file_is_known_by_its_place(tmp_path, place, model, version, step, shots, kind):
    result = read_one(old_file(tmp_path / place, SCORES, num_fewshot=shots))
    found = (result.model, result.version, result.step, result.num_fewshot, result.kind)
    assert found == (model, version, step, shots, kind)
    assert result.harness == "2022" and result.notes == () and not result.ours


def test_v0_steps_are_doubled_where_they_count_batches_of_twice_the_size(tmp_path):
    def step(size, version):
        name = f"pythia-{size}-0shot-global_step71500_eval_results_12-30-2022-23-06-54.json"
        path = tmp_path / f"pythia-{version}" / f"pythia-{size}" / "zero-shot" / name
        result = read_one(old_file(path, SCORES))
        return result.step, result.doubled, result.tokens

    for size in ("160m", "410m", "1.4b", "160m-deduped"):
        assert step(size, "v0") == (143_000, True, 143_000 * 2_097_152)
    for size, version in (("70m", "v0"), ("1b", "v0"), ("6.9b", "v0"), ("160m", "v1")):
        assert step(size, version) == (71_500, False, 71_500 * 2_097_152)


def test_steps_that_are_revisions_of_the_hub_are_never_doubled(tmp_path):
    args = {"pretrained": "EleutherAI/pythia-160m-v0", "revision": "step3000"}
    path = tmp_path / "results_2026-01-02T03-04-05.678901.json"
    path.write_text(json.dumps(returned({"wsc": {"acc": 0.37}}, model="hf", model_args=args)))
    theirs = read_one(path)
    about = {"model_name": "EleutherAI/pythia-160m-v0", "step": 3000, "provenance": {}}
    ours = read_one(results.write(tmp_path / "ours", returned({"wsc": {"acc": 0.37}}), **about))
    for result in (theirs, ours):
        found = (result.model, result.version, result.step, result.doubled)
        assert found == ("pythia-160m", "v0", 3000, False)


@pytest.mark.parametrize(
    "pretrained, model, step",
    [
        ("runs/mine/global_step300", "mine", 300),
        ("runs/mine/step300/", "mine", 300),
        ("runs/mine_step300", "mine", 300),
        ("runs/mine", "mine", None),
        ("step300", "step300", None),
    ],
)
def test_the_folder_of_a_checkpoint_tells_its_step(tmp_path, pretrained, model, step):
    path = tmp_path / "results_2026-01-02T03-04-05.678901.json"
    args = {"pretrained": pretrained}
    path.write_text(json.dumps(returned({"wsc": {"acc": 0.37}}, model_args=args)))
    result = read_one(path)
    assert (result.model, result.step) == (model, step)


def test_what_neox_was_asked_for_tells_the_size_of_steps(tmp_path):
    for planned, step in ((71_500, 3000), (143_000, 1500)):
        args = {"train_iters": planned, "iteration": 1500}
        path = tmp_path / str(planned) / "pythia-410m-0shot-global_step1500.json"
        result = read_one(old_file(path, SCORES, model="neox", model_args=args))
        assert (result.version, result.step) == ("v0", step)


def test_a_batch_size_variant_counts_its_own_tokens(tmp_path):
    for name, tokens in (("1.4b-1MtokBS", 2**20), ("160m-0.5MtokBS", 2**19)):
        result = read_one(old_file(tmp_path / f"pythia-{name}" / f"{name}_step600.json", SCORES))
        assert result.tokens == 600 * tokens


def test_model_args_tell_what_the_name_does_not(tmp_path):
    args = "use_accelerate=True,pretrained=EleutherAI/pythia-v1.1-1.4b-deduped,revision=step117000"
    folder = tmp_path / "pythia-v0" / "pythia-v1.1-1.4b-deduped"
    file = "term_frequency-pythia-v1.1-1.4b-deduped-117000-02shot.json"
    result = read_one(old_file(folder / file, SCORES, model_args=args, num_fewshot=2))
    found = (result.model, result.version, result.step, result.num_fewshot)
    assert found == ("pythia-1.4b-deduped", "v1", 117_000, 2)


def test_five_shot_files_whose_config_says_zero_are_flagged(tmp_path):
    file = "pythia-1.4b-5shot-global_step71500_eval_results_12-29-2022-16-51-02.json"
    path = tmp_path / "pythia-v0" / "pythia-1.4b" / "five-shot" / file
    result = read_one(old_file(path, SCORES, num_fewshot=0))
    assert (result.num_fewshot, result.notes) == (5, ("its config says zero-shot",))


def test_a_step_that_the_config_contradicts_is_flagged(tmp_path):
    args = "pretrained=EleutherAI/pythia-70m,revision=step2000"
    path = tmp_path / "pythia-70m" / "zero-shot" / "70m_step1000.json"
    result = read_one(old_file(path, SCORES, model_args=args))
    assert (result.step, result.notes) == (1000, ("its config says step 2000",))


def test_baselines_have_no_step(tmp_path):
    args = "pretrained=bigscience/bloom-7b1,use_accelerate=True"
    result = read_one(old_file(tmp_path / "bloom" / "bloom-7b1.json", SCORES, model_args=args))
    assert (result.model, result.step, result.size) == ("bloom-7b1", None, None)
    assert result.parameters == 6_041_411_584


@pytest.mark.parametrize(
    "name, model, seed",
    [
        ("EleutherAI/pythia-70m-seed3", "pythia-70m", "seed3"),
        ("EleutherAI/pythia-160m-data-seed1", "pythia-160m", "data-seed1"),
        ("pythia-160m-weight-seed2", "pythia-160m", "weight-seed2"),
        ("runs/my-pythia-70m", "my-pythia-70m", None),
        ("pythia-70m-tuned", "pythia-70m-tuned", None),
    ],
)
def test_seeds_are_of_one_model_and_other_names_stay_whole(name, model, seed):
    about = names.model_name(name)
    assert (about.model, about.seed) == (model, seed)
    assert (about.size is None) == (seed is None)


def test_parameters_of_baselines_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def count(model):
        # Positions of OPT are an embedding too; opt-350m's projections are not.
        apart = ("embed_tokens", "embed_positions", "word_embeddings.", "lm_head")
        shapes = dict(model.named_parameters())
        return sum(p.numel() for n, p in shapes.items() if not any(a in n for a in apart))

    with torch.device("meta"):
        opt, bloom = transformers.OPTConfig, transformers.BloomConfig
        narrow = {"word_embed_proj_dim": 512, "do_layer_norm_before": False}
        shapes = {
            "opt-125m": opt(),
            "opt-350m": opt(hidden_size=1024, num_hidden_layers=24, ffn_dim=4096,
                            num_attention_heads=16, **narrow),
            "bloom-560m": bloom(hidden_size=1024, n_layer=24, n_head=16),
        }  # fmt: skip
        for name, config in shapes.items():
            model = transformers.AutoModelForCausalLM.from_config(config)
            assert names.baseline_parameters(name) == count(model), name


def test_old_and_present_names_are_one(tmp_path):
    old = {
        "lambada_openai": {"ppl": 5.0, "ppl_stderr": 0.2, "acc": 0.6, "acc_stderr": 0.01},
        "hendrycksTest-anatomy": {"acc": 0.25, "acc_stderr": 0.03},
        "crows_pairs_english": {"likelihood_difference": 3.5, "pct_stereotype": 0.6},
        "wsc": {"acc": 0.37},
    }
    present = returned(
        {
            "lambada_openai": {
                "perplexity": 5.0, "perplexity_stderr": 0.2, "acc": 0.6, "acc_stderr": 0.01,
            },
            "mmlu_anatomy": {"acc": 0.25, "acc_stderr": 0.03},
            "crows_pairs_english": {"likelihood_diff": 3.5, "pct_stereotype": 0.6},
            "wsc": {"acc": 0.37, "acc_stderr": "N/A"},
        },
        model="hf",
        model_args={"pretrained": "EleutherAI/pythia-70m", "revision": "step3000"},
    )  # fmt: skip
    path = tmp_path / "out" / "results_2026-01-02T03-04-05.678901.json"
    path.parent.mkdir()
    path.write_text(json.dumps(present))
    new = read_one(path)
    assert (new.model, new.step, new.harness, new.ours) == ("pythia-70m", 3000, "0.4.13", False)
    assert new.metrics == read_one(old_file(tmp_path / "70m_step3000.json", old)).metrics
    assert new.value("mmlu_anatomy", "acc") == (0.25, 0.03)
    assert new.value("wsc", "acc") == (0.37, None)


def test_filters_other_than_none_stay_in_the_name(tmp_path):
    content = returned({})
    content["results"] = {
        "gsm8k": {"exact_match,strict-match": 0.1, "exact_match_stderr,strict-match": 0.02}
    }
    path = tmp_path / "results_x.json"
    path.write_text(json.dumps(content))
    assert read_one(path).value("gsm8k", "exact_match,strict-match") == (0.1, 0.02)


def test_a_harness_file_of_several_shots_is_several_results(tmp_path):
    content = returned({"piqa": {"acc": 0.6}, "sciq": {"acc": 0.7}})
    content["n-shot"] = {"piqa": 5, "sciq": 0}
    # Of both: of no number of shots.
    content["results"]["group"] = {"acc,none": 0.65}
    path = tmp_path / "results_x.json"
    path.write_text(json.dumps(content))
    found = {result.num_fewshot: set(result.metrics) for result in results.read([path])}
    assert found == {0: {"sciq"}, 5: {"piqa"}}


def test_groups_are_made_of_their_parts_as_the_harness_makes_them(tmp_path):
    draw = random.Random(0)
    mmlu = []
    for _ in range(57):
        right = [draw.random() < 0.3 for _ in range(draw.randint(90, 400))]
        mean = sum(right) / len(right)
        # As the harness: the sample's standard deviation over the root of its size.
        stderr = math.sqrt(sum((r - mean) ** 2 for r in right) / (len(right) - 1) / len(right))
        mmlu.append((right, {"acc": mean, "acc_stderr": stderr}))
    scores = {f"hendrycksTest-subject{i}": metrics for i, (_, metrics) in enumerate(mmlu)}
    blimp = [draw.random() for _ in range(67)]
    scores |= {f"blimp_{i}": {"acc": acc, "acc_stderr": 0.01} for i, acc in enumerate(blimp)}
    result = read_one(old_file(tmp_path / "70m_step0.json", scores))

    every = [r for right, _ in mmlu for r in right]
    assert result.value("mmlu", "acc") == (pytest.approx(sum(every) / len(every), abs=1e-12), None)
    assert result.value("blimp", "acc") == (pytest.approx(sum(blimp) / 67, abs=1e-12), None)
    del scores["blimp_0"]
    result = read_one(old_file(tmp_path / "70m_step0.json", scores))
    assert result.value("blimp", "acc") is None


def test_what_the_harness_itself_returns_and_writes_is_read_the_same(tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tracker = EvaluationTracker(output_path=str(tmp_path / "theirs"))
    found = lm_eval.simple_evaluate(
        model="dummy",
        tasks=["animals"],
        num_fewshot=2,
        task_manager=TaskManager(
            include_path=str(write_task(tmp_path / "tasks")), include_defaults=False
        ),
        evaluation_tracker=tracker,
    )
    assert found is not None
    found.pop("samples")
    results.write(tmp_path / "ours", found, model_name="x", step=0, num_fewshot=2, provenance={})
    tracker.save_results_aggregated(results=found, samples=None)
    (theirs,) = results.read([tmp_path / "theirs"])
    (ours,) = results.read([tmp_path / "ours"])
    assert set(ours.metrics["animals"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert ours.metrics == theirs.metrics
    assert ours.harness == theirs.harness == lm_eval.__version__
    assert ours.num_fewshot == theirs.num_fewshot == 2


def test_a_run_folder_that_the_harness_scored_has_its_place_on_every_axis(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    from pythia_jax.evaluation import harness
    from pythia_jax.model.parameters import count

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    run = write_run(tmp_path, (1, 3))
    tasks = write_task(tmp_path / "tasks")
    harness.run(
        ["run", "--model", "pythia_jax", "--model_args", f"pretrained={run}", "--tasks", "animals",
         "--include_path", str(tasks), "--output_path", str(tmp_path / "newest")]
    )  # fmt: skip
    (newest,) = results.read([tmp_path / "newest"])
    config = make_config(tmp_path)
    tokens = config.training.batch_size * config.data.sequence_length
    assert config.model is not None
    parameters = count(config.model, embedding=False)
    assert (newest.model, newest.step, newest.ours) == ("tiny", 3, True)
    assert (newest.tokens, newest.parameters) == (3 * tokens, parameters)


MALFORMED = {
    "list.json": ('{"results": [{"task_name": "wino_bias"}]}', "a list, as in the published Wino"),
    "none.json": ('{"table_results": {}}', "no `results`"),
    "text.json": ("step 3: fine", "no JSON"),
    "flat.json": ('{"results": {"piqa": 0.5}}', "not a table"),
    "empty.json": ('{"results": {"piqa": {"acc": "N/A"}}}', "no number"),
}


def test_malformed_files_are_refused_by_name_all_at_once(tmp_path):
    for name, (content, _) in MALFORMED.items():
        (tmp_path / name).write_text(content)
    good = lambada(tmp_path, "70m", 0, 0.1)
    with pytest.raises(ValueError) as refused:
        results.read([good, *(tmp_path / name for name in MALFORMED)])
    for name, (_, why) in MALFORMED.items():
        assert name in str(refused.value) and why in str(refused.value)
    assert good.name not in str(refused.value)


def test_malformed_files_in_a_folder_are_left_out_with_a_warning(tmp_path, caplog):
    (tmp_path / "list.json").write_text(MALFORMED["list.json"][0])
    good = lambada(tmp_path, "70m", 0, 0.1)
    with caplog.at_level(logging.WARNING):
        assert [result.path for result in results.read([tmp_path])] == [good]
    assert "list.json" in caplog.text and "1 files left out" in caplog.text


def test_a_folder_without_results_and_a_path_that_is_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no file of results"):
        results.read([tmp_path])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        results.read([tmp_path / "nowhere"])


def test_a_file_given_twice_is_read_once(tmp_path):
    path = lambada(tmp_path, "70m", 0, 0.1)
    assert len(results.read([tmp_path, path, tmp_path / "pythia-70m"])) == 1


@pytest.mark.parametrize(
    "name, step, shots, place",
    [
        ("pythia-70m", 3000, 0, "pythia-70m/zero-shot/70m_step3000.json"),
        ("EleutherAI/pythia-70m", 0, 5, "pythia-70m/five-shot/70m-5shot_step0.json"),
        ("pythia-1b-deduped", 1, 25, "pythia-1b-deduped/25-shot/1b-deduped-25shot_step1.json"),
        ("my-run", 8, None, "my-run/zero-shot/my-run_step8.json"),
        ("tuned", None, 0, "tuned/zero-shot/tuned.json"),
    ],
)
def test_ours_lie_where_published_ones_would(tmp_path, name, step, shots, place):
    given = {"model_name": name, "step": step, "num_fewshot": shots}
    assert results.path_of(tmp_path, **given) == tmp_path / place
    scores = {"lambada_openai": {"perplexity": 9.5, "acc": 1 / 3, "acc_stderr": 0.01}}
    path = results.write(tmp_path, returned(scores), provenance={"weights": "abc"}, **given)
    assert path == tmp_path / place
    result = read_one(path)
    assert result.metrics == scores
    assert (result.step, result.num_fewshot, result.ours) == (step, shots or 0, True)
    assert (result.model, result.harness) == (name.rpartition("/")[2], "0.4.13")


def test_ours_have_the_published_schema_and_provenance(tmp_path):
    theirs = json.loads(old_file(tmp_path / "70m_step0.json", SCORES).read_text())
    found = returned({"piqa": {"acc": 0.6}}, batch_size=8, limit=20)
    path = results.write(
        tmp_path, found, model_name="pythia-70m", step=0, num_fewshot=0, provenance={"jax": "0.10"}
    )
    ours = json.loads(path.read_text())
    assert set(ours) == {*theirs, "provenance"}
    assert set(ours["config"]) == set(theirs["config"])
    assert ours["results"] == {"piqa": {"acc": 0.6}}
    assert ours["config"]["limit"] == 20 and ours["provenance"]["jax"] == "0.10"
    assert read_one(path).notes == ("first 20 questions",)


def test_what_plots_need_of_other_models_is_read_back(tmp_path):
    about = {"tokens_per_step": 2048, "parameters": 123, "kind": "intervention"}
    path = results.write(
        tmp_path, returned({"piqa": {"acc": 0.6}}), model_name="mine", step=3, provenance=about
    )
    result = read_one(path)
    assert (result.tokens, result.parameters, result.kind) == (6144, 123, "intervention")


def test_scores_of_faulty_checkpoints_say_so(tmp_path):
    about = {"known_fault": "holds weights from the end of training (pythia#205)"}
    found = returned({"piqa": {"acc": 0.6}}, limit=5)
    path = results.write(tmp_path, found, model_name="pythia-2.8b", step=0, provenance=about)
    assert read_one(path).notes == ("first 5 questions", about["known_fault"])


@pytest.mark.parametrize(
    "given, why",
    [
        ({"model_name": ".."}, "model_name"),
        ({"model_name": "a b"}, "model_name"),
        ({"provenance": {"kind": "odd"}}, "kind 'odd'"),
        ({"results": {"results": {"piqa": {"alias": "piqa"}}}}, "no task gave a number"),
    ],
)
def test_what_is_refused_leaves_nothing(tmp_path, given, why):
    good = {
        "results": returned({"piqa": {"acc": 0.6}}),
        "model_name": "pythia-70m",
        "step": 0,
        "provenance": {},
    }
    with pytest.raises(ValueError, match=why):
        results.write(tmp_path, **{**good, **given})
    assert list(tmp_path.iterdir()) == []


def test_an_infinite_perplexity_is_kept(tmp_path):
    found = returned({"wikitext": {"word_perplexity": math.inf}})
    path = results.write(tmp_path, found, model_name="x", step=0, provenance={})
    assert read_one(path).value("wikitext", "word_perplexity") == (math.inf, None)
