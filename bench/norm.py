"""Benchmarks of the op with the RMSNorm behind it, against the add, the hook and a norm of PyTorch or of Liger."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from . import timing
from .contenders import Operands, absent, hook, make_operands
from .geometries import DTYPES, OpCase
from .grouped import made_bytes
from .levels import forgotten, l2_bytes, take_samples
from .results import Row
from .timing import Timed

EPS = 1e-5
#: The contenders; Llama's norm with a weight of ones in the hidden state's dtype.
Contender = Callable[[Operands, Tensor], tuple[Tensor, Tensor]]


def fused(x: Operands, weight: Tensor) -> tuple[Tensor, Tensor]:
    from fused_steer.kernels.post_block_norm import post_block_norm

    return post_block_norm(
        x.residual, x.branch, x.down, x.up, norm_weight=weight, eps=EPS, activation=x.activation, basis=x.basis,
        reads=x.reads,
    )  # fmt: skip


def in_turn(x: Operands, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Call the op so that its backward is the norm's and post_block's in turn. See `_backward_in_turn`."""
    return fused(x, weight)


#: The plans of the contender `in-turn`. With the op's own plans it would run the kernels with rows in registers.
_plans_in_turn: dict[Any, Any] = {}


@contextlib.contextmanager
def _backward_in_turn(name: str) -> Any:
    """For the contender `in-turn`, take the kernels with rows in registers out of the op's backward."""
    if name != "in-turn":
        yield
        return
    form = importlib.import_module("fused_steer.kernels.post_block_norm_backward")
    op = importlib.import_module("fused_steer.kernels.post_block_norm")
    with (
        mock.patch.object(form, "norm_backward_schedule", lambda *_: None),
        mock.patch.object(op, "_backward_plans", _plans_in_turn),
    ):
        yield


def huggingface(h: Tensor, weight: Tensor) -> Tensor:
    """Compute Llama's norm as transformers writes it."""
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(h.dtype)


def hook_norm(x: Operands, weight: Tensor) -> tuple[Tensor, Tensor]:
    out = hook(x)
    return out, huggingface(out, weight)


def hook_liger(x: Operands, weight: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.transformers.functional import liger_rms_norm

    out = hook(x)
    return out, liger_rms_norm(out, weight, EPS)


def unsteered(x: Operands, weight: Tensor) -> tuple[Tensor, Tensor]:
    out = x.residual + x.branch
    return out, huggingface(out, weight)


#: name -> (the contender, whether it steers, whether its adapter is in float32)
NORM_CONTENDERS: dict[str, tuple[Contender, bool, bool]] = {
    "fused": (fused, True, True),
    "fused-again": (fused, True, True),
    "hook": (hook_norm, True, False),
    "hook-liger": (hook_liger, True, False),
    "unsteered": (unsteered, False, False),
}
#: The same for the backward, with the op's other form beside the one that it takes.
NORM_BACKWARD_CONTENDERS: dict[str, tuple[Contender, bool, bool]] = {
    **NORM_CONTENDERS,
    "in-turn": (in_turn, True, True),
}


def check(case: OpCase, what: str, name: str, device: torch.device) -> str:
    """Return what is wrong with a contender, or "". Its errors may be twice those of hook and norm, plus 1e-6."""
    small = replace(case, tokens=min(case.tokens, 4096 if what == "backward" else 512))
    x = make_operands(small, device, seed=1)
    weight = torch.ones(case.hidden, dtype=DTYPES[case.dtype], device=device)
    wide = {key: value.double() for key, value in vars(x).items() if isinstance(value, Tensor)}
    exact = replace(x, **wide)
    if what == "forward":
        truths: Sequence[Tensor] = hook_norm(exact, weight.double())
    else:
        exact, leaves = exact.with_leaves()
        truths = torch.autograd.grad(hook_norm(exact, weight.double()), leaves, (exact.grad, exact.grad))
    found = [_call(small, what, one, x, weight)() for one in (name, "hook")]
    for ours, theirs, truth in zip(*found, truths, strict=True):
        errors = [float((value.double() - truth).norm() / truth.norm()) for value in (ours, theirs)]
        if not errors[0] <= 2 * errors[1] + 1e-6:
            return f"wrong: relative error {errors[0]:.2e}; expected at most twice the hook's, {errors[1]:.2e}"
    return ""


def _call(case: OpCase, what: str, name: str, x: Operands, weight: Tensor) -> Callable[[], Sequence[Tensor]]:
    contender, _, master_weights = NORM_BACKWARD_CONTENDERS[name]
    operands = x if master_weights else x.weights_in(DTYPES[case.dtype])

    def forward() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return contender(operands, weight)

    if what == "forward":
        return forward
    operands, leaves = operands.with_leaves()
    if not NORM_BACKWARD_CONTENDERS[name][1]:
        leaves = leaves[:1]
    results, grads = contender(operands, weight), (operands.grad, operands.grad)

    def backward() -> Sequence[Tensor]:
        with _backward_in_turn(name):
            return torch.autograd.grad(results, leaves, grads, retain_graph=True)

    return backward


def measure_norm(
    case: OpCase, what: str, device: torch.device, names: Sequence[str], rounds: int = 20, count: bool = True
) -> list[Row]:
    """Time one pass of each contender, interleaved. Of a forward, count the bytes that it allocates beside a result."""
    rows = {name: Row("norm", what, name, asdict(case)) for name in names}
    if "hook-liger" in rows and "hook-liger" in (missing := absent()):
        rows["hook-liger"].status = f"not run: {missing['hook-liger']}"
    sizes = []
    try:
        sets_of = timing.input_sets((2 if what == "forward" else 4) * case.unit_bytes, l2_bytes(device))
        sets = [make_operands(case, device, seed) for seed in range(sets_of)]
    except torch.OutOfMemoryError as error:
        for row in rows.values():
            row.status = forgotten(error)
        return list(rows.values())
    weight = torch.ones(case.hidden, dtype=DTYPES[case.dtype], device=device)
    # Autograd runs a backward pass on the stream of its forward, so the forward must run on the captured stream.
    stream = torch.cuda.Stream(device) if device.type == "cuda" and what == "backward" else None
    ready = []
    for name, row in rows.items():
        if row.status != "ok":
            continue
        try:
            if NORM_BACKWARD_CONTENDERS[name][1]:
                row.status = check(case, what, name, device) or "ok"
            if row.status != "ok":
                continue
            with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
                calls = [_call(case, what, name, x, weight) for x in sets]
            timed = Timed(name, calls)
            timed.prepare(device, graph=True, stream=stream)
            row.launches = timing.count_launches(calls[0], device) if count else None
            if what == "forward":
                sizes.append(Row("norm", "bytes", name, asdict(case), [made_bytes(lambda call=calls[0]: call()[0])]))
        except Exception as error:  # a rival may fail in any way, and the run goes on
            row.status = forgotten(error)
            continue
        ready.append(timed)
    take_samples(ready, rows, device, rounds)
    return [*rows.values(), *sizes]
