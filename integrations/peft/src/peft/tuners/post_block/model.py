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

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from .config import PostBlockConfig
from .layer import PostBlockLayer


class PostBlockModel(BaseTuner):
    """
    Creates a post-block steering model from a pretrained model. The method is described in
    https://huggingface.co/papers/2603.00425.

    Args:
        model ([`torch.nn.Module`]): The model to be adapted.
        config ([`PostBlockConfig`]): The configuration of the adapter.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.

    Returns:
        `torch.nn.Module`: The steered model.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import PostBlockConfig, get_peft_model

        >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
        >>> model = get_peft_model(model, PostBlockConfig(r=8, task_type="CAUSAL_LM"))
        ```
    """

    prefix: str = "steer_"
    tuner_layer_cls = PostBlockLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _create_and_replace(
        self,
        config: PostBlockConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if isinstance(target, PostBlockLayer):
            target.update_layer(adapter_name, config)
            return
        model_config = self.get_model_config(self.model)
        hidden_size = model_config.get("hidden_size") or model_config.get("n_embd") or model_config.get("d_model")
        if hidden_size is None:
            raise ValueError("The config of the model has no `hidden_size`, `n_embd` or `d_model`.")
        new_module = PostBlockLayer(target, adapter_name, config, hidden_size)
        if adapter_name not in self.active_adapters:
            # adding an additional adapter: it is not automatically trainable
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)
