"""The kernels' host side without a GPU: Triton's whole launch path over a driver library that does nothing.

    driver.py     the driver, made active by `arm`; what was launched is counted and kept
    libcuda.c     the library below it
    pretence.py   a CUDA that PyTorch pretends to have, for rehearsals
    __main__.py   `python -m bench.stub FILE` or `-m MODULE`: a program in a process of its own, with the driver active

For host time, which it leaves as it is on a card but for the driver's own share, and for rehearsals. No kernel runs.
"""

from .driver import Launched, Stub, active, arm

__all__ = ["Launched", "Stub", "active", "arm"]
