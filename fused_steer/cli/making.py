"""Verbs that make an adapter: demo, fit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .shared import MAKE, app, errors_in_one_line, indices, new_console

# ----------------------------------------------------------------------------------------------------------------- demo


@app.command(rich_help_panel=MAKE)
def demo(
    model: Annotated[
        str | None,
        typer.Option(help="Directory or hub id of a causal language model; SmolLM2-135M-Instruct if not given."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for the adapter and the loss curve.")] = Path("fused-steer-demo"),
    steps: Annotated[int, typer.Option(help="Training steps.")] = 150,
    batch_size: Annotated[int, typer.Option(help="Expressions a step.")] = 8,
    lr: Annotated[float, typer.Option(help="AdamW's learning rate.")] = 2e-3,
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 8,
    activation: Annotated[str, typer.Option(help="φ: identity, silu, gelu, gelu_tanh, relu or tanh.")] = "silu",
    operators: Annotated[str, typer.Option(help="Some of MAX, MIN, MED and SM, separated by commas.")] = "MAX,MIN",
    depth: Annotated[int, typer.Option(help="Nesting depth of every expression.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the expressions and the adapter's initial values.")] = 0,
    held_out: Annotated[int, typer.Option("--eval", help="Held-out expressions to evaluate on.")] = 100,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, xpu …; auto is a GPU if there is one.")] = "auto",
    record: Annotated[Path | None, typer.Option(help="JSON file for the run's figures.")] = None,
) -> None:
    """Teach a small language model ListOps through a steering adapter, in minutes on a CPU."""
    with errors_in_one_line():
        from ..tools.demo import DemoOptions, run

        names = tuple(name.strip() for name in operators.split(","))
        sizes = (steps, batch_size, lr, rank, activation, names, depth, seed, held_out)
        run(DemoOptions(model, out, *sizes, device, record), new_console())


# ------------------------------------------------------------------------------------------------------------------ fit


@app.command(rich_help_panel=MAKE)
def fit(
    base: Annotated[str, typer.Argument(help="Directory or hub id of the base model, a causal language model.")],
    tuned: Annotated[
        str, typer.Argument(help="The same model fine-tuned, or a LoRA of it that PEFT saved, or a steering adapter.")
    ],
    prompts: Annotated[Path, typer.Option(help="A .txt, one prompt a line, or a .jsonl (see --field).")],
    rank: Annotated[int, typer.Option(help="Rank of the adapter; 0 is one vector for all tokens.")] = 8,
    site: Annotated[
        str, typer.Option(help="Where in a block: post_block, post_mlp, pre_mlp or post_attention.")
    ] = "post_block",
    layers: Annotated[str | None, typer.Option(help="Steered layers, such as 3,9,18; all if not given.")] = None,
    bias: Annotated[bool, typer.Option(help="Give the adapter a bias b2.")] = True,
    ridge: Annotated[
        float, typer.Option(help="Of the regression: a share of the hidden state's mean variance.")
    ] = 1e-6,
    sequence: Annotated[
        bool,
        typer.Option(help="Fit each layer on the stream that the adapters before it give, or all on the base's own."),
    ] = True,
    held_out: Annotated[float, typer.Option(help="Share of the prompts, the last ones, to measure on only.")] = 0.1,
    out: Annotated[Path, typer.Option(help="Directory for the adapter.")] = Path("fused-steer-fit"),
    field: Annotated[
        str | None, typer.Option(help="Field of a .jsonl's lines; if not given, prompt, text or messages.")
    ] = None,
    max_prompts: Annotated[int | None, typer.Option(help="Only the first so many; all if not given.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of a prompt; what is longer is cut.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Prompts at a time.")] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, xpu …; auto is a GPU if there is one.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Turn a fine-tuned model or a LoRA into a steering adapter, in closed form: nothing is trained."""
    with errors_in_one_line():
        from ..theory.command import FitOptions, run

        run(
            FitOptions(
                base=base,
                tuned=tuned,
                prompts=prompts,
                field=field,
                rank=rank,
                site=site,
                layers=indices(layers),
                bias=bias,
                ridge=ridge,
                sequence=sequence,
                held_out=held_out,
                out=out,
                max_prompts=max_prompts,
                max_length=max_length,
                batch_size=batch_size,
                device=device,
                as_json=as_json,
            ),
            new_console(),
        )
