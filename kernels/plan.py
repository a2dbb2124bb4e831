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
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

from .backend import ENVIRONMENT_VARIABLE
from .launch import Started, noted, on_device, watcher
from .numerics import INTERPRETED

_RUNTIME = knobs.runtime


# ----------------------------------------------------------------------------------------------- what a call depends on


def _environment() -> tuple[Callable[[Any], Any], Any]:
    """A function and its argument that read FUSED_STEER_BACKEND; `os.environ.get` takes thirty times as long."""
    values, encode = getattr(os.environ, "_data", None), getattr(os.environ, "encodekey", None)
    if isinstance(values, dict) and encode is not None:
        return values.get, encode(ENVIRONMENT_VARIABLE)
    return os.environ.get, ENVIRONMENT_VARIABLE


_read_environment, _BACKEND = _environment()


#: Hooks of launches, where profilers sit: Triton keeps two chains of them, mostly empty.
_ENTER, _LEAVE = _RUNTIME.launch_enter_hook, _RUNTIME.launch_exit_hook
_watching = watcher.get


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


def _strided(device: torch.device) -> Callable[..., Tensor]:
    """Allocates a tensor of a size, a stride and a dtype, on the current device of its kind."""
    strided = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)  # past the dispatcher
    if strided is not None:
        return strided
    return lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=device)


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
    x, y, z = grid
    if triton.__version__.startswith("3.7.") and type(run).__name__ == "CudaLauncher":
        if not (run.global_scratch_size or run.profile_scratch_size):
            # What `run` does, without its two closures. The five are launch metadata, two hooks, two scratch memories.
            launch, cooperative, dependent = run.launch, run.launch_cooperative_grid, run.launch_pdl
            annotations, signature = run.arg_annotations, run.kernel_signature
            return lambda stream, arguments: launch(
                x, y, z, stream, function, cooperative, dependent, metadata,
                None, None, None, None, None, annotations, signature, arguments,
            )  # fmt: skip
    return lambda stream, arguments: run(x, y, z, stream, function, metadata, None, None, None, *arguments)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


_address: Callable[[Tensor], Any] = _itself if INTERPRETED else Tensor.data_ptr


