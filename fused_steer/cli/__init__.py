"""The command `fused-steer`: its verbs, by purpose. A verb is a list of options and one call of the library."""

from __future__ import annotations

from typing import Annotated

import typer

from .._version import __version__
from .shared import PACKAGE, app

# These add their verbs to the app, in the order of `--help`.
from . import making, playground, serving, examining, converting  # noqa: E402, F401, I001 # isort: skip

__all__ = ["app"]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{PACKAGE} {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
