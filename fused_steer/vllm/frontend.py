"""Checks requests before vLLM's engine gets them, and replaces each adapter by its copy.

A client names an adapter by a number, a name and a path. The first time that a number is seen, its adapter is copied
and checked, and the number stands for that copy until the adapter is unloaded. Loaded in place, another adapter gets a
number of its own in the engine, so that requests that run go on by the one that they began with.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from vllm.exceptions import LoRAAdapterNotFoundError, VLLMValidationError
from vllm.lora.request import LoRARequest

from ..positions import ALL
from ..serving.options import KEY, packed, read_options
from .cache import salt
from .sources import Copies, Served

#: Numbers of adapters that were loaded in place begin here, far above those that clients and servers give.
_FIRST_OWN = 2**30


@dataclass(frozen=True)
class Known:
    """An adapter that a number stands for.

    Attributes:
        path: the client's path.
        found: the request for the engine.
        served: the copy; None: it is not a steering adapter.
    """

    path: str
    found: LoRARequest
    served: Served | None


class Registry:
    """The adapters of one engine, by the numbers that clients give them."""

    def __init__(self, config: Any) -> None:
        """
        Args:
            config: the engine's config.
        """
        self._copies = Copies(config)
        self._known: dict[int, Known] = {}
        self._loaded: set[int] = set()  # those that the engine has loaded
        self._numbers = itertools.count(_FIRST_OWN)
        self._lock = threading.Lock()

    def knows(self, request: LoRARequest) -> bool:
        return request.lora_int_id in self._known and not request.load_inplace

    def is_ready(self, request: LoRARequest) -> bool:
        """Return whether the engine has loaded the adapter, or loads it by itself because it is not a steering one."""
        given = request.lora_int_id
        return self.knows(request) and (given in self._loaded or self._known[given].served is None)

    def take(self, request: LoRARequest) -> tuple[LoRARequest, Served | None]:
        """Return the adapter request for the engine, and the copy it names, or None if it is not a steering adapter.

        Raises:
            VLLMValidationError: the adapter is broken, cannot be served here, or is not there.
        """
        with self._lock:
            given = request.lora_int_id
            known = self._known.get(given)
            steers = known is not None and known.served is not None
            if known is not None and not request.load_inplace and (steers or request.lora_path == known.path):
                if request.lora_path != known.path:
                    raise VLLMValidationError(
                        f"adapter {request.lora_name!r} has the number {given}, which stands for {known.path}; "
                        "expected a number of its own, or that one to be unloaded first"
                    )
                return known.found, known.served
            try:
                served = self._copies.take(request.lora_path)
            except FileNotFoundError as error:
                # In vLLM's words, which its server answers with status 404.
                missing = LoRAAdapterNotFoundError(request.lora_name, request.lora_path)
                raise VLLMValidationError(f"adapter {request.lora_name!r}: {missing}; expected a saved one") from error
            except (ValueError, OSError) as error:
                raise VLLMValidationError(f"adapter {request.lora_name!r}: {error}") from error
            found = request
            if served is not None:
                found = msgspec.structs.replace(request, lora_path=served.path, load_inplace=False)
                if known is not None and known.served == served:
                    found = known.found
                elif known is not None:
                    number = next(self._numbers)
                    name = f"{request.lora_name}#{number - _FIRST_OWN + 2}"
                    found = msgspec.structs.replace(found, lora_name=name, lora_int_id=number)
            self._known[given] = Known(request.lora_path, found, served)
            return found, served

    def number(self, given: int) -> int:
        """Return the engine's number of an adapter."""
        known = self._known.get(given)
        return given if known is None else known.found.lora_int_id

    def forget(self, given: int) -> None:
        self._known.pop(given, None)
        self._loaded.discard(given)

    @contextlib.contextmanager
    def loading(self, given: int) -> Iterator[None]:
        """Note that the engine loads an adapter inside. If it fails, the number stands for what it stood for before."""
        before = self._known.get(given)
        try:
            yield
        except BaseException:
            self.forget(given)
            if before is not None:
                self._known[given] = before
            raise
        self._loaded.add(given)

    def given(self, numbers: set[int]) -> set[int]:
        """Return the clients' numbers of the engine's adapters."""
        of = {known.found.lora_int_id: given for given, known in self._known.items()}
        return {of.get(number, number) for number in numbers}


def registry_of(processor: Any) -> Registry | None:
    """Return the registry of an engine, or None if the engine serves no adapters."""
    if processor.vllm_config.lora_config is None:
        return None
    registry: Registry | None = getattr(processor, "steering_registry", None)
    if registry is None:
        registry = processor.steering_registry = Registry(processor.vllm_config)
    return registry


