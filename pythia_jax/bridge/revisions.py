"""The checkpoints of a model: which there are, one of them by its step, and one loaded beside
other work."""

import dataclasses
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jax.sharding import Mesh
from jax.typing import DTypeLike

from pythia_jax import configs, sharding
from pythia_jax.bridge import hf_config, hub, load, neox_in, run_in
from pythia_jax.bridge.convert import open_any
from pythia_jax.bridge.model import Model
from pythia_jax.bridge.opened import Opened
from pythia_jax.configs import MeshConfig
from pythia_jax.data.storage import is_url
from pythia_jax.model.parameters import Parameter, Params, items
from pythia_jax.model.quantize import Quantized
from pythia_jax.training.agreement import all_say
from pythia_jax.training.bucket import AnyPath, Bucket, path_of
from pythia_jax.training.checkpoints import step_folders
from pythia_jax.training.digests import Digests, digests
from pythia_jax.training.stored import DamagedError, read_about

LEAVE_SECONDS = 60
"""How long a load that nobody wants any more may take to end."""
_RANGE = re.compile(r"(\d+):(\d+)(?::(\d+))?")
_NEOX_STEP = re.compile(r"global_step(\d+)")


@dataclass(frozen=True, eq=False)
class Source:
    """A model with many checkpoints.

    name: of the model, in results. there: the steps that it has; asks the hub, for a model there.
    remote: whether that is so. called: what provenance calls a checkpoint of it. arguments: the
    harness's `--model_args` for it. open: one, its weights not read yet. weights: their hash, where
    that is known without reading them.
    """

    name: str
    there: Callable[[], list[int]]
    remote: bool
    called: Callable[[int], str]
    arguments: Callable[[int], str]
    open: Callable[[int], Opened]
    weights: Callable[[int], str | None]


def source_of(model: str) -> Source:
    """The model: a name on the hub, a run folder (gs:// too), a folder of GPT-NeoX's checkpoints.

    Raises FileNotFoundError where there is nothing, ValueError for what has one checkpoint alone.
    """
    folder = Path(model)

    def opened(step: int) -> Opened:
        return open_any(model, step=step)

    if is_run(model):
        place = path_of(model)
        folders: dict[int, AnyPath] = step_folders(place)
        return Source(
            name=run_config(place).name,
            there=lambda: sorted(folders),
            remote=False,
            called=lambda step: _run_step(place, step),
            arguments=lambda step: arguments_of(model, step=step),
            open=opened,
            weights=lambda step: _stored_weights(folders[step]),
        )
    if folder.is_dir():
        steps = _neox_steps(folder)
        if not steps:
            open_any(model)  # raises what is to be said of a folder that holds nothing
            raise ValueError(
                f"{model}: holds one checkpoint, and many are gone through here: give a run "
                "folder, a folder of GPT-NeoX's global_stepN folders, or a model on the hub"
            )
        return Source(
            name=folder.resolve().name,
            there=lambda: steps,
            remote=False,
            called=lambda step: str(folder.resolve() / f"global_step{step}"),
            arguments=lambda step: arguments_of(model, step=step),
            open=opened,
            weights=lambda _: None,
        )
    if folder.exists() or not hub.is_hub_name(folder.as_posix()):
        open_any(model)
    repo = hub.hub_id(folder.as_posix())
    return Source(
        name=_short(repo),
        there=lambda: hub.revisions(repo),
        remote=True,
        called=lambda step: f"{repo} step{step}",
        arguments=lambda step: arguments_of(model, step=step),
        open=opened,
        weights=lambda _: None,
    )


def is_run(model: str | os.PathLike[str]) -> bool:
    """Whether `open_any` takes this for a run folder: a bucket's address always is one."""
    folder = Path(model)
    return is_url(model) or (run_in.is_run_folder(folder) and not hf_config.is_hf_folder(folder))


def is_told_its_step(model: str | os.PathLike[str]) -> bool:
    """Whether this is a Hugging Face folder: of one checkpoint, and it does not tell of which."""
    return not is_url(model) and hf_config.is_hf_folder(Path(model))


