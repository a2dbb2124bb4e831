"""Helpers for the tests of the importers, which read adapters of other codes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import HIDDEN, LAYERS, build
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


Shift = Callable[[Tensor], Tensor]


def hooked(shifts: dict[int, Shift], family: str = "llama") -> nn.Module:
    """Build a model with hooks that return h + shift(h) at these layers."""
    model = build(family)
    decoder = model.get_submodule("transformer.h" if family == "gpt2" else "model.layers")
    for i, shift in shifts.items():
        decoder[i].register_forward_hook(lambda module, args, out, shift=shift: out + shift(out))
    return model


# -------------------------------------------------------------------------------------------------------------- pyreft


def file_name(layer: int) -> str:
    return f"intkey_layer_{layer}_comp_block_output_unit_pos_nunit_1#0.bin"


class Rotation(nn.Module):
    """pyreft's rotate_layer, away from its initial value. Its weight is Rᵀ (d, r), kept orthonormal by torch."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(HIDDEN, rank)))
        nn.utils.parametrizations.orthogonal(self)
        with torch.no_grad():
            self.parametrizations.weight.original.add_(0.3 * torch.randn(HIDDEN, rank).tril(-1))
        self.parametrizations.weight.original.data[rank // 2, rank // 2] = 1.0  # one of its signs

    @property
    def columns(self) -> Tensor:
        return self.weight.detach()


class Intervention(nn.Module):
    """An intervention like one of pyreft's classes: the state dict, and the shift of h by its docstring's formula."""

    def __init__(
        self,
        name: str,
        phi: str = "identity",
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        rank: int = RANK,
    ) -> None:
        super().__init__()
        self.name, self.phi = name, PHI[phi]
        self.register_buffer("embed_dim", torch.tensor(HIDDEN))
        self.register_buffer("interchange_dim", torch.tensor(HIDDEN))
        if name in ("Noreft", "Nodireft"):
            self.proj_layer = nn.Linear(HIDDEN, rank, bias=bias).to(dtype)
        else:
            self.rotate_layer = Rotation(rank)
        if name in ("Consreft", "Lobireft"):
            self.learned_source = nn.Parameter(torch.randn(rank))
        else:
            self.learned_source = nn.Linear(HIDDEN, rank).to(dtype)

    def saved(self) -> dict[str, Tensor]:
        if self.name == "Loreft":
            return {**self.learned_source.state_dict(), "rotate_layer": self.rotate_layer.columns}
        return self.state_dict()

    @torch.no_grad()
    def shift(self, h: Tensor) -> Tensor:
        if isinstance(self.learned_source, nn.Linear):
            source = self.learned_source
            learned = self.phi(h @ source.weight.float().t() + source.bias.float())
        if self.name in ("Noreft", "Nodireft"):
            w2 = self.proj_layer.weight.float()
            projected = h @ w2.t() + (0.0 if self.proj_layer.bias is None else self.proj_layer.bias.float())
            return (learned - projected if self.name == "Noreft" else learned) @ w2
        r_t = self.rotate_layer.columns
        return {
            "Loreft": lambda: (learned - h @ r_t) @ r_t.t(),
            "Direft": lambda: learned @ r_t.t(),
            "Consreft": lambda: (self.learned_source - h @ r_t) @ r_t.t(),
            "Lobireft": lambda: (self.learned_source @ r_t.t()).expand_as(h),
        }[self.name]()
