"""The app, its one-line errors, and the options that several verbs share.

Nothing heavy is imported before a verb runs, so that `--help` and usage errors come at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer
from rich.console import Console

PACKAGE = "fused-steer"
#: The groups of verbs in `--help`.
MAKE, USE, EXAMINE, CONVERT = "Make an adapter", "Use adapters", "Examine", "Convert"

app = typer.Typer(
    name=PACKAGE,
    help="Post-block activation steering of language models, fused into the residual add of each decoder block.",
    no_args_is_help=True,
    add_completion=False,
)


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Print an error of the library as one line on stderr, and exit with code 1."""
    try:
        yield
    except (ValueError, TypeError, KeyError, RuntimeError, OSError, ImportError) as error:
        # str() of a KeyError would put quotes around the message.
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        typer.echo(f"{PACKAGE}: {' '.join(str(message).split()) or type(error).__name__}", err=True)
        code = 1
    else:
        return
    raise typer.Exit(code)


def new_console() -> Console:
    """Return a console that prints to stdout, without coloured numbers."""
    return Console(highlight=False)


def indices(layers: str | None) -> list[int] | None:
    """Return the layers of an option such as `7,8,9`."""
    if layers is None:
        return None
    try:
        return [int(index) for index in layers.split(",")]
    except ValueError:
        raise ValueError(f"layers is {layers!r} (--layers); expected indices such as 7,8,9") from None


def numbers(given: str, option: str = "--doses") -> list[float]:
    """Return the numbers of an option such as `0,0.5,1`."""
    try:
        return [float(number) for number in given.split(",")] if given.strip() else []
    except ValueError:
        raise ValueError(f"{option} is {given!r}; expected numbers such as 0,0.5,1") from None
