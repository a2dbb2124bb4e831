"""Runs the kernels' host code without a GPU: Triton's whole launch path over a driver library that does nothing.

    driver.py     the driver, activated by `arm`; it counts and records launches
    libcuda.c     the library below it
    pretence.py   a CUDA that PyTorch pretends to have, for rehearsals
    __main__.py   `python -m bench.stub FILE` or `-m MODULE`: runs a program with the driver active

It serves to measure host time, which equals that on a GPU except for the driver's own share, and to rehearse GPU runs.
No kernel runs.
"""

from .driver import Launched, Stub, active, arm

__all__ = ["Launched", "Stub", "active", "arm"]
