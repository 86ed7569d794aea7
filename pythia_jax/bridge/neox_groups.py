"""Where each tensor's optimizer state lies in GPT-NeoX's files.

DeeperSpeed flattens each of its two parameter groups (decayed, and not) into one tensor. Without
ZeRO every model-parallel rank keeps it whole, beside the weights or in their stead. ZeRO-1 pads it
at the end, cuts it into intervals of communication and these among the data-parallel ranks: the
pieces follow each other interval by interval, within an interval rank by rank. Here a tensor is a
range of such a sequence of pieces, and only that range is read.
Sources: DeeperSpeed, runtime/zero/stage1.py (`_elastic_state_dict`, `_rigid_state_dict`) and
runtime/fp16/fused_optimizer.py (`state_dict`); gpt-neox, megatron/model/utils.py (the groups).
"""

import bisect
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pythia_jax.bridge.neox_in import (
    RANK_FILE,
    NeoxFolder,
    known_name,
    numbered_files,
    open_client,
    shard_shape,
)
from pythia_jax.bridge.opened import CheckpointError
from pythia_jax.bridge.torch_files import TorchTensor
from pythia_jax.bridge.torch_pickle import Unknown
from pythia_jax.configs import ModelConfig
from pythia_jax.model.parameters import TABLE

ZERO_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
KINDS = ("fp32", "exp_avg", "exp_avg_sq")
"""Float32 weights, and Adam's m and v."""


