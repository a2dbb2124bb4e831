"""Tests of scopes: passes of other threads and tasks, changes during a pass, exceptions at a scope's end, forks."""

import asyncio
import contextvars
import copy
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fused_steer.model.scopes import Scopes


def elsewhere(call: Callable[[], Any], carry: bool = False) -> Any:
    """Run a call in another thread; return its result or its error."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(call())
        except Exception as error:
            found.append(error)

    target: Callable[[], Any] = run
    if carry:
        context = contextvars.copy_context()
        target = lambda: context.run(run)  # noqa: E731
    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    return found[0]


def ended() -> None:
    """End a scope without doing anything."""


def one_pass(scopes: Scopes) -> str:
    scopes.begin_pass()
    scopes.end_pass()
    return "ran"


def test_scopes_pass_of_another_thread_is_refused_inside_and_runs_afterwards():
    scopes = Scopes()
    with scopes.open("steering.disabled()", ended):
        error = elsewhere(lambda: one_pass(scopes))
        assert isinstance(error, RuntimeError)
        assert "the model runs inside steering.disabled() of another thread or task; expected" in str(error)
        assert "\n" not in str(error)
        assert one_pass(scopes) == "ran"
        assert elsewhere(lambda: one_pass(scopes), carry=True) == "ran"
    assert elsewhere(lambda: one_pass(scopes)) == "ran"


def test_scopes_nest():
    scopes = Scopes()
    with scopes.open("steering.batch", ended), scopes.open("steering.disabled()", ended):
        assert one_pass(scopes) == "ran"
    with scopes.change("steering.use is called"):
        pass


def test_scopes_change_waits_for_no_pass_but_is_refused():
    scopes = Scopes(runs=lambda thread: True)
    scopes.begin_pass()
    for attempt in (scopes.change("steering.use is called"), scopes.open("steering.disabled()", ended)):
        error = elsewhere(lambda: attempt.__enter__())  # noqa: B023
        assert isinstance(error, RuntimeError) and "while the model runs in another thread; expected" in str(error)
    with scopes.change("steering.use is called"):  # the thread's own pass does not count
        pass
    scopes.end_pass()
    assert elsewhere(lambda: scopes.change("x").__enter__()) is None


def test_scopes_pass_waits_for_a_change():
    scopes, order = Scopes(), []

    def run() -> None:
        scopes.begin_pass()
        order.append("pass")
        scopes.end_pass()

    thread = threading.Thread(target=run)
    with scopes.change("steering.use is called"):
        thread.start()
        thread.join(0.05)
        order.append("change")
    thread.join()
    assert order == ["change", "pass"]


def test_scopes_belong_to_a_task():
    scopes = Scopes()

    async def first(opened: asyncio.Event, done: asyncio.Event) -> None:
        with scopes.open("steering.batch", ended):
            opened.set()
            await done.wait()
            one_pass(scopes)

    async def main() -> None:
        opened, done = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(first(opened, done))
        await opened.wait()
        with pytest.raises(RuntimeError, match=r"the model runs inside steering.batch of another thread or task"):
            one_pass(scopes)
        done.set()
        await task
        one_pass(scopes)

    asyncio.run(main())


def test_scopes_that_were_left_are_not_entered_by_a_copied_context():
    scopes, other = Scopes(), Scopes()
    with scopes.open("steering.batch", ended):
        context = contextvars.copy_context()
        assert context.run(lambda: one_pass(scopes)) == "ran"
    error = r"the model runs in a thread or task that was started inside steering.batch, which was left meanwhile"
    with pytest.raises(RuntimeError, match=error):
        context.run(scopes.begin_pass)
    context.run(lambda: one_pass(other))  # of another model
    one_pass(scopes)
    with scopes.open("steering.batch", ended):
        context = contextvars.copy_context()
        context.run(scopes.begin_pass)
    with pytest.raises(RuntimeError, match=error):  # it may have run in part outside
        context.run(scopes.end_pass)


def test_scopes_end_with_their_block_though_its_end_did_not_run():
    scopes, done = Scopes(), []

    def end_raises() -> None:
        done.append("raises")
        if done.count("raises") == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), scopes.open("steering.batch", end_raises):
        pass
    assert elsewhere(lambda: one_pass(scopes)) == "ran"
    assert done == ["raises", "raises"]
    assert scopes.foreign() is None


def test_scopes_that_are_open_when_python_exits_end_without_a_word():
    """Their ends would use modules that Python has deleted by then."""
    script = """if True:
        from fused_steer.model.scopes import Scopes
        from torch import nn
        scopes = Scopes()
        left_open = scopes.open("steering.disabled()", lambda: nn.Parameter)
        left_open.__enter__()
    """
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0 and "ignored" not in done.stderr, done.stderr


def test_scopes_of_a_copy_are_none():
    scopes = Scopes()
    scopes.begin_pass()
    with scopes.open("steering.batch", ended):
        twin = copy.deepcopy(scopes)
    assert elsewhere(lambda: one_pass(twin)) == "ran"
    with twin.change("steering.use is called"):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scopes_locks_are_free_after_a_fork():
    scopes = Scopes()
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        scopes.begin_pass()
        with scopes.turn, scopes.change("x"):
            entered.set()
            leave.wait()
        scopes.end_pass()

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait()
    child = os.fork()
    if child == 0:
        free = scopes.turn.acquire(timeout=1)
        with scopes.change("x"):  # the forked process has no pass of the other thread
            os._exit(0 if free else 1)
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_scopes_of_two_models_may_end_in_another_order():
    one, other = Scopes(), Scopes()
    first, second = one.open("steering.batch", ended), other.open("steering.batch", ended)
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert one_pass(one) == one_pass(other) == "ran"
    second.__exit__(None, None, None)
    assert elsewhere(lambda: one_pass(other)) == "ran"
