"""The adapter and the projection of the paper's released joint training, bit for bit (SprocketLab/steerling, joint/).

The rest of the training is that of the other joint methods. docs/paper.md has what the released scripts do otherwise.

The released projection differs from the paper's Joint-Orth, which fused-steer implements, in three ways. It projects W1
instead of W2: W1 ← W1 (I − V Vᵀ). It takes V from an SVD of Bᵀ and ignores the singular values: B = 0, as before the
first step, sets coordinates 0 to r − 1 of W1 to 0. It does not project gradients and the optimizer's moments. In the
first steps B is nearly singular and V depends on its last bit. To get the same losses bit for bit from the same
batches, `Adapter` must run the released code's operations, so it is a plain forward hook.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from fused_steer.adapters.parameters import SITE
from fused_steer.model.decoder import find_decoder, inside_peft

NAME = "released"
_SMALL = 1e-3  # factor on W1's initial values


class Adapter(nn.Module):
    """h ↦ h + W2 φ(W1 h), with the operations and the random draws of the released code."""

    def __init__(self, hidden: int, rank: int, activation: nn.Module) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, rank, bias=False)
        self.up = nn.Linear(rank, hidden, bias=False)
        self.activation = activation
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        self.down.weight.data *= _SMALL
        nn.init.zeros_(self.up.weight)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.up(self.activation(self.down(h.flatten(0, 1)))).view_as(h)


_ACTIVATIONS = {"identity": nn.Identity, "silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh}


def attach(model: nn.Module, rank: int, activation: str) -> list[Adapter]:
    """Add an adapter after every layer of a model with LoRA.

    Raises:
        ValueError: the released code has no such activation.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"activation is {activation!r}; expected one of the released code's, {', '.join(_ACTIVATIONS)}"
        )
    decoder, adapters = find_decoder(inside_peft(model)), []
    for layer in decoder.layers:
        weight = next(layer.parameters())
        adapter = Adapter(decoder.hidden, rank, _ACTIVATIONS[activation]()).to(weight)

        def hook(_: nn.Module, __: Any, output: Any, adapter: Adapter = adapter) -> Any:
            return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)

        layer.register_forward_hook(hook)
        adapters.append(adapter)
    # After all other parameters, as in the released code: the gradient norm is summed in this order.
    model.add_module(NAME, nn.ModuleList(adapters))
    return adapters


def project(down: Tensor, b: Tensor) -> Tensor:
    """Compute W1 (I − V Vᵀ), where V are the right singular vectors of Bᵀ. down: (r, d); b: (d, k), k at most d."""
    _, _, vh = torch.linalg.svd(b.transpose(0, 1), full_matrices=False)
    v = vh.transpose(-2, -1)
    return down @ (torch.eye(len(v), device=v.device, dtype=v.dtype) - v @ v.T)


def _down(model: nn.Module, index: int, layer: nn.Module) -> nn.Parameter | None:
    """Return W1 of the layer's `Adapter`, or else of its steering by fused-steer."""
    if hasattr(model, NAME):
        return getattr(model, NAME)[index].down.weight
    steering = getattr(getattr(layer, SITE, None), "steer_down", {})
    return steering["default"].weight if "default" in steering else None


def project_model(model: nn.Module) -> None:
    """Project every layer's W1 by the B of the LoRA on its `mlp.down_proj`.

    Raises:
        ValueError: a layer has no such LoRA, or no adapter with a W1.
    """
    pairs = []
    for index, layer in enumerate(find_decoder(inside_peft(model)).layers):
        down, projection = _down(model, index, layer), getattr(getattr(layer, "mlp", None), "down_proj", None)
        b = getattr(projection, "lora_B", {})
        if down is None or "default" not in b:
            raise ValueError(f"layer {index} has no adapter with a W1 beside a LoRA on mlp.down_proj; expected both")
        pairs.append((down, b["default"].weight))
    with torch.no_grad():
        for down, b in pairs:
            down.data = project(down.data, b.data)


class ReleasedProjection(TrainerCallback):
    """Trainer callback: projects before every n-th step (step 0 included), before each epoch, or once at the start.

    Args:
        every: "step", "epoch", "init", or a number of optimizer steps.
    """

    def __init__(self, every: str | int = 100) -> None:
        if every not in ("step", "epoch", "init") and (not str(every).isdigit() or int(every) == 0):
            raise ValueError(f"the projection is every {every!r}; expected step, epoch, init or a number of steps")
        self.every = {"step": 1}.get(str(every), int(every) if str(every).isdigit() else every)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.every == "init":
            project_model(kwargs["model"])

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.every == "epoch":
            project_model(kwargs["model"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if isinstance(self.every, int) and state.global_step % self.every == 0:
            project_model(kwargs["model"])
