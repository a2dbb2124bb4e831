"""What a caller asks of a batch: for each row an adapter, a strength and token positions, checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import checked_number

#: Words for the tokens of a row that are steered; and ("first", k) and ("last", k), tokens of the prompt.
POSITIONS = ("all", "prompt", "generated", "last")
EVERY_TOKEN = 2**31 - 1  # more tokens than there are


# --------------------------------------------------------------------------------------------------- what a caller asks


@dataclass(frozen=True)
class Request:
    """One row: by which adapter, how strongly (None: its own strength), and where.

    Where: of the prompt's tokens those after the first `after`, up to the `until`-th (both from the end where
    `from_end`), and whether of the generated ones.
    """

    name: str | None
    scale: float | None
    after: int
    until: int
    from_end: bool
    generated: bool


def checked_requests(names: Any, scale: Any, positions: Any, known: Callable[[str], Any]) -> list[Request]:
    """The rows that `Steering.batch` is asked for; `known` refuses an adapter that there is not.

    Raises:
        TypeError, ValueError, KeyError: what is no list of names, strengths or positions, or does not fit the others.
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
