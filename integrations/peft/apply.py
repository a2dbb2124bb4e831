"""Add post-block steering to a checkout of PEFT, as files and lines of PEFT's own layout.

    python integrations/peft/apply.py PEFT_CHECKOUT

copies the tuner and its page, and adds the lines that make the method known. docs/upstream-peft.md says what is left.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
#: file: (the line to add after, the new lines). Each line is there once.
LINES = {
    "utils/peft_types.py": [
        ("    - ROAD\n", "    - POST_BLOCK\n"),
        ('    ROAD = "ROAD"\n', '    POST_BLOCK = "POST_BLOCK"\n'),
    ],
    "tuners/__init__.py": [
        ("from .road import RoadConfig, RoadModel\n", "from .post_block import PostBlockConfig, PostBlockModel\n"),
        ('    "RoadModel",\n', '    "PostBlockConfig",\n    "PostBlockModel",\n'),
    ],
    "__init__.py": [
        ("    RoadModel,\n", "    PostBlockConfig,\n    PostBlockModel,\n"),
        ('    "RoadModel",\n', '    "PostBlockConfig",\n    "PostBlockModel",\n'),
    ],
}


def apply(checkout: Path) -> None:
    """Add the method. Nothing is written if a file of PEFT does not have the lines that it is known by.

    Raises:
        ValueError: it is no checkout of PEFT, or one of another form, or has the method already.
    """
    package = checkout / "src" / "peft"
    if (package / "tuners" / "post_block").exists():
        raise ValueError(f"{package} has tuners/post_block already; expected a checkout without it")
    changed = {}
    for name, additions in LINES.items():
        path = package / name
        if not path.is_file():
            raise ValueError(f"{checkout} has no src/peft/{name}; expected a checkout of PEFT")
        text = path.read_text(encoding="utf-8")
        for line, new in additions:
            if text.count(line) != 1:
                raise ValueError(f"{path} has the line {line.strip()!r} {text.count(line)} times; expected once")
            text = text.replace(line, line + new)
        changed[path] = text
    for path, text in changed.items():
        path.write_text(text, encoding="utf-8")
    shutil.copytree(HERE / "src", checkout / "src", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(HERE / "docs", checkout / "docs", dirs_exist_ok=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python integrations/peft/apply.py PEFT_CHECKOUT")
    try:
        apply(Path(sys.argv[1]))
    except (OSError, ValueError) as error:
        sys.exit(f"apply.py: {error}")
