"""Benchmarks of the op with the RMSNorm behind it, against the add, the hook and a norm of PyTorch or of Liger."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

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


def check(case: OpCase, name: str, device: torch.device) -> str:
    """Return what is wrong with a contender, or "". Its errors may be twice those of hook and norm, plus 1e-6."""
    small = replace(case, tokens=min(case.tokens, 512))
    x = make_operands(small, device, seed=1)
    weight = torch.ones(case.hidden, dtype=DTYPES[case.dtype], device=device)
    wide = {key: value.double() for key, value in vars(x).items() if isinstance(value, Tensor)}
    truths = hook_norm(replace(x, **wide), weight.double())
    found = [_call(small, one, x, weight)() for one in (name, "hook")]
    for ours, theirs, truth in zip(*found, truths, strict=True):
        errors = [float((value.double() - truth).norm() / truth.norm()) for value in (ours, theirs)]
        if not errors[0] <= 2 * errors[1] + 1e-6:
            return f"wrong: relative error {errors[0]:.2e}; expected at most twice the hook's, {errors[1]:.2e}"
    return ""


def _call(case: OpCase, name: str, x: Operands, weight: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    contender, _, master_weights = NORM_CONTENDERS[name]
    operands = x if master_weights else x.weights_in(DTYPES[case.dtype])

    def call() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return contender(operands, weight)

    return call


def measure_norm(
    case: OpCase, device: torch.device, names: Sequence[str], rounds: int = 20, count: bool = True
) -> list[Row]:
    """Time the forward of each contender, interleaved, and count the bytes it allocates beside its first result."""
    rows = {name: Row("norm", "forward", name, asdict(case)) for name in names}
    if "hook-liger" in rows and "hook-liger" in (missing := absent()):
        rows["hook-liger"].status = f"not run: {missing['hook-liger']}"
    sizes = []
    try:
        sets_of = timing.input_sets(2 * case.unit_bytes, l2_bytes(device))
        sets = [make_operands(case, device, seed) for seed in range(sets_of)]
    except torch.OutOfMemoryError as error:
        for row in rows.values():
            row.status = forgotten(error)
        return list(rows.values())
    weight = torch.ones(case.hidden, dtype=DTYPES[case.dtype], device=device)
    ready = []
    for name, row in rows.items():
        if row.status != "ok":
            continue
        try:
            if NORM_CONTENDERS[name][1]:
                row.status = check(case, name, device) or "ok"
            if row.status != "ok":
                continue
            calls = [_call(case, name, x, weight) for x in sets]
            timed = Timed(name, calls)
            timed.prepare(device, graph=True)
            row.launches = timing.count_launches(calls[0], device) if count else None
            sizes.append(Row("norm", "bytes", name, asdict(case), [made_bytes(lambda call=calls[0]: call()[0])]))
        except Exception as error:  # a rival may fail in any way, and the run goes on
            row.status = forgotten(error)
            continue
        ready.append(timed)
    take_samples(ready, rows, device, rounds)
    return [*rows.values(), *sizes]
