"""An exported folder opened by three programs that nobody here wrote, with our own results.

CTranslate2 reads the model through transformers older than 5, so it runs in an environment of its
own, which `make test-all` makes: `.venv-ct2`, or what CT2_VENV names.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import yaml
from hf_folders import load_theirs, our_logits
from reference import distance, hf_logits, random_params
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

import pythia_jax as pj
from pythia_jax.bridge.model import Model
from pythia_jax.configs import ModelConfig

ROOT = Path(__file__).parents[2]
PILE_TOKENIZER = ROOT.parent / "shared" / "data" / "20B_tokenizer.json"
CT2 = Path(os.environ.get("CT2_VENV", ROOT / ".venv-ct2"))
PROMPTS = ("def print_hello_world():", "def hello_name(name:")
NEW = 20


def tokenizer_json() -> bytes:
    """The Pile's tokenizer, or where that is not at hand one of the same kind."""
    if PILE_TOKENIZER.is_file():
        return PILE_TOKENIZER.read_bytes()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = Path(json.__file__).read_text(encoding="utf-8")
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer.to_str().encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small model as a run of ours ends up: tanh GELU, exported in float16 with a tokenizer."""
    content = tokenizer_json()
    vocab = -(-Tokenizer.from_buffer(content).get_vocab_size() // 128) * 128
    config = ModelConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=vocab,
        max_position_embeddings=128,
        hidden_act="gelu_pytorch_tanh",
    )
    params = random_params(config, seed=9)
    # Tokens of unequal weight: among equal ones the likeliest two are too often nearly level.
    weight = np.exp(0.4 * np.random.default_rng(9).standard_normal(vocab))
    params["embed_out"]["kernel"] *= weight.astype(np.float32)
    model = Model(params, config, {"tokenizer.json": content})
    out = tmp_path_factory.mktemp("exported") / "model"
    pj.save_hf(model, out, dtype="float16")
    return out


@pytest.fixture(scope="module")
def model(folder) -> Model:
    """What was exported: weights that float16 holds exactly, computed with in float32."""
    return pj.load(folder)


@pytest.fixture(scope="module")
def ids(model) -> list[list[int]]:
    return [model.tokenizer.encode(prompt).ids for prompt in PROMPTS]


@pytest.fixture(scope="module")
def greedy(model, ids) -> list[list[int]]:
    """Our greedy continuations, of which no step is a near tie."""
    found = pj.generate(model, list(PROMPTS), max_new_tokens=NEW, temperature=0.0)
    for prompt, new in zip(ids, found, strict=True):
        assert len(new) == NEW and model.eod not in new
        logits = our_logits(model, np.array([prompt + new]))[0, len(prompt) - 1 : -1]
        np.testing.assert_array_equal(logits.argmax(-1), new)
        second, first = np.sort(logits, axis=-1)[:, -2:].T
        assert ((first - second) / np.abs(logits).max()).min() > 1e-4
    return found


def run(*command: Any, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        check=False,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_transformers_gives_our_logits_and_our_greedy_tokens(folder, model, ids, greedy):
    theirs = load_theirs(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert theirs.config.hidden_act == "gelu_pytorch_tanh"
    for prompt, tokens, new in zip(PROMPTS, ids, greedy, strict=True):
        assert tokenizer(prompt)["input_ids"] == tokens
        row = np.array([tokens + new])
        assert np.abs(our_logits(model, row) - hf_logits(theirs, row)).max() <= 2e-5
        made = theirs.generate(torch.tensor([tokens]), max_new_tokens=NEW, do_sample=False)
        assert made[0].tolist() == tokens + new


TEXTS = [
    ("def print_hello_world():\n    print(", '"hello world")'),
    ("for name in names:", "\n    yield name"),
    ("if not isinstance(value, dict):", " raise TypeError(value)"),
    ("import", " json"),
]


def our_log_likelihood(model: Model, context: str, target: str) -> tuple[float, bool]:
    """Sum of log-probabilities of the target's tokens, and whether each is the likeliest."""
    assert model.tokenizer is not None
    # As the harness joins them, where a token of both together reaches over the border.
    whole = model.tokenizer.encode(context).ids
    start = len(whole)
    whole += model.tokenizer.encode(context + target).ids[start:]
    logits = jax.nn.log_softmax(our_logits(model, np.array([whole[:-1]])))[0, start - 1 :]
    wanted = np.array(whole[start:])
    score = float(logits[np.arange(len(wanted)), wanted].sum())
    return score, bool((logits.argmax(-1) == wanted).all())


