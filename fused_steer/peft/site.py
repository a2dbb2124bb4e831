"""The site of PEFT's steering in a decoder layer."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..adapters.parameters import Adapter
from ..config import SteerConfig
from ..kernels import post_block, select_backend
from ..model.decoder import execution_device
from ..model.site import Site
from ..serving.mixed import MixedRows


class PeftSite(Site, BaseTunerLayer):
    """A site with adapters that PEFT manages: all active ones steer, or in a mixed batch each row its own."""

    adapter_layer_names = ("steer_down", "steer_up")

    def __init__(self) -> None:
        super().__init__()
        self.configs: dict[str, SteerConfig] = {}
        self.mixed: MixedRows | None = None  # while each row of a batch has its own adapter
        self.merged_adapters = []
        self._active_adapter = []

    def add(self, name: str, config: SteerConfig, hidden: int, device: torch.device) -> None:
        self.attach(name, Adapter.fresh(config, hidden, device))
        self.configs[name] = config

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.configs.pop(adapter_name, None)

    def get_base_layer(self) -> nn.Module:
        """The decoder layer. A site wraps no module, as PEFT's other layers do."""
        return self.patched.layer

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT asks for it after it has put loaded tensors in the place of those on meta. They keep their dtype."""
        adapter = self.adapter(adapter_name)
        for factor in () if adapter is None else (adapter.down, adapter.up):
            factor.to(execution_device(self.patched.layer) if device is None else device)

    def cast(self, name: str, dtype: torch.dtype) -> None:
        """Give an adapter's parameters another dtype."""
        adapter = self.adapter(name)
        for factor in () if adapter is None else (adapter.down, adapter.up):
            factor.to(dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise cannot_merge()

    def steer(self, residual: Tensor, branch: Tensor | None = None, entering: Tensor | None = None) -> Tensor:
        branch = self.called(residual, branch, entering)
        self.__dict__["calls"] += 1  # past nn.Module's __setattr__, which takes long
        self.__dict__["backend"] = select_backend(residual.device)
        if self.mixed is not None and not self.disable_adapters:
            return self.mixed.steer(self.patched.index, residual, branch)
        return self.in_graph(residual, branch)

    def in_graph(self, residual: Tensor, branch: Tensor | None) -> Tensor:
        if not self.disable_adapters:
            if self.mixed is not None:
                return self.mixed.in_graph(self.patched.index, residual, branch)
            names = [name for name in self.active_adapters if name in self.configs]
            if names:
                return self._sum(residual, branch, names)
        return residual if branch is None else residual + branch

    def _sum(self, residual: Tensor, branch: Tensor | None, names: list[str]) -> Tensor:
        """The shifts of several adapters are those of the same hidden state, and are added up."""
        if len(names) == 1:
            return self._steer(residual, branch, names[0])
        x = residual if branch is None else residual + branch
        out = self._steer(x, None, names[0])
        for name in names[1:]:
            out = out + (self._steer(x, None, name) - x)
        return out

    def _steer(self, residual: Tensor, branch: Tensor | None, name: str) -> Tensor:
        config = self.configs[name]
        down, up, down_bias, up_bias = Adapter(self.steer_down[name], self.steer_up[name]).weights()
        return post_block(
            residual,
            branch,
            down,
            up,
            down_bias=down_bias,
            up_bias=up_bias,
            activation=config.activation,
            scale=config.scale,
        )

    def extra_repr(self) -> str:
        return f"active={self.active_adapters!r}"


def cannot_merge() -> ValueError:
    return ValueError(
        "a steering adapter cannot be merged into weights: its shift is added to the stream after the block, where "
        "there is no weight to take it up; expected it to be kept (save_pretrained), or taken out (unload)"
    )
