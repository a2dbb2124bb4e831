"""Combine adapters of one activation into one that adds up their shifts, each times a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import SITES, SteerConfig, checked_number
from .files import AdapterFile
from .parameters import DOWN, DOWN_BIAS, UP, UP_BIAS, Place, steered


def combine_adapters(parts: Mapping[str, tuple[float, AdapterFile]]) -> AdapterFile:
    """Return the adapter with the shift Σ weight · scale · (W2 φ(W1 h + b1) + b2) of several adapters of one model.

    The ranks are stacked: W1 and b1 below each other, weight · scale · W2 beside each other. Vectors and biases b2 are
    added up in float64. The result is float32 with strength 1. An adapter that does not steer at a place adds nothing
    there.

    Args:
        parts: each adapter with its weight, by the name for error messages.

    Raises:
        TypeError, ValueError: no adapter, a weight that is no finite number, adapters with different activations or
            positions, or ranks that are more than the kernels take.
    """
    if not parts:
        raise ValueError("weights is empty; expected at least one adapter, such as {'polite': 0.7, 'terse': 0.3}")
    weights = {name: checked_number(f"the weight of {name!r}", weight) for name, (weight, _) in parts.items()}
    files = {name: file for name, (_, file) in parts.items()}
    first, config = next((name, file.config) for name, file in files.items())
    ranked = {name: file.config.activation for name, file in files.items() if file.config.rank}
    shared = next(iter(ranked.items()), None)  # the first adapter with a rank, and its activation
    for name, file in files.items():
        if shared is not None and ranked.get(name, shared[1]) != shared[1]:
            raise ValueError(
                f"adapter {name!r} has activation {ranked[name]!r}; expected {shared[1]!r}, as adapter {shared[0]!r} "
                "has, or a vector: ranks of two activations cannot be stacked"
            )
        if file.config.positions != config.positions:
            raise ValueError(
                f"adapter {name!r} has positions {file.config.positions!r}; expected {config.positions!r}, as adapter "
                f"{first!r} has"
            )
    layout = files[first].layout
    found = [place for file in files.values() for place in file.tensors]
    layers, sites = {place.layer for place in found}, {place.site for place in found}
    places = [Place(layer, site) for layer in sorted(layers) for site in sorted(sites, key=SITES.index)]
    stacked = {place: _stacked(weights, files, place, layout.hidden) for place in places}
    rank = max(len(down) for down, *_ in stacked.values())
    biases = [
        any(key in named for file in files.values() for named in file.tensors.values()) for key in (DOWN_BIAS, UP_BIAS)
    ]
    fields: dict[str, Any] = {}
    if shared is not None:
        fields = {"rank": rank, "activation": shared[1], "down_bias": biases[0], "up_bias": biases[1]}
    combined = SteerConfig(
        form="vector" if shared is None else "lowrank",
        layers=layout.config_layers(layers),
        site=sorted(sites),
        positions=config.positions,
        **fields,
    )
    tensors = {}
    for place, (down, down_bias, up, up_bias) in stacked.items():
        more = rank - len(down)  # places with fewer ranks are filled up with zeros, and φ(0) is 0
        whole = {
            DOWN: torch.cat([down, down.new_zeros(more, layout.hidden)]),
            DOWN_BIAS: torch.cat([down_bias, down_bias.new_zeros(more)]),
            UP: torch.cat([up, up.new_zeros(layout.hidden, more)], 1),
            UP_BIAS: up_bias,
        }
        wanted = (rank > 0, combined.down_bias, rank > 0, combined.up_bias)
        tensors[place] = {
            key: tensor.float().contiguous() for (key, tensor), kept in zip(whole.items(), wanted, strict=True) if kept
        }
    return AdapterFile(combined, layout, tensors)


def _stacked(
    weights: Mapping[str, float], files: Mapping[str, AdapterFile], place: Place, hidden: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return W1 (R, d), b1 (R,), W2 (d, R) and b2 (d,) at a place, in float64. R is the sum of the ranks there."""
    exact = torch.float64
    downs, down_biases = [torch.zeros(0, hidden, dtype=exact)], [torch.zeros(0, dtype=exact)]
    ups, up_bias = [torch.zeros(hidden, 0, dtype=exact)], torch.zeros(hidden, dtype=exact)
    for name, file in files.items():
        if place not in file.tensors:
            continue
        factor = weights[name] * file.config.scale
        t = {key: tensor.cpu().to(exact) for key, tensor in steered(file.config.form, file.tensors[place]).items()}
        if UP in t:
            downs.append(t[DOWN])
            down_biases.append(t.get(DOWN_BIAS, t[DOWN].new_zeros(len(t[DOWN]))))
            ups.append(factor * t[UP])
        if UP_BIAS in t:
            up_bias = up_bias + factor * t[UP_BIAS]
    return torch.cat(downs), torch.cat(down_biases), torch.cat(ups, 1), up_bias
