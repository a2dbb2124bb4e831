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
import threading
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

#: The numbers of the scopes that were opened in this thread or task, outermost first.
_carried: ContextVar[tuple[int, ...]] = ContextVar("fused_steer_scopes", default=())
_numbers = itertools.count()


class Lock:
    """A reentrant lock that copies of a model and forked processes have anew: they share none with this one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: Any) -> None:
        self._lock.release()

    def acquire(self, timeout: float = -1) -> bool:
        return self._lock.acquire(timeout=timeout)

    def release(self) -> None:
        self._lock.release()

    def renew(self) -> None:
        """Forget who holds it: in a forked process nobody does."""
        self._lock = threading.RLock()

    def __reduce__(self) -> Any:
        return Lock, ()


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


class Scope:
    """An open scope. It ends with the block that holds it, also where an exception kept its end from running."""

    __slots__ = ("__weakref__", "number", "what")

    def __init__(self, what: str) -> None:
        self.what = what
        self.number = next(_numbers)


class Scopes:
    """The open scopes of one model, and the passes that run in each thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._passes: dict[int, int] = {}  # by thread
        self._open: weakref.WeakSet[Scope] = weakref.WeakSet()
        _all.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # of a copied model: nothing runs, and no scope is open

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def begin_pass(self) -> None:
        """Say that the model runs in this thread, until `end_pass`.

        Raises:
            RuntimeError: a scope is open that is not this thread's or task's.
        """
        with self._lock:
            self._check("the model runs")
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
            self._check(what)
            self._check_no_other_pass(what)
            yield

    @contextlib.contextmanager
    def open(self, what: str) -> Iterator[Scope]:
        """A scope, which the model's passes in other threads and tasks may not enter.

        Args:
            what: opens it, for the error: "steering.disabled()".

        Raises:
            RuntimeError: as `change`.
        """
        with self._lock:
            self._check(f"{what} is entered")
            self._check_no_other_pass(f"{what} is entered")
            scope = Scope(what)
            self._open.add(scope)
        earlier = _carried.get()
        try:
            _carried.set((*earlier, scope.number))
            yield scope
        finally:
            self._open.discard(scope)
            _carried.set(earlier)

    def foreign(self) -> Scope | None:
        """A scope that is open and not this thread's or task's; None: there is none."""
        carried = _carried.get()
        return next((scope for scope in self._open if scope.number not in carried), None)

    def _check(self, what: str) -> None:
        if not self._open:
            return
        scope = self.foreign()
        if scope is not None:
            raise RuntimeError(
                f"{what} inside {scope.what} of another thread or task; expected it in the one that opened that, or "
                "after it (a thread started inside takes part with contextvars.copy_context().run)"
            )

    def _check_no_other_pass(self, what: str) -> None:
        me = threading.get_ident()
        if any(thread != me for thread in self._passes):
            raise RuntimeError(
                f"{what} while the model runs in another thread; expected it before that pass or after it"
            )


_all: weakref.WeakSet[Scopes] = weakref.WeakSet()


def _after_fork() -> None:
    """Only the thread that forked goes on in the new process."""
    for lock in list(_locks):
        lock.renew()
    me = threading.get_ident()
    for scopes in list(_all):
        scopes._passes = {thread: count for thread, count in scopes._passes.items() if thread == me}


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
