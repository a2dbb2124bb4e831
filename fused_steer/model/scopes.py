"""Guard how a model is steered against changes by other threads, and against use inside another thread's scope.

A scope is a block such as `with steering.disabled():`. It belongs to the thread or task that opened it. Others may not
run the model while the scope is open, because it would compute something that they do not expect. A thread started
inside a scope takes part in it if it is started with a copy of the context:
`Thread(target=contextvars.copy_context().run, args=(model.generate,), kwargs=...)`. It is an error if it runs the model
after the scope was left.

A change, such as `steering.use`, takes effect in all layers at once. Passes in other threads run before or after it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from torch import nn


class Part:
    """The part that a thread or task takes in a scope. Copies of its context share it, and it may outlive the scope."""

    __slots__ = ("__weakref__", "what")

    def __init__(self, what: str) -> None:
        self.what = what


#: The parts of this thread or task in the scopes opened in it, outermost first.
_carried: ContextVar[tuple[Part, ...]] = ContextVar("fused_steer_scopes", default=())


#: Objects that hold locks. Their method `after_fork` is called in a forked process.
renewed_after_fork: weakref.WeakSet[Any] = weakref.WeakSet()


class Scope:
    """An open scope. Only its block keeps it alive, so it cannot outlive the block."""

    __slots__ = ("__weakref__", "part")

    def __init__(self, what: str) -> None:
        self.part = Part(what)


class Scopes:
    """The open scopes of one model, and the number of its passes in each thread.

    Attributes:
        turn: a lock for actions that wait for each other, such as batches.
    """

    def __init__(self, runs: Callable[[int], bool] | None = None) -> None:
        """
        Args:
            runs: returns whether a thread, by its number, is running modules. None inspects the thread's stack.
        """
        self.runs = runs or _runs_modules
        self._passes: dict[int, int] = {}  # number of passes, by thread
        self._open: weakref.WeakSet[Scope] = weakref.WeakSet()
        self._ends: dict[Part, Callable[[], None]] = {}
        self._left: weakref.WeakSet[Part] = weakref.WeakSet()
        self._renew_locks()
        renewed_after_fork.add(self)

    def _renew_locks(self) -> None:
        self._lock = threading.RLock()
        self.turn = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # for a copied model, in which nothing runs and no scope is open

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def after_fork(self) -> None:
        """Keep only the forking thread's passes and scopes. No other thread goes on in a forked process."""
        me, carried = threading.get_ident(), _carried.get()
        self._renew_locks()
        self._passes = {thread: count for thread, count in self._passes.items() if thread == me}
        for scope in list(self._open):
            if scope.part not in carried:
                self._open.discard(scope)

    def begin_pass(self, checked: bool = True) -> None:
        """Note that the model runs in this thread, until `end_pass`.

        Args:
            checked: whether a scope of another thread or task is an error.

        Raises:
            RuntimeError: a scope of another thread or task is open, or the scope in which this thread or task was
                started was left.
        """
        with self._lock:
            if self._ends:
                self.heal()
            if checked:
                self.check("the model runs")
            me = threading.get_ident()
            self._passes[me] = self._passes.get(me, 0) + 1

    def end_pass(self) -> None:
        """Note the end of a pass in this thread.

        Raises:
            RuntimeError: the scope in which this thread or task was started was left during the pass.
        """
        me = threading.get_ident()
        count = self._passes.pop(me, 0)
        if count > 1:
            self._passes[me] = count - 1
        if count:  # else `begin_pass` has raised
            self._check_left("the model runs")

    @contextlib.contextmanager
    def change(self, what: str) -> Iterator[None]:
        """Allow a change inside this context. No pass begins in another thread meanwhile.

        Args:
            what: the action, for the error message: "steering.use is called".

        Raises:
            RuntimeError: the model runs in another thread, or a scope of another thread or task is open.
        """
        with self._lock:
            self.heal()
            self.check(what)
            self._check_no_other_pass(what)
            yield

    @contextlib.contextmanager
    def open(self, what: str, end: Callable[[], None]) -> Iterator[None]:
        """Open a scope: a block in which other threads and tasks may not run the model.

        Args:
            what: the scope's name in error messages: "steering.disabled()".
            end: undoes the scope's effect. It is called at the end, and again if an exception interrupted it.

        Raises:
            RuntimeError: see `change`.
        """
        with self._lock:
            self.heal()
            self.check(f"{what} is entered")
            self._check_no_other_pass(f"{what} is entered")
            scope = Scope(what)
            self._open.add(scope)
            self._ends[scope.part] = end
        part, finalizing = scope.part, sys.is_finalizing  # a global may be gone then
        try:
            _carried.set((*_carried.get(), part))
            yield
        finally:
            # A scope that is still open when Python exits ends when its modules are gone, and nothing runs any more.
            if not finalizing():
                # Scopes of several models may end in another order than they began.
                _carried.set(tuple(other for other in _carried.get() if other is not part))
                with self._lock:
                    self._left.add(part)  # before `end`, so that a pass that runs meanwhile fails at its end
                    self._open.discard(scope)
                    end()
                    self._ends.pop(part)

    def heal(self) -> None:
        """End scopes that are no longer open, if an exception or a fork kept their end from running."""
        if not self._ends:
            return
        with self._lock:
            live = {scope.part for scope in self._open}
            for part in [part for part in self._ends if part not in live]:
                self._ends[part]()
                del self._ends[part]

    def foreign(self) -> Scope | None:
        """Return an open scope of another thread or task, or None."""
        carried = _carried.get()
        return next((scope for scope in self._open if scope.part not in carried), None)

    def check(self, what: str) -> None:
        """Raise RuntimeError if a scope of another thread or task is open, or this thread's or task's was left."""
        self._check_left(what)
        scope = self.foreign() if self._open else None
        if scope is not None:
            raise RuntimeError(
                f"{what} inside {scope.part.what} of another thread or task; expected it in that thread or task, or "
                "afterwards (a thread started inside takes part with contextvars.copy_context().run)"
            )

    def _check_left(self, what: str) -> None:
        for part in _carried.get():
            if part in self._left:
                raise RuntimeError(
                    f"{what} in a thread or task that was started inside {part.what}, which was left meanwhile; "
                    "expected the thread or task to end before that"
                )

    def _check_no_other_pass(self, what: str) -> None:
        me = threading.get_ident()
        # PyTorch calls no hook at the end of a pass that Ctrl-C interrupts, so the count alone does not suffice.
        if any(thread != me and self.runs(thread) for thread in list(self._passes)):
            raise RuntimeError(
                f"{what} while the model runs in another thread; expected it before that pass or after it"
            )


def _runs_modules(thread: int) -> bool:
    """Return whether a thread is inside the call of a module now."""
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
