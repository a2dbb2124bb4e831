"""`fused-steer merge`: a model with an adapter merged into its weights, saved as a plain checkpoint."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._hub_access import loading
from ..adapters.files import read_adapter
from ..adapters.saving import check_output, saving_folder
from ..merging import check_mergeable
from ..model.decoder import refuse_adapter
from ..patch import patch_model
from .sources import check_parts, parts_of

if TYPE_CHECKING:
    from rich.table import Table

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class MergedModel:
    """What `merge` wrote.

    Attributes:
        layers: the number of merged layers.
        dtype: the dtype of the checkpoint.
        error: how far the logits of eight tokens are from the steered model's, as a share of what steering changes.
        options: the options of the config that became True, so that linear layers have a bias.
        warning: what rounding to the dtype loses, if it is much.
        tokenizer: whether the base has a tokenizer, which is saved with it.
    """

    layers: int
    dtype: str
    error: float
    options: tuple[str, ...]
    warning: str
    tokenizer: bool


def merge(
    base: str, adapter: str, out: Path, *, scale: float | None = None, dtype: str = "auto", check_base: bool = True
) -> MergedModel:
    """Load a causal language model, merge an adapter into its weights, and save it with its tokenizer.

    A LoRA that was saved with the steering is merged first, by PEFT.

    Args:
        base: the model's directory or hub id.
        adapter: steering, or steering and a LoRA together: a directory or hub id.
        out: a new or empty directory. It is written whole or not at all.
        scale: the strength; None takes the adapter's.
        dtype: the dtype to load the model in, one of DTYPES. "auto" is that of the checkpoint.
        check_base: refuse the adapter if its base model has another name.

    Raises:
        ValueError: the adapter or the model cannot be merged (docs/merging.md), or `out` holds files.
        FileNotFoundError, OSError: the model or the adapter is not there, or cannot be read or written.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    check_output(out)
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"out is {str(out)!r}, which holds files; expected a new or empty directory")
    parts = parts_of(adapter)
    check_parts(parts)
    if parts.steering is None:
        raise ValueError(f"{adapter} is a LoRA; expected steering (PEFT's merge_and_unload merges a LoRA)")
    check_mergeable(read_adapter(parts.steering).config, adapter)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    refuse_adapter(base)
    tokenizer: Any = None
    if not Path(base).is_dir() or any(Path(base).glob("*token*")):
        with loading(base, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(base)
    with loading(base, "model"):
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    for folder in parts.loras.values():
        from peft import PeftModel

        wrapped: Any = PeftModel.from_pretrained(model, os.fspath(folder))
        model = wrapped.merge_and_unload(safe_merge=True)
    before = _logits(model)
    patch_model(model, parts.steering, check_base=check_base)
    if scale is not None:
        model.steering.scale = scale
    steered, layers = _logits(model), len({line.index for line in model.steering.report()})
    options = dict(vars(model.config.get_text_config()))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model.steering.merge_and_unload()
    merged = _logits(model)
    changed = (steered - before).norm()
    with saving_folder(out.parent) as folder:
        new = folder / "merged"
        model.save_pretrained(new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        os.replace(new, out)
    return MergedModel(
        layers,
        str(model.dtype).removeprefix("torch."),
        float((merged - steered).norm() / changed) if changed else 0.0,
        tuple(n for n, v in vars(model.config.get_text_config()).items() if v is True and options.get(n) is False),
        " ".join(str(warning.message) for warning in told if "rounding" in str(warning.message)),
        tokenizer is not None,
    )


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    tokens = torch.arange(1, 9, device=model.device)[None]
    logits: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
    return logits.double()


def table_of(found: MergedModel, out: Path) -> Table:
    """Return a table of what was written."""
    from rich.table import Column, Table
    from rich.text import Text

    table = Table("setting", Column("value", overflow="fold"))
    rows = {
        "merged layers": found.layers,
        "dtype": found.dtype,
        "logits of 8 tokens": f"differ from the steered model's by {found.error:.2g} of what steering changes",
        **({"config": ", ".join(f"{name} = True" for name in found.options)} if found.options else {}),
        "tokenizer": "saved" if found.tokenizer else "none in the base",
        "written to": out,
    }
    for name, value in rows.items():
        table.add_row(name, Text(str(value)))
    return table
