"""Recognise the calls that PyTorch's operations compute, because no kernel computes their derivatives.

They are calls in forward mode, calls inside transforms of torch.func, and backward passes of several gradients at once.
A kernel reads a tensor's memory, which does not show a tangent. Without these checks a tangent would be lost silently.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Return whether a call is inside a transform of torch.func, or of forward-mode differentiation."""
    if torch._C._are_functorch_transforms_active():
        return True
    # A graph of torch.compile would guard the level, which the graph's own code changes.
    return not torch.compiler.is_compiling() and is_forward_mode()


def is_forward_mode() -> bool:
    """Return whether forward-mode differentiation is on: torch.func.jvp or `torch.autograd.forward_ad.dual_level`."""
    return forward_ad._current_level >= 0


def is_functionalized() -> bool:
    """Return whether torch.func.functionalize transforms the call. It has no rule for autograd functions."""
    functorch = torch._C._functorch
    interpreters = functorch.get_interpreter_stack() or []
    return any(interpreter.key() == functorch.TransformType.Functionalize for interpreter in interpreters)


def refuse_tangents(tensors: Iterable[Any]) -> None:
    """Raise RuntimeError if one of the tensors has a forward-mode tangent."""
    if not is_forward_mode():
        return
    # Tangents are autograd's, and the dispatcher may have passed it already.
    all_keys = torch._C._dispatch_tls_local_include_set(), torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    with torch._C._ForceDispatchKeyGuard(*all_keys):
        dual = [isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in tensors]
    if any(dual):
        raise RuntimeError(
            "a kernel of fused-steer got a forward-mode tangent; expected post_block, post_block_norm or rms_norm, "
            "outside of compiled and exported graphs"
        )


def is_batched(*tensors: Any) -> bool:
    """Return whether a backward pass computes several gradients at once: by vmap, or with `is_grads_batched`.

    Args:
        tensors: the incoming gradients.
    """
    functorch = torch._C._functorch
    if torch._C._are_functorch_transforms_active():
        return True
    return any(isinstance(t, Tensor) and functorch.is_legacy_batchedtensor(t) for t in tensors)


def is_differentiated(tensor: Tensor) -> bool:
    """Return whether a tensor inside transforms of torch.func requires a gradient of any of them, or of autograd.

    Its own `requires_grad` tells only of the innermost.
    """
    functorch = torch._C._functorch
    while not tensor.requires_grad and functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def is_differentiated_again(tensors: Iterable[Tensor | None]) -> bool:
    """Return whether the gradients of a transform of torch.func may be differentiated once more, from outside of it.

    Args:
        tensors: what the gradients are computed from, inside the transform.
    """
    functorch = torch._C._functorch
    stack = functorch.peek_interpreter_stack()
    level = -1 if stack is None else stack.level()
    for tensor in tensors:
        while tensor is not None:
            if functorch.maybe_get_level(tensor) != level and tensor.requires_grad:
                return True
            tensor = functorch.get_unwrapped(tensor) if functorch.is_functorch_wrapped_tensor(tensor) else None
    return False
