"""Tests of `python -m bench.paper`: prompts and readers, data, runs, and report."""

import importlib
import inspect
import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))
try:
    command, cost, data, listops, methods, report, runs, smoke, tasks = (
        importlib.import_module(f"bench.paper.{name}")
        for name in ("__main__", "cost", "data", "listops", "methods", "report", "runs", "smoke", "tasks")
    )
    from bench.paper.settings import RATES, Settings
finally:
    sys.path.remove(str(ROOT))

TASKS = tasks.TASKS
WHOLE = data.Limits()


def invoke(*arguments):
    return CliRunner().invoke(command.app, list(map(str, arguments)))


def refused(result, *parts):
    assert result.exit_code == 1, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("bench.paper: ")
    for part in parts:
        assert part in line


@pytest.fixture(scope="module")
def rows_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    smoke.write_data(folder)
    return folder


# -------------------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("name", TASKS)
def test_paper_task_reads_its_own_completion(name):
    task = TASKS[name]
    for example in data.examples(task, smoke.rows(name, 20), name):
        assert example.prompt.endswith("\n")
        assert task.is_exact(example.completion, example.answer)
        assert task.is_exact(f"{example.completion}\n\nAnd so on.", example.answer)
        assert not task.is_exact("", example.answer) and task.read("") is None


@pytest.mark.parametrize(
    ("name", "said", "answer"),
    [
        ("boolq", "Answer: False.", "false"),
        ("boolq", "It is true, not false", "true"),
        ("boolq", "untrue", None),
        ("winogrande", "Answer: Option2.", 2),
        ("winogrande", "answer - the Option 1, not Option 2", 1),
        ("winogrande", "Option1", None),
        ("listops", "<answer> 7 </answer>", 7),
        ("listops", "<answer>seven</answer>", None),
        ("listops", "7", None),
        ("gsm8k", "2 + 3 = 5\nAnswer: 1,205", 1205.0),
        ("gsm8k", "Answer: 3\nAnswer: 1200", 1200.0),
        ("gsm8k", "Answer: none, 4 or 5.5", 4.0),
        ("gsm8k", "so it is 4 or -5.5", -5.5),
        ("arc", "Answer: (c) water.", "C"),
        ("arc", "it is B", "B"),
        ("arc", "A or B", None),
        ("aqua", "so\nAnswer: D.", "D"),
        ("aqua", "Answer choice B", "B"),
        ("aqua", "A or B", "B"),
    ],
)
def test_paper_task_reads_answers(name, said, answer):
    assert TASKS[name].read(said) == answer


def test_paper_task_keeps_the_released_readers_that_misread():
    assert not TASKS["gsm8k"].is_exact("Answer: 1200", 1200.0, as_released=True)
    assert TASKS["gsm8k"].is_exact("Answer: 1,200", 1200.0, as_released=True)
    assert not TASKS["aqua"].is_exact("Answer choice B", "B", as_released=True)
    assert TASKS["boolq"].is_exact("Answer: True.", "true", as_released=True)


# --------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("name", "column", "value", "message"),
    [
        ("boolq", "passage", None, "has no column passage in row 1; expected question, passage, answer, it has"),
        ("winogrande", "answer", "", "row 1: the answer is ''; expected one of '1', '2'"),
        ("gsm8k", "answer", "it is 7", "row 1: the answer ends in 'it is 7'; expected '#### ' and a number"),
        ("arc", "answerKey", "Z", "row 1: the answer is 'Z'; expected one of 'A', 'B', 'C', 'D'"),
        ("aqua", "correct", "F", "row 1: the answer is 'F'; expected one of 'A'"),
        ("listops", "Target", "x", "row 1: invalid literal for int()"),
    ],
)
def test_paper_data_row_of_another_form_is_refused(name, column, value, message, tmp_path):
    row = smoke.rows(name, 1)[0]
    row = {k: v for k, v in row.items() if k != column} | ({} if value is None else {column: value})
    (tmp_path / name).mkdir()
    (tmp_path / name / "train.jsonl").write_text((json.dumps(row) + "\n") * 5)
    refused(invoke("run", "--model", "tiny", "--tasks", name, "--data", tmp_path, "--out", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is no JSONL"), ("[1]\n", "holds no list of rows"), ("", "there are 0 training rows")],
)
def test_paper_data_file_of_another_form_is_refused(content, message, tmp_path):
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "train.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        data.load("boolq", tmp_path, WHOLE)
    with pytest.raises(FileNotFoundError, match="has no train.jsonl, train.json or train.parquet; expected one"):
        data.load("arc", tmp_path, WHOLE)


def test_paper_data_files_of_all_kinds_hold_the_same(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = smoke.rows("arc", 5)
    for number, suffix in enumerate(("jsonl", "json", "parquet")):
        folder = tmp_path / str(number) / "arc"
        folder.mkdir(parents=True)
        for split in data.SPLITS:
            file = folder / f"{split}.{suffix}"
            if suffix == "parquet":
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
            else:
                file.write_text(json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows)))
    first, second, third = (data.load("arc", tmp_path / str(number), WHOLE) for number in range(3))
    assert first == second == third and len(first["test"]) == 5


