"""GPT-NeoX's YAML files as settings: every key in one spelling, several files put together.

The keys are those of GPT-NeoX v1.0 (megatron/neox_arguments: neox_args.py, deepspeed_args.py);
`neox_sections` says what the ones that decide something become here, the tables below name the
rest.
"""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pythia_jax.config_parsing import ConfigError, read_yaml


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


LAYOUT = _names(
    """
    activation_checkpointing bias_dropout_fusion checkpoint_activations checkpoint_in_cpu
    checkpoint_num_layers communication_data_type contiguous_checkpointing
    deepspeed_activation_checkpointing fp32_allreduce gradient_accumulation_steps
    gradient_predivide_factor lazy_mpu_init mmap_warmup num_workers output_layer_parallelism
    partition_activations pipe_parallel_size pipe_partition_method prescale_gradients
    profile_backward scaled_masked_softmax_fusion scaled_upper_triang_masked_softmax_fusion
    sparse_gradients synchronize_each_layer train_micro_batch_size_per_gpu use_cpu_initialization
    use_shared_fs zero_allow_untested_optimizer zero_optimization
    """
)
"""Speed, memory and where things lie: rounding apart, no key of these changes what is trained."""

QUIET = _names(
    """
    adlr_autoresume adlr_autoresume_interval autotuning autotuning_run char_level_ppl
    checkpoint_validation_with_forward_pass comment
    comms_logger csv_monitor deepscale deepscale_config deepspeed deepspeed_mpi deepspeed_slurm
    detect_nvlink_pairs distributed_backend dump_state eval_results_prefix eval_tasks exclude
    flops_profiler force_multi git_hash gradient_noise_scale_cpu_offload
    gradient_noise_scale_n_batches hostfile include launcher log_dir log_grad_norm
    log_grad_pct_zeros log_gradient_noise_scale log_optimizer_states log_param_norm master_addr
    master_port maximum_tokens merge_file no_save_rng no_ssh_check num_gpus num_nodes num_samples
    prompt_end recompute return_logits sample_input_file sample_output_file slurm_comment
    steps_per_print temperature tensorboard tensorboard_dir text_gen_type top_k top_p use_wandb
    user_script wall_clock_breakdown wandb wandb_group wandb_host wandb_init_all_ranks
    wandb_project wandb_team
    """
)
"""Launching, logging, evaluating and generating."""

UNREAD = _names(
    """
    base_shapes_file batch_size clip_grad config_files coord_check curriculum_seqlen do_test
    do_train do_valid dynamic_loss_scale gmlp_attn_dim hysteresis is_pipe_parallel iteration
    local_rank loss_scale loss_scale_window lr min_scale mup_attn_temp mup_embedding_mult
    mup_init_scale mup_output_temp mup_rp_embedding_mult mup_width_scale opt_pos_emb_offset
    optimizer_type padded_vocab_size param_sharing_style rank rms_norm_epsilon rpe_max_distance
    rpe_num_buckets save_base_shapes save_iters scalenorm_epsilon short_seq_prob sparsity_config
    weighted_sampler_alpha world_size zero_allgather_bucket_size zero_contiguous_gradients
    zero_reduce_bucket_size zero_reduce_scatter zero_stage
    """
)
"""What GPT-NeoX itself overwrites from other keys, or reads only for what is refused here."""


