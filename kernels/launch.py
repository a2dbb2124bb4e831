"""Launch kernels. `recorded()` collects launches in a list instead of running them; `noted()` collects and runs them.

Every launch of this package goes through `launch`, and every allocation of a launcher through `empty`. A recorded
launch has its real arguments, for a device that need not exist. So ahead-of-time compilation sees exactly the
launchers' kernels. Noted launches become a plan (see plan.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from .derivatives import refuse_tangents
from .numerics import COMPILER_OPTIONS
from .schedule import Device, Layout, describe_device


@dataclass(frozen=True)
class Launch:
    """A recorded launch: the kernel, its grid, its arguments in order, its constants by name, and its layout."""

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
    """A launch that was run, with the compiled kernel (None in the interpreter)."""

    kernel: Any
    compiled: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]

    def ordered(self) -> list[Any]:
        """Return all arguments and constants in the kernel's order."""
        named = self.kernel.arg_names[len(self.arguments) :]
        return [*self.arguments, *(self.constants[name] for name in named)]


@dataclass
class Notes:
    """The launches of a call and the tensors that it allocated, in order."""

    launches: list[Started] = field(default_factory=list)
    made: list[torch.Tensor] = field(default_factory=list)


#: The recording or notes that collect launches in this context.
watcher: ContextVar[_Recording | Notes | None] = ContextVar("fused_steer_watcher", default=None)


@contextlib.contextmanager
def recorded(device: Device) -> Iterator[list[Launch]]:
    """Append launches to the yielded list instead of running them. Tensors may be on the meta device."""
    recording = _Recording(device, [])
    token = watcher.set(recording)
    try:
        yield recording.launches
    finally:
        watcher.reset(token)


@contextlib.contextmanager
def noted() -> Iterator[Notes]:
    """Record launches, and tensors allocated by `empty`, while running them."""
    notes = Notes()
    token = watcher.set(notes)
    try:
        yield notes
    finally:
        watcher.reset(token)


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Allocate like `torch.empty`, for launchers."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    notes = watcher.get()
    if isinstance(notes, Notes):
        notes.made.append(tensor)
    return tensor


def _collapsed_stride(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """Return the stride of these dimensions taken as one, or None if they do not collapse."""
    stride, size = None, 1
    for n, s in zip(reversed(sizes), reversed(strides), strict=True):
        if n == 1:
            continue
        if stride is None:
            stride, size = s, n
        elif s == stride * size:
            size *= n
        else:
            return None
    return 0 if stride is None else stride


def row_layout(*tensors: torch.Tensor | None) -> tuple[list[Any], int, list[tuple[int, int]]]:
    """Return tensors of one shape (..., d) as rows: the tensors, the inner extent, and (outer, inner) strides of each.

    None stays None. The inner extent is 0 if each tensor's rows have a single stride. A tensor is copied only if its
    last stride is not 1, or if no split of the leading dimensions into two fits all tensors.
    """
    present = [t for t in tensors if t is not None]
    if all(t.is_contiguous() for t in present):
        return list(tensors), 0, [(0, t.shape[-1]) if t is not None else (0, 0) for t in tensors]
    leading = tuple(present[0].shape[:-1])
    usable = [t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in tensors]
    for cut in range(len(leading)):  # cut 0: everything is inner
        layout = []
        for t in usable:
            strides = t.stride()[:-1] if t is not None else (0,) * len(leading)
            outer = _collapsed_stride(leading[:cut], strides[:cut])
            inner = _collapsed_stride(leading[cut:], strides[cut:])
            if outer is None or inner is None:
                break
            layout.append((outer, inner))
        else:
            return usable, torch.Size(leading[cut:]).numel() if cut else 0, layout
    return row_layout(*(None if t is None else t.contiguous() for t in usable))


def contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def is_recording() -> bool:
    """Return whether launches are recorded instead of run. Tensors may then be on a device without a backend."""
    return isinstance(watcher.get(), _Recording)


def device_of(tensor: torch.Tensor) -> Device:
    """Return the device for which a launch on `tensor` is laid out."""
    recording = watcher.get()
    return recording.device if isinstance(recording, _Recording) else describe_device(tensor.device)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make `device` current, at no cost if it is already."""
    if device.type == "cpu" or torch.accelerator.current_device_index() == device.index:
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, device: torch.device, schedule: Layout, **constants: Any
) -> None:
    """Launch `kernel` on `device` with the blocks and warps of `schedule`. The device need not be the current one.

    Raises:
        RuntimeError: an argument has a forward-mode tangent.
    """
    refuse_tangents(arguments)
    # The memory of a negative view, such as the imaginary part of a conjugate, has the other sign.
    arguments = tuple(value.resolve_neg() if isinstance(value, torch.Tensor) else value for value in arguments)
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
