"""The module that steers one decoder layer with PEFT's adapters."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.fx.proxy import TraceError

from ..adapters.distributed import check_averaged_in
from ..adapters.factors import Adapter
from ..adapters.parameters import SITE
from ..config import SteerConfig
from ..kernels import post_block, select_backend
from ..kernels.registered import refuse_symbols
from ..model.decoder import execution_device
from ..model.site import Site
from ..serving.mixed import MixedRows


class PeftSite(Site, BaseTunerLayer):
    """A steering site with adapters managed by PEFT. All active adapters steer, or in a mixed batch each row's own."""

    adapter_layer_names = ("steer_down", "steer_up")

    def __init__(self, name: str = SITE) -> None:
        super().__init__(name)
        self.configs: dict[str, SteerConfig] = {}
        self.mixed: MixedRows | None = None  # set while each row of a batch has its own adapter
        self.merged_adapters = []
        self._active_adapter = []

    def add(self, name: str, config: SteerConfig, hidden: int, device: torch.device) -> None:
        self.attach(name, Adapter.fresh(config, hidden, device))
        self.configs[name] = config

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.configs.pop(adapter_name, None)

    def get_base_layer(self) -> nn.Module:
        """Return the decoder layer. A site wraps no module, unlike PEFT's other layers."""
        return self.patched.layer

    # PEFT's properties ask the wrapped layer, which may be deleted. A site has neither.

    @property
    def weight(self) -> Tensor:
        raise AttributeError(f"{type(self).__name__!r} object has no attribute 'weight'")

    @property
    def bias(self) -> Tensor:
        raise AttributeError(f"{type(self).__name__!r} object has no attribute 'bias'")

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to the layer's device, keeping its dtype. PEFT calls this after replacing tensors on meta."""
        adapter = self.adapter(adapter_name)
        for factor in () if adapter is None else (adapter.down, adapter.up):
            factor.to(execution_device(self.patched.layer) if device is None else device)

    def cast(self, name: str, dtype: torch.dtype) -> None:
        """Convert an adapter's parameters to another dtype."""
        adapter = self.adapter(name)
        for factor in () if adapter is None else (adapter.down, adapter.up):
            factor.to(dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise cannot_merge()

    def steer(self, residual: Tensor, branch: Tensor | None = None, entering: Tensor | None = None) -> Tensor:
        branch = self.called(residual, branch, entering)
        self.__dict__["calls"] += 1  # bypasses nn.Module's slow __setattr__
        try:
            self.__dict__["backend"] = select_backend(residual.device)
        except TraceError:
            refuse_symbols(residual)
            raise
        if torch.is_grad_enabled():
            check_averaged_in(self)
        if self.mixed is not None and not self.disable_adapters:
            return self.mixed.steer(self.place, residual, branch)
        return self.in_graph(residual, branch)

    def in_graph(self, residual: Tensor, branch: Tensor | None) -> Tensor:
        if not self.disable_adapters:
            if self.mixed is not None:
                return self.mixed.in_graph(self.place, residual, branch)
            names = [name for name in self.active_adapters if name in self.configs]
            if names:
                return self._sum(residual, branch, names)
        return residual if branch is None else residual + branch

    def _sum(self, residual: Tensor, branch: Tensor | None, names: list[str]) -> Tensor:
        """Add the shifts of several adapters. All are computed from the same hidden state."""
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
        "there is no weight; expected it to be kept (save_pretrained), or taken out (unload)"
    )
