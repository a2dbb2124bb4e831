"""Generates ListOps in Long Range Arena's form (Tay et al. 2020): depth up to 10, up to 10 arguments per list.

As in Long Range Arena, an argument is a list with probability 0.25, and a list has 2 to 10 arguments. The length counts
Long Range Arena's tokens: a digit, an operator with its bracket, a closing bracket.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from ..tools.listops import OPERATORS, Expression, Operation, evaluate
from .tasks import Row

DEPTH, ARGUMENTS, NESTED = 10, 10, 0.25
#: Long Range Arena's range of lengths.
LONG = (500, 2000)
SIZES = {"train": 96_000, "validation": 2_000, "test": 2_000}


def length(expression: Expression) -> int:
    if isinstance(expression, int):
        return 1
    return 2 + sum(map(length, expression.arguments))


def _draw(rng: random.Random, depth: int, longest: int) -> Expression | None:
    """Draw a random expression; return None if it exceeds `longest`."""
    if depth == DEPTH or rng.random() > NESTED:
        return rng.randrange(10)
    operator, count = rng.choice(list(OPERATORS)), rng.randint(2, ARGUMENTS)
    left, arguments = longest - 2, []
    for _ in range(count):
        argument = _draw(rng, depth + 1, left)
        if argument is None or (left := left - length(argument)) < 0:
            return None
        arguments.append(argument)
    return Operation(operator, tuple(arguments))


def expressions(lengths: tuple[int, int], seed: int) -> Iterator[Operation]:
    """Draw distinct random expressions with a length in `lengths`, both ends included."""
    rng, seen = random.Random(seed), set()
    while True:
        expression = _draw(rng, 1, lengths[1])
        if isinstance(expression, Operation) and length(expression) >= lengths[0] and expression not in seen:
            seen.add(expression)
            yield expression


def rows(sizes: dict[str, int], lengths: tuple[int, int], seed: int = 42) -> dict[str, list[Row]]:
    """Draw `sizes[split]` rows for each split; no expression occurs twice.

    Raises:
        ValueError: the range of lengths is empty, or begins below the shortest list.
    """
    shortest, longest = lengths
    if not 4 <= shortest <= longest:
        raise ValueError(f"the lengths of ListOps are {shortest}:{longest}; expected two numbers, the first at least 4")
    drawn = expressions(lengths, seed)
    return {
        split: [{"Source": str(e), "Target": evaluate(e)} for e, _ in zip(drawn, range(count), strict=False)]
        for split, count in sizes.items()
    }
