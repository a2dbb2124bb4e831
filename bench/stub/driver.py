"""A CUDA device that does nothing: Triton compiles and launches for real; CPU tensors stand in for GPU tensors.

Triton's JIT, its binder, ptxas and the launcher in C are real. The driver library below them is a stub, built from
libcuda.c at first use. So a launch costs the host the same time as on a GPU, minus the driver's own time. No kernel
runs: outputs are uninitialised memory.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("libcuda.c")
SHARED_MEMORY = {"sm_80": 166912, "sm_90": 232448}  # the most bytes of a block
KEPT = 4096  # the most launches that the library records, as in libcuda.c


class _Kept(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char * 96),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_ulonglong),
        ("first", ctypes.c_ulonglong),
    ]


@dataclass(frozen=True)
class Launched:
    """One launch as the driver received it.

    Attributes:
        name: the kernel's name.
        block: threads per block.
        shared: bytes of dynamic shared memory.
        first: the first argument, an address.
    """

    name: str
    grid: tuple[int, int, int]
    block: int
    shared: int
    stream: int
    first: int


class Stub:
    """The active stub driver of this process; see `arm`."""

    def __init__(self, library: ctypes.CDLL, device: str) -> None:
        self._library, self.device = library, device
        library.stub_launches.restype = ctypes.c_ulonglong
        library.stub_launch.restype = ctypes.POINTER(_Kept)
        library.stub_launch.argtypes = [ctypes.c_ulonglong]

    @property
    def launches(self) -> int:
        """The number of kernels launched since the process began."""
        return self._library.stub_launches()

    def last(self, number: int = 1) -> list[Launched]:
        """Return the last `number` launches, oldest first."""
        end = self.launches
        if not 0 <= number <= min(end, KEPT):
            raise ValueError(f"number is {number}; expected 0 to {min(end, KEPT)}, the number of recorded launches")
        found = []
        for place in range(end - number, end):
            kept = self._library.stub_launch(place).contents
            found.append(
                Launched(kept.name.decode(), tuple(kept.grid), kept.block, kept.shared, kept.stream, kept.first)
            )
        return found

    @contextmanager
    def launched(self) -> Iterator[list[Launched]]:
        """Yield a list that, after the `with` block, holds the launches made inside it."""
        found: list[Launched] = []
        begin = self.launches
        yield found
        found.extend(self.last(self.launches - begin))


def _folder() -> Path:
    """Return this user's folder for the library and Triton's cache. Its name depends on the sources and on triton."""
    from triton import __version__

    digest = hashlib.sha256(SOURCE.read_bytes() + __version__.encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"fused-steer-stub-{os.getuid()}-{digest}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user; expected it to be this user's (set TMPDIR)")
    return folder


def _build(folder: Path) -> Path:
    """Return `folder`/libcuda.so.1; compile it if it is missing."""
    library = folder / "libcuda.so.1"
    if library.exists():
        return library
    gcc = shutil.which("gcc")
    if gcc is None:
        raise RuntimeError("there is no gcc; the stub driver is compiled by it (apt install gcc)")
    triton = importlib.util.find_spec("triton")
    assert triton is not None and triton.origin is not None
    include = Path(triton.origin).parent / "backends" / "nvidia" / "include"
    partial = folder / f"libcuda.{os.getpid()}.so"
    command = [gcc, "-shared", "-fPIC", "-O2", "-Wl,-soname,libcuda.so.1", "-I", include, "-o", partial, SOURCE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"gcc cannot compile {SOURCE.name}: {' '.join(done.stderr.split())[:300]}")
    os.replace(partial, library)
    return library


def _replace(module: str, name: str, value: Any) -> Any:
    """Set a name in a module of fused_steer.kernels; return the earlier value."""
    of = importlib.import_module(f"fused_steer.kernels.{module}")
    if not hasattr(of, name):
        raise RuntimeError(f"fused_steer.kernels.{module} has no {name}; bench/stub/driver.py must be adapted")
    before = getattr(of, name)
    setattr(of, name, value)
    return before


_active: Stub | None = None


@functools.cache
def arm(device: str = "sm_90") -> Stub:
    """Make Triton compile and launch for a device that does nothing, and make `fused_steer` launch on CPU tensors.

    This lasts for the rest of the process, which should do nothing else. Call it before Triton's first use.

    Args:
        device: sm_80 (A100) or sm_90 (H100). Sets the multiprocessors, cache and shared memory.

    Raises:
        ValueError: `device` is another one.
        RuntimeError: the system is not Linux on x86-64, gcc is missing, or kernels are interpreted in this process.
    """
    if device not in SHARED_MEMORY:
        raise ValueError(f"device is {device!r}; expected one of {', '.join(SHARED_MEMORY)}")
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise RuntimeError(f"this is {sys.platform} on {platform.machine()}; the stub driver needs Linux on x86-64")
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise RuntimeError("TRITON_INTERPRET is set; expected a process without it: `python -m bench.stub FILE`")
    folder = _folder()
    os.environ["TRITON_LIBCUDA_PATH"] = str(_build(folder).parent)
    # A separate cache, because Triton's driver module is linked against the library that it finds when it is compiled.
    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
    # The first library loaded under this name serves the whole process.
    library = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)

    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia

    capability = int(device.removeprefix("sm_"))

    class Driver(nvidia.CudaDriver):
        def __init__(self) -> None:
            self.utils = nvidia.CudaUtils()
            self.launcher_cls = nvidia.CudaLauncher
            self.get_device_capability = lambda device=None: divmod(capability, 10)
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device=None: 0
            self.set_current_device = lambda device: None

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        @staticmethod
        def is_active() -> bool:
            return True

    from fused_steer.kernels.schedule import TARGETS, describe_device

    described = TARGETS[device]
    library.stub_describe(described.multiprocessors, SHARED_MEMORY[device])
    triton.runtime.driver.set_active(Driver())
    # PyTorch built without CUDA lacks these. The substitutes cost as much host time as the originals, minus a C call.
    for name, answer in (("_cuda_getDevice", lambda: 0), ("_cuda_getCurrentRawStream", lambda index: 0)):
        if not hasattr(torch._C, name):
            setattr(torch._C, name, answer)
    _replace("backend", "_TRITON_DEVICES", ("cuda", "xpu", "cpu"))
    _replace("schedule", "_INTERPRETED_DEVICE", described)
    describe_device.cache_clear()
    global _active
    _active = Stub(library, device)
    return _active


def active() -> Stub | None:
    """Return this process's stub driver, or None if it is not active."""
    return _active