def open_at(
    model: str | os.PathLike[str], *, revision: str | None = None, step: int | None = None
) -> Opened:
    """`bridge.open_any`; `step` of a Hugging Face folder is the one that it is said to be of.

    Raises as `bridge.open_any` does.
    """
    if is_told_its_step(model):
        opened = open_any(model, revision=revision)
        return dataclasses.replace(opened, step=opened.step if step is None else step)
    return open_any(model, revision=revision, step=step)


def load_at(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    step: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Model:
    """`bridge.load`; `step` of a Hugging Face folder is the one that it is said to be of.

    On the mesh around us, if there is one. Raises as `bridge.load` does.
    """
    if is_told_its_step(model):
        loaded = load(model, revision=revision, dtype=dtype)
        return dataclasses.replace(loaded, step=loaded.step if step is None else step)
    return load(model, revision=revision, step=step, dtype=dtype)


def name_of(model: str) -> str:
    """What results call a model that `open_any` opens: the name on the hub, of the run, or of the
    folder."""
    folder = Path(model)
    if is_run(model):
        return run_config(path_of(model)).name
    if folder.is_dir():
        folder = folder.resolve()
        return folder.parent.name if _NEOX_STEP.fullmatch(folder.name) else folder.name
    return _short(hub.hub_id(folder.as_posix()))


def at_step(source: str, step: int | str | None) -> str:
    """A checkpoint as `Model.source` names it, and its step, in which most of these end already."""
    named = step is None or re.search(rf"step ?{step}$", source)
    return source if named else f"{source} step {step}"


def arguments_of(model: str, *, revision: str | None = None, step: int | None = None) -> str:
    """The harness's `--model_args` that mean a checkpoint: `pretrained=...,step=3000`.

    revision, step: as for `bridge.load`. One on the hub is of a revision, as `hf` takes it.
    """
    folder = Path(model)
    if not is_url(model) and not folder.exists():
        at = f"step{step}" if revision is None and step is not None else revision
        return f"pretrained={hub.hub_id(folder.as_posix())}" + (f",revision={at}" if at else "")
    where = model if is_url(model) else str(folder.resolve())
    at = None if is_told_its_step(model) else step
    return f"pretrained={where}" + ("" if at is None else f",step={at}")


def chosen(revisions: str | Iterable[int], source: Source) -> list[int]:
    """The steps that are asked for, in order.

    revisions: steps, or as text `steps` (all there are), or a list of steps and ranges: `0,1,2`,
    `1000:143000:10000` (half-open, every one of them), `0:1000` (those that there are in it).

    Raises ValueError for other text and where nothing is chosen, FileNotFoundError for steps that
    a folder does not hold. What the hub does not have is found out when it is fetched.
    """
    named: set[int] = set()
    found: set[int] = set()
    if not isinstance(revisions, str):
        named.update(int(step) for step in revisions)
    elif revisions == "steps":
        found.update(source.there())
    else:
        for part in revisions.split(","):
            match = _RANGE.fullmatch(part.strip())
            if match is None and not part.strip().isdecimal():
                raise ValueError(
                    f"revisions: {part!r} of {revisions!r} is no step; wanted is steps (all there "
                    "are), or steps and half-open ranges: 0,1,2,1000:143000:10000"
                )
            if match is None:
                named.add(int(part))
            elif match[3] is None:
                found.update(s for s in source.there() if int(match[1]) <= s < int(match[2]))
            elif int(match[3]) == 0:
                raise ValueError(f"revisions: {part!r}: a range cannot go on by 0 steps")
            else:
                named.update(range(int(match[1]), int(match[2]), int(match[3])))
    if not source.remote:
        there = source.there()
        missing = sorted(named.difference(there))
        if missing:
            raise FileNotFoundError(
                f"{source.name}: no checkpoint of step {', '.join(map(str, missing))}; there are "
                f"{', '.join(map(str, there)) or 'none'}"
            )
    if not named | found:
        raise ValueError(f"{source.name}: no checkpoint at {revisions!r}")
    return sorted(named | found)


@contextmanager
def on_all_devices() -> Iterator[Mesh]:
    """The mesh around us, else one of all devices, for as long as the block lasts."""
    around = jax.sharding.get_mesh()
    if not around.empty:
        yield around
        return
    mesh = sharding.make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        yield mesh


def weights_hash(params: Params) -> str:
    """A hash of parameters, the same on any mesh, and for what a run folder keeps of them.

    Whether int8 weights are multiplied with int8 activations is part of it.
    """
    activations = {
        f"{parameter.path}/activations": "int8"
        for parameter, value in items(params)
        if isinstance(value, Quantized) and value.dynamic
    }
    return _hash({**digests({"params": params}), **activations})


def known_tokens_per_step(facts: Mapping[str, Any]) -> int | None:
    """By what is known of a model's training; None of one that we did not train."""
    batch, length = facts.get("training.batch_size"), facts.get("data.sequence_length")
    return None if batch is None or length is None else batch * length


class Loading:
    """A checkpoint on its way to the devices of a mesh, on a thread beside the caller.

    Of several processes each loads it when its result is asked for: what they hand to their devices
    must come in one order everywhere.
    """

    def __init__(self, source: Source, step: int, mesh: Mesh) -> None:
        self._source, self._step, self._mesh = source, step, mesh
        self._lock = threading.Lock()
        self._unwanted = self._on_devices = False
        self._model: Model | None = None
        self._error: BaseException | None = None
        # A daemon: who stops early must not wait for a download that nobody wants any more.
        self._thread = threading.Thread(target=self._run, name=f"load step {step}", daemon=True)
        self._beside = jax.process_count() == 1
        if self._beside:
            self._thread.start()

    def result(self) -> Model:
        """The model, which is the caller's alone from then on. Raises what loading it raised, and
        OSError where another process could not load it."""
        if self._beside:
            self._thread.join()
        else:
            self._run()
        if not all_say(self._error is None) and self._error is None:
            self._model = None
            self._error = OSError(f"step {self._step}: another process could not load it")
        if self._error is not None:
            raise self._error
        model, self._model = self._model, None
        assert model is not None
        return model

    def abandon(self) -> None:
        """Stop soon. A thread that is in JAX's runtime as Python ends would abort the process."""
        with self._lock:
            self._unwanted = True
            # What reads files here is done soon; a download may take its time, and is left behind.
            waited_for = self._on_devices or not self._source.remote
        if waited_for and self._beside:
            self._thread.join(LEAVE_SECONDS)
        self._model = None

    def _run(self) -> None:
        try:
            opened = self._source.open(self._step)
            with self._lock:
                if self._unwanted:
                    return
                self._on_devices = True

            def read(parameter: Parameter, layer: int) -> np.ndarray:
                if self._unwanted:
                    raise InterruptedError(f"step {self._step}: not wanted any more")
                return opened.read(parameter, layer)

            with jax.set_mesh(self._mesh):
                model = dataclasses.replace(opened, read=read).model()
            # Those of a revision of the suite are of its branch, as they are asked for here.
            self._model = dataclasses.replace(model, step=self._step)
        except BaseException as error:
            self._error = error


def _run_step(place: AnyPath, step: int) -> str:
    return f"{place.resolve() if isinstance(place, Path) else place} step {step}"


def run_config(place: AnyPath) -> configs.RunConfig:
    """What a run was asked for, by the config.yaml of its folder.

    Raises OSError where there is none, ConfigError for one that is damaged.
    """
    if isinstance(place, Path):
        return configs.load(place / "config.yaml")
    content, _ = Bucket(str(place)).read("config.yaml")
    if content is None:
        raise FileNotFoundError(f"{place}: there is no run folder (no config.yaml)")
    return configs.overridden(yaml.safe_load(content), {}, f"{place}/config.yaml")


def _short(repo: str) -> str:
    """The name that results are published under: pythia-70m of EleutherAI/pythia-70m."""
    return repo.partition("/")[2]


def _neox_steps(folder: Path) -> list[int]:
    found = ((_NEOX_STEP.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(int(name[1]) for name, path in found if name and neox_in.is_neox_folder(path))


def _stored_weights(folder: AnyPath) -> str | None:
    """The hash of the weights of a step of a run folder, by what is written beside them."""
    try:
        about: dict[str, Any] = read_about(folder)
    except DamagedError:
        return None  # told when it is loaded
    if run_in.CONVERTED in about:
        return None  # these may be stored in another dtype than they are loaded in
    saved = about.get("digests", {})
    return _hash({name: saved[name] for name in saved if name.startswith("params/")})


def _hash(found: Digests) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
