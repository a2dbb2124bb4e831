"""What the paper says of weight updates and shifts of activations, as functions that give both sides of each statement.

The statements are our derivation of what the abstract of arXiv 2603.00425 and its authors' article of 2025-11-26
(sprocketlab.github.io/posts/2025/11/actvweight) say; the paper's own wording was not at hand. docs/theory.md tells them
in words and pictures.

The block is a decoder block without biases, causal attention and a gated MLP (GLU), each behind an RMSNorm:

    a = Attn(norm1(x))              o = x + a
    m = σ(g) ⊙ u, g = W_g n, u = W_u n, n = norm2(o)            y = W_d m            out = o + y

Everything is in the dtype of its inputs; float64 makes the two sides equal to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

#: The names of a block's weights: W_q, W_k, W_v, W_o (d, d); W_g, W_u (f, d); W_d (d, f); the norms' gains (d,).
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
NORMS = ("norm1", "norm2")
Weights = Mapping[str, Tensor]
_EPS = 1e-6


def random_block(hidden: int, inner: int, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Weights:
    """A block with random weights, of a size that keeps the stream's."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype) / math.sqrt(shape[-1])

    shapes = dict.fromkeys(MATRICES, (hidden, hidden)) | {
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }
    gains = {name: 1 + 0.1 * torch.randn(hidden, generator=generator, dtype=dtype) for name in NORMS}
    return {name: normal(*shape) for name, shape in shapes.items()} | gains


def block(weights: Weights, x: Tensor, heads: int, shifts: Mapping[str, Tensor] | None = None) -> Tensor:
    """The block's output. x: (T, d)

    Args:
        shifts: what is added at a site, (T, d) or (d,) each: "post_attention" to a, "pre_mlp" to n, "post_mlp" to y,
            "post_block" to the output.
    """
    shifts = shifts or {}
    a = _attention(weights, _norm(x, weights["norm1"]), heads).out + shifts.get("post_attention", 0)
    o = x + a
    n = _norm(o, weights["norm2"]) + shifts.get("pre_mlp", 0)
    y = (F.silu(n @ weights["gate"].T) * (n @ weights["up"].T)) @ weights["down"].T + shifts.get("post_mlp", 0)
    return o + y + shifts.get("post_block", 0)


# ------------------------------------------------------------------------------------- the theorem: first order


@dataclass(frozen=True)
class Shift:
    """What small changes of a block's weights do, to first order, as shifts of activations. All (T, d).

    attention: of a, the attention's output, by its own weights. carried: of y, because the MLP reads the shifted a.
    mlp: of y, by the MLP's own weights.
    """

    attention: Tensor
    carried: Tensor
    mlp: Tensor

    @property
    def post_mlp(self) -> Tensor:
        """The oracle of the MLP's output: in place of the updates, it leaves `attention` out of the block's."""
        return self.carried + self.mlp

    @property
    def post_block(self) -> Tensor:
        """The oracle of the block's output, which stands for the updates whole."""
        return self.attention + self.post_mlp


def equivalent_shift(weights: Weights, updates: Weights, x: Tensor, heads: int) -> Shift:
    """The shifts that stand for weight updates to first order, by hand: no derivative is taken by PyTorch.

    With h the input of a projection and Δ the updates:

        Δy by the MLP's weights   = ΔW_d m + W_d [(σ'(g) ⊙ u) ⊙ ΔW_g n + σ(g) ⊙ ΔW_u n]
        Δy by a shift Δn          = W_d [(σ'(g) ⊙ u) ⊙ W_g Δn + σ(g) ⊙ W_u Δn] = A(n) Δn
        Δa by the attention's     = ΔW_o z + W_o Δz,  Δz = ΔP v + P Δv,  ΔP = P ⊙ (ΔS − rowsum(P ⊙ ΔS))

    so a weight update is, to first order, the post-block shift Δa + A(n) N(o) Δa + Δy, N the norm's derivative.

    Args:
        updates: of some weights, by name; those of the norms are left out.
    """
    zero = {name: torch.zeros_like(weights[name]) for name in MATRICES}
    change = {**zero, **updates}
    read = _norm(x, weights["norm1"])
    attention = _attention(weights, read, heads)
    o = x + attention.out
    shift_a = _attention_shift(weights, change, read, attention)
    n = _norm(o, weights["norm2"])
    by_stream = mlp_shift(weights, n, _norm_shift(o, shift_a, weights["norm2"]))
    g, u = n @ weights["gate"].T, n @ weights["up"].T
    m = F.silu(g) * u
    inner = _silu_slope(g) * u * (n @ change["gate"].T) + F.silu(g) * (n @ change["up"].T)
    return Shift(shift_a, by_stream, m @ change["down"].T + inner @ weights["down"].T)


