"""Compile kernels ahead of time for GPUs that this machine need not have, and read the resources that they use.

The launches of a shape on a target are recorded (`launch.recorded`) and compiled with the argument specialisation of
Triton's launcher. The compiled kernel shows its registers, spills, local and shared memory, occupancy, and the
instructions that decide a memory-bound kernel's speed. The hidden states that a launch reads and writes give a lower
bound of its time.
"""

from __future__ import annotations

import itertools
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import triton_backend
from .contract import Needs, Operands, Packed, check_reads
from .grouped import post_block_grouped
from .grouped_norm import post_block_grouped_norm
from .launch import Launch, recorded
from .norm import triton_backward as triton_norm_backward
from .norm import triton_forward as triton_norm_forward
from .norm_torch import Norm
from .numerics import COMPILER_OPTIONS, INTERPRETED, operand_dtype
from .orthogonal import triton_basis, triton_project
from .post_block_norm import triton_forward_norm
from .post_block_norm_backward import triton_backward_norm
from .schedule import SMALLER_TARGETS, TARGETS, Device, ceil_div, padded_rank

_GPU_TARGETS = {
    "sm_75": GPUTarget("cuda", 75, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: The largest shared memory of one program, in bytes.
SHARED_MEMORY = {target: device.shared for target, device in (TARGETS | SMALLER_TARGETS).items()}

#: What the kernels lack on the smaller cards, one line each.
CANNOT = {
    "sm_75": "no tensor cores in Triton since 3.3, no bf16 arithmetic, no tf32, no asynchronous copies, 64 KiB of "
    "shared memory: kernels compile and are slow. Triton supports sm_80 and later.",
    "sm_86": "99 KiB of shared memory a program (A100: 163), 6 MiB of L2, 48 warps a multiprocessor (A100: 64).",
    "sm_89": "99 KiB of shared memory a program (H100: 227), 48 warps a multiprocessor (H100: 64).",
}

#: GPUs by name: the target of their kernels, and the bandwidth of their device memory in bytes a second, from their
#: datasheets (A100 SXM with 80 GB and with 40, H100 SXM, H200 SXM). No kernel reaches the full bandwidth.
GPUS: dict[str, tuple[str, float]] = {
    "A100": ("sm_80", 2.039e12),
    "A100-40GB": ("sm_80", 1.555e12),
    "H100": ("sm_90", 3.35e12),
    "H200": ("sm_90", 4.8e12),
}

#: Kernel arguments with the size of a hidden state, N x d.
_HIDDEN_STATES = frozenset({"p_residual", "p_branch", "p_out", "p_grad", "p_dx", "p_normed", "p_grad_normed", "p_kept"})

_POINTERS = {torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
_POINTERS |= {torch.int32: "*i32", torch.int64: "*i64"}


@dataclass(frozen=True)
class Case:
    """A call of the op: N tokens, hidden size d, rank r, the hidden state's dtype, and the optional operands.

    Attributes:
        packed: whether the kernels get packed weights or read the parameters.
        keeps_a: whether the forward keeps a, N x r, for a backward pass. A decoding step does not.
        reads: see `post_block`.
    """

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
    packed: bool = False
    keeps_a: bool = True
    reads: str = "sum"


@dataclass(frozen=True)
class Resources:
    """The resources of one compiled kernel, and static counts of its instructions.

    An async copy (global to shared memory) is not counted as a load. Accesses of 128 bits include wider ones. Accesses
    of 16 bits mean that a bf16 or fp16 hidden state moves one element at a time. On AMD a hidden state is stored in 64
    bits, as the matrix units produce it.

    Attributes:
        spills: registers spilled, 0 if the compiler does not count them (NVIDIA's appear as local memory).
        local, shared: bytes, per thread and per program.
        barriers, first_loads: barriers of the program's warps, and the global loads in front of the first one.
        occupancy: resident warps as a share of the multiprocessor's.
    """

    kernel: str
    target: str
    registers: int
    spills: int
    local: int
    shared: int
    num_warps: int
    occupancy: float
    global_loads: int
    barriers: int
    first_loads: int
    global_stores: int
    async_copies: int
    loads_128: int
    stores_128: int
    stores_64: int
    async_copies_128: int
    loads_16: int
    stores_16: int
    tensor_core: int
    local_accesses: int


#: Every target that kernels can be compiled for.
ALL_TARGETS = TARGETS | SMALLER_TARGETS


def _device(target: str) -> Device:
    if target not in ALL_TARGETS:
        raise ValueError(f"target is {target!r}; expected one of {', '.join(ALL_TARGETS)}")
    return ALL_TARGETS[target]


@dataclass(frozen=True)
class _Call:
    """The operands of a case, without values."""

    residual: torch.Tensor
    branch: torch.Tensor | None
    operands: Operands
    needs: Needs


def _call_of(case: Case, device: Device) -> _Call:

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
    check_reads(case.reads, branch)
    packed = None
    if case.packed and low_rank:
        shape, dtype = (padded_rank(case.rank), case.hidden), operand_dtype(case.dtype, device.gpu, case.rank)
        packed = Packed(empty(*shape, dtype=dtype), empty(*shape, dtype=dtype))
    operands = Operands(down, up, down_bias, up_bias, gain, None, scale, case.activation, packed, case.reads)
    needs = Needs(
        True, low_rank, low_rank, down_bias is not None, up_bias is not None, case.gain or case.scale_on_device
    )
    return _Call(hidden_state(), branch, operands, needs)


def record_passes(case: Case, target: str) -> dict[str, list[Launch]]:
    """Return the launches of one forward and one full backward pass of `case` on `target`, by pass, in order.

    Raises:
        ValueError: an unknown target, or `reads` that the op does not take.
    """
    device = _device(target)
    call = _call_of(case, device)
    with recorded(device) as forward:
        out, a = triton_backend.forward(call.residual, call.branch, call.operands, case.rank > 0 and case.keeps_a)
    return {"forward": forward, "backward": _record_backward(case, device, call, out, a)}


def _record_backward(
    case: Case,
    device: Device,
    call: _Call,
    out: torch.Tensor,
    a: torch.Tensor | None,
    grad: torch.Tensor | None = None,
) -> list[Launch]:
    if case.rank > 0 and a is None:
        a = torch.empty(case.tokens, case.rank, device="meta")
    grad = torch.empty_like(call.residual) if grad is None else grad
    with recorded(device) as launches:
        triton_backend.backward(grad, call.branch if case.reads == "branch" else out, a, call.operands, call.needs)
    return launches


def record_norm_passes(
    case: Case, target: str, plus_one: bool = False, weight_gradient: bool = False
) -> dict[str, list[Launch]]:
    """Return the launches of `post_block_norm` like `record_passes`, and those of `rms_norm`, by pass.

    The passes are "forward", "backward", "norm_forward" and "norm_backward". If the backward has one of the forms that
    hold whole rows, "in_turn" is its other form: the norm's backward, and `post_block`'s. The norm's weight has the
    hidden state's dtype.

    Raises:
        ValueError: an unknown target, or `reads` that the op does not take.
    """
    device = _device(target)
    call = _call_of(case, device)
    weight = torch.empty(case.hidden, dtype=case.dtype, device="meta")
    norm, needs = Norm(weight, 1e-6, plus_one, not plus_one), (True, weight_gradient)
    with recorded(device) as forward:
        out, _, a, inverse = triton_forward_norm(call.residual, call.branch, call.operands, norm, case.keeps_a)
    if inverse is None:
        inverse = torch.empty(case.tokens, device="meta")
    grad, grad_normed = torch.empty_like(out), torch.empty_like(out)
    if case.rank > 0 and a is None:
        a = torch.empty(case.tokens, case.rank, device="meta")
    with recorded(device) as backward:
        by_rows = None
        if a is not None and not weight_gradient:
            kept = call.branch if case.reads == "branch" else out
            by_rows = triton_backward_norm(
                grad, grad_normed, out, kept, a, inverse, call.operands, norm, call.needs, case.reads == "branch"
            )
    with recorded(device) as in_turn:
        whole, _ = triton_norm_backward(grad, grad_normed, out, inverse, norm, needs)
    in_turn += _record_backward(case, device, call, out, a, whole)
    with recorded(device) as alone:
        triton_norm_forward(out, None, norm, case.keeps_a)
    with recorded(device) as alone_backward:
        triton_norm_backward(None, grad_normed, out, inverse, norm, needs)
    found = {"forward": forward, "backward": in_turn, "norm_forward": alone, "norm_backward": alone_backward}
    return found if by_rows is None else {**found, "backward": backward, "in_turn": in_turn}


def record(case: Case, target: str) -> list[Launch]:
    """Return the launches of `record_passes` as one list."""
    return [launch for launches in record_passes(case, target).values() for launch in launches]


def record_projection(
    layers: int, hidden: int, rank: int, writers: int, dtype: torch.dtype, target: str
) -> list[Launch]:
    """Return the launches of `project_out`, or at rank 0 of `column_space`.

    up is (layers, hidden, rank) in float32, writers (layers, hidden, writers) in `dtype`.

    Raises:
        ValueError: an unknown target.
    """
    device = _device(target)
    b = torch.empty(layers, hidden, writers, dtype=dtype, device="meta")
    with recorded(device) as launches:
        if rank:
            triton_project(torch.empty(layers, hidden, rank, device="meta"), b)
        else:
            triton_basis(b)
    return launches


def record_grouped(
    tokens: int,
    hidden: int,
    rank: int,
    slots: int,
    dtype: torch.dtype,
    target: str,
    everything: bool = False,
    norm: bool = False,
) -> list[Launch]:
    """Return the launches of `post_block_grouped` with adapters in bfloat16. `everything` adds every option.

    With `norm` they are those of `post_block_grouped_norm`, in place, as in a server.

    Raises:
        ValueError: an unknown target.
    """
    device = _device(target)

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    downs, ups = (empty(slots, rank, hidden), empty(slots, hidden, rank)) if rank else (None, None)
    options: dict[str, Any] = {"up_biases": empty(slots, hidden)} if everything or not rank else {}
    if everything:
        options["gain"] = empty(tokens, dtype=torch.float32)
        options["activation"] = empty(slots, dtype=torch.int32)
        if not norm:
            options["into_branch"] = True
        if rank:
            options["down_biases"] = empty(slots, rank)
    residual, branch = (empty(tokens, hidden, dtype=dtype) for _ in range(2))
    adapter = (downs, ups, empty(tokens, dtype=torch.int32))
    with recorded(device) as launches:
        if norm:
            weight = empty(hidden, dtype=dtype)
            post_block_grouped_norm(residual, branch, *adapter, norm_weight=weight, eps=1e-5, in_place=True, **options)
        else:
            post_block_grouped(residual, branch, *adapter, **options)
    return launches


def hidden_states(launch: Launch) -> dict[str, torch.Tensor]:
    """Return the arguments of a hidden state's size, N x d, that a launch reads or writes, by name.

    Their number is the units of the launch.
    """
    named = zip(launch.kernel.arg_names, launch.arguments, strict=False)
    return {name: value for name, value in named if name in _HIDDEN_STATES and value is not None}


def time_floor(launches: Iterable[Launch], gpu: str) -> float:
    """Return the least seconds of `launches` on `gpu`, one of `GPUS`: their hidden states' bytes over its bandwidth.

    Tensors other than N x d (weights, N x r arrays, partial sums) and the starts of launches are left out. With few
    tokens these take longer.

    Raises:
        ValueError: an unknown GPU.
    """
    if gpu not in GPUS:
        raise ValueError(f"gpu is {gpu!r}; expected one of {', '.join(GPUS)}")
    _, bandwidth = GPUS[gpu]
    return sum(t.nbytes for launch in launches for t in hidden_states(launch).values()) / bandwidth


def _source(launch: Launch) -> ASTSource:
    """Return the launch's kernel with its arguments specialised as in Triton's launcher."""
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


_ADDRESS = re.compile(r"\s*/\*([0-9a-f]{4,})\*/")  # of an instruction in a listing


def _run_tool(contents: bytes, name: str, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(contents)
        file.flush()
        return subprocess.run([_tool(name), *options, file.name], capture_output=True, text=True, check=True).stdout


def _code_of(cubin: bytes) -> bytes:
    """Return the machine code of the one kernel in an ELF file: its section `.text.<kernel>`."""
    (start,) = struct.unpack_from("<Q", cubin, 40)  # of the section headers
    size, count, named = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, start + size * number) for number in range(count)]
    names = headers[named][4]
    found = [h for h in headers if cubin[names + h[0] :].startswith(b".text.")]
    if len(found) != 1:
        raise RuntimeError(f"the compiled file has {len(found)} sections of code; expected one, of one kernel")
    _, _, _, _, offset, length = found[0]
    return cubin[offset : offset + length]


def _disassemble(cubins: Sequence[bytes], target: str) -> list[str]:
    """Return the code of kernels for an NVIDIA target, as `cuobjdump -sass` prints it.

    The disassembler takes longer to start than to read a kernel, so that all are read at once. A kernel's addresses
    begin where those of the kernel before end.
    """
    codes = [_code_of(cubin) for cubin in cubins]
    options = "--binary", target.upper().replace("_", ""), "-pb", "-hex", "-novliw"
    lines = _run_tool(b"".join(codes), "nvdisasm", *options).splitlines()
    addressed = [(int(found[1], 16), row) for row, line in enumerate(lines) if (found := _ADDRESS.match(line))]
    ends = itertools.accumulate(len(code) for code in codes)
    rows = [next((row for address, row in addressed if address >= end), len(lines)) for end in ends]
    return ["\n".join(lines[begin:end]) for begin, end in itertools.pairwise([0, *rows])]


def _before(pattern: str, text: str) -> str:
    return re.split(pattern, text, maxsplit=1, flags=re.MULTILINE)[0]


def _read_nvidia(usage: str, listing: str) -> dict[str, int]:
    def count(pattern: str) -> int:
        return len(re.findall(rf"\s{pattern}", listing))

    wide = r"\S*\.(?:128|256)\b"
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "local": _number(r"LOCAL:(\d+)", usage) + _number(r"STACK:(\d+)", usage),
        "spills": 0,
        "global_loads": count(r"LDG\."),
        "global_stores": count(r"STG\."),
        "async_copies": count(r"(?:LDGSTS|UBLKCP|UTMALDG)"),
        "barriers": count(r"BAR\."),
        "first_loads": len(re.findall(r"\sLDG\.", _before(r"\sBAR\.", listing))),
        "loads_128": count(rf"LDG\.{wide}"),
        "stores_128": count(rf"STG\.{wide}"),
        "stores_64": count(r"STG\.\S*\.64\b"),
        "async_copies_128": count(rf"LDGSTS\.{wide}") + count(r"(?:UBLKCP|UTMALDG)"),
        "loads_16": count(r"LDG\.\S*[US]16\b"),
        "stores_16": count(r"STG\.\S*[US]16\b"),
        "tensor_core": count(r"(?:HMMA|QGMMA|HGMMA|UTCHMMA)"),
        "local_accesses": count(r"(?:LDL|STL)\b"),
    }


def _read_amd(assembly: str) -> dict[str, int]:
    def count(pattern: str) -> int:
        return len(re.findall(rf"^\s+{pattern}", assembly, re.MULTILINE))

    memory = r"(?:global|buffer|flat)"
    to_shared = rf"{memory}_load_(?:lds_\w+|\w+ .*\blds\b)"
    to_shared_128 = rf"{memory}_load_(?:lds_dwordx4|dwordx4 .*\blds\b)"
    return {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", assembly),
        "local": _number(r"\.private_segment_fixed_size:\s+(\d+)", assembly),
        "spills": _number(r"\.vgpr_spill_count:\s+(\d+)", assembly) + _number(r"\.sgpr_spill_count:\s+(\d+)", assembly),
        "global_loads": count(rf"{memory}_load_") - count(to_shared),
        "global_stores": count(rf"{memory}_store_"),
        "async_copies": count(to_shared),
        "barriers": count(r"s_barrier"),
        "first_loads": len(re.findall(rf"^\s+{memory}_load_", _before(r"^\s+s_barrier", assembly), re.MULTILINE)),
        "loads_128": count(rf"{memory}_load_dwordx4\b") - count(rf"{memory}_load_dwordx4 .*\blds\b"),
        "stores_128": count(rf"{memory}_store_dwordx4\b"),
        "stores_64": count(rf"{memory}_store_dwordx2\b"),
        "async_copies_128": count(to_shared_128),
        "loads_16": count(rf"{memory}_load_(?:[us]short|short)"),
        "stores_16": count(rf"{memory}_store_short"),
        "tensor_core": count(r"v_s?mfmac?_"),
        "local_accesses": count(r"scratch_(?:load|store)_"),
    }


@dataclass(frozen=True)
class _Multiprocessor:
    """The resources that resident programs share on one multiprocessor.

    Attributes:
        schedulers, warps, programs: their largest numbers.
        registers: for one lane of a scheduler, allocated in multiples of `granule`.
        shared: bytes. A program takes its own and the `reserved` bytes, rounded up to `shared_granule`.
    """

    schedulers: int
    warps: int
    programs: int
    registers: int
    granule: int
    shared: int
    shared_granule: int
    reserved: int


_MULTIPROCESSORS = {
    "sm_75": _Multiprocessor(4, 32, 16, 512, 8, 64 << 10, 256, 0),
    "sm_86": _Multiprocessor(4, 48, 16, 512, 8, 100 << 10, 128, 1 << 10),
    "sm_89": _Multiprocessor(4, 48, 24, 512, 8, 100 << 10, 128, 1 << 10),
    "sm_80": _Multiprocessor(4, 64, 32, 512, 8, 164 << 10, 128, 1 << 10),
    "sm_90": _Multiprocessor(4, 64, 32, 512, 8, 228 << 10, 128, 1 << 10),
    "sm_100": _Multiprocessor(4, 64, 32, 512, 8, 228 << 10, 128, 1 << 10),
    "gfx942": _Multiprocessor(4, 32, 16, 512, 8, 64 << 10, 512, 0),
}


def occupancy(target: str, registers: int, shared: int, num_warps: int) -> float:
    """Return the resident warps as a share of a multiprocessor's largest number, 0 if not one program fits.

    Programs have `num_warps` warps, and use `registers` for each thread and `shared` bytes.
    """
    return _resident(target, registers, shared, num_warps) * num_warps / _MULTIPROCESSORS[target].warps


def resident_programs(used: Resources) -> int:
    """Return the most programs of a kernel that one multiprocessor holds at a time. 0 if not one fits."""
    return _resident(used.target, used.registers, used.shared, used.num_warps)


def _resident(target: str, registers: int, shared: int, num_warps: int) -> int:
    limits = _MULTIPROCESSORS[target]
    per_scheduler = limits.registers // max(limits.granule, ceil_div(registers, limits.granule) * limits.granule)
    warps = min(limits.warps, per_scheduler * limits.schedulers)
    taken = ceil_div(shared + limits.reserved, limits.shared_granule) * limits.shared_granule
    return min(warps // num_warps, limits.programs, limits.shared // taken if taken else limits.programs)


@dataclass(frozen=True)
class Compilation:
    """A kernel to compile. Equal ones give the same binary: shapes that differ only in their grids share one."""

    target: str
    num_warps: int
    num_stages: int
    key: str
    source: ASTSource = field(compare=False, repr=False)


def compilation(launch: Launch, target: str) -> Compilation:
    """Return the compilation of `launch` for `target`."""
    source = _source(launch)
    return Compilation(target, launch.schedule.num_warps, launch.schedule.num_stages, source.hash(), source)


#: The resources of the kernels that this process compiled, and their code in the target's assembly.
_known: dict[Compilation, tuple[Resources, str]] = {}


def _build(job: Compilation) -> Any:
    options = {"num_warps": job.num_warps, "num_stages": job.num_stages, **COMPILER_OPTIONS}
    return triton.compile(job.source, target=_GPU_TARGETS[job.target], options=options)


def _resources(job: Compilation, compiled: Any, numbers: dict[str, int]) -> Resources:
    shared = compiled.metadata.shared
    fits = occupancy(job.target, numbers["registers"], shared, job.num_warps)
    name = job.source.fn.__name__
    return Resources(name, job.target, shared=shared, num_warps=job.num_warps, occupancy=fits, **numbers)


def compile_all(launches: Iterable[Launch], target: str) -> list[Resources]:
    """Compile recorded launches for `target`, without a GPU. The results are cached in the process.

    Raises:
        RuntimeError: kernels are interpreted here (TRITON_INTERPRET), or the compiler's report is unreadable.
    """
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set, so kernels cannot be compiled; expected it unset")
    jobs = [compilation(launch, target) for launch in launches]
    built = {job: _build(job) for job in jobs if job not in _known}
    if target.startswith("gfx"):
        for job, compiled in built.items():
            assembly = compiled.asm["amdgcn"]
            _known[job] = _resources(job, compiled, _read_amd(assembly)), assembly
    elif built:
        listings = _disassemble([compiled.asm["cubin"] for compiled in built.values()], target)
        for (job, compiled), listing in zip(built.items(), listings, strict=True):
            usage = _run_tool(compiled.asm["cubin"], "cuobjdump", "-res-usage")
            _known[job] = _resources(job, compiled, _read_nvidia(usage, listing)), listing
    return [_known[job][0] for job in jobs]


def compile_launch(launch: Launch, target: str) -> Resources:
    """Compile one recorded launch for `target`. See `compile_all`, which takes less time for several."""
    return compile_all([launch], target)[0]


def disassemble(launch: Launch, target: str) -> str:
    """Return the assembly of one recorded launch for `target`: SASS with its encoding, or AMD's.

    Raises:
        RuntimeError: see `compile_all`.
    """
    compile_all([launch], target)
    return _known[compilation(launch, target)][1]
