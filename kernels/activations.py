"""The activations φ of the adapter and their derivatives, as Triton device functions.

`apply` and `derivative` take fp32 blocks of pre-activations and the activation's name as a compile-time constant.
φ(0) = 0 for each, because the kernels pad the rank with zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: The activations that the op supports, in the order of the documentation.
ACTIVATIONS = ("identity", "silu", "gelu", "gelu_tanh", "relu", "tanh")

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_GELU_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _tanh(x):
    # Triton's core language has no tanh. Near zero 1 - exp(-2|x|) cancels, so a Taylor polynomial is used there. Its
    # first dropped term is 62/2835 x^8 < 6e-8 (relative) at the switch.
    m = tl.abs(x)
    e = tl.exp(-2.0 * m)
    far = tl.where(x < 0, e - 1.0, 1.0 - e) / (1.0 + e)
    x2 = x * x
    near = x * (1.0 + x2 * (-1.0 / 3.0 + x2 * (2.0 / 15.0 + x2 * (-17.0 / 315.0))))
    return tl.where(m < 0.2, near, far)


@triton.jit
def apply(a, ACTIVATION: tl.constexpr):
    """Return φ(a), elementwise, in fp32."""
    if ACTIVATION == "identity":
        return a
    elif ACTIVATION == "silu":
        return a * tl.sigmoid(a)
    elif ACTIVATION == "gelu":
        return 0.5 * a * (1.0 + tl.erf(a * _SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        return 0.5 * a * (1.0 + _tanh((a + a * a * a * _GELU_CUBIC) * _SQRT_2_OVER_PI))
    elif ACTIVATION == "relu":
        return tl.maximum(a, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        tl.static_assert(ACTIVATION == "tanh", "unknown activation")
        return _tanh(a)


@triton.jit
def derivative(a, ACTIVATION: tl.constexpr):
    """Return φ'(a), elementwise, in fp32. relu'(0) = 0, as in PyTorch."""
    if ACTIVATION == "identity":
        return tl.full(a.shape, 1.0, tl.float32)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(a)
        return s * (1.0 + a * (1.0 - s))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(a * _SQRT_HALF))
        return cdf + a * _INV_SQRT_2PI * tl.exp(-0.5 * a * a)
    elif ACTIVATION == "gelu_tanh":
        t = _tanh((a + a * a * a * _GELU_CUBIC) * _SQRT_2_OVER_PI)
        slope = (1.0 + a * a * (_GELU_CUBIC * 3.0)) * _SQRT_2_OVER_PI
        return 0.5 * (1.0 + t) + 0.5 * a * (1.0 - t * t) * slope
    elif ACTIVATION == "relu":
        return tl.where(a > 0, 1.0, 0.0)
    else:
        tl.static_assert(ACTIVATION == "tanh", "unknown activation")
        t = _tanh(a)
        return 1.0 - t * t
