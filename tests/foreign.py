"""Helpers for the tests of the importers, which read adapters of other codes."""

import os
from pathlib import Path
from typing import Any

import pytest
from models import LAYERS
from torch import Tensor, nn

RANK, SCALE = 4, 0.7
LLAMA = {"num_layers": LAYERS, "layers_path": "model.layers"}
LAYOUT = ("--num-layers", LAYERS, "--layers-path", "model.layers")
PHI = {
    "identity": nn.Identity(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "relu": nn.ReLU(),
    "tanh": nn.Tanh(),
}


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


class Hostile:
    """A malicious object: unpickling it would make a directory."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.made),)


def shown(result: Any) -> dict[str, str]:
    """Return the rows of the table that the command printed: label -> value."""
    assert result.exit_code == 0, result.output
    rows = (line.strip(" │|").split("│") for line in result.stdout.splitlines() if "│" in line)
    return {cells[0].strip(): cells[1].strip() for cells in rows}


def write_gguf(tensors: dict[str, Any], file: Path, architecture: str = "controlvector") -> None:
    """As repeng's export_gguf does."""
    gguf = pytest.importorskip("gguf", reason="needs `pip install gguf`")
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_string(f"{architecture}.model_hint", "llama")
    writer.add_uint32(f"{architecture}.layer_count", len(tensors))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy() if isinstance(tensor, Tensor) else tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
