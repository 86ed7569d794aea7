"""Our model for the LM Evaluation Harness (lm_eval 0.4.13), and its command line with it in it.

Requests are made of texts, cut and joined as the harness's own `hf` model does
(lm_eval/models/huggingface.py), so that scores agree with its; how they are computed is the
business of `pythia_jax.evaluation.scoring`.

On several processes each of them runs the harness over all requests, and gets all results.
"""

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from pythia_jax import bridge, sharding
from pythia_jax.bridge.model import Model, tokenizer_of
from pythia_jax.bridge.revisions import known_tokens_per_step
from pythia_jax.configs import MeshConfig
from pythia_jax.evaluation import tasks as task_names
from pythia_jax.evaluation.questions import OTHERS, RANDOM, Questions
from pythia_jax.evaluation.scoring import Scorer
from pythia_jax.model import parameters

try:
    import lm_eval
    from lm_eval import utils
    from lm_eval.__main__ import HarnessCLI
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import model_registry
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
except ModuleNotFoundError as error:
    if not str(error.name).startswith("lm_eval"):
        raise
    raise RuntimeError(task_names.MISSING) from None

NAME = "pythia_jax"
"""What the harness calls the model: `--model pythia_jax`."""
BOOTSTRAPS = 1000
"""Resamples that `evaluate` estimates the error of a perplexity from; the harness's own command
takes 100,000."""
HARMLESS = {"do_sample", "temperature", "top_p", "top_k"}
"""Settings of a generation that mean nothing where it is greedy."""


