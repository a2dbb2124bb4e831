"""Detects the hardware that the tests run on, and shares it among test processes."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

#: Whether there is a GPU that Triton can drive.
HAS_GPU = torch.cuda.is_available() or torch.xpu.is_available()


@contextlib.contextmanager
def alone(file: Path) -> Iterator[None]:
    """Hold a lock among all processes that name this file. The system frees it when the process ends."""
    import fcntl  # not on Windows

    with open(file, "w") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