class Pieces:
    """Tensors one behind the other, as one flat run of float32 numbers."""

    def __init__(self, tensors: Sequence[TorchTensor]) -> None:
        self._tensors = tensors
        self._ends = list(itertools.accumulate(tensor.size for tensor in tensors))

    @property
    def size(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        out = np.empty(stop - start, np.float32)
        at = start
        while at < stop:
            i = bisect.bisect_right(self._ends, at)
            first = self._ends[i] - self._tensors[i].size
            end = min(stop, self._ends[i])
            out[at - start : end - start] = self._tensors[i].read_flat(at - first, end - first)
            at = end
        return out


class Range(NamedTuple):
    """Where a rank's part of a tensor lies: of each kind of `KINDS` the same range."""

    pieces: Mapping[str, Pieces]
    start: int
    shape: tuple[int, ...]


Groups = dict[tuple[str, int], Range]
"""By name (`2.attention.dense.bias`) and model-parallel rank."""


class _Rank(NamedTuple):
    """What one rank's files say: for every group its pieces, and the order of its parameters.

    where: the files, for messages.
    """

    where: str
    groups: list[Mapping[str, Pieces]]
    shapes: Any


def groups_of(found: NeoxFolder, config: ModelConfig) -> tuple[Groups, dict[str, Any]]:
    """Where every tensor's state lies, and what else the optimizer says: of scale and counter."""
    zero = numbered_files(found.path, ZERO_FILE)
    if zero:
        ranks, about = _zero(found, zero)
    elif found.client.get("optimizer"):
        ranks, about = _without_zero(found)
    else:
        raise CheckpointError(
            f"{found.path}: holds weights and no optimizer state (no zero_pp_rank_…_optim_states.pt"
            ", and none in mp_rank_00_model_states.pt); start with rebuilt moments, or with none"
        )
    groups: Groups = {}
    decayed = {name: p.decayed for p in TABLE for name in p.neox_names(config)}
    parameters = {name: p for p in TABLE for name in p.neox_names(config)}
    for number, rank in enumerate(ranks):
        part = number % found.model_parallel
        names = _names(rank, len(rank.groups), list(found.tensors), decayed)
        for pieces, members in zip(rank.groups, names, strict=True):
            start = 0
            for name in members:
                shape = shard_shape(parameters[name], config, found.model_parallel)
                groups[name, part] = Range(pieces, start, shape)
                start += int(np.prod(shape))
            _check_sizes(rank.where, pieces, start)
    absent = [
        f"{name} of rank {r}"
        for name in decayed
        for r in range(found.model_parallel)
        if (name, r) not in groups
    ]
    if absent:
        raise CheckpointError(
            f"{found.path}: the optimizer state of {len(absent)} tensors is missing: {absent[0]}…"
        )
    return groups, about


def _names(rank: _Rank, count: int, order: list[str], decayed: dict[str, bool]) -> list[list[str]]:
    """The names of each group's parameters, in the order in which they were flattened.

    That is the order of the modules in both groups: the same as in the files of weights, and in
    `param_shapes`, where there is that; later DeepSpeed writes it group by group.
    """
    shapes = rank.shapes
    groups = shapes if isinstance(shapes, list | tuple) else [shapes or {}]
    if not all(isinstance(group, Mapping) for group in groups):
        raise CheckpointError(f"{rank.where}: param_shapes does not name the parameters")
    if isinstance(shapes, list | tuple):
        names = [[known_name(name) for name in group] for group in shapes]
        listed = list(itertools.chain(*names))
    else:
        listed = [known_name(name) for name in shapes] if shapes else order
        if count == 2:
            names = [
                [n for n in listed if decayed.get(n)],
                [n for n in listed if not decayed.get(n)],
            ]
        else:
            names = [listed]
    unknown = [name for name in listed if name not in decayed]
    if unknown or len(names) != count:
        what = f"of {unknown[0]}" if unknown else f"in {count} parameter groups"
        raise CheckpointError(
            f"{rank.where}: an optimizer state {what}; GPT-NeoX has a group of decayed and one of "
            "other parameters of the model, or one of all where nothing is decayed"
        )
    return names


def _check_sizes(where: str, pieces: Mapping[str, Pieces], size: int) -> None:
    for kind, run in pieces.items():
        # What is beyond the parameters is padding, which elastic checkpoints leave out.
        if run.size < size or run.read(size, run.size).any():
            raise CheckpointError(
                f"{where}: a group has {run.size} numbers of {kind}, its parameters {size}: ranks' "
                "files are missing, or it is of another model"
            )


def _zero(
    found: NeoxFolder, files: dict[tuple[int, ...], Path]
) -> tuple[list[_Rank], dict[str, Any]]:
    """ZeRO stage 1, elastic or not, and what later DeepSpeed writes for stages 1 and 2."""
    data = 1 + max(dp for dp, _ in files)
    count = 1 + max(mp for _, mp in files)
    absent = [(d, m) for d in range(data) for m in range(count) if (d, m) not in files]
    if absent:
        name = f"zero_pp_rank_{absent[0][0]}_mp_rank_{absent[0][1]:02d}_optim_states.pt"
        raise CheckpointError(f"{found.path}: {len(absent)} files are missing, of them {name}")
    ranks, about = [], {}
    for model in range(count):
        paths = [files[d, model] for d in range(data)]
        trees = [open_client(path) for path in paths]
        states = [tree.get("optimizer_state_dict") for tree in trees]
        locals_ = [_zero_rank(path, state) for path, state in zip(paths, states, strict=True)]
        said = [state.get("partition_count", data) for state in states]  # type: ignore[union-attr]
        if not all(n == data or (isinstance(n, list) and set(n) == {data}) for n in said):
            raise CheckpointError(
                f"{found.path}: written by {said[0]} data-parallel ranks, and {data} have a file"
            )
        groups: list[Mapping[str, Pieces]] = []
        if len({len(part) for part in locals_}) > 1:
            raise CheckpointError(
                f"{found.path}: data-parallel ranks differ in their number of parameter groups"
            )
        for parts in zip(*locals_, strict=True):
            groups.append(
                {
                    kind: Pieces(
                        [
                            t
                            for interval in zip(*(p[kind] for p in parts), strict=True)
                            for t in interval
                        ]
                    )
                    for kind in KINDS
                }
            )
        shapes = trees[0].get("param_shapes")
        if shapes is None and count != found.model_parallel:
            raise CheckpointError(
                f"{paths[0]}: has no param_shapes, without which the stages of a pipeline in "
                f"{count // found.model_parallel} parts cannot be told apart"
            )
        ranks.append(_Rank(str(paths[0]), groups, shapes))
        about = about or _said_of(paths[0], states[0])
    return ranks, about


def _zero_rank(path: Path, state: Any) -> list[dict[str, list[TorchTensor]]]:
    """Of each group the rank's pieces, one an interval of communication."""
    stage = state.get("zero_stage", 1) if isinstance(state, dict) else None
    if stage not in (1, 2):
        raise CheckpointError(f"{path}: ZeRO stage {stage} is not read here; stages 0 and 1 are")
    masters = state.get("local_sub_partitions_of_fp32_groups")
    if masters is None:
        masters = state.get("single_partition_of_fp32_groups")
    base = state.get("base_optimizer_state")
    if not isinstance(masters, list) or not isinstance(base, list | dict):
        raise CheckpointError(
            f"{path}: an optimizer state of a form that is not known (its keys: "
            f"{', '.join(sorted(map(str, state)))})"
        )
    found = []
    for group, master in enumerate(masters):
        fp32 = _tensors(path, [master] if isinstance(master, TorchTensor) else master)
        moments = _moments(path, base, group)
        if len(moments) != len(fp32):
            raise CheckpointError(
                f"{path}: group {group} has {len(fp32)} pieces of weights and "
                f"{len(moments)} of moments"
            )
        pieces = {"fp32": fp32}
        for kind in KINDS[1:]:
            pieces[kind] = _tensors(path, [m.get(kind) for m in moments])
        found.append(pieces)
    return found


def _moments(path: Path, base: Any, group: int) -> list[dict[Any, Any]]:
    """What Adam keeps of each tensor of a group, from a bare list or a torch optimizer's state."""
    try:
        if isinstance(base, list):
            found = base[group]
        else:
            state = base["state"]
            found = [state[i] for i in base["param_groups"][group]["params"]]
    except (KeyError, IndexError, TypeError):
        raise CheckpointError(f"{path}: no Adam state of parameter group {group}") from None
    found = [found] if isinstance(found, dict) else found
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise CheckpointError(f"{path}: no Adam state of parameter group {group}")
    return found


def _tensors(path: Path, values: Any) -> list[TorchTensor]:
    values = list(values) if isinstance(values, list | tuple) else [values]
    for value in values:
        if not isinstance(value, TorchTensor) or value.dtype != np.float32:
            raise CheckpointError(
                f"{path}: where float32 numbers of Adam's should be, there is "
                f"{getattr(value, 'dtype', type(value).__name__)}"
            )
    return values


def _without_zero(found: NeoxFolder) -> tuple[list[_Rank], dict[str, Any]]:
    """Stage 0: a flat tensor a group (FP16_Optimizer), a list of tensors, or torch's own state."""
    files = numbered_files(found.path, RANK_FILE)
    if len(files) != found.model_parallel:
        raise CheckpointError(
            f"{found.path}: {len(files)} files of optimizer states for {found.model_parallel} "
            "model-parallel ranks; pipelines in several stages are read with ZeRO only"
        )
    ranks, about = [], {}
    for number, path in enumerate(files[key] for key in sorted(files)):
        state = open_client(path).get("optimizer")
        if not isinstance(state, dict):
            raise CheckpointError(f"{path}: holds no optimizer state")
        base = state.get("optimizer_state_dict", state)
        masters = state.get("fp32_groups_flat", state.get("fp32_groups"))
        count = len(masters) if isinstance(masters, list) else None if masters is None else -1
        if (
            not isinstance(base, dict)
            or not isinstance(base.get("param_groups"), list)
            or count not in (None, len(base["param_groups"]))
        ):
            raise CheckpointError(
                f"{path}: an optimizer state of a form that is not known (its "
                f"keys: {', '.join(sorted(map(str, state)))})"
            )
        groups = []
        for group in range(len(base["param_groups"])):
            moments = _moments(path, base, group)
            pieces = {kind: _tensors(path, [m.get(kind) for m in moments]) for kind in KINDS[1:]}
            if masters is not None:
                pieces["fp32"] = _tensors(path, masters[group])
            groups.append(pieces)
        if masters is None:
            _add_weights(path, found, number, groups)
        runs = [{kind: Pieces(pieces[kind]) for kind in KINDS} for pieces in groups]
        ranks.append(_Rank(str(path), list(runs), None))
        about = about or _said_of(path, state)
    return ranks, about


def _add_weights(
    path: Path, found: NeoxFolder, rank: int, groups: list[dict[str, list[TorchTensor]]]
) -> None:
    """Without float32 copies, in a run that was float32 itself, the weights are what is trained."""
    names = list(found.tensors)
    one = {name: name.endswith("bias") or "norm" in name for name in names}
    if len(groups) > 2:
        raise CheckpointError(f"{path}: an optimizer state in {len(groups)} parameter groups")
    if len(groups) == 2:
        split = [[n for n in names if not one[n]], [n for n in names if one[n]]]
    else:
        split = [names]
    for pieces, members in zip(groups, split, strict=True):
        pieces["fp32"] = _tensors(path, [found.tensors[name][rank] for name in members])


def _said_of(path: Path, state: Any) -> dict[str, Any]:
    """Adam's counter (`step`) and the loss scaler's numbers, as far as a state tells them."""
    base = state.get("base_optimizer_state", state.get("optimizer_state_dict", state))
    items: list[Any] = []
    if isinstance(base, dict):
        items = [*base.get("param_groups", []), *base.get("state", {}).values()]
    elif isinstance(base, list):
        items = [item for group in base for item in (group if isinstance(group, list) else [group])]
    counts = set()
    for item in items:
        count = item.get("step") if isinstance(item, dict) else None
        if isinstance(count, TorchTensor) and count.size == 1:
            count = count.read().item()
        if isinstance(count, int | float):
            counts.add(int(count))
        elif count is not None:
            raise CheckpointError(f"{path}: Adam's counter is a {type(count).__name__}")
    if len(counts) > 1:
        raise CheckpointError(f"{path}: Adam's counters differ: {sorted(counts)}")
    scaler = state.get("loss_scaler")
    scaler = scaler.state if isinstance(scaler, Unknown) else state
    scaler = scaler if isinstance(scaler, dict) else {}
    names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
    return {
        "step": counts.pop() if counts else None,
        "dynamic": state.get("dynamic_loss_scale") is not False,
        **{n: scaler.get(n) for n in names},
    }
