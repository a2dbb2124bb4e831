"""Find the heads of a model: the parts that turn the decoder's output into classes, spans or rewards."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from .decoder import find_decoder, inside_peft


def fresh_heads(model: nn.Module) -> dict[str, nn.Module]:
    """Return the heads that were not loaded from a checkpoint, by name. Their weights are random until they train.

    A head is a child of the model, with parameters, beside the child that holds the decoder. A model that predicts
    tokens has none. transformers marks each loaded parameter. If none is marked, as in a copy of a model or a model
    made from a config, all heads count as fresh: they may be random, and would be frozen.
    """
    whole: Any = inside_peft(model)
    whole = getattr(whole, "_orig_mod", whole)  # inside torch.compile's wrapper
    decoder = find_decoder(whole)
    output = whole.get_output_embeddings() if hasattr(whole, "get_output_embeddings") else None
    if decoder.module is whole or getattr(whole, "base_model", None) is whole or output is not None:
        return {}
    vocabulary = getattr(decoder.config.get_text_config(), "vocab_size", None)
    found = {}
    for name, child in whole.named_children():
        child = getattr(child, "original_module", child)  # inside PEFT's modules_to_save
        if getattr(child, "out_features", None) == vocabulary:
            return {}  # it predicts tokens
        if name != decoder.path.partition(".")[0] and not all(map(_is_loaded, child.parameters())):
            found[name] = child
    return found


def _is_loaded(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "_is_hf_initialized", False)


def check_heads(model: nn.Module) -> None:
    """Check that no head would be frozen at random values and not saved.

    Raises:
        ValueError: a head was not loaded from a checkpoint.
    """
    whole = inside_peft(model)
    for name, head in fresh_heads(whole).items():
        if whole.get_submodule(name) is head:  # PEFT does not train and save it
            marked = any(map(_is_loaded, whole.parameters()))
            why = "was not loaded from a checkpoint"
            if not marked:
                why = "may be random (a copy, or a model made from a config, does not record what was loaded)"
            raise ValueError(
                f"{_class_name(whole)}.{name} {why}, and patch_model would freeze it and not save it; expected a "
                "trained head (fused_steer.peft.PostBlockConfig trains and saves this one beside the steering; "
                "freeze_head=True freezes it as it is)"
            )


def warn_of_random(model: nn.Module, saved: Iterable[str], adapter: str) -> None:
    """Warn of heads that neither a checkpoint nor an adapter's file provides.

    Args:
        saved: the names of the modules in the file.
    """
    random = [name for name in fresh_heads(model) if not any(name.endswith(ending) for ending in saved)]
    if random:
        warnings.warn(
            f"{_class_name(model)}.{random[0]} was not loaded from a checkpoint, and adapter {adapter!r} has none: its "
            "values are random; expected a model with a trained head, or an adapter that was saved with one",
            stacklevel=2,
        )


def _class_name(model: nn.Module) -> str:
    whole = inside_peft(model)
    return type(getattr(whole, "_orig_mod", whole)).__name__
