"""The six tasks: prompts, completions, and readers that find the answer in a model's text.

Prompts and readers follow the paper's released code (SprocketLab/steerling). Two released readers misread correct
answers. One cuts a number of four digits or more without a comma to three digits: 1200 is read as 120. The other takes
the first letter of the word after "answer": "Answer choice B" is read as C. Our readers fix this. `read_as_released`
keeps the released ones, for comparison with the paper's figures.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")
_NUMBER_AS_RELEASED = re.compile(r"[-+]?\d{1,3}(?:,\d{3})*(?:\.\d+)?")
_NUMBERS_DIFFER = 1e-4


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        hub: path and configuration of the data set.
        columns: the columns that every row needs.
        read: finds the answer in a model's text; None if there is none.
        read_as_released: the released code's reader, if it differs.
        new_tokens: the most tokens to generate.
        max_length: the most tokens of prompt and completion in training.
        test: the hub's split to test on, one that has answers.
    """

    title: str
    hub: tuple[str, str | None]
    columns: tuple[str, ...]
    prompt: Callable[[Row], str]
    completion: Callable[[Row], str]
    answer: Callable[[Row], Any]
    read: Callable[[str], Any]
    new_tokens: int
    test: str = "test"
    max_length: int = 256
    epochs: int = 1
    read_as_released: Callable[[str], Any] | None = None

    def is_exact(self, said: str, answer: Any, *, as_released: bool = False) -> bool:
        """Return whether a model's text has the correct answer. An unreadable text is wrong."""
        found = (self.read_as_released if as_released and self.read_as_released else self.read)(said)
        if isinstance(answer, float):
            return found is not None and abs(found - answer) < _NUMBERS_DIFFER
        return found == answer


def _first(pattern: str, said: str) -> str | None:
    found = re.search(pattern, said, re.IGNORECASE | re.DOTALL)
    return found[1] if found else None


def _one_of(value: Any, choices: tuple[Any, ...]) -> Any:
    if value not in choices:
        raise ValueError(f"the answer is {value!r}; expected one of {', '.join(map(repr, choices))}")
    return value


# -------------------------------------------------------------------------------------------------------------- BoolQ


def _boolq_answer(row: Row) -> str:
    return _one_of(str(row["answer"]).lower(), ("true", "false"))


def _read_boolq(said: str) -> str | None:
    found = _first(r"answer\s*:\s*(true|false)", said) or _first(r"\b(true|false)\b", said)
    return found.lower() if found else None


# --------------------------------------------------------------------------------------------------------- Winogrande


def _winogrande_answer(row: Row) -> int:
    return int(_one_of(str(row["answer"]), ("1", "2")))


def _read_winogrande(said: str) -> int | None:
    """Read the first option named after "Answer:"."""
    found = _first(r"answer\s*[:\-].*?\boption\s*([12])\b", said)
    return int(found) if found else None


# ------------------------------------------------------------------------------------------------------------ ListOps


def _read_listops(said: str) -> int | None:
    found = (_first(r"<answer>(.*?)</answer>", said) or "").strip()
    return int(found) if re.fullmatch(r"[-+]?\d+", found) else None


# -------------------------------------------------------------------------------------------------------------- GSM8K


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def _gsm8k_parts(row: Row) -> tuple[str, str]:
    reasoning, mark, answer = str(row["answer"]).partition("####")
    if not mark or _NUMBER.fullmatch(answer.strip()) is None:
        raise ValueError(f"the answer ends in {str(row['answer'])[-20:]!r}; expected '#### ' and a number")
    return reasoning.strip(), answer.strip()


def _read_gsm8k(said: str, number: re.Pattern[str] = _NUMBER) -> float | None:
    """Read the number after the last "Answer:", or else the last number."""
    for line in re.findall(r"answer\s*:\s*(.+)", said, re.IGNORECASE)[-1:]:
        if found := number.search(line):
            return _number(found[0])
    numbers = number.findall(said)
    return _number(numbers[-1]) if numbers else None


# ------------------------------------------------------------------------------------------------------ ARC and AQuA


def _arc_options(row: Row) -> dict[str, str]:
    choices = row["choices"]
    return dict(zip(map(str, choices["label"]), choices["text"], strict=True))


def _arc_answer(row: Row) -> str:
    return _one_of(str(row["answerKey"]), tuple(_arc_options(row)))


