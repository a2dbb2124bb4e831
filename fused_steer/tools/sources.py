"""Adapters that a command is given, each with a name."""

from __future__ import annotations

from pathlib import Path

from ..adapters.parameters import check_name


def sources(adapters: list[str]) -> dict[str, str]:
    """Return adapters by name, from NAME=PATH, or PATH, which is named by its last part.

    Raises:
        ValueError: a name is invalid, or a name occurs twice.
    """
    found: dict[str, str] = {}
    for given in adapters:
        name, sign, source = given.partition("=")
        if not sign:
            name, source = Path(given).name, given
        check_name(name)
        if name in found or name == "base":
            raise ValueError(f"there are two adapters {name!r}; expected a name for each: NAME=PATH")
        found[name] = source
    return found
