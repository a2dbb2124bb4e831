"""Check the arguments of `Steering.batch`: for each row an adapter, a strength and token positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import checked_number

#: Names of token positions. A caller may also give ("first", k) or ("last", k), tokens of the prompt.
POSITIONS = ("all", "prompt", "generated", "last")
EVERY_TOKEN = 2**31 - 1  # more than any number of tokens


# -------------------------------------------------------------------------------------------------- requested rows


@dataclass(frozen=True)
class Request:
    """The steering of one row of a batch.

    Attributes:
        name: the adapter, or None.
        scale: the strength, or None for the adapter's own.
        after: the number of prompt tokens before the first steered one.
        until: the number of the last steered prompt token.
        from_end: whether `after` and `until` count from the prompt's end.
        generated: whether generated tokens are steered.
    """

    name: str | None
    scale: float | None
    after: int
    until: int
    from_end: bool
    generated: bool


def checked_requests(names: Any, scale: Any, positions: Any, known: Callable[[str], Any]) -> list[Request]:
    """Return the checked rows of `Steering.batch`. `known` raises for an unknown adapter.

    Raises:
        TypeError, ValueError, KeyError: names, strengths or positions of a wrong form, or of different numbers.
    """
    if isinstance(names, (str, bytes)) or not isinstance(names, Sequence):
        raise TypeError(f"names is {names!r}; expected a list with an adapter's name, or None, for each row")
    if not names:
        raise ValueError("names is empty; expected one for each row of the batch")
    for name in names:
        if name is not None and not isinstance(name, str):
            raise TypeError(f"names has {name!r}; expected names of adapters, and None for no adapter")
        if name is not None:
            known(name)
    scales = list(scale) if isinstance(scale, (list, tuple)) else [scale] * len(names)
    places = list(positions) if isinstance(positions, list) else [positions] * len(names)
    for what, values in (("scale", scales), ("positions", places)):
        if len(values) != len(names):
            raise ValueError(f"{what} has {len(values)} entries; expected {len(names)}, one for each row")
    strengths = [None if value is None else checked_number("scale", value) for value in scales]
    return [
        Request(name, strength, **_checked_position(place))
        for name, strength, place in zip(names, strengths, places, strict=True)
    ]


def _checked_position(position: Any) -> dict[str, Any]:
    whole = {"after": 0, "until": EVERY_TOKEN, "from_end": False, "generated": True}
    if position == "all":
        return whole
    if position == "prompt":
        return {**whole, "generated": False}
    if position == "generated":
        return {**whole, "until": 0}
    if position == "last":
        position = ("last", 1)
    if isinstance(position, tuple) and len(position) == 2 and position[0] in ("first", "last"):
        count = position[1]
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"positions has {position!r}; expected a number of tokens of at least 1")
        return {"after": 0, "until": count, "from_end": position[0] == "last", "generated": False}
    raise ValueError(
        f"positions has {position!r}; expected {', '.join(map(repr, POSITIONS))}, ('first', k) or ('last', k), or a "
        "list with one for each row"
    )
