"""The code that Inductor generates for torch.compile calls a function of ours in place of an op: `start_directly`.

An op that Inductor knows by name only is called through PyTorch's dispatcher, which hands a Python function's arguments
to C++ and back. The result's sizes are checked, its memory is not reused, and the next kernel may not take it for
aligned. With a lowering Inductor allocates the result among its other buffers and calls the function directly. The
function checks the weights' sizes and strides, with everything else that a plan depends on; generated code does not.

What is used of Inductor here is no public interface of PyTorch. Where a name is missing, the op is called through the
dispatcher: the numbers are the same, and a warning says so.
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
_lowered: set[Any] = set()  # ops that Inductor was told of


def _names() -> SimpleNamespace:
    """What is used of Inductor.

    Raises:
        ImportError, AttributeError, TypeError, OSError: this version of PyTorch has other names or arguments.
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
        fallback=lowering.fallback_handler, graph=virtualized.V, argument=ir.InputBuffer,
    )  # fmt: skip


@functools.cache
def missing() -> str | None:
    """Why generated code calls ops through the dispatcher; None where it need not. Imports Inductor."""
    try:
        _names()
    except (ImportError, AttributeError, TypeError, OSError) as error:
        return str(error)
    return None


def start_directly(op: Any, maker: Callable[..., Callable[..., None]]) -> None:
    """Tell Inductor, once this process has imported it, to call a function in place of `op`.

    To be called by the op's fake, which a compiler calls before it generates code: to import Inductor takes seconds.
    Generated code imports `maker` by its name, also from a file of Inductor's cache that an older version of this
    package left: a change of what `maker` takes or gives needs another name.

    Args:
        op: takes two or more tensors and then constants; returns a contiguous tensor of the first tensor's sizes, in
            the dtype of the sum of the first two.
        maker: gives, for the constants, a function that takes the tensors and `out`, and writes the result there. It
            raises if the sizes of the tensors do not fit each other.
    """
    if op in _lowered or f"{_INDUCTOR}.lowering" not in sys.modules:
        return
    _lowered.add(op)
    if missing() is not None:
        warnings.warn(
            f"the Inductor of torch {torch.__version__} is none that fused-steer knows ({missing()}); compiled layers "
            "go through PyTorch's dispatcher, which takes the host longer",
            stacklevel=2,
        )
        return
    names = _names()
    kernel: Any = names.kernel
    fallback = names.fallback(op, add_to_fallback_set=False)

    class Start(kernel):
        """The call in generated code."""

        def codegen(self, wrapper: Any) -> None:
            # A part of a graph has no imports of its own.
            root = wrapper.get_root_graph() if hasattr(wrapper, "get_root_graph") else wrapper
            name, constants = self.python_kernel_name, ", ".join(map(repr, self.made_of))
            root.add_import_once(f"from {maker.__module__} import {maker.__name__}")
            root.add_import_once(f"{name} = {maker.__name__}({constants})")
            _leave_checks(wrapper, {w.get_name() for w in self.inputs[2:] if isinstance(w, names.argument)})
            super().codegen(wrapper)

    def lower(*inputs: Any, **named: Any) -> Any:
        inputs = (*inputs, *named.values())  # constants of the schema's end may come by name
        graph = names.graph.graph
        tensors = [value for value in inputs if hasattr(value, "get_device")]
        constants = inputs[len(tensors) :]
        first, second = tensors[:2]
        device = first.get_device()
        in_python = not (graph.cpp_wrapper or getattr(graph, "fx_wrapper", False))
        if not in_python or not _has_kernels(device):
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


def _leave_checks(wrapper: Any, weights: set[str]) -> None:
    """Remove the checks of these arguments' sizes from the code that comes before the present call.

    Inductor checks an argument before its first use. The next use by another kernel will check it instead. A version of
    Inductor that checks several arguments in one call keeps its checks.
    """
    pending = getattr(wrapper, "_pending_input_asserts", None)
    if pending is None:
        return
    kept = []
    for line in wrapper.lines:
        if type(line).__name__ == "AssertSizeStrideLine" and line.name in weights:
            pending[line.name] = (line.size, line.stride)
        else:
            kept.append(line)
    wrapper.lines[:] = kept


def _has_kernels(device: torch.device) -> bool:
    try:
        return select_backend(device) == "triton"
    except RuntimeError:  # which the op raises once it is called
        return False
