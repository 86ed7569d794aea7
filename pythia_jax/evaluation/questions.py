"""Tasks with their questions: read once, and asked of as many models as there are."""

import hashlib
import inspect
import json
import random
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pythia_jax.evaluation import tasks

if TYPE_CHECKING:
    from lm_eval.api.task import Task

RANDOM, OTHERS = 0, 1234
"""The seeds of the harness's own command: Python's, and NumPy's and that of examples."""
_PLACES = ("dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset", "metadata")
"""Of a task's settings, those that say where its rows and its file are, and its version; the rows
themselves are hashed, and versions are compared as they are."""
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class Questions:
    """Tasks of the harness, their rows at hand."""

    def __init__(
        self,
        names: Iterable[str],
        *,
        num_fewshot: int | None = None,
        limit: int | float | None = None,
        include_path: str | Path | None = None,
    ) -> None:
        """
        names: of tasks and groups, and the preset `pythia`. num_fewshot: examples before each
            question, of tasks that do not say 0 themselves; None is what each task says. limit:
            questions of each task, or below 1 a share of them. include_path: more task files.

        Raises as `tasks.check` does, and as the harness does for rows that it cannot get.
        """
        self.names = tasks.expand(names)
        self.limit = limit
        manager = tasks.manager(self.names, include_path)
        with _random_state():
            # What the harness's tasks may draw from as they are read.
            random.seed(RANDOM)
            np.random.seed(OTHERS)
            self._loaded = manager.load(self.names)
            self._state = random.getstate(), np.random.get_state()
        for task in self.tasks.values():
            given = task.get_config("num_fewshot")
            if num_fewshot is None and given is None:
                task.set_config("num_fewshot", 0)
            elif num_fewshot is not None and given != 0:
                task.set_config("num_fewshot", num_fewshot)

    @property
    def tasks(self) -> "dict[str, Task]":
        """The tasks, those of groups too, by name."""
        return self._loaded["tasks"]

    @contextmanager
    def as_new(self) -> Iterator[Any]:
        """What `lm_eval.evaluate` takes: random numbers fall as if the tasks were just read."""
        for task in self.tasks.values():
            task.set_fewshot_seed(OTHERS)
        with _random_state():
            random.setstate(self._state[0])
            np.random.set_state(self._state[1])
            yield self._loaded

    @property
    def versions(self) -> dict[str, Any]:
        """What each task says its version is."""
        return {name: task.VERSION for name, task in self.tasks.items()}

    @cached_property
    def hashes(self) -> dict[str, dict[str, str]]:
        """By which a task is known again: `settings`, all that its file says, with the source of
        its functions, and `rows`, those asked and those that examples are taken from.

        Where the rows lie is no part of it; nor is what a function of the task calls.
        """
        return {name: self._hash(task) for name, task in self.tasks.items()}

    def _hash(self, task: "Task") -> dict[str, str]:
        settings = {key: x for key, x in task.dump_config().items() if key not in _PLACES}
        rows = hashlib.sha256()
        # A share of the questions is of them all.
        asked = self.limit if isinstance(self.limit, int) else None
        for row in islice(task.eval_docs, asked):
            rows.update(_text(row))
        if task.get_config("num_fewshot"):
            rows.update(b"examples")
            for row in task.fewshot_docs():
                rows.update(_text(row))
        digest = hashlib.sha256(_text(settings))
        return {"settings": digest.hexdigest()[:16], "rows": rows.hexdigest()[:16]}


def _text(value: Any) -> bytes:
    found = json.dumps(value, sort_keys=True, default=_written)
    return _ADDRESS.sub("", found).encode()


def _written(value: Any) -> str:
    """A function by its source, whatever else JSON has no form for as it shows itself."""
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):
        return repr(value)


@contextmanager
def _random_state() -> Iterator[None]:
    """The caller's random numbers go on afterwards as if there had been nothing between."""
    before, numpys = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpys)
