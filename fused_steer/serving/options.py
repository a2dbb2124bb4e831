"""The steering options of one served request, and the gain of each token that follows from them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..positions import ALL, read_positions
from .requests import Request, checked_requests

#: The key of these options in a request, and the fields below it. They mean what they mean in `steering.batch`.
KEY = "steering"
FIELDS = ("scale", "positions")


def read_options(given: Any, own: str = ALL) -> Request:
    """Check the steering options of a request.

    Args:
        given: an object with "scale" (a number; left out: the adapter's own strength) and "positions" (as
            `steering.batch` takes them, ("last", k) as a list; left out: the adapter's own), or its JSON text, which
            HTTP clients send.
        own: the adapter's own positions.

    Raises:
        ValueError, TypeError: it is something else, or a field is unknown or has no such value.
    """
    given = parse_options(given)
    if unknown := [str(field) for field in given if field not in FIELDS]:
        raise ValueError(f"{KEY} has {', '.join(unknown)}; expected {' and '.join(FIELDS)} alone")
    positions = given.get("positions", own)
    where = read_positions(tuple(positions) if isinstance(positions, list) else positions)
    (found,) = checked_requests([None], given.get("scale"), where.name, lambda name: None)
    return found


def parse_options(given: Any) -> Mapping[str, Any]:
    """Return the fields of steering options, an object or its JSON text.

    Raises:
        ValueError, TypeError: it is something else.
    """
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            raise ValueError(f"{KEY} is {given[:80]!r}; expected an object, or its JSON text") from None
    if not isinstance(given, Mapping):
        raise TypeError(f"{KEY} is {given!r:.80}; expected an object with {' and '.join(FIELDS)}")
    return given


def packed(options: Request) -> list[Any]:
    """Convert options to plain values, which can be sent to other processes."""
    values = [options.scale, ALL if options.positions is None else options.positions.name]
    return values if options.prompt is None else [*values, options.prompt]


def unpacked(values: Sequence[Any]) -> Request:
    """Convert the values of `packed` back to options."""
    return _unpacked(*values)


@functools.lru_cache(maxsize=4096)  # read in every step of a server
def _unpacked(scale: float | None, positions: str, prompt: int | None = None) -> Request:
    return Request(None, scale, read_positions(positions), prompt)


def steered_ranges(options: Request, prompt: int, start: int, end: int) -> list[list[int]]:
    """Return the steered tokens of a part of a sequence, as ranges [first, behind the last] in ascending order.

    Args:
        prompt: the number of tokens of the sequence's prompt.
        start, end: the part.
    """
    where = options.positions
    if where is None:
        return [[start, end]]
    prompt = prompt if options.prompt is None else options.prompt
    first = min(where.first, prompt)
    last = max(prompt - where.last, first)
    stop = max(end, prompt) if where.generated else prompt
    ranges = [(0, stop)] if last == first else [(0, first), (last, stop)]
    clipped = [[max(begin, start), min(behind, end)] for begin, behind in ranges]
    return [[begin, behind] for begin, behind in clipped if begin < behind]


def token_gains(
    scales: Sequence[float],
    options: Sequence[Request | None],
    prompts: Sequence[int],
    computed: Sequence[int],
    counts: Sequence[int],
) -> NDArray[np.float32]:
    """Compute the gain of each token of a batch, in the order of its requests.

    Args:
        scales: each request's strength.
        options: where each is steered; None: everywhere.
        prompts: tokens of its prompt.
        computed: tokens that were computed in earlier steps.
        counts: its tokens in this batch.

    Returns:
        (sum of counts,) float32.
    """
    counted = np.asarray(counts, dtype=np.int64)
    gains = np.repeat(np.asarray(scales, dtype=np.float32), counted)
    start = 0
    for row, (asked, count) in enumerate(zip(options, counts, strict=True)):
        if asked is not None and asked.positions is not None:
            where = asked.positions
            end, prompt = start + count, prompts[row] if asked.prompt is None else asked.prompt
            position = np.arange(computed[row], computed[row] + count)
            steered = ((position < where.first) | (position >= prompt - where.last)) & (position < prompt)
            if where.generated:
                steered |= position >= prompt
            gains[start:end][~steered] = 0
        start += count
    return gains
