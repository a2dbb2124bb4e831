"""Continuous batching: transformers' `generate_batch` inside a batch, where each request is steered by its own adapter.

transformers packs tokens of several requests into one row, without padding, and runs the passes in its own thread. A
pass may have a part of a long prompt beside generated tokens of other requests. `ContinuousRun` tells which request
each token belongs to, and the token's place in it.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig

from ..positions import Positions
from .options import token_gains
from .replaced import ending_streamer, replace_method
from .requests import Request

_CHILD = "__child#"  # stands in the ids of further returned sequences, after their request's id


class ContinuousRun:
    """A running `generate_batch` inside a batch.

    Attributes:
        manager: transformers' manager of the requests, once there is one.
    """

    def __init__(self, prompts: Sequence[int], entering: Callable[[], AbstractContextManager[None]]) -> None:
        """
        Args:
            prompts: the number of tokens of each request's prompt.
            entering: makes a context in which the present thread may run the model.
        """
        self.manager: Any = None
        self._prompts, self._entering = list(prompts), entering
        self._error: BaseException | None = None
        self._closed = False
        self._thread: int | None = None
        self._ended = threading.Event()
        self._ended.set()

    def take(self, manager: Any) -> Any:
        """Let a manager that has not been started belong to this run. Returns the manager.

        Its thread takes part in the scopes of the present thread, and its requests have their rows' numbers as ids.
        """
        loop = manager._run_generation_loop

        def run(*args: Any, **kwargs: Any) -> None:
            try:
                self._loop(loop, *args, **kwargs)
            finally:
                self._ended.set()

        def add_requests(inputs: Sequence[Any], **options: Any) -> list[Any]:
            return [manager.add_request(ids, request_id=f"req_{row}", **options) for row, ids in enumerate(inputs)]

        manager._run_generation_loop, manager.add_requests = run, add_requests
        take_part(manager)
        self._ended.clear()
        self.manager = manager
        return manager

    def _loop(self, loop: Any, *args: Any, **kwargs: Any) -> None:
        try:
            with self._entering():
                self._thread = threading.get_ident()
                loop(*args, **kwargs)
        except BaseException as error:  # raised in the thread that called generate_batch
            self._error = error

    @property
    def is_here(self) -> bool:
        """Whether the present thread runs this run's passes."""
        return self._thread == threading.get_ident()

    def close(self) -> None:
        """Wait for the thread's end. Passes that it would still begin fail."""
        self._closed = True
        thread = None if self.manager is None else self.manager._generation_thread
        if thread is not None:  # it is None if it was never started, or has ended
            self._ended.wait()

    def check(self) -> None:
        """Raise the error that ended the thread, or a pass of it."""
        if self._error is not None:
            raise self._error

    def note(self, error: BaseException) -> None:
        """Keep the error of a pass, because transformers only logs it."""
        self._error = self._error or error

    def tokens(
        self, columns: int, slots: Sequence[int], scales: Sequence[float], where: Sequence[Positions]
    ) -> tuple[Tensor, Tensor]:
        """Return the slot and the gain of each token of the pass that begins.

        Args:
            columns: the number of tokens.
            slots: each row's slot.
            scales: each row's strength.
            where: each row's positions.

        Returns:
            (1, columns) int32 and (1, columns) float32, on the CPU.

        Raises:
            RuntimeError: the pass has other tokens than the requests that are noted for it.
        """
        if self._closed:
            raise RuntimeError("a pass of generate_batch begins after its steering.batch was left; expected none")
        futures = self.manager.batch_processor.inputs_and_outputs.requests_in_batch
        rows = [_row(future.state.request_id) for future in futures]
        counts = [future.query_length for future in futures]
        if sum(counts) != columns:
            raise RuntimeError(f"a pass of generate_batch has {columns} tokens; expected its requests' {sum(counts)}")
        gains = token_gains(
            [scales[row] for row in rows],
            [Request(None, None, where[row]) for row in rows],
            [self._prompts[row] for row in rows],
            # transformers has already counted this pass's tokens.
            [future.state.position_offset - count for future, count in zip(futures, counts, strict=True)],
            counts,
        )
        ids = torch.tensor([slots[row] for row in rows], dtype=torch.int32)
        return ids.repeat_interleave(torch.tensor(counts))[None], torch.from_numpy(gains)[None]


