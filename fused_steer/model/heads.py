"""Find the heads of a model: the parts that turn the decoder's output into classes, spans or rewards."""

from __future__ import annotations

from typing import Any

from torch import nn

from .decoder import find_decoder, inside_peft


def fresh_heads(model: nn.Module) -> dict[str, nn.Module]:
    """Return the heads that were not loaded from a checkpoint, by name. Their weights are random until they train.

    A head is a child of the model, with parameters, beside the child that holds the decoder. A model that predicts
    tokens has none. transformers marks each loaded parameter. If none is marked, all heads are fresh.
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
            raise ValueError(
                f"{type(whole).__name__}.{name} was not loaded from a checkpoint, and patch_model would freeze it and "
                "not save it; expected a trained head (fused_steer.peft.PostBlockConfig trains and saves a fresh one "
                "beside the steering; freeze_head=True freezes this one as it is)"
            )
