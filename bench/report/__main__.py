"""The command `python -m bench.report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..results import FOLDER
from .pages import ROOT, differing, render

app = typer.Typer(add_completion=False)


@app.command()
def main(
    results: Annotated[Path, typer.Option(help="Folder of results files.")] = FOLDER,
    docs: Annotated[Path, typer.Option(help="Folder for benchmarks.md and its plots.")] = ROOT / "docs",
    readme: Annotated[Path, typer.Option(help="README to update between its markers.")] = ROOT / "README.md",
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit code 1 if a file differs.")] = False,
) -> None:
    """Write tables and plots from results."""
    try:
        files = render(results, docs, readme)
        changed = differing(files)
        names = ", ".join(map(str, changed))
        if check and changed:
            raise ValueError(f"out of date: {names}; expected `python -m bench.report` to be run")
        for file in changed:
            content = files[file]
            if content is None:
                file.unlink()
            else:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"bench.report: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"written: {names}" if changed else "nothing to change")


if __name__ == "__main__":
    app()