def weight_update(weights: Weights, updates: Weights, x: Tensor, heads: int) -> Tensor:
    """The other side: the derivative of the block's output along the updates, which PyTorch takes."""
    change = {name: updates.get(name, torch.zeros_like(value)) for name, value in weights.items()}
    return torch.func.jvp(lambda values: block(values, x, heads), (dict(weights),), (change,))[1]


def mlp_shift(weights: Weights, n: Tensor, shift: Tensor) -> Tensor:
    """A(n) Δn: what a shift of the MLP's input does to its output, to first order. (T, d)"""
    g, u = n @ weights["gate"].T, n @ weights["up"].T
    inner = _silu_slope(g) * u * (shift @ weights["gate"].T) + F.silu(g) * (shift @ weights["up"].T)
    return inner @ weights["down"].T


def beyond_the_mlp(weights: Weights, shift: Tensor) -> Tensor:
    """The part of a shift of the MLP's output that no shift of its input gives: what is outside of W_d's columns."""
    basis, values, _ = torch.linalg.svd(weights["down"], full_matrices=False)
    basis = basis[:, values > values[0] * 1e-12]
    return shift - shift @ basis @ basis.T


@dataclass(frozen=True)
class _Attention:
    """out, z: (T, d); q, k, v and rows, the probabilities: (heads, T, d / heads or T)."""

    out: Tensor
    z: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    rows: Tensor


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(0, 1)


def _join(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1)


def _attention(weights: Weights, read: Tensor, heads: int) -> _Attention:
    q, k, v = (_split(read @ weights[name].T, heads) for name in "qkv")
    future = torch.ones(len(read), len(read), dtype=torch.bool, device=read.device).triu(1)
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(future, -torch.inf)
    rows = scores.softmax(-1)
    z = _join(rows @ v)
    return _Attention(z @ weights["o"].T, z, q, k, v, rows)


def _attention_shift(weights: Weights, change: Weights, read: Tensor, at: _Attention) -> Tensor:
    heads = len(at.q)
    q, k, v = (_split(read @ change[name].T, heads) for name in "qkv")
    scores = (q @ at.k.mT + at.q @ k.mT) / math.sqrt(q.shape[-1])
    rows = at.rows * (scores - (at.rows * scores).sum(-1, keepdim=True))
    z = _join(rows @ at.v + at.rows @ v)
    return at.z @ change["o"].T + z @ weights["o"].T


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    return gain * x * (x.square().mean(-1, keepdim=True) + _EPS).rsqrt()


def _norm_shift(x: Tensor, shift: Tensor, gain: Tensor) -> Tensor:
    inverse = (x.square().mean(-1, keepdim=True) + _EPS).rsqrt()
    return gain * inverse * (shift - x * inverse.square() * (x * shift).mean(-1, keepdim=True))


def _silu_slope(g: Tensor) -> Tensor:
    return torch.sigmoid(g) * (1 + g * (1 - torch.sigmoid(g)))


# ------------------------------------------------------------------------------------- the propositions: sites


def as_post_block(down: Tensor, up: Tensor, skip: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """The post-block adapter (W1, W2) that does what an adapter of the MLP's output does, where that is possible.

    Where o always lies in the span of `skip`, y in that of `branch`, and the two meet in 0 alone, a projector P onto
    the second along the first has P (o + y) = y. So W2 W1 P (o + y) = W2 W1 y, and W1 P has W1's rank at most.

    Args:
        down, up: W1 (r, d) and W2 (d, r) of the adapter that reads y.
        skip, branch: bases, (d, s) and (d, k).

    Raises:
        ValueError: the two spans meet in more than 0.
    """
    both = torch.cat([skip, branch], 1)
    values = torch.linalg.svdvals(both)
    if both.shape[1] > both.shape[0] or values[-1] <= values[0] * 1e-12:
        raise ValueError(
            f"the spans of skip ({skip.shape[1]}) and branch ({branch.shape[1]}) in {both.shape[0]} dimensions meet; "
            "expected them to have 0 alone in common"
        )
    projector = branch @ torch.linalg.pinv(both)[skip.shape[1] :]
    return down @ projector, up


def interference(shift: Tensor, lora: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
    """How much of steering's shift the LoRA writes too: (what of it lies in the LoRA's columns, δ · ℓ of each token).

    With W2' = (I − V Vᵀ) W2, V a basis of the LoRA's columns B, both are 0 for every token. The joint shift then falls
    into two parts that neither side can change for the other: V Vᵀ (δ + ℓ) = ℓ and (I − V Vᵀ)(δ + ℓ) = δ; and
    ‖δ + ℓ‖² = ‖δ‖² + ‖ℓ‖².

    Args:
        shift, lora: δ and ℓ, (T, d).
        written: B, (d, k).
    """
    basis, values, _ = torch.linalg.svd(written, full_matrices=False)
    basis = basis[:, values > values[0] * 1e-12]
    return shift @ basis @ basis.T, (shift * lora).sum(1)
