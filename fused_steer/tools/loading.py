"""Loads models and tokenizers for commands: whole, and without code of their own."""

from __future__ import annotations

from typing import Any

from .._hub_access import loading


def load_tokenizer(source: str) -> Any:
    """Load a tokenizer from a directory or hub id.

    Raises:
        ValueError, OSError, ImportError: see `loading`.
    """
    from transformers import AutoTokenizer

    with loading(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def load_causal(source: str, dtype: Any) -> Any:
    """Load a causal language model from a directory or hub id, in eval mode.

    Args:
        dtype: a torch dtype, or its name; "auto" is that of the checkpoint.

    Raises:
        ValueError: weights are missing, which transformers would draw at random: such as the head, in the checkpoint of
            a classifier or of a bare decoder.
        ValueError, OSError, ImportError: see `loading`.
    """
    from transformers import AutoModelForCausalLM

    with loading(source, "model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    model, told = loaded
    missing = sorted(told["missing_keys"])
    if missing:
        raise ValueError(f"{source} has no {missing[0]}; expected all weights of a {type(model).__name__}")
    return model.eval()
