"""Helpers that run the command `fused-steer` in a test and check its refusals."""

import pytest
from typer.testing import CliRunner

from fused_steer.cli import app


@pytest.fixture(autouse=True)
def plain_output(monkeypatch):
    """Make the command print as to a pipe of 200 columns, without colours, which typer uses on CI."""
    for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def assert_refused(result, *parts):
    """Check that the command was refused: one line on stderr with all of `parts`, exit code 1, no traceback."""
    assert result.exit_code == 1, result.output
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("fused-steer: "), result.stderr
    assert "Traceback" not in result.output
    for part in parts:
        assert str(part) in result.stderr
