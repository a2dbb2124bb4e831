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

from dataclasses import dataclass, field
from typing import Literal

from peft.config import PeftConfig
from peft.utils import PeftType

ACTIVATIONS = ("identity", "silu", "gelu", "gelu_tanh", "relu", "tanh")


@dataclass
class PostBlockConfig(PeftConfig):
    """
    This is the configuration class to store the configuration of a [`PostBlockModel`]. Post-block steering is proposed
    in https://huggingface.co/papers/2603.00425. It adds a low-rank shift to the hidden state after a decoder block: `h
    -> h + scale * up(activation(down(h)))`. The base model's weights do not change.

    Args:
        r (`int`):
            The rank of the shift.
        activation (`str`):
            The function between the two projections: "identity", "silu", "gelu", "gelu_tanh", "relu" or "tanh".
        scale (`float`):
            The strength of the shift.
        target_modules (`Optional[Union[List[str], str]]`):
            The decoder blocks to steer, as a regular expression or a list of names. The default is every block, i.e.
            the members of a list named `layers`, `h` or `blocks`.
        init_weights (`bool`):
            Whether to initialize `up` with zeros, so that a fresh adapter changes nothing. Don't change this setting,
            except if you know exactly what you're doing.
    """

    r: int = field(default=8, metadata={"help": "The rank of the shift."})
    activation: Literal["identity", "silu", "gelu", "gelu_tanh", "relu", "tanh"] = field(
        default="silu", metadata={"help": "The function between the two projections."}
    )
    scale: float = field(default=1.0, metadata={"help": "The strength of the shift."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "The decoder blocks to steer, as a regular expression or a list of names. Default: all."},
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "Whether to initialize `up` with zeros, so that a fresh adapter changes nothing."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.POST_BLOCK
        if self.r < 1:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {self.r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"`activation` is {self.activation!r}, expected one of {ACTIVATIONS}")
        if self.target_modules is None:
            self.target_modules = r"(.*\.)?(layers|h|blocks)\.\d+"
        elif isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
