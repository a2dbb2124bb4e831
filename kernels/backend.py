"""Choose the backend by device, or by the environment variable FUSED_STEER_BACKEND."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
from torch import Tensor

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


def check_backend(backend: str, *operands: Any) -> None:
    if backend == "triton" and any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in operands):
        raise TypeError("the triton backend got a float64 tensor; expected float32, bfloat16 or float16")


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Disable autocast inside the op, because its arithmetic is fp32 by definition."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
