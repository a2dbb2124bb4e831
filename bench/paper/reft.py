"""LoReFT (arXiv 2404.03592) in plain PyTorch: h ↦ h + Rᵀ (W h + b − R h), with orthonormal rows of R.

Only methods.py uses this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fused_steer.model.decoder import find_decoder


class Positions:
    """The tokens of the current pass to edit: the first and last few of each row's prompt, or all.

    The prompt is every token that the attention mask keeps and that has no label. As in pyreft, tokens generated with a
    cache do not belong to it.
    """

    def __init__(self, text: str) -> None:
        """Parse `all`, or `f7+l7`: the first 7 and the last 7."""
        self.mask: Tensor | None = None
        self.first = self.last = None
        if text != "all":
            try:
                first, last = text.split("+")
                if (first[0], last[0]) != ("f", "l"):
                    raise ValueError
                self.first, self.last = int(first[1:]), int(last[1:])
            except (IndexError, ValueError):
                raise ValueError(f"positions is {text!r}; expected 'all' or such as 'f7+l7'") from None

    def watch(self, model: nn.Module) -> None:
        if self.first is not None:
            model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        labels, kept = kwargs.get("labels"), kwargs.get("attention_mask")
        ids = args[0] if args else kwargs["input_ids"]
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            self.mask = torch.zeros_like(ids, dtype=torch.bool)
            return
        prompt = torch.ones_like(ids, dtype=torch.bool) if kept is None else kept.bool()
        if labels is not None:
            prompt = prompt & (labels < 0)
        at = prompt.cumsum(1)
        self.mask = prompt & ((at <= self.first) | (at > at[:, -1:] - self.last))


class LoReFT(nn.Module):
    """LoReFT's edit of one layer. The initial values are pyreft's: R is orthogonal, W and b are nn.Linear's."""

    def __init__(self, hidden: int, rank: int) -> None:
        super().__init__()
        rotate = nn.Linear(hidden, rank, bias=False)
        nn.init.orthogonal_(rotate.weight)
        # pyreft's parametrisation. Its trained tensor has signs on the diagonal, which weight decay would destroy.
        self.rotate = parametrizations.orthogonal(rotate)
        self.source = nn.Linear(hidden, rank)

    def forward(self, h: Tensor, mask: Tensor | None) -> Tensor:
        """Edit h, (B, T, d), at the tokens of mask, (B, T); None edits every token."""
        rotation = self.rotate.weight
        x = h.to(rotation.dtype)
        edited = (h + (self.source(x) - x @ rotation.T) @ rotation).to(h.dtype)
        return edited if mask is None else torch.where(mask[..., None], edited, h)


def attach(model: nn.Module, rank: int, positions: str) -> list[LoReFT]:
    """Freeze the model and edit every layer's output."""
    model.requires_grad_(False)
    decoder, where = find_decoder(model), Positions(positions)
    where.watch(model)
    edits = []
    for layer in decoder.layers:
        edit = LoReFT(decoder.hidden, rank).to(next(layer.parameters()).device)

        def hook(_: nn.Module, __: Any, output: Any, edit: LoReFT = edit) -> Any:
            if isinstance(output, tuple):
                return (edit(output[0], where.mask), *output[1:])
            return edit(output, where.mask)

        layer.register_forward_hook(hook)
        layer.add_module("loreft", edit)
        edits.append(edit)
    return edits
