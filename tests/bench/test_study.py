"""Tests of `python -m bench.study` on a tiny random model: forms, runs, resuming, the choice of rates, the report."""

import copy
import dataclasses
import functools
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import HIDDEN, LAYERS, build, refused
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from fused_steer.tools.demo import Encoder, complete, is_exact
from fused_steer.tools.listops import OPERATORS, count_digits

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))
try:
    study = importlib.import_module("bench.study")
finally:
    sys.path.remove(str(ROOT))

WORDS = ["<eos>", "<unk>", "=", "]", "[", *OPERATORS, *map(str, range(10))]
SETTINGS = study.Settings("tiny", steps=2, batch_size=3, validated=5, tested=7, seeds=2)


@pytest.fixture(scope="module")
def encoder():
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    return Encoder(fast, torch.device("cpu"))


@pytest.fixture
def inputs(encoder):
    return encoder.inputs([encoder.prompt(expression) for expression in study.draw(SETTINGS)[0]])


def test_study_expressions_are_short_and_none_occurs_twice():
    validation, tested, parts = study.draw(SETTINGS)
    assert [len(validation), len(tested), *map(len, parts)] == [5, 7, 6, 6]
    every = [*validation, *tested, *parts[0], *parts[1]]
    assert len(set(every)) == len(every) and {count_digits(expression) for expression in every} <= {2, 3}
    impossible = dataclasses.replace(SETTINGS, tested=300, digits=2)  # of two digits there are 200
    for settings in (impossible, dataclasses.replace(SETTINGS, steps=10**9)):  # and of three some 8000
        with refused(ValueError, "few more than", "expected a smaller number"):
            study.draw(settings)


@pytest.mark.parametrize("name", study.FORMS)
def test_study_every_form_starts_at_the_model_and_trains_all_its_parameters(name, encoder, inputs):
    form, base = study.FORMS[name], build(eos_token_id=0)
    torch.manual_seed(0)
    with torch.no_grad():
        before = base(**inputs).logits
    model, method, stages = study.attach(form, copy.deepcopy(base), 1e-2, inputs)
    with torch.no_grad():
        after = model(**inputs).logits
    if form.method not in ("lofit", "jola"):  # these begin with small random values
        assert torch.allclose(after, before, atol=1e-5)
    _, _, parts = study.draw(dataclasses.replace(SETTINGS, steps=4))  # LoRA's first step has a rate of 0
    batches = [encoder.training_batch(parts[0][i : i + 3]) for i in range(0, 12, 3)]
    for stage in stages:
        start = [parameter.detach().clone() for parameter in stage.parameters]
        losses = study.train(model, method, stage, batches)
        assert len(losses) == 4
        moved = [not torch.equal(a, b) for a, b in zip(start, stage.parameters, strict=True)]
        if form.method == "lofit":  # its scales are reset after they chose the heads
            continue
        assert all(moved)


def test_study_forms_at_other_sites_have_the_parameters_of_the_block(encoder, inputs):
    counts = []
    for name in study.GROUPS["sites"] + study.GROUPS["activations"]:
        _, _, stages = study.attach(study.FORMS[name], build(), 1e-2, inputs)
        counts.append(stages[-1].trained)
    assert set(counts) == {2 * 8 * HIDDEN * LAYERS}


@pytest.mark.parametrize("activation", ["silu", "identity"])
def test_study_normalised_read(activation):
    torch.manual_seed(0)
    module = study.normalised_read(HIDDEN, 8, activation)
    assert module.down.weight.abs().max() <= HIDDEN**-0.5 and not module.up.weight.any()
    torch.nn.init.normal_(module.up.weight)
    h = 50 * torch.randn(2, 3, HIDDEN)
    read = F.linear(h / h.pow(2).mean(-1, keepdim=True).sqrt(), module.down.weight)
    expected = h + F.linear(F.silu(read) if activation == "silu" else read, module.up.weight)
    assert torch.allclose(module(h), expected, rtol=1e-5)


