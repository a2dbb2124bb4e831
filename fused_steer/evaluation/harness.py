"""The model `fused-steer` of lm-evaluation-harness: its Hugging Face model, with an adapter.

Importing this file makes the name known: `--model fused-steer --model_args pretrained=…,adapter=…,scale=…`.
"""

from __future__ import annotations

import os
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ..adapters.files import read_adapter
from ..config import checked_number
from ..patch import patch_model
from ..tools.sources import note_parts


@register_model("fused-steer")
class SteeredLM(HFLM):
    """A steered model for lm-evaluation-harness.

    Args:
        pretrained: a directory, a hub id, or a model, as for lm-evaluation-harness's `hf`.
        adapter: a saved adapter: its directory, or its id on the hub. None: the base model.
        scale: the strength, in place of the adapter's own.
        options: all other arguments of `hf`, such as dtype, device and batch_size.

    Raises:
        FileNotFoundError, ValueError: there is no such adapter, or it does not fit the model. The adapter's files are
            read before the model is loaded.
    """

    def __init__(
        self, pretrained: Any, adapter: str | None = None, scale: float | str | None = None, **options: Any
    ) -> None:
        strength = None if scale is None else checked_number("scale", float(scale))
        if adapter is None and strength is not None:
            raise ValueError(f"scale is {strength} without an adapter; expected adapter=…")
        if adapter is not None:
            read_adapter(adapter)
            note_parts(os.fspath(adapter))
        super().__init__(pretrained=pretrained, **options)
        if adapter is not None:
            steering = patch_model(self._model, os.fspath(adapter)).steering
            if strength is not None:
                steering.scale = strength
