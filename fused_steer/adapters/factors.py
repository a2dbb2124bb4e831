"""An adapter's modules in a layer: the factors W1 and W2 with their biases, and both together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import DTYPES, SteerConfig
from ..kernels.rotation import orthonormal, rotate
from .parameters import DOWN, DOWN_BIAS, NAMES, UP, UP_BIAS, steered


class Factor(nn.Module):
    """One matrix of an adapter with its bias. Either may be missing.

    It is not an nn.Linear, so that code which quantises, adapts or initialises these leaves it alone.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self.register_parameter("weight", None if weight is None else nn.Parameter(weight))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    def has(self, name: str) -> bool:
        """Return whether there is a weight or a bias, without computing it."""
        # A replica of DataParallel has its parameters among its attributes, and so has a pruned factor its weight.
        for named in (self._parameters, self.__dict__):
            if name in named:
                return named[name] is not None
        return True  # parametrized

    def is_computed(self, name: str) -> bool:
        """Return whether the weight or the bias is no parameter, but computed from others in each pass.

        So do `torch.nn.utils.parametrize` and, by a forward pre-hook, `torch.nn.utils.prune`.
        """
        return name not in self._parameters


def read_factor(factor: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Return the weight and the bias of a factor that steers. Its forward pre-hooks compute them before."""
    for number, hook in factor._forward_pre_hooks.items():
        hook(factor, (), {}) if number in factor._forward_pre_hooks_with_kwargs else hook(factor, ())
    return factor.weight, factor.bias  # type: ignore[return-value]


@torch.no_grad()
def _values(factor: Factor) -> tuple[Tensor | None, Tensor | None]:
    """Return the weight and the bias in eval mode. In training mode a spectral norm would change its state."""
    if not (factor.is_computed("weight") or factor.is_computed("bias")):
        return factor.weight, factor.bias
    modes = [(module, module.training) for module in factor.modules()]
    try:
        return read_factor(factor.eval())
    finally:
        for module, training in modes:
            module.training = training


class Rotation(Factor):
    """W2 = Rᵀ of LoReFT, computed from `weight` in each pass (kernels/rotation.py). It has no bias.

    Attributes:
        exist: whether one was made in this process, also by a copy. Mostly not, and then no pass asks its sites.
    """

    exist: ClassVar[bool] = False

    def __new__(cls, *arguments: Any, **options: Any) -> Rotation:
        Rotation.exist = True
        return super().__new__(cls)


if TYPE_CHECKING:

    class Factors(nn.ModuleDict):
        """W1 with b1, or W2 with b2, of each adapter at a site, by adapter name."""

        def __getitem__(self, key: str) -> Factor: ...
else:
    Factors = nn.ModuleDict


class Adapter:
    """The parameters of one adapter at one site, before they are attached: W1 and b1, W2 and b2."""

    def __init__(self, down: Factor, up: Factor) -> None:
        self.down = down
        self.up = up

    @classmethod
    def fresh(cls, config: SteerConfig, hidden: int, device: torch.device) -> Adapter:
        """Return a new adapter that changes nothing. W1 is kaiming-uniform (a = √5) times `init_scale`, all else 0.

        For LoReFT R is random, W = R and b = 0.

        Raises:
            ValueError: LoReFT's rank is more than d.
        """
        options: dict[str, Any] = {"device": device, "dtype": DTYPES[config.dtype]}
        down = up = None
        if config.form == "loreft":
            if config.rank > hidden:
                raise ValueError(
                    f"rank is {config.rank} with form='loreft'; expected at most {hidden}, the hidden size"
                )
            up = orthonormal(torch.randn(hidden, config.rank, device=device)).to(options["dtype"])
            down = up.t().contiguous()
        elif config.rank:
            down = torch.empty(config.rank, hidden, **options)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            down *= config.init_scale
            up = torch.zeros(hidden, config.rank, **options)
        down_bias = torch.zeros(config.rank, **options) if config.down_bias else None
        up_bias = torch.zeros(hidden, **options) if config.up_bias else None
        return cls(Factor(down, down_bias), _up_factor(config.form)(up, up_bias))

    @classmethod
    def of_tensors(
        cls, tensors: Mapping[str, Tensor], device: torch.device | None = None, form: str = "lowrank"
    ) -> Adapter:
        """Return an adapter of tensors given by name, moved to `device` if it is not None."""
        moved = {name: tensor if device is None else tensor.to(device) for name, tensor in tensors.items()}
        up = _up_factor(form)(moved.get(UP), moved.get(UP_BIAS))
        return cls(Factor(moved.get(DOWN), moved.get(DOWN_BIAS)), up)

    def named_tensors(self) -> dict[str, Tensor]:
        """Return the values by name, without gradients. Computed ones are those of eval mode."""
        values = (*_values(self.down), *_values(self.up))
        return {name: tensor.detach() for name, tensor in zip(NAMES, values, strict=True) if tensor is not None}

    def computed(self) -> list[str]:
        """Return the names of the tensors that are no parameters: see `Factor.is_computed`."""
        sides = (("steer_down", self.down), ("steer_up", self.up))
        return [f"{side}.{name}" for side, factor in sides for name in ("weight", "bias") if factor.is_computed(name)]

    def steered(self) -> dict[str, Tensor]:
        """Return W1, b1, W2 and b2 by name, without gradients."""
        return steered("loreft" if isinstance(self.up, Rotation) else "lowrank", self.named_tensors())

    def weights(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Return W1, W2, b1 and b2 as the op takes them, with gradients. None stands for a missing part."""
        (down, down_bias), (up, up_bias) = read_factor(self.down), read_factor(self.up)
        if isinstance(self.up, Rotation) and down is not None and up is not None:
            return *rotate(down, up), down_bias, None
        return down, up, down_bias, up_bias


def _up_factor(form: str) -> type[Factor]:
    return Rotation if form == "loreft" else Factor
