"""The `torch` backend of `post_block`: the op in plain PyTorch, as fast and as thrifty as that can be.

Same maths, same hand-written backward and same saved tensors as the Triton kernels; runs on any device and dtype,
float64 included (all arithmetic is then float64, else float32). It is tested like the kernels, against the definition
in `tests/support/ops.py`, the oracle of every test.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import Gradients, Needs, Operands

_aten = torch.ops.aten

#: name -> (φ, (∂L/∂φ(a), a) -> ∂L/∂a), on tensors of any floating dtype.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "identity": (lambda a: a, lambda dz, a: dz),
    "silu": (F.silu, _aten.silu_backward),
    "gelu": (F.gelu, _aten.gelu_backward),
    "gelu_tanh": (partial(F.gelu, approximate="tanh"), partial(_aten.gelu_backward, approximate="tanh")),
    "relu": (F.relu, lambda dz, a: _aten.threshold_backward(dz, a, 0)),
    "tanh": (torch.tanh, lambda dz, a: _aten.tanh_backward(dz, torch.tanh(a))),
}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all arithmetic for a hidden state of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _strength(scale: float | Tensor, gain: Tensor | None, acc: torch.dtype) -> float | Tensor:
    """s · g: a float, a 0-dim tensor, or (N, 1)."""
    if isinstance(scale, Tensor):
        scale = scale.to(acc)
    return scale if gain is None else scale * gain.reshape(-1, 1).to(acc)


def _scaled(values: Tensor, strength: float | Tensor) -> Tensor:
    """strength · values, with 0 · anything = 0: a token of zero gain stays as it is though its adapter overflow.

    The values themselves, not a copy, where the strength is 1."""
    if isinstance(strength, float):
        if strength == 1.0:
            return values
        return values * strength if strength else torch.zeros_like(values)
    return torch.where(strength == 0, values.new_zeros(()), values * strength)


def _unless_zero(weights: Tensor, strength: float | Tensor) -> Tensor:
    """The weights, or zeros where the strength of every token is 0: a product of zeros with an infinity is NaN."""
    if isinstance(strength, float):
        return weights if strength else torch.zeros_like(weights)
    return torch.where((strength != 0).any(), weights, weights.new_zeros(()))


def _finite(weights: Tensor, strength: float | Tensor) -> Tensor:
    """The weights for a product with factors that are 0 where the strength is: 0 for those that are not finite. Where
    the factor is not 0, the output has shown them already."""
    if isinstance(strength, float):
        return weights if strength else torch.zeros_like(weights)
    return torch.nan_to_num(weights, 0.0, 0.0, 0.0)


def forward(residual: Tensor, branch: Tensor | None, operands: Operands, keep_a: bool) -> tuple[Tensor, Tensor | None]:
    """The forward pass of `post_block`. Returns `out` and `a` (N, r), None unless kept."""
    down, up, down_bias, up_bias, gain, _, scale, activation, _, reads = operands
    dtype = residual.dtype if branch is None else torch.promote_types(residual.dtype, branch.dtype)
    acc = accumulation_dtype(dtype)
    hidden = residual.shape[-1]
    strength = _strength(scale, gain, acc)

    x = residual.to(acc) if branch is None else residual.to(acc) + branch.to(acc)
    x = x.contiguous()
    # Without branch, cast and copy x is the caller's tensor, and `out` one of its own. No result is a view: autograd
    # refuses to have one changed in place.
    own = branch is not None or residual.dtype != acc or not residual.is_contiguous()
    out = x if own else torch.empty_like(x, memory_format=torch.contiguous_format)
    x, rows = x.view(-1, hidden), out.view(-1, hidden)  # rows: of `out`
    a = None
    # −δ as one matrix product. It is subtracted, because x − (+0) is x bit for bit even where x is −0; the column of
    # ones against zeros makes a zero of it a +0. `factors` (N, r + 2), `weights` (d, r + 2).
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
        minus_delta.masked_fill_(strength == 0, 0.0)  # whatever the adapter overflowed to
    torch.sub(x, minus_delta, out=rows)
    return out.to(dtype), a if keep_a else None


def backward(grad: Tensor, kept: Tensor | None, a: Tensor | None, operands: Operands, needs: Needs) -> Gradients:
    """The backward pass of `post_block`, by hand. The gradient of `up` is that of W2', the projected one.

    kept: `out`, or branch where W1 is applied to that. Instead of recomputing x = out − s·g·u over N × d, its share of
    dW1 = daᵀx is taken off in r × r products.
    """
    down, up, _, up_bias, gain, _, scale, activation, _, reads = operands
    acc = accumulation_dtype(grad.dtype)
    hidden = grad.shape[-1]
    strength = _strength(scale, gain, acc)
    g = grad.to(acc).reshape(-1, hidden)
    result = Gradients()
    row_dot: Tensor | None = None  # Σ_d G·u, (N,)

    if down is not None and up is not None and a is not None:
        phi, phi_backward = ACTIVATIONS[activation]
        up = up.to(acc)
        phi_a = phi(a)
        if needs.up:
            # As an r x d product: BLAS is several times slower at the d x r one.
            result.up = torch.mm(_scaled(phi_a, strength).t(), g).t().contiguous()
        if needs.x or needs.down or needs.down_bias or needs.row_dot:
            gz = torch.mm(g, up.t().contiguous().t())  # BLAS is quicker so, and up is small
            if needs.row_dot:
                row_dot = (phi_a * gz).sum(1)
            if needs.x or needs.down or needs.down_bias:
                da = _scaled(phi_backward(gz, a), strength)
                if needs.x:
                    w1 = _finite(down.to(acc), strength)
                    result.x = torch.addmm(g, da, w1).to(grad.dtype).view(grad.shape)
                if needs.down:
                    assert kept is not None
                    result.down = torch.mm(da.t(), kept.to(acc).reshape(-1, hidden))
                    if reads == "sum":
                        w2 = _finite(up, strength)
                        result.down -= torch.mm(torch.mm(da.t(), _scaled(phi_a, strength)), w2.t())
                        if up_bias is not None:
                            moved = torch.mm(da.t(), _scaled(da.new_ones(da.shape[0], 1), strength))
                            result.down -= moved * _finite(up_bias.to(acc), strength)
                if needs.down_bias:
                    result.down_bias = da.sum(0)
    elif needs.x:
        result.x = grad

    if up_bias is not None:
        if needs.up_bias:
            ones = _scaled(g.new_ones(g.shape[0], 1), strength)
            result.up_bias = torch.mm(g.t(), ones).view(hidden)
        if needs.row_dot:
            along_bias = torch.mv(g, up_bias.to(acc))
            row_dot = along_bias if row_dot is None else row_dot + along_bias
    result.row_dot = row_dot
    return result
