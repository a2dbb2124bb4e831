"""Outcomes of a model's answers on the paper's six tasks, document by document."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..paper.answering import Text, answers
from ..paper.data import Example, load
from ..paper.tasks import TASKS

#: What names a task of the paper, as against one of lm-evaluation-harness: `paper:gsm8k`.
PREFIX = "paper:"
#: All six tasks.
ALL = "paper"


def paper_tasks(tasks: Sequence[str]) -> list[str]:
    """Return which of the paper's tasks are named, by their names in `TASKS`, each once.

    Raises:
        ValueError: the paper has no such task.
    """
    found: list[str] = []
    for task in tasks:
        if task == ALL:
            found += TASKS
        elif task.startswith(PREFIX):
            name = task.removeprefix(PREFIX)
            if name not in TASKS:
                near = difflib.get_close_matches(name, TASKS, 1)
                raise ValueError(
                    f"the task is {task!r}; expected {PREFIX} and one of {', '.join(TASKS)}"
                    + (f" (did you mean {PREFIX}{near[0]}?)" if near else "")
                )
            found.append(name)
    return list(dict.fromkeys(found))


def load_documents(
    names: Sequence[str], folder: Path | None = None, limit: int | None = None
) -> dict[str, list[Example]]:
    """Return each task's examples to test on.

    Args:
        names: from `paper_tasks`.
        folder: holds `<task>/test.jsonl`, as docs/paper.md says. None: the hub's rows, and generated ListOps.
        limit: only the first so many.

    Raises:
        FileNotFoundError, ValueError: a task's file is missing, or a row does not have the task's form.
    """
    return {name: load(name, folder, splits=("test",))["test"][:limit] for name in names}


def outcomes(
    model: Any, tokenizer: Any, documents: Mapping[str, Sequence[Example]], *, batch_size: int = 8, chat: bool = False
) -> dict[tuple[str, str, str], dict[int, float]]:
    """Return for each task, metric and filter the outcome of each document, 1 or 0.

    The metrics are exact_match; as_released, by the released code's reader, where that differs; and unreadable.

    Args:
        model: a causal language model, steered or not.
        tokenizer: its tokenizer. If it has no token to pad with, the end-of-sequence token is used.
        documents: from `load_documents`.
        batch_size: documents at a time.
        chat: whether prompts are in the tokenizer's chat template.
    """
    if tokenizer.pad_token_id is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for name, examples in documents.items():
        task = TASKS[name]
        for number, (said, example) in enumerate(
            zip(answers(model, Text(tokenizer, chat), task, examples, batch_size, name), examples, strict=True)
        ):
            metrics = {"exact_match": task.is_exact(said, example.answer)}
            if task.read_as_released is not None:
                metrics["as_released"] = task.is_exact(said, example.answer, as_released=True)
            metrics["unreadable"] = task.read(said) is None
            for metric, value in metrics.items():
                found.setdefault((PREFIX + name, metric, "none"), {})[number] = float(value)
    return found
