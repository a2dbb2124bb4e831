"""Checks requests before vLLM's engine gets them, and replaces each adapter by its copy.

A client names an adapter by a number, a name and a path. The first time that a number is seen, its adapter is copied
and checked, and the number stands for that copy until the adapter is unloaded. A number in the engine stands for one
copy for ever: loaded in place, or under a number that was in use, another adapter gets a number of its own there. So
requests that run go on by the one that they began with.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from vllm.exceptions import LoRAAdapterNotFoundError, VLLMValidationError
from vllm.lora.request import LoRARequest

from ..positions import ALL
from ..serving.options import KEY, packed, parse_options, read_options
from ..serving.requests import Request
from .beams import beam_of, parameters_of
from .cache import salt
from .dose import refusal
from .options import lora_of, server_options
from .sources import Copies, Served, registered

#: Numbers of adapters whose own stands for another one begin here, far above those that clients and servers give.
_FIRST_OWN = 2**30
#: Numbers of adapters that clients name without a number begin here.
_FIRST_NAMED = 2**29
#: The field of a request's steering options that names its adapter.
ADAPTER = "adapter"


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
    """The adapters of one engine, by the numbers that clients give them.

    Attributes:
        alone: whether the engine serves steering without `--enable-lora`.
        named: the adapters that a request's options can name.
        default: the name of the adapter for requests without one, or None.
    """

    def __init__(self, config: Any) -> None:
        """
        Args:
            config: the engine's config.
        """
        self._copies = Copies(config)
        self.alone = lora_of(config) is None
        options = server_options(config)
        self._dose = None if options is None else options.dose
        self.named: dict[str, LoRARequest] = {}
        self.default: str | None = None
        if options is not None and options.adapters is not None:
            folder = Path(options.adapters).expanduser().absolute()
            for number, name in enumerate(registered(options.adapters), _FIRST_NAMED):
                self.named[name] = LoRARequest(name, number, str(folder / name))
        self._known: dict[int, Known] = {}
        self._loaded: dict[int, int] = {}  # the engine's number of each adapter that it has loaded, by the client's
        self._engines: dict[tuple[int, str], int] = {}  # the engine's numbers, by the client's and the path of the copy
        self._numbers = itertools.count(_FIRST_OWN)
        self._lock = threading.Lock()

    def knows(self, request: LoRARequest) -> bool:
        return request.lora_int_id in self._known and not request.load_inplace

    def is_ready(self, request: LoRARequest) -> bool:
        """Return whether the engine has loaded the adapter, or loads it by itself because it is not a steering one."""
        given = request.lora_int_id
        return self.knows(request) and (given in self._loaded or self._known[given].served is None)

    def chosen(self, request: LoRARequest | None, parameters: Any) -> LoRARequest | None:
        """Return the adapter that a request asks for: as vLLM names it, by its options, or the default one.

        Args:
            request: the adapter as vLLM names it, or None.
            parameters: the request's sampling parameters.

        Raises:
            VLLMValidationError: the options name an adapter that is unknown, or another than `request`.
        """
        fields = fields_of(parameters)
        if fields is None or ADAPTER not in fields:
            return self.named.get(self.default) if request is None and self.default is not None else request
        name = fields[ADAPTER]
        if request is not None and request.lora_name != name:
            raise VLLMValidationError(
                f"{KEY}.{ADAPTER} is {name!r} beside the adapter {request.lora_name!r}; expected one of them"
            )
        if name is None or request is not None:
            return request
        if not isinstance(name, str) or name not in self.named:
            known = ", ".join(sorted(self.named)[:20]) or "none"
            raise VLLMValidationError(f"{KEY}.{ADAPTER} is {name!r}; expected a loaded adapter: {known}")
        return self.named[name]

    def check_dose(self, name: str, served: Served, scale: float | None) -> None:
        """Check that a request cannot exceed the highest dose.

        Args:
            scale: the request's; None: the adapter's own.

        Raises:
            VLLMValidationError: it can.
        """
        if self._dose is None:
            return
        reason = refusal(served.dose, served.scale if scale is None else scale, self._dose)
        if reason is not None:
            raise VLLMValidationError(f"adapter {name!r}: {reason}")

    def steers(self, request: LoRARequest) -> bool:
        """Return whether a request's adapter is a steering one.

        Raises:
            VLLMValidationError: the adapter is broken, or is not there.
        """
        if self.knows(request):
            return self._known[request.lora_int_id].served is not None
        with _refusing(request):
            return self._copies.find(request.lora_path) is not None

    def take(self, request: LoRARequest) -> tuple[LoRARequest, Served | None]:
        """Return the adapter request for the engine, and the copy it names, or None if it is not a steering adapter.

        Raises:
            VLLMValidationError: the adapter is broken, cannot be served here, or is not there.
        """
        known = self.copied(request)
        self._known[request.lora_int_id] = known
        return known.found, known.served

    def copied(self, request: LoRARequest) -> Known:
        """Return what an adapter's number stands for, or would stand for once it is taken or loaded.

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
                return known
            with _refusing(request):
                served = self._copies.take(request.lora_path)
            if served is None and self.alone:
                raise VLLMValidationError(
                    f"adapter {request.lora_name!r} does not steer; expected a steering adapter without --enable-lora"
                )
            found = request
            if served is not None:
                found = msgspec.structs.replace(request, lora_path=served.path, load_inplace=False)
                number = self._number_for(given, served.path)
                if number != given:
                    name = f"{request.lora_name}#{number - _FIRST_OWN + 2}"
                    found = msgspec.structs.replace(found, lora_name=name, lora_int_id=number)
            return Known(request.lora_path, found, served)

    def _number_for(self, given: int, path: str) -> int:
        """Return the engine's number of a copy: the client's, unless that stands for another copy there."""
        if (given, path) not in self._engines:
            is_free = all(client != given for client, _ in self._engines)
            self._engines[given, path] = given if is_free else next(self._numbers)
        return self._engines[given, path]

    def loaded(self, request: LoRARequest, known: Known) -> int | None:
        """Note that the engine has loaded an adapter. Options can name it.

        Returns:
            the engine's number of the adapter in whose place it was loaded, or None.
        """
        given, number = request.lora_int_id, known.found.lora_int_id
        before = self._loaded.get(given)
        self._known[given], self._loaded[given] = known, number
        self.named[request.lora_name] = self.as_loaded(request)
        return None if before == number or known.served is None else before

    def as_loaded(self, request: LoRARequest) -> LoRARequest:
        """Return the request for a steering adapter once it is loaded, which does not load it again."""
        known = self._known.get(request.lora_int_id)
        if known is None or known.served is None:
            return request
        return msgspec.structs.replace(request, load_inplace=False)

    def unname(self, request: LoRARequest) -> None:
        """Take a name away from options, if it still names this adapter."""
        name = request.lora_name
        if name in self.named and self.named[name].lora_int_id == request.lora_int_id:
            del self.named[name]
            if self.default == name:
                self.default = None

    def number(self, given: int) -> int:
        """Return the engine's number of an adapter."""
        known = self._known.get(given)
        return given if known is None else known.found.lora_int_id

    def forget(self, given: int) -> None:
        self._known.pop(given, None)
        self._loaded.pop(given, None)
        for request in [request for request in self.named.values() if request.lora_int_id == given]:
            self.unname(request)

    def given(self, numbers: set[int]) -> set[int]:
        """Return the clients' numbers of the engine's adapters."""
        of = {number: given for (given, _), number in self._engines.items()}
        return {of.get(number, number) for number in numbers}


