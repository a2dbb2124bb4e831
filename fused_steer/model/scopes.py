"""Who may change how a model is steered: not another thread while the model runs, nor another inside an open scope.

A scope is a block such as `with steering.disabled():`. It belongs to the thread or task that opened it: elsewhere the
model is refused as long as the scope is open, because it would compute by something that its caller does not know of. A
thread that is started inside a scope runs the model in it if it is started with a copy of the context:
`Thread(target=contextvars.copy_context().run, args=(model.generate,), kwargs=...)`.

A change, such as `steering.use`, happens at once for all layers: passes in other threads come before it or after it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from torch import nn

#: The numbers of the scopes that were opened in this thread or task, outermost first.
_carried: ContextVar[tuple[int, ...]] = ContextVar("fused_steer_scopes", default=())
_numbers = itertools.count()


#: What holds locks: objects with a method `after_fork`, which is called in a forked process.
renewed_after_fork: weakref.WeakSet[Any] = weakref.WeakSet()


class Scope:
    """An open scope. It is kept alive by the block that it belongs to alone, so that it cannot outlive that."""

    __slots__ = ("__weakref__", "number", "what")

    def __init__(self, what: str) -> None:
        self.what = what
        self.number = next(_numbers)


class Scopes:
    """The open scopes of one model, and the passes that run in each thread.

    turn: a lock for what only one thread may do at a time, and others wait for.
    """

    def __init__(self, runs: Callable[[int], bool] | None = None) -> None:
        """
        Args:
            runs: whether a thread, by its number, is running modules; None looks at what the thread executes.
        """
        self.runs = runs or _runs_modules
        self._passes: dict[int, int] = {}  # by thread
        self._open: weakref.WeakSet[Scope] = weakref.WeakSet()
        self._ends: dict[int, Callable[[], None]] = {}  # by number of a scope
        self._renew_locks()
        renewed_after_fork.add(self)

    def _renew_locks(self) -> None:
        self._lock = threading.RLock()
        self.turn = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # of a copied model: nothing runs, and no scope is open

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def after_fork(self) -> None:
        """In a forked process only the thread that forked goes on, with the scopes that it is in."""
        me, carried = threading.get_ident(), _carried.get()
        self._renew_locks()
        self._passes = {thread: count for thread, count in self._passes.items() if thread == me}
        for scope in list(self._open):
            if scope.number not in carried:
                self._open.discard(scope)

    def begin_pass(self, checked: bool = True) -> None:
        """Say that the model runs in this thread, until `end_pass`.

        Args:
            checked: whether a scope of another thread or task is an error.

        Raises:
            RuntimeError: a scope is open that is not this thread's or task's.
        """
        with self._lock:
            self.heal()
            if checked:
                self.check("the model runs")
            me = threading.get_ident()
            self._passes[me] = self._passes.get(me, 0) + 1

    def end_pass(self) -> None:
        me = threading.get_ident()
        left = self._passes.get(me, 0) - 1
        if left > 0:
            self._passes[me] = left
        else:
            self._passes.pop(me, None)

    @contextlib.contextmanager
    def change(self, what: str) -> Iterator[None]:
        """Inside, no pass begins in another thread.

        Args:
            what: is done, for the error: "steering.use is called".

        Raises:
            RuntimeError: the model runs in another thread, or a scope is open that is not this thread's or task's.
        """
        with self._lock:
            self.heal()
            self.check(what)
            self._check_no_other_pass(what)
            yield

    @contextlib.contextmanager
    def open(self, what: str, end: Callable[[], None]) -> Iterator[None]:
        """A scope, which the model's passes in other threads and tasks may not enter.

        Args:
            what: opens it, for the error: "steering.disabled()".
            end: takes back what the scope did; called when it ends, and again where an exception cut that off.

        Raises:
            RuntimeError: as `change`.
        """
        with self._lock:
            self.heal()
            self.check(f"{what} is entered")
            self._check_no_other_pass(f"{what} is entered")
            scope = Scope(what)
            self._open.add(scope)
            self._ends[scope.number] = end
        number = scope.number
        try:
            _carried.set((*_carried.get(), number))
            yield
        finally:
            # Scopes of several models may end in another order than they began.
            _carried.set(tuple(other for other in _carried.get() if other != number))
            with self._lock:
                self._open.discard(scope)
                end()
                self._ends.pop(scope.number)

    def heal(self) -> None:
        """End the scopes that are not open any more, though an exception or a fork kept their end from running."""
        if not self._ends:
            return
        with self._lock:
            live = {scope.number for scope in self._open}
            for number in [number for number in self._ends if number not in live]:
                self._ends[number]()
                del self._ends[number]

    def foreign(self) -> Scope | None:
        """A scope that is open and not this thread's or task's; None: there is none."""
        carried = _carried.get()
        return next((scope for scope in self._open if scope.number not in carried), None)

    def check(self, what: str) -> None:
        """Raises RuntimeError inside a scope that is not this thread's or task's."""
        scope = self.foreign() if self._open else None
        if scope is not None:
            raise RuntimeError(
                f"{what} inside {scope.what} of another thread or task; expected it in the one that opened that, or "
                "after it (a thread started inside takes part with contextvars.copy_context().run)"
            )

    def _check_no_other_pass(self, what: str) -> None:
        me = threading.get_ident()
        # PyTorch calls no hook at the end of a pass that Ctrl-C cuts off: such a pass is not over by its count.
        if any(thread != me and self.runs(thread) for thread in list(self._passes)):
            raise RuntimeError(
                f"{what} while the model runs in another thread; expected it before that pass or after it"
            )


def _runs_modules(thread: int) -> bool:
    """Whether a thread is inside the call of a module now."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            return True
        frame = frame.f_back
    return False


def _after_fork() -> None:
    for one in list(renewed_after_fork):
        one.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