def _read_arc(said: str, end: str = r"\b") -> str | None:
    """Read the letter or digit after "Answer", or else the only letter or digit that stands alone."""
    if found := _first(rf"answer\s*[:\-]?\s*\(?([A-E1-5]){end}", said):
        return found.upper()
    letters = re.findall(r"\b([A-E1-5])\b", said.upper())
    return letters[0] if len(letters) == 1 else None


def _read_aqua(said: str, end: str = r"\b") -> str | None:
    """Read the letter after "Answer", or else the last letter that stands alone."""
    if found := _first(rf"answer\s*[:\-]?\s*\(?([A-E]){end}", said):
        return found.upper()
    letters = re.findall(r"\b([A-E])\b", said.upper())
    return letters[-1] if letters else None


# ---------------------------------------------------------------------------------------------------------- all of them

TASKS: dict[str, Task] = {
    "boolq": Task(
        title="BoolQ",
        hub=("google/boolq", None),
        columns=("question", "passage", "answer"),
        prompt=lambda row: (
            "Answer the question with a true/false based on the given passage.\n"
            f"Passage: {row['passage']}\nQuestion: {row['question']}\n"
        ),
        completion=lambda row: f"Answer: {_boolq_answer(row).capitalize()}.",
        answer=_boolq_answer,
        read=_read_boolq,
        new_tokens=10,
        test="validation",
    ),
    "winogrande": Task(
        title="Winogrande",
        hub=("allenai/winogrande", "winogrande_debiased"),
        columns=("sentence", "option1", "option2", "answer"),
        prompt=lambda row: (
            "Please choose the correct answer to fill in the blank to complete the given sentence: "
            f"{row['sentence']}\nOption1: {row['option1']}\nOption2: {row['option2']}\n"
        ),
        completion=lambda row: f"Answer: Option{_winogrande_answer(row)}.",
        answer=_winogrande_answer,
        read=_read_winogrande,
        new_tokens=5,
        test="validation",
    ),
    "listops": Task(
        title="ListOps",
        hub=("fengyang0317/listops-64", None),
        columns=("Source", "Target"),
        prompt=lambda row: (
            "Evaluate the value of the following nested list expression.\n"
            "Return only the final numeric result inside <answer>…</answer>.\n\n"
            f"Expression:\n{row['Source']}\n"
        ),
        completion=lambda row: f"<answer>{int(row['Target'])}</answer>",
        answer=lambda row: int(row["Target"]),
        read=_read_listops,
        new_tokens=10,
        max_length=512,
    ),
    "gsm8k": Task(
        title="GSM8K",
        hub=("openai/gsm8k", "main"),
        columns=("question", "answer"),
        prompt=lambda row: f"{row['question']}\n",
        completion=lambda row: "{}\nAnswer: {}".format(*_gsm8k_parts(row)),
        answer=lambda row: _number(_gsm8k_parts(row)[1]),
        read=_read_gsm8k,
        read_as_released=lambda said: _read_gsm8k(said, _NUMBER_AS_RELEASED),
        new_tokens=100,
        epochs=3,
    ),
    "arc": Task(
        title="ARC-Challenge",
        hub=("allenai/ai2_arc", "ARC-Challenge"),
        columns=("question", "choices", "answerKey"),
        prompt=lambda row: (
            f"Answer the following multiple-choice question.\nQuestion: {row['question']}\n"
            + "".join(f"({label}) {text}\n" for label, text in _arc_options(row).items())
        ),
        completion=lambda row: f"Answer: ({_arc_answer(row)}) {_arc_options(row)[_arc_answer(row)]}.",
        answer=_arc_answer,
        read=_read_arc,
        read_as_released=lambda said: _read_arc(said, end=""),
        new_tokens=100,
    ),
    "aqua": Task(
        title="AQuA",
        hub=("deepmind/aqua_rat", "raw"),
        columns=("question", "options", "rationale", "correct"),
        prompt=lambda row: (
            f"Answer the following multiple-choice math question.\nQuestion: {row['question']}\n"
            + "".join(f"{option}\n" for option in row["options"])
        ),
        completion=lambda row: f"{row['rationale'].strip()}\nAnswer: {row['correct']}.",
        answer=lambda row: _one_of(str(row["correct"]), tuple("ABCDE")),
        read=_read_aqua,
        read_as_released=lambda said: _read_aqua(said, end=""),
        new_tokens=256,
        max_length=512,
    ),
}
