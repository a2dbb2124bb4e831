"""The rows of a recipe: read, checked for their columns, and brought into the form that TRL trains on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._hub_access import reaching_hub
from ..evaluation.on_paper import PREFIX
from ..paper.answering import IGNORED, Text, chat_of
from ..paper.data import Example, Limits, load
from ..tools.prompts import Prompt, is_text, is_unicode
from .recipe import Data

Row = dict[str, Any]

#: The columns of each kind of data.
COLUMNS = {
    "preference": ("prompt", "chosen", "rejected"),
    "completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "messages": ("messages",),
    "text": ("text",),
}
_OPTIONAL = {"alpaca": ("input",)}
#: The share of the rows to evaluate on, for want of another.
_HELD_OUT = 0.05

# Stanford Alpaca's prompts, for instructions with and without an input.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def read_rows(data: Data) -> tuple[str, list[Row], list[Row]]:
    """Return the kind of the data (or the task), the rows to train on, and those to evaluate on.

    Rows have TRL's columns: prompt and completion (texts, or messages), prompt, chosen and rejected, or text.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is no JSON, a row lacks a column, a template fails, or there are no rows.
        ImportError: a data set of the hub without the library datasets.
    """
    if data.task is not None:
        return _rows_of_task(data)
    assert data.train is not None  # Data.check
    if data.kind is not None and data.kind not in COLUMNS:
        raise ValueError(f"data.kind is {data.kind!r}; expected one of {', '.join(COLUMNS)}")
    if data.config is not None and all(Path(source).is_file() for source in (data.train, data.eval) if source):
        raise ValueError(f"data.config is {data.config!r}, and the data are files; expected a data set of the hub")
    rows = _filled(rows_of(data.train, data.config, data.split)[: data.max_rows], data, data.train)
    kind = _kind_of(rows[0], data, data.train)
    for key, given in (("columns", data.columns), ("template", data.template)):
        unknown = set(given) - {*COLUMNS[kind], *_OPTIONAL.get(kind, ())}
        if unknown:
            raise ValueError(f"data.{key} names {min(unknown)!r}; expected {', '.join(COLUMNS[kind])}, of kind {kind}")
    train = [_row(row, kind, data, f"row {i} of {data.train}") for i, row in enumerate(rows, 1)]
    _refuse_mixed(train, data.train)
    if data.end_of_text is not None and (kind == "preference" or not all(map(_is_plain, train))):
        raise ValueError(
            f"data.end_of_text is given with rows of kind {kind}; expected prompts and completions that are texts"
        )
    if data.eval is not None:
        others = rows_of(data.eval, data.config, data.eval_split, "validation")[: data.max_rows]
        others = _filled(others, data, data.eval)
        held_out = [_row(row, kind, data, f"row {i} of {data.eval}") for i, row in enumerate(others, 1)]
        _refuse_mixed(held_out, data.eval)
        return kind, train, held_out
    end = len(train) - int((_HELD_OUT if data.held_out is None else data.held_out) * len(train))
    return kind, train[:end], train[end:]


def _rows_of_task(data: Data) -> tuple[str, list[Row], list[Row]]:
    """Return the rows of a task of the paper: the prompts that `fused-steer eval` tests, with their completions."""
    folder = None if data.train is None else Path(data.train)
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(
            f"data.train is {folder}; expected a folder with {data.task_name}/train.jsonl, or none for the hub's rows"
        )
    limits = Limits(data.max_rows, data.max_rows)
    found = load(data.task_name, folder, limits, splits=("train", "validation"))
    train, held_out = ([_row_of_task(example, data.chat) for example in found[split]] for split in found)
    return PREFIX + data.task_name, train, held_out


def _row_of_task(example: Example, chat: bool) -> Row:
    if chat:
        answer = [{"role": "assistant", "content": example.completion}]
        return {"prompt": chat_of(example.prompt), "completion": answer}
    return {"prompt": example.prompt, "completion": example.completion}


def tokens_without_end(tokenizer: Any, rows: Sequence[Row], longest: int | None, source: str) -> list[Row]:
    """Return the tokens of rows of texts, without the end-of-sequence token that TRL would add to each.

    Tokens beyond `longest` are cut off. A row without a token of its completion left is left out.

    Raises:
        ValueError: no row is left.
    """
    text = Text(tokenizer, chat=False)
    found = []
    for row in rows:
        example = Example(row.get("prompt", ""), row["text"] if "text" in row else row["completion"], None)
        tokens, _ = text.features(example, longest)
        if tokens is not None:
            mask = [int(label != IGNORED) for label in tokens["labels"]]
            found.append({"input_ids": tokens["input_ids"], "completion_mask": mask})
    if not found:
        raise ValueError(f"no row of {source} has a completion within {longest} tokens; expected one (data.max_length)")
    return found


def _is_plain(row: Row) -> bool:
    return all(isinstance(value, str) for value in row.values())


def _filled(rows: list[Row], data: Data, source: str) -> list[Row]:
    """Return the rows with the columns that the recipe's templates make of theirs.

    Raises:
        ValueError: a template is no Jinja, or fails on a row.
    """
    if not data.template:
        return rows
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    both = sorted(data.columns.keys() & data.template.keys())
    if both:
        raise ValueError(f"data.columns and data.template both have {both[0]}; expected one of them")
    # lm-evaluation-harness has these options too, so that its doc_to_text may be the same template.
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    found = [dict(row) for row in rows]
    for name, template in data.template.items():
        if not isinstance(template, str):
            raise ValueError(f"data.template.{name} is {template!r:.60}; expected a text, a Jinja template")
        where = "it"
        try:
            compiled = environment.from_string(template)
            for i, (row, filled) in enumerate(zip(rows, found, strict=True), 1):
                where = f"row {i} of {source}"
                filled[name] = compiled.render(row)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise ValueError(
                f"data.template.{name} fails on {where} ({error}); expected a Jinja template of its columns"
            ) from error
    return found


def text_of(row: Row) -> Prompt:
    """Return a row as one text, or as the messages of a chat."""
    if "text" in row:
        return row["text"]
    answer = row["chosen"] if "chosen" in row else row["completion"]
    return row["prompt"] + answer if isinstance(answer, str) else [*row["prompt"], *answer]


def rows_of(source: str, config: str | None = None, split: str | None = None, usual: str = "train") -> list[Row]:
    """Return the rows of a .json or .jsonl file, or of a data set's split on the hub, `usual` if none is given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no JSON or holds no rows, the hub gave none, or a split of a file is given.
        ImportError: a data set of the hub without the library datasets.
    """
    file = Path(source)
    if file.is_file() and split is not None:
        raise ValueError(f"a split of {source}, {split!r}, is given, and it is a file; expected a data set of the hub")
    split = usual if split is None else split
    if not file.is_file():
        if file.suffix in (".json", ".jsonl") or file.exists():
            raise FileNotFoundError(f"no file {source}; expected rows, a .jsonl or .json, or a data set of the hub")
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ImportError("data of the hub needs the library datasets; `pip install 'fused-steer[trl]'`") from error
        try:
            with reaching_hub(source, "data set"):
                found: Any = load_dataset(source, config, split=split)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{source} is no file, and the hub gave no split {split!r} of it ({reason:.200})"
            ) from error
        return _some(list(found), source)
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is no UTF-8 text ({error}); expected rows") from error
    if file.suffix == ".jsonl":
        return _some([_json(line, f"row {i} of {source}") for i, line in _lines(text)], source)
    whole = _json(text, source)
    return _some(whole if isinstance(whole, list) else [whole], source)


def _lines(text: str) -> list[tuple[int, str]]:
    return [(i, line) for i, line in enumerate((line for line in text.split("\n") if line.strip()), 1)]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({error}); expected an object a row") from error


def _some(rows: list[Any], source: str) -> list[Row]:
    for i, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {i} of {source} is a {type(row).__name__}; expected an object with columns")
    if not rows:
        raise ValueError(f"{source} has no rows; expected at least one")
    return [dict(row) for row in rows]


def _kind_of(row: Row, data: Data, source: str) -> str:
    """Return the recipe's kind of data. Without one, return the first kind that has all its columns in the row."""
    if data.kind is not None:
        return data.kind
    for kind, columns in COLUMNS.items():
        if all(data.columns.get(name, name) in row for name in columns):
            return kind
    kinds = "; ".join(f"{', '.join(columns)} ({kind})" for kind, columns in COLUMNS.items())
    raise ValueError(
        f"{source} has the columns {', '.join(row) or 'none'}; expected those of a kind: {kinds}; or data.columns, "
        "such as {prompt: question, completion: answer}"
    )


