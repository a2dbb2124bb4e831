"""A hook of MkDocs: turns links to files outside of docs/ into links to the repository, if the files exist."""

import logging
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_OUTSIDE = re.compile(r"\]\((\.\./[^)#\s]+)")
_log = logging.getLogger("mkdocs.hooks.site")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    def linked(match: re.Match[str]) -> str:
        path = (ROOT / "docs" / match[1]).resolve()
        if not path.exists():
            _log.warning("%s links to %s; expected an existing file", page.file.src_uri, match[1])
        return f"]({config.repo_url}/blob/main/{path.relative_to(ROOT).as_posix()}"

    return _OUTSIDE.sub(linked, markdown)
