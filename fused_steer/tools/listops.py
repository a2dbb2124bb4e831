"""ListOps (Nangia & Bowman 2018, arXiv 1804.06028), the demo's task: nested list operations on digits.

An expression is a digit, or an operator with its arguments, written `[MAX 2 9 [MIN 4 7 ] ]`. Its value is a digit.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

#: Each operator as a function of its arguments' values. MED rounds the median down, as in the paper's released data.
OPERATORS: dict[str, Callable[[Sequence[int]], int]] = {
    "MAX": max,
    "MIN": min,
    "MED": lambda values: int(statistics.median(values)),
    "SM": lambda values: sum(values) % 10,
}
Expression: TypeAlias = "int | Operation"

MAX_DEPTH = 6  # 19 digits on average, seldom over 60, which any model can read

_MIN_ARGUMENTS, _MAX_ARGUMENTS = 2, 3
_NESTED = 0.3  # the probability that an argument is a list, where the depth allows one
_MAX_REPEATS = 1000  # after so many repeated draws in a row, no new expression is expected


@dataclass(frozen=True)
class Operation:
    """An operator and its arguments."""

    operator: str
    arguments: tuple[Expression, ...]

    def __str__(self) -> str:
        return f"[{self.operator} {' '.join(map(str, self.arguments))} ]"


def evaluate(expression: Expression) -> int:
    """Return the value of the expression, a digit."""
    if isinstance(expression, int):
        return expression
    return OPERATORS[expression.operator]([evaluate(argument) for argument in expression.arguments])


def depth(expression: Expression) -> int:
    """Return the nesting depth: 0 for a digit, 1 for a list of digits."""
    if isinstance(expression, int):
        return 0
    return 1 + max(depth(argument) for argument in expression.arguments)


def ignoring_brackets(expression: Expression) -> int:
    """Apply the outer operator to all digits, as a reader who ignores the nesting would."""
    if isinstance(expression, int):
        return expression
    return OPERATORS[expression.operator](_digits(expression))


def count_digits(expression: Expression) -> int:
    """Return the number of digits in the expression."""
    return len(_digits(expression))


def _digits(expression: Expression) -> list[int]:
    if isinstance(expression, int):
        return [expression]
    return [digit for argument in expression.arguments for digit in _digits(argument)]


def check_task(operators: Sequence[str], depth: int) -> None:
    """Check that `generate` knows the operators and the depth.

    Raises:
        ValueError: no operator, an unknown or repeated one, or a depth out of range.
    """
    unknown = [name for name in operators if name not in OPERATORS]
    if unknown or not operators:
        what = f"have {unknown[0]!r}" if unknown else "are none"
        raise ValueError(f"operators {what}; expected some of {', '.join(OPERATORS)}")
    if len(set(operators)) != len(operators):
        raise ValueError(f"operators name one twice: {', '.join(operators)}; expected each once")
    if not 1 <= depth <= MAX_DEPTH:
        raise ValueError(f"depth is {depth}; expected 1 to {MAX_DEPTH}")


def generate(rng: random.Random, operators: Sequence[str], depth: int) -> Operation:
    """Return a random expression of exactly this depth. A list has 2 or 3 arguments, and one of them has depth − 1."""
    count = rng.randint(_MIN_ARGUMENTS, _MAX_ARGUMENTS)
    operator = rng.choice(operators)
    deepest = rng.randrange(count) if depth > 1 else None
    arguments: list[Expression] = []
    for index in range(count):
        if index == deepest:
            arguments.append(generate(rng, operators, depth - 1))
        elif depth > 1 and rng.random() < _NESTED:
            arguments.append(generate(rng, operators, rng.randint(1, depth - 1)))
        else:
            arguments.append(rng.randrange(10))
    return Operation(operator, tuple(arguments))


def distinct(count: int, *, operators: Sequence[str], depth: int, seed: int) -> list[Operation]:
    """Return `count` different random expressions, determined by `seed`.

    Raises:
        ValueError: the task is unknown (see `check_task`), or has fewer expressions.
    """
    check_task(operators, depth)
    rng = random.Random(seed)
    found: dict[Operation, None] = {}
    repeats = 0
    while len(found) < count:
        before = len(found)
        found.setdefault(generate(rng, operators, depth))
        repeats = repeats + 1 if len(found) == before else 0
        if repeats == _MAX_REPEATS:
            raise ValueError(
                f"{count} distinct expressions of {', '.join(operators)} and depth {depth} were requested, but there "
                f"are few more than {len(found)}; expected a smaller number"
            )
    return list(found)
