"""Verbs that make an adapter: demo, fit, extract, train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .shared import MAKE, CheckBase, app, errors_in_one_line, indices, new_console, numbers

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
        str, typer.Argument(help="The same model fine-tuned, or a LoRA of it that PEFT saved, steering, or both.")
    ],
    prompts: Annotated[Path, typer.Option(help="A .txt, one prompt a line, or a .jsonl (see --field).")],
    rank: Annotated[
        int | None, typer.Option(help="Rank of the adapter; 0 is one vector for all tokens. 8 if not given.")
    ] = None,
    error: Annotated[
        float | None,
        typer.Option(
            help="In place of --rank: take the first of 1, 2, 4 … at which no layer misses more than this share."
        ),
    ] = None,
    activation: Annotated[
        str, typer.Option(help="φ of the adapter: identity, silu, gelu, gelu_tanh, relu or tanh.")
    ] = "identity",
    site: Annotated[
        str, typer.Option(help="Where in a block: post_block, post_mlp, pre_mlp or post_attention.")
    ] = "post_block",
    layers: Annotated[str | None, typer.Option(help="Steered layers, such as 3,9,18; all if not given.")] = None,
    bias: Annotated[bool, typer.Option(help="Give the adapter a bias b2, and b1 where φ is not the identity.")] = True,
    ridge: Annotated[
        float, typer.Option(help="Ridge of the regression, as a share of the hidden state's mean variance.")
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
    check_base: CheckBase = True,
) -> None:
    """Turn a fine-tuned model or a LoRA into a steering adapter, without training: by its hidden states."""
    with errors_in_one_line():
        from ..theory.command import FitOptions, run

        run(
            FitOptions(
                base=base,
                tuned=tuned,
                prompts=prompts,
                field=field,
                rank=rank,
                error=error,
                activation=activation,
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
                check_base=check_base,
            ),
            new_console(),
        )


# ------------------------------------------------------------------------------------------------------------ extract


@app.command(rich_help_panel=MAKE)
def extract(
    pairs: Annotated[
        Path | None,
        typer.Argument(
            help='A .jsonl, a line such as {"positive": "I am glad", "negative": "I am sad"}. Each side is a text or '
            'the messages of a chat. With a field "prompt", each side is an answer to it.',
            show_default=False,
        ),
    ] = None,
    positive: Annotated[
        Path | None, typer.Option(help="In place of PAIRS: texts of one side, a .txt (one a line) or a .jsonl.")
    ] = None,
    negative: Annotated[Path | None, typer.Option(help="Texts of the other side, not necessarily as many.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Directory or hub id of a causal language model; SmolLM2-135M-Instruct if not given."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for the adapter and the picture.")] = Path("fused-steer-vector"),
    method: Annotated[
        str,
        typer.Option(
            help="mean: difference of the means. pca: first component of the pairs' differences, as repeng's pca_diff. "
            "pca-center: as repeng's pca_center."
        ),
    ] = "mean",
    token: Annotated[str, typer.Option(help="The hidden state of a text: of its last token, or the mean.")] = "last",
    layers: Annotated[
        str | None,
        typer.Option(help="Layers of the adapter, such as 10,11,12; all if not given. One or a few do best."),
    ] = None,
    normalise: Annotated[bool, typer.Option("--normalise", help="Divide each vector by its length.")] = False,
    scale: Annotated[float, typer.Option(help="The adapter's strength, which can be changed at any time.")] = 1.0,
    held_out: Annotated[
        float, typer.Option(help="Share of the texts, the last ones, to measure the separation on only.")
    ] = 0.2,
    doses: Annotated[
        str, typer.Option(help="Strengths to try, such as 0,1,2; '' for none. 0 is the base model.")
    ] = "0,0.5,1,2,4",
    each_layer: Annotated[
        bool, typer.Option("--each-layer", help="Try the strengths in one layer at a time, to choose a layer.")
    ] = False,
    texts: Annotated[
        Path | None,
        typer.Option(help="Texts for the perplexity, a .txt or .jsonl; those of both sides if not given."),
    ] = None,
    say: Annotated[
        str | None, typer.Option(help="The beginning of a text, to be continued at each strength.", show_default=False)
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens of such a continuation.")] = 20,
    max_length: Annotated[int, typer.Option(help="A text of more tokens is refused.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Texts at a time.")] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, xpu …; auto is a GPU if there is one.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make a steering vector from pairs of contrasting texts, without training, and try it at several strengths."""
    with errors_in_one_line():
        from ..vectors.command import ExtractOptions, run

        run(
            ExtractOptions(
                pairs=pairs,
                positive=positive,
                negative=negative,
                model=model,
                out=out,
                method=method,
                token=token,
                layers=indices(layers),
                normalise=normalise,
                scale=scale,
                held_out=held_out,
                doses=numbers(doses),
                each_layer=each_layer,
                texts=texts,
                say=say,
                new_tokens=new_tokens,
                max_length=max_length,
                batch_size=batch_size,
                device=device,
                as_json=as_json,
            ),
            new_console(),
        )


# -------------------------------------------------------------------------------------------------------------- train


@app.command(rich_help_panel=MAKE)
def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A recipe, a YAML file with the keys model, out, data, method and training; or the name of a recipe "
            "that comes with the package (see --list).",
            show_default=False,
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Set a key of the recipe: --set training.max_steps=20. null takes a key out. Can be repeated.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in the recipe's out.")] = (
        False
    ),
    check: Annotated[bool, typer.Option("--check", help="Only check the recipe and its data.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="List the recipes that come with the package.")] = False,
) -> None:
    """Train steering, a LoRA, or both, by a recipe. On several GPUs: accelerate launch -m fused_steer train RECIPE."""
    with errors_in_one_line():
        from ..recipes.command import list_shipped, run

        if listed:
            beside = {"RECIPE": recipe, "--set": changes, "--resume": resume, "--check": check}
            if given := [name for name, value in beside.items() if value]:
                raise ValueError(f"--list is given with {', '.join(given)}; expected it alone")
            list_shipped(new_console())
            return
        if recipe is None:
            raise ValueError("RECIPE is not given; expected a YAML file, or a name of `fused-steer train --list`")
        run(recipe, changes or [], resume, check, new_console())