class Plan:
    """The launches of one kind of call. See the module."""

    __slots__ = (
        "_asked", "_check", "_device", "_empty", "_index", "_launches", "_made", "_now", "_results", "_stream", "count",
    )  # fmt: skip

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
        self._empty = _strided(operands[0].device)
        self._made = [(tuple(t.shape), t.stride(), t.dtype) for t in made]
        self._results = list(results)
        self._asked = _read_environment(_BACKEND)
        self._device = operands[0].device
        places = {id(t): place for place, t in enumerate((*operands, *made))}
        places |= {t.data_ptr(): place for place, t in enumerate(operands)}  # views of operands
        self._launches = []
        for launch in launches:
            arguments = launch.ordered()
            last = max(i for i, value in enumerate(arguments) if isinstance(value, Tensor)) + 1
            # The pointers come first; what is absent among them is the None behind the last of all tensors.
            sources = [_place(value, places) for value in arguments[:last]]
            self._launches.append((_starter(launch), tuple(sources), tuple(arguments[last:])))
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
        if not notes.launches or _watching() is not None or any(not _plannable(t) for t in operands):
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
        if (
            not self._check(*operands)
            or _read_environment(_BACKEND) != self._asked
            or _watching() is not None
            or _RUNTIME.launch_enter_hook is not _ENTER
            or _RUNTIME.launch_exit_hook is not _LEAVE
            or _ENTER.calls
            or _LEAVE.calls
        ):
            return None
        addresses = [*map(_address, operands)]
        if not INTERPRETED:
            for address in addresses:
                if address & 15:  # kernels are compiled for addresses that are multiples of 16 bytes
                    return None
        return addresses

    def go(self, addresses: list[Any]) -> list[Tensor]:
        """Start the launches on admitted operands. Returns the call's results."""
        index = self._index
        if self._now() != index:
            with on_device(self._device):
                return self._start(addresses, index)
        return self._start(addresses, index)

    def _start(self, addresses: list[Any], index: int) -> list[Tensor]:
        empty, made = self._empty, []
        for size, stride, dtype in self._made:
            tensor = empty(size, stride, dtype)
            made.append(tensor)
            addresses.append(_address(tensor))
        addresses.append(None)
        stream = self._stream(index)
        for start, pointers, rest in self._launches:
            start(stream, (*[addresses[place] for place in pointers], *rest))
        return [made[place] for place in self._results]

    def first_result(self) -> Callable[..., Tensor | None]:
        """A function of operands that gives the first result of `go(admit(...))`, or None where the plan is not for
        them: in one piece without loops, as its source is written for the plan. Loops cost as much as the launch."""
        if INTERPRETED:
            return lambda *operands: None if (found := self.admit(*operands)) is None else self.go(found)[0]
        operands = [f"t{i}" for i in range(self.count)]
        made = [f"m{i}" for i in range(len(self._made))]
        places = [f"p{i}" for i in range(self.count)] + [f"q{i}" for i in range(len(made))] + ["None"]
        names: dict[str, Any] = {
            "plan": self, "check": self._check, "read": _read_environment, "backend": _BACKEND, "asked": self._asked,
            "watching": _watching, "runtime": _RUNTIME, "enter": _ENTER, "leave": _LEAVE, "now": self._now,
            "index": self._index, "stream_of": self._stream, "empty": self._empty, "pointer": Tensor.data_ptr,
        }  # fmt: skip
        lines = [
            f"def run({', '.join(operands)}):",
            f"    if not (check({', '.join(operands)}) and read(backend) == asked and watching() is None",
            "            and runtime.launch_enter_hook is enter and runtime.launch_exit_hook is leave",
            "            and not enter.calls and not leave.calls):",
            "        return None",
            *(f"    {place} = pointer({operand})" for place, operand in zip(places, operands, strict=False)),
            f"    if ({' | '.join(places[: self.count])}) & 15:",
            "        return None",
            "    if now() != index:",
            f"        return plan.go([{', '.join(places[: self.count])}])[0]",
        ]
        for number, (name, like) in enumerate(zip(made, self._made, strict=True)):
            names |= {f"size{number}": like[0], f"stride{number}": like[1], f"dtype{number}": like[2]}
            lines.append(f"    {name} = empty(size{number}, stride{number}, dtype{number})")
            lines.append(f"    q{number} = pointer({name})")
        lines.append("    stream = stream_of(index)")
        for number, (starter, sources, rest) in enumerate(self._launches):
            names |= {f"start{number}": starter, f"rest{number}": rest}
            pointers = ", ".join(places[source] for source in sources)
            lines.append(f"    start{number}(stream, ({pointers}, *rest{number}))")
        lines.append(f"    return {made[self._results[0]]}")
        exec("\n".join(lines), names)  # as dataclasses make their __init__; nothing of it comes from outside
        return names["run"]


def _place(value: Any, places: dict[int, int]) -> int:
    if value is None:
        return -1
    place = places.get(id(value))
    return places[value.data_ptr()] if place is None else place


def _plannable(tensor: Tensor) -> bool:
    address = tensor.data_ptr() if type(tensor) in (Tensor, torch.nn.Parameter) and tensor.numel() else 0
    return address != 0 and (INTERPRETED or address % 16 == 0)


def _device_functions(device: torch.device) -> tuple[Callable[[], int], Callable[[int], int], int]:
    """The current device's index, a device's current stream, and the index of this device."""
    if INTERPRETED:
        return (lambda: 0), (lambda index: 0), 0
    driver = triton.runtime.driver.active
    now = torch._C._cuda_getDevice if device.type == "cuda" else driver.get_current_device
    return now, driver.get_current_stream, device.index or 0
