"""Verbs that convert adapters: of other libraries (import), for them (export), and into a model's weights (merge)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from .shared import CONVERT, App, CheckBase, app, errors_in_one_line, indices, new_console

if TYPE_CHECKING:
    from ..adapters.files import AdapterFile


# --------------------------------------------------------------------------------------------------------------- import

import_app = App(help="Import adapters of other libraries into fused-steer's format.", no_args_is_help=True)
app.add_typer(import_app, name="import", rich_help_panel=CONVERT)

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
    from ..adapters.files import write_adapter

    write_adapter(out, adapter)
    config, layout, steered = adapter.config, adapter.layout, adapter.config.layers
    many = f"the model has {layout.num_layers}, from 0"  # "14 of 30" would read as a number of layers
    layers = f"all {layout.num_layers}" if steered is None else f"{', '.join(map(str, steered))} ({many})"
    table = Table("setting", Column("value", overflow="fold"))
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
    console = new_console()
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
            "low-rank adapter: its file does not record φ. Vectors have none."
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

    Pickles are opened with torch.load(weights_only=True), which executes nothing in them. Adapters of the released
    code's kinds attn and mlp (--submodules) need --base-model.
    """
    with errors_in_one_line():
        from ..importers.steerling import import_steerling

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
    with errors_in_one_line():
        from ..importers.pyreft import import_pyreft

        adapter = import_pyreft(
            directory,
            positions=positions,
            activation=activation,
            base=base_model,
            num_layers=num_layers,
            layers_path=layers_path,
        )
        _print_usage(_write_imported(directory, adapter, out, adapter.config.positions), out)


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
    with errors_in_one_line():
        from ..importers.vectors import import_vector

        adapter = import_vector(
            file,
            scale=scale,
            layers=indices(layers),
            base=base_model,
            num_layers=num_layers,
            layers_path=layers_path,
        )
        _print_usage(_write_imported(file, adapter, out, "all, of prompt and answer"), out)


# --------------------------------------------------------------------------------------------------------------- export

export_app = App(help="Export adapters to formats of other libraries.", no_args_is_help=True)
app.add_typer(export_app, name="export", rich_help_panel=CONVERT)


@export_app.command("pyreft")
def export_to_pyreft(
    adapter: Annotated[str, typer.Argument(help="A saved adapter: its directory, or its id on the hub.")],
    out: Annotated[Path, typer.Option("--out", help="A new directory for pyreft's files.", show_default=False)],
) -> None:
    """Export an adapter to pyreft's files, as reft_model.save writes them.

    LoReFT becomes LoReFT, a vector LobiReFT, and a low rank NoDiReFT (DiReFT or ConsReFT if its W2 is orthonormal).
    The strength is multiplied in, and a b2 becomes one more rank. Sites other than post_block are refused. pyreft
    intervenes where each call says; its files do not record the adapter's positions or φ.
    """
    with errors_in_one_line():
        from ..importers.pyreft_export import export_pyreft

        written = export_pyreft(adapter, out)
        console = new_console()
        told = f"{written.name} of rank {written.rank}, positions {written.adapter.config.positions}, written to {out}"
        console.print(told, markup=False, soft_wrap=True)
        console.print(written.usage(out), markup=False, soft_wrap=True)


@export_app.command("vector")
def export_to_vector(
    adapter: Annotated[str, typer.Argument(help="A saved adapter: its directory, or its id on the hub.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            help="A new file: .gguf (llama.cpp, repeng), .safetensors, or .pt (torch).",
            show_default=False,
        ),
    ],
    model_type: Annotated[
        str, typer.Option(help="The model's architecture for a .gguf to record, such as llama; not needed.")
    ] = "",
) -> None:
    """Export an adapter of form vector as control vectors, one for each layer, for use at strength 1.

    The adapter's strength is multiplied in. llama.cpp has no vector for layer 0.
    """
    with errors_in_one_line():
        from ..importers.vectors import export_vector

        written, layers = export_vector(adapter, out, model_type=model_type)
        screen = new_console()
        which = f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
        told = f"control vectors of {which}, multiplied by the strength {written.config.scale:g}, written to {out}"
        screen.print(told, markup=False, soft_wrap=True)
        if out.suffix == ".gguf":
            screen.print(f"llama-cli -m MODEL.gguf --control-vector {out}", markup=False, soft_wrap=True)


# ---------------------------------------------------------------------------------------------------------------- merge


@app.command(rich_help_panel=CONVERT)
def merge(
    model: Annotated[str, typer.Argument(help="The base model: its directory, or its id on the hub.")],
    adapter: Annotated[str, typer.Argument(help="A saved adapter, also with a LoRA: its directory, or its id.")],
    out: Annotated[Path, typer.Option("--out", help="A new directory for the merged model.", show_default=False)],
    scale: Annotated[float | None, typer.Option(help="The strength. Default: the adapter's.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (that of the checkpoint), float32, bfloat16 or float16.")] = "auto",
    check_base: CheckBase = True,
) -> None:
    """Merge an adapter into a model's weights and save a plain checkpoint, which any runtime serves at no extra cost.

    Weights hold what is linear: vectors, and low ranks with φ = identity or LoReFT at the sites post_mlp, pre_mlp and
    post_attention. Others are refused. A LoRA that was trained beside the steering is merged, too.
    """
    with errors_in_one_line():
        from ..tools.merge import merge as merge_adapter
        from ..tools.merge import table_of

        found = merge_adapter(model, adapter, out, scale=scale, dtype=dtype, check_base=check_base)
        new_console().print(table_of(found, out))
