"""Selects the hardware and the backend of the tests; defines fixtures for all of them.

With a GPU the tests run on it. Without one, kernels run in Triton's interpreter and models on the torch backend. This
is decided before the package is imported, because Triton decides at import whether kernels are interpreted.
"""

import gc
import importlib
import importlib.util
import os
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

# The tests' matrices are small: a second thread costs more time than it saves, especially on a busy machine.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test needs the hub. huggingface_hub reads this once, when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from hardware import HAS_GPU, alone  # noqa: E402

if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("FUSED_STEER_BACKEND", "torch")

    from interpreting import hasten_the_interpreter

    hasten_the_interpreter()


HAS_VLLM = importlib.util.find_spec("vllm") is not None
if HAS_VLLM:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; the default is a large part of the memory


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-in", type=int, default=1, metavar="N", help="run a sample, one test in N")
    parser.addoption("--every-engine", action="store_true", help="start all of vLLM's engines, not a sample")
    parser.addoption("--every-kernel", action="store_true", help="compile all configurations in test_aot.py")
    parser.addoption("--every-line", action="store_true", help="raise at every line in test_faults.py, not at a sample")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    number = config.getoption("--one-in")
    if number > 1:  # by the test's name, so that each process and each version runs the same ones
        kept = [item for item in items if zlib.crc32(item.nodeid.encode()) % number == 0]
        config.hook.pytest_deselected(items=list(set(items) - set(kept)))
        items[:] = kept
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU; other tests interpret and compile the kernels"))
        if item.get_closest_marker("vllm") and not HAS_VLLM:
            item.add_marker(pytest.mark.skip(reason="needs vLLM, in a separate environment: see docs/serving.md"))
        if item.get_closest_marker("every_engine") and not config.getoption("--every-engine"):
            item.add_marker(pytest.mark.skip(reason="a sample of the engines is started without --every-engine"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed PyTorch before a test and its fixtures: its numbers do not depend on the tests before it in the process."""
    torch.manual_seed(0)


@pytest.fixture(
    params=[
        pytest.param("torch", id="torch"),
        pytest.param("interpreter", id="interpreter"),
        pytest.param("gpu", id="gpu", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Select each backend of the op in turn; return the device to run it on."""
    if request.param == "interpreter" and HAS_GPU:
        pytest.skip("kernels are compiled here, not interpreted")
    monkeypatch.setenv("FUSED_STEER_BACKEND", "torch" if request.param == "torch" else "triton")
    return torch.device("cuda" if request.param == "gpu" else "cpu")


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fill `torch.empty` with NaN in every test that runs kernels, so that an element that no kernel writes shows."""
    runs_kernels = "device" in request.fixturenames
    if runs_kernels:
        torch.use_deterministic_algorithms(True)
        assert torch.empty(3).isnan().all()
    yield
    if runs_kernels:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def rows_in_registers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a program that holds whole rows hold eight in the interpreter, where each program takes tens of milliseconds.

    Up to five rows it has one, as on a GPU. With `@pytest.mark.rows(n)` it has n.
    """
    if HAS_GPU or "device" not in request.fixturenames:
        return
    from fused_steer.kernels import triton_backend
    from fused_steer.kernels.schedule import _INTERPRETED_DEVICE, ceil_div, resident_schedule

    marker = request.node.get_closest_marker("rows")

    def with_rows(tokens: int, *rest: Any):
        layout = resident_schedule(tokens, *rest)
        if layout is None or layout.direct or _INTERPRETED_DEVICE not in rest:
            return layout
        rows = marker.args[0] if marker is not None else 1 if tokens <= 5 else 8
        return replace(layout, block_n=rows, programs=ceil_div(tokens, rows))

    monkeypatch.setattr(triton_backend, "resident_schedule", with_rows)


LITTLE = 256 << 20  # bytes that a test process may keep in PyTorch's cache between tests


@pytest.fixture(autouse=True)
def little_cache() -> Iterator[None]:
    """Give the GPU's memory back after a test that took much, because several test processes share the GPU."""
    yield
    if HAS_GPU and torch.cuda.is_initialized() and torch.cuda.memory_reserved() > LITTLE:
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def whole_gpu() -> Iterator[None]:
    """Let only one test at a time take gigabytes of the GPU, and free them at its end."""
    if not HAS_GPU:
        yield
        return
    with alone(Path(tempfile.gettempdir()) / f"fused-steer-gpu-{os.getuid()}.lock"):
        gc.collect()
        torch.cuda.empty_cache()
        yield
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def matrix() -> ModuleType:
    """`bench.matrix`, which is not installed with the package."""
    root = str(Path(__file__).resolve().parents[1])
    sys.path.append(root)
    try:
        return importlib.import_module("bench.matrix")
    finally:
        sys.path.remove(root)
