"""Choose the backend by device, or by the environment variable FUSED_STEER_BACKEND."""

from __future__ import annotations

import os

import torch

from .numerics import INTERPRETED

ENVIRONMENT_VARIABLE = "FUSED_STEER_BACKEND"
BACKENDS = ("triton", "torch")
_TRITON_DEVICES = ("cuda", "xpu")  # PyTorch calls ROCm devices "cuda" too


def select_backend(device: torch.device) -> str:
    """Return the backend for tensors on `device`: "triton" or "torch". On the meta device either may be returned.

    Raises:
        RuntimeError: FUSED_STEER_BACKEND names an unknown backend, or one that cannot run on `device`.
    """
    can_triton = device.type in _TRITON_DEVICES or (INTERPRETED and device.type == "cpu")
    asked = os.environ.get(ENVIRONMENT_VARIABLE)
    if not asked:
        return "triton" if can_triton else "torch"
    if asked not in BACKENDS:
        raise RuntimeError(f"{ENVIRONMENT_VARIABLE} is {asked!r}; expected one of {', '.join(BACKENDS)}")
    if asked == "triton" and not can_triton and device.type != "meta":
        raise RuntimeError(
            f"{ENVIRONMENT_VARIABLE} is 'triton' but the tensors are on {device}; expected a CUDA, ROCm or XPU device, "
            "or a CPU with TRITON_INTERPRET=1 set before import"
        )
    return asked