def _row(row: Row, kind: str, data: Data, where: str) -> Row:
    wanted = [*COLUMNS[kind], *(name for name in _OPTIONAL.get(kind, ()) if data.columns.get(name, name) in row)]
    own = {name: data.columns.get(name, name) for name in wanted}
    missing = [name for name in own.values() if name not in row]
    if missing:
        raise ValueError(
            f"{where} has the columns {', '.join(row) or 'none'}; expected {', '.join(own.values())}, of kind {kind} "
            "(data.columns renames them)"
        )
    found = {name: row[column] for name, column in own.items()}
    for name, value in found.items():
        if name == "input" and value in (None, ""):
            found[name] = ""
        elif not is_text(value) or (kind in ("alpaca", "text") and not isinstance(value, str)):
            expected = "a text" if kind in ("alpaca", "text") else "a text, or a list of messages"
            raise ValueError(f"{where}: {own[name]} is {value!r:.60}; expected {expected}")
        elif isinstance(value, str) and not is_unicode(value):
            raise ValueError(f"{where}: {own[name]} is {value!r:.60}, half of a surrogate pair; expected a text")
    if kind == "alpaca":
        template = _WITH_INPUT if found.get("input", "").strip() else _WITHOUT_INPUT
        return {"prompt": template.format(**found), "completion": found["output"]}
    if kind == "messages":
        return _answered(found["messages"], where)
    forms = {isinstance(value, str) for value in found.values()}
    if len(forms) > 1:
        return {name: _as_messages(name, value) for name, value in found.items()}
    return found


def _refuse_mixed(rows: list[Row], source: str) -> None:
    """Check that all rows are texts, or all are messages."""
    forms = [_is_plain(row) for row in rows]
    if True in forms and False in forms:
        first = "texts" if forms[0] else "messages"
        other, number = "messages" if forms[0] else "texts", forms.index(not forms[0]) + 1
        raise ValueError(f"row {number} of {source} is of {other}; expected {first}, as row 1")


def _answered(messages: Any, where: str) -> Row:
    """Return the chat as a prompt and its last answer, which is trained on."""
    if isinstance(messages, str) or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(f"{where}: messages is {messages!r:.60}; expected a list that ends with the assistant's")
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def _as_messages(name: str, value: str | Sequence[Mapping[str, Any]]) -> list[Any]:
    role = "user" if name == "prompt" else "assistant"
    return [{"role": role, "content": value}] if isinstance(value, str) else list(value)
