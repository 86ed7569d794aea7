"""The Pythia suite: ten sizes, how each was trained, its checkpoints, and what is wrong with them.

Shapes, learning rates and batch layouts are those of the training files in EleutherAI/pythia
(`models/*/*.yml`), corrected where those files do not describe the run; every correction stands
in `known_faults`. Faults of published weights are cited by the thread that reports them.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase

TOTAL_STEPS = 143_000
BATCH_SIZE = 1024  # rows a step, over all GPUs
SEQUENCE_LENGTH = 2048
MLP_RATIO = 4  # intermediate_size / hidden_size
TOKENIZER_VOCAB_SIZE = 50_277  # before padding to a multiple of 128 x model_parallel

# Powers of two early on, where most is learned in a few steps; then every thousandth, to the end.
CHECKPOINT_STEPS = (0, *(2**i for i in range(10)), *range(1000, TOTAL_STEPS + 1, 1000))


@dataclass(frozen=True)
class SuiteModel:
    """One size of the suite, for its standard and (where there is one) its deduplicated run.

    vocab_size: rows of the embedding, padding included.
    initializer: the distributions that training really started from.
    micro_batch: rows on one GPU in one pass. `micro_batch * gradient_accumulation * gpus /
        model_parallel` is `BATCH_SIZE`.
    eval_interval: steps between validations; with GPT-NeoX it sets how many validation samples
        are drawn, and so their order.
    precision: of the original's weights and activations in training.
    deduped: whether a run on the deduplicated Pile exists.
    old_name: the size's name before January 2023, when sizes were counted otherwise.
    known_faults: what is wrong, or said wrongly, about this size; `COMMON_FAULTS` hold for all.
    """

    size: str
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    vocab_size: int
    initializer: str
    peak_learning_rate: float
    min_learning_rate: float
    micro_batch: int
    gradient_accumulation: int
    gpus: int
    model_parallel: int
    eval_interval: int
    precision: str = "float16"
    deduped: bool = True
    old_name: str | None = None
    known_faults: tuple[str, ...] = ()

    @property
    def intermediate_size(self) -> int:
        return MLP_RATIO * self.hidden_size

    @property
    def names(self) -> tuple[str, ...]:
        """The runs of this size: `pythia-SIZE`, and `pythia-SIZE-deduped` where it exists."""
        name = f"pythia-{self.size}"
        return (name, f"{name}-deduped") if self.deduped else (name,)


COMMON_FAULTS = (
    "step0 and step1 hold the same weights: the first update has learning rate 0 (pythia#83)",
    "trained with tanh GELU, served by Hugging Face with exact GELU (hidden_act: gelu)",
    "trained with rotary angles in half precision, served with float32 ones (gpt-neox#1003)",
    "the validation path of the training files is the training data itself",
)

_FOLDER_SAYS_DEDUPED = (
    "the training file reads .../pile_deduped/pile_20B_tokenizer_text_document: the folder says "
    "deduplicated, the file in it is the standard Pile"
)
_NORMAL_INIT = (
    "the training file sets no initializer, so GPT-NeoX's normal/scaled_normal was used; the "
    "paper's table says small/wang (pythia#135)"
)
_SUMMED_BIAS = (
    "the biases of attention.dense and mlp.dense_4h_to_h were added once per model-parallel rank: "
    "the published ones are the sums, and moved {n} times as far at each update (gpt-neox#962)"
)

# size, layers, width, heads, vocabulary, initializer, peak and minimum learning rate,
# micro-batch, accumulation, GPUs, model-parallel GPUs, evaluation interval
_MODELS = (
    SuiteModel(
        "14m", 6, 128, 4, 50304, "small_wang", 1e-3, 1e-4, 32, 1, 32, 1, 100_000,
        deduped=False,
        known_faults=(_FOLDER_SAYS_DEDUPED,),
    ),
    SuiteModel(
        "31m", 6, 256, 8, 50304, "small_wang", 1e-3, 1e-4, 32, 1, 32, 1, 100_000,
        deduped=False,
        known_faults=(_FOLDER_SAYS_DEDUPED,),
    ),
    SuiteModel(
        "70m", 6, 512, 8, 50304, "small_wang", 1e-3, 1e-4, 32, 1, 32, 1, 100_000,
        old_name="19m",
    ),
    SuiteModel(
        "160m", 12, 768, 12, 50304, "small_wang", 6e-4, 6e-5, 32, 1, 32, 1, 40_000,
        old_name="125m",
        known_faults=(
            "pythia-160m-weight-seed*: the published step0 does not lead to step1 (pythia#203)",
        ),
    ),
    SuiteModel(
        "410m", 24, 1024, 16, 50304, "small_wang", 3e-4, 3e-5, 32, 1, 32, 1, 40_000,
        old_name="350m",
        known_faults=(
            "pythia-410m-seed9 step40000, -seed6 step88000 and -seed2 step111000 have no weights "
            "on the hub (pythia#202)",
        ),
    ),
    SuiteModel(
        "1b", 16, 2048, 8, 50304, "small_wang", 2.5e-4, 2.5e-5, 16, 1, 64, 1, 40_000,
        precision="bfloat16",
        old_name="800m",
        known_faults=(
            "the training file says fp16; the standard model ran in bfloat16, and which the "
            "deduplicated one ran in is not recorded",
            "the training file asks for flash attention, which then had no heads of 256",
            "README and paper give 3.0e-4 as the learning rate; every training file has 2.5e-4",
        ),
    ),
    SuiteModel(
        "1.4b", 24, 2048, 16, 50304, "small_wang", 2e-4, 2e-5, 16, 1, 64, 1, 40_000,
        old_name="1.3b",
    ),
    SuiteModel(
        "2.8b", 32, 2560, 32, 50304, "small_wang", 1.6e-4, 1.6e-5, 16, 1, 64, 1, 40_000,
        old_name="2.7b",
        known_faults=(
            "pythia-2.8b: 86 of the 154 revisions on the hub hold weights from the end of "
            "training: every one up to 65000, then 70000, 80000, 90000, 100000, 103000, 110000, "
            "120000, 130000, 140000 and, rightly, 143000 (pythia#205)",
        ),
    ),
    SuiteModel(
        "6.9b", 32, 4096, 32, 50432, "normal_scaled", 1.2e-4, 1.2e-5, 8, 2, 128, 2, 1_000,
        old_name="6.7b",
        known_faults=(
            _NORMAL_INIT,
            _SUMMED_BIAS.format(n=2),
            "pythia-6.9b: step26000 came to the hub later than the others (pythia#94)",
        ),
    ),
    SuiteModel(
        "12b", 36, 5120, 40, 50688, "normal_scaled", 1.2e-4, 1.2e-5, 8, 2, 256, 4, 1_000,
        old_name="13b",
        known_faults=(
            _NORMAL_INIT,
            _SUMMED_BIAS.format(n=4),
            "pythia-12b: the first shard of step50000 and step58000 is that of the last step, so "
            "the embedding and the early layers are wrong (pythia#206)",
            "pythia-12b: step4000 and step32000 came to the hub later than the others (pythia#107)",
            "pythia-12b-deduped: step32000 was wrong and was uploaded again (pythia#108); an old "
            "download still is",
            "the standard training file lacks a comma after attention-config and is not valid YAML",
            "the deduplicated training file says 40 layers and 36 heads, which do not divide the "
            "width: they are swapped",
        ),
    ),
)  # fmt: skip

SUITE: dict[str, SuiteModel] = {model.size: model for model in _MODELS}
"""Every size by its name, smallest first."""

_FINAL_WEIGHTS = "holds weights from the end of training (pythia#205)"
_FINAL_SHARD = (
    "its first shard is that of the last step, so the embedding and the early layers are wrong "
    "(pythia#206)"
)
_NO_WEIGHTS = "has no weights on the hub (pythia#202)"
_LATE = (70_000, 80_000, 90_000, 100_000, 103_000, 110_000, 120_000, 130_000, 140_000)

BAD_REVISIONS: dict[str, dict[int, str]] = {
    "pythia-2.8b": {
        step: _FINAL_WEIGHTS for step in CHECKPOINT_STEPS if step <= 65_000 or step in _LATE
    },
    "pythia-12b": {50_000: _FINAL_SHARD, 58_000: _FINAL_SHARD},
    "pythia-12b-deduped": {
        32_000: "was wrong and was uploaded again (pythia#108); a download from before still is"
    },
    "pythia-160m-weight-seed*": {0: "does not lead to step1 (pythia#203)"},
    "pythia-410m-seed9": {40_000: _NO_WEIGHTS},
    "pythia-410m-seed6": {88_000: _NO_WEIGHTS},
    "pythia-410m-seed2": {111_000: _NO_WEIGHTS},
}
"""Published checkpoints that are not what their step says: run → step → what is wrong. A `*` in
the name of a run stands for anything. `known_faults` says the same in words."""


def bad_revision(run: str, step: int) -> str | None:
    """What is wrong with a run's published checkpoint (`EleutherAI/pythia-12b`), if anything is."""
    name = run.removeprefix("EleutherAI/")
    found = (steps.get(step) for known, steps in BAD_REVISIONS.items() if fnmatchcase(name, known))
    return next(found, None)


