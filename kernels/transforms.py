"""The registered ops of post_block under the transforms of torch.func: the rules of vmap, and what is not compiled.

Imported when a transform first reaches the op, because it imports torch._dynamo, which takes a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


# In a graph a tensor does not show that a transform differentiates it, so the graph would have no gradient.
@torch.compiler.disable(reason="post_block inside a transform of torch.func is not compiled")
def uncompiled(run: Callable[..., Any], *inputs: Any) -> Any:
    """Call `run`, also where PyTorch compiles."""
    return run(*inputs)


def _in_front(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """Return `tensor` with vmap's dimension in front; without one it is expanded."""
    if tensor is None:
        return None
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _each(op: Any, size: int, dims: tuple[Any, ...], inputs: tuple[Any, ...]) -> list[Tensor]:
    """Call `op` for each element of vmap's dimension. Returns its results, stacked."""
    results = [
        op(*(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, dims, strict=True))) for i in range(size)
    ]
    return [torch.stack(of_one) for of_one in zip(*results, strict=True)]


def _has(dims: tuple[Any, ...], *but: int) -> bool:
    """Return whether an input other than those at `but` has vmap's dimension."""
    return any(dim is not None for index, dim in enumerate(dims) if index not in but)


def _post_block_vmap(info: Any, dims: tuple[Any, ...], *inputs: Any) -> tuple[list[Tensor], list[int]]:
    op, size = torch.ops.fused_steer.post_block, info.batch_size
    if _has(dims, 0, 1, 6):
        out, a = _each(op, size, dims, inputs)
    else:  # only tokens: residual, branch and gain
        residual, branch, *others = inputs
        others[4] = _in_front(others[4], dims[6], size)
        out, a = op(_in_front(residual, dims[0], size), _in_front(branch, dims[1], size), *others)
        a = a.view(size, len(a) // size, *a.shape[1:])  # (N, r), or (0,) if it is not kept
    return [out, a], [0, 0]


def _post_block_backward_vmap(info: Any, dims: tuple[Any, ...], *inputs: Any) -> tuple[list[Tensor], list[int]]:
    op, size, needs = torch.ops.fused_steer.post_block_backward, info.batch_size, inputs[-1]
    dims = (*dims[:-1], None)  # the flags `needs`, a list
    if _has(dims, 0, 1, 2, 7) or any((*needs[1:5], needs[6])):
        found = _each(op, size, dims, inputs)  # gradients of the weights: those of each element are asked for
    else:
        grad, kept, a, *others = inputs
        others[4] = _in_front(others[4], dims[7], size)
        a = _in_front(a, dims[2], size)
        a = None if a is None else a.flatten(0, 1)
        found = op(_in_front(grad, dims[0], size), _in_front(kept, dims[1], size), a, *others)
    return list(found), [0] * len(found)


torch.library.register_vmap("fused_steer::post_block", _post_block_vmap)
torch.library.register_vmap("fused_steer::post_block_backward", _post_block_backward_vmap)
