"""Launch plans: the launches of a call, worked out once for its operands' shapes and started directly from then on.

Triton's `kernel[grid](...)` binds, specialises and looks up thirty arguments in each call, which takes the host longer
than PyTorch takes for the five operations of a hook. `Plan.make` runs a call in the ordinary way and keeps what it
launched: the compiled kernels, their grids and constants, and the sizes of the tensors that the call made. Later calls
check their operands in one go (`admit`), allocate, and start the kernels with the operands' addresses of that moment
(`go`).

A plan is passed over, never stretched: where an operand's type, dtype, device, sizes, strides, requires_grad or
alignment differ, launches are being recorded or hooked, or FUSED_STEER_BACKEND has changed, `admit` returns None and
the caller goes the ordinary way, errors included. A plan keeps no operand and no address.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

from .backend import ENVIRONMENT_VARIABLE
from .launch import Started, may_start, noted, on_device
from .numerics import INTERPRETED

_RUNTIME = knobs.runtime
_ALIGNMENT = 16  # bytes; kernels are specialised for addresses that are a multiple of it


# ----------------------------------------------------------------------------------------------- what a call depends on


def _environment() -> Callable[[], Any]:
    """A function that reads FUSED_STEER_BACKEND; `os.environ.get` takes thirty times as long."""
    values, encode = getattr(os.environ, "_data", None), getattr(os.environ, "encodekey", None)
    if isinstance(values, dict) and encode is not None:
        get, key = values.get, encode(ENVIRONMENT_VARIABLE)
        return lambda: get(key)
    return lambda: os.environ.get(ENVIRONMENT_VARIABLE)


_asked = _environment()


def _is_hooked() -> bool:
    """Whether somebody, such as a profiler, wants to see launches. Triton keeps chains of hooks, mostly empty."""
    enter, leave = _RUNTIME.launch_enter_hook, _RUNTIME.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _guard(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Whether tensors are of the same type, dtype, device, sizes, strides and requires_grad as these."""
    try:
        from torch._C._dynamo.guards import TensorGuards  # one call in C++
    except ImportError:
        return _python_guard(tensors)
    return TensorGuards(
        *tensors,
        dynamic_dims_sizes=[list(t.size()) for t in tensors],
        dynamic_dims_strides=[list(t.stride()) for t in tensors],
    ).check


