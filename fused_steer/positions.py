"""Token positions: names for the steered tokens of a text, in training and in inference.

A text is a prompt followed by generated tokens.

    all            every token
    prompt         every token of the prompt
    generated      every token after the prompt
    last_prompt    the prompt's last token
    first_7        the prompt's first 7 tokens
    last_7         the prompt's last 7 tokens

Several names can be joined by "+": "first_7+last_7", "last_prompt+generated". Padding does not count.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

ALL = "all"
_EVERY = 2**31 - 1  # more tokens than there are
_PART = re.compile(r"(first|last)(?:_([1-9]\d{0,8}))?")
_NAMES = {
    "all": (_EVERY, 0, True),
    "prompt": (_EVERY, 0, False),
    "generated": (0, 0, True),
    "last_prompt": (0, 1, False),
}


@dataclass(frozen=True)
class Positions:
    """The steered tokens of a text.

    Attributes:
        first: the number of steered tokens at the prompt's beginning.
        last: the number of steered tokens at the prompt's end.
        generated: whether generated tokens are steered.
    """

    first: int
    last: int
    generated: bool

    @property
    def name(self) -> str:
        """The shortest name of these positions."""
        every = self.first == _EVERY
        if every:
            return "all" if self.generated else "prompt"
        last = "last_prompt" if self.last == 1 else f"last_{self.last}"
        parts = {f"first_{self.first}": self.first, last: self.last, "generated": self.generated}
        return "+".join(name for name, there in parts.items() if there)

    @property
    def counts(self) -> bool:
        """Whether tokens of the prompt are counted. Then the padding has to be known."""
        return self.last > 0 or 0 < self.first < _EVERY


def shown(value: Any) -> str:
    """Return a wrong argument for an error message, in one line of at most 200 letters. Arrays print several lines."""
    text = repr(value)
    return (" ".join(text.split()) if "\n" in text else text)[:200]


def read_positions(given: Any) -> Positions:
    """Return the positions of a name. ("first", 7) is the same as "first_7".

    Raises:
        ValueError: there is no such name.
    """
    text = given
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], str) and given[0] in ("first", "last"):
        count = given[1]
        if not isinstance(count, Integral) or isinstance(count, bool) or count < 1:
            raise ValueError(f"positions has {shown(given)}; expected a number of tokens of at least 1")
        text = f"{given[0]}_{int(count)}"
    found = [_read_part(part) for part in text.split("+")] if isinstance(text, str) else [None]
    if None in found:
        raise ValueError(
            f"positions has {shown(given)}; expected 'all', 'prompt', 'generated', 'last_prompt', 'first_7' or "
            "'last_7' (any number from 1), or several of them joined by '+'"
        )
    first, last, generated = zip(*filter(None, found), strict=True)
    if max(first) == _EVERY:
        last = (0,)
    return Positions(max(first), max(last), any(generated))


def kept_tokens(batch: Any) -> Tensor:
    """Return which tokens of a batch count, (B · T,) bool on the CPU: those that `attention_mask` does not mask.

    Args:
        batch: `input_ids` (B, T), with or without an `attention_mask` (B, T).

    Raises:
        TypeError: it is no mapping with a tensor `input_ids`, or the mask is no tensor.
        ValueError: `input_ids` has another number of dimensions, or the mask another shape.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor):
        raise TypeError(f"a batch is a {type(batch).__name__}; expected a mapping with a tensor input_ids")
    if ids.ndim != 2:
        raise ValueError(f"input_ids is {tuple(ids.shape)}; expected (rows, tokens)")
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones(ids.numel(), dtype=torch.bool)
    check_like_ids("attention_mask", mask, ids)
    return mask.bool().flatten().cpu()


def check_like_ids(name: str, given: Any, ids: Tensor) -> None:
    """Check that a batch has a tensor of the shape of `input_ids`.

    Raises:
        TypeError, ValueError: it is no tensor, or of another shape.
    """
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} is a {type(given).__name__}; expected a tensor {tuple(ids.shape)}, as input_ids")
    if given.shape != ids.shape:
        raise ValueError(f"{name} is {tuple(given.shape)}; expected {tuple(ids.shape)}, as input_ids")


def _read_part(part: str) -> tuple[int, int, bool] | None:
    if part in _NAMES:
        return _NAMES[part]
    found = _PART.fullmatch(part)
    if found is None:
        return None
    count = int(found[2] or 1)
    return (count, 0, False) if found[1] == "first" else (0, count, False)


def chosen_tokens(
    positions: Positions, real: Tensor, answer: Tensor, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return two masks (rows, tokens): the steered tokens, and the prompts' tokens.

    Args:
        real: (rows, tokens) bool, False for padding.
        answer: (rows, tokens) bool, True for tokens of an answer. A text's prompt ends before the first of them.
        starts: (rows, tokens) bool, True for the first token of each text of a packed row. None: a row is one text.
    """
    text = torch.zeros_like(real, dtype=torch.int64) if starts is None else starts.cumsum(1)
    count = real.cumsum(1)
    answered = (answer & real).cumsum(1)
    if starts is not None:
        # Subtract the counts before the token's own text.
        begin = torch.where(starts, torch.arange(real.shape[1], device=real.device), 0).cummax(1).values
        count = count - (count - real.long()).gather(1, begin)
        answered = answered - (answered - (answer & real).long()).gather(1, begin)
    prompt = real & (answered == 0)
    lengths = torch.zeros(real.shape[0], real.shape[1] + 1, dtype=torch.int64, device=real.device)
    length = lengths.scatter_add(1, text, prompt.long()).gather(1, text)
    chosen = prompt & ((count <= positions.first) | (count > length - positions.last))
    return (chosen | (real & ~prompt) if positions.generated else chosen), prompt


def chosen_by_lengths(
    positions: Positions, real: Tensor, lengths: Tensor, before: Tensor | int
) -> tuple[Tensor, Tensor]:
    """Return `chosen_tokens` by the lengths of the prompts. Each row is one text. A cache may hold its beginning.

    Args:
        real: (rows, tokens) bool, False for padding.
        lengths: (rows,) the number of tokens of each prompt.
        before: (rows, 1) the number of tokens of each text in the cache, or one number for all.
    """
    count, lengths = before + real.cumsum(1), lengths[:, None]
    prompt = real & (count <= lengths)
    chosen = prompt & ((count <= positions.first) | (count > lengths - positions.last))
    return (chosen | (real & ~prompt) if positions.generated else chosen), prompt