@pytest.mark.slow
def test_evaluation_harness_gives_our_log_likelihoods(folder, model, tmp_path):
    for package in ("lm_eval", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (pip install 'lm-eval[hf]')")
    lines = [json.dumps({"context": a, "target": b}) for a, b in TEXTS]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    task = {
        "task": "local_lines",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{target}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(yaml.safe_dump(task))
    run(
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf"),
        *("--model_args", f"pretrained={folder},dtype=float32", "--device", "cpu"),
        *("--tasks", "local_lines", "--include_path", tmp_path / "tasks"),
        *("--output_path", tmp_path / "out", "--log_samples"),
        HF_HOME=str(tmp_path / "home"),
        HF_DATASETS_OFFLINE="1",
        DISABLE_MULTIPROC="1",
    )
    (path,) = (tmp_path / "out").rglob("samples_local_lines_*.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(samples) == len(TEXTS)
    for sample in samples:
        score, greedy = our_log_likelihood(model, sample["doc"]["context"], sample["doc"]["target"])
        ((theirs, also),) = sample["resps"][0]
        assert float(theirs) == pytest.approx(score, abs=1e-4)
        assert str(also) == str(greedy)


GENERATE = """
import json, sys
import ctranslate2, numpy, transformers
folder, source, new = sys.argv[1], sys.argv[2], int(sys.argv[3])
generator = ctranslate2.Generator(folder, compute_type="float32", intra_threads=1)
tokenizer = transformers.AutoTokenizer.from_pretrained(source)
prompts = [tokenizer.convert_ids_to_tokens(tokenizer.encode(text)) for text in sys.argv[4:]]
made = generator.generate_batch(
    prompts, max_length=new, sampling_topk=1, include_prompt_in_result=False
)
logits = [numpy.array(generator.forward_batch([p]), numpy.float32)[0].tolist() for p in prompts]
tokens = [result.sequences_ids[0] for result in made]
print(json.dumps({"tokens": tokens, "logits": logits}))
"""


@pytest.fixture(scope="module")
def ct2() -> Path:
    converter = CT2 / "bin" / "ct2-transformers-converter"
    if not converter.is_file():
        pytest.skip(f"CTranslate2 is not in {CT2} (make test-all installs it; CT2_VENV names it)")
    return CT2 / "bin"


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "tolerance"), [("float16", 1e-5), ("int8", 0.05)])
def test_ctranslate2_converts_and_gives_our_greedy_tokens(
    quantization, tolerance, ct2, folder, model, ids, greedy, tmp_path
):
    run(
        *(ct2 / "ct2-transformers-converter", "--model", folder),
        *("--quantization", quantization, "--output_dir", tmp_path / "ct2"),
        PYTHONPATH="",  # of this environment
    )
    told = run(
        *(ct2 / "python", "-c", GENERATE, tmp_path / "ct2", folder, NEW, *PROMPTS), PYTHONPATH=""
    )
    found = json.loads(told.splitlines()[-1])
    for tokens, logits in zip(ids, found["logits"], strict=True):
        assert distance(logits, our_logits(model, np.array([tokens]))[0]) < tolerance
    if quantization == "float16":
        assert found["tokens"] == greedy
    else:
        assert [len(tokens) for tokens in found["tokens"]] == [NEW] * len(PROMPTS)
