"""The verb playground."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .shared import USE, CheckBase, app, errors_in_one_line, new_console


@app.command(rich_help_panel=USE)
def playground(
    model: Annotated[
        str | None,
        typer.Argument(help="Directory or hub id of a causal language model; SmolLM2-135M-Instruct if not given."),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="A saved adapter, as DIR or NAME=DIR, or its hub id. Give the option once for each adapter."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for the adapters that the page exports.")] = Path(
        "fused-steer-playground"
    ),
    host: Annotated[str, typer.Option(help="Address to serve at. 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to serve at.")] = 7860,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, xpu …; auto is a GPU if there is one.")] = "auto",
    check_base: CheckBase = True,
) -> None:
    """Compare adapters in the browser: a slider for each strength, and base and steered answers side by side.

    Needs Gradio, which the extra playground installs. Nothing is sent to other machines.
    """
    with errors_in_one_line():
        from ..playground.command import PlaygroundOptions, run

        run(PlaygroundOptions(model, tuple(adapter or ()), out, host, port, device, check_base), new_console())
