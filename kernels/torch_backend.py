"""The `torch` backend of `post_block`: the op in plain PyTorch, for any device and dtype.

It has the maths, the hand-written backward and the saved tensors of the Triton kernels. Arithmetic is float64 for
float64 inputs, else float32. It is tested like the kernels, against the definition in `tests/ops.py`.

PyTorch can differentiate `backward` again, and `definition` forwards. No kernel computes these derivatives, so on every
backend they are computed here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import Gradients, Needs, Operands

_aten = torch.ops.aten


#: name -> (φ, (∂L/∂φ(a), a) -> ∂L/∂a), for tensors of any floating dtype.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "identity": (lambda a: a, lambda dz, a: dz),
    "silu": (F.silu, _aten.silu_backward),
    "gelu": (F.gelu, _aten.gelu_backward),
    "gelu_tanh": (partial(F.gelu, approximate="tanh"), partial(_aten.gelu_backward, approximate="tanh")),
    "relu": (F.relu, lambda dz, a: _aten.threshold_backward(dz, a, 0)),
    "tanh": (torch.tanh, lambda dz, a: _aten.tanh_backward(dz, torch.tanh(a))),
}


def _silu_backward(dz: Tensor, a: Tensor) -> Tensor:
    gate = torch.sigmoid(a)
    return dz * gate * (1 + a * (1 - gate))


#: In place of derivatives that PyTorch does not differentiate again.
_DIFFERENTIABLE = {"silu": _silu_backward}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of all arithmetic for a hidden state of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _strength(scale: float | Tensor, gain: Tensor | None, acc: torch.dtype) -> float | Tensor:
    """Return the strength times gain, s · g, as a float, a 0-dim tensor, or (N, 1)."""
    if isinstance(scale, Tensor):
        scale = scale.to(acc)
    return scale if gain is None else scale * gain.reshape(-1, 1).to(acc)


def _scaled(values: Tensor, strength: float | Tensor) -> Tensor:
    """Return strength · values, with 0 · anything = 0: a token of zero gain is unchanged if its adapter overflows.

    If the strength is 1, it returns the values themselves, not a copy.
    """
    if isinstance(strength, float):
        if strength == 1.0:
            return values
        return values * strength if strength else torch.zeros_like(values)
    return torch.where(strength == 0, values.new_zeros(()), values * strength)


def _differentiably_scaled(values: Tensor, strength: float | Tensor) -> Tensor:
    """Return `_scaled` with its derivatives by the strength, which a strength of 0 has too. A 0 may be −0."""
    if isinstance(strength, float):
        return _scaled(values, strength)
    return torch.where((strength == 0) & ~values.isfinite(), values.new_zeros(()), values) * strength


def _unless_zero(weights: Tensor, strength: float | Tensor) -> Tensor:
    """Return the weights, or zeros if every token's strength is 0. Zero times infinity would be NaN."""
    if isinstance(strength, float):
        return weights if strength else torch.zeros_like(weights)
    return torch.where((strength != 0).any(), weights, weights.new_zeros(()))


def _finite(weights: Tensor, strength: float | Tensor) -> Tensor:
    """Return the weights with 0 for values that are not finite.

    They are multiplied by factors that are 0 where the strength is 0. Where a factor is not 0, the output is not finite
    already, so nothing is hidden.
    """
    if isinstance(strength, float):
        return weights if strength else torch.zeros_like(weights)
    return torch.nan_to_num(weights, 0.0, 0.0, 0.0)


def forward(residual: Tensor, branch: Tensor | None, operands: Operands, keep_a: bool) -> tuple[Tensor, Tensor | None]:
    """Compute the forward pass of `post_block`. Return `out` and `a` (N, r), which is None unless kept."""
    down, up, down_bias, up_bias, gain, _, scale, activation, _, reads = operands
    dtype = residual.dtype if branch is None else torch.promote_types(residual.dtype, branch.dtype)
    acc = accumulation_dtype(dtype)
    hidden = residual.shape[-1]
    strength = _strength(scale, gain, acc)

    x = residual.to(acc) if branch is None else residual.to(acc) + branch.to(acc)
    x = x.contiguous()
    # Without branch, cast or copy x is the caller's tensor, so `out` needs its own memory. No result is a view, because
    # autograd refuses in-place changes of views.
    own = branch is not None or residual.dtype != acc or not residual.is_contiguous()
    out = x if own else torch.empty_like(x, memory_format=torch.contiguous_format)
    x, rows = x.view(-1, hidden), out.view(-1, hidden)  # rows: a view of `out`
    a = None
    # −δ is one matrix product. It is subtracted, because x − (+0) is x bit for bit even if x is −0. The column of ones
    # times zeros turns a −0 product into +0. `factors`: (N, r + 2). `weights`: (d, r + 2).
    factors, weights = [x.new_ones(x.shape[0], 1)], [x.new_zeros(hidden, 1)]
    if down is not None and up is not None:
        read = branch.to(acc).reshape(-1, hidden) if reads == "branch" and branch is not None else x
        a = torch.mm(read, down.to(acc).t())
        if down_bias is not None:
            a += down_bias.to(acc)
        factors.append(-_scaled(ACTIVATIONS[activation][0](a), strength))
        weights.append(_unless_zero(up.to(acc), strength) if gain is None else up.to(acc))
    if up_bias is not None:
        factors.append(-_scaled(factors[0], strength))
        b2 = up_bias.to(acc).unsqueeze(1)
        weights.append(_unless_zero(b2, strength) if gain is None else b2)
    left, right = torch.cat(factors, 1), torch.cat(weights, 1).t()
    minus_delta = torch.mm(left, right) if own else torch.mm(left, right, out=rows)
    if gain is not None and isinstance(strength, Tensor):
        minus_delta.masked_fill_(strength == 0, 0.0)  # even if the adapter overflowed
    torch.sub(x, minus_delta, out=rows)
    return out.to(dtype), a if keep_a else None