def test_study_w1_by_the_stream(inputs):
    """Every layer's W1 becomes smaller by the median rms of what the layer reads, measured by plain hooks."""
    torch.manual_seed(0)
    plain, _, _ = study.attach(study.FORMS["silu"], build(), 1e-2, inputs)
    torch.manual_seed(0)
    form = study.FORMS["silu-stream"]
    model, _, _ = study.attach(form, build(), 1e-2, inputs)
    kept, outputs = inputs["attention_mask"].bool(), []
    handles = [
        layer.register_forward_hook(lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for layer in plain.model.layers
    ]
    with torch.no_grad():
        plain(**inputs)
    for handle in handles:
        handle.remove()
    for one, other, h in zip(*map(study.steered_modules, (plain, model)), outputs, strict=True):
        factor = h[kept].pow(2).mean(1).sqrt().median()
        a, b = (module.adapter("default").down.weight for module in (one, other))
        assert torch.allclose(a, b * factor, rtol=1e-5)


@pytest.mark.parametrize("name", ["identity", "post_mlp", "pre_mlp", "post_attention", "silu-normalised"])
def test_study_shifts_are_the_difference_of_two_runs(name, inputs):
    """The shift of the first layer, against a run of the same layer with W2 = 0."""
    torch.manual_seed(0)
    model, _, _ = study.attach(study.FORMS[name], build(), 1e-2, inputs)
    modules = study.steered_modules(model)
    assert len(modules) == LAYERS
    assert study.shift_medians(model, inputs) == [0.0] * LAYERS
    up = modules[0].up if name == "silu-normalised" else modules[0].adapter("default").up
    outputs = []
    handle = modules[0].register_forward_hook(lambda module, args, output: outputs.append((args, output)))
    with torch.no_grad():
        model(**inputs)
        up.weight.normal_()
        model(**inputs)
    handle.remove()
    kept = inputs["attention_mask"].bool()
    shift = (outputs[1][1] - outputs[0][1])[kept].norm(dim=1)
    args = outputs[0][0]
    h = args[1] if getattr(modules[0], "reads", "") == "branch" else outputs[0][1]
    median = float((shift / h[kept].norm(dim=1)).median())
    assert study.shift_medians(model, inputs)[0] == pytest.approx(median, rel=1e-4)


def test_study_exact_is_what_greedy_generation_says(encoder):
    """On a model that learnt its test expressions in part, so that there are right and wrong answers."""
    torch.manual_seed(0)
    model = build(eos_token_id=0)
    _, tested, _ = study.draw(dataclasses.replace(SETTINGS, tested=60))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    from fused_steer.tools.demo import answer_loss

    for _ in range(40):
        answer_loss(model, *encoder.training_batch(tested[:30])).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = study.test(model.eval(), encoder, tested, at_once=25)
    said = complete(model, encoder, tested)
    expected = "".join(str(int(is_exact(*pair))) for pair in zip(said, tested, strict=True))
    assert found["exact"] == expected and {"0", "1"} <= set(expected)
    with torch.no_grad():
        assert found["loss"] == pytest.approx(answer_loss(model, *encoder.training_batch(tested)).item(), rel=1e-4)


# ------------------------------------------------------------------------------------------------------------ the runs


@pytest.fixture
def few(monkeypatch):
    """Two quick forms in one group."""
    groups = {"activations": ("identity", "silu"), "sites": (), "rivals": ("identity", "vector"), "starts": ()}
    monkeypatch.setattr(study, "GROUPS", groups)


def test_study_runs_resume_and_the_report(few, encoder, tmp_path, monkeypatch):
    file = study.results_file(tmp_path)
    load = functools.partial(lambda: (build(eos_token_id=0), encoder))
    run_one, count = study.run_one, []

    def stops(*args):
        count.append(args[3:5])
        if len(count) == 3:
            raise KeyboardInterrupt
        return run_one(*args)

    monkeypatch.setattr(study, "run_one", stops)
    with pytest.raises(KeyboardInterrupt):
        study.run_all(file, SETTINGS, ["activations"], load)
    assert len(study.load(file)["runs"]) == 2
    partial = study.report_text(study.load(file))
    assert "| SiLU | not run |" in partial and "## Activations" in partial and "## Rivals" not in partial

    total = sum(len(study.FORMS[name].rates) + 1 for name in ("identity", "silu", "vector"))
    assert study.run_all(file, SETTINGS, ["activations", "rivals"], load) == total - 2
    results = study.load(file)
    keys = [(run["form"], run["rate"], run["seed"]) for run in results["runs"]]
    assert len(set(keys)) == len(keys) == total
    for name in ("identity", "silu", "vector"):
        rates = study.FORMS[name].rates
        ran = [(rate, seed) for form, rate, seed in keys if form == name]
        best = study.best_rate(study.runs_of(results, name))
        assert sorted(ran) == sorted([(rate, 0) for rate in rates] + [(best, 1)])
    again = study.run_all(file, SETTINGS, ["activations", "rivals"], lambda: pytest.fail("nothing is left to do"))
    assert again == 0
    text = study.report_text(results)
    assert "not run" not in text and "## Rivals" in text and "## Starts" not in text
    other = dataclasses.replace(SETTINGS, steps=3)
    with refused(ValueError, "steps is 3 but 2 in "):
        study.run_all(file, other, ["activations"], load)


def test_study_the_same_seed_gives_the_same_run(encoder):
    model = build(eos_token_id=0)
    runs = [study.run_one(model, encoder, study.FORMS["silu"], 1e-2, seed, SETTINGS) for seed in (1, 1, 0)]
    for run in runs:
        del run["seconds"]
    assert runs[0] == runs[1] and runs[0]["losses"] != runs[2]["losses"] and runs[0]["validation"] is None


def run_of(form, rate, seed, test, validation=None, loss=1.0):
    return {
        "form": form,
        "rate": rate,
        "seed": seed,
        "trained": 10,
        "validation": None if validation is None else {"exact": validation, "loss": loss},
        "test": {"exact": test, "loss": 0.5},
        "shifts": [1e-2, 1e-4],
        "seconds": 1.0,
        "commit": "abc",
    }


def test_study_the_rate_is_chosen_by_validation_alone():
    """The test's answers are best at the rate that validates worst."""
    runs = [run_of("silu", 1e-3, 0, "1111", "0001"), run_of("silu", 2e-3, 0, "0000", "0011")]
    assert study.best_rate(runs) == 2e-3
    runs.append(run_of("silu", 3e-3, 0, "0000", "0011", loss=0.9))
    assert study.best_rate(runs) == 3e-3  # a tie
    assert [run["rate"] for run in study.chosen_runs({"runs": runs}, "silu")] == [3e-3]


def test_study_a_row_and_its_verdict():
    ours = [run_of("identity", 1e-3, 0, "1" * 30 + "0" * 10, "1"), run_of("identity", 1e-3, 1, "1" * 32 + "0" * 8)]
    theirs = [run_of("silu", 1e-3, 0, "0" * 30 + "1" * 10, "1"), run_of("silu", 1e-3, 1, "1" * 6 + "0" * 34)]
    results = {"runs": ours + theirs}
    row = study.row_of(results, "identity", "silu")
    assert row[1:5] == ["10", "0.001 of 0.001", "**77.5 (75.0–80.0)**", "75.0, 80.0"] and row[7] == "1, 1"
    assert row[6].startswith("+57.5 ± ") and row[6].endswith(", better")
    assert study.row_of(results, "silu", "identity")[6].endswith(", worse")
    assert study.rows_of_rates(results, "identity") == [["identity", "0.001", "100.0", "1.000", "75.0", "1"]]
    one = {"runs": [ours[0], theirs[0]]}
    assert study.row_of(one, "identity", "silu")[6].endswith(", not told apart")  # one seed decides nothing


def test_study_the_command_refuses_and_reports(tmp_path):
    def invoke(*arguments):
        return CliRunner().invoke(study.app, list(map(str, arguments)))

    result = invoke("--groups", "all", "--out", tmp_path)
    assert result.exit_code == 1 and "groups is 'all'; expected some of activations" in result.output
    assert invoke("--seeds", 0, "--out", tmp_path).output.count("seeds is 0; expected at least 1") == 1
    result = invoke("--report", "--out", tmp_path, "--docs", tmp_path)
    assert result.exit_code == 1 and result.output.startswith("bench.study: ") and "listops-cpu.json" in result.output
    file = study.results_file(tmp_path)
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"schema": 0}))
    assert "has schema 0; expected one of bench.study, 1" in invoke("--report", "--out", tmp_path).output


def test_study_the_page_is_that_of_the_results():
    file = study.results_file(study.FOLDER)
    assert (ROOT / "docs" / "study-listops.md").read_text(encoding="utf-8") == study.report_text(study.load(file))
