"""Launch plans: the launches of a call, recorded once for its operands' shapes and started directly afterwards.

Triton's `kernel[grid](...)` binds, specialises and looks up thirty arguments in each call. That takes more host time
than the five PyTorch operations of a hook. `Plan.make` runs a call normally and keeps its compiled kernels, their grids
and constants, and the sizes of the allocated tensors. Later calls check their operands at once (`admit`), allocate, and
start the kernels with the operands' present addresses (`go`).

A plan applies only to exactly the same kind of call. If an operand's type, dtype, device, sizes, strides, requires_grad
or alignment differ, launches are being recorded or hooked, a dispatch mode is active (make_fx), FUSED_STEER_BACKEND has
changed, or forward-mode differentiation is on, `admit` returns None. The caller then makes a normal call, which raises
any error. A plan keeps no operand and no address.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from types import CodeType
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd import forward_ad
from triton import knobs

from .backend import ENVIRONMENT_VARIABLE
from .launch import Started, noted, on_device, watcher
from .numerics import INTERPRETED

_RUNTIME = knobs.runtime
_LINE = 128  # bytes of a cache line; each allocated tensor begins at one


# ---------------------------------------------------------------------------------------- conditions of a planned call


def _environment() -> tuple[Callable[[Any], Any], Any]:
    """Return a function and its argument that read FUSED_STEER_BACKEND. `os.environ.get` takes thirty times as long."""
    values, encode = getattr(os.environ, "_data", None), getattr(os.environ, "encodekey", None)
    if isinstance(values, dict) and encode is not None:
        return values.get, encode(ENVIRONMENT_VARIABLE)
    return os.environ.get, ENVIRONMENT_VARIABLE


_read_environment, _BACKEND = _environment()


#: Triton's two chains of launch hooks, which profilers use. They are mostly empty.
_ENTER, _LEAVE = _RUNTIME.launch_enter_hook, _RUNTIME.launch_exit_hook
_watching = watcher.get
_modes = torch._C._len_torch_dispatch_stack


def _guard(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Return a check that tensors have the type, dtype, device, sizes, strides and requires_grad of these."""
    try:
        from torch._C._dynamo.guards import TensorGuards  # one call in C++
    except ImportError:
        return _python_guard(tensors)
    sizes: list[Any] = [list(t.size()) for t in tensors]
    strides: list[Any] = [list(t.stride()) for t in tensors]
    return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


def _python_guard(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    def key(t: Any) -> Any:
        # The dispatch keys tell negative views and batches of vmap.
        special = torch._C._dispatch_keys(t).raw_repr()
        return type(t), special, t.dtype, t.device, t.shape, t.stride(), t.requires_grad, t.is_inference()

    keys = [key(t) for t in tensors]
    return lambda *others: all(isinstance(t, Tensor) for t in others) and [key(t) for t in others] == keys


def _strided(device: torch.device) -> Callable[..., Tensor]:
    """Return a function that allocates a tensor of a given size, stride and dtype on the current device."""
    strided = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)  # bypasses the dispatcher
    if strided is not None:
        return strided
    return lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=device)


# ----------------------------------------------------------------------------------------------------------- one launch


#: The end of the launcher's `__call__` in Triton 3.7 to 3.9, up to the kernel's arguments.
_LAUNCH = (
    "self.launch(gridX, gridY, gridZ, stream, function, self.launch_cooperative_grid, self.launch_pdl, "
    "kernel_metadata, launch_metadata, launch_enter_hook, launch_exit_hook, global_scratch, profile_scratch, "
    "self.arg_annotations, self.kernel_signature, "
)


@functools.cache
def starts_directly(launcher: type) -> bool:
    """Return whether a plan can call the C function of Triton's launcher, instead of the launcher."""
    try:
        return _LAUNCH in " ".join(inspect.getsource(launcher.__call__).split())
    except (OSError, TypeError):  # without its source, or not in Python
        return False


