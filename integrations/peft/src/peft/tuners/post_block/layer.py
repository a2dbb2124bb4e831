# Copyright 2026-present the HuggingFace Inc. team.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

_ACTIVATIONS = {
    "identity": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "tanh": torch.tanh,
}


class PostBlockLayer(nn.Module, BaseTunerLayer):
    """A decoder block and the shifts of its output."""

    adapter_layer_names = ("steer_down", "steer_up")
    other_param_names = ("r", "activation", "scale")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config, hidden_size: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.hidden_size = hidden_size
        self.steer_down = nn.ModuleDict({})
        self.steer_up = nn.ModuleDict({})
        self.r, self.activation, self.scale = {}, {}, {}
        self._disable_adapters = False
        self.merged_adapters = []
        self.update_layer(adapter_name, config)

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their blocks, such as `attention_type` or `self_attn`.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def update_layer(self, adapter_name: str, config) -> None:
        self.r[adapter_name] = config.r
        self.activation[adapter_name] = config.activation
        self.scale[adapter_name] = config.scale
        self.steer_down[adapter_name] = nn.Linear(self.hidden_size, config.r, bias=False)
        self.steer_up[adapter_name] = nn.Linear(config.r, self.hidden_size, bias=False)
        self.reset_parameters(adapter_name, config.init_weights)
        # The parameters are stored in float32 also beside a base model in half precision.
        device = next((p.device for p in self.base_layer.parameters()), torch.device("cpu"))
        if device.type != "meta":
            self.steer_down[adapter_name].to(device)
            self.steer_up[adapter_name].to(device)
        self.set_adapter(self.active_adapters)

    def reset_parameters(self, adapter_name: str, init_weights: bool) -> None:
        if self.steer_down[adapter_name].weight.device.type == "meta":
            return
        nn.init.kaiming_uniform_(self.steer_down[adapter_name].weight, a=math.sqrt(5))
        if init_weights:
            nn.init.zeros_(self.steer_up[adapter_name].weight)
        else:
            nn.init.kaiming_uniform_(self.steer_up[adapter_name].weight, a=math.sqrt(5))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError("Post-block steering changes hidden states, so it cannot be merged into weights.")

    def unmerge(self) -> None:
        pass

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return output
        if isinstance(output, tuple):
            return (self._steer(output[0]), *output[1:])
        return self._steer(output)

    def _steer(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = hidden_states.dtype
        for name in self.active_adapters:
            if name not in self.steer_down:
                continue
            down, up = self.steer_down[name], self.steer_up[name]
            x = hidden_states.to(down.weight.dtype)
            hidden_states = x + self.scale[name] * up(_ACTIVATIONS[self.activation[name]](down(x)))
        return hidden_states.to(dtype)

    def __repr__(self) -> str:
        return "post_block." + super().__repr__()
