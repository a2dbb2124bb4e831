"""Tests of the choice of a backend. A request that cannot be met is an error."""

import ast
from pathlib import Path

import pytest
import torch
from fused_steer.kernels import select_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_backend_the_device_decides(monkeypatch):
    monkeypatch.delenv("FUSED_STEER_BACKEND")
    monkeypatch.setattr("fused_steer.kernels.backend.INTERPRETED", False)
    found = {name: select_backend(torch.device(name)) for name in ("cpu", "cuda", "xpu", "mps")}
    assert found == {"cpu": "torch", "cuda": "triton", "xpu": "triton", "mps": "torch"}
    monkeypatch.setattr("fused_steer.kernels.backend.INTERPRETED", True)
    assert select_backend(CPU) == "triton"


def test_backend_the_environment_overrides(monkeypatch):
    monkeypatch.setenv("FUSED_STEER_BACKEND", "torch")
    assert select_backend(CUDA) == "torch"


def test_backend_what_cannot_be_met_is_an_error(monkeypatch):
    monkeypatch.setenv("FUSED_STEER_BACKEND", "tensorrt")
    with pytest.raises(RuntimeError, match="FUSED_STEER_BACKEND is 'tensorrt'; expected one of triton, torch"):
        select_backend(CPU)
    monkeypatch.setenv("FUSED_STEER_BACKEND", "triton")
    monkeypatch.setattr("fused_steer.kernels.backend.INTERPRETED", False)
    with pytest.raises(RuntimeError, match="is 'triton' but the tensors are on cpu; expected a CUDA"):
        select_backend(CPU)


def test_backend_the_kernels_know_nothing_of_models():
    """No file of kernels/ imports transformers or fused_steer outside of kernels/."""
    import fused_steer.kernels

    for file in Path(fused_steer.kernels.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert not any(name.name.startswith(("transformers", "fused_steer")) for name in node.names), file
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1 and not (node.module or "").startswith(("transformers", "fused_steer")), file
