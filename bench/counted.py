"""Counts memory passes and kernel launches at the end of one decoder layer: unsteered, with a hook, fused.

A unit is one tensor of N tokens × d, read or written by a kernel: one pass of the hidden state through memory.
PyTorch's operations are counted as they are dispatched, the fused kernels as the launcher starts them. Views launch
nothing. For many tokens the fused forward reads each tile twice; the second read should hit L2 and is not counted.
Nothing is timed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fused_steer.kernels.aot import Case, hidden_states, record_passes
from torch.utils._python_dispatch import TorchDispatchMode

from . import contenders
from .geometries import OpCase

PASSES = ("forward", "backward")
MANY, FEW = 8192, 8  # tokens: with few, the forward holds whole rows in registers
HIDDEN, RANK, TARGET = 4096, 8, "sm_90"


@dataclass(frozen=True)
class Count:
    """The units moved and the kernels launched by one pass through the end of one layer."""

    units: int
    launches: int


class Counter(TorchDispatchMode):
    """Counts dispatched operations, views excluded.

    Attributes:
        launches: all operations.
        large: the operations that touch a tensor of at least `numel` elements.
        units: the tensors of at least `numel` elements that operations touch.
    """

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.launches, self.large, self.units = numel, 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten.detach.default:
            units = sum(isinstance(t, torch.Tensor) and t.numel() >= self.numel for t in (*args, out))
            self.launches += 1
            self.large += units > 0
            self.units += units
        return out


def count_operations(name: str) -> dict[str, Count]:
    """Count the forward and the backward of a contender made of PyTorch operations: `add` or `hook`."""
    case = OpCase(512, 64, 4, dtype="float32")
    x, leaves = contenders.make_operands(case, torch.device("cpu")).with_leaves()
    numel = case.tokens * case.hidden
    with Counter(numel) as forward:
        out = contenders.OP_CONTENDERS[name].call()(x)
    with Counter(numel) as backward:
        torch.autograd.grad(out, leaves, x.grad, allow_unused=True)
    counters = zip(PASSES, (forward, backward), strict=True)
    return {what: Count(counter.units, counter.launches) for what, counter in counters}


def count_launches(tokens: int) -> dict[str, Count]:
    """Count the forward and the backward of the fused op; the launches are recorded, not run."""
    passes = record_passes(Case(tokens, HIDDEN, RANK), TARGET)
    return {
        what: Count(sum(len(hidden_states(launch)) for launch in passes[what]), len(passes[what])) for what in PASSES
    }


def counted() -> dict[str, dict[str, Count]]:
    """Return the counts by contender and pass."""
    return {
        "unsteered": count_operations("add"),
        "hook": count_operations("hook"),
        "fused": count_launches(MANY),
        "fused, few tokens": count_launches(FEW),
    }