def take_part(manager: Any) -> None:
    """Let the thread of a manager that has not been started take part in the scopes of the present thread."""
    context, loop = contextvars.copy_context(), manager._run_generation_loop
    manager._run_generation_loop = functools.partial(context.run, loop)


def generate_inside(model: Any, what: str, undo: contextlib.ExitStack) -> None:
    """Let the generating methods of a model work inside a scope of the present thread, until `undo` is closed.

    The thread of transformers' continuous batching takes part in the scope. A call of `generate` that is refused in
    another thread ends its streamer.

    Args:
        what: the scope's name in error messages.
    """
    inside: dict[str, Callable[[Any], Any]] = {
        "generate": ending_streamer,
        "generate_batch": functools.partial(_batch_inside, model, what),
        "init_continuous_batching": functools.partial(_manager_inside, model, what),
    }
    for name, make in inside.items():
        if hasattr(model, name):
            replace_method(model, name, make(getattr(model, name)), undo)


def _batch_inside(model: Any, what: str, original: Any) -> Any:
    parameters = inspect.signature(original)

    def generate_batch(*args: Any, **kwargs: Any) -> Any:
        given = parameters.bind_partial(*args, **kwargs).arguments
        _refuse_persistent(model, given.get("persistent_manager"), what)
        return original(*args, **kwargs)

    return generate_batch


def _manager_inside(model: Any, what: str, original: Any) -> Any:
    def init_continuous_batching(*args: Any, **kwargs: Any) -> Any:
        _refuse_persistent(model, False, what)
        manager = original(*args, **kwargs)
        take_part(manager)
        return manager

    return init_continuous_batching


def _refuse_persistent(model: Any, asked: Any, what: str) -> None:
    if asked or getattr(model, "_cached_continuous_batching_manager", None) is not None:
        raise ValueError(
            f"generate_batch has a persistent manager; expected none inside {what}: its cached blocks would be used "
            "outside too (destroy_cached_continuous_batching_manager removes it)"
        )


def _row(request: str) -> int:
    return int(request.partition(_CHILD)[0].removeprefix("req_"))


def checked_arguments(model: Any, requests: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the arguments of `generate_batch` inside a batch of this number of requests.

    Returns:
        The arguments for transformers. Requests share no cached blocks, because transformers' key of a block does not
        contain the adapter.

    Raises:
        TypeError, ValueError: another number of prompts, an empty prompt, or an option that steering by rows lacks.
    """
    inputs = given.get("inputs")
    if not isinstance(inputs, (list, tuple)) or not all(isinstance(ids, (list, tuple)) for ids in inputs):
        raise TypeError(f"inputs is {inputs!r:.80}; expected a list with a list of token ids for each request")
    if len(inputs) != requests:
        raise ValueError(
            f"inputs has {len(inputs)} prompts; expected {requests}, one for each name given to steering.batch"
        )
    if [] in map(list, inputs):
        raise ValueError(f"inputs has no tokens in row {list(map(list, inputs)).index([])}; expected at least one")
    _refuse_persistent(model, given.get("persistent_manager"), "steering.batch")
    config = given.get("continuous_batching_config")
    if config is None:
        generation = given.get("generation_config") or model.generation_config
        config = getattr(generation, "continuous_batching_config", None) or ContinuousBatchingConfig()
    config = copy.deepcopy(config)
    graphs = config.use_cuda_graph
    for what, asked in {
        "use_cuda_graph": any(graphs) if isinstance(graphs, (tuple, list)) else graphs,
        "use_async_batching": config.use_async_batching,
        "varlen_compile_config": config.varlen_compile_config,
        "decode_compile_config": config.decode_compile_config,
        "default_compile_level": config.default_compile_level,
    }.items():
        if asked:
            raise ValueError(f"{what} is {getattr(config, what)!r}; expected it not to be set inside steering.batch")
    config.use_cuda_graph = config.use_async_batching = config.allow_block_sharing = False
    return {**given, "continuous_batching_config": config}
