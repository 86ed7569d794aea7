"""For the tests of commands: run one as its user types it."""

from click.testing import CliRunner, Result

from pythia_jax.cli import main


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def refused(*arguments: object) -> str:
    """The message of a command that must fail, and without a traceback."""
    result = run(*arguments)
    assert result.exit_code in (1, 2), result.output
    assert "Traceback" not in result.output, result.output
    return result.output
