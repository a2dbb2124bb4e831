"""Verbs that examine an adapter, a model or the machine, from doctor to bench."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .shared import EXAMINE, CheckBase, app, echo, errors_in_one_line, new_console

# --------------------------------------------------------------------------------------------------------------- doctor


@app.command(rich_help_panel=EXAMINE)
def doctor(
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the kernels, which takes a minute, and show what they use.")
    ] = False,
) -> None:
    """Check what is installed, which backend will run, and whether it computes correctly. Exit code 1 if not."""
    with errors_in_one_line():
        from ..tools.doctor import examine

        well = examine(new_console(), compiled)
    if not well:
        raise typer.Exit(1)


# -------------------------------------------------------------------------------------------------------------- inspect


@app.command(rich_help_panel=EXAMINE)
def inspect(
    adapter: Annotated[str, typer.Argument(help="A saved adapter: its directory, or its id on the hub.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a saved adapter: its config, its size, and the norms of each layer."""
    with errors_in_one_line():
        from ..tools.inspect import config_table, describe, norms_table

        description = describe(adapter)
        if as_json:
            echo(json.dumps(description, indent=2))
        else:
            new_console().print(config_table(description))
            new_console().print(norms_table(description["layers"]))


# ------------------------------------------------------------------------------------------------------------ compare


@app.command(rich_help_panel=EXAMINE)
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="A saved adapter: its directory, or its id on the hub.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another adapter, for a model of the same sizes.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how two saved adapters differ: their settings, and the sizes and angles of their shifts in each layer."""
    with errors_in_one_line():
        from ..tools.compare import compare as compare_adapters
        from ..tools.compare import differences_table, places_table

        found = compare_adapters(first, second)
        if as_json:
            echo(json.dumps(found.as_dict(), indent=2))
            return
        screen = new_console()
        if found.differences:
            screen.print(differences_table(found, f"A: {first}", f"B: {second}"))
        told = "the same adapter, bit for bit" if found.same else "the same settings"
        if found.same or not found.differences:
            screen.print(told, markup=False)
        screen.print(places_table(found))


# -------------------------------------------------------------------------------------------------------------- kernels


@app.command(rich_help_panel=EXAMINE)
def kernels(
    target: Annotated[
        list[str] | None,
        typer.Option(help="sm_80, sm_90, sm_100, gfx942; or sm_75, sm_86, sm_89. The first four if not given."),
    ] = None,
    hidden: Annotated[int, typer.Option(help="d, the hidden state's size.")] = 4096,
    rank: Annotated[int, typer.Option(help="r, 0 to 256; 0 is a vector.")] = 8,
    dtype: Annotated[str, typer.Option(help="Dtype of the hidden state: bfloat16, float16 or float32.")] = "bfloat16",
    tokens: Annotated[list[int] | None, typer.Option(help="N; 4096 and 8 if not given.")] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(help="Predict for A100, A100-40GB, H100 or H200. Default: all GPUs with one of the targets."),
    ] = None,
    norm: Annotated[bool, typer.Option("--norm", help="With the RMSNorm that follows, as with fuse_norm.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compile the kernels ahead of time, without a GPU. Show what they use, and predict what limits a pass."""
    with errors_in_one_line():
        from ..tools.kernel_table import Request, describe_kernels, print_kernels

        gpus = tuple(gpu) if gpu else None
        request = Request(hidden, rank, dtype, tuple(tokens or (4096, 8)), tuple(target or ()), gpus, norm)
        description = describe_kernels(request)
        if as_json:
            echo(json.dumps(description, indent=2))
        else:
            print_kernels(description, new_console())


# ------------------------------------------------------------------------------------------------------------- coverage


@app.command(rich_help_panel=EXAMINE)
def coverage(
    only: Annotated[str | None, typer.Option(help="Model types, separated by commas. Default: all.")] = None,
    out: Annotated[Path | None, typer.Option(help="Markdown file for the table, such as docs/coverage.md.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    jobs: Annotated[int, typer.Option(help="Processes at a time.")] = 2,
) -> None:
    """Patch and check a tiny model of each causal language model class of transformers. Exit code 1 if one is wrong."""
    with errors_in_one_line():
        from ..adapters.saving import check_writable, write_whole
        from ..tools.coverage import MODEL_TYPES, check_all, markdown, summary

        if out is not None and out.is_dir():
            raise ValueError(f"out is {out}, a directory; expected a file for the table")
        if out is not None:
            check_writable(out)
        types = MODEL_TYPES if only is None else tuple(name.strip() for name in only.split(","))
        rows = []
        for row in check_all(types, jobs):
            rows.append(row)
            if not as_json:
                for one, site in ((row, "post_block"), (row.post_mlp, "post_mlp")):
                    if one is not None:
                        why = "; ".join(filter(None, (one.reason, one.note)))
                        shown = f"{one.outcome:<8} {one.model_type:<24} {site:<10} {why}"
                        new_console().print(shown, markup=False, soft_wrap=True)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_whole(out, markdown(rows))
        echo(json.dumps([asdict(row) for row in rows], indent=2) if as_json else summary(rows))
    if any("wrong" in (row.outcome, row.post_mlp and row.post_mlp.outcome) for row in rows):
        raise typer.Exit(1)


# ------------------------------------------------------------------------------------------------------------- diagnose


@app.command(rich_help_panel=EXAMINE)
def diagnose(
    prompts: Annotated[Path, typer.Option(help="A .txt, one prompt a line, or a .jsonl (see --field).")],
    model: Annotated[
        str | None,
        typer.Argument(help="Directory or hub id of a causal language model; SmolLM2-135M-Instruct if not given."),
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="A saved steering adapter: its directory or hub id.")] = None,
    lora: Annotated[str | None, typer.Option(help="A LoRA that PEFT saved, beside --adapter.")] = None,
    joint: Annotated[str | None, typer.Option(help="A directory of save_joint or its hub id, with both.")] = None,
    field: Annotated[
        str | None, typer.Option(help="Field of a .jsonl's lines; if not given, prompt, text or messages.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for the figures and diagnostics.json.")] = Path(
        "fused-steer-diagnosis"
    ),
    max_prompts: Annotated[int | None, typer.Option(help="Use only this many prompts. Default: all.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens at which longer prompts are cut.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Prompts at a time.")] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, xpu …; auto is a GPU if there is one.")] = "auto",
    check_base: CheckBase = True,
) -> None:
    """Show what an adapter does to a model, layer by layer: its shifts, its weights, and their angle to the LoRA's."""
    with errors_in_one_line():
        from ..diagnostics import DiagnoseOptions, run

        run(
            DiagnoseOptions(
                model,
                adapter,
                lora,
                joint,
                prompts,
                field,
                out,
                max_prompts,
                max_length,
                batch_size,
                device,
                check_base,
            ),
            new_console(),
        )


# -------------------------------------------------------------------------------------------------------------- bench


@app.command(rich_help_panel=EXAMINE)
def bench(
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A quick run: the op and one small model. It is the only kind of run."),
    ] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, xpu …; auto is a GPU if there is one.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time the op and a small model on this machine against plain PyTorch. Prints a block to paste."""
    with errors_in_one_line():
        from ..tools.demo import choose_device
        from ..tools.quick_bench import measure

        found = measure(choose_device(device))
        echo(json.dumps(found.as_dict(), indent=2) if as_json else found.block())
