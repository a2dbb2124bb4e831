"""Code that Inductor generates for torch.compile calls a function of ours in place of an op: see `start_directly`.

An op of which Inductor knows no more than its name is called through PyTorch's dispatcher, which hands a Python
function's arguments to C++ and back; the sizes of what it returns are checked, and its memory is not reused. With a
lowering Inductor allocates the result among its other buffers and calls the function directly.

What is used of Inductor here is no public interface of PyTorch. Where a name is missing, the op is called through the
dispatcher: the same numbers, and a warning says so.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from .backend import select_backend

_INDUCTOR = "torch._inductor"
#: Ops that Inductor was told of.
_lowered: set[Any] = set()


def _names() -> SimpleNamespace:
    """What is used of Inductor.

    Raises:
        ImportError, AttributeError, TypeError: this version of PyTorch has other names or arguments.
    """
    ir, lowering, wrapper, virtualized = (
        importlib.import_module(f"{_INDUCTOR}.{name}") for name in ("ir", "lowering", "codegen.wrapper", "virtualized")
    )
    inspect.signature(ir.ExternKernelOut).bind(layout=0, inputs=0, constant_args=0, python_kernel_name=0, op_overload=0)
    inspect.signature(ir.FixedLayout).bind(device=0, dtype=0, size=0, stride=0)
    inspect.signature(ir.ExternKernelOut.codegen).bind(0, 0)
    inspect.signature(lowering.register_lowering).bind(0, type_promotion_kind=None)
    inspect.signature(lowering.fallback_handler).bind(0, add_to_fallback_set=False)
    if "def add_import_once(line" not in inspect.getsource(wrapper.PythonWrapperCodegen):
        raise AttributeError("PythonWrapperCodegen has no add_import_once")
    return SimpleNamespace(
        kernel=ir.ExternKernelOut, layout=ir.FixedLayout, strides=ir.FlexibleLayout.contiguous_strides,
        realize=ir.ExternKernel.realize_input, box=ir.TensorBox.create, register=lowering.register_lowering,
        fallback=lowering.fallback_handler, graph=virtualized.V,
    )  # fmt: skip


@functools.cache
def missing() -> str | None:
    """Why the code that Inductor generates calls ops through the dispatcher; None where it need not. Imports Inductor."""
    try:
        _names()
    except (ImportError, AttributeError, TypeError) as error:
        return str(error)
    return None


def start_directly(op: Any, maker: Callable[..., Callable[..., None]]) -> None:
    """Tell Inductor, if this process has imported it, to call a function in place of `op`.

    Generated code imports `maker` by its name, also years later from a file of Inductor's cache: a change of what it
    takes or gives needs another name.

    Args:
        op: takes two or more tensors and then constants; returns a contiguous tensor of the first tensor's sizes, in
            the dtype of the sum of the first two.
        maker: gives, for the constants, a function that takes the tensors and `out`, and writes the result there.
    """
    if op in _lowered or f"{_INDUCTOR}.lowering" not in sys.modules:
        return
    _lowered.add(op)
    if missing() is not None:
        warnings.warn(
            f"PyTorch {torch.__version__}'s Inductor is not as fused-steer knows it ({missing()}): compiled layers go "
            "through the dispatcher, which takes the host longer",
            stacklevel=2,
        )
        return
    names = _names()
    fallback = names.fallback(op, add_to_fallback_set=False)

    class Start(names.kernel):
        """The call in generated code."""

        def codegen(self, wrapper: Any) -> None:
            root = wrapper.get_root_graph() if hasattr(wrapper, "get_root_graph") else wrapper
            name, constants = self.python_kernel_name, ", ".join(map(repr, self.made_of))
            root.add_import_once(f"from {maker.__module__} import {maker.__name__}")
            root.add_import_once(f"{name} = {maker.__name__}({constants})")
            super().codegen(wrapper)

    def lower(*inputs: Any) -> Any:
        graph = names.graph.graph
        tensors = [value for value in inputs if hasattr(value, "get_device")]
        constants = inputs[len(tensors) :]
        first, second = tensors[:2]
        device = first.get_device()
        if graph.cpp_wrapper or getattr(graph, "fx_wrapper", False) or not _has_kernels(device):
            return fallback(*inputs)
        size = list(first.get_size())
        dtype = torch.promote_types(first.get_dtype(), second.get_dtype())
        kernel = Start(
            layout=names.layout(device=device, dtype=dtype, size=size, stride=names.strides(size)),
            inputs=[names.realize(tensor) for tensor in tensors],
            python_kernel_name="_".join(("start", op._opname, *map(str, constants))),
            op_overload=op,
        )
        kernel.made_of = constants
        return names.box(kernel)

    names.register(op, type_promotion_kind=None)(lower)


def _has_kernels(device: torch.device) -> bool:
    try:
        return select_backend(device) == "triton"
    except RuntimeError:  # which the op raises once it is called
        return False
