"""Tests of the paper's tasks: prompts and readers, data, and generated ListOps."""

import importlib
import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fused_steer.paper import answering, data, listops
from fused_steer.paper.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))
try:
    smoke = importlib.import_module("bench.paper.smoke")
finally:
    sys.path.remove(str(ROOT))

WHOLE = data.Limits()


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


def test_paper_task_reachable_reads_what_is_left_of_completions(tmp_path):
    from transformers import AutoTokenizer

    smoke.write_model(tmp_path)
    text = answering.Text(AutoTokenizer.from_pretrained(tmp_path), chat=False)  # one token a byte
    task = replace(TASKS["gsm8k"], new_tokens=20)
    answers = [
        "so\n#### 7",
        "no more is left than 7\n#### 7",
        "it is 7 and this is then too long\n#### 7",
        "7" * 20 + "\n#### 7",
    ]
    rows = [{"question": "?", "answer": answer} for answer in answers]
    assert answering.reachable(text, task, data.examples(task, rows, "")) == (1 / 4, 2 / 4)
    assert answering.reachable(text, replace(task, new_tokens=50), data.examples(task, rows, "")) == (1, 1)


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
    with pytest.raises(ValueError, match=re.escape(message)):
        data.load(name, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is no JSONL"),
        (b"\xff", "train.jsonl is no JSONL"),
        (b"[1]\n", "holds no list of rows"),
        (b"", "there are 0 training rows"),
    ],
)
def test_paper_data_file_of_another_form_is_refused(content, message, tmp_path):
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "train.jsonl").write_bytes(content)
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


#: Of 40 official rows of validation and of test: the released code's splits, by its own calls.
RELEASED = {
    "boolq": {"validation": ("validation", 0.2, "train"), "test": ("validation", 0.2, "test")},
    "winogrande": {"validation": ("validation", 0.5, "train"), "test": ("validation", 0.5, "test")},
    "arc": {"validation": ("validation", 0.5, "train"), "test": ("validation", 0.5, "test")},
    "gsm8k": {"validation": ("test", 0.2, "test"), "test": ("test", 0.2, "train")},
    "aqua": {"validation": ("validation", None, ""), "test": ("test", None, "")},
    "listops": {"validation": ("validation", None, ""), "test": ("test", None, "")},
}


@pytest.mark.parametrize("source", ["files", "hub"])
@pytest.mark.parametrize("name", RELEASED)
def test_paper_data_released_splits_are_those_of_the_released_code(name, source, tmp_path, monkeypatch):
    from datasets import Dataset, DatasetDict

    official = {split: smoke.rows(name, 40, seed) for seed, split in enumerate(data.SPLITS)}
    (tmp_path / name).mkdir()
    for split, rows in official.items():
        (tmp_path / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    hub = DatasetDict({split: Dataset.from_list(rows) for split, rows in official.items()})
    monkeypatch.setattr("datasets.load_dataset", lambda *path: hub if path == TASKS[name].hub else pytest.fail(path))
    found = data.load(name, tmp_path if source == "files" else None, WHOLE, released=True)
    expected = {"train": official["train"]}
    for split, (theirs, share, part) in RELEASED[name].items():
        rows = Dataset.from_list(official[theirs])
        if share is not None:
            rows = rows.shuffle(seed=42).train_test_split(test_size=share, seed=42)[part]
        expected[split] = rows.to_list()
    assert found == {split: data.examples(TASKS[name], rows, split) for split, rows in expected.items()}
    assert data.load(name, tmp_path, WHOLE, splits=("test",), released=True) == {"test": found["test"]}


def test_paper_data_released_splits_need_the_official_ones(tmp_path, monkeypatch):
    from datasets import Dataset, DatasetDict

    smoke.write_data(tmp_path)
    (tmp_path / "gsm8k" / "test.jsonl").unlink()
    assert data.load("gsm8k", tmp_path, WHOLE)["test"]
    with pytest.raises(FileNotFoundError, match="gsm8k has no test.jsonl, test.json or test.parquet; expected one"):
        data.load("gsm8k", tmp_path, WHOLE, released=True)
    with pytest.raises(FileNotFoundError, match="listops has no train.jsonl"):  # and none is generated
        data.load("listops", tmp_path / "boolq", WHOLE, released=True)
    (tmp_path / "boolq" / "validation.jsonl").write_text(json.dumps(smoke.rows("boolq", 1)[0]))
    with pytest.raises(ValueError, match="there are 1 validation rows; expected at least 2 to cut a split from"):
        data.load("boolq", tmp_path, WHOLE, released=True)
    hub = DatasetDict({"train": Dataset.from_list(smoke.rows("boolq", 3))})
    monkeypatch.setattr("datasets.load_dataset", lambda *_: hub)
    with pytest.raises(ValueError, match="google/boolq has no split validation, it has train; expected one"):
        data.load("boolq", None, WHOLE, released=True)


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
