"""Verbs that use adapters: serve-plan, verify-vllm, eval, chat."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .shared import USE, CheckBase, app, echo, errors_in_one_line, indices, new_console

# ----------------------------------------------------------------------------------------------------------- serve-plan


@app.command("serve-plan", rich_help_panel=USE)
def serve_plan(
    model: Annotated[
        str | None,
        typer.Argument(help="The base model: a directory or hub id. Only its config is read. Or --hidden, --layers."),
    ] = None,
    adapters: Annotated[int, typer.Option(help="Number of adapters.")] = 1000,
    rank: Annotated[int, typer.Option(help="Rank of each adapter; ignored for vectors.")] = 8,
    slots: Annotated[int, typer.Option(help="Number of adapters on the device at a time.")] = 64,
    form: Annotated[str, typer.Option(help="lowrank, vector or loreft.")] = "lowrank",
    hidden: Annotated[int | None, typer.Option(help="d, the hidden state's size, without MODEL.")] = None,
    layers: Annotated[int | None, typer.Option(help="Number of decoder layers, without MODEL.")] = None,
    parameters: Annotated[
        float | None, typer.Option(help="The base model's parameters, such as 8.03e9, without MODEL.")
    ] = None,
    steered: Annotated[str | None, typer.Option(help="Steered layers, such as 3,9,18; all if not given.")] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the adapters: float32, bfloat16 or float16.")] = "float32",
    model_dtype: Annotated[str, typer.Option(help="Dtype of the base model's weights.")] = "bfloat16",
    batch: Annotated[int, typer.Option(help="Rows that decode at a time.")] = 64,
    memory: Annotated[
        float | None, typer.Option(help="The device's memory in GiB, to compute how many slots fit.")
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(help="The device's memory bandwidth in GB/s, to compute the time of reading adapters."),
    ] = None,
    network: Annotated[
        float | None, typer.Option(help="Gbit/s to the store of the adapters, to compute the time of loading one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Plan the memory and bandwidth of serving many adapters of one model. Computed, not measured."""
    with errors_in_one_line():
        from ..serving import plan as planning

        chosen = indices(steered)
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
            hidden=hidden,
            num_layers=layers,
            parameters=parameters,
            bandwidth=bandwidth,
            network=network,
        )
        found = planning.plan(request)
        if as_json:
            echo(planning.as_json(request, found))
        else:
            planning.show(request, found, new_console())


# -------------------------------------------------------------------------------------------------------- verify-vllm


@app.command("verify-vllm", rich_help_panel=USE)
def verify_vllm(
    model: Annotated[str, typer.Option(help="Directory or hub id of a causal language model.", show_default=False)],
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    rows: Annotated[int, typer.Option(help="Requests of a batch.")] = 8,
    adapters: Annotated[int, typer.Option(help="Different adapters of a batch.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 48,
    new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 32,
    rounds: Annotated[int, typer.Option(help="Samples of each time.")] = 7,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 8,
    memory: Annotated[float, typer.Option(help="Share of the GPU's memory for all engines together.")] = 0.85,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check steering in vLLM on this machine and measure its cost over plain vLLM. Exit code 1 if a check fails."""
    with errors_in_one_line():
        from ..tools.verify_vllm import VerifyOptions, run

        options = VerifyOptions(model, dtype, rows, adapters, length, new_tokens, rounds, rank, memory)
        well = run(options, new_console(), as_json)
    if not well:
        raise typer.Exit(1)


# --------------------------------------------------------------------------------------------------------------- eval


@app.command("eval", rich_help_panel=USE)
def evaluate(
    tasks: Annotated[
        list[str],
        typer.Argument(
            help="Tasks of lm-evaluation-harness: names, or YAML files, which may name local data. paper:boolq, "
            "paper:winogrande, paper:listops, paper:gsm8k, paper:arc, paper:aqua: the paper's tasks; paper: all six."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Directory or hub id of a causal language model; SmolLM2-135M-Instruct if not given."),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="A saved adapter, as PATH or NAME=PATH: steering, a LoRA of PEFT, or both (save_joint). Can be "
            "repeated, to compare several."
        ),
    ] = None,
    base: Annotated[bool, typer.Option(help="Evaluate the base model too, and compare the adapters with it.")] = True,
    limit: Annotated[int | None, typer.Option(help="Only the first so many documents of each task.")] = None,
    shots: Annotated[int | None, typer.Option(help="Examples before each document; the task's own if not given.")] = (
        None
    ),
    batch_size: Annotated[int, typer.Option(help="Documents at a time.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the scores.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, xpu …; auto is a GPU if there is one.")] = "auto",
    data: Annotated[
        Path | None,
        typer.Option(help="A folder with TASK/test.jsonl of the paper's tasks; the hub's rows if not given."),
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat", help="Put prompts of the paper's tasks into the chat template.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    check_base: CheckBase = True,
) -> None:
    """Evaluate a model and adapters of it, and compare them with intervals.

    Tasks are those of lm-evaluation-harness, and the paper's six. The paper's tasks are answered by greedy generation.
    """
    with errors_in_one_line():
        from ..evaluation.command import EvalOptions, run

        run(
            EvalOptions(
                model=model,
                adapters=adapter or [],
                tasks=tasks,
                base=base,
                limit=limit,
                shots=shots,
                batch_size=batch_size,
                seed=seed,
                out=out,
                device=device,
                as_json=as_json,
                data=data,
                chat=chat_template,
                check_base=check_base,
            ),
            new_console(),
        )


# --------------------------------------------------------------------------------------------------------------- chat


@app.command(rich_help_panel=USE)
def chat(
    adapters: Annotated[
        list[str], typer.Argument(help="Saved adapters, each as PATH or NAME=PATH. The first one steers at first.")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Directory or hub id of a causal language model; SmolLM2-135M-Instruct if not given."),
    ] = None,
    scale: Annotated[float | None, typer.Option(help="The strength; the adapter's own if not given.")] = None,
    both: Annotated[
        bool, typer.Option("--both", help="Answer by the base model too, side by side, from one batch.")
    ] = False,
    new_tokens: Annotated[int, typer.Option(help="The most tokens of an answer.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, xpu …; auto is a GPU if there is one.")] = "auto",
    check_base: CheckBase = True,
) -> None:
    """Chat with a steered model in the terminal. Commands such as /scale 2 and /off change the steering: see /help.

    If stdin is no terminal, its lines are answered one after the other.
    """
    with errors_in_one_line():
        from ..config import checked_number
        from ..tools.chat_terminal import run, start

        if new_tokens < 1:
            raise ValueError(f"new tokens is {new_tokens}; expected at least 1")
        if scale is not None:
            checked_number("scale", scale)
        if checked_number("temperature", temperature) < 0:
            raise ValueError(f"temperature is {temperature}; expected 0 or more")
        options = {"scale": scale, "both": both, "new_tokens": new_tokens, "temperature": temperature}
        run(lambda: start(model, adapters, device, check_base, **options), new_console())
