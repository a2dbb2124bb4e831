"""Tests of batches and changes of the steering in threads, asyncio tasks, forked processes and copies of a model."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import os
import pickle
import signal
import threading
import time
from typing import Any

import pytest
import torch
from models import build, randomize, refused, tokens
from torch import Tensor
from transformers import PreTrainedModel

from fused_steer import SteerConfig, patch_model
from fused_steer.serving.replaced import replace_method

PROMPTS = tokens(batch=1, length=7)


@pytest.fixture
def model() -> PreTrainedModel:
    model = patch_model(build(), SteerConfig(rank=4, scale=0.7), adapter_name="polite")
    model.steering.add("vector", SteerConfig(form="vector", layers=[0, 2]))
    randomize(model, "polite", 1), randomize(model, "vector", 2)
    return model


def greedy(model: PreTrainedModel) -> Tensor:
    return model.generate(PROMPTS, max_new_tokens=5, do_sample=False)[:, PROMPTS.shape[1] :]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(PROMPTS).logits


def alone(model: PreTrainedModel, name: str) -> Tensor:
    """Generate with one adapter, without a batch."""
    active = model.steering.active
    model.steering.use(name)
    found = greedy(model)
    model.steering.use(active)
    return found


def tried(call: Any) -> Any:
    """Run `call`; return its result or its error."""
    try:
        return call()
    except Exception as error:
        return error


def in_thread(call: Any, carry: bool = False) -> Any:
    """Run `call` in a new thread; return its result or its error."""
    found: list[Any] = []

    def run() -> None:
        found.append(tried(call))

    thread = threading.Thread(target=contextvars.copy_context().run if carry else run, args=[run] if carry else [])
    thread.start()
    thread.join()
    return found[0]


def test_threads_changes_of_other_threads_are_refused(model):
    steering = model.steering
    steering.use("polite")
    expected = greedy(model)

    def scale() -> None:
        steering.scale = 0.1

    def leave_out() -> None:
        with steering.disabled():
            pass

    with steering.batch([None]):
        for change in (
            lambda: steering.use("vector"),
            scale,
            leave_out,
            lambda: steering.add("late"),
            steering.unpatch,
        ):
            error = in_thread(change)
            assert isinstance(error, RuntimeError) and "steering.batch of another thread or task; expected" in str(
                error
            )
    assert torch.equal(greedy(model), expected)
    with steering.disabled():
        error = in_thread(lambda: logits(model))
        assert "the model runs inside steering.disabled() of another thread or task" in str(error)
        assert in_thread(lambda: logits(model), carry=True).shape[0] == 1


def test_threads_change_while_another_thread_runs_the_model_is_refused(model):
    entered, leave = threading.Event(), threading.Event()

    def wait(module: Any, args: Any) -> None:
        entered.set()
        leave.wait()

    model.steering.use("polite")
    expected = logits(model)
    found: list[Any] = []
    handle = model.model.layers[1].register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: found.append(logits(model)))
    thread.start()
    entered.wait()
    with refused(RuntimeError, "steering.use is called while the model runs in another thread; expected"):
        model.steering.use("vector")
    with (
        refused(RuntimeError, "steering.disabled() is entered while the model runs in another thread"),
        model.steering.disabled(),
    ):
        pass
    leave.set()
    thread.join()
    handle.remove()
    assert torch.equal(found[0], expected)
    model.steering.use("vector")


def test_threads_pass_that_was_interrupted_is_over(model):
    """After Ctrl-C a forward pass counts as over, although PyTorch calls no hook at its end."""

    def interrupt(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    model.steering.use("polite")
    expected = logits(model)
    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(model)
    handle.remove()
    assert in_thread(lambda: model.steering.use("vector")) is None  # the interrupted thread lives on
    model.steering.use("polite")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("first", ["opener", "carrier"])
def test_threads_pass_of_a_batch_that_was_interrupted_is_over(model, first):
    """Then any thread that takes part may run the model, as before."""

    def interrupt(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    def interrupted() -> None:
        handle = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            logits(model)
        handle.remove()

    done = threading.Event()
    with model.steering.batch(["polite"]):
        expected = logits(model)
        if first == "opener":
            interrupted()
            assert torch.equal(in_thread(lambda: logits(model), carry=True), expected)
        else:
            waiting = threading.Event()
            run = contextvars.copy_context().run
            thread = threading.Thread(target=run, args=(lambda: (interrupted(), waiting.set(), done.wait(60)),))
            thread.start()
            assert waiting.wait(60)  # the interrupted thread lives on
            assert torch.equal(logits(model), expected)
            done.set()
            thread.join()
        assert torch.equal(greedy(model), alone_in_a_copy(model))
        assert torch.equal(in_thread(lambda: greedy(model), carry=True), alone_in_a_copy(model))


def alone_in_a_copy(model: PreTrainedModel) -> Tensor:
    return alone(copy.deepcopy(model), "polite")


def test_threads_belongs_to_a_task(model):
    async def serve(opened: asyncio.Event, done: asyncio.Event) -> Any:
        with model.steering.batch(["polite"]):
            opened.set()
            await done.wait()
            return greedy(model)

    async def main() -> Any:
        opened, done = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(serve(opened, done))
        await opened.wait()
        with refused(RuntimeError, "the model runs inside steering.batch of another thread or task"):
            greedy(model)
        with refused(RuntimeError, "a batch is running already"), model.steering.batch(["vector"]):
            pass
        done.set()
        return await task

    assert torch.equal(asyncio.run(main()), alone(model, "polite"))


class Streamer:
    """A streamer that collects tokens of `generate`; a reader in another thread waits for `end`."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = threading.Event()

    def put(self, value: Any) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended.set()