class PythiaJax(TemplateLM):
    """A model of ours as the harness takes it."""

    def __init__(
        self,
        pretrained: str | Model | Scorer,
        *,
        revision: str | None = None,
        step: int | None = None,
        dtype: str = "float32",
        tokenizer: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
        **others: Any,
    ) -> None:
        """
        pretrained: what `pythia_jax.load` takes, with `revision`, `step` and `dtype`; or a model,
            or a scorer, in memory. tokenizer: a tokenizer.json, or a folder with one, in place of
            the model's own.
        max_length: tokens that the model is given at most. max_gen_toks: of new ones, where a task
            does not say. batch_size: rows of a batch; None or `auto` packs them by tokens.
        slices, data, fsdp, tensor: the mesh, as `mesh` of a run's config.
        max_batch_size, device, trust_remote_code: the harness hands them to every model; rows are
            packed by tokens where `hf` would try sizes out, JAX's own choice of devices stands, and
            no code of a model is run.

        Raises ValueError for arguments that are none of these, and a model without a tokenizer;
        and as `pythia_jax.load` and `Scorer` do.
        """
        super().__init__()
        axes = {name: others.pop(name) for name in sharding.AXES if name in others}
        if others:
            known = ("pretrained, revision, step, dtype, tokenizer, max_length, max_gen_toks, "
                     f"batch_size, {', '.join(sharding.AXES)}")  # fmt: skip
            raise ValueError(
                f"model arguments that {NAME} does not have: {', '.join(sorted(others))}; it has "
                f"{known}"
            )
        rows = _rows(batch_size)
        if isinstance(pretrained, Scorer):
            given = {"revision": revision, "step": step, "max_length": max_length, **axes}
            given |= {"batch_size": rows}
            named = [name for name, value in given.items() if value is not None]
            if named:
                raise ValueError(f"a scorer is made already, so {', '.join(named)} cannot be set")
            self.scorer = pretrained
        else:
            mesh = sharding.make_mesh(MeshConfig(**axes)) if axes else jax.sharding.get_mesh()
            if mesh.empty:
                mesh = sharding.make_mesh(MeshConfig())
            with jax.set_mesh(mesh):
                if not isinstance(pretrained, Model):
                    pretrained = bridge.load(pretrained, revision=revision, step=step, dtype=dtype)
                self.scorer = Scorer(pretrained, batch_rows=rows, max_length=max_length)
        self.revision = revision
        self.max_gen_toks = max_gen_toks
        self._files = _tokenizer_files(self.scorer.model, tokenizer)
        encoder = tokenizer_of(self._files)
        assert encoder is not None
        self._encoder = encoder
        self._eot = self.scorer.model.eod
        self._eot_text = encoder.decode([self._eot], skip_special_tokens=False)

    @property
    def eot_token_id(self) -> int:
        return self._eot

    @property
    def max_length(self) -> int:
        return self.scorer.max_length

    @property
    def tokenizer_name(self) -> str:
        """Names a cache of requests: two tokenizers of the same name are the same."""
        digest = hashlib.sha256(self._files["tokenizer.json"]).hexdigest()
        return f"{NAME}-{digest[:16]}"

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        raise ValueError("Pythia's models have no chat template; leave apply_chat_template out")

    def get_model_info(self) -> dict[str, Any]:
        """What the results say of the model."""
        model = self.scorer.model
        return {
            "model_num_parameters": parameters.count(model.config),
            "model_dtype": str(model.params["embed_in"]["embedding"].dtype),
            "model_revision": self.revision or "",
            "model_source": model.source,
            "model_step": model.step,
            "tokens_per_step": known_tokens_per_step(model.facts),
            "non_embedding_parameters": parameters.count(model.config, embedding=False),
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._eot_text)
        return self._encoder.encode(string, add_special_tokens=add_special_tokens).ids

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        answers = self.scorer.loglikelihoods(pairs, progress=not disable_tqdm)
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        windows: list[tuple[list[int], list[int]]] = []
        ends = [0]
        for request in requests:
            (text,) = request.args
            rolled = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += map(utils.make_disjoint_window, rolled)
            ends.append(len(windows))
        scores = self.scorer.loglikelihoods(windows, progress=not disable_tqdm)
        totals = []
        for i, request in enumerate(requests):
            total = sum(score for score, _ in scores[ends[i] : ends[i + 1]])
            totals.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        texts = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        for group in alike.values():
            contexts = [requests[i].args[0] for i in group]
            settings = requests[group[0]].args[1]
            made = self._generate(contexts, settings, not disable_tqdm)
            for i, text in zip(group, made, strict=True):
                texts[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return texts

    def _generate(
        self, contexts: Sequence[str], settings: dict[str, Any], progress: bool
    ) -> list[str]:
        """Greedy continuations, cut at the first stop string."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        stop = handle_stop_sequences(kwargs.pop("until"), eos=self._eot_text)
        room = kwargs.pop("max_gen_toks")
        unknown = sorted(set(kwargs) - HARMLESS)
        if kwargs["do_sample"] or unknown:
            named = unknown or ["do_sample", "temperature"]
            raise ValueError(
                f"generation settings {', '.join(f'{n}={kwargs.get(n)}' for n in named)}: {NAME} "
                "generates greedily; it takes until and max_gen_toks"
            )
        kept = self.max_length - room
        if kept < 1:
            raise ValueError(
                f"max_gen_toks {room}: leaves no room for a prompt in {self.max_length} tokens"
            )
        prompts = [self.tok_encode(text)[-kept:] or [self.prefix_token_id] for text in contexts]

        def decoded(tokens: list[int]) -> str:
            return self._encoder.decode(tokens, skip_special_tokens=True)

        def finished(tokens: list[int]) -> bool:
            text = decoded(tokens)
            return any(term and term in text for term in stop)

        made = self.scorer.greedy(prompts, room, finished=finished, progress=progress)
        return [postprocess_generated_text(decoded(tokens), stop, None) for tokens in made]


def _rows(batch_size: int | str | None) -> int | None:
    if batch_size is None or str(batch_size).partition(":")[0] == "auto":
        return None
    try:
        return int(batch_size)
    except ValueError:
        raise ValueError(f"batch_size {batch_size!r}: give a number of rows, or auto") from None


def _tokenizer_files(model: Model, tokenizer: str | None) -> dict[str, bytes]:
    if tokenizer is not None:
        path = Path(tokenizer)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer {tokenizer}: there is no {path}")
        return {"tokenizer.json": path.read_bytes()}
    if "tokenizer.json" not in model.tokenizer_files:
        raise ValueError(
            f"{model.source or 'the model'} has no tokenizer, which the harness's texts need; name "
            "one: tokenizer=FOLDER, with a tokenizer.json in it"
        )
    return model.tokenizer_files


def register() -> None:
    """Make `--model pythia_jax` known to the harness of this process."""
    if NAME not in model_registry:
        model_registry.register(NAME, target=f"{__name__}:{PythiaJax.__name__}")


def evaluate(
    model: Model | Scorer | PythiaJax,
    tasks: str | Iterable[str],
    *,
    num_fewshot: int | None = None,
    limit: int | float | None = None,
    include_path: str | Path | None = None,
    batch_size: int | str | None = None,
    log_samples: bool = False,
) -> dict[str, Any]:
    """The harness's results for a model in memory: `results`, `versions`, `config` and more.

    tasks: names of the harness, of files in `include_path`, ours, and the preset `pythia`.
    num_fewshot: examples before each question; None is what each task says. limit: questions of
        each task, or below 1 a share of them. batch_size: rows, in place of packing by tokens.
    log_samples: with every request and answer, under `samples`.

    Raises ValueError for tasks that there are none of, and as `ask` does.
    """
    named = Questions(tasks, num_fewshot=num_fewshot, limit=limit, include_path=include_path)
    return ask(model, named, batch_size=batch_size, log_samples=log_samples)


def ask(
    model: Model | Scorer | PythiaJax,
    questions: Questions,
    *,
    batch_size: int | str | None = None,
    log_samples: bool = False,
) -> dict[str, Any]:
    """As `evaluate`, on tasks that have been read; they may be asked of other models after it.

    Errors of perplexities are estimated from `BOOTSTRAPS` resamples. Raises as `PythiaJax` does.
    """
    lm = model if isinstance(model, PythiaJax) else PythiaJax(model, batch_size=batch_size)
    evaluated: Callable[..., Any] = lm_eval.evaluate
    began = time.time()
    # Not by simple_evaluate, which reads the tasks each time, and asks git and torch where it is.
    with (
        _environment(DISABLE_MULTIPROC="1", TOKENIZERS_PARALLELISM="false"),
        questions.as_new() as loaded,
    ):
        results = evaluated(
            lm=lm,
            task_dict=loaded,
            limit=questions.limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=log_samples,
        )
    assert results is not None  # we are the only rank that the harness knows of
    config = {
        "model": NAME,
        "model_args": None,
        **lm.get_model_info(),
        "batch_size": lm.scorer.batch_rows or "auto",
        "device": lm.scorer.mesh.devices.flat[0].platform,
        "use_cache": None,
        "limit": questions.limit,
        "bootstrap_iters": BOOTSTRAPS,
        "gen_kwargs": None,
        "random_seed": RANDOM,
        "numpy_seed": OTHERS,
        "fewshot_seed": OTHERS,
    }
    about = {"config": config, "date": began, "lm_eval_version": lm_eval.__version__}
    return {**results, **about}


def table(results: dict[str, Any]) -> str:
    """Results as the harness prints them: a table of tasks, and one of groups if there are any."""
    tables = [utils.make_table(results)]
    if results.get("groups"):
        tables.append(utils.make_table(results, "groups"))
    return "\n".join(tables)


def run(argv: Sequence[str]) -> None:
    """The harness's command line (`run`, `ls`, `validate`), with our model and our tasks in it.

    argv: what follows the command's name. Without a batch size, ours packs rows by tokens.
    """
    register()
    lm_eval.utils.setup_logging()
    with _arguments("lm-eval", *argv):
        command = HarnessCLI()
        args = command.parse_args()
        written: dict[str, Any] = {}
        if getattr(args, "config", None):
            written = EvaluatorConfig.load_yaml_config(args.config)
        if hasattr(args, "include_path"):
            theirs = args.include_path or written.get("include_path")
            # The harness's index takes several folders, its command line one.
            args.include_path = [str(path) for path in task_names.folders(theirs)]
        named = getattr(args, "tasks", None) or written.get("tasks")
        if named:
            # `run` takes a list, `validate` names with commas between.
            names = task_names.expand(named)
            args.tasks = names if args.command == "run" else ",".join(names)
        if (getattr(args, "model", None) or written.get("model")) == NAME:
            if "batch_size" not in {*vars(args), *written}:
                args.batch_size = "auto"
            if args.device is None and "device" not in written:
                args.device = jax.default_backend()
        # Errors of perplexities in this process: one that has a device had better not fork.
        with _environment(DISABLE_MULTIPROC="1", TOKENIZERS_PARALLELISM="false"):
            command.execute(args)


@contextlib.contextmanager
def _arguments(*argv: str) -> Iterator[None]:
    before, sys.argv = sys.argv, list(argv)
    try:
        yield
    finally:
        sys.argv = before


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Variables set meanwhile, where they are not set already."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
