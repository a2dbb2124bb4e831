"""Loads the examples of a task from the hub, from local files, or from a generator; splits, checks and formats them.

Local files are `<folder>/<task>/train.jsonl` (or `.json`, a list; or `.parquet`), with optional `validation` and `test`
files beside it. A missing split is cut from the training rows, 80:20 with seed 42, as the paper's Table 6 says.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import listops
from .tasks import TASKS, Row, Task

SPLITS = ("train", "validation", "test")
SUFFIXES = (".jsonl", ".json", ".parquet")
SHARE, SEED = 0.2, 42


@dataclass(frozen=True)
class Example:
    """One row of a task as text, and the correct answer."""

    prompt: str
    completion: str
    answer: Any


@dataclass(frozen=True)
class Limits:
    """The maximum number of rows per split, taken from its start (None: all rows)."""

    train: int | None = None
    evaluated: int | None = None

    def of(self, split: str) -> int | None:
        return self.train if split == "train" else self.evaluated


def load(
    name: str,
    folder: Path | None,
    limits: Limits = Limits(),
    lengths: tuple[int, int] = (4, 64),
    splits: Sequence[str] = SPLITS,
) -> dict[str, list[Example]]:
    """Load the examples of a task, by split. ListOps is generated unless `folder` has it.

    Args:
        name: the task's, in `TASKS`.
        folder: holds `<task>/<split>.jsonl`. None: the hub.
        limits: the most rows per split.
        lengths: of generated ListOps.
        splits: the splits to load.

    Raises:
        ValueError: a column is missing, a row's answer is not valid for the task, or the hub cannot be read.
        FileNotFoundError: `folder` has no file of a split, and no training file to cut it from.
    """
    task = TASKS[name]
    source = str(folder / name) if folder else task.hub[0]
    if name == "listops" and (folder is None or not (folder / name).is_dir()):
        sizes = {split: min(limits.of(split) or size, size) for split, size in listops.SIZES.items()}
        found, source = listops.rows(sizes, lengths), "generated ListOps"
    else:
        found = _local(folder / name, splits) if folder else _hub(task, name)
        if not found.keys() >= set(splits):
            found = complete(found)
    return {split: examples(task, found[split][: limits.of(split)], f"{source}, {split}") for split in splits}


def _hub(task: Task, name: str) -> dict[str, list[Row]]:
    from datasets import load_dataset

    try:
        found = load_dataset(*task.hub)
    except Exception as error:  # it raises its own, the hub's and the network's
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{task.hub[0]} cannot be loaded ({type(error).__name__}: {reason}); expected a connection to the hub, or "
            f"--data FOLDER with {name}/test.jsonl"
        ) from error
    splits = {"train": "train", "test": task.test}
    if task.test != "validation" and "validation" in found:
        splits["validation"] = "validation"
    return {ours: found[theirs].to_list() for ours, theirs in splits.items()}


def _local(folder: Path, splits: Sequence[str]) -> dict[str, list[Row]]:
    files = {split: file for split in SPLITS for suffix in SUFFIXES if (file := folder / f"{split}{suffix}").is_file()}
    missing = [split for split in splits if split not in files]
    if missing and "train" not in files:
        names = [f"{missing[0]}{suffix}" for suffix in SUFFIXES]
        raise FileNotFoundError(f"{folder} has no {', '.join(names[:-1])} or {names[-1]}; expected one of them")
    return {split: _rows(file) for split, file in files.items() if missing or split in splits}


def _rows(file: Path) -> list[Row]:
    if file.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(file).to_pylist()
    text = file.read_text(encoding="utf-8")
    try:
        found = json.loads(text) if file.suffix == ".json" else list(map(json.loads, text.strip().splitlines()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no {file.suffix[1:].upper()} ({error}); expected rows of a task") from None
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError(f"{file} holds no list of rows; expected one JSON object a row")
    return found


def complete(found: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Return all three splits; cut a missing one from the training rows, the test split first."""
    found = dict(found)
    for split in ("test", "validation"):
        if split not in found:
            found["train"], found[split] = cut(found["train"])
    return found


def cut(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Split the rows 80:20, as `Dataset.train_test_split(test_size=0.2, seed=42)` does."""
    from datasets import Dataset

    if len(rows) < 2:
        raise ValueError(f"there are {len(rows)} training rows; expected at least 2 to cut a split from")
    parts = Dataset.from_dict({"at": range(len(rows))}).train_test_split(test_size=SHARE, seed=SEED)
    train, held_out = ([rows[at] for at in parts[part]["at"]] for part in ("train", "test"))
    return train, held_out


def examples(task: Task, rows: Sequence[Row], source: str) -> list[Example]:
    """Turn the rows into examples.

    Raises:
        ValueError: there is no row, a column is missing, or a row does not have the task's form.
    """
    if not rows:
        raise ValueError(f"{source} has no rows; expected some")
    found = []
    for number, row in enumerate(rows, 1):
        missing = [name for name in task.columns if name not in row]
        if missing:
            raise ValueError(
                f"{source} has no column {', '.join(missing)} in row {number}; expected {', '.join(task.columns)}, "
                f"it has {', '.join(row)}"
            )
        try:
            found.append(Example(task.prompt(row), task.completion(row), task.answer(row)))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{source}, row {number}: {error}") from None
    return found
