"""`python -m bench.fit` on a tiny random model: runs, report, nothing done twice; and docs/theory.md is up to date."""

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest
from models import LAYERS, build
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from fused_steer.adapters.files import read_adapter
from fused_steer.tools.listops import OPERATORS

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))
try:
    fit = importlib.import_module("bench.fit")
    pages = importlib.import_module("bench.report.pages")
finally:
    sys.path.remove(str(ROOT))

WORDS = ["<eos>", "<unk>", "=", "]", "[", *OPERATORS, *map(str, range(10))]


@pytest.fixture(scope="module")
def invoke(tmp_path_factory):
    """Runs the command on a tiny model, in one folder."""
    folder = tmp_path_factory.mktemp("fit")
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    build(eos_token_id=0).save_pretrained(folder / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(
        folder / "model"
    )

    def invoke(*arguments):
        sizes = ("--steps", 2, "--tested", 6, "--fitted", 5, "--model", folder / "model")
        where = ("--out", folder, "--work", folder / "work")
        return CliRunner().invoke(fit.app, list(map(str, (*where, *sizes, *arguments))))

    return invoke, folder


def test_fit_bench_runs_once_and_reports(invoke, monkeypatch):
    run, folder = invoke
    result = run("--ranks", "1,2", "--other-ranks", "2")
    assert result.exit_code == 0, result.output
    results = fit.load(fit.results_file(folder))
    assert [(one["site"], one["rank"], one["sequence"]) for one in results["runs"]] == [
        ("post_block", 1, True),
        ("post_block", 2, True),
        ("post_block", 1, False),
        ("post_block", 2, False),
        ("post_mlp", 2, True),
        ("pre_mlp", 2, True),
        ("post_attention", 2, True),
    ]
    assert results["machine"]["commit"] and len(results["model"]["tuned"]) == 6
    for one in results["runs"]:
        assert len(one["exact"]) == 6 and len(one["fit"]["layers"]) == LAYERS
        assert one["fit"]["tokens_held_out"] and one["parameters"] == LAYERS * (2 * 32 * one["rank"] + 32)
    for site in ("post_block", "post_attention"):
        saved = read_adapter(folder / "work" / f"{site}-rank-2")
        assert (saved.config.rank, saved.config.up_bias, saved.config.site) == (2, True, site)

    docs = folder / "docs"
    docs.mkdir()
    (docs / "theory.md").write_text("before\n<!-- fit -->\nold\n<!-- /fit -->\nafter\n")
    assert run("--report", "--docs", docs).exit_code == 0
    text = (docs / "theory.md").read_text()
    for part in ("| fitted, rank 2 |", "| `post_attention` |", "after"):
        assert part in text
    assert "old" not in text and text.startswith("before")
    pictures = sorted(file.name for file in (docs / "theory").iterdir())
    assert pictures == ["accuracy-by-rank.svg", "accuracy-by-site.svg", "first-order.svg", "missed-by-layer.svg"]

    some = {**results, "runs": results["runs"][:5]}  # stopped after the first of the other sites
    assert "| `pre_mlp` | – |" in fit.report_text(some)
    assert [series.label for series in fit.plots(some)[1].panels[0].series] == ["post_block", "post_mlp"]

    before = fit.results_file(folder).read_bytes()
    monkeypatch.setattr(fit, "fit_ranks", lambda *arguments: pytest.fail("a fit was repeated"))
    assert "all 7 fits are in" in run("--ranks", "1,2", "--other-ranks", "2").stdout
    assert fit.results_file(folder).read_bytes() == before
    refused = run("--ranks", "3", "--fitted", "4")
    assert refused.exit_code == 1 and refused.stderr.startswith("bench.fit: the settings are ")


def test_fit_bench_no_expression_has_two_uses():
    settings = fit.Settings(steps=3, batch_size=4, tested=6, fitted=5)
    parts = fit.draw_expressions(settings)
    assert [len(part) for part in parts] == [6, 12, 5]
    assert len({one for part in parts for one in part}) == 23


def test_fit_bench_the_picture_of_the_theorem_falls_after_the_block_alone():
    lines = fit.theorem_plot().panels[0].series
    for line in lines:
        (first, *_), *_, (last, *_) = [(y, x) for x, y, *_ in line.points]
        assert (last < 0.01 * first) == (line.label == "steered after the block"), line.label
        assert last < 0.01 or last > 0.1


def test_fit_bench_the_page_is_that_of_the_results():
    """`python -m bench.fit --report` has nothing to change."""
    files = fit.render(fit.results_file(ROOT / "bench" / "results"), ROOT / "docs")
    assert pages.differing(files) == []
    results = fit.load(fit.results_file(ROOT / "bench" / "results"))
    assert results["settings"] == dataclasses.asdict(fit.Settings())
