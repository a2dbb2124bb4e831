"""Raises an exception at a chosen line of the package, as Ctrl-C or a full disk can."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import fused_steer

PACKAGE = str(Path(fused_steer.__file__).parent)

Line = tuple[str, int]


class Injected(KeyboardInterrupt):
    """The injected exception. `except Exception` does not catch it."""


def _trace(run: Callable[[], Any], visit: Callable[[Line], None]) -> Any:
    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            visit((frame.f_code.co_filename, frame.f_lineno))
        return local

    def entered(frame: FrameType, event: str, _: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(PACKAGE) else None

    earlier = sys.gettrace()
    sys.settrace(entered)
    try:
        return run()
    finally:
        sys.settrace(earlier)


def lines_of(run: Callable[[], Any]) -> list[Line]:
    """Return the lines of the package that `run` executes, each once, in order of their first execution."""
    found: dict[Line, None] = {}
    _trace(run, lambda line: found.setdefault(line))
    return list(found)


def raise_at(line: Line, run: Callable[[], Any]) -> bool:
    """Run, and raise `Injected` when `line` is reached for the first time. Return whether it was reached."""
    hit = False

    def visit(here: Line) -> None:
        nonlocal hit
        if here == line and not hit:
            hit = True
            raise Injected

    try:
        _trace(run, visit)
    except Injected:
        pass
    return hit


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise an error if the `with` block takes longer than `seconds`, for instance in a deadlock. Main thread only."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"still waiting after {seconds} s")

    earlier = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
