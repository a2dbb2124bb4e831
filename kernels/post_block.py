"""Post-block steering fused into the residual add that ends a decoder block: the op and its autograd.

    x   = residual + branch                         (N, d)
    a   = x W1ᵀ + b1                                (N, r)   W1 = down (r, d), b1 = down_bias
    u   = φ(a) W2'ᵀ + b2                            (N, d)   W2' = (I − V Vᵀ) W2, W2 = up (d, r), V = basis (d, k)
    out = x + s · g ⊙ u                             (N, d)   s = scale, g = gain (N,), b2 = up_bias

and backward, with G = ∂L/∂out:

    t   = s · g ⊙ G            dz = t W2'            da = dz ⊙ φ'(a)
    dx  = G + da W1            dW1 = daᵀ x           dW2' = tᵀ φ(a)       dW2 = (I − V Vᵀ) dW2'
    db1 = Σ da   db2 = Σ t     ds = Σ g ⊙ rowsum(G ⊙ u)                   dg = s · rowsum(G ⊙ u)

Only `out` and `a` are kept for backward. x = out − s·g·u is not recomputed: with h = s · g ⊙ φ(a),

    dW1 = daᵀ out − (daᵀ h) W2'ᵀ − (daᵀ (s · g)) b2ᵀ        rowsum(G ⊙ u) = φ(a)·(G W2') + G·b2

With reads = "branch" W1 is applied to branch instead of x: a = branch W1ᵀ + b1. Then residual has the gradient G,
branch has G + da W1, and dW1 = daᵀ branch. branch is kept instead of `out`, and dW1 needs no correction.

The kernels are in triton_backend.py and resident.py. torch_backend.py computes the same in plain PyTorch. This file
goes from the backends to the public function: forward and backward on any backend, registered ops, autograd,
`post_block`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import flops, torch_backend, triton_backend
from .activations import ACTIVATIONS
from .backend import check_backend, no_autocast, select_backend
from .contract import DTYPES, FLOAT32_MAX, Gradients, Needs, Operands, check_choice, check_dense, check_reads
from .derivatives import (
    is_batched,
    is_differentiated,
    is_differentiated_again,
    is_forward_mode,
    is_functionalized,
    is_transformed,
)
from .inductor import start_directly
from .launch import empty
from .plan import OpPlan, Plan, keep, no_plan, run_planned
from .registered import is_described, is_watched, is_wrapped, register
from .schedule import MAX_RANK

# --------------------------------------------------------------------------------- forward and backward, any backend

_FORWARD = {"triton": triton_backend.forward, "torch": torch_backend.forward}
_BACKWARD: dict[str, Callable[..., Gradients]] = {
    "triton": triton_backend.backward, "torch": torch_backend.backward,
}  # fmt: skip


def project(matrix: Tensor, basis: Tensor) -> Tensor:
    """Return (I − V Vᵀ) M for M (d, r) and an orthonormal V = basis (d, k), in M's accumulation dtype (paper §5.2)."""
    acc = torch_backend.accumulation_dtype(matrix.dtype)
    matrix, basis = matrix.to(acc), basis.to(acc)
    return torch.addmm(matrix, basis, basis.t() @ matrix, alpha=-1)


