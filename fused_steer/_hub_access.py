"""Asks whether the hub can be reached, before the hub's libraries wait for it.

They ask for a file six times in 23 seconds, and for several files one after the other. That helps while the hub answers
now and then, and is in vain without any connection. So a few attempts to connect tell first whether there is one.
Without one the libraries are put offline: they then take what is in their cache, as they would after the wait.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

#: Seconds before each attempt to connect, and the seconds that one may take.
WAITS, TIMEOUT = (0.0, 0.5, 1.5), 4.0
#: Of the clients of all versions of huggingface_hub. An answer, such as an error 503, is no such error.
_NO_CONNECTION = {"ConnectError", "ConnectTimeout", "ConnectionError"}
#: Whether the hub was reached in this process, or the time of the last failure and its reason.
_known: list[tuple[float, str | None]] = []
#: Seconds for which a failure is remembered.
_REMEMBERED = 30.0


def why_unreachable() -> str | None:
    """Return why no connection to the hub can be made, or None: one can, or is not known to be impossible."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if _known and (_known[0][1] is None or time.monotonic() - _known[0][0] < _REMEMBERED):
        return _known[0][1]
    reason = None
    for wait in WAITS:
        time.sleep(wait)
        try:
            get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
        except Exception as error:  # of the client that this version of huggingface_hub has
            if not _NO_CONNECTION & {kind.__name__ for kind in type(error).__mro__}:
                reason = None
                break
            reason = f"no connection to {constants.ENDPOINT}: {' '.join(str(error).split()) or type(error).__name__}"
        else:
            reason = None
            break
    _known[:] = [(time.monotonic(), reason)]
    return reason


@contextlib.contextmanager
def reaching_hub(source: str | None, what: str) -> Iterator[None]:
    """Inside, libraries that look for `source` on the hub do not wait for a connection that cannot be made.

    Args:
        source: a path or a hub id; a path that exists, or None, needs no hub.
        what: that is looked for, for the error.

    Raises:
        FileNotFoundError: the hub cannot be reached, or is not to be (HF_HUB_OFFLINE), and inside a file was not found.
    """
    from huggingface_hub import constants

    if source is None or Path(source).exists():
        yield
        return
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else why_unreachable()
    if reason is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        for module in (constants, sys.modules.get("datasets.config")):
            if module is not None:
                stack.callback(setattr, module, "HF_HUB_OFFLINE", module.HF_HUB_OFFLINE)
                module.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
        try:
            yield
        except OSError as error:
            raise FileNotFoundError(
                f"no {what} {source} here or in the hub's cache, and the hub cannot be reached ({reason}); expected a "
                "path, or a connection"
            ) from error


@contextlib.contextmanager
def loading(source: str, what: str) -> Iterator[None]:
    """Inside, transformers loads a model's part from `source`: see `reaching_hub`. Its errors name the source.

    Args:
        source: a path or a hub id.
        what: the part, for the error.

    Raises:
        ValueError: the files are broken; safetensors, tokenizers and pickle raise errors of many kinds. Or they hold
            code of their own.
        OSError, ImportError: a file or a library is missing.
    """
    try:
        with reaching_hub(source, "model"):
            yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if "trust_remote_code" in reason:
            raise ValueError(
                f"{source} has a {what} with code of its own, which is not executed; expected one of transformers"
            ) from error
        raise ValueError(f"the {what} in {source} cannot be loaded ({reason:.300}); expected whole files") from error