@contextlib.contextmanager
def _refusing(request: LoRARequest) -> Iterator[None]:
    """Raise errors of an adapter's files with its name.

    Raises:
        VLLMValidationError: one was raised inside.
    """
    try:
        yield
    except FileNotFoundError as error:
        # In vLLM's words, which its server answers with status 404.
        missing = LoRAAdapterNotFoundError(request.lora_name, request.lora_path)
        raise VLLMValidationError(f"adapter {request.lora_name!r}: {missing}; expected a saved one") from error
    except (ValueError, OSError) as error:
        raise VLLMValidationError(f"adapter {request.lora_name!r}: {error}") from error


def fields_of(parameters: Any) -> Mapping[str, Any] | None:
    """Return the fields of a request's steering options, or None if it has none.

    Raises:
        VLLMValidationError: it has something else.
    """
    extra = getattr(parameters, "extra_args", None)
    if not extra or KEY not in extra:
        return None
    try:
        return parse_options(extra[KEY])
    except (TypeError, ValueError) as error:
        raise VLLMValidationError(str(error)) from error


def registry_of(processor: Any) -> Registry | None:
    """Return the registry of an engine, or None if the engine serves no adapters."""
    registry: Registry | None = getattr(processor, "steering_registry", None)
    if registry is None:
        if lora_of(processor.vllm_config) is None and server_options(processor.vllm_config) is None:
            return None
        registry = processor.steering_registry = Registry(processor.vllm_config)
    return registry