def lookup(name: str) -> SuiteModel:
    """The size that `name` means: `70m`, `pythia-70m`, `pythia-70m-deduped`, the same behind
    `EleutherAI/`, and the names of before January 2023 (`19m`, `pythia-19m-deduped`, ...).

    Raises `ValueError`, which names the sizes that there are.
    """
    return _find(name)[0]


def hub_id(name: str) -> str:
    """Where today's weights of `name` (anything `lookup` knows) lie: `EleutherAI/pythia-70m`.

    Raises `ValueError` as `lookup` does.
    """
    return f"EleutherAI/{_find(name)[1]}"


def _find(name: str) -> tuple[SuiteModel, str]:
    """The size, and the current name of the run."""
    short = name.strip().lower().removeprefix("eleutherai/").removeprefix("pythia-")
    found = _RUNS.get(short)
    if found is None:
        raise ValueError(
            f"no model of the suite is called {name!r}. The sizes are {', '.join(SUITE)}; all but "
            f"{', '.join(size for size, model in SUITE.items() if not model.deduped)} have a "
            "deduplicated run too (70m-deduped)"
        )
    return found


# Every short name, old ones too: `70m`, `70m-deduped`, `19m`, `19m-deduped`.
_RUNS: dict[str, tuple[SuiteModel, str]] = {
    size + run.removeprefix(f"pythia-{model.size}"): (model, run)
    for model in _MODELS
    for run in model.names
    for size in (model.size, model.old_name or model.size)
}