@dataclass
class Settings:
    """Settings of one block, under one spelling of their names (`num_layers`).

    values: by name. spelled: each name as the file writes it. where: file and block, for messages.
    taken: names that someone has asked for.
    """

    values: dict[str, Any]
    spelled: dict[str, str]
    where: str
    taken: set[str] = field(default_factory=set)

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or `default` where the key is absent or null."""
        self.taken.add(name)
        return self.values[name] if name in self else default

    def flag(self, name: str, default: bool) -> bool:
        return self._typed(name, default, bool, "true or false")

    def text(self, name: str, default: str | None = None) -> str | None:
        return self._typed(name, default, str, "text")

    def whole(self, name: str, default: int) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, "a whole number")
        return value

    def number(self, name: str, default: float) -> float:
        # YAML 1.1 reads 1e-3, which has no point, as text.
        value = self.get(name, default)
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise self._wrong(name, "a finite number")
        return number

    def whole_list(self, name: str) -> list[int]:
        value = self.get(name, [])
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self._wrong(name, "a list of whole numbers")
        return value

    def block(self, name: str) -> "Settings":
        """The block of that name, empty where there is none."""
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            raise self._wrong(name, "a block of keys")
        where = f"{self.where}: {self.spelling(name)}"
        return _one_spelling(value, where)

    def require(self, names: Iterable[str]) -> None:
        """Raise a ConfigError that names those of `names` that are not set, all at once."""
        missing = [self._nearest_to(name) for name in names if name not in self]
        if missing:
            raise ConfigError(f"{self.where}: missing: {', '.join(missing)}")

    def spelling(self, name: str) -> str:
        """A name as the file writes it; with hyphens, as most files do, if it is not there."""
        return self.spelled.get(name, name.replace("_", "-"))

    def rest(self) -> list[str]:
        """Names that are set and that nobody has asked for."""
        return [name for name in self.values if name not in self.taken and name in self]

    def _typed(self, name: str, default: Any, kind: type, need: str) -> Any:
        value = self.get(name, default)
        if value is not None and not isinstance(value, kind):
            raise self._wrong(name, need)
        return value

    def _wrong(self, name: str, need: str) -> ConfigError:
        value = self.values.get(name)
        return ConfigError(f"{self.where}: {self.spelling(name)}: {value!r} should be {need}")

    def _nearest_to(self, name: str) -> str:
        close = difflib.get_close_matches(name, self.rest(), n=1, cutoff=0.8)
        return self.spelling(name) + (f" (is {self.spelling(close[0])!r} it?)" if close else "")


@dataclass
class Notes:
    """The settings, and what is found out while they are read."""

    settings: Settings
    refused: list[str] = field(default_factory=list)
    unhonoured: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def refuse(self, name: str, why: str, default: object = None) -> None:
        self.refused.append(self.say(name, why, default))

    def list(self, name: str, what: str, default: object = None) -> None:
        self.unhonoured.append(self.say(name, what, default))

    def say(self, name: str, what: str, default: object = None) -> str:
        s = self.settings
        shown = f"{s.get(name)!r}" if name in s else f"not set, which is {default!r} in GPT-NeoX"
        return f"{s.spelling(name)}: {shown}: {what}"


def open_files(paths: tuple[str | Path, ...]) -> Settings:
    """The settings of one or several files, read as GPT-NeoX puts them together.

    Raises ConfigError for no file, a file that is not YAML (a missing comma is named), and a key
    that stands twice, in any spelling, in one file or in two.
    """
    if not paths:
        raise ConfigError("name a GPT-NeoX YAML file, or several that make up one config")
    values: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    origin: dict[str, Path] = {}
    for path in map(Path, paths):
        settings = _one_spelling(_read(path), str(path))
        for name, value in settings.values.items():
            if name in origin:
                key = settings.spelling(name)
                raise ConfigError(f"{path}: {key!r} stands in {origin[name]} too; keep one")
            values[name], spelled[name], origin[name] = value, settings.spelling(name), path
    return Settings(values, spelled, " + ".join(map(str, paths)))


def _read(path: Path) -> dict[Any, Any]:
    try:
        return read_yaml(path)
    except ConfigError:
        missing = _missing_comma(path)
        if missing is None:
            raise
        raise ConfigError(missing) from None


def _one_spelling(block: Mapping[Any, Any], where: str) -> Settings:
    """A block's keys with underscores; refuses one that stands there with hyphens too."""
    values: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for key, value in block.items():
        name = str(key).replace("-", "_")
        if name in values:
            raise ConfigError(f"{where}: {spelled[name]!r} and {str(key)!r} are one key; keep one")
        values[name], spelled[name] = value, str(key)
    return Settings(values, spelled, where)


def _missing_comma(path: Path) -> str | None:
    """What to tell of a file in which a comma is missing behind a value; None of any other."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    try:
        yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        problem = error.problem or ""
        if mark is None or not problem.startswith("expected ',' or") or "stream end" in problem:
            return None
    except yaml.YAMLError:
        return None
    else:
        return None
    keys: list[str | None] = [None]  # the last key of every block that is open
    end, named = 0, False
    for token in yaml.scan(text, yaml.SafeLoader):
        if token.start_mark.index >= mark.index:
            break
        # Without its comma, a bare number takes in the line below.
        bare = isinstance(token, yaml.ScalarToken) and token.plain
        end = token.start_mark.line if bare else token.end_mark.line
        if isinstance(token, yaml.ScalarToken) and named:
            keys[-1] = token.value
        named = isinstance(token, yaml.KeyToken)
        if isinstance(token, (yaml.FlowMappingStartToken, yaml.FlowSequenceStartToken)):
            keys.append(None)
        elif isinstance(token, (yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)):
            keys.pop()
    behind = f"the value of {keys[-1]!r}" if keys[-1] else "what stands there"
    return (
        f"{path}: line {end + 1}: a comma is missing after {behind}; "
        f"line {mark.line + 1} begins a new entry, so the file is no valid YAML. Add the comma"
    )
