"""Makes PyTorch pretend to have CUDA over the stub driver, to rehearse GPU runs. It yields no figures.

`cuda` means CPU. Streams and events do nothing. A CUDA graph runs its calls once, when they are captured. Other code is
real, so a wrong name or argument fails as on a GPU. No kernel runs, so numbers are meaningless.

As a pytest plug-in (`-p bench.stub.pretence`) it counts a failed assertion as expected, because tests compare numbers.
Any other exception is a failure: a misspelt name, a wrong argument, an import, a fixture.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

NAME = "rehearsal"


class _Anything:
    """Base of the pretended stream, event and graph."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


def _nothing() -> Callable[..., None]:
    """Return a new function that does nothing. Dynamo keeps a rule for each function, so each use needs a new one."""
    return lambda *_, **__: None


class Stream(_Anything):
    wait_stream = wait_event = synchronize = staticmethod(_nothing())


class Event(_Anything):
    record = synchronize = wait = staticmethod(_nothing())

    def elapsed_time(self, end: Event) -> float:
        return 1.0


class CUDAGraph(_Anything):
    replay = reset = staticmethod(_nothing())


class Profile(_Anything):
    """A pretended profiler that reports one kernel."""

    def events(self) -> list[Any]:
        import torch

        return [SimpleNamespace(device_type=torch.autograd.DeviceType.CUDA, name="kernel", device_time=1.0)]


def _on_cpu(device: Any) -> Any:
    """Return the CPU in place of a CUDA device, and anything else unchanged."""
    import torch

    if isinstance(device, int) and not isinstance(device, bool):
        return "cpu"
    if isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda":
        return torch.device("cpu")
    return device


def _takes_device(function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return function(*args, **kwargs)

    return call


@functools.cache
def pretend() -> None:
    """Make PyTorch pretend to have CUDA for the rest of the process."""
    from .driver import arm

    arm()
    import torch
    import torch._decomp.decompositions_for_jvp  # first: TorchScript reads functions that are replaced below
    import torch._dynamo  # first: Dynamo makes rules for them
    from torch.utils import _device

    properties = SimpleNamespace(
        name=NAME, major=9, minor=0, multi_processor_count=132, total_memory=1 << 30, gcnArchName="",
        L2_cache_size=1 << 12,  # small, so that few sets of inputs are made
        shared_memory_per_block_optin=232448, regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048, warp_size=32,
    )  # fmt: skip
    pretended = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: NAME,
        "current_stream": lambda device=None: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "graph": lambda graph, **options: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "mem_get_info": lambda device=None: (1 << 30, 1 << 30),
        "max_memory_allocated": lambda device=None: 1 << 20,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "cudart": lambda: SimpleNamespace(cudaProfilerStart=lambda: 0, cudaProfilerStop=lambda: 0),
        "Stream": Stream, "Event": Event, "CUDAGraph": CUDAGraph,
        "synchronize": _nothing(), "empty_cache": _nothing(), "reset_peak_memory_stats": _nothing(),
    }  # fmt: skip
    for name, value in pretended.items():
        assert hasattr(torch.cuda, name), name
        setattr(torch.cuda, name, value)
    torch.accelerator.synchronize = _nothing()
    torch.accelerator.is_available = lambda: False  # else Dynamo asks torch's CUDA build for a stream
    torch.profiler.profile = Profile  # type: ignore[misc]
    torch.accelerator.current_device_index = lambda: 0

    for function in _device._device_constructors():
        if getattr(torch, function.__name__, None) is function:
            setattr(torch, function.__name__, _takes_device(function))
    moved = torch.Tensor.to

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        args = tuple(_on_cpu(arg) if isinstance(arg, (str, torch.device)) else arg for arg in args)
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return moved(self, *args, **kwargs)

    torch.Tensor.to = to  # type: ignore[method-assign]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]

    class Generator(torch.Generator):
        def __new__(cls, device: Any = "cpu") -> Any:
            return super().__new__(cls, device=_on_cpu(device))

    torch.Generator = Generator  # type: ignore[misc]
    entered = _device.DeviceContext.__init__

    def init(self: Any, device: Any) -> None:
        entered(self, _on_cpu(device))

    _device.DeviceContext.__init__ = init  # type: ignore[method-assign]
    # Inductor's CPU code would take most of a rehearsal and differs from the GPU's anyway.
    compiled = torch.compile

    def compile(*args: Any, **kwargs: Any) -> Any:
        return compiled(*args, **{"backend": "aot_eager", **kwargs})

    torch.compile = compile


# ------------------------------------------------------------------------------------------------------- pytest plug-in


def pytest_load_initial_conftests() -> None:
    pretend()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()
    raised = None if call.excinfo is None else call.excinfo.value
    # opcheck raises an error of its own because of the assertion.
    if call.when == "call" and any(isinstance(e, AssertionError) for e in (raised, getattr(raised, "__cause__", None))):
        report.outcome, report.wasxfail = "skipped", "numbers, which no kernel has computed"
