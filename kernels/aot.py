"""Ahead-of-time compilation: what a kernel costs on a GPU, seen on a machine that has none.

The launches that a shape would make on a target are recorded (`launch.recorded`), compiled for it with the argument
specialisation that Triton's launcher would use, and read: registers, spills, local and shared memory, and the
instructions that decide a memory-bound kernel's speed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .contract import Needs
from .launch import Launch, recorded
from .numerics import INTERPRETED
from .post_block import _triton_backward, _triton_forward
from .schedule import TARGETS

_GPU_TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


@dataclass(frozen=True)
class Case:
    """A call of the op: N tokens, hidden size d, rank r, dtype of the hidden state, and its optional operands."""

    tokens: int
    hidden: int
    rank: int
    dtype: torch.dtype = torch.bfloat16
    activation: str = "silu"
    biases: bool = False
    gain: bool = False
    scale_on_device: bool = False
    nested: bool = False
    branch: bool = True


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses. Bytes for `shared` and `local` (per program and per thread); counts elsewhere.

    `spills` is 0 where the compiler keeps no count of them (NVIDIA's shows them as local memory). The instruction
    counts are static and of NVIDIA targets; None for others.
    """

    kernel: str
    target: str
    registers: int
    spills: int
    local: int
    shared: int
    num_warps: int
    loads_128: int | None = None
    stores_128: int | None = None
    global_loads: int | None = None
    global_stores: int | None = None
    async_copies: int | None = None
    tensor_core: int | None = None
    local_accesses: int | None = None


def record(case: Case, target: str) -> list[Launch]:
    """The launches of one forward and one full backward pass of `case` on `target`, in order.

    Raises:
        ValueError: an unknown target.
    """
    if target not in TARGETS:
        raise ValueError(f"target is {target!r}; expected one of {', '.join(TARGETS)}")

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def hidden_state() -> torch.Tensor:
        if case.nested:  # (sequence, batch, d) seen as (batch, sequence, d)
            return empty(case.tokens // 2, 2, case.hidden, dtype=case.dtype).transpose(0, 1)
        return empty(case.tokens, case.hidden, dtype=case.dtype)

    low_rank = case.rank > 0
    down = empty(case.rank, case.hidden) if low_rank else None
    up = empty(case.hidden, case.rank) if low_rank else None
    down_bias = empty(case.rank) if low_rank and case.biases else None
    up_bias = empty(case.hidden) if case.biases or not low_rank else None
    gain = empty(case.tokens) if case.gain else None
    scale = empty() if case.scale_on_device else 1.0
    branch = hidden_state() if case.branch else None
    needs = Needs(
        True, low_rank, low_rank, down_bias is not None, up_bias is not None, case.gain or case.scale_on_device
    )
    with recorded(TARGETS[target]) as launches:
        out, a = _triton_forward(
            hidden_state(), branch, down, up, down_bias, up_bias, gain, scale, case.activation, low_rank
        )
        _triton_backward(hidden_state(), out, a, down, up, up_bias, gain, scale, case.activation, needs)
    return launches


def _source(launch: Launch) -> ASTSource:
    """The launch's kernel with its arguments specialised as Triton's launcher specialises them."""
    kernel = launch.kernel
    fixed = {kernel.arg_names.index(name) for name in kernel.do_not_specialize}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, (name, value) in enumerate(zip(kernel.arg_names, launch.arguments, strict=False)):
        if value is None or (isinstance(value, int) and value == 1 and index not in fixed):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and index not in fixed:
                attributes[(index,)] = [["tt.divisibility", 16]]
    signature.update(dict.fromkeys(launch.constants, "constexpr"))
    return ASTSource(kernel, signature, constants, attributes)


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's report has no {pattern!r}; expected one like {text[:200]!r}")
    return int(found.group(1))


def _read_nvidia(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([_tool("cuobjdump"), flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )

    def count(pattern: str) -> int:
        return len(re.findall(rf"\s{pattern}", sass))

    return {
        "registers": _number(r"REG:(\d+)", usage),
        "local": _number(r"LOCAL:(\d+)", usage) + _number(r"STACK:(\d+)", usage),
        "spills": 0,
        "loads_128": count(r"LDG\S*\.128"),
        "stores_128": count(r"STG\S*\.128"),
        "global_loads": count(r"LDG\."),
        "global_stores": count(r"STG\."),
        "async_copies": count(r"(?:LDGSTS|UBLKCP|UTMALDG)"),
        "tensor_core": count(r"(?:HMMA|QGMMA|HGMMA|UTCHMMA)"),
        "local_accesses": count(r"(?:LDL|STL)\b"),
    }


def _read_amd(assembly: str) -> dict[str, int]:
    return {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", assembly),
        "local": _number(r"\.private_segment_fixed_size:\s+(\d+)", assembly),
        "spills": _number(r"\.vgpr_spill_count:\s+(\d+)", assembly) + _number(r"\.sgpr_spill_count:\s+(\d+)", assembly),
    }


def compile_launch(launch: Launch, target: str) -> Resources:
    """Compile one recorded launch for `target`, without a GPU.

    Raises:
        RuntimeError: kernels are interpreted here (TRITON_INTERPRET), or the compiler's report is unreadable.
    """
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set, so kernels cannot be compiled; expected it unset")
    schedule = launch.schedule
    compiled = triton.compile(
        _source(launch),
        target=_GPU_TARGETS[target],
        options={"num_warps": schedule.num_warps, "num_stages": schedule.num_stages},
    )
    read: Callable[[Any], dict[str, int]] = _read_amd if target.startswith("gfx") else _read_nvidia
    numbers = read(compiled.asm["amdgcn" if target.startswith("gfx") else "cubin"])
    return Resources(
        launch.kernel.__name__, target, shared=compiled.metadata.shared, num_warps=schedule.num_warps, **numbers
    )
