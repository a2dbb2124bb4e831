"""Ops that torch.compile and torch.export keep as one node of a graph: `register` adds one to `torch.ops.fused_steer`.

torch.library.custom_op does the same, but wraps the function in layers that take the host longer than a layer's kernels
take the GPU. Here the dispatcher calls the function itself, where nothing but a device's kernel comes after autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch._subclasses.fake_tensor import FakeTensor

_LIBRARY = torch.library.Library("fused_steer", "FRAGMENT")
_BELOW_AUTOGRAD = torch._C._after_autograd_keyset
#: The keys of a plain tensor on a device: no mode, no tracing and no subclass wants to see the call.
_OF_A_DEVICE = {DispatchKeySet(getattr(DispatchKey, name)).raw_repr() for name in ("CPU", "CUDA", "XPU")}

_DESCRIBING = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)


def is_described(tensor: Tensor) -> bool:
    """Whether an eager call on `tensor` is described instead of run, so that it has to go through its registered op:
    fake and meta tensors have no values, and make_fx writes the call down.

    Raises:
        RuntimeError: torch.jit.trace is recording.
    """
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError("torch.jit.trace cannot record fused-steer's ops; expected torch.export or torch.compile")
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        return True
    return torch._C._len_torch_dispatch_stack() > 0 and any(map(torch._C._get_dispatch_mode, _DESCRIBING))


def register(
    schema: str, run: Callable[..., Any], fake: Callable[..., Any], differentiate: Callable[..., Any] | None
) -> Callable[..., Any]:
    """Define `torch.ops.fused_steer.<name>`.

    Args:
        schema: the name, and in PyTorch's notation what it takes and returns; all of it positional.
        run: the op, on any device. What it returns shares no memory with what it was given.
        fake: what the results are like, from tensors that have no values.
        differentiate: called in place of `run` where a gradient is asked for: a result with a gradient, or an error.
            None for an op that is called where none is: the dispatcher then passes autograd by without a Python call.

    Returns:
        The op without autograd: what `differentiate` may call.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    op = getattr(torch.ops.fused_steer, name).default

    def without_autograd(*inputs: Tensor | Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    if differentiate is not None:

        def with_autograd(keys: DispatchKeySet, *inputs: Any) -> Any:
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
                return differentiate(*inputs)
            below = keys & _BELOW_AUTOGRAD
            if below.raw_repr() in _OF_A_DEVICE:
                return run(*inputs)  # what the dispatcher would call next
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(below, *inputs)

        _LIBRARY.impl(name, with_autograd, "Autograd", with_keyset=True)
    torch.library.register_fake(f"fused_steer::{name}", fake)
    return without_autograd
