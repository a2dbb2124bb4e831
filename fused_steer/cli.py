"""The command `fused-steer`: demo, doctor, inspect, kernels, import, export, coverage, diagnose, fit, serve-plan,
verify-vllm.

Nothing heavy is imported before a verb runs, so that `--help` and usage errors come at once. It is one file because a
verb here is a list of options and one call.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ._version import __version__

if TYPE_CHECKING:
    from .adapters.files import AdapterFile

PACKAGE = "fused-steer"

app = typer.Typer(
    name=PACKAGE,
    help="Post-block activation steering of language models, fused into the residual add of each decoder block.",
    no_args_is_help=True,
    add_completion=False,
)


@contextlib.contextmanager
def _errors_in_one_line() -> Iterator[None]:
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


def _console() -> Console:
    return Console(highlight=False)


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


# --------------------------------------------------------------------------------------------------------------- demo


@app.command()
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
    with _errors_in_one_line():
        from .tools.demo import DemoOptions, run

        names = tuple(name.strip() for name in operators.split(","))
        sizes = (steps, batch_size, lr, rank, activation, names, depth, seed, held_out)
        run(DemoOptions(model, out, *sizes, device, record), _console())


# ------------------------------------------------------------------------------------------------------------- doctor


@app.command()
def doctor(
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the kernels, which takes a minute, and show what they use.")
    ] = False,
) -> None:
    """Check what is installed, which backend will run, and whether it computes correctly. Exit code 1 if not."""
    with _errors_in_one_line():
        from .tools.doctor import examine

        well = examine(_console(), compiled)
    if not well:
        raise typer.Exit(1)


# ------------------------------------------------------------------------------------------------------------ inspect


@app.command()
def inspect(
    adapter: Annotated[str, typer.Argument(help="A saved adapter: its directory, or its id on the hub.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a saved adapter: its config, its size, and the norms of each layer."""
    with _errors_in_one_line():
        from .tools.inspect import config_table, describe, norms_table

        description = describe(adapter)
        if as_json:
            typer.echo(json.dumps(description, indent=2))
        else:
            _console().print(config_table(description))
            _console().print(norms_table(description["layers"]))


# ------------------------------------------------------------------------------------------------------------ kernels