def process_inputs(original: Any) -> Callable[..., Any]:
    """Wrap the method that checks a request and converts it for the engine."""
    signature = inspect.signature(original)

    def process_inputs(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments
        request = given.get("lora_request")
        extra = getattr(given["params"], "extra_args", None) or {}
        registry = registry_of(given["self"])
        served = None
        if request is not None and registry is not None:
            given["lora_request"], served = registry.take(request)
        own = ALL if served is None else served.positions
        if KEY not in extra and own == ALL:
            return original(*bound.args, **bound.kwargs)
        if not hasattr(given["params"], "extra_args"):
            assert request is not None  # as its adapter has positions
            name = request.lora_name
            raise VLLMValidationError(f"adapter {name!r} has positions {own!r}; expected 'all' for pooling")
        try:
            options = read_options(extra.get(KEY, {}), own)
        except (TypeError, ValueError) as error:
            raise VLLMValidationError(str(error)) from error
        if served is None:
            what = "no adapter" if request is None else f"adapter {request.lora_name!r}, which does not steer"
            raise VLLMValidationError(f"{KEY} is given with {what}; expected a steering adapter")
        made = original(*bound.args, **bound.kwargs)
        made.sampling_params.extra_args = {**extra, KEY: packed(options)}  # vLLM copied them for this request
        made.cache_salt = salt(made.cache_salt, options, served.shares_prompt)
        return made

    return process_inputs


# Each of these wraps a method of vLLM's engine, or of its asynchronous engine for servers.


def add_lora(original: Any) -> Callable[..., Any]:
    """Load an adapter: checked and copied before the engine hears of it."""

    def add_lora(self: Any, lora_request: LoRARequest) -> bool:
        registry = registry_of(self.input_processor)
        if registry is None:
            return original(self, lora_request)
        before = registry.number(lora_request.lora_int_id)
        with registry.loading(lora_request.lora_int_id):
            found, served = registry.take(lora_request)
            loaded = original(self, found)
        if served is not None and found.lora_int_id != before:
            self.engine_core.remove_lora(before)
        return loaded

    async def add_lora_async(self: Any, lora_request: LoRARequest) -> bool:
        registry = registry_of(self.input_processor)
        if registry is None:
            return await original(self, lora_request)
        before = registry.number(lora_request.lora_int_id)
        with registry.loading(lora_request.lora_int_id):
            # In a thread: reading and copying files would hold up the answers of all other requests.
            found, served = await asyncio.to_thread(registry.take, lora_request)
            loaded = await original(self, found)
        if served is not None and found.lora_int_id != before:
            await self.engine_core.remove_lora_async(before)
        return loaded

    return add_lora_async if inspect.iscoroutinefunction(original) else add_lora


def add_request(original: Any) -> Callable[..., Any]:
    """Add a request. A steering adapter that is new is loaded first, because a failure later would end the engine."""
    signature = inspect.signature(original)

    def unknown(args: Any, kwargs: Any) -> tuple[Any, Registry, LoRARequest] | None:
        given = signature.bind(*args, **kwargs).arguments
        engine, request = given["self"], given.get("lora_request")
        registry = None if request is None else registry_of(engine.input_processor)
        return None if registry is None or registry.is_ready(request) else (engine, registry, request)

    def refused(request: LoRARequest, error: Exception) -> Exception:
        if isinstance(error, VLLMValidationError):
            return error
        return VLLMValidationError(f"adapter {request.lora_name!r}: {error}")

    def add_request(*args: Any, **kwargs: Any) -> Any:
        if found := unknown(args, kwargs):
            engine, registry, request = found
            try:
                if registry.take(request)[1] is not None:
                    engine.add_lora(request)
            except Exception as error:
                raise refused(request, error) from error
        return original(*args, **kwargs)

    async def add_request_async(*args: Any, **kwargs: Any) -> Any:
        if found := unknown(args, kwargs):
            engine, registry, request = found
            try:
                if (await asyncio.to_thread(registry.take, request))[1] is not None:
                    await engine.add_lora(request)
            except Exception as error:
                raise refused(request, error) from error
        return await original(*args, **kwargs)

    return add_request_async if inspect.iscoroutinefunction(original) else add_request


def remove_lora(original: Any) -> Callable[..., Any]:
    """Unload an adapter; its number is free for another."""
    return _by_number(original, forget=True)


def pin_lora(original: Any) -> Callable[..., Any]:
    """Keep an adapter loaded."""
    return _by_number(original, forget=False)


def _by_number(original: Any, forget: bool) -> Callable[..., Any]:
    def call(self: Any, lora_id: int) -> Any:
        registry = registry_of(self.input_processor)
        number = lora_id if registry is None else registry.number(lora_id)
        if registry is not None and forget:
            registry.forget(lora_id)
        return original(self, number)

    return call  # what an asynchronous method returns is awaited by the caller


def list_loras(original: Any) -> Callable[..., Any]:
    """The numbers of the loaded adapters, as clients gave them."""

    def list_loras(self: Any) -> set[int]:
        registry = registry_of(self.input_processor)
        found = original(self)
        return found if registry is None else registry.given(found)

    async def list_loras_async(self: Any) -> set[int]:
        registry = registry_of(self.input_processor)
        found = await original(self)
        return found if registry is None else registry.given(found)

    return list_loras_async if inspect.iscoroutinefunction(original) else list_loras