def process_inputs(original: Any) -> Callable[..., Any]:
    """Wrap the method that checks a request and converts it for the engine."""
    signature = inspect.signature(original)

    def process_inputs(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments
        given["params"] = parameters = parameters_of(given)
        if KEY in (getattr(parameters, "extra_kwargs", None) or ()):
            raise VLLMValidationError(
                f"{KEY} is given for pooling; expected none, as pooling has the adapter's own scale"
            )
        request, fields = given.get("lora_request"), fields_of(parameters)
        registry = registry_of(given["self"])
        found = served = None
        if registry is not None and (request := registry.chosen(request, parameters)) is not None:
            found, served = registry.take(request)
            # Without --enable-lora vLLM refuses an adapter here, and passes it on later.
            given["lora_request"] = None if registry.alone else found

        def make(options: Request | None) -> Any:
            made = original(*bound.args, **bound.kwargs)
            if found is not None:
                made.lora_request = found
            if fields is not None:  # vLLM copied them for this request
                others = {key: value for key, value in made.sampling_params.extra_args.items() if key != KEY}
                made.sampling_params.extra_args = others or None
            if options is not None:
                made.sampling_params.extra_args = {**(made.sampling_params.extra_args or {}), KEY: packed(options)}
            return made

        own = ALL if served is None else served.positions
        by_name = fields is not None and ADAPTER in fields
        if by_name and registry is None:
            raise VLLMValidationError(f"{KEY} names an adapter; expected --enable-lora or options under {KEY!r}")
        rest = {name: value for name, value in (fields or {}).items() if name != ADAPTER}
        if own == ALL and not rest and (fields is None or by_name):
            if request is not None and served is not None and registry is not None:
                registry.check_dose(request.lora_name, served, None)
            return make(None)
        if not hasattr(parameters, "extra_args"):
            assert request is not None  # as its adapter has positions
            name = request.lora_name
            raise VLLMValidationError(f"adapter {name!r} has positions {own!r}; expected 'all' for pooling")
        try:
            options = replace(read_options(rest, own), prompt=beam_of(given["prompt"]).prompt)
        except (TypeError, ValueError) as error:
            raise VLLMValidationError(str(error)) from error
        if given.get("resumable") and (where := packed(options)[1]) != ALL:
            # What was generated for one part of the input is prompt for the next.
            raise VLLMValidationError(f"positions is {where!r} for streamed input; expected 'all'")
        if served is None:
            what = "no adapter" if request is None else f"adapter {request.lora_name!r}, which does not steer"
            raise VLLMValidationError(f"{KEY} is given with {what}; expected a steering adapter")
        assert request is not None and registry is not None  # as the adapter was taken
        registry.check_dose(request.lora_name, served, options.scale)
        made = make(options)
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
        known = registry.copied(lora_request)
        loaded = original(self, known.found)
        if (before := registry.loaded(lora_request, known)) is not None:
            self.engine_core.remove_lora(before)
        return loaded

    async def add_lora_async(self: Any, lora_request: LoRARequest) -> bool:
        registry = registry_of(self.input_processor)
        if registry is None:
            return await original(self, lora_request)
        # In a thread: reading and copying files would hold up the answers of all other requests.
        known = await asyncio.to_thread(registry.copied, lora_request)
        loaded = await original(self, known.found)
        if (before := registry.loaded(lora_request, known)) is not None:
            await self.engine_core.remove_lora_async(before)
        return loaded

    return add_lora_async if inspect.iscoroutinefunction(original) else add_lora


def add_request(original: Any) -> Callable[..., Any]:
    """Add a request. A steering adapter that is new is loaded first, because a failure later would end the engine."""
    signature = inspect.signature(original)

    def unknown(given: dict[str, Any]) -> tuple[Any, Registry, LoRARequest] | None:
        engine = given["self"]
        registry = registry_of(engine.input_processor)
        request = None if registry is None else registry.chosen(given.get("lora_request"), parameters_of(given))
        return (
            None if registry is None or request is None or registry.is_ready(request) else (engine, registry, request)
        )

    def not_again(given: dict[str, Any], registry: Registry, request: LoRARequest) -> None:
        """Let vLLM take the adapter as it was loaded."""
        if given.get("lora_request") is request:
            given["lora_request"] = registry.as_loaded(request)

    def refused(request: LoRARequest, error: Exception) -> Exception:
        if isinstance(error, VLLMValidationError):
            return error
        return VLLMValidationError(f"adapter {request.lora_name!r}: {error}")

    def add_request(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        if found := unknown(bound.arguments):
            engine, registry, request = found
            try:
                if registry.steers(request):
                    engine.add_lora(request)
                    not_again(bound.arguments, registry, request)
            except Exception as error:
                raise refused(request, error) from error
        return original(*bound.args, **bound.kwargs)

    async def add_request_async(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        if found := unknown(bound.arguments):
            engine, registry, request = found
            try:
                if await asyncio.to_thread(registry.steers, request):
                    await engine.add_lora(request)
                    not_again(bound.arguments, registry, request)
            except Exception as error:
                raise refused(request, error) from error
        return await original(*bound.args, **bound.kwargs)

    return add_request_async if inspect.iscoroutinefunction(original) else add_request


def stream_request(original: Any) -> Callable[..., Any]:
    """Wrap the method that adds a request whose input is streamed. All of its parts are steered alike.

    vLLM takes a part's parameters and leaves its adapter and cache salt, so that later requests would find the keys and
    values of one strength under the salt of another.
    """

    async def checked(stream: Any, fields: Any) -> AsyncGenerator[Any]:
        async for part in stream:
            if part.sampling_params is not None and (found := fields_of(part.sampling_params)) != fields:
                given, expected = (str(each and dict(each))[:80] for each in (found, fields))
                raise VLLMValidationError(
                    f"{KEY} of a part of streamed input is {given}; expected that of the request: {expected}"
                )
            yield part

    async def _add_streaming_input_request(
        self: Any, request_id: str, input_stream: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        stream = checked(input_stream, fields_of(sampling_params))
        return await original(self, request_id, stream, sampling_params, *args, **kwargs)

    return _add_streaming_input_request


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
