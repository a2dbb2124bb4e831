"""Merge an adapter into the model's own weights. The merged model needs no kernel and no library, and costs nothing.

A weight can hold an affine shift of what a linear layer returns or is given. With A = s W2 W1 and c = s (W2 b1 + b2)
the adapter's formula (arXiv 2603.00425, §3) is h -> h + A h + c, and

    post_attention, post_mlp   h = W z + b, the sublayer's output:  W -> W + A W,  b -> b + A b + c
    pre_mlp                    W h + b, where the sublayer reads h: W -> W + W A,  b -> b + W c
    post_block                 for A = 0 (vectors) only, in what the MLP adds last:  b -> b + c

The linear layers are found by one pass: a sublayer's output is that of a linear layer to the bit, or its input is. Each
layer is then computed in float64, once steered by hooks and once merged; if the two differ, the merge is refused.
"""

from __future__ import annotations

import torch
from torch import nn

from ..adapters.parameters import SITE
from ..config import SteerConfig
from ..model.patched import PatchedModel
from .biases import give_biases, text_config
from .checking import check_in_float64
from .layers import find_linears, run_once, shared_modules, shifted_layers
from .merged import Merged, add_values, warn_of_rounding

__all__ = ["Merged", "check_mergeable", "find_merged", "warn_of_rounding"]


def check_mergeable(config: SteerConfig, name: str) -> None:
    """Refuse an adapter that no weight can hold, by its config.

    Raises:
        ValueError: φ is not the identity, only some tokens are steered, or a layer's output is steered by more than a
            vector.
    """
    if config.activation != "identity":
        raise ValueError(
            f"adapter {name!r} has activation {config.activation!r} and cannot be merged; expected 'identity', because "
            "weights hold only linear functions"
        )
    if config.positions != "all":
        raise ValueError(
            f"adapter {name!r} steers positions {config.positions!r} and cannot be merged; expected 'all', because a "
            "weight acts on every token"
        )
    if SITE in config.sites and config.form != "vector":
        raise ValueError(
            f"adapter {name!r} has form {config.form!r} at post_block and cannot be merged: it reads the residual "
            "stream, which no weight makes alone; expected form 'vector', or site post_mlp, pre_mlp or post_attention"
        )


def find_merged(model: nn.Module, patched: PatchedModel, name: str) -> Merged:
    """Compute the weights of a model with its active adapter merged. The model is not changed.

    Args:
        model: the patched model.
        patched: its layers, with steering disabled.
        name: the active adapter.

    Raises:
        ValueError: a layer cannot hold the shift.
    """
    wrapped = next((path for path, module in model.named_modules() if hasattr(module, "base_layer")), None)
    if wrapped is not None:
        raise ValueError(
            f"{wrapped} carries an adapter of PEFT; expected none (PEFT's merge_and_unload first, then this), because "
            "the steering acts on what both return"
        )
    layers = shifted_layers(patched, name)
    if not layers:
        return Merged(None)
    shared = shared_modules(model)
    merged = Merged(text_config(getattr(model, "config", None)))
    with torch.compiler.set_stance("force_eager"):  # a compiled graph runs no new hooks
        run_once(patched, layers)
        for layer in layers:
            find_linears(layer, shared)
            check_in_float64(layer)
            add_values(layer, merged)
    give_biases(model, merged)
    return merged
