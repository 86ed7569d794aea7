"""Exported checkpoints to the Hugging Face hub: one, or all scheduled ones of a run.

A run goes up as EleutherAI published the suite: a branch `stepN` for each checkpoint, and the last
of them on `main`. Every branch gets its files in a single commit, whose description names a hash of
what was exported; so a push that was broken off is resumed, and complete branches are passed over.
"""

import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from jax.typing import DTypeLike
from tqdm import tqdm

from pythia_jax.bridge import hf_out, hub, run_in
from pythia_jax.bridge.opened import Opened
from pythia_jax.model.parameters import TABLE
from pythia_jax.training.bucket import AnyPath
from pythia_jax.training.checkpoints import SCHEDULED, step_folders

log = logging.getLogger(__name__)

_KEY = re.compile(r"pythia_jax export ([0-9a-f]{64})")
_WEIGHTS = [*hub.SAFETENSORS, *hub.TORCH]
"""Files on the hub that must go when others are uploaded: a stale one would be loaded instead."""
_SAMPLE = ("final_layer_norm/scale", "final_layer_norm/bias", "layers/attention/dense/kernel")
"""Parameters whose first layer tells the weights of two checkpoints apart."""


def push(folder: Path, repo: str, *, revision: str | None = None, private: bool = False) -> str:
    """Upload an exported folder in one commit; the address of where it lies then.

    repo: ORG/NAME, made if it is not there. revision: a branch, made if need be; main if None.
    private: of a repository that is made.

    Raises ValueError for a name that cannot be, FileNotFoundError for a folder without a model,
    PermissionError without a token that may write there, ConnectionError where the hub cannot be
    reached, RuntimeError without huggingface_hub.
    """
    check_name(repo)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no exported model to push (no config.json)")
    with _explained(repo):
        api = hub.client().HfApi()
        api.create_repo(repo, private=private or None, exist_ok=True)
        branch = revision or "main"
        if branch != "main":
            _make_branch(api, repo, branch)
        _upload(api, folder, repo, branch, f"Upload {branch}", "")
        return f"{api.endpoint}/{repo}/tree/{branch}"


def push_run(
    folder: AnyPath,
    repo: str,
    *,
    revisions: Literal["all"] | Sequence[int] = "all",
    private: bool = False,
    dtype: DTypeLike | None = None,
    max_shard_size: int | str | None = None,
    as_pythia: bool = False,
) -> list[str]:
    """Export and upload checkpoints of a run folder, here or on a bucket; see `push_steps`.

    revisions: the steps; `all` that are kept for good.

    Raises FileNotFoundError, before anything is uploaded, for steps that are not there.
    """
    there = step_folders(folder)
    if revisions == "all":
        steps = sorted(step for step, path in there.items() if path.parent.name == SCHEDULED)
        if not steps:
            raise FileNotFoundError(
                f"{folder}: there is no run folder with checkpoints that are kept, to push them all"
            )
    else:
        steps = sorted({int(step) for step in revisions})
        missing = [str(step) for step in steps if step not in there]
        if missing:
            raise FileNotFoundError(
                f"{folder}: no checkpoint of step {', '.join(missing)}; "
                f"there are {', '.join(map(str, sorted(there))) or 'none'}"
            )
    return push_steps(
        lambda step: run_in.open_folder(folder, step),
        steps,
        repo,
        private=private,
        dtype=dtype,
        max_shard_size=max_shard_size,
        as_pythia=as_pythia,
    )


