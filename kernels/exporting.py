"""The registered ops as operations of PyTorch, for runtimes without the kernels, such as ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import norm_torch, torch_backend
from .norm_torch import Norm
from .post_block import backward, of_op, with_projected_up
from .post_block_norm import Saved, backward_norm


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """Return what the ops of a steered model are made of, for `run_decompositions` of an exported program.

    A model that was exported by `torch.export` has nodes of this package, which only PyTorch with this package can
    run. `program.run_decompositions(decompositions())` replaces them by operations of PyTorch, with the same arithmetic
    (float32 for a narrower hidden state). For a graph of core operations alone, add them to
    `torch.export.default_decompositions()`.

    Returns:
        A function for each op of `post_block` and `post_block_norm`, forward and backward. Ops with an adapter for each
        row (`steering.batch`) have none.
    """
    ops = torch.ops.fused_steer
    return {
        ops.post_block.default: _post_block,
        ops.post_block_inference.default: _post_block_inference,
        ops.post_block_backward.default: _post_block_backward,
        ops.post_block_norm.default: _post_block_norm,
        ops.post_block_norm_backward.default: _post_block_norm_backward,
    }


def _post_block(residual: Tensor, branch: Tensor | None, *inputs: Any) -> tuple[Tensor, Tensor]:
    *operands, keep_a = inputs
    out, a = torch_backend.definition(residual, branch, with_projected_up(of_op(*operands)))
    if keep_a and a is not None:
        return out, a.flatten(0, -2)
    return out, residual.new_empty(0, dtype=torch_backend.accumulation_dtype(out.dtype))


def _post_block_inference(
    residual: Tensor, branch: Tensor, down: Tensor, up: Tensor, scale: Tensor, activation: str, reads: str = "sum"
) -> Tensor:
    operands = (down, up, None, None, None, scale, None, 1.0, activation, reads)
    return torch_backend.definition(residual, branch, of_op(*operands))[0]


def _post_block_backward(grad: Tensor, kept: Tensor | None, a: Tensor | None, *inputs: Any) -> list[Tensor]:
    *operands, needs = inputs
    return backward(grad, kept, a, of_op(*operands), needs, again=True)


def _post_block_norm(residual: Tensor, branch: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    *operands, weight, eps, plus_one, rounds_first, keep = inputs
    norm = Norm(weight, eps, plus_one, rounds_first)
    out, a = _post_block(residual, branch, *operands, keep)
    inverse = norm_torch.inverse_rms(out, norm) if keep else a.new_empty(0)
    return out, norm_torch.definition(out, norm), a, inverse


def _post_block_norm_backward(grad: Tensor | None, grad_normed: Tensor | None, *inputs: Any) -> list[Tensor]:
    saved, operands, norm, needs = Saved(*inputs[:4]), of_op(*inputs[4:14]), Norm(*inputs[14:18]), inputs[18]
    return backward_norm(grad, grad_normed, saved, operands, norm, needs, again=True)
