"""ListOps in Long Range Arena's form (Tay et al. 2020): as deep as 10, up to 10 arguments a list, of a wanted length.

The generator draws as theirs does: an argument is a list with probability 0.25, and has 2 to 10 arguments. Length is
counted in their tokens: a digit, an operator with its bracket, a closing bracket.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from fused_steer.tools.listops import OPERATORS, Expression, Operation, evaluate

DEPTH, ARGUMENTS, NESTED = 10, 10, 0.25
#: Long Range Arena's own.
LONG = (500, 2000)
SIZES = {"train": 96_000, "validation": 2_000, "test": 2_000}


def length(expression: Expression) -> int:
    if isinstance(expression, int):
        return 1
    return 2 + sum(map(length, expression.arguments))


def _draw(rng: random.Random, depth: int, longest: int) -> Expression | None:
    """A random expression; None as soon as it is longer than `longest`."""
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
    """Distinct random expressions with a length in `lengths`, both ends included."""
    rng, seen = random.Random(seed), set()
    while True:
        expression = _draw(rng, 1, lengths[1])
        if isinstance(expression, Operation) and length(expression) >= lengths[0] and expression not in seen:
            seen.add(expression)
            yield expression


def rows(sizes: dict[str, int], lengths: tuple[int, int], seed: int = 42) -> dict[str, list[dict[str, object]]]:
    """So many rows for each split, no expression twice.

    Raises:
        ValueError: no list is that long, or the range is none.
    """
    shortest, longest = lengths
    if not 4 <= shortest <= longest:
        raise ValueError(f"the lengths of ListOps are {shortest}:{longest}; expected two numbers, the first at least 4")
    drawn = expressions(lengths, seed)
    return {
        split: [{"Source": str(e), "Target": evaluate(e)} for e, _ in zip(drawn, range(count), strict=False)]
        for split, count in sizes.items()
    }