@app.command()
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
    packed: Annotated[
        bool, typer.Option(help="Weights packed once a pass, as in a patched model; else in fp32, as in a single call.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compile the kernels ahead of time, without a GPU. Show what they use, and predict what limits a pass."""
    with _errors_in_one_line():
        from .tools.kernel_table import Request, describe_kernels, print_kernels

        gpus = tuple(gpu) if gpu else None
        request = Request(hidden, rank, dtype, tuple(tokens or (4096, 8)), tuple(target or ()), gpus, packed)
        description = describe_kernels(request)
        if as_json:
            typer.echo(json.dumps(description, indent=2))
        else:
            print_kernels(description, _console())


# ------------------------------------------------------------------------------------------------------------- import

import_app = typer.Typer(help="Import adapters of other libraries into fused-steer's format.", no_args_is_help=True)
app.add_typer(import_app, name="import")

_Out = Annotated[Path, typer.Option("--out", help="Directory for the adapter.", show_default=False)]
_BaseModel = Annotated[
    str,
    typer.Option(
        "--base-model",
        help="The base model's name, which the adapter records. Unless both --num-layers and --layers-path are given, "
        "it must be a directory or hub id. Only its config is read.",
        show_default=False,
    ),
]
_NumLayers = Annotated[
    int | None, typer.Option("--num-layers", help="Decoder layers of the base model, steered or not.")
]
_LayersPath = Annotated[
    str | None,
    typer.Option("--layers-path", help="Path of the decoder layers: model.layers in Llama, transformer.h in GPT-2."),
]


def _write_imported(file: Path, adapter: AdapterFile, out: Path, tokens: str, **more: str) -> Console:
    """Write the adapter and print its settings. Return the console."""
    from .adapters.files import write_adapter

    write_adapter(out, adapter)
    config, layout, steered = adapter.config, adapter.layout, adapter.config.layers
    layers = f"all {layout.num_layers}" if steered is None else f"{', '.join(map(str, steered))} of {layout.num_layers}"
    table = Table("setting", "value")
    for name, value in {
        "file": file,
        "form": config.form,
        "rank": config.rank,
        "activation": config.activation,
        "scale": config.scale,
        "hidden_size": layout.hidden,
        "layers": layers,
        **({} if config.site == "post_block" else {"site": ", ".join(config.sites)}),
        "tokens": tokens,
        "dtype": config.dtype,
        "base_model": layout.base or None,
        **more,
        "written to": out,
    }.items():
        table.add_row(name, Text(str(value)))
    console = _console()
    console.print(table)
    return console


def _print_usage(console: Console, out: Path) -> None:
    usage = f"from fused_steer import patch_model\nmodel = patch_model(model, {str(out)!r})"
    console.print(usage, markup=False, soft_wrap=True)


@import_app.command()
def steerling(
    file: Annotated[
        Path, typer.Argument(help="adapter_steerer.pt, pytorch_model.bin or model.safetensors.", show_default=False)
    ],
    out: _Out,
    scale: Annotated[
        float | None,
        typer.Option(help="The released code's alpha, or 1 for vectors. Required: the file does not record it."),
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option(
            help="φ: identity (the released code's --linear), silu, gelu, gelu_tanh, relu or tanh. Required for a "
            "low-rank adapter, whose file does not record it; vectors have none."
        ),
    ] = None,
    positions: Annotated[
        str,
        typer.Option(help="last_prompt+generated for what was trained with --intervene-last: the file does not say."),
    ] = "all",
    base_model: _BaseModel = "",
    num_layers: _NumLayers = None,
    layers_path: _LayersPath = None,
) -> None:
    """Import an adapter of the paper's released code (github.com/SprocketLab/steerling): low-rank adapters or vectors.

    Pickles are opened with torch.load(weights_only=True), which executes nothing in them. Adapters after attention or
    the MLP are refused.
    """
    with _errors_in_one_line():
        from .importers.steerling import import_steerling

        imported = import_steerling(
            file,
            scale=scale,
            activation=activation,
            positions=positions,
            base=base_model,
            num_layers=num_layers,
            layers_path=layers_path,
        )
        tokens = f"{positions} (the file does not say; last_prompt+generated is --intervene-last)"
        ignored = f"{imported.ignored} base_model.* entries"
        console = _write_imported(file, imported.adapter, out, tokens, ignored=ignored)
        if imported.lora:
            console.print(
                f"{imported.lora} of the ignored entries are LoRA weights, which are not imported: alone, the adapter "
                "is not the model that was trained.",
                style="bold red",
                soft_wrap=True,
            )
        _print_usage(console, out)


@import_app.command()
def pyreft(
    directory: Annotated[Path, typer.Argument(help="The directory of reft_model.save.", show_default=False)],
    out: _Out,
    positions: Annotated[
        str | None,
        typer.Option(
            help="Where pyreft intervened: all, or such as f7+l7 (first_7+last_7). Required: its files do not say."
        ),
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option(
            help="The act_fn: identity (none), silu, gelu, gelu_tanh, relu or tanh. Required, as the files do not "
            "record it, except for ConsReFT and LobiReFT, which have none. LoReFT and NoReFT need identity."
        ),
    ] = None,
    base_model: _BaseModel = "",
    num_layers: _NumLayers = None,
    layers_path: _LayersPath = None,
) -> None:
    """Import a pyreft adapter: LoReFT, NoReFT, ConsReFT, DiReFT, NoDiReFT or LobiReFT on the output of blocks.

    Pickles are opened with torch.load(weights_only=True), which executes nothing in them; pyreft is not needed. Other
    components, several interventions a layer, subspaces and layers of different rank are refused.
    """
    with _errors_in_one_line():
        from .importers.pyreft import import_pyreft

        adapter = import_pyreft(
            directory,
            positions=positions,
            activation=activation,
            base=base_model,
            num_layers=num_layers,
            layers_path=layers_path,
        )
        _print_usage(_write_imported(directory, adapter, out, adapter.config.positions), out)


def _indices(layers: str | None) -> list[int] | None:
    if layers is None:
        return None
    try:
        return [int(index) for index in layers.split(",")]
    except ValueError:
        raise ValueError(f"layers is {layers!r} (--layers); expected indices such as 7,8,9") from None


@import_app.command()
def vector(
    file: Annotated[
        Path,
        typer.Argument(
            help="repeng's or llama.cpp's .gguf, or tensors in .safetensors or in a file of torch.save.",
            show_default=False,
        ),
    ],
    out: _Out,
    scale: Annotated[
        float | None,
        typer.Option(
            help="The strength: repeng's coefficient, llama.cpp's --control-vector-scaled. Required: the file does not "
            "record it."
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Indices from 0, such as 7,8,9. For a file that names its layers, the layers to import (default: "
            "all). For a tensor, the layer of each row; required unless it has a row for each layer."
        ),
    ] = None,
    base_model: _BaseModel = "",
    num_layers: _NumLayers = None,
    layers_path: _LayersPath = None,
) -> None:
    """Import control vectors, one for each layer: GGUF of repeng, llama.cpp or EasySteer, or plain tensors.

    The vector of layer N is added to that layer's output, N from 0. repeng's normalize=True and operators other than
    the sum are not supported. Pickles are opened with torch.load(weights_only=True).
    """
    with _errors_in_one_line():
        from .importers.vectors import import_vector

        adapter = import_vector(
            file,
            scale=scale,
            layers=_indices(layers),
            base=base_model,
            num_layers=num_layers,
            layers_path=layers_path,
        )
        _print_usage(_write_imported(file, adapter, out, "all, of prompt and answer"), out)


# ------------------------------------------------------------------------------------------------------------- export

export_app = typer.Typer(help="Write adapters as other codes have them.", no_args_is_help=True)
app.add_typer(export_app, name="export")


@export_app.command("pyreft")
def export_to_pyreft(
    adapter: Annotated[str, typer.Argument(help="A saved adapter: its directory, or its id on the hub.")],
    out: Annotated[Path, typer.Option("--out", help="A new directory for pyreft's files.", show_default=False)],
) -> None:
    """Write an adapter of form loreft as reft_model.save of pyreft does: pyreft.ReftModel.load reads it.

    pyreft intervenes where each call says; its files do not record the adapter's positions.
    """
    with _errors_in_one_line():
        from .importers.pyreft import export_pyreft

        config = export_pyreft(adapter, out).config
        console = _console()
        told = f"LoReFT of rank {config.rank}, positions {config.positions}, written to {out}"
        console.print(told, markup=False, soft_wrap=True)
        usage = f"import pyreft\nreft_model = pyreft.ReftModel.load({str(out)!r}, model)"
        console.print(usage, markup=False, soft_wrap=True)


# ----------------------------------------------------------------------------------------------------------- coverage


@app.command()
def coverage(
    only: Annotated[str | None, typer.Option(help="Model types, separated by commas. Default: all.")] = None,
    out: Annotated[Path | None, typer.Option(help="Markdown file for the table, such as docs/coverage.md.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    jobs: Annotated[int, typer.Option(help="Processes at a time.")] = 2,
) -> None:
    """Patch and check a tiny model of each causal language model class of transformers. Exit code 1 if one is wrong."""
    with _errors_in_one_line():
        from .tools.coverage import MODEL_TYPES, check_all, markdown, summary

        types = MODEL_TYPES if only is None else tuple(name.strip() for name in only.split(","))
        rows = []
        for row in check_all(types, jobs):
            rows.append(row)
            if not as_json:
                for one, site in ((row, "post_block"), (row.post_mlp, "post_mlp")):
                    if one is not None:
                        why = "; ".join(filter(None, (one.reason, one.note)))
                        shown = f"{one.outcome:<8} {one.model_type:<24} {site:<10} {why}"
                        _console().print(shown, markup=False, soft_wrap=True)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(markdown(rows), encoding="utf-8")
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2) if as_json else summary(rows))
    if any("wrong" in (row.outcome, row.post_mlp and row.post_mlp.outcome) for row in rows):
        raise typer.Exit(1)


# ----------------------------------------------------------------------------------------------------------- diagnose


@app.command()
def diagnose(
    prompts: Annotated[Path, typer.Option(help="A .txt, one prompt a line, or a .jsonl (see --field).")],
    model: Annotated[
        str | None,
        typer.Argument(help="Directory or hub id of a causal language model; SmolLM2-135M-Instruct if not given."),
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="A saved steering adapter: its directory or hub id.")] = None,
    lora: Annotated[str | None, typer.Option(help="A LoRA that PEFT saved, beside --adapter.")] = None,
    joint: Annotated[Path | None, typer.Option(help="A directory of save_joint, with both.")] = None,
    field: Annotated[str, typer.Option(help="The field of a .jsonl's lines that holds the prompt.")] = "prompt",
    out: Annotated[Path, typer.Option(help="Directory for the figures and diagnostics.json.")] = Path(
        "fused-steer-diagnosis"
    ),
    max_prompts: Annotated[int | None, typer.Option(help="Use only this many prompts. Default: all.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens at which longer prompts are cut.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Prompts at a time.")] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, xpu …; auto is a GPU if there is one.")] = "auto",
) -> None:
    """Show what an adapter does to a model, layer by layer: its shifts, its weights, and their angle to the LoRA's."""
    with _errors_in_one_line():
        from .diagnostics import DiagnoseOptions, run

        run(
            DiagnoseOptions(
                model, adapter, lora, joint, prompts, field, out, max_prompts, max_length, batch_size, device
            ),
            _console(),
        )


# ---------------------------------------------------------------------------------------------------------------- fit


@app.command()
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
    with _errors_in_one_line():
        from .theory.command import FitOptions, run

        run(
            FitOptions(
                base=base,
                tuned=tuned,
                prompts=prompts,
                field=field,
                rank=rank,
                site=site,
                layers=_indices(layers),
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
            _console(),
        )


# --------------------------------------------------------------------------------------------------------- serve-plan


@app.command("serve-plan")
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
    with _errors_in_one_line():
        from .serving import plan as planning

        chosen = _indices(steered)
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
            typer.echo(planning.as_json(request, found))
        else:
            planning.show(request, found, _console())


# -------------------------------------------------------------------------------------------------------- verify-vllm


@app.command("verify-vllm")
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
    """Check steering in vLLM on this machine, and measure its cost against vLLM without it. Exit code 1 if not well."""
    with _errors_in_one_line():
        from .tools.verify_vllm import VerifyOptions, run

        options = VerifyOptions(model, dtype, rows, adapters, length, new_tokens, rounds, rank, memory)
        well = run(options, _console(), as_json)
    if not well:
        raise typer.Exit(1)
