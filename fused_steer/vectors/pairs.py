"""Reads contrasting texts: pairs from a .jsonl, or two files of texts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..tools.prompts import Prompt, is_text, read_prompts

SIDES = ("positive", "negative")
_FIELDS = (*SIDES, "prompt")


@dataclass(frozen=True)
class Contrast:
    """Texts of both sides.

    Attributes:
        positive, negative: the texts.
        paired: whether positive[i] and negative[i] belong together.
    """

    positive: list[Prompt]
    negative: list[Prompt]
    paired: bool


def read_pairs(file: Path) -> Contrast:
    """Read pairs from a .jsonl: an object a line with `positive` and `negative`, and perhaps a common `prompt`.

    Each side is a text or the messages of a chat. With a `prompt` that is a text, a side is the text after it. With a
    `prompt` of messages, a side is the assistant's answer, or further messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no .jsonl, a line lacks a side or has another form, or there is no pair.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}; expected pairs, a .jsonl with positive and negative in each line")
    if file.suffix != ".jsonl":
        raise ValueError(f"pairs are in {file}; expected a .jsonl with positive and negative in each line")
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text ({error}); expected pairs") from error
    lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    pairs = [_pair(line, f"{file}, line {number}") for number, line in lines]
    if not pairs:
        raise ValueError(f"{file} holds no pair; expected at least one")
    return Contrast([positive for positive, _ in pairs], [negative for _, negative in pairs], paired=True)


def read_sets(positive: Path, negative: Path) -> Contrast:
    """Read two sets of texts, which need not be as many: see `read_prompts`."""
    return Contrast(read_prompts(positive), read_prompts(negative), paired=False)


def _pair(line: str, where: str) -> tuple[Prompt, Prompt]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({error}); expected an object with positive and negative") from error
    if not isinstance(entry, dict):
        raise ValueError(f"{where} has a {type(entry).__name__}; expected an object with positive and negative")
    for side in SIDES:
        if side not in entry:
            held = ", ".join(map(repr, sorted(entry))) or "no field"
            raise ValueError(f"{where} has {held}; expected a field {side!r}")
    for name in _FIELDS:
        if name in entry and not is_text(entry[name]):
            raise ValueError(
                f"{where}: {name!r} is {entry[name]!r:.80}; expected a text that is not empty, or a list of messages"
            )
    sides = [_joined(entry.get("prompt"), entry[side], f"{where}: {side!r}") for side in SIDES]
    if sides[0] == sides[1]:
        raise ValueError(f"{where}: positive and negative are the same; expected two sides that differ")
    return sides[0], sides[1]


def _joined(prompt: Any, side: Prompt, where: str) -> Prompt:
    if prompt is None:
        return side
    if isinstance(prompt, str):
        if isinstance(side, str):
            return prompt + side
        raise ValueError(f"{where} is a list of messages after a prompt that is a text; expected a text")
    return [*prompt, {"role": "assistant", "content": side}] if isinstance(side, str) else [*prompt, *side]
