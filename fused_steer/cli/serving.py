"""Verbs about serving adapters: serve-plan."""

from __future__ import annotations

from typing import Annotated

import typer

from .shared import USE, app, errors_in_one_line, indices, new_console

# ----------------------------------------------------------------------------------------------------------- serve-plan


@app.command("serve-plan", rich_help_panel=USE)
def serve_plan(
    model: Annotated[str, typer.Argument(help="Directory or hub id of the base model. Only its config is read.")],
    adapters: Annotated[int, typer.Option(help="Number of adapters.")],
    rank: Annotated[int, typer.Option(help="Rank of each adapter; ignored for vectors.")] = 8,
    slots: Annotated[int, typer.Option(help="Number of adapters on the device at a time.")] = 64,
    form: Annotated[str, typer.Option(help="lowrank, vector or loreft.")] = "lowrank",
    layers: Annotated[str | None, typer.Option(help="Steered layers, such as 3,9,18; all if not given.")] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the adapters: float32, bfloat16 or float16.")] = "float32",
    model_dtype: Annotated[str, typer.Option(help="Dtype of the base model's weights.")] = "bfloat16",
    batch: Annotated[int, typer.Option(help="Rows that decode at a time.")] = 64,
    memory: Annotated[
        float | None, typer.Option(help="The device's memory in GiB, to compute how many slots fit.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Plan the memory and bandwidth of serving many adapters of one model. Computed, not measured."""
    with errors_in_one_line():
        from ..serving import plan as planning

        chosen = indices(layers)
        request = planning.PlanRequest(
            model=model,
            adapters=adapters,
            rank=rank,
            slots=slots,
            form=form,
            layers=None if chosen is None else tuple(chosen),
            dtype=dtype,
            model_dtype=model_dtype,
            batch=batch,
            memory=memory,
        )
        found = planning.plan(request)
        if as_json:
            typer.echo(planning.as_json(request, found))
        else:
            planning.show(request, found, new_console())
