"""The app, its one-line errors, and the options that several verbs share.

Nothing heavy is imported before a verb runs, so that `--help` and usage errors come at once.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

PACKAGE = "fused-steer"
CheckBase = Annotated[
    bool,
    typer.Option("--check-base/--no-check-base", help="Refuse an adapter that was made for a model of another name."),
]
#: The groups of verbs in `--help`.
MAKE, USE, EXAMINE, CONVERT = "Make an adapter", "Use adapters", "Examine", "Convert"

#: Parameters that may be given as ''.
_MAY_BE_EMPTY = ("doses",)
#: Columns of output that goes to a pipe, so that no table cuts a value.
_PIPE_WIDTH = 10_000


class _Command(TyperCommand):
    """A command that refuses empty options and arguments."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for parameter in self.params:
            if parameter.default != "" and parameter.name not in _MAY_BE_EMPTY:
                parameter.process_value = partial(_not_empty, parameter.opts[0], parameter.process_value)  # type: ignore


def _not_empty(name: str, process: Callable[[Any, Any], Any], ctx: Any, value: Any) -> Any:
    """Return the processed value. An empty one is refused: as a path it would mean the current directory."""
    with errors_in_one_line():
        if "" in (value if isinstance(value, (list, tuple)) else [value]):
            raise ValueError(f"{name} is ''; expected a value that is not empty")
    found = process(ctx, value)
    # From here on Path('.') would be taken for Path('').
    return Path.cwd() if isinstance(found, Path) and found == Path() else found


class App(typer.Typer):
    """Commands that refuse empty values and can print to a stdout of any encoding."""

    def command(self, *args: Any, **options: Any) -> Callable[[Any], Any]:
        return super().command(*args, cls=_Command, **options)

    def __call__(self, *args: Any, **options: Any) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        return super().__call__(*args, **options)


app = App(
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
    """Return a console that prints to stdout, without coloured numbers. Lines for a pipe are as long as they need."""
    console = Console(highlight=False)
    if not console.is_terminal and not os.environ.get("COLUMNS"):
        console.width = _PIPE_WIDTH
    return console


def echo(text: str) -> None:
    """Print text as it is. If the reader of a pipe is gone, end without a word, as a console's tables do."""
    new_console().out(text, highlight=False)


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
