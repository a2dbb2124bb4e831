"""Loads the examples of a task from the hub, from local files, or from a generator; splits, checks and formats them.

Local files are `<folder>/<task>/train.jsonl` (or `.json`, a list; or `.parquet`), with optional `validation` and `test`
files beside it. A missing split is 20 % of the training rows, drawn with seed 42. This is our choice: we do not have
the paper's Table 6. The released code trains on all training rows; `load(released=True)` has its splits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._hub_access import reaching_hub
from . import listops
from .tasks import TASKS, Row, Task

SPLITS = ("train", "validation", "test")
SUFFIXES = (".jsonl", ".json", ".parquet")
SHARE, SEED = 0.2, 42
#: Of each task that the released code splits: the official split that it cuts in two, the share of the second part, and
#: the split that the second part becomes. The other tasks have their official splits.
RELEASED: dict[str, tuple[str, float, str]] = {
    "boolq": ("validation", 0.2, "test"),
    "winogrande": ("validation", 0.5, "test"),
    "arc": ("validation", 0.5, "test"),
    "gsm8k": ("test", 0.2, "validation"),
}


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
    released: bool = False,
) -> dict[str, list[Example]]:
    """Load the examples of a task, by split. ListOps may be generated, see `is_generated`.

    Args:
        name: the task's, in `TASKS`.
        folder: holds `<task>/<split>.jsonl`. None: the hub.
        limits: the most rows per split.
        lengths: of generated ListOps.
        splits: the splits to load.
        released: whether to split the rows as the released code does. `folder` then needs the official splits.

    Raises:
        ValueError: a column is missing, a row's answer is not valid for the task, or the hub cannot be read.
        FileNotFoundError: `folder` has no file of a split, and no training file to cut it from.
    """
    task = TASKS[name]
    source = str(folder / name) if folder else task.hub[0]
    if is_generated(name, folder, released):
        sizes = {split: min(limits.of(split) or size, size) for split, size in listops.SIZES.items()}
        found, source = listops.rows(sizes, lengths), "generated ListOps"
    elif released:
        needed = tuple(dict.fromkeys(RELEASED[name][0] if name in RELEASED and s != "train" else s for s in splits))
        found = split_as_released(
            name,
            _local(folder / name, needed, cut=False)
            if folder
            else _hub(task, name, needed[0], dict(zip(needed, needed, strict=True))),
        )
    else:
        found = _local(folder / name, splits) if folder else _hub(task, name, splits[0])
        if not found.keys() >= set(splits):
            found = complete(found)
    return {split: examples(task, found[split][: limits.of(split)], f"{source}, {split}") for split in splits}


def is_generated(name: str, folder: Path | None, released: bool = False) -> bool:
    """Return whether `load` generates the task's rows: those of ListOps without files, not with released splits."""
    return name == "listops" and not released and (folder is None or not (folder / name).is_dir())


def _hub(task: Task, name: str, split: str, wanted: dict[str, str] | None = None) -> dict[str, list[Row]]:
    """Load a task's rows from the hub: the splits `wanted`, by the names to give them. None: those of `load`.

    split: one that is needed, for the error.
    """
    from datasets import load_dataset

    try:
        with reaching_hub(task.hub[0], "data set"):
            found = load_dataset(*task.hub)
    except Exception as error:  # it raises its own, the hub's and the network's
        reason, _, _ = " ".join(str(error).split()).partition("; expected")
        raise ValueError(
            f"{task.hub[0]} cannot be loaded ({type(error).__name__}: {reason:.200}); expected a connection to the hub"
            f", or a folder with {name}/{split}.jsonl (--data; data.train of a recipe)"
        ) from error
    if wanted is None:
        wanted = {"train": "train", "test": task.test}
        if task.test != "validation" and "validation" in found:
            wanted["validation"] = "validation"
    for split in wanted.values():
        if split not in found:
            raise ValueError(f"{task.hub[0]} has no split {split}, it has {', '.join(found)}; expected one")
    return {ours: found[theirs].to_list() for ours, theirs in wanted.items()}


def _local(folder: Path, splits: Sequence[str], cut: bool = True) -> dict[str, list[Row]]:
    """Read the files of the splits. With `cut`, all splits are read if one is missing, to cut it from the others."""
    files = {split: file for split in SPLITS for suffix in SUFFIXES if (file := folder / f"{split}{suffix}").is_file()}
    missing = [split for split in splits if split not in files]
    if missing and not (cut and "train" in files):
        names = [f"{missing[0]}{suffix}" for suffix in SUFFIXES]
        raise FileNotFoundError(f"{folder} has no {', '.join(names[:-1])} or {names[-1]}; expected one of them")
    return {split: _rows(file) for split, file in files.items() if missing or split in splits}


def _rows(file: Path) -> list[Row]:
    if file.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(file).to_pylist()
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text) if file.suffix == ".json" else list(map(json.loads, text.strip().splitlines()))
    except (ValueError, RecursionError) as error:  # ValueError also of text that is not UTF-8
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


def split_as_released(name: str, official: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Return a task's splits as the released code makes them from the official ones. It trains on all of train."""
    if name not in RELEASED or RELEASED[name][0] not in official:
        return official
    source, share, second = RELEASED[name]
    (first,) = {"validation", "test"} - {second}
    rest, part = cut(official[source], share, shuffled=True, source=source)
    return {split: rows for split, rows in official.items() if split == "train"} | {first: rest, second: part}


def cut(
    rows: Sequence[Row], share: float = SHARE, shuffled: bool = False, source: str = "training"
) -> tuple[list[Row], list[Row]]:
    """Cut the rows in two, as `Dataset.train_test_split(test_size=share, seed=42)` does.

    Args:
        shuffled: whether `Dataset.shuffle(seed=42)` comes before, as in the released code.
        source: what the rows are, for the error.
    """
    from datasets import Dataset

    if len(rows) < 2:
        raise ValueError(f"there are {len(rows)} {source} rows; expected at least 2 to cut a split from")
    found = Dataset.from_dict({"at": range(len(rows))})
    parts = (found.shuffle(seed=SEED) if shuffled else found).train_test_split(test_size=share, seed=SEED)
    rest, part = ([rows[at] for at in parts[name]["at"]] for name in ("train", "test"))
    return rest, part


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
