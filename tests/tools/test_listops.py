"""Tests of ListOps: the values of expressions, and the generator's draws."""

import random

import pytest

from fused_steer.tools.listops import (
    MAX_DEPTH,
    OPERATORS,
    Operation,
    depth,
    distinct,
    evaluate,
    generate,
    ignoring_brackets,
)


def op(name, *arguments) -> Operation:
    return Operation(name, arguments)


# Computed by hand: expression, its text, its value, its value without the inner brackets, its depth.
KNOWN = [
    (7, "7", 7, 7, 0),
    (op("MAX", 2, 9, op("MIN", 4, 7), 0), "[MAX 2 9 [MIN 4 7 ] 0 ]", 9, 9, 2),
    (op("MIN", op("MAX", 3, 8), 5), "[MIN [MAX 3 8 ] 5 ]", 5, 3, 2),
    (op("MAX", 1, op("MIN", 6, 2, op("MAX", 9, 0))), "[MAX 1 [MIN 6 2 [MAX 9 0 ] ] ]", 2, 9, 3),
    (op("MED", 9, 1, 4), "[MED 9 1 4 ]", 4, 4, 1),
    (op("MED", 1, 2), "[MED 1 2 ]", 1, 1, 1),  # 1.5, rounded down
    (op("MED", 8, 2, 6, 5), "[MED 8 2 6 5 ]", 5, 5, 1),  # 5.5
    (op("SM", 9, 9, 9), "[SM 9 9 9 ]", 7, 7, 1),
    (op("SM", 5, op("SM", 5, 3), 9), "[SM 5 [SM 5 3 ] 9 ]", 2, 2, 2),
    (op("SM", op("MAX", 4, 6), op("MED", 1, 2, 9)), "[SM [MAX 4 6 ] [MED 1 2 9 ] ]", 8, 2, 2),
]


@pytest.mark.parametrize(("expression", "text", "value", "flat", "nesting"), KNOWN, ids=[row[1] for row in KNOWN])
def test_listops_known_expressions(expression, text, value, flat, nesting):
    assert str(expression) == text
    assert evaluate(expression) == value
    assert ignoring_brackets(expression) == flat
    assert depth(expression) == nesting


def parts(expression):
    yield expression
    if isinstance(expression, Operation):
        for argument in expression.arguments:
            yield from parts(argument)


@pytest.mark.parametrize("nesting", [1, 2, 3, MAX_DEPTH])
def test_listops_generated_expressions_are_what_was_asked_for(nesting):
    operators = ["MAX", "SM"]
    expressions = [generate(random.Random(seed), operators, nesting) for seed in range(200)]
    assert {depth(expression) for expression in expressions} == {nesting}
    found = [part for expression in expressions for part in parts(expression)]
    lists = [part for part in found if isinstance(part, Operation)]
    assert {part.operator for part in lists} == set(operators)
    assert {len(part.arguments) for part in lists} == {2, 3}
    assert {part for part in found if isinstance(part, int)} == set(range(10))
    assert {evaluate(part) for part in found} <= set(range(10))


def test_listops_nested_lists_stand_anywhere():
    """Nested lists stand at any position, so that the position tells nothing about them."""
    expressions = distinct(200, operators=["MAX", "MIN"], depth=2, seed=0)
    for kind in (Operation, int):
        places = {i for expression in expressions for i, a in enumerate(expression.arguments) if isinstance(a, kind)}
        assert places == {0, 1, 2}


def test_listops_the_brackets_matter():
    expressions = distinct(1000, operators=["MAX", "MIN"], depth=2, seed=0)
    assert sum(ignoring_brackets(e) != evaluate(e) for e in expressions) > 250


def test_listops_distinct_expressions_are_distinct_as_text():
    texts = list(map(str, distinct(2000, operators=list(OPERATORS), depth=1, seed=0)))
    assert len(texts) == len(set(texts)) == 2000


def test_listops_the_seed_determines_the_expressions():
    first, again, other = (distinct(50, operators=["MAX", "MIN"], depth=2, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_listops_more_of_them_begin_with_the_same():
    """Drawing more expressions keeps the first ones, so held-out ones do not depend on the amount of training data."""
    few, many = (distinct(count, operators=["MAX"], depth=2, seed=0) for count in (20, 60))
    assert many[:20] == few


@pytest.mark.parametrize(
    ("operators", "nesting", "message"),
    [
        (["MAX", "AVG"], 2, "operators have 'AVG'; expected some of MAX, MIN, MED, SM"),
        ([], 2, "operators are none; expected"),
        (["MAX", "MAX"], 2, "operators name one twice"),
        (["MAX"], 0, "depth is 0; expected 1 to"),
        (["MAX"], MAX_DEPTH + 1, f"depth is {MAX_DEPTH + 1}; expected 1 to {MAX_DEPTH}"),
    ],
)
def test_listops_unknown_tasks_are_refused(operators, nesting, message):
    with pytest.raises(ValueError, match=message):
        distinct(1, operators=operators, depth=nesting, seed=0)


def test_listops_a_task_with_too_few_expressions_is_refused():
    with pytest.raises(ValueError, match="^20000 distinct expressions of MAX and depth 1 .* few more than 1"):
        distinct(20_000, operators=["MAX"], depth=1, seed=0)  # only 10² + 10³ exist
