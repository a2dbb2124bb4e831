"""How a kernel is started: on the device, or, ahead of time, on paper.

Every launch of this package goes through `launch`. Inside `recorded` nothing runs: the launches are written down with
the arguments that they would have had, for a device that need not be there. So what is compiled ahead of time is what
the launchers would launch, by construction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

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


_recording: ContextVar[_Recording | None] = ContextVar("fused_steer_recording", default=None)


@contextlib.contextmanager
def recorded(device: Device) -> Iterator[list[Launch]]:
    """Launches made inside are appended to the yielded list instead of run; tensors may be on the meta device."""
    recording = _Recording(device, [])
    token = _recording.set(recording)
    try:
        yield recording.launches
    finally:
        _recording.reset(token)


def is_recording() -> bool:
    """Whether launches are written down instead of made: of tensors that may be on no device that has a backend."""
    return _recording.get() is not None


def device_of(tensor: torch.Tensor) -> Device:
    """The device that a launch on `tensor` is laid out for."""
    recording = _recording.get()
    return describe_device(tensor.device) if recording is None else recording.device


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make `device` current, at no cost where it is already."""
    if device.type == "cpu" or torch.accelerator.current_device_index() == device.index:
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, device: torch.device, schedule: Layout, **constants: Any
) -> None:
    """Start `kernel` on `device`, which need not be the current one, with the blocks and warps of `schedule`."""
    constants.update(schedule.constants)
    recording = _recording.get()
    if recording is not None:
        recording.launches.append(Launch(kernel, grid, arguments, constants, schedule))
        return
    with _on(device):
        kernel[grid](*arguments, **constants, num_warps=schedule.num_warps, num_stages=schedule.num_stages)