def push_steps(
    open_step: Callable[[int], Opened],
    steps: Sequence[int],
    repo: str,
    *,
    private: bool = False,
    dtype: DTypeLike | None = None,
    max_shard_size: int | str | None = None,
    as_pythia: bool = False,
) -> list[str]:
    """Export and upload checkpoints: each to its branch `stepN`, then the last to `main`.

    open_step: the checkpoint of a step. The other arguments are those of `hf_out.save`. One
    export is on disk at a time, in a temporary folder (TMPDIR says where). A branch that holds
    the same export already is passed over, whatever else has been changed there since.

    Returns the branches that were written. Raises as `push` and `hf_out.save` do.
    """
    check_name(repo)
    if not steps:
        raise ValueError(f"{repo}: no step to push")
    how = {"dtype": dtype, "max_shard_size": max_shard_size, "as_pythia": as_pythia}
    written = []
    with _explained(repo):
        api = hub.client().HfApi()
        api.create_repo(repo, private=private or None, exist_ok=True)
        there = {branch.name for branch in api.list_repo_refs(repo).branches}
        wanted = [(f"step{step}", step) for step in sorted(steps)]
        wanted.append(("main", max(steps)))
        with tqdm(wanted, desc=f"pushing to {repo}", unit="branch") as bar:
            for branch, step in bar:
                bar.set_postfix_str(branch)
                opened = open_step(step)
                key = _key(opened, how)
                if branch in there and _key_on_hub(api, repo, branch) == key:
                    log.info("%s: %s is complete", repo, branch)
                    continue
                if branch not in there:
                    _make_branch(api, repo, branch)
                with tempfile.TemporaryDirectory(prefix="pythia_jax-push-") as place:
                    folder = Path(place) / branch
                    hf_out.save(opened, folder, **how)
                    _upload(api, folder, repo, branch, f"Step {step}", f"pythia_jax export {key}")
                written.append(branch)
    return written


def check_name(repo: str) -> None:
    """Raises ValueError for what is no ORG/NAME."""
    if not hub.NAME.fullmatch(repo):
        raise ValueError(f"{repo!r} is no name for a model on the hub; give ORG/NAME")


def _make_branch(api: Any, repo: str, branch: str) -> None:
    """From the repository's first commit, so that until the upload is complete there are no weights
    of another step under this one's name."""
    first = api.list_repo_commits(repo)[-1].commit_id
    api.create_branch(repo, branch=branch, revision=first, exist_ok=True)


def _upload(api: Any, folder: Path, repo: str, branch: str, title: str, about: str) -> None:
    api.upload_folder(
        repo_id=repo,
        folder_path=folder,
        revision=branch,
        commit_message=title,
        commit_description=about,
        delete_patterns=_WEIGHTS,
    )


def _key(opened: Opened, how: dict[str, Any]) -> str:
    """Hash of what an export is made from; of the weights, a few are read, not all."""
    digest = hashlib.sha256()
    known = {
        "config": vars(opened.config),
        "stored_dtype": opened.stored_dtype,
        "step": opened.step,
        "facts": opened.facts,
        "how": how,
    }
    digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    for name, content in sorted(opened.tokenizer_files.items()):
        digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    for parameter in TABLE:
        if parameter.path in _SAMPLE:
            value = opened.read(parameter, 0)
            digest.update(str(value.dtype).encode() + value.tobytes())
    return digest.hexdigest()


def _key_on_hub(api: Any, repo: str, branch: str) -> str | None:
    """The key of the newest export on a branch; people may have edited other files since."""
    for commit in api.list_repo_commits(repo, revision=branch):
        found = _KEY.search(f"{commit.title}\n{commit.message}")
        if found is not None:
            return found[1]
    return None


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """What the library raises, in one line that says what to do."""
    hub.client()
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise ConnectionError(f"{repo}: HF_HUB_OFFLINE is set, so nothing can be pushed") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise PermissionError(
                f"{repo}: the hub refuses ({status}): log in with `hf auth login`, or set "
                "HF_TOKEN, with a token that may write there"
            ) from None
        raise ConnectionError(
            f"{repo}: the hub answers {status} ({error}); the same again goes on from there"
        ) from None
    except errors.HTTPError as error:
        raise ConnectionError(
            f"{repo}: the upload broke off ({error or type(error).__name__}); the same again goes "
            "on from there"
        ) from None
