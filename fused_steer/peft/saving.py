"""Check steering adapters before PEFT's `save_pretrained` writes anything.

PEFT makes the folder and a model card first and asks a method for its tensors afterwards. It has no hook before
that. So `PeftModel.save_pretrained` is replaced by a function that checks steering adapters and passes all others on.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from peft import PeftModel

from ..adapters.distributed import check_whole
from ..adapters.parameters import check_values, of_adapter
from .config import POST_BLOCK
from .site import PeftSite


def check_before_writing() -> None:
    """Let PEFT check steering adapters before it writes."""
    original = PeftModel.save_pretrained
    if hasattr(original, "of_steering"):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        _check(self, signature.bind(self, *args, **kwargs).arguments)
        original(self, *args, **kwargs)

    save_pretrained.of_steering = True  # type: ignore[attr-defined]
    PeftModel.save_pretrained = save_pretrained  # type: ignore[method-assign]


def _check(model: Any, given: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: a steering adapter is to be a pickle, which nothing of steering reads; or it has values that are not
            finite; or FSDP or ZeRO has sharded it.
    """
    configs = model.peft_config
    for name in given.get("selected_adapters") or configs:
        config = configs.get(name)  # PEFT refuses unknown names
        if config is None or config.peft_type != POST_BLOCK:
            continue
        if not given.get("safe_serialization", True):
            raise ValueError(
                f"safe_serialization is False, and no pickle of steering ({name!r}) can be read; expected True"
            )
        if given.get("kwargs", {}).get("state_dict") is None:  # else PEFT saves other values than the model's
            for site in (site for site in model.modules() if isinstance(site, PeftSite) and name in site.steer_down):
                check_whole(site, str(site.place), f"adapter {name!r}, where state_dict does not give its values,")
            for path, tensor in of_adapter(model.named_parameters(), name).items():
                if not tensor.is_meta:
                    check_values(path, tensor, config.scale)


check_before_writing()
