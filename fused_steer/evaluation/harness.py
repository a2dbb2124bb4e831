"""The model `fused-steer` of lm-evaluation-harness: its Hugging Face model, with an adapter.

Importing this file makes the name known: `--model fused-steer --model_args pretrained=…,adapter=…,scale=…`.
"""

from __future__ import annotations

import os
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ..config import checked_bool, checked_number
from ..tools.sources import check_parts, note_parts, parts_of
from ..tools.variants import Variants


@register_model("fused-steer")
class SteeredLM(HFLM):
    """A model with an adapter for lm-evaluation-harness.

    Args:
        pretrained: a directory, a hub id, or a model, as for lm-evaluation-harness's `hf`.
        adapter: steering, a LoRA that PEFT saved, or both together (`save_joint`, a Trainer's checkpoint): the
            directory, or its id on the hub. None: the base model.
        scale: the strength of the steering, in place of the adapter's own.
        check_base: refuse steering if its base model has another name.
        options: all other arguments of `hf`, such as dtype, device and batch_size.

    Raises:
        TypeError: check_base is neither True nor False.
        FileNotFoundError, ValueError: there is no such adapter, or it does not fit the model. The adapter's files are
            read before the model is loaded.
    """

    def __init__(
        self,
        pretrained: Any,
        adapter: str | None = None,
        scale: float | str | None = None,
        check_base: bool = True,
        **options: Any,
    ) -> None:
        checked_bool("check_base", check_base)
        strength = None if scale is None else checked_number("scale", float(scale))
        if adapter is None and strength is not None:
            raise ValueError(f"scale is {strength} without an adapter; expected adapter=…")
        parts = None
        if adapter is not None:
            parts = parts_of(os.fspath(adapter))
            check_parts(parts)
            if strength is not None and parts.steering is None:
                raise ValueError(f"scale is {strength}, and {adapter} is a LoRA; expected an adapter that steers")
            note_parts(os.fspath(adapter))
        super().__init__(pretrained=pretrained, **options)
        if parts is not None:
            Variants(self._model, {"adapter": parts}, check_base).use("adapter")
            if strength is not None:
                self._model.steering.scale = strength
