"""Register ops in `torch.ops.fused_steer` that torch.compile and torch.export keep as one node of a graph.

torch.library.custom_op does the same, but its wrappers take more host time than a layer's kernels take GPU time. Here
the dispatcher calls the function directly if only a device's kernel comes after autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Proxy
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import register_flop_formula

from .derivatives import is_forward_mode, refuse_tangents

_LIBRARY = torch.library.Library("fused_steer", "FRAGMENT")
_BELOW_AUTOGRAD = torch._C._after_autograd_keyset
#: The dispatch keys of a plain tensor on a device, without modes, tracing or subclasses.
_OF_A_DEVICE = {DispatchKeySet(getattr(DispatchKey, name)).raw_repr() for name in ("CPU", "CUDA", "XPU")}

_implementations: dict[str, Callable[..., Any]] = {}

_DESCRIBING = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)


def is_described(tensor: Tensor) -> bool:
    """Return whether an eager call on `tensor` has to go through its registered op.

    This holds for fake and meta tensors, which have no values, and under make_fx, which records the call.

    Raises:
        RuntimeError: torch.jit.trace is recording.
    """
    refuse_jit_trace()
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        return True
    return torch._C._len_torch_dispatch_stack() > 0 and any(map(torch._C._get_dispatch_mode, _DESCRIBING))


def is_watched() -> bool:
    """Return whether a mode of PyTorch's dispatcher is active, such as FlopCounterMode or a selective checkpoint's.

    It sees ops, not the kernels that a call starts directly. So an eager call goes through its registered op then. A
    mode with the attribute `looks_inside` set to True sees the operations of a call instead, as they are without it.
    """
    if not torch._C._len_torch_dispatch_stack():
        return False
    return not all(getattr(mode, "looks_inside", False) for mode in _get_current_dispatch_mode_stack())


def is_wrapped(*tensors: Any) -> bool:
    """Return whether one is of a subclass that holds other tensors, such as DTensor. A kernel would find no memory."""
    kinds = {type(t) for t in tensors if isinstance(t, Tensor)}
    return any(kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ for kind in kinds)


def implementation(op: Any) -> Callable[..., Any]:
    """Return the function that computes a registered op, for a mode that looks inside."""
    return _implementations[op._schema.name]


def refuse_jit_trace() -> None:
    """Raise RuntimeError if torch.jit.trace is recording."""
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError("torch.jit.trace cannot record fused-steer's ops; expected torch.export or torch.compile")


def refuse_symbols(tensor: Any) -> None:
    """Raise RuntimeError for a tensor of torch.fx.symbolic_trace, which has neither a shape nor a device."""
    if isinstance(tensor, Proxy):
        raise RuntimeError(
            "torch.fx.symbolic_trace cannot record fused-steer's ops; expected torch.export or torch.compile"
        )


def register(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    differentiate: Callable[..., Any] | None,
    flops: Callable[..., int] | None = None,
) -> Callable[..., Any]:
    """Define the op `torch.ops.fused_steer.<name>`.

    Args:
        schema: the op's name, arguments and results in PyTorch's notation, all positional.
        run: the implementation for any device. Its results share no memory with its arguments.
        fake: returns results of the right shape and dtype, from tensors without values.
        differentiate: called in place of `run` if a gradient is required. It returns a result with a gradient, or
            raises. None for an op that is never differentiated; the dispatcher then skips autograd without a Python
            call.
        flops: counts the op's floating-point operations, as in flops.py. None if they are not counted.

    Returns:
        The op without autograd, which `differentiate` may call.

    Raises:
        RuntimeError: by the op, if an argument has a forward-mode tangent. The dispatcher would drop it.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    op = getattr(torch.ops.fused_steer, name).default

    def without_autograd(*inputs: Tensor | Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    def run_checked(*inputs: Any) -> Any:
        if is_forward_mode():
            refuse_tangents(inputs)
        return run(*inputs)

    _LIBRARY.impl(name, run_checked, "CompositeExplicitAutograd")
    _implementations[f"fused_steer::{name}"] = run_checked
    if differentiate is not None:

        def with_autograd(keys: DispatchKeySet, *inputs: Any) -> Any:
            if is_forward_mode():
                refuse_tangents(inputs)
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
                return differentiate(*inputs)
            below = keys & _BELOW_AUTOGRAD
            if below.raw_repr() in _OF_A_DEVICE:
                return run(*inputs)  # the dispatcher would call it next
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(below, *inputs)

        _LIBRARY.impl(name, with_autograd, "Autograd", with_keyset=True)
    torch.library.register_fake(f"fused_steer::{name}", fake)
    if flops is not None:
        register_flop_formula(getattr(torch.ops.fused_steer, name))(flops)
    return without_autograd
