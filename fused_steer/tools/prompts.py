"""Prompts from files, as batches of token ids, and their room in a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..serving.caches import cache_length, find_cache, is_cache

#: A prompt: text, or the messages of a chat, each with a role and content.
Prompt = str | list[dict[str, Any]]
#: Which fields of a .jsonl's lines are looked for, where none is named.
FIELDS = ("prompt", "text", "messages")


def read_prompts(file: Path, field: str | None = None) -> list[Prompt]:
    """The prompts of a .txt, one a line, or of a .jsonl, a field of each line; empty lines are passed over.

    Args:
        field: of a .jsonl's lines: text, or the messages of a chat. None: the first of FIELDS that a line has.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another kind, a .txt with a field, a line is no JSON object with that field, or there is no
            prompt.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}; expected prompts, a .txt or .jsonl")
    if file.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"prompts are in {file}; expected a .txt, one a line, or a .jsonl")
    if field is not None and file.suffix == ".txt":
        raise ValueError(f"field is {field!r} and prompts are in {file}, which has no fields; expected a .jsonl")
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text ({error}); expected prompts") from error
    lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    if file.suffix == ".txt":
        found: list[Prompt] = [line.rstrip("\r") for _, line in lines]
    else:
        found = [_of_json(line, field, f"{file}, line {number}") for number, line in lines]
    if not any(prompt if isinstance(prompt, list) else prompt.strip() for prompt in found):
        raise ValueError(f"{file} holds no prompt; expected at least one")
    return found


def _of_json(line: str, field: str | None, where: str) -> Prompt:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({error}); expected an object a line") from error
    fields = FIELDS if field is None else (field,)
    name = next((name for name in fields if isinstance(entry, dict) and name in entry), None)
    if name is None:
        held = f"the fields {', '.join(sorted(entry))}" if isinstance(entry, dict) else f"a {type(entry).__name__}"
        raise ValueError(f"{where} has {held}; expected a field {' or '.join(map(repr, fields))}")
    value = entry[name]
    if isinstance(value, str) or is_text(value):
        return value
    raise ValueError(f"{where}: {name!r} is {value!r:.80}; expected a string, or a list of messages")


def is_text(value: Any) -> bool:
    """Return whether a value is a text that is not empty, or a list of messages."""
    if isinstance(value, str):
        return bool(value)
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def is_unicode(text: str) -> bool:
    """Return whether a text can be written as UTF-8. JSON can hold one half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and "content" in value


def encode(
    tokenizer: Any, prompts: Sequence[Prompt], max_length: int, batch_size: int, *, whole: bool = False
) -> list[dict[str, Tensor]]:
    """Batches of token ids and masks, cut to `max_length`. Padded on the right, where no token attends to it.

    Messages go through the tokenizer's chat template, and end where the assistant is to answer, unless the last of them
    is the assistant's. With `whole`, that message ends with its own last token, without the template's closing ones.

    Args:
        whole: refuse a prompt without tokens, or with more than `max_length`, instead of cutting it.

    Raises:
        ValueError: a prompt is refused, or is of messages and the tokenizer has no chat template, or one that fails.
    """
    rows = [_ids(tokenizer, prompt, whole) for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True) if whole else ():
        if not 1 <= len(row) <= max_length:
            raise ValueError(f"a text has {len(row)} tokens, {prompt!r:.60}; expected 1 to {max_length} (max length)")
    rows = [row[:max_length] for row in rows]
    batches = []
    for some in (rows[i : i + batch_size] for i in range(0, len(rows), batch_size)):
        longest = max(map(len, some))
        ids = [row + [0] * (longest - len(row)) for row in some]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in some]
        if longest:
            batches.append({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)})
    return batches


def _ids(tokenizer: Any, prompt: Prompt, whole: bool = False) -> list[int]:
    if isinstance(prompt, str):
        if not is_unicode(prompt):
            raise ValueError(f"a text has half of a surrogate pair, {prompt!r:.60}; expected one that UTF-8 can hold")
        return tokenizer(prompt)["input_ids"]
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("a prompt is a list of messages, but the tokenizer has no chat template; expected text")
    answered = prompt[-1]["role"] == "assistant"
    ends = {"continue_final_message": True} if whole and answered else {"add_generation_prompt": not answered}
    return templated(tokenizer, prompt, return_dict=True, **ends)["input_ids"]


def templated(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
    """Return messages in the tokenizer's chat template: see transformers' `apply_chat_template`.

    Raises:
        ValueError: the template fails. Many refuse some roles or their order, by jinja2's own errors.
        ImportError: jinja2 is missing.
    """
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except ImportError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"the tokenizer's chat template fails on {messages!r:.200} ({reason:.200}); expected messages that it takes"
        ) from error


def room_of(model: Any) -> int | None:
    """The most tokens of a text: the rows of the model's learned table of positions. None: it has no such table."""
    most = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(most, int):
        return None
    words = model.get_input_embeddings()
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module is not words]
    return most if any(0 <= table.num_embeddings - most <= 2 for table in tables) else None  # OPT has 2 rows more


def refuse_long_texts(model: Any) -> Any:
    """Make passes over more tokens than the model has positions a ValueError. PyTorch's own error names neither number.

    The decoder checks, because PEFT calls the forward of the model around it without its hooks.
    """
    most = room_of(model)

    def check(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        inputs = [*args[:1], *(given.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))]
        lengths = [one.shape[1] for one in inputs if isinstance(one, Tensor) and one.ndim in (2, 3)]
        longest = max(lengths, default=0)
        cache = find_cache(given)  # while it generates, transformers gives no mask if there is no padding
        past = cache_length(cache) if is_cache(cache) else None
        if past is not None and lengths:
            longest = max(longest, int(past) + lengths[0])
        if most is not None and longest > most:
            raise ValueError(f"a text has {longest} tokens; expected at most {most}, the positions of the model")

    if most is not None:
        model.base_model.register_forward_pre_hook(check, with_kwargs=True)
    return model