def _start(number: int, launch: Started, pointers: Sequence[str], names: dict[str, Any]) -> str:
    """Return the source of a call that starts a kernel. The objects it uses are added to `names`.

    Args:
        pointers: the source of the kernel's first arguments, names of addresses or None.
    """
    compiled, rest = launch.compiled, launch.ordered()[len(pointers) :]
    if compiled is None:  # in the interpreter, with tensors instead of addresses
        kernel, grid, count = launch.kernel, launch.grid, len(launch.arguments)
        constants = {**launch.constants, **launch.options}
        names[f"rest{number}"] = tuple(rest)
        names[f"start{number}"] = lambda arguments: kernel[grid](*arguments[:count], **constants)
        return f"start{number}(({', '.join(pointers)}, *rest{number}))"
    # Numbers are passed by name, so that plans with different numbers share their code.
    numbers = [f"n{number}_{i}" for i in range(len(rest))]
    names |= dict(zip(numbers, rest, strict=True))
    arguments = [*pointers, *numbers]
    run, place = compiled.run, f"x{number}, y{number}, z{number}, stream, function{number}"
    names |= {f"{axis}{number}": extent for axis, extent in zip("xyz", (*launch.grid, 1, 1), strict=False)}
    names[f"function{number}"], names[f"metadata{number}"] = compiled.function, compiled.packed_metadata
    launcher: Any = type(run)
    if starts_directly(launcher):
        if not (run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False)):
            # The same as `run` without its two closures. The five Nones are launch metadata, two hooks and two scratch
            # memories. Constants are left out, because the C function would skip them one by one.
            kinds = dict(zip(launch.kernel.arg_names, compiled.src.signature.values(), strict=True))
            taken = [kind != "constexpr" for kind in kinds.values()]
            names[f"start{number}"], names[f"signature{number}"] = run.launch, run.kernel_signature
            names[f"kinds{number}"] = list(itertools.compress(run.arg_annotations, taken))
            flags = f"{run.launch_cooperative_grid}, {run.launch_pdl}, metadata{number}"
            five = "None, None, None, None, None"
            last = f"kinds{number}, signature{number}, ({', '.join(itertools.compress(arguments, taken))},)"
            return f"start{number}({place}, {flags}, {five}, {last})"
    names[f"start{number}"] = run
    return f"start{number}({place}, metadata{number}, None, None, None, {', '.join(arguments)})"


