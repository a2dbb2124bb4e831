"""The steering options of a served request: what is read, and the gain of each token that comes of it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from fused_steer.serving.options import packed, read_options, steered_ranges, token_gains, unpacked

POSITIONS = ["all", "prompt", "generated", "last", ["first", 3], ["last", 2], ["last", 99]]
POSITIONS += ["last_prompt", "first_3", "last_2", "first_1+last_2", "last_prompt+generated"]


def steered(positions, prompt: int, position: int) -> bool:
    """Whether a token is steered, by the words of the documentation."""
    if isinstance(positions, str) and "+" in positions:
        return any(steered(part, prompt, position) for part in positions.split("+"))
    if positions == "last_prompt":
        positions = "last"
    if isinstance(positions, str) and "_" in positions:
        side, count = positions.split("_")
        positions = [side, int(count)]
    if positions == "all":
        return True
    if positions in ("prompt", "generated"):
        return (position < prompt) == (positions == "prompt")
    side, count = ("last", 1) if positions == "last" else positions
    return position < count and position < prompt if side == "first" else prompt - count <= position < prompt


@pytest.mark.parametrize("as_text", [False, True], ids=["object", "text"])
def test_options_read_and_passed_on(as_text):
    for given in ({}, {"scale": 0.5}, {"positions": "last"}, {"scale": -2, "positions": ["last", 3]}):
        found = read_options(json.dumps(given) if as_text else given)
        assert found.scale == given.get("scale")
        assert unpacked(json.loads(json.dumps(packed(found)))) == found


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{", "expected an object, or its JSON text"),
        ("[" * 100_000, "expected an object, or its JSON text"),
        ([1], "expected an object with scale and positions"),
        ("3", "expected an object with scale and positions"),
        ({"strength": 1}, "steering has strength; expected scale and positions alone"),
        ({"scale": "strong"}, "scale is 'strong'"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"scale": 1e39}, "scale is 1e[+]39"),
        ({"scale": [1, 2]}, "expected 1"),
        ({"positions": "everywhere"}, "positions has 'everywhere'"),
        ({"positions": ["last", 0]}, "at least 1"),
        ({"positions": ["all", "prompt"]}, "positions has"),
        ({"positions": {"last": 1}}, "positions has"),
        ({"positions": None}, "positions has None"),
    ],
)
def test_options_refused(given, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        read_options(given)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_options_token_gains():
    """Requests of all kinds in one batch, in chunks of the prompt, across its end, and behind it."""
    generator = np.random.default_rng()
    for _ in range(50):
        rows = []
        for _ in range(generator.integers(1, 6)):
            which = int(generator.integers(len(POSITIONS) + 1))
            positions = None if which == len(POSITIONS) else POSITIONS[which]
            prompt, computed, count = (int(n) for n in generator.integers(1, 12, 3))
            rows.append((float(generator.normal()), positions, prompt, computed - 1, count))
        found = token_gains(
            [row[0] for row in rows],
            [None if row[1] is None else read_options({"positions": row[1]}) for row in rows],
            *zip(*(row[2:] for row in rows), strict=True),
        )
        right = [
            np.float32(scale if positions is None or steered(positions, prompt, computed + token) else 0)
            for scale, positions, prompt, computed, count in rows
            for token in range(count)
        ]
        assert found.dtype == np.float32 and found.tolist() == right


def test_options_steered_ranges_of_each_part_of_a_sequence():
    for positions in POSITIONS:
        options = read_options({"positions": positions})
        for prompt in (1, 2, 5):
            for start, end in itertools.combinations(range(9), 2):
                found = steered_ranges(options, prompt, start, end)
                tokens = [token for first, behind in found for token in range(first, behind)]
                assert tokens == [token for token in range(start, end) if steered(positions, prompt, token)]
                assert all(left[1] < right[0] for left, right in itertools.pairwise(found))
                assert steered_ranges(replace(options, prompt=prompt), 7, start, end) == found


def test_options_of_a_row_whose_prompt_has_generated_tokens():
    for positions in POSITIONS:
        options = read_options({"positions": positions})
        beam = replace(options, prompt=4)
        assert unpacked(json.loads(json.dumps(packed(beam)))) == beam
        found = token_gains([2.0, 2.0], [options, beam], [4, 7], [0, 0], [7, 7])
        assert np.array_equal(found[:7], found[7:])