def test_threads_streams_from_a_thread(model):
    expected = alone(model, "polite")[0].tolist()
    options = {"inputs": PROMPTS, "max_new_tokens": 3, "do_sample": False}
    base = build().generate(PROMPTS, max_new_tokens=3, do_sample=False)[0].tolist()
    scopes = {
        lambda: model.steering.batch(["polite"]): PROMPTS[0].tolist() + expected[:3],
        model.steering.disabled: base,
    }
    for scope, answer in scopes.items():
        for carry in (True, False):
            streamer = Streamer()
            with scope():
                found = in_thread(lambda: model.generate(**options, streamer=streamer), carry)  # noqa: B023
            assert streamer.ended.is_set()  # so no reader waits for ever
            if carry:
                assert streamer.tokens == answer
            else:
                assert isinstance(found, RuntimeError)
                assert streamer.tokens in ([], PROMPTS[0].tolist())  # generate puts the prompt in before the first pass
    assert "generate" not in vars(model)


@pytest.mark.parametrize("scope", ["batch", "disabled"])
def test_threads_answer_whose_scope_is_left_is_an_error(model, scope):
    entered, leave = threading.Event(), threading.Event()
    model.steering.use("polite")
    expected = greedy(model)

    def wait(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] == PROMPTS.shape[1] + 2:
            entered.set()
            assert leave.wait(60)
        return scores

    def answer() -> Tensor:
        return model.generate(PROMPTS, max_new_tokens=5, do_sample=False, logits_processor=[wait])

    found: list[Any] = []
    with model.steering.batch(["vector"]) if scope == "batch" else model.steering.disabled():
        thread = threading.Thread(target=contextvars.copy_context().run, args=(lambda: found.append(tried(answer)),))
        thread.start()
        assert entered.wait(60)
    leave.set()
    thread.join()
    assert isinstance(found[0], RuntimeError) and "left meanwhile; expected" in str(found[0])
    assert torch.equal(greedy(model), expected)


def test_threads_answer_of_a_compiled_model_whose_scope_is_left_is_an_error(model):
    """No hook of a compiled pass runs, so the end of the call tells."""
    undo = contextlib.ExitStack()
    replace_method(model, "generate", lambda: undo.close(), undo)
    with refused(RuntimeError, "generate ran on after its scope was left", "expected"):
        model.generate()
    assert "generate" not in vars(model)


@pytest.mark.parametrize("positions", ["all", "prompt"])
def test_threads_jit_trace_of_a_model_in_a_batch_is_refused_by_name(positions):
    model = patch_model(build(), SteerConfig(rank=2, positions=positions))
    scope = model.steering.batch(["default"]) if positions == "all" else contextlib.nullcontext()
    with scope, refused(RuntimeError, "torch.jit.trace cannot record", "expected torch.export"):
        torch.jit.trace(model, (PROMPTS,), strict=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_threads_copy_made_inside_is_a_whole_model(model, duplicate):
    model.steering.use("polite")
    expected = greedy(model)
    with model.steering.batch(["vector"]):
        in_batch = duplicate(model)
    with model.steering.disabled():
        disabled = duplicate(model)
    for twin in (in_batch, disabled):
        assert torch.equal(greedy(twin), expected)
        with twin.steering.batch(["vector"]):
            batch = greedy(twin)
        assert torch.equal(batch, alone(model, "vector"))
        twin.steering.unpatch()
    assert torch.equal(greedy(model), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_threads_of_another_thread_is_not_in_a_forked_process(model):
    entered, leave = threading.Event(), threading.Event()

    def serve() -> None:
        with model.steering.batch(["vector"]):
            entered.set()
            leave.wait()

    model.steering.use("polite")
    expected = logits(model)
    thread = threading.Thread(target=serve)
    thread.start()
    entered.wait()
    child = os.fork()
    if child == 0:
        right = False
        with contextlib.suppress(BaseException):
            right = torch.equal(logits(model), expected)
            with model.steering.batch(["vector"]):
                right = right and logits(model).isfinite().all().item()
        os._exit(0 if right else 1)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
    leave.set()
    thread.join()
    assert done and os.waitstatus_to_exitcode(status) == 0