def _allocations(made: Sequence[Tensor], results: Sequence[int], names: dict[str, Any]) -> list[str]:
    """Return the source that allocates a call's tensors, m0, m1, …, and takes their addresses, q0, q1, ….

    Tensors that are not results share one allocation.
    """
    lines: list[str] = []
    scratch: list[str] = []
    end = 0
    for i, tensor in enumerate(made):
        if i in results or INTERPRETED:
            names[f"size{i}"], names[f"stride{i}"] = tuple(tensor.shape), tensor.stride()
            names[f"dtype{i}"] = tensor.dtype
            lines += [f"m{i} = empty(size{i}, stride{i}, dtype{i})", f"q{i} = pointer(m{i})"]
        elif not scratch:
            scratch = ["scratch = empty(size, (1,), bytes_)", f"q{i} = first = pointer(scratch)"]
            end = tensor.nbytes
        else:
            names[f"offset{i}"] = -(-end // _LINE) * _LINE
            scratch.append(f"q{i} = first + offset{i}")
            end = names[f"offset{i}"] + tensor.nbytes
    names["size"], names["bytes_"] = (end,), torch.uint8
    return lines + scratch


def _itself(tensor: Tensor) -> Tensor:
    return tensor


_address: Callable[[Tensor], Any] = _itself if INTERPRETED else Tensor.data_ptr


class Plan:
    """The launches of one kind of call. See the module's docstring.

    Its functions are generated for the plan without loops, because a loop would cost as much as a launch:

    admit(operands)            returns the operands' addresses for `go`, or None if the plan does not apply
    go(addresses)              starts the launches on admitted operands; returns the call's results, a tuple
    run(first, second, rest)   does both; returns the first result, or None if the plan does not apply
    fill(*operands, out)       does both for a call with one result, written to `out`; returns True, or None
    """

    __slots__ = ("admit", "fill", "go", "run")

    def __init__(
        self,
        operands: Sequence[Tensor],
        launches: Sequence[Started],
        made: Sequence[Tensor],
        results: Sequence[int],
        order: Sequence[int | None],
    ) -> None:
        """
        Args:
            operands: the call's tensor arguments.
            launches: its launches, in order.
            made: the tensors that it allocated.
            results: the indices in `made` of the returned tensors.
            order: the tuple that `go` returns, as indices of results or None.
        """
        device = operands[0].device
        now, stream_of, index = _device_functions(device)
        names: dict[str, Any] = {
            "check": _guard(operands), "check_all": _guard((*operands, *(made[place] for place in results))),
            "read": _read_environment, "backend": _BACKEND, "watching": _watching,
            "modes": _modes, "asked": _read_environment(_BACKEND), "runtime": _RUNTIME, "enter": _ENTER,
            "leave": _LEAVE, "forward": forward_ad, "now": now, "index": index, "stream_of": stream_of,
            "empty": _strided(device), "pointer": _address, "on_device": on_device, "device": device,
        }  # fmt: skip
        allocate = _allocations(made, results, names)
        addresses = [f"p{i}" for i in range(len(operands))] + [f"q{i}" for i in range(len(made))]
        places = {t.data_ptr(): name for t, name in zip((*operands, *made), addresses, strict=True)}  # also of views
        starts = []
        for number, launch in enumerate(launches):
            arguments = launch.ordered()
            # Pointers come first, and some are None.
            last = max(i for i, value in enumerate(arguments) if isinstance(value, Tensor)) + 1
            pointers = ["None" if t is None else places[t.data_ptr()] for t in arguments[:last]]
            starts.append(_start(number, launch, pointers, names))
        returned = tuple("None" if place is None else f"m{results[place]}" for place in order)
        exec(_code(len(operands), tuple(allocate), tuple(starts), returned), names)
        self.admit, self.go, self.run, self.fill = (names.get(name, no_plan) for name in ("admit", "go", "run", "fill"))

    @classmethod
    def make(
        cls,
        operands: Sequence[Tensor],
        call: Callable[[], Sequence[Tensor]],
        order: Sequence[int | None] | None = None,
    ) -> tuple[Sequence[Tensor], Plan | None]:
        """Run `call`, which uses only `operands`, and plan later calls of its kind.

        Args:
            operands: at least two tensors.
            call: makes the launches and returns its results.
            order: the tuple that the plan's `go` returns, as indices of the results of `call` or None. The default is
                the results in order.

        Returns:
            The results of `call`, and the plan. The plan is None if the call launched nothing, did more than launch,
            or has an operand that is not aligned, is empty, or shares memory with another.
        """
        if _watching() is not None:
            return call(), None  # launches are recorded instead of run
        with noted() as notes:
            results = call()
        if not notes.launches or any(not _plannable(t) for t in operands):
            return results, None
        made = {id(tensor): place for place, tensor in enumerate(notes.made)}
        if any(id(result) not in made for result in results):
            return results, None
        if len({t.data_ptr() for t in operands}) < len(operands):
            return results, None
        known = {t.data_ptr() for t in (*operands, *notes.made)}
        arguments = (value for launch in notes.launches for value in launch.arguments)
        if any(isinstance(value, Tensor) and value.data_ptr() not in known for value in arguments):
            return results, None  # a copy, or the result of an operation between launches
        order = range(len(results)) if order is None else order
        return results, cls(operands, notes.launches, notes.made, [made[id(result)] for result in results], order)


@functools.cache
def _code(operands: int, allocate: tuple[str, ...], starts: tuple[str, ...], returned: tuple[str, ...]) -> CodeType:
    """Compile the functions of plans with so many operands, these allocations, kernel starts and results."""
    given, addresses = (", ".join(f"{letter}{i}" for i in range(operands)) for letter in "tp")
    # Tuples are passed on whole, because unpacking one in a call costs as much as a kernel's arguments.
    rest = "".join(f"t{i}, " for i in range(2, operands))

    def admitted(check: str, tensors: dict[str, str]) -> list[str]:
        lines = [
            f"if not ({check}({', '.join(tensors)}) and read(backend) == asked and watching() is None",
            "        and runtime.launch_enter_hook is enter and runtime.launch_exit_hook is leave",
            "        and not enter.calls and not leave.calls and not modes() and forward._current_level < 0):",
            "    return None",
            *(f"{address} = pointer({tensor})" for tensor, address in tensors.items()),
        ]
        if not INTERPRETED:  # kernels are compiled for addresses that are multiples of 16 bytes
            lines += [f"if ({' | '.join(tensors.values())}) & 15:", "    return None"]
        return lines

    taken = {f"t{i}": f"p{i}" for i in range(operands)}
    admit = admitted("check", taken)
    go = [*allocate, "stream = stream_of(index)", *starts]
    all_results = f"({''.join(f'{name}, ' for name in returned)})"
    first = returned[0] if returned else "()"
    elsewhere = ["if now() != index:", "    with on_device(device):"]
    # A call with fewer or more operands is another kind of call.
    functions = {
        "admit(operands)": [
            f"if len(operands) != {operands}:", "    return None", f"{given}, = operands",
            *admit, f"return {addresses},",
        ],
        "go(addresses)": [
            f"{addresses}, = addresses", *elsewhere, f"        return start({addresses})", f"return start({addresses})",
        ],
        f"start({addresses})": [*go, f"return {all_results}"],
        "run(t0, t1, rest)": [
            f"if len(rest) != {operands - 2}:", "    return None", *([f"{rest}= rest"] if rest else []), *admit,
            *elsewhere, f"        return start({addresses}){'[0]' if returned else ''}", *go, f"return {first}",
        ],
    }  # fmt: skip
    if len(returned) == 1 and returned[0] != "None":
        place = returned[0][1:]
        result = f"q{place}"
        into = [line for line in allocate if line.partition(" = ")[0] not in (returned[0], result)]
        into += ["stream = stream_of(index)", *starts, "return True"]
        functions |= {
            f"start_into({addresses}, {result})": into,
            f"fill({given}, out)": [
                *admitted("check_all", {**taken, "out": result}),
                *elsewhere, f"        return start_into({addresses}, {result})", *into,
            ],
        }  # fmt: skip
    lines = [line for head, body in functions.items() for line in (f"def {head}:", *(f"    {row}" for row in body))]
    return compile("\n".join(lines), "<launch plan>", "exec")


def _plannable(tensor: Tensor) -> bool:
    address = tensor.data_ptr() if type(tensor) in (Tensor, torch.nn.Parameter) and tensor.numel() else 0
    return address != 0 and (INTERPRETED or address % 16 == 0)


def _device_functions(device: torch.device) -> tuple[Callable[[], int], Callable[[int], int], int]:
    """Return functions for the current device's index and a device's current stream, and the index of this device."""
    if INTERPRETED:
        return (lambda: 0), (lambda index: 0), 0
    driver = triton.runtime.driver.active
    now = torch._C._cuda_getDevice if device.type == "cuda" else driver.get_current_device
    return now, driver.get_current_stream, device.index or 0


def no_plan(*operands: Any) -> None:
    """Stand in for a plan's `run` or `fill` if there is no plan."""
    return None


#: A plan of an op: a function that picks the operands from the inputs, its `admit` and its `go`.
OpPlan = tuple[Callable[[Any], Any], Callable[..., Any], Callable[..., Sequence[Tensor]]]


def run_planned(
    plans: dict[Any, OpPlan], key: Any, inputs: Sequence[Any], call: Callable[[], Sequence[Tensor]]
) -> Sequence[Tensor]:
    """Return the results of an op called with `inputs`, by a plan if one applies, else by `call`.

    Args:
        plans: the op's plans. A new plan of `call` is added.
        key: the kind of call: the inputs that are not tensors, and which inputs are None.
        inputs: the op's inputs.
        call: makes the call without a plan.
    """
    planned = plans.get(key)
    if planned is not None:
        operands, admit, go = planned
        addresses = admit(operands(inputs))
        if addresses is not None:
            return go(addresses)
    places = [place for place, value in enumerate(inputs) if isinstance(value, Tensor)]
    results, plan = Plan.make([inputs[place] for place in places], call)
    if plan is not None:
        keep(plans, key, (operator.itemgetter(*places), plan.admit, plan.go))
    return results


def keep(plans: dict[Any, Any], kind: Any, plan: Any, most: int = 32) -> None:
    """Keep a plan of a kind of call, and the latest others, up to `most`. A plan takes a few kilobytes."""
    for oldest in list(plans)[: max(0, len(plans) + 1 - most)]:  # another thread may take it out meanwhile
        plans.pop(oldest, None)
    plans[kind] = plan


def kind_of(operands: Iterable[Tensor]) -> tuple[Any, ...]:
    """Return a key with what a plan requires of its operands."""
    return tuple((type(t), t.dtype, t.device, t.shape, t.stride(), t.requires_grad, t.is_inference()) for t in operands)


#: The most plans that an op keeps for all callers.
SHARED = 1024
