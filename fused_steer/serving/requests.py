"""Check the arguments of batches: for each row an adapter, a strength and token positions; and the time to wait."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ..config import checked_number, plain
from ..positions import Positions, read_positions, shown

# -------------------------------------------------------------------------------------------------- requested rows


@dataclass(frozen=True)
class Request:
    """The steering of one row of a batch.

    Attributes:
        name: the adapter, or None.
        scale: the strength, or None for the adapter's own.
        positions: the steered tokens, or None for the adapter's own.
        prompt: the tokens of the prompt, where the row's own prompt has generated tokens too. None: those of the row.
    """

    name: str | None
    scale: float | None
    positions: Positions | None
    prompt: int | None = None


def checked_requests(names: Any, scale: Any, positions: Any, known: Callable[[str], Any]) -> list[Request]:
    """Return the checked rows of `Steering.batch`. `known` raises for an unknown adapter.

    Raises:
        TypeError, ValueError, KeyError: names, strengths or positions of a wrong form, or of different numbers.
    """
    if isinstance(names, (str, bytes)) or not isinstance(names, Sequence):
        raise TypeError(f"names is {shown(names)}; expected a list with an adapter's name, or None, for each row")
    if not names:
        raise ValueError("names is empty; expected one for each row of the batch")
    for name in names:
        if name is not None and not isinstance(name, str):
            raise TypeError(f"names has {shown(name)}; expected names of adapters, and None for no adapter")
        if name is not None:
            known(name)
    if getattr(scale, "ndim", None) == 1 and hasattr(scale, "tolist"):  # a tensor or an array, as for layers
        scale = scale.tolist()
    scales = list(scale) if isinstance(scale, (list, tuple)) else [scale] * len(names)
    places = list(positions) if isinstance(positions, list) else [positions] * len(names)
    for what, values in (("scale", scales), ("positions", places)):
        if len(values) != len(names):
            raise ValueError(f"{what} has {len(values)} entries; expected {len(names)}, one for each row")
    strengths = [None if value is None else checked_number("scale", value) for value in scales]
    return [
        Request(name, strength, None if place is None else read_positions(place))
        for name, strength, place in zip(names, strengths, places, strict=True)
    ]


def distinct_names(names: Any) -> list[str]:
    """Return names of adapters, each once.

    Raises:
        TypeError: it is no list of names.
    """
    if isinstance(names, (str, bytes)) or not isinstance(names, Sequence):
        raise TypeError(f"names is {shown(names)}; expected a list of names")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"names has {shown(name)}; expected names of adapters")
    return list(dict.fromkeys(names))


def checked_timeout(timeout: Any) -> float:
    """Return a number of seconds that a thread can wait for.

    Raises:
        ValueError: it is no number.
    """
    seconds: Any = plain(timeout)
    if isinstance(seconds, bool) or not isinstance(seconds, Real) or seconds != seconds:
        raise ValueError(f"timeout is {shown(timeout)}; expected a number of seconds")
    longest: Any = threading.TIMEOUT_MAX
    return float(longest if seconds > longest else seconds)


def with_prefix(error: Exception, prefix: str) -> Exception:
    """Return an error of the same kind, or of the nearest kind that takes only a message, with a prefix."""
    message = f"{prefix}: {' '.join(str(error).split()) or type(error).__name__}"
    for kind in type(error).__mro__:
        with contextlib.suppress(Exception):
            made = kind(message)
            if str(made) == message:
                return made
    raise AssertionError("Exception takes a message")
