"""How numbers are rounded: operands of `tl.dot`, and values on their way to memory. One policy for every kernel.

All adapter arithmetic and all sums are fp32. Only the operands of a matrix product are narrower, by the hidden state's
dtype, because that is what tensor cores take:

| hidden state | operands | why |
|---|---|---|
| bf16 | bf16 | the model's own precision |
| fp16 | tf32 | holds every fp16 value with fp32's exponents: no gradient vanishes, no pre-activation overflows |
| fp32 | tf32x3 (ieee where there is no tf32, and at ranks over 128) | three tf32 products, error near 1e-6 |

Kernels round every narrower operand to nearest. Left to themselves, tensor cores cut off the low 13 bits of a tf32
operand: an error twice as large, and always towards zero. Triton's interpreter multiplies in fp32, so there the same
rounding is done on the bits, and its results are those of the hardware up to the order of the sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton import knobs

#: True when kernels run in Triton's interpreter. Fixed at import, as Triton itself fixes it when a kernel is decorated.
INTERPRETED: bool = bool(knobs.runtime.interpret)

_EMULATE = tl.constexpr(INTERPRETED)

#: Passed to every compilation. Whether a product and a sum are fused decides last bits: neither
#: TRITON_DEFAULT_FP_FUSION nor Triton's default, which changes in 3.10, may change them.
COMPILER_OPTIONS = {"enable_fp_fusion": True}


def dot_precision(dtype: torch.dtype, gpu: str, rank: int) -> str:
    """Name of the operand policy ("bf16", "tf32", "tf32x3" or "ieee") for a hidden state of `dtype`.

    `gpu` is Triton's name of the vendor ("cuda", "hip", "xpu"). Only CUDA has tf32 everywhere; elsewhere fp32 operands
    stay fp32, which AMD's matrix units take as they are. Three tf32 parts of 256 ranks do not fit in registers.
    """
    if dtype == torch.bfloat16:
        return "bf16"
    if gpu != "cuda" or (dtype == torch.float32 and rank > 128):
        return "ieee"
    return "tf32" if dtype == torch.float16 else "tf32x3"


def operand_dtype(dtype: torch.dtype, gpu: str, rank: int) -> torch.dtype:
    """The dtype in which packed weights (`contract.Packed`) are kept for a hidden state of `dtype`.

    bfloat16 where operands are bf16; float32 elsewhere, already rounded to tf32 where the policy is "tf32".
    """
    return torch.bfloat16 if dot_precision(dtype, gpu, rank) == "bf16" else torch.float32


@triton.jit
def _bf16_bits(x):
    # Round to nearest even by hand. Triton's interpreter truncates, and keeps bf16 as raw 16-bit integers on which
    # arithmetic is meaningless, so interpreted kernels never hold a bf16 value, only its bits on the way to memory.
    bits = x.to(tl.uint32, bitcast=True)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return tl.where(x == x, rounded, bits | 0x400000) >> 16


@triton.jit
def _round_tf32(x):
    # To nearest, ties away from zero. Where the result enters a product, which ignores the low bits, ptxas leaves their
    # mask out; written with integers it would stay.
    if _EMULATE:
        bits = x.to(tl.uint32, bitcast=True)
        return tl.where(x == x, ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True), x)
    else:
        return tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )  # fmt: skip


@triton.jit
def operand(x, DOT: tl.constexpr):
    """A block, as loaded or computed -> the dtype in which it enters a matrix product, rounded to nearest."""
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
    """A block of packed weights, as loaded -> an operand of a matrix product. It was rounded when it was packed."""
    if _EMULATE and DOT == "bf16":
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def held(x):
    """A copy that NVIDIA's compilers do not move: what comes after it stays after it.

    A block on its way to a product is staged through shared memory. Triton does that right behind its load, so that the
    loads of several blocks wait for one another. Held behind all loads and a barrier, they are in flight together.
    """
    if _EMULATE:
        return x
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=32 // x.dtype.primitive_bitwidth
        )  # fmt: skip


@triton.jit
def met():
    """A barrier of the program's warps that gives 0.0: a sum that begins with it begins behind the barrier.

    A load stays on its side of a barrier. A sum of what was loaded does not: to need fewer registers, ptxas moves its
    additions up between the loads, which then wait for one another.
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
    """acc + left @ right, summed in fp32. Operands come from `operand` or `packed_operand`."""
    if DOT == "bf16":
        return tl.dot(left, right, acc)
    elif DOT == "tf32x3":
        # By hand: Triton's own "tf32x3" leaves the rests to be cut off. The rests' own product is below fp32's
        # precision. Summed from zero, because tensor cores cut off each sum's last bits: across all of d that would be
        # more than fp32's own error. An infinite operand gives NaN.
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
