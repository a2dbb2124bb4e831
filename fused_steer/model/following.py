"""Finds the module that reads a layer's output first, and tells what kind of RMSNorm it is.

The norm that follows a layer is the first module that the next layer gives its input to, or after the last layer the
norm that the decoder calls. What kind of norm it is, is measured by numbers (`measure`), not told by names.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels.norm import MAX_WIDTH
from ..kernels.norm_torch import Norm
from ..kernels.norm_torch import forward as formula
from .decoder import Decoder
from .layer import PatchedLayer
from .residual import ResidualNotFound, Source, analyse, cached

# ---------------------------------------------------------------------------------------------------- kinds of norms


@dataclass(frozen=True)
class Kind:
    """A kind of RMSNorm, as `kernels.norm_torch.Norm` describes it. `weight`: the path of w below the module."""

    weight: str | None
    eps: float
    plus_one: bool = False
    rounds_first: bool = True

    def norm(self, weight: Tensor | None) -> Norm:
        return Norm(weight, self.eps, self.plus_one, self.rounds_first)


class NotFused(Exception):
    """A norm cannot be fused. The message says why in one line."""


@torch.inference_mode(False)
@torch.no_grad()
def measure(norm: nn.Module, hidden: int) -> Kind:
    """Find the kind of a norm by what its forward computes, on a copy with random weights.

    Raises:
        NotFused: it is no RMSNorm over the last dimension, or its numbers cannot be had here.
    """
    name = type(norm).__name__
    if "forward" in vars(norm):
        raise NotFused(f"the forward of its {name} was replaced on the instance")
    tensors = [*norm.named_parameters(), *norm.named_buffers()]
    if hidden > MAX_WIDTH:
        raise NotFused(f"the hidden size is {hidden}, and the kernel's largest is {MAX_WIDTH}")
    if len(tensors) > 1 or any(tensor.shape != (hidden,) for _, tensor in tensors):
        raise NotFused(f"{name} is no RMSNorm: it has other tensors than one weight of the hidden size")
    path, weight = tensors[0] if tensors else (None, None)
    if weight is not None and (weight.is_meta or not weight.dtype.is_floating_point or weight.dtype.itemsize == 1):
        raise NotFused(f"the weight of its {name} is {'on meta' if weight.is_meta else weight.dtype}")
    device = torch.device("cpu") if weight is None else weight.device
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(hidden, generator=generator) / 4 + 0.75
    x = torch.randn(2, 3, hidden, generator=generator) + 0.5  # with a mean, which LayerNorm takes away

    def run(dtype: torch.dtype, size: float) -> tuple[Tensor, Tensor, Tensor | None]:
        own = copy.deepcopy(norm).to(dtype)
        given = None if path is None else factor.to(device, dtype)
        if path is not None and given is not None:
            own.get_submodule(path.rpartition(".")[0]).get_parameter(path.rpartition(".")[2]).copy_(given)
        scaled = (x * size).to(device, dtype)
        return scaled, type(norm).forward(own, scaled), given

    def same(kind: Kind, dtype: torch.dtype, size: float) -> bool:
        scaled, found, given = run(dtype, size)
        if not isinstance(found, Tensor) or found.shape != scaled.shape or found.dtype != dtype:
            return False
        expected = formula(scaled.double(), kind.norm(None if given is None else given.double()))[0]
        close = 4 * torch.finfo(dtype).eps
        return bool((found.double() - expected).norm() <= close * expected.norm())

    try:
        kinds = [Kind(path, 0.0, plus_one) for plus_one in ((False, True) if path else (False,))]
        fitting = [kind for kind in kinds if same(kind, torch.float32, 1e3)]
        if not fitting:
            raise NotFused(f"{name} computes no RMSNorm")
        (kind,) = fitting
        # Its eps is among its numbers, whatever their names, or PyTorch's default.
        numbers = {value for value in vars(norm).values() if type(value) is float and 0 <= value < 1}
        for eps in (*sorted(numbers), torch.finfo(torch.float32).eps, 0.0):
            kind = Kind(path, eps, kind.plus_one)
            if all(same(kind, torch.float32, size * max(eps, 1e-10) ** 0.5) for size in (0.3, 1.0, 3.0)):
                break
        else:
            raise NotFused(f"the eps of its {name} is not under the root, or not among its numbers")
        if path is None:
            return kind
        scaled, found, given = run(torch.bfloat16, 1.0)
        if found.dtype != torch.bfloat16 or not same(kind, torch.bfloat16, max(eps, 1e-10) ** 0.5):
            raise NotFused(f"{name} computes no RMSNorm in bfloat16")
        orders = [Kind(path, eps, kind.plus_one, first) for first in (True, False)]
        equal = [int((formula(scaled, order.norm(given))[0] == found).sum()) for order in orders]
        return orders[0] if equal[0] >= equal[1] else orders[1]
    except NotFused:
        raise
    except Exception as error:
        raise NotFused(f"its {name} cannot be tried here ({type(error).__name__})") from error


# --------------------------------------------------------------------------------------------------- following norms


@cached
def _first_module(cls: type) -> str:
    """Return the path of the first module that `cls.forward` calls with its first argument.

    Raises:
        ResidualNotFound: there is none, or no source to read.
    """

    def read(source: Source) -> str:
        own, first, *_ = (argument.arg for argument in [*source.tree.args.posonlyargs, *source.tree.args.args])
        names = {first}
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and node.value.id == first:
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        for path, call in _module_calls(source.tree, own):
            arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
            if arguments and isinstance(arguments[0], ast.Name) and arguments[0].id in names:
                return path
        source.refuse("gives its input to no module", source.tree)

    return analyse(cls, read)


@cached
def _modules_after_loop(cls: type) -> tuple[str, ...]:
    """Return the paths of the modules that `cls.forward` calls after its last loop, in order.

    Raises:
        ResidualNotFound: there is no source to read.
    """

    def read(source: Source) -> tuple[str, ...]:
        loops = [node for node in ast.walk(source.tree) if isinstance(node, ast.For)]
        last = max((loop.end_lineno or 0 for loop in loops), default=0)
        calls = _module_calls(source.tree, source.self_name())
        return tuple(path for path, call in calls if call.lineno > last)

    return analyse(cls, read)


def _module_calls(tree: ast.AST, own: str) -> list[tuple[str, ast.Call]]:
    """Return the calls `<own>.<path>(...)` with their paths, in the order of the source."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            parts, inner = [], node.func
            while isinstance(inner, ast.Attribute):
                parts.append(inner.attr)
                inner = inner.value
            if parts and isinstance(inner, ast.Name) and inner.id == own:
                found.append((".".join(reversed(parts)), node))
    return sorted(found, key=lambda one: (one[1].lineno, one[1].col_offset))


def following_norm(decoder: Decoder, patched: Mapping[int, PatchedLayer], index: int) -> nn.Module:
    """Return the module that reads the output of layer `index` first.

    Raises:
        NotFused: there is none that can be told.
    """
    try:
        if index + 1 < len(decoder.layers):
            layer = decoder.layers[index + 1]
            base = patched[index + 1].base if index + 1 in patched else type(layer)
            return layer.get_submodule(_first_module(base))
        for path in _modules_after_loop(type(decoder.module)):
            module = _submodule(decoder.module, path)
            if module is not None:
                return module
    except (ResidualNotFound, AttributeError, ValueError) as error:
        raise NotFused(f"the module that reads its output is not known: {error}") from None
    raise NotFused("the decoder gives its last layer's output to no module of its own")


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None