def test_paper_data_missing_splits_are_cut_from_the_training_rows():
    from datasets import Dataset

    rows = [{"n": n} for n in range(50)]
    found = data.complete({"train": rows})
    assert {split: len(part) for split, part in found.items()} == {"train": 32, "validation": 8, "test": 10}
    assert sorted(row["n"] for part in found.values() for row in part) == list(range(50))
    expected = Dataset.from_list(rows).train_test_split(test_size=0.2, seed=42)
    assert found["test"] == expected["test"].to_list()
    given = data.complete({"train": rows, "test": rows[:3]})
    assert given["test"] == rows[:3] and len(given["validation"]) == 10


def test_paper_data_limits_take_the_first_rows(rows_folder):
    whole, part = (data.load("boolq", rows_folder, limits) for limits in (WHOLE, data.Limits(3, 2)))
    assert {split: len(rows) for split, rows in part.items()} == {"train": 3, "validation": 2, "test": 2}
    assert all(part[split] == whole[split][: len(part[split])] for split in part)


@pytest.mark.parametrize("lengths", [(4, 64), (500, 2000)])
def test_paper_listops_is_of_the_wanted_length_and_never_twice(lengths):
    found = listops.rows({"train": 20, "validation": 5, "test": 5}, lengths)
    sources = [row["Source"] for rows in found.values() for row in rows]
    assert len(set(sources)) == 30
    assert all(lengths[0] <= len(source.split()) <= lengths[1] for source in sources)
    assert found == listops.rows({"train": 20, "validation": 5, "test": 5}, lengths)
    assert set(re.findall(r"[A-Z]+", " ".join(sources))) == {"MAX", "MIN", "MED", "SM"}
    assert max(map(depth, sources)) <= listops.DEPTH
    assert all(row["Target"] == value(row["Source"]) for rows in found.values() for row in rows)


def depth(source):
    return max(itertools.accumulate((word[0] == "[") - (word == "]") for word in source.split()))


def value(source):
    """Evaluate a ListOps expression by a stack, with Long Range Arena's operators."""
    stack = []
    for word in source.split():
        if word == "]":
            values = []
            while isinstance(stack[-1], int):
                values.append(stack.pop())
            values.sort()
            middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) // 2
            stack[-1] = {"[MAX": values[-1], "[MIN": values[0], "[MED": middle, "[SM": sum(values) % 10}[stack[-1]]
        else:
            stack.append(word if word[0] == "[" else int(word))
    return stack[0]


def test_paper_listops_of_no_length_is_refused():
    for lengths in ((3, 64), (9, 8)):
        with pytest.raises(ValueError, match="expected two numbers, the first at least 4"):
            listops.rows({"train": 1}, lengths)


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
    assert content["trained"] == 2 * 2 * 8 * 32 and content["training_rows"] == 16 and content["too_long"] == 0
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


def test_paper_run_of_a_broken_results_file_is_refused(tmp_path):
    settings = Settings("tiny")
    key = runs.Key("boolq", "lora", 1e-3, 0)
    key.file(tmp_path).parent.mkdir(parents=True)
    for content, message in (("{", "is no JSON"), ('{"schema": 7}', "has schema 7; expected one of bench.paper, 1")):
        key.file(tmp_path).write_text(content)
        with pytest.raises(ValueError, match=message):
            runs.found(tmp_path, key, settings)


def result_of(key, validation, test=0.0, **others):
    split = {"exact": "0011", "unreadable": 1, "unreadable_shown": ["|?*"], "accuracy_as_released": test}
    return {
        "schema": runs.SCHEMA,
        "key": vars(key),
        "settings": {},
        "machine": {"device": "a CPU", "versions": {"torch": "2"}, "commit": "c0ffee"},
        "validation": split | {"accuracy": validation},
        "test": split | {"accuracy": test},
        "trained": 1,
        "parameters": 1000,
        "pictures": [],
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
        (("--dtype", "int8"), "dtype is 'int8'; expected float32"),
        (("--tasks", "listops", "--train-limit", "5", "--evaluated-limit", "5"), "nowhere"),
    ],
)
def test_paper_run_of_what_is_not_known_is_refused(arguments, message, tmp_path):
    result = invoke("run", "--model", tmp_path / "nowhere", "--out", tmp_path / "out", *arguments)
    refused(result, message)
    assert not (tmp_path / "out").exists()
    refused(invoke("run"), "no model is named; expected --model or --smoke")


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
    refused(invoke("report", "--out", tmp_path / "none"), "has no results; expected those of")
    assert not (tmp_path / "none").exists()


def test_paper_published_figures_have_a_source():
    paper = report.published()
    for entry in [*paper["headline"], *paper["accuracy"]]:
        assert entry["source"] in paper["sources"]
    for entry in paper["accuracy"]:
        assert entry["task"] in TASKS
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
    assert RATES.keys() == methods.METHODS.keys()


def test_paper_smoke_has_rows_of_every_task(tmp_path):
    smoke.write_data(tmp_path)
    for name in TASKS:
        assert {split: len(rows) for split, rows in data.load(name, tmp_path, WHOLE).items()} == smoke.ROWS