def _python_guard(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    def key(t: Any) -> Any:
        return type(t), t.dtype, t.device, t.shape, t.stride(), t.requires_grad, t.is_inference()

    keys = [key(t) for t in tensors]
    return lambda *others: all(isinstance(t, Tensor) for t in others) and [key(t) for t in others] == keys


def _allocator(tensor: Tensor) -> Callable[[], Tensor]:
    """Makes tensors like this one, of no values, on the current device of its kind."""
    size, stride, dtype = tuple(tensor.shape), tensor.stride(), tensor.dtype
    strided = getattr(torch._C._dynamo.guards, f"_empty_strided_{tensor.device.type}", None)
    if strided is not None:  # past the dispatcher
        return lambda: strided(size, stride, dtype)
    device = tensor.device
    return lambda: torch.empty_strided(size, stride, dtype=dtype, device=device)


# ----------------------------------------------------------------------------------------------------------- one launch


def _starter(launch: Started) -> Callable[[int, tuple[Any, ...]], Any]:
    """A function of a stream and a kernel's arguments, addresses in place of tensors, that starts it."""
    compiled, grid = launch.compiled, (*launch.grid, 1, 1)[:3]
    if compiled is None:  # in the interpreter, with tensors in place of addresses
        kernel, grid, options = launch.kernel, launch.grid, launch.options
        constants = {**launch.constants, **options}
        count = len(launch.arguments)
        return lambda stream, arguments: kernel[grid](*arguments[:count], **constants)
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    if triton.__version__.startswith("3.7.") and type(run).__name__ == "CudaLauncher":
        if not (run.global_scratch_size or run.profile_scratch_size):
            # What `run` does, without its two closures.
            start, flags = run.launch, (run.launch_cooperative_grid, run.launch_pdl)
            nothing = (None,) * 5  # launch metadata, two hooks, two scratch memories
            signature = (run.arg_annotations, run.kernel_signature)
            return lambda stream, arguments: start(
                *grid, stream, function, *flags, metadata, *nothing, *signature, arguments
            )
    return lambda stream, arguments: run(*grid, stream, function, metadata, None, None, None, *arguments)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


_address: Callable[[Tensor], Any] = _itself if INTERPRETED else Tensor.data_ptr


class Plan:
    """The launches of one kind of call. See the module."""

    __slots__ = (
        "count",
        "_asked",
        "_check",
        "_device",
        "_index",
        "_launches",
        "_makers",
        "_now",
        "_results",
        "_stream",
    )

    def __init__(
        self, operands: Sequence[Tensor], launches: Sequence[Started], made: Sequence[Tensor], results: Sequence[int]
    ) -> None:
        """
        Args:
            operands: the tensors that the call was given.
            launches: what it launched, in order.
            made: the tensors that it allocated.
            results: places in `made` of those that it returned.
        """
        self.count = len(operands)
        self._check = _guard(operands)
        self._makers = [_allocator(tensor) for tensor in made]
        self._results = list(results)
        self._asked = _asked()
        self._device = operands[0].device
        places = {id(t): place for place, t in enumerate((*operands, *made))}
        places |= {t.data_ptr(): place for place, t in enumerate(operands)}  # views of operands
        self._launches = []
        for launch in launches:
            arguments = launch.ordered()
            last = max(i for i, value in enumerate(arguments) if isinstance(value, Tensor)) + 1
            # The pointers come first; what is absent among them is the None behind the last of all tensors.
            sources = [_place(value, places) for value in arguments[:last]]
            assert last > 1, "itemgetter of one place gives no tuple"
            self._launches.append((_starter(launch), itemgetter(*sources), tuple(arguments[last:])))
        self._now, self._stream, self._index = _device_functions(self._device)

    @classmethod
    def make(
        cls, operands: Sequence[Tensor], call: Callable[[], Sequence[Tensor]]
    ) -> tuple[Sequence[Tensor], Plan | None]:
        """Run `call`, which works on `operands` alone, and plan the next such calls.

        Returns:
            What `call` returned; and the plan, or None where a call cannot be planned: it launched nothing or did more
            than launch, or an operand is not aligned, is empty, or shares memory with another.
        """
        with noted() as notes:
            results = call()
        if not notes.launches or not may_start() or _is_hooked() or any(not _plannable(t) for t in operands):
            return results, None
        made = {id(tensor): place for place, tensor in enumerate(notes.made)}
        if any(id(result) not in made for result in results):
            return results, None
        if len({t.data_ptr() for t in operands}) < len(operands):
            return results, None
        given = {id(t) for t in operands} | {t.data_ptr() for t in operands}
        for launch in notes.launches:
            for value in launch.arguments:
                if isinstance(value, Tensor) and not {id(value), value.data_ptr()} & given and id(value) not in made:
                    return results, None  # a copy, or the result of an operation between the launches
        return results, cls(operands, notes.launches, notes.made, [made[id(result)] for result in results])

    def admit(self, *operands: Any) -> list[Any] | None:
        """The operands' addresses, for `go`; None where the plan is not for these operands, or not now."""
        if not self._check(*operands) or self._asked != _asked() or _is_hooked() or not may_start():
            return None
        addresses = [*map(_address, operands)]
        if not INTERPRETED:
            for address in addresses:
                if address % _ALIGNMENT:
                    return None
        return addresses

    def go(self, addresses: list[Any]) -> list[Tensor]:
        """Start the launches on admitted operands. Returns the call's results."""
        if self._now() != self._index:
            with on_device(self._device):
                return self._start(addresses)
        return self._start(addresses)

    def _start(self, addresses: list[Any]) -> list[Tensor]:
        made = [make() for make in self._makers]
        addresses += map(_address, made)
        addresses.append(None)
        stream = self._stream(self._index)
        for start, pointers, rest in self._launches:
            start(stream, pointers(addresses) + rest)
        return [made[place] for place in self._results]


def _place(value: Any, places: dict[int, int]) -> int:
    if value is None:
        return -1
    place = places.get(id(value))
    return places[value.data_ptr()] if place is None else place


def _plannable(tensor: Tensor) -> bool:
    address = tensor.data_ptr() if type(tensor) in (Tensor, torch.nn.Parameter) and tensor.numel() else 0
    return address != 0 and (INTERPRETED or address % _ALIGNMENT == 0)


def _device_functions(device: torch.device) -> tuple[Callable[[], int], Callable[[int], int], int]:
    """The current device's index, a device's current stream, and the index of this device."""
    if INTERPRETED:
        return (lambda: 0), (lambda index: 0), 0
    driver = triton.runtime.driver.active
    now = torch._C._cuda_getDevice if device.type == "cuda" else driver.get_current_device
    return now, driver.get_current_stream, device.index or 0