def definition(residual: Tensor, branch: Tensor | None, operands: Operands) -> tuple[Tensor, Tensor | None]:
    """Compute `post_block` without a basis, by operations that PyTorch differentiates in every mode and order.

    Returns:
        `out` (..., d), and `a` (..., r), which is None for a steering vector.
    """
    down, up, down_bias, up_bias, gain, _, scale, activation, _, reads = operands
    dtype = residual.dtype if branch is None else torch.promote_types(residual.dtype, branch.dtype)
    acc = accumulation_dtype(dtype)
    strength = scale.to(acc) if isinstance(scale, Tensor) else scale
    if gain is not None:
        strength = strength * gain.unsqueeze(-1).to(acc)
    x = residual.to(acc) if branch is None else residual.to(acc) + branch.to(acc)
    shift, a = x.new_zeros(()), None
    if down is not None and up is not None:
        read = branch.to(acc) if reads == "branch" and branch is not None else x
        a = F.linear(read, down.to(acc), None if down_bias is None else down_bias.to(acc))
        shift = F.linear(ACTIVATIONS[activation][0](a), up.to(acc))
    if up_bias is not None:
        shift = shift + up_bias.to(acc)
    # 0 − δ is +0 where δ is ±0, and x − (+0) is x bit for bit.
    return (x - (0 - _differentiably_scaled(shift, strength))).to(dtype), a


def backward(
    grad: Tensor,
    kept: Tensor | None,
    a: Tensor | None,
    operands: Operands,
    needs: Needs,
    grad_a: Tensor | None = None,
    again: bool = False,
) -> Gradients:
    """Compute the backward pass of `post_block` by hand. The gradient of `up` is that of the projected W2'.

    Args:
        kept: `out`, or branch if W1 is applied to branch. dW1 = daᵀx is computed from it. In `out` the share of s·g·u
            is subtracted in r × r products, without recomputing x.
        grad_a: (N, r), a gradient of `a` that does not come by `out`. A second derivative has one.
        again: use only operations that PyTorch can differentiate again.
    """
    down, up, _, up_bias, gain, _, scale, activation, _, reads = operands
    acc = accumulation_dtype(grad.dtype)
    hidden = grad.shape[-1]
    strength = _strength(scale, gain, acc)
    scaled = _differentiably_scaled if again else _scaled
    g = grad.to(acc).reshape(-1, hidden)
    result = Gradients()
    row_dot: Tensor | None = None  # Σ_d G·u, (N,)

    if down is not None and up is not None and a is not None:
        phi, phi_backward = ACTIVATIONS[activation]
        if again:
            phi_backward = _DIFFERENTIABLE.get(activation, phi_backward)
        up = up.to(acc)
        phi_a = phi(a)
        if needs.up:
            # an r x d product, because BLAS is several times slower for d x r
            result.up = torch.mm(scaled(phi_a, strength).t(), g).t().contiguous()
        if needs.x or needs.down or needs.down_bias or needs.row_dot:
            gz = torch.mm(g, up.t().contiguous().t())  # faster in BLAS, and up is small
            if needs.row_dot:
                row_dot = (phi_a * gz).sum(1)
            if needs.x or needs.down or needs.down_bias:
                da = scaled(phi_backward(gz, a), strength)
                if grad_a is not None:
                    da = da + grad_a
                if needs.x:
                    w1 = _finite(down.to(acc), strength)
                    result.x = torch.addmm(g, da, w1).to(grad.dtype).view(grad.shape)
                if needs.down:
                    assert kept is not None
                    result.down = torch.mm(da.t(), kept.to(acc).reshape(-1, hidden))
                    if reads == "sum":
                        w2 = _finite(up, strength)
                        # Out of place, which vmap requires.
                        result.down = result.down - torch.mm(torch.mm(da.t(), scaled(phi_a, strength)), w2.t())
                        if up_bias is not None:
                            ones = torch.ones(da.shape[0], 1, dtype=acc, device=da.device)  # vmap: not `new_ones`
                            moved = torch.mm(da.t(), scaled(ones, strength))
                            result.down = result.down - moved * _finite(up_bias.to(acc), strength)
                if needs.down_bias:
                    result.down_bias = da.sum(0)
    elif needs.x:
        result.x = grad

    if up_bias is not None:
        if needs.up_bias:
            ones = scaled(torch.ones(g.shape[0], 1, dtype=acc, device=g.device), strength)
            result.up_bias = torch.mm(g.t(), ones).view(hidden)
        if needs.row_dot:
            along_bias = torch.mv(g, up_bias.to(acc))
            row_dot = along_bias if row_dot is None else row_dot + along_bias
    result.row_dot = row_dot
    return result
