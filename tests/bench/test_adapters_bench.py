"""Tests of `python -m bench.adapters`: batches with few and many adapters are answered in turn, and checked."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import typer
from models import refused
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
try:
    from bench import adapters
finally:
    sys.path.remove(str(ROOT))

TINY = ["--layers", 1, "--rows", 4, "--counts", "2,4", "--length", 5, "--rounds", 2]


def invoke(*arguments: object) -> tuple[int, str, str]:
    app = typer.Typer()
    app.command()(adapters.main)
    result = CliRunner().invoke(app, list(map(str, arguments)))
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("call", adapters.CALLS)
def test_adapters_bench_each_number_is_measured_in_each_round(tmp_path, call):
    # transformers' continuous batching takes seconds for each call.
    rounds, counts = (2, [0, 1, 2, 4]) if call == "generate" else (1, [0, 1, 4])
    given = ["--rounds", rounds, "--counts", ",".join(map(str, counts[2:]))]
    code, out, err = invoke(*TINY, *given, "--call", call, "--out", tmp_path / "samples.json")
    assert code == 0, err
    found = json.loads((tmp_path / "samples.json").read_text())
    assert {count: len(samples) for count, samples in found["samples"].items()} == {str(n): rounds for n in counts}
    assert found["case"]["adapters"] == 4 and found["call"] == call and found["machine"]["versions"]["torch"]
    assert "no adapter:" in out and "1.000x" in out and "4 adapters:" in out


def test_adapters_bench_ratios_are_taken_within_a_round():
    found = adapters.ratios({0: [1.0, 2.0, 9.0], 1: [2.0, 4.0, 6.0], 2: [4.0, 8.0, 6.0]})
    assert found == {0: 0.5, 1: 1.0, 2: 2.0}


def test_adapters_bench_wrong_answers_are_no_measurement(monkeypatch):
    monkeypatch.setattr(adapters, "answer", lambda model, tokens, call: [[0]] * len(tokens))
    code, out, err = invoke(*TINY)
    assert code == 1 and not out and err.count("\n") == 1
    assert "wrong: 4 of 4 rows have the unsteered tokens among 4 adapters" in err


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--rounds", 0], "rounds is 0; expected at least 1"),
        (["--call", "chat"], "call is 'chat'; expected generate or generate_batch"),
        (["--counts", "x"], "counts is 'x'; expected numbers of adapters"),
        (["--counts", "300"], "counts is '300'; expected 1 to 256"),
        (["--geometry", "none"], "geometry is 'none'; expected one of"),
    ],
    ids=str,
)
def test_adapters_bench_bad_options_are_one_line(options, part):
    code, out, err = invoke(*options)
    assert code == 1 and not out and part in err and err.count("\n") == 1


def test_adapters_bench_rows_of_one_adapter_must_agree():
    with refused(ValueError, "other tokens among 1 adapters than among 2"):
        adapters.check({0: [[9], [9]], 1: [[1], [1]], 2: [[2], [3]]}, exact=True)
    adapters.check({0: [[9], [9]], 1: [[1], [1]], 2: [[1], [3]]}, exact=True)
    assert adapters.names_of(3, 2) == ["0", "1", "0"] and adapters.names_of(2, 0) == [None, None]
