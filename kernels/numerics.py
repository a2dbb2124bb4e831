"""Rounding of matrix product operands and of stored values: one policy for every kernel.

All adapter arithmetic and all sums are fp32. Only the operands of a matrix product are narrower, because tensor cores
need that. Their type depends on the hidden state's dtype:

| hidden state | operands | why |
|---|---|---|
| bf16 | bf16 | the model's own precision |
| fp16 | tf32 | holds every fp16 value with fp32's exponents, so gradients do not vanish and sums do not overflow |
| fp32 | tf32x3 (ieee where there is no tf32, and at ranks over 128) | three tf32 products, error near 1e-6 |

Kernels round every narrower operand to nearest. Tensor cores alone would cut off the low 13 bits of a tf32 operand,
which is an error twice as large and always towards zero. Triton's interpreter multiplies in fp32, so there the same
rounding is done on the bits. Its results equal the hardware's up to the order of the sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton import knobs

#: True when kernels run in Triton's interpreter. Fixed at import, when Triton decorates the kernels.
INTERPRETED: bool = bool(knobs.runtime.interpret)

_EMULATE = tl.constexpr(INTERPRETED)

#: Passed to every compilation. Fusing a product and a sum changes the last bits, so neither TRITON_DEFAULT_FP_FUSION
#: nor Triton's default, which changes in 3.10, may decide it.
COMPILER_OPTIONS = {"enable_fp_fusion": True}


def dot_precision(dtype: torch.dtype, gpu: str, rank: int) -> str:
    """Return the operand policy ("bf16", "tf32", "tf32x3" or "ieee") for a hidden state of `dtype`.

    `gpu` is Triton's name of the vendor ("cuda", "hip", "xpu"). Only CUDA has tf32 everywhere. Elsewhere fp32 operands
    stay fp32, which AMD's matrix units support. At rank 256 three tf32 parts do not fit in registers.
    """
    if dtype == torch.bfloat16:
        return "bf16"
    if gpu != "cuda" or (dtype == torch.float32 and rank > 128):
        return "ieee"
    return "tf32" if dtype == torch.float16 else "tf32x3"


def operand_dtype(dtype: torch.dtype, gpu: str, rank: int) -> torch.dtype:
    """Return the dtype of packed weights (`contract.Packed`) for a hidden state of `dtype`.

    It is bfloat16 for the policy "bf16", else float32. For the policy "tf32" the values are already rounded to tf32.
    """
    return torch.bfloat16 if dot_precision(dtype, gpu, rank) == "bf16" else torch.float32


@triton.jit
def _bf16_bits(x):
    # Rounds to nearest even. Triton's interpreter truncates, and keeps bf16 as raw 16-bit integers without meaningful
    # arithmetic. So interpreted kernels never hold a bf16 value, only its bits on the way to memory.
    bits = x.to(tl.uint32, bitcast=True)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return tl.where(x == x, rounded, bits | 0x400000) >> 16


@triton.jit
def _round_tf32(x):
    # Rounds to nearest, ties away from zero. If the result enters a product, which ignores the low bits, ptxas drops
    # their mask. With integer operations the mask would stay.
    if _EMULATE:
        bits = x.to(tl.uint32, bitcast=True)
        return tl.where(x == x, ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True), x)
    else:
        return tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )  # fmt: skip


@triton.jit
def operand(x, DOT: tl.constexpr):
    """Convert a loaded or computed block to the dtype in which it enters a matrix product, rounded to nearest."""
    if DOT == "bf16":
        if _EMULATE:
            return (_bf16_bits(x.to(tl.float32)) << 16).to(tl.float32, bitcast=True)
        else:
            return x.to(tl.float32).to(tl.bfloat16)
    elif DOT == "tf32" and x.dtype == tl.float32:
        return _round_tf32(x)
    else:
        return x.to(tl.float32)  # tf32 holds every bf16 and fp16 number


@triton.jit
def packed_operand(x, DOT: tl.constexpr):
    """Convert a block of packed weights to an operand of a matrix product. It was rounded when it was packed."""
    if _EMULATE and DOT == "bf16":
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def widened(x):
    """Convert a block to fp32. On NVIDIA GPUs, bf16 takes one instruction for each number; Triton's own takes 1.5."""
    if _EMULATE or x.dtype != tl.bfloat16:
        return x.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )  # fmt: skip


@triton.jit
def held(x):
    """Copy a block so that NVIDIA's compilers do not move later code before it.

    An operand of a product is staged through shared memory. Triton does that right after its load, so the loads of
    several blocks wait for one another. If the blocks are held after all loads and a barrier, the loads overlap.
    """
    if _EMULATE:
        return x
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=32 // x.dtype.primitive_bitwidth
        )  # fmt: skip


@triton.jit
def met():
    """Return 0.0 after a barrier of the program's warps. A sum that starts from it stays behind the barrier.

    A load does not cross a barrier, but a sum of loaded values may. To save registers, ptxas would move the additions
    up between the loads, which would then wait for one another.
    """
    if _EMULATE:
        return 0.0
    else:
        zero = tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $1, $1; barrier.cta.red.popc.aligned.u32 $0, 0, p; }",
            "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        return zero.to(tl.float32, bitcast=True)


@triton.jit
def _split_tf32(x):
    big = _round_tf32(x)
    return big, _round_tf32(x - big)


@triton.jit
def dot(left, right, acc, DOT: tl.constexpr):
    """Return acc + left @ right, summed in fp32. Operands come from `operand` or `packed_operand`."""
    if DOT == "bf16":
        return tl.dot(left, right, acc)
    elif DOT == "tf32x3":
        # Triton's own "tf32x3" truncates the rests, so it is not used. The product of the two rests is below fp32's
        # precision. The sum starts from zero, because tensor cores truncate each sum's last bits, and over all of d
        # that would exceed fp32's own error. An infinite operand gives NaN.
        left, left_rest = _split_tf32(left)
        right, right_rest = _split_tf32(right)
        product = tl.dot(left_rest, right, input_precision="tf32")
        product = tl.dot(left, right_rest, product, input_precision="tf32")
        return acc + tl.dot(left, right, product, input_precision="tf32")
    else:
        return tl.dot(left, right, acc, input_precision=DOT)


@triton.jit
def store(pointers, x, mask):
    """Store an fp32 block in the pointer's dtype, rounded to nearest even."""
    dtype: tl.constexpr = pointers.dtype.element_ty
    if _EMULATE and dtype == tl.bfloat16:
        tl.store(pointers, _bf16_bits(x).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointers, x.to(dtype), mask=mask)
