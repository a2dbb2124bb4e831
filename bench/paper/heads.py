"""Rivals that edit the outputs of attention heads: LoFiT (arXiv 2406.01563) and JoLA (arXiv 2502.01179).

z, (…, heads, width), is the input of the attention's output projection, split by head. The formulas and initial values
follow the authors' released codes (fc2869/lo-fit, wenlai-lavine/jola).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fused_steer.model.decoder import find_decoder

STD = 1e-3  # standard deviation of the initial values, in both methods
_ATTENTION = ("self_attn", "attention", "attn", "self_attention")
_PROJECTION = ("o_proj", "out_proj", "dense", "c_proj")


def attach(model: nn.Module, make: type[nn.Module], name: str) -> list[nn.Module]:
    """Freeze the model and insert an edit `make(heads, width)` before each layer's attention output projection.

    Raises:
        ValueError: a layer has no such projection under a known name, its width is no multiple of the heads, or layers
            have other numbers of heads than the first.
    """
    model.requires_grad_(False)
    edits: list[nn.Module] = []
    first = None
    for index, layer in enumerate(find_decoder(model).layers):
        attention = next((part for part in _ATTENTION if hasattr(layer, part)), None)
        module = getattr(layer, attention) if attention else layer
        projection = next((getattr(module, part) for part in _PROJECTION if hasattr(module, part)), None)
        if attention is None or not isinstance(projection, nn.Linear):
            raise ValueError(
                f"layer {index}, a {type(layer).__name__}, has no linear {'/'.join(_PROJECTION)} in "
                f"{'/'.join(_ATTENTION)}; expected one to edit the heads before"
            )
        heads = _heads_of(module, model)
        if not heads or projection.in_features % heads:
            raise ValueError(
                f"the heads of layer {index} are {projection.in_features} wide; expected {heads} equal ones"
            )
        first = first or heads
        if heads != first:  # LoFiT ranks the heads of all layers, and JoLA's penalty counts them
            raise ValueError(f"layer {index} has {heads} heads; expected {first}, as layer 0")
        edit = make(heads, projection.in_features // heads).to(projection.weight.device)  # float32 in any model
        module.add_module(name, edit)
        projection.register_forward_pre_hook(lambda _, args, edit=edit: (edit(args[0]).to(args[0].dtype), *args[1:]))
        edits.append(edit)
    return edits


def _heads_of(attention: nn.Module, model: nn.Module) -> int | None:
    """Return the number of an attention's heads: its own where it has one, since layers may differ, or the config's."""
    own = getattr(attention, "num_heads", None)
    return own if isinstance(own, int) else getattr(model.config.get_text_config(), "num_attention_heads", None)


class Lofit(nn.Module):
    """z ↦ (1 + A) z + v, with a scale A and an offset v, (heads, width) each.

    Training has two stages. First only A is trained, with an L1 penalty. Then A is set to 0, and v is trained for the
    heads that had the largest ‖A‖.
    """

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(STD * torch.randn(heads, width))
        self.offset = nn.Parameter(torch.zeros(heads, width), requires_grad=False)
        self.register_buffer("chosen", torch.zeros(heads, 1), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        heads = z.unflatten(-1, self.scale.shape)
        return ((1 + self.scale) * heads + self.chosen * self.offset).flatten(-2)


def select_heads(edits: Sequence[Lofit], share: float) -> list[tuple[int, int]]:
    """Choose a share of the heads by ‖A‖ and train their offsets instead; return (layer, head) of each."""
    norms = torch.stack([edit.scale.detach().float().norm(dim=1) for edit in edits])
    count = max(1, round(share * norms.numel()))
    chosen = [divmod(int(at), norms.shape[1]) for at in norms.flatten().topk(count).indices]
    with torch.no_grad():
        for edit in edits:
            edit.scale.zero_()
            edit.offset.normal_(std=STD)
            edit.chosen.zero_()
            edit.scale.requires_grad_(False)
            edit.offset.requires_grad_(True)
        for layer, head in chosen:
            edits[layer].chosen[head] = 1
    return chosen


class Jola(nn.Module):
    """z ↦ (1 + g2 A) z + g1 v, with hard-concrete gates g1 and g2 for each head. Gates, A and v are trained."""

    TEMPERATURE, LOW, HIGH, EPS = 0.33, -0.1, 1.1, 1e-6

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(STD * torch.randn(heads, width))
        self.offset = nn.Parameter(STD * torch.randn(heads, width))
        self.log_g1 = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, 1)))
        self.log_g2 = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, 1)))

    def gate(self, log_gate: Tensor) -> Tensor:
        """Compute a gate: sampled in training; without noise and at temperature 1 in evaluation."""
        if self.training:
            noise = (1 - 2 * self.EPS) * torch.rand_like(log_gate) + self.EPS
            concrete = torch.sigmoid((noise.log() - (1 - noise).log() + log_gate) / self.TEMPERATURE)
        else:
            concrete = torch.sigmoid(log_gate)
        return (concrete * (self.HIGH - self.LOW) + self.LOW).clamp(0, 1)

    def forward(self, z: Tensor) -> Tensor:
        heads = z.unflatten(-1, self.scale.shape)
        return ((1 + self.gate(self.log_g2) * self.scale) * heads + self.gate(self.log_g1) * self.offset).flatten(-2)

    def open(self, log_gate: Tensor) -> Tensor:
        """Compute the mean probability that a gate is not 0."""
        shifted = log_gate - self.TEMPERATURE * math.log(-self.LOW / self.HIGH)
        return torch.sigmoid(shifted).clamp(self.EPS, 1 - self.EPS).mean()


class JolaPenalty:
    """JoLA's gate penalty: λ · open(g1) + (1 − λ) · open(g2), summed over layers and divided by layers × heads.

    λ = 0.1 e^(−0.01 t) at step t.
    """

    START, DECAY = 0.1, 0.01

    def __init__(self, edits: Sequence[Jola]) -> None:
        self.edits, self.steps = edits, 0

    def __call__(self) -> Tensor:
        weight = self.START * math.exp(-self.DECAY * self.steps)
        self.steps += 1
        first, second = (sum(e.open(getattr(e, name)) for e in self.edits) for name in ("log_g1", "log_g2"))
        return (weight * first + (1 - weight) * second) / (len(self.edits) * len(self.edits[0].scale))
