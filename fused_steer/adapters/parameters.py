"""The parameters of an adapter: their names, paths and shapes, and the module that holds them in a layer.

An adapter at one layer has W1 and b1 (`steer_down`), W2 and b2 (`steer_up`). Their path in a model is
`<path of the layer>.post_block.<steer_down or steer_up>.<weight or bias>`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..config import DTYPES, SteerConfig

#: The site's name in its layer, and so part of every parameter's path.
SITE = "post_block"


class Factor(nn.Module):
    """One matrix of an adapter with its bias; either may be absent.

    Not an nn.Linear: what looks for those to quantise, to adapt or to initialise must pass by.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self.register_parameter("weight", None if weight is None else nn.Parameter(weight))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))


class Adapter:
    """The parameters of one adapter at one site, before they are attached: W1 and b1, W2 and b2."""

    def __init__(self, down: Factor, up: Factor) -> None:
        self.down = down
        self.up = up

    @classmethod
    def fresh(cls, config: SteerConfig, hidden: int, device: torch.device) -> Adapter:
        """A new adapter that changes nothing: W1 kaiming-uniform (a = √5) times `init_scale`, all else 0."""
        options = {"device": device, "dtype": DTYPES[config.dtype]}
        down = up = None
        if config.rank:
            down = torch.empty(config.rank, hidden, **options)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            down *= config.init_scale
            up = torch.zeros(hidden, config.rank, **options)
        down_bias = torch.zeros(config.rank or 0, **options) if config.down_bias else None
        up_bias = torch.zeros(hidden, **options) if config.up_bias else None
        return cls(Factor(down, down_bias), Factor(up, up_bias))

    @classmethod
    def shapes(cls, config: SteerConfig, hidden: int) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter that an adapter of `config` has, by its name below the site."""
        rank = config.rank or 0
        shapes = {"steer_down.weight": (rank, hidden), "steer_up.weight": (hidden, rank)} if rank else {}
        if config.down_bias:
            shapes["steer_down.bias"] = (rank,)
        if config.up_bias:
            shapes["steer_up.bias"] = (hidden,)
        return shapes

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> Adapter:
        """From tensors by their names below the site, as `shapes` has them."""
        down, up = (
            Factor(tensors.get(f"{side}.weight"), tensors.get(f"{side}.bias")) for side in ("steer_down", "steer_up")
        )
        return cls(down, up)

    def named_tensors(self) -> dict[str, Tensor]:
        named = {}
        for side, factor in (("steer_down", self.down), ("steer_up", self.up)):
            named.update({f"{side}.{name}": p.detach() for name, p in factor.named_parameters()})
        return named
