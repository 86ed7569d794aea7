"""For the tests of commands: run one as its user types it."""

import logging

from click.testing import CliRunner, Result

from pythia_jax.cli import main


def run(*arguments: object) -> Result:
    before = {logger: list(logger.handlers) for logger in _loggers()}
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    # A handler that a command set up writes to this call's output, which is closed after it.
    for logger in _loggers():
        logger.handlers[:] = [h for h in logger.handlers if h in before.get(logger, [])]
    return result


def _loggers() -> list[logging.Logger]:
    found = logging.root.manager.loggerDict.values()
    return [logging.root, *(logger for logger in found if isinstance(logger, logging.Logger))]


def refused(*arguments: object) -> str:
    """The message of a command that must fail, and without a traceback."""
    result = run(*arguments)
    assert result.exit_code in (1, 2)
    assert "Traceback" not in result.output
    return result.output
