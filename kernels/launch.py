"""Launches kernels. Inside `recorded()` launches are collected in a list instead of run; inside `noted()` they run too.

Every launch of this package goes through `launch`, and every tensor that a launcher allocates through `empty`. What is
recorded has the arguments that it would have had, for a device that need not be there: so what is compiled ahead of
time is what the launchers would launch, by construction. What is noted becomes a plan (see plan.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from .numerics import COMPILER_OPTIONS
from .schedule import Device, Layout, describe_device


@dataclass(frozen=True)
class Launch:
    """One launch as it would be made: the kernel, its grid, its arguments in order, constants by name, layout."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    schedule: Layout


@dataclass
class _Recording:
    device: Device
    launches: list[Launch]


@dataclass(frozen=True)
class Started:
    """One launch that was made: `Launch`, and what Triton compiled it to (None in the interpreter)."""

    kernel: Any
    compiled: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]

    def ordered(self) -> list[Any]:
        """All arguments, constants among them, in the kernel's order."""
        named = self.kernel.arg_names[len(self.arguments) :]
        return [*self.arguments, *(self.constants[name] for name in named)]


@dataclass
class Notes:
    """The launches of a call, and the tensors that it allocated, in order."""

    launches: list[Started] = field(default_factory=list)
    made: list[torch.Tensor] = field(default_factory=list)


#: What watches launches in this context: a recording, notes, or nothing.
watcher: ContextVar[_Recording | Notes | None] = ContextVar("fused_steer_watcher", default=None)


@contextlib.contextmanager
def recorded(device: Device) -> Iterator[list[Launch]]:
    """Launches made inside are appended to the yielded list instead of run; tensors may be on the meta device."""
    recording = _Recording(device, [])
    token = watcher.set(recording)
    try:
        yield recording.launches
    finally:
        watcher.reset(token)


@contextlib.contextmanager
def noted() -> Iterator[Notes]:
    """Launches made inside, and tensors allocated by `empty`, are noted in what is yielded."""
    notes = Notes()
    token = watcher.set(notes)
    try:
        yield notes
    finally:
        watcher.reset(token)


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`torch.empty`, for what a launcher allocates."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    notes = watcher.get()
    if isinstance(notes, Notes):
        notes.made.append(tensor)
    return tensor


def is_recording() -> bool:
    """Whether launches are written down instead of made: of tensors that may be on no device that has a backend."""
    return isinstance(watcher.get(), _Recording)


def device_of(tensor: torch.Tensor) -> Device:
    """The device that a launch on `tensor` is laid out for."""
    recording = watcher.get()
    return recording.device if isinstance(recording, _Recording) else describe_device(tensor.device)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make `device` current, at no cost where it is already."""
    if device.type == "cpu" or torch.accelerator.current_device_index() == device.index:
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, device: torch.device, schedule: Layout, **constants: Any
) -> None:
    """Start `kernel` on `device`, which need not be the current one, with the blocks and warps of `schedule`."""
    constants.update(schedule.constants)
    watching = watcher.get()
    if isinstance(watching, _Recording):
        watching.launches.append(Launch(kernel, grid, arguments, constants, schedule))
        return
    options = {"num_warps": schedule.num_warps, "num_stages": schedule.num_stages, **COMPILER_OPTIONS}
    with on_device(device):
        compiled = kernel[grid](*arguments, **constants, **options)
    if isinstance(watching, Notes):
        watching.launches.append(Started(kernel, compiled, grid, arguments, constants, options))
