"""`fused-steer inspect`: shows a saved adapter's config, its size and the norms of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor

from ..adapters.files import WEIGHTS_NAME, locate_adapter, read_with_heads
from ..adapters.parameters import DOWN, DOWN_BIAS, UP, UP_BIAS, Place, steered


@dataclass(frozen=True)
class LayerNorms:
    """The norms of an adapter at one site of a layer. The norm of a missing tensor is None.

    Attributes:
        down: ‖W1‖_F.
        up: ‖W2‖_F.
        product: ‖W2 W1‖_2.
        down_bias: ‖b1‖.
        up_bias: ‖b2‖.
    """

    layer: int
    down: float | None
    up: float | None
    product: float | None
    down_bias: float | None
    up_bias: float | None
    site: str


def _norms(place: Place, tensors: Mapping[str, Tensor]) -> LayerNorms:
    def norm(name: str) -> float | None:
        return float(tensors[name].double().norm()) if name in tensors else None

    product = None
    if UP in tensors:
        _, core, _ = core_of({name: tensors[name].double() for name in (DOWN, UP)})
        product = float(torch.linalg.matrix_norm(core, 2))
    return LayerNorms(place.layer, norm(DOWN), norm(UP), product, norm(DOWN_BIAS), norm(UP_BIAS), place.site)


def core_of(t: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q, M and P with W2 W1 = Q M Pᵀ and orthonormal columns of Q and P, of W1 (r, d) and W2 (d, r) in float64.

    M is (r, r), and Q and P are (d, r), or all are (d, d) if r is more than d.

    The norm of M is that of W2 W1, also where the ranks of an adapter cancel each other, as in a sum of adapters. A sum
    over W2ᵀ W2 and W1 W1ᵀ would then have half the digits. An M that is rounding is 0.
    """
    q, up = torch.linalg.qr(t[UP])
    p, down = torch.linalg.qr(t[DOWN].t())
    core = up @ down.t()
    rounding = len(t[DOWN]) * torch.finfo(core.dtype).eps * t[UP].norm() * t[DOWN].norm()
    return q, core if core.norm() > rounding else torch.zeros_like(core), p


def describe(source: str) -> dict[str, Any]:
    """Return the output of `fused-steer inspect` as JSON data."""
    directory = locate_adapter(source)
    adapter = read_with_heads(directory)[0]
    layers = [
        asdict(_norms(place, steered(adapter.config.form, tensors))) for place, tensors in adapter.tensors.items()
    ]
    return {
        "adapter": str(directory),
        "base_model": adapter.layout.base or None,
        "hidden_size": adapter.layout.hidden,
        "num_layers": adapter.layout.num_layers,
        "config": adapter.config.to_dict(),
        "parameters": sum(tensor.numel() for named in adapter.tensors.values() for tensor in named.values()),
        "file_bytes": (directory / WEIGHTS_NAME).stat().st_size,
        "layers": layers,
    }


def config_table(description: dict[str, Any]) -> Table:
    table = Table("setting", Column("value", overflow="fold"))  # a narrow screen cuts no path
    facts = {name: value for name, value in description.items() if name not in ("config", "layers")}
    for name, value in {**facts, **description["config"]}.items():
        shown = f"{value:,}" if name in ("parameters", "file_bytes") else str(value)
        table.add_row(name, Text("all" if name == "layers" and value is None else shown))
    return table


_NORM_HEADS = {"down": "‖W1‖", "up": "‖W2‖", "product": "‖W2 W1‖₂", "down_bias": "‖b1‖", "up_bias": "‖b2‖"}


def norms_table(layers: list[dict[str, Any]]) -> Table:
    """Return a table with a row for each site of each layer and a column for each tensor that the adapter has."""
    present = [name for name in _NORM_HEADS if layers[0][name] is not None]
    several = len({norms["site"] for norms in layers}) > 1
    table = Table("layer", *(["site"] if several else []), *(_NORM_HEADS[name] for name in present))
    for column in table.columns:
        column.justify = "right"
    for norms in layers:
        at = [norms["site"]] if several else []
        table.add_row(str(norms["layer"]), *at, *(f"{norms[name]:.4g}" for name in present))
    return table
