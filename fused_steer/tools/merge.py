"""`fused-steer merge`: a model with an adapter merged into its weights, saved as a plain checkpoint."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.files import read_adapter
from ..adapters.saving import check_output, saving_folder
from ..merging import check_mergeable
from ..model.decoder import refuse_adapter
from ..patch import patch_model
from .loading import load_causal, load_tokenizer
from .sources import check_parts, parts_of

if TYPE_CHECKING:
    from rich.table import Table

DTYPES = ("auto", "float32", "bfloat16", "float16")
#: Names of a tokenizer's files, of all ages of transformers.
_TOKENIZERS = ("*token*", "*vocab*", "*.model")


@dataclass(frozen=True)
class MergedModel:
    """What `merge` wrote.

    Attributes:
        layers: the number of merged layers.
        dtype: the dtype of the checkpoint.
        rounding: the share of the weights' shift that rounding to the dtype changes; the largest of all linear layers.
        options: the options of the config that became True, so that linear layers have a bias.
        tokenizer: whether the base has a tokenizer, which is saved with it.
    """

    layers: int
    dtype: str
    rounding: float
    options: tuple[str, ...]
    tokenizer: bool


def merge(
    base: str, adapter: str, out: Path, *, scale: float | None = None, dtype: str = "auto", check_base: bool = True
) -> MergedModel:
    """Load a causal language model, merge an adapter into its weights, and save it with its tokenizer.

    A LoRA that was saved with the steering is merged first, by PEFT.

    Args:
        base: the model's directory or hub id.
        adapter: steering, or steering and a LoRA together: a directory or hub id.
        out: a new or empty directory. The files are moved there once all are written.
        scale: the strength; None takes the adapter's.
        dtype: the dtype to load the model in, one of DTYPES. "auto" is that of the checkpoint.
        check_base: refuse the adapter if its base model has another name.

    Raises:
        ValueError: the adapter or the model cannot be merged (docs/merging.md), the model's files lack weights or hold
            code, or `out` holds files.
        FileNotFoundError, OSError: the model or the adapter is not there, or cannot be read or written.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    check_output(out)
    held = next(out.iterdir(), None) if out.is_dir() else None
    if held is not None:  # named, as it may be hidden: what a killed process left
        raise ValueError(f"out is {str(out)!r}, which holds {held.name}; expected a new or empty directory")
    parts = parts_of(adapter)
    check_parts(parts)
    if parts.steering is None:
        raise ValueError(f"{adapter} is a LoRA; expected steering (PEFT's merge_and_unload merges a LoRA)")
    check_mergeable(read_adapter(parts.steering).config, adapter)
    refuse_adapter(base)
    tokenizer: Any = None
    if not Path(base).is_dir() or any(any(Path(base).glob(name)) for name in _TOKENIZERS):
        tokenizer = load_tokenizer(base)
    model = load_causal(base, dtype)
    for folder in parts.loras.values():
        from peft import PeftModel

        wrapped: Any = PeftModel.from_pretrained(model, os.fspath(folder))
        model = wrapped.merge_and_unload(safe_merge=True)
    patch_model(model, parts.steering, check_base=check_base)
    if scale is not None:
        model.steering.scale = scale
    layers = len({line.index for line in model.steering.report()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the result says what rounding changes
        _, merged = model.steering._merge()
    with saving_folder(out) as folder:  # inside, as `out` may be a link or a mounted file system
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        for file in sorted(folder.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, out / file.name)  # config.json last: without it nothing is loaded
    dtype = str(model.dtype).removeprefix("torch.")
    return MergedModel(layers, dtype, merged.rounding, merged.options, tokenizer is not None)


def table_of(found: MergedModel, out: Path) -> Table:
    """Return a table of what was written."""
    from rich.table import Column, Table
    from rich.text import Text

    table = Table("setting", Column("value", overflow="fold"))
    rows = {
        "merged layers": found.layers,
        "dtype": found.dtype,
        "rounding": f"changes the shift of the weights by {found.rounding:.1%} at most",
        **({"config": ", ".join(f"{name} = True" for name in found.options)} if found.options else {}),
        "tokenizer": "saved" if found.tokenizer else "none in the base",
        "written to": out,
    }
    for name, value in rows.items():
        table.add_row(name, Text(str(value)))
    return table
