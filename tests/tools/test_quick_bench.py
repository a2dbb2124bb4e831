"""Tests of `fused-steer bench`: every contender is run and compared with the first. No time is checked."""

from __future__ import annotations

import json

import torch
from command import invoke, plain_output  # noqa: F401 - an autouse fixture

from fused_steer.tools import quick_bench
from fused_steer.tools.quick_bench import Row, Size, Timings, measure

SMALL = Size(tokens=8, hidden=32, rank=2, layers=2, width=64, rounds=2, calls=1)


def test_bench_times_each_contender(monkeypatch):
    monkeypatch.setattr(quick_bench, "CPU", SMALL)
    result = invoke("bench", "--quick", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [(row["what"], row["contender"]) for row in rows] == [
        ("the op", "the residual add alone"),
        ("the op", "steered by plain PyTorch"),
        ("the op", "steered by post_block"),
        ("a prompt", "the base"),
        ("a prompt", "hooks of plain PyTorch"),
        ("a prompt", "fused-steer"),
        ("a training step", "hooks of plain PyTorch"),
        ("a training step", "fused-steer"),
    ]
    assert all(0 < row["low"] <= row["median"] <= row["high"] for row in rows)
    assert json.loads(result.stdout)["machine"]["backend"] == "torch"


def test_bench_contenders_compute_the_same(monkeypatch):
    """What is timed is worth comparing: the op's two ways agree, and both models are steered and train."""
    seen = {}
    monkeypatch.setattr(
        quick_bench, "_timed", lambda what, contenders, *_: seen.setdefault(what, contenders) and [] or []
    )
    measure(torch.device("cpu"), SMALL)
    add, plain, ours = (call() for call in seen["the op"].values())
    assert not torch.equal(add, plain)
    torch.testing.assert_close(plain, ours)
    base, hooked, patched = (call() for call in seen["a prompt"].values())
    assert torch.equal(base, patched)  # W2 is 0
    torch.testing.assert_close(base, hooked)
    for call in seen["a training step"].values():
        call()
        model = next(cell.cell_contents for cell in call.__closure__ if isinstance(cell.cell_contents, torch.nn.Module))
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == 2 * SMALL.layers and all(p.grad is not None for p in trained)


def test_bench_block_is_a_table_to_paste():
    rows = Row("the op", "a", 2.0, 1.5, 2.5), Row("the op", "b", 3.0, 2.0, 4.0), Row("a prompt", "a", 5.0, 5.0, 5.0)
    block = Timings({"machine": "mine"}, SMALL, rows).block().splitlines()
    assert block[0] == "- machine: mine" and block[2].startswith("| |")
    assert block[-2] == "| the op | b | 3.000 | 2.000 – 4.000 | 1.500 |" and block[-1].endswith("| 1.000 |")
