"""A character tokenizer, to train tiny models on text without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models import VOCABULARY, build
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<eos>", "<unk>")
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789+=-?.,! "


def tokenizer() -> PreTrainedTokenizerFast:
    entries = [*SPECIAL, *CHARACTERS]
    assert len(entries) <= VOCABULARY
    model = Tokenizer(WordLevel({entry: i for i, entry in enumerate(entries)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def save_tiny(folder: Path, **fields: Any) -> Path:
    """Save a tiny model and its tokenizer for `from_pretrained`."""
    build(**fields).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
