"""Running the command inside a test, and what a refusal of it looks like."""

import pytest
from typer.testing import CliRunner

from fused_steer.cli import app


@pytest.fixture(autouse=True)
def plain_output(monkeypatch):
    """As in a pipe of 200 columns: typer would colour its help on CI, and the environment may ask for it."""
    for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def assert_refused(result, *parts):
    """One line on stderr, exit code 1, and nothing that looks like a traceback."""
    assert result.exit_code == 1, result.output
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("fused-steer: "), result.stderr
    assert "Traceback" not in result.output
    for part in parts:
        assert str(part) in result.stderr
