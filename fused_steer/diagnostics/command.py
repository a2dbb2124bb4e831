"""`fused-steer diagnose`: reads prompts, prints a table, writes JSON and pictures."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..adapters.files import read_adapter
from ..adapters.saving import check_output
from ..joint import find_joint, load_joint
from ..model.decoder import find_decoder, meta_model
from ..patch import patch_model
from ..tools.prompts import encode, read_prompts
from ..tools.sources import note_parts

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
from .diagnosis import Diagnosis
from .figures import check_matplotlib
from .measure import diagnose

# --------------------------------------------------------------------------------------------------------- the command


@dataclass(frozen=True)
class DiagnoseOptions:
    """The options of `fused-steer diagnose`. The command documents each and holds the defaults.

    Raises:
        ValueError: a value out of range, options that do not go together, or `out` is a file.
    """

    model: str | None
    adapter: str | None
    lora: str | None
    joint: str | None
    prompts: Path
    field: str | None
    out: Path
    max_prompts: int | None
    max_length: int
    batch_size: int
    device: str
    check_base: bool = True

    def __post_init__(self) -> None:
        if (self.adapter is None) == (self.joint is None):
            given = "both are" if self.adapter else "neither is"
            raise ValueError(f"adapter or joint has to be given, and {given}; expected one of them")
        if self.joint is not None and self.lora is not None:
            raise ValueError("joint and lora are given; expected one of them, as joint holds a LoRA")
        for name in ("max_prompts", "max_length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name.replace('_', ' ')} is {value}; expected at least 1")
        check_output(self.out)


def _load(options: DiagnoseOptions, device: torch.device) -> tuple[Any, Any]:
    """Load the adapted model and its tokenizer. Before weights are read, the adapter is checked against the config."""
    from ..tools.demo import load_model

    steering = options.adapter if options.joint is None else find_joint(options.joint)[0]
    layout = None if options.model is None else find_decoder(meta_model(options.model)).layout
    assert steering is not None  # one of them is given
    read_adapter(steering, layout, check_base=options.check_base and layout is not None)
    if options.adapter is not None and options.lora is None:
        note_parts(options.adapter)
    if options.lora is not None:
        from peft import PeftConfig, PeftModel

        PeftConfig.from_pretrained(options.lora)
    model, tokenizer = load_model(options.model, device)
    if options.joint is not None:
        return load_joint(model, options.joint, check_base=options.check_base), tokenizer
    if options.lora is not None:
        model = PeftModel.from_pretrained(model, options.lora)
    return patch_model(model, options.adapter, check_base=options.check_base), tokenizer


def _table(diagnosis: Diagnosis) -> Table:
    from rich.table import Table

    several = len({layer.site for layer in diagnosis.layers}) > 1
    heads = (
        "layer",
        *(["site"] if several else []),
        "kind",
        "MLP share",
        "‖δ‖/‖h‖",
        "‖W2'‖₂",
        "cosine of shifts",
        "principal cosine",
    )
    table = Table(*heads)
    for column in table.columns:
        column.justify = "right"
    for layer in diagnosis.layers:
        numbers = (
            layer.mlp_share and layer.mlp_share.quantiles["0.5"],
            layer.shift and layer.shift.quantiles["0.5"],
            layer.spectral_norm,
            layer.cosine and layer.cosine.quantiles["0.5"],
            layer.alignment and layer.alignment.principal[0],
        )
        at = [layer.site] if several else []
        table.add_row(str(layer.layer), *at, layer.kind, *("-" if n is None else f"{n:.3g}" for n in numbers))
    table.caption = "medians over tokens; the largest principal cosine"
    return table


def run(options: DiagnoseOptions, console: Console) -> None:
    """Load the model, measure it, save the diagnosis to `options.out` and print a row for each layer.

    Raises:
        ValueError, FileNotFoundError: an input is missing or does not fit. Nothing is written.
        ImportError: a library of the extra `demo` is missing.
    """
    from ..tools.demo import SMOLLM2, choose_device

    check_matplotlib()
    device = choose_device(options.device)
    prompts = read_prompts(options.prompts, options.field)[: options.max_prompts]
    model, tokenizer = _load(options, device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*layers do nothing", category=UserWarning)  # said below
        diagnosis = diagnose(model, encode(tokenizer, prompts, options.max_length, options.batch_size))
    files = diagnosis.save(options.out)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(f"model     {options.model or SMOLLM2}, {model.dtype} on {device}")
    say(f"LoRA      {', '.join(diagnosis.lora) or 'none'}")
    say(f"prompts   {len(prompts)} of {options.prompts}, {diagnosis.tokens} tokens")
    console.print(_table(diagnosis))
    reasons: dict[str, dict[str, None]] = {}
    for layer in diagnosis.layers:
        for name, reason in layer.absent.items():
            layers = reasons.setdefault(f"{name}: {reason}", {})
            layers[str(layer.layer)] = None
    for reason, where in reasons.items():
        say(f"absent    {reason} (layers {', '.join(where)})")
    if (warning := diagnosis.warning()) is not None:
        say(f"warning   {warning}")
    for file in files:
        say(f"wrote     {file}")
