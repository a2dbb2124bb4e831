"""Read JSON objects that other processes or people wrote: small ones, not nested deeply, with each name once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .saving import read_regular

#: The most bytes of a JSON file, and of a weights file's header.
MOST_JSON = 2**24


def read_json(file: Path) -> dict[str, Any]:
    """Return the fields of a small JSON file.

    Raises:
        OSError, ValueError: the file cannot be read, is too large, or see `fields_of`.
    """
    return fields_of(read_regular(file, MOST_JSON))


def fields_of(content: str | bytes) -> dict[str, Any]:
    """Return the fields of a JSON object, of text or of its bytes in UTF-8.

    Raises:
        ValueError: the content is something else, is nested too deeply, or has a name twice in one object.
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        fields = json.loads(text, object_pairs_hook=_each_once)
    except RecursionError:
        raise ValueError("it is nested too deeply; expected a JSON object of fields") from None
    except _Twice:
        raise
    except ValueError as error:  # of the text's encoding, its JSON, or an integer of thousands of digits
        raise ValueError(f"it is no JSON ({error}); expected a JSON object") from None
    if not isinstance(fields, dict):
        raise ValueError(f"it holds a {type(fields).__name__}; expected a JSON object")
    return fields


class _Twice(ValueError):
    """A name is in an object twice."""


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object of its pairs. Libraries differ in which of two equal names they take, so there may be none.

    Raises:
        _Twice: a name is there twice.
    """
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise _Twice(f"it has {name!r:.200} twice; expected each name once")
        fields[name] = value
    return fields
