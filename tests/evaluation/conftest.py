"""For the tests of scores of checkpoints."""

from typing import Any

import pytest

from pythia_jax.evaluation import scored


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one for each time that weights are scored."""
    calls: list[Any] = []
    ask = scored.ask

    def counting(scorer: Any, questions: Any) -> dict[str, Any]:
        calls.append(scorer)
        return ask(scorer, questions)

    monkeypatch.setattr(scored, "ask", counting)
    return calls
