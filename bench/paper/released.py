"""The projection of the paper's released code (joint/train_orthogonal.py), to the bit, as a callback of a Trainer.

It differs from the paper's Joint-Orth, which is ours, in three ways: it projects W1, W1 ← W1 (I − V Vᵀ), and not W2; V
is taken from a singular value decomposition of Bᵀ without a look at the singular values, so that B = 0 (before the first
step) wipes coordinates 0 to r − 1 of W1; and it is done between steps, gradients and the optimizer's moments left alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from fused_steer.adapters.parameters import SITE
from fused_steer.model.decoder import find_decoder, inside_peft


def project(down: Tensor, b: Tensor) -> Tensor:
    """W1 (I − V Vᵀ), V the right singular vectors of Bᵀ. down: (r, d); b: (d, k), k at most d."""
    _, _, vh = torch.linalg.svd(b.transpose(0, 1), full_matrices=False)
    v = vh.transpose(-2, -1)
    return down @ (torch.eye(len(v), device=v.device, dtype=v.dtype) - v @ v.T)


def project_model(model: nn.Module) -> None:
    """Project every layer's W1 by the B of the LoRA on its `mlp.down_proj`.

    Raises:
        ValueError: a layer has no such LoRA, or no adapter with a W1.
    """
    pairs = []
    for index, layer in enumerate(find_decoder(inside_peft(model)).layers):
        site, projection = getattr(layer, SITE, None), getattr(getattr(layer, "mlp", None), "down_proj", None)
        b = getattr(projection, "lora_B", {})
        if site is None or "default" not in site.steer_down or "default" not in b:
            raise ValueError(f"layer {index} has no steering with a W1 beside a LoRA on mlp.down_proj; expected both")
        pairs.append((site.steer_down["default"].weight, b["default"].weight))
    with torch.no_grad():
        for down, b in pairs:
            down.data = project(down.data, b.data)


class ReleasedProjection(TrainerCallback):
    """Projects before a step whose number is a multiple of n (0 too), before each epoch, or once before the first.

    Args:
        every: "step", "epoch", "init", or a number of optimizer steps.
    """

    def __init__(self, every: str | int = 100) -> None:
        if every not in ("step", "epoch", "init") and not str(every).isdigit() or str(every) == "0":
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