def forward(
    residual: Tensor, branch: Tensor | None, operands: Operands, keep_a: bool, inside: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Run the forward on the backend of the residual's device. Return `out` and `a` (N, r), which is None unless kept.

    Packed operands require the Triton backend and no basis. inside: whether the registered op makes the call. It must
    not call itself.
    """
    if not inside and is_watched() and operands.packed is None:
        out, kept = _op(residual, branch, *inputs_of(operands), keep_a)
        return out, kept if keep_a and operands.rank else None
    with no_autocast(residual.device):
        backend = select_backend(residual.device)
        check_backend(backend, residual, branch, *operands)
        return _FORWARD[backend](residual, branch, with_projected_up(operands), keep_a)


def backward(
    grad: Tensor,
    kept: Tensor | None,
    a: Tensor | None,
    operands: Operands,
    needs: list[bool],
    grad_a: Tensor | None = None,
    again: bool = False,
    inside: bool = False,
) -> list[Tensor]:
    """Return the gradients of x, down, up, down_bias, up_bias, gain and scale that `needs` selects, in that order.

    Each has the dtype of its own tensor. The gradient of x has the dtype of `grad`.

    Args:
        kept: `out`, or branch if W1 is applied to branch. It is only needed for the gradient of W1.
        again: compute them by PyTorch operations, which can be differentiated again.
        grad_a: a gradient of `a`, which a second derivative has. It requires `again`.
        inside: as in `forward`.
    """
    if not inside and is_watched() and not again and operands.packed is None:
        return list(_backward_op(grad, kept, a, *inputs_of(operands), needs))
    need_x, need_down, need_up, need_down_bias, need_up_bias, need_gain, need_scale = needs
    wanted = Needs(need_x, need_down, need_up, need_down_bias, need_up_bias, need_gain or need_scale)
    gain, scale = operands.gain, operands.scale
    with no_autocast(grad.device):
        if again:
            found = torch_backend.backward(grad, kept, a, with_projected_up(operands), wanted, grad_a, again)
        else:
            found = _BACKWARD[select_backend(grad.device)](grad, kept, a, with_projected_up(operands), wanted)
        result = in_their_dtypes(found, grad, operands)
        if need_gain:
            assert gain is not None and found.row_dot is not None
            result.append((found.row_dot * scale).view(gain.shape).to(gain.dtype))
        if need_scale:
            assert isinstance(scale, Tensor) and found.row_dot is not None
            weighted = found.row_dot if gain is None else found.row_dot * gain.reshape(-1)
            result.append(weighted.sum().to(scale.dtype))
        return result


def in_their_dtypes(found: Gradients, state: Tensor, operands: Operands) -> list[Tensor]:
    """Return the gradients of x, down, up, down_bias and up_bias that there are, in the dtypes of their tensors.

    That of W2 is projected. x has the dtype of `state`.
    """
    if operands.basis is not None and found.up is not None:
        found.up = project(found.up, operands.basis)
    pairs = (
        (found.x, state),
        (found.down, operands.down),
        (found.up, operands.up),
        (found.down_bias, operands.down_bias),
        (found.up_bias, operands.up_bias),
    )
    return [value.to(like.dtype) for value, like in pairs if value is not None and like is not None]


def with_projected_up(operands: Operands) -> Operands:
    if operands.basis is None or operands.up is None:
        return operands
    return operands._replace(up=project(operands.up, operands.basis), basis=None)


def of_op(
    down: Tensor | None,
    up: Tensor | None,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    gain: Tensor | None,
    scale_tensor: Tensor | None,
    basis: Tensor | None,
    scale: float,
    activation: str,
    reads: str,
) -> Operands:
    """Return the operands of a registered op, which takes the scale as a number or as a tensor."""
    s = scale if scale_tensor is None else scale_tensor
    return Operands(down, up, down_bias, up_bias, gain, basis, s, activation, reads=reads)


def inputs_of(operands: Operands) -> tuple[Any, ...]:
    """Return operands as a registered op takes them."""
    scale = operands.scale
    s, scale_tensor = (1.0, scale) if isinstance(scale, Tensor) else (scale, None)
    return (*operands[:5], scale_tensor, operands.basis, s, operands.activation, operands.reads)


def _eager_forward(residual: Tensor, branch: Tensor | None, *inputs: Any) -> tuple[Tensor, Tensor | None]:
    return forward(residual, branch, of_op(*inputs[:-1]), inputs[-1])


def _eager_backward(grad: Tensor, kept: Tensor | None, a: Tensor | None, *inputs: Any) -> list[Tensor]:
    return backward(grad, kept, a, of_op(*inputs[:-1]), inputs[-1])


# ------------------------------------------------------------------------------------------------------ registered ops
#
# The ops in graphs of torch.compile and torch.export. Eager calls bypass them, because a dispatch through torch.library
# takes tens of microseconds, more than the kernel itself at decode sizes.

OPERANDS = (
    "Tensor? down, Tensor? up, Tensor? down_bias, Tensor? up_bias, Tensor? gain, Tensor? scale_tensor, Tensor? basis, "
    "float scale, str activation, str reads"
)


#: Plans by the kind of a graph's call. All layers and adapters of the same shapes share one.
_forward_plans: dict[Any, OpPlan] = {}
_backward_plans: dict[Any, OpPlan] = {}


def _post_block_op(*inputs: Any) -> Sequence[Tensor]:
    residual, branch, down, _, down_bias, up_bias, gain, scale_tensor, basis, scale, activation, reads, keep_a = inputs
    key = (
        residual.shape, residual.dtype, branch is None, None if down is None else (down.shape, down.dtype),
        down_bias is None, up_bias is None, gain is None, scale_tensor is None, scale, activation, reads, keep_a,
    )  # fmt: skip

    def call() -> Sequence[Tensor]:
        out, a = forward(residual, branch, of_op(*inputs[2:-1]), keep_a, inside=True)
        if a is None:
            a = empty(0, dtype=torch_backend.accumulation_dtype(out.dtype), device=out.device)
        return out, a

    # W2 is projected by operations between the launches, which a plan cannot have.
    return call() if basis is not None else run_planned(_forward_plans, key, inputs, call)


#: Plans of `post_block_inference`, and for each activation and `reads` the `run` of the last call's plan.
_inference_plans: dict[Any, Plan] = {}
_last_inference: dict[tuple[str, str], Callable[..., Tensor | None]] = {}


def _inference_key(
    residual: Tensor, branch: Tensor, down: Tensor, up: Tensor, scale: Tensor, activation: str, reads: str
) -> Any:
    return residual.shape, residual.dtype, branch.dtype, down.shape, down.dtype, down.requires_grad, activation, reads


def _plan_inference(operands: tuple[Tensor, ...], activation: str, reads: str) -> tuple[Tensor, Plan | None]:
    """Run a call the ordinary way. Returns its result, and the plan for the next such calls."""
    residual, branch, down, up, scale = operands

    def call() -> tuple[Tensor, ...]:
        given = Operands(down, up, scale=scale, activation=activation, reads=reads)
        return forward(residual, branch, given, False, inside=True)[:1]

    (out,), plan = Plan.make(operands, call)
    if plan is not None:
        keep(_inference_plans, _inference_key(residual, branch, down, up, scale, activation, reads), plan)
    return out, plan


def _post_block_inference_op(
    residual: Tensor, branch: Tensor, down: Tensor, up: Tensor, scale: Tensor, activation: str, reads: str = "sum"
) -> Tensor:
    weights = (down, up, scale)
    out = _last_inference.get((activation, reads), no_plan)(residual, branch, weights)
    if out is not None:
        return out
    plan = _inference_plans.get(_inference_key(residual, branch, *weights, activation, reads))
    out = None if plan is None else plan.run(residual, branch, weights)
    if out is None:
        out, plan = _plan_inference((residual, branch, *weights), activation, reads)
    if plan is not None:
        _last_inference[activation, reads] = plan.run
    return out


def start_inference(activation: str, reads: str = "sum") -> Callable[..., None]:
    """Make the function that a graph generated by Inductor calls instead of `post_block_inference`: see
    `inductor.start_directly`."""

    last: Callable[..., bool | None] = no_plan

    def start(residual: Tensor, branch: Tensor, down: Tensor, up: Tensor, scale: Tensor, out: Tensor) -> None:
        nonlocal last
        if last(residual, branch, down, up, scale, out):
            return
        operands = (residual, branch, down, up, scale)
        plan = _inference_plans.get(_inference_key(*operands, activation, reads))
        if plan is None or not plan.fill(*operands, out):
            # Generated code does not check the weights.
            given = Operands(down, up, None, None, None, None, scale, activation, reads=reads)
            check_operands(residual, branch, given)
            result, plan = _plan_inference(operands, activation, reads)
            out.copy_(result)
        if plan is not None:
            last = plan.fill

    return start


def _post_block_inference_fake(residual, branch, down, up, scale, activation, reads="sum"):
    start_directly(torch.ops.fused_steer.post_block_inference.default, start_inference)
    return residual.new_empty(residual.shape, dtype=torch.promote_types(residual.dtype, branch.dtype))


def _post_block_fake(
    residual, branch, down, up, down_bias, up_bias, gain, scale_tensor, basis, scale, activation, reads, keep_a
):  # fmt: skip
    dtype = residual.dtype if branch is None else torch.promote_types(residual.dtype, branch.dtype)
    out = residual.new_empty(residual.shape, dtype=dtype)
    rank = 0 if down is None else down.shape[0]
    shape = (residual.numel() // residual.shape[-1], rank) if keep_a and rank else (0,)
    return out, residual.new_empty(shape, dtype=torch_backend.accumulation_dtype(dtype))


def _post_block_backward_op(*inputs: Any) -> Sequence[Tensor]:
    grad, kept, a, down, _, down_bias, up_bias, gain, scale_tensor, basis, scale, activation, reads, needs = inputs
    key = (
        grad.shape, grad.dtype, kept is None, a is None, None if down is None else (down.shape, down.dtype),
        down_bias is None, up_bias is None, gain is None, scale_tensor is None, scale, activation, reads, *needs,
    )  # fmt: skip

    def call() -> Sequence[Tensor]:
        return backward(grad, kept, a, of_op(*inputs[3:-1]), needs, inside=True)

    return call() if basis is not None else run_planned(_backward_plans, key, inputs, call)


def _post_block_backward_fake(
    grad, kept, a, down, up, down_bias, up_bias, gain, scale_tensor, basis, scale, activation, reads, needs
):  # fmt: skip
    likes = (grad, down, up, down_bias, up_bias, gain, scale_tensor)
    return [like.new_empty(like.shape) for like, need in zip(likes, needs, strict=True) if need]


# ---------------------------------------------------------------------------------------------------------- autograd

_NO_SECOND_DERIVATIVE = "a gradient of fused-steer in a graph has no derivative; expected an eager call"


def _refuse_second_derivative(ctx: Any, *grad_outputs: Any) -> Any:
    raise RuntimeError(_NO_SECOND_DERIVATIVE)


class _FirstOrder(torch.autograd.Function):
    """Passes gradients on and raises if it is differentiated. Otherwise a second derivative would silently be zero.

    For the gradients of graphs, and of torch.func where nothing shows that they are differentiated again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(of: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients unchanged. They follow the first `of` tensors, on which they depend."""
        return tuple(g.view_as(g) for g in tensors[of:])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    backward = staticmethod(_refuse_second_derivative)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
    residual, branch, down, up, down_bias, up_bias, gain, scale_tensor, basis, scale, activation, reads, _ = inputs
    out, a = output
    residual_needs, branch_needs, d_down, d_up, d_down_bias, d_up_bias, d_gain, d_scale = ctx.needs_input_grad[:8]
    adapter = down is not None
    of_sum = reads == "sum"
    x = branch_needs or (residual_needs and of_sum)
    ctx.needs = [x and adapter, d_down, d_up, d_down_bias, d_up_bias, d_gain, d_scale]
    ctx.dtypes = (residual.dtype if residual_needs else None, branch.dtype if branch_needs else None)
    ctx.constants = (scale, activation, reads)
    ctx.result = out.shape, out.dtype
    reduces = any((*ctx.needs[:4], d_gain, d_scale))
    if any(ctx.needs):
        ctx.save_for_backward(
            (out if of_sum else branch) if d_down else None,
            a if adapter and reduces else None,
            down,
            up,
            down_bias,
            up_bias,
            gain,
            scale_tensor,
            basis,
        )
    ctx.set_materialize_grads(False)


def saved_tensors(ctx: Any, reads: str) -> tuple[Tensor, ...]:
    """Return the tensors that the forward saved. `reads` is the tensor that W1 was applied to.

    Raises:
        RuntimeError: one was changed in place. For the output the message explains why.
    """
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace" not in str(error) or "PostBlock" not in str(error):
            raise
        if "PostBlockNorm" in str(error):
            of = "gradients of W1 and of the fused norm are"
        elif reads == "sum":
            of = "gradient of W1 is"
        else:
            raise
        raise RuntimeError(
            f"the output of post_block was changed in place, but the {of} computed from it; expected a changed copy "
            "(output.clone())"
        ) from None


def _differentiate(ctx: Any, grad: Tensor | None, run: Any) -> tuple[Tensor | None, ...]:
    """Return the gradients of all inputs, computed by `run`: `_eager_backward`, or the registered op."""
    if grad is None:
        return (None,) * 13
    reads = ctx.constants[-1]
    found = iter(run(grad, *saved_tensors(ctx, reads), *ctx.constants, ctx.needs) if any(ctx.needs) else ())
    dx, *others = [next(found) if need else None for need in ctx.needs]
    if dx is None:
        dx = grad  # a vector shifts the hidden state by a constant
    both = (dx if reads == "sum" else grad, dx)
    d_residual, d_branch = (None if dtype is None else d.to(dtype) for d, dtype in zip(both, ctx.dtypes, strict=True))
    return (d_residual, d_branch, *others, None, None, None, None, None)


def _differentiate_again(ctx: Any, grad: Tensor | None, grad_a: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of all inputs in a form that autograd differentiates again.

    They depend on x by `out` and `a`, which were saved. Both are results of the function, so autograd finds the way
    from them to x. `a` therefore has a gradient of its own, grad_a, when it comes back.
    """
    if grad is None and grad_a is not None:
        shape, dtype = ctx.result
        grad = grad_a.new_zeros(shape, dtype=dtype)

    def run(grad: Tensor, kept: Tensor | None, a: Tensor | None, *inputs: Any) -> list[Tensor]:
        return backward(grad, kept, a, of_op(*inputs[:-1]), inputs[-1], grad_a, again=True)

    return _differentiate(ctx, grad, run)


class _PostBlock(torch.autograd.Function):
    """The autograd function of the op in eager mode."""

    # Without a separate `setup_context`, because PyTorch would then bind the arguments to a signature in every call.
    # That takes the host longer than the rest of the call.
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        output = _eager_forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_a: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or grad_a is not None or is_batched(grad):
            return _differentiate_again(ctx, grad, grad_a)
        return _differentiate(ctx, grad, _eager_backward)


class _TransformedPostBlock(torch.autograd.Function):
    """The autograd function of the op under torch.func's transforms.

    They accept only this form, and may pass tensors that no kernel can read. The registered ops unwrap these.
    """

    generate_vmap_rule = True  # by the rules of the registered ops

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.fused_steer.post_block(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_a: Tensor | None) -> tuple[Tensor | None, ...]:
        from .transforms import uncompiled

        return uncompiled(_transformed_backward, ctx, grad, grad_a)


def _transformed_backward(ctx: Any, grad: Tensor | None, grad_a: Tensor | None) -> tuple[Tensor | None, ...]:
    again = torch.is_grad_enabled() and is_differentiated_again((grad, *ctx.saved_tensors))
    if again or grad_a is not None:
        return _differentiate_again(ctx, grad, grad_a)
    with torch.no_grad():
        gradients = _op_backward(ctx, grad, None)
    if grad is None:
        return gradients
    return first_order((grad, *(t for t in ctx.saved_tensors if t is not None)), gradients)


def _transformed(*inputs: Any) -> Tensor:
    """Compute the op inside a transform of torch.func or forward-mode differentiation."""
    if is_forward_mode() or is_functionalized():
        return _defined(*inputs)
    *operands, keep_a = inputs
    if not keep_a and operands[2] is not None:  # a transform or autograd outside of this one may ask for gradients
        keep_a = torch.is_grad_enabled() and any(t is not None and is_differentiated(t) for t in operands[:8])
    return _TransformedPostBlock.apply(*operands, keep_a)[0]


def _defined(residual: Tensor, branch: Tensor | None, *inputs: Any) -> Tensor:
    """Compute the op by PyTorch operations, which PyTorch differentiates."""
    with no_autocast(residual.device):
        return torch_backend.definition(residual, branch, with_projected_up(of_op(*inputs[:-1])))[0]


def first_order(of: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Return the gradients, which depend on `of` and raise if they are differentiated."""
    passed = iter(_FirstOrder.apply(len(of), *of, *(g for g in gradients if g is not None)))
    return tuple(None if g is None else next(passed) for g in gradients)


def _op_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return _differentiate(ctx, grad, torch.ops.fused_steer.post_block_backward)


class _RegisteredPostBlock(torch.autograd.Function):
    """The autograd function of the op in a graph."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _op(*inputs)
        _setup_context(ctx, inputs, output)
        ctx.mark_non_differentiable(output[1])
        return output

    backward = staticmethod(_op_backward)


def _differentiable_backward_op(*inputs: Any) -> list[Tensor]:
    of = tuple(t for t in inputs if isinstance(t, Tensor) and t.requires_grad)
    return list(_FirstOrder.apply(len(of), *of, *_backward_op(*inputs)))


_op = register(
    f"post_block(Tensor residual, Tensor? branch, {OPERANDS}, bool keep_a) -> (Tensor, Tensor)",
    _post_block_op, _post_block_fake, _RegisteredPostBlock.apply, flops.of_forward,
)  # fmt: skip
# The usual call of a layer in a graph without gradients. It is separate because each argument and result costs a
# conversion.
register(
    "post_block_inference(Tensor residual, Tensor branch, Tensor down, Tensor up, Tensor scale, str activation, "
    'str reads="sum") -> Tensor',
    _post_block_inference_op, _post_block_inference_fake, None, flops.of_inference,
)  # fmt: skip
_backward_op = register(
    f"post_block_backward(Tensor grad, Tensor? kept, Tensor? a, {OPERANDS}, bool[] needs) -> Tensor[]",
    _post_block_backward_op, _post_block_backward_fake, _differentiable_backward_op, flops.of_backward,
)  # fmt: skip


# -------------------------------------------------------------------------------------------------------- user's call

_TENSORS = ("residual", "branch", "down", "up", "down_bias", "up_bias", "gain", "basis")


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected float32, bfloat16, float16 or float64")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; expected {device}, the device of residual")


def check_operands(residual: Tensor, branch: Tensor | None, operands: Operands) -> None:
    """Check the operands of the op. Raise a one-line error with the value and the expected one."""
    down, up, down_bias, up_bias, gain, basis, scale, activation, _, reads = operands
    for name, tensor in zip(_TENSORS, (residual, branch, down, up, down_bias, up_bias, gain, basis), strict=True):
        if tensor is not None or name == "residual":
            check_dense(name, tensor)
    if residual.dim() < 1 or residual.shape[-1] == 0:
        raise ValueError(f"residual has shape {tuple(residual.shape)}; expected (..., d) with d > 0")
    device, hidden = residual.device, residual.shape[-1]
    _check_tensor("residual", residual, residual.shape, device)
    if branch is not None:
        _check_tensor("branch", branch, residual.shape, device)
    check_choice("activation", activation, ACTIVATIONS)
    check_reads(reads, branch)
    if (down is None) != (up is None):
        missing, given = ("down", "up") if down is None else ("up", "down")
        raise ValueError(f"{missing} is None but {given} is given; expected both, or neither for a steering vector")
    if down is None and up_bias is None:
        raise ValueError("down, up and up_bias are all None; expected down and up, or up_bias (a steering vector)")
    if down is not None and up is not None:
        if down.dim() != 2 or down.shape[1] != hidden:
            raise ValueError(f"down has shape {tuple(down.shape)}; expected (r, {hidden})")
        rank = down.shape[0]
        if rank > MAX_RANK:
            raise ValueError(f"the rank of down is {rank}; expected at most {MAX_RANK}")
        _check_tensor("down", down, (rank, hidden), device)
        _check_tensor("up", up, (hidden, rank), device)
        if down_bias is not None:
            _check_tensor("down_bias", down_bias, (rank,), device)
    elif down_bias is not None:
        raise ValueError("down_bias is given without down; expected both or neither")
    elif basis is not None:
        raise ValueError("basis is given without up; expected both or neither")
    if up_bias is not None:
        _check_tensor("up_bias", up_bias, (hidden,), device)
    if gain is not None:
        _check_tensor("gain", gain, residual.shape[:-1], device)
    if basis is not None:
        if basis.dim() != 2 or basis.shape[0] != hidden or basis.shape[1] > hidden:
            raise ValueError(f"basis has shape {tuple(basis.shape)}; expected ({hidden}, k) with k <= {hidden}")
        _check_tensor("basis", basis, basis.shape, device)
    if isinstance(scale, Tensor):
        _check_tensor("scale", scale, (), device)
    elif isinstance(scale, bool) or not isinstance(scale, (float, int, Real)):
        raise TypeError(f"scale is a {type(scale).__name__}; expected a float or a 0-dim tensor")
    elif not torch.compiler.is_compiling() and residual.dtype != torch.float64 and not abs(scale) <= FLOAT32_MAX:
        shown = scale if isinstance(scale, float) else "too large"
        raise ValueError(f"scale is {shown}; expected at most {FLOAT32_MAX:.7g} in magnitude, float32's largest")


def post_block(
    residual: Tensor,
    branch: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    *,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "silu",
    scale: float | Tensor = 1.0,
    gain: Tensor | None = None,
    basis: Tensor | None = None,
    reads: str = "sum",
) -> Tensor:
    """Post-block steering, x + s · g ⊙ (φ(x W1ᵀ + b1) W2'ᵀ + b2) with x = residual + branch (arXiv 2603.00425, §3).

    With reads="branch" W1 is applied to branch instead of x: x + s · g ⊙ (φ(branch W1ᵀ + b1) W2'ᵀ + b2). This is the
    paper's post-MLP site, where branch is the MLP's output.

    The forward is one pass over the hidden state. The backward is written by hand and keeps only the output and a
    (N, r); with reads="branch" it keeps branch instead of the output. If the shift is exactly zero (a fresh adapter, or
    zero gain or scale), the result is `residual + branch` bit for bit. Autocast has no effect: sums and adapter
    arithmetic are float32, or float64 for float64 inputs.

    Gradients with create_graph=True, derivatives in forward mode, and calls on tensor subclasses such as DTensor are
    computed by PyTorch operations instead of kernels.

    Args:
        residual: (..., d), float32, bfloat16, float16, or, on the torch backend, float64. Any strides are allowed. Only
            a last stride other than 1, or leading dimensions that do not collapse into two, cause a copy.
        branch: (..., d), the sublayer's output, which is added to the residual. None steers a finished hidden state.
        down: W1 (r, d), r at most 256, of any of these dtypes. None, with `up`, for a steering vector.
        up: W2 (d, r).
        down_bias: b1 (r,).
        up_bias: b2 (d,). Without W1 and W2 it is a steering vector.
        activation: φ, one of identity, silu, gelu (erf), gelu_tanh, relu, tanh.
        scale: the strength s, a number or a 0-dim tensor on the same device.
        gain: g, (...), one factor for each token. None means 1.
        basis: V (d, k) with orthonormal columns, a constant. Then W2' = (I − V Vᵀ) W2, and W2's gradient is projected
            in the same way.
        reads: the tensor that W1 is applied to, "sum" (residual + branch) or "branch", which must be given. A steering
            vector is the same in both.

    Returns:
        (..., d), contiguous, in the dtype of `residual + branch`.

    Raises:
        ValueError: a shape, device, rank, activation or `reads` is not supported, or the scale is beyond float32.
        TypeError: a dtype is not supported, or an argument is no tensor, or the scale neither a number nor a tensor.
        RuntimeError: the backend of FUSED_STEER_BACKEND cannot run here, or a gradient of a compiled or exported graph
            is differentiated.
    """
    in_graph = torch.compiler.is_compiling() or (isinstance(residual, Tensor) and is_described(residual))
    check_operands(
        residual, branch, Operands(down, up, down_bias, up_bias, gain, basis, scale, activation, reads=reads)
    )  # fmt: skip
    if down is not None and down.shape[0] == 0:
        if up_bias is None:
            raise ValueError("down and up have rank 0 and up_bias is None; expected a rank of at least 1, or up_bias")
        down = up = down_bias = basis = None
    if down is None:
        reads = "sum"
    scale_tensor, s = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
    rank = 0 if down is None else down.shape[0]
    differentiated = (residual, branch, down, up, down_bias, up_bias, gain, scale_tensor)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiated)
    inputs = (*differentiated, basis, s, activation, reads, wanted and rank > 0)
    if is_transformed():
        from .transforms import uncompiled

        return uncompiled(_transformed, *inputs)
    if not in_graph and is_wrapped(*differentiated, basis):
        return _defined(*inputs)
    if in_graph:
        if not wanted and branch is not None and down is not None and up is not None and scale_tensor is not None:
            if down_bias is None and up_bias is None and gain is None and basis is None:
                # The default is left out: each argument costs a conversion.
                read = () if reads == "sum" else (reads,)
                op = torch.ops.fused_steer.post_block_inference
                return op(residual, branch, down, up, scale_tensor, activation, *read)
        return torch.ops.fused_steer.post_block(*inputs)[0]
    return (_PostBlock.apply(*inputs) if wanted else _eager_forward(*inputs))[0]
